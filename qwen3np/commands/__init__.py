"""The commands of the command line, one file each, and the flags that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3np.config import Config
from qwen3np.errors import ConfigError
from qwen3np.files.hub import BUILTIN
from qwen3np.files.limits import readable
from qwen3np.loading import load
from qwen3np.model import DEFAULT_MAX_NEW_TOKENS, Model
from qwen3np.numerics import ENGINES, NUMERICS
from qwen3np.settings import PROGRAM, GenerationSettings, checked
from qwen3np.terminal import bars
from qwen3np.tokenizer import Tokenizer, said_in, stop_at


def add_model(
    parser: argparse.ArgumentParser,
    needed: str | None = None,
    default: str = "the small built-in checkpoint",
) -> None:
    """Add the flags that name a checkpoint; `needed` is an example where the built-in one cannot do the task."""
    group = parser.add_argument_group("checkpoint")
    text = f"a folder, a .gguf file, or a Hub id such as {needed or 'Qwen/Qwen3-0.6B'}" + (
        f" (default: {default})" if not needed else ""
    )
    group.add_argument("-m", "--model", metavar="M", required=needed is not None, help=text)
    group.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")
    group.add_argument("--gguf-file", metavar="F", help="the GGUF file to use, in the folder or on the Hub")
    group.add_argument("--adapter", metavar="A", help="a LoRA adapter to apply: a folder, or a Hub id")
    scaling = "yarn:FACTOR extends the context; yarn:4 makes 131,072 positions of 32,768 (default: as in config.json)"
    group.add_argument("--rope-scaling", type=_yarn, metavar="TYPE:FACTOR", help=scaling)


def scaled(config: Config, arguments: argparse.Namespace) -> Config:
    """Return the config as extended by --rope-scaling. Raises ConfigError for an unsupported factor."""
    try:
        return config if arguments.rope_scaling is None else config.extended(arguments.rope_scaling)
    except ConfigError as error:
        raise ConfigError(f"--rope-scaling yarn:{arguments.rope_scaling:g}: {error}; example: yarn:4") from None


def _yarn(written: str) -> float:
    """Return FACTOR of yarn:FACTOR."""
    kind, _, factor = written.partition(":")
    if kind != "yarn":
        raise argparse.ArgumentTypeError(f"type {kind!r} is not supported; supported: yarn:FACTOR")
    try:
        return float(factor)
    except ValueError:
        reason = f"{factor!r} is not a number" if factor else "no factor"
        raise argparse.ArgumentTypeError(f"{reason}; example: yarn:4") from None


def named(arguments: argparse.Namespace) -> str | None:
    """Return --model; without it, report on stderr which checkpoint is used."""
    model: str | None = arguments.model
    if model is None:
        print("[the small built-in checkpoint; --model Qwen/Qwen3-0.6B names a large one]", file=sys.stderr)
    return model


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to compute."""
    group = parser.add_argument_group("computation")
    group.add_argument("--numerics", choices=tuple(NUMERICS), default="float32", help="where numbers are rounded")
    engine = "fast, plain (the formulas) or exact (correctly rounded: the same bits on every machine)"
    group.add_argument("--engine", choices=ENGINES, default="fast", help=engine)
    group.add_argument(
        "--weights-dtype",
        choices=("auto", "mapped", "bfloat16", "float32"),
        default="auto",
        help="mapped uses the file as it is (bfloat16: its old name), float32 makes a faster copy, auto decides",
    )
    add_threads(group)


def add_threads(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flag for the number of threads."""
    threads = "number of threads (default: QWEN3NP_NUM_THREADS, else all cores)"
    parser.add_argument("-t", "--threads", metavar="N", help=threads)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the flags for how a text continues, and when it ends."""
    group = parser.add_argument_group("generation (defaults: the checkpoint's generation_config.json)")
    tokens = f"end after N tokens (if the checkpoint has no default: {DEFAULT_MAX_NEW_TOKENS})"
    group.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help=tokens)
    stop_id = "also end after this id (repeatable); --set stop_ids=[...] replaces the checkpoint's"
    group.add_argument("--stop-id", type=int, action="append", metavar="ID", help=stop_id)
    group.add_argument(
        "--stop", type=text, action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (0: off)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only the likeliest tokens that together have probability P"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: less repetition")
    group.add_argument(
        "--presence-penalty", type=float, metavar="P", help="above 0: tokens already in the answer become less likely"
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="P",
        help="above 0: less likely the more often they are in the answer",
    )
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add_guesses(group)
    any_other = "any other key of generation_config.json, with a JSON value: no_repeat_ngram_size=3 (repeatable)"
    group.add_argument("--set", type=text, action="append", default=[], metavar="NAME=VALUE", help=any_other)


def add_guesses(parser: Any) -> None:
    """Add the flags of guesses at the next tokens (a parser or a group)."""
    lookup = (
        "guess N tokens, up to 7, as they followed the last ones before: the same text, sooner where it repeats itself"
    )
    parser.add_argument("--prompt-lookup", dest="prompt_lookup_num_tokens", type=int, metavar="N", help=lookup)
    draft = "guess with this smaller model of the same vocabulary: the same text, sooner if it often agrees"
    parser.add_argument("--draft", metavar="M", help=draft)


def setting(written: str) -> dict[str, Any]:
    """Parse and check a setting, NAME=VALUE or NAME VALUE. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\w+)\s*[=\s]\s*(.*?)\s*", written, re.DOTALL)
    if found is None:
        raise ValueError(f"{written!r} is not NAME=VALUE, such as temperature=0.7 or no_repeat_ngram_size=3")
    name, value = found[1].replace("-", "_"), found[2]
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        value = json.loads(value)
    if name in PROGRAM:
        raise ValueError(f"{name} cannot be set here: it is for programs or has its own flag; stop_strings takes texts")
    try:
        checked({name: value}, needed=False)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return {name: value}


def flags_of_generation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given by flags, checked, so that errors come before anything is loaded."""
    given: dict[str, Any] = {}
    for name in GenerationSettings.__annotations__:
        value = getattr(arguments, name, None)
        if name != "stop" and value is not None:  # this flag takes strings; see Ends
            given[name] = value
    checked(given, needed=False)
    if negative := [i for i in arguments.stop_id or () if i < 0]:
        raise ValueError(f"--stop-id {negative[0]}: ids are whole numbers from 0")
    if "" in arguments.stop:
        raise ValueError("--stop: stop strings must not be empty")
    for written in arguments.set:
        given |= setting(written)
    return given


def generation_options(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of qwen3np.generate: the flags over the checkpoint's defaults."""
    options: dict[str, Any] = dict(model.generation_settings(flags_of_generation(arguments)))
    options["stop_ids"] = (*(options["stop_ids"] or ()), *(arguments.stop_id or ()))
    if beyond := [i for i in options["stop_ids"] if not 0 <= i < model.config.vocab_size]:
        raise ValueError(f"--stop-id {beyond[0]}: the vocabulary's ids are 0 to {model.config.vocab_size - 1}")
    options |= guessing(arguments)
    checked(options)
    return options | {"numerics": arguments.numerics, "engine": arguments.engine}


def guessing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of guesses that the flags of add_guesses ask for."""
    found: dict[str, Any] = {}
    if arguments.prompt_lookup_num_tokens is not None:
        found["prompt_lookup_num_tokens"] = arguments.prompt_lookup_num_tokens
    if arguments.draft is not None:
        found["assistant_model"] = load(arguments.draft, weights_dtype=arguments.weights_dtype)
    return found


def load_named(arguments: argparse.Namespace) -> Model:
    """Return the model that the flags name."""
    model = load(
        named(arguments),
        revision=arguments.revision,
        gguf_file=arguments.gguf_file,
        adapter=arguments.adapter,
        weights_dtype=arguments.weights_dtype,
    )
    return replace(model, config=scaled(model.config, arguments))


def load_model(arguments: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Return the model that the flags name, and its tokenizer. Raises ValueError if it has none."""
    model = load_named(arguments)
    size, stops = model.text.vocab_size, model.generation_defaults().get("stop_ids") or ()
    if any(token >= size for token in stops):
        raise ValueError(
            f"{arguments.model}: the tokenizer has {size} entries, but the model ends its answers with {stops}: "
            "they do not belong together"
        )
    return model, model.text


def add_texts_and_model(parser: argparse.ArgumentParser, what: str, kind: str) -> None:
    """Add the flags of a command that computes something from texts with a model of this kind."""
    add_texts(parser, what)
    add_model(parser, f"Qwen/Qwen3-{kind}-0.6B")
    add_computation(parser)


def texts_and_model(given: list[str], arguments: argparse.Namespace, what: str, kind: str) -> tuple[list[str], Model]:
    """Return the texts and the model of such a command. Warn on stderr if the model seems to be of another kind.

    Chat models pad their vocabulary beyond the tokenizer's entries; Qwen's models of other kinds do not.
    """
    texts = read_texts(given, arguments, what)
    model, _ = load_model(arguments)
    made_so = kind.lower() in Path(arguments.model).name.lower() or model.pooling or "score.weight" in model.weights
    if not made_so and (model.config.vocab_size > model.text.vocab_size or model.text.folder == BUILTIN):
        print(
            f"[{arguments.model} looks like a model for generating text, not trained for this; "
            f"Qwen/Qwen3-{kind}-0.6B was]",
            file=sys.stderr,
        )
    return texts, model


def text(argument: str) -> str:
    """Return a command-line argument as UTF-8 text, whatever the locale."""
    return utf8(os.fsencode(argument), "argument")


def read_text(path: str) -> str:
    """Return the text of a file, or of stdin for "-". Raises ValueError where it is not UTF-8, or stdin is empty.

    A byte order mark, which Windows editors write, is dropped.
    """
    found = utf8(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes(), "stdin" if path == "-" else path)
    if path == "-" and not found:
        raise ValueError("stdin is empty, so there is no text")
    return found.removeprefix("\ufeff")


def add_texts(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flags for a file of texts."""
    parser.add_argument("--file", metavar="F", help=f"read the {what} from a file (default, and -: stdin)")
    lines = f"each line of the file or stdin is a {what} (default: the whole file is one)"
    parser.add_argument("--lines", action="store_true", help=lines)


def read_texts(given: list[str], arguments: argparse.Namespace, what: str) -> list[str]:
    """Return the texts given as arguments, else the text of a file or stdin, or its lines with --lines."""
    path: str | None = arguments.file
    if given and path is not None:
        raise ValueError(f"both a {what} and --file are given; use one of them")
    if given:
        if arguments.lines:
            raise ValueError(f"--lines is for --file and stdin, but a {what} was given as an argument")
        return given
    if path is None and sys.stdin.isatty():
        raise ValueError(f"no {what}: give it as an argument, with --file, or on stdin")
    found = read_text("-" if path is None else path)
    if not arguments.lines:
        return [found.removesuffix("\n").removesuffix("\r")]
    lines = [line.removesuffix("\r") for line in found.removesuffix("\n").split("\n")]
    texts = [line for line in lines if line.strip()]
    if blank := len(lines) - len(texts):
        print(f"[{blank} blank line{'s' * (blank > 1)} left out]", file=sys.stderr)
    if not texts:
        raise ValueError(f"{path or 'stdin'}: no line with a {what}")
    return texts


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that use the chat template."""
    parser.add_argument("--system", type=text, metavar="TEXT", help="a system message")
    parser.add_argument("--think", choices=("on", "off"), help="reasoning before the answer")
    parser.add_argument("--hide-thinking", action="store_true", help="do not show the reasoning")
    messages = 'start with the messages in a JSON file: [{"role": "user", "content": "..."}, ...], or from /save'
    parser.add_argument("--messages", metavar="FILE", help=messages)
    parser.add_argument("--tools", metavar="FILE", help="offer the tools of a JSON file: a list of their schemas")
    special = "interpret special tokens written in messages (default: treat them as plain text)"
    parser.add_argument("--special-tokens", action="store_true", help=special)


def chat_files(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages and the tools given by the flags of add_chat. Raises ValueError for other JSON."""
    messages = read_objects(arguments.messages, "messages") if arguments.messages else []
    if arguments.system:
        messages = [
            {"role": "system", "content": arguments.system},
            *[m for m in messages if m.get("role") not in ("system", "developer")],
        ]
    return messages, read_objects(arguments.tools, "tools") if arguments.tools else None


def read_objects(path: str, what: str) -> list[dict[str, Any]]:
    """Return the list of objects in a JSON file, at the top level or under `what`. ValueError for other files."""
    try:
        found: Any = json.loads(read_text(path if path == "-" else str(readable(Path(path)))))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    found = found.get(what) if isinstance(found, dict) else found
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise ValueError(f'{path}: must hold a list of {what}, or {{"{what}": [...]}}')
    return found


def utf8(data: bytes, where: str) -> str:
    """Decode bytes that come from `where`. Raises ValueError if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None


@dataclass(frozen=True)
class Ends:
    """What ends an answer: a stop id or a stop string, which may span several tokens."""

    tokenizer: Tokenizer
    ids: Collection[int]
    strings: Collection[str]

    def reached(self, new: list[int]) -> bool:
        """Whether the newest of these ids ends the answer."""
        return new[-1] in self.ids or said_in(self.tokenizer, self.strings)(new)

    def text(self, ids: Iterator[int]) -> Iterator[str]:
        """Return the text of an answer in pieces, without the stop string that ended it."""
        said = (token for token in ids if token not in self.ids)
        return stop_at(self.tokenizer.stream(said, skip_special_tokens=True), self.strings)


def progress_bar(total: int | None, what: str, unit: str = "tok") -> Any:
    """Return a tqdm bar that counts tokens, shown if stderr is a terminal, and erased when closed."""
    tqdm = bars()

    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of names and values, with the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
