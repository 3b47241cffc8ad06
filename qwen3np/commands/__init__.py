"""The commands of the command line, one file each, and the flags that several of them share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3np.config import Config
from qwen3np.errors import ConfigError
from qwen3np.loading import DEFAULT_MAX_NEW_TOKENS, Model, load
from qwen3np.numerics import ENGINES, NUMERICS
from qwen3np.settings import GenerationSettings
from qwen3np.tokenizer import Tokenizer, stop_at


def add_model(
    parser: argparse.ArgumentParser,
    needed: str | None = None,
    default: str = "the small checkpoint that is built in",
) -> None:
    """Add the flags that name a checkpoint: one such as `needed`, where the built-in one cannot do what is asked."""
    group = parser.add_argument_group("checkpoint")
    text = f"a folder, or a Hub id such as {needed or 'Qwen/Qwen3-0.6B'}" + (
        f" (default: {default})" if not needed else ""
    )
    group.add_argument("--model", metavar="M", required=needed is not None, help=text)
    group.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")
    scaling = (
        "yarn:FACTOR extends the context, of 32,768 positions to 131,072 with yarn:4 (default: as config.json says)"
    )
    group.add_argument("--rope-scaling", metavar="TYPE:FACTOR", help=scaling)


def scaled(config: Config, arguments: argparse.Namespace) -> Config:
    """Return the config as --rope-scaling extends it. Raises ConfigError for what is not yarn:FACTOR."""
    if arguments.rope_scaling is None:
        return config
    kind, _, factor = arguments.rope_scaling.partition(":")
    if kind != "yarn":
        raise ConfigError(f"--rope-scaling: type {kind!r} is not supported; supported: yarn:FACTOR")
    try:
        return config.extended(float(factor))
    except ValueError as error:
        reason = error if isinstance(error, ConfigError) else f"{factor!r} is no number" if factor else "no factor"
        raise ConfigError(f"--rope-scaling {arguments.rope_scaling}: {reason}; an example: yarn:4") from None


def named(arguments: argparse.Namespace) -> str | None:
    """Return what --model says; without it say on stderr which checkpoint it is then."""
    if arguments.model is None:
        print("[the small built-in checkpoint; --model Qwen/Qwen3-0.6B names a large one]", file=sys.stderr)
    return arguments.model


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
    """Add the flag that says how many threads compute."""
    threads = "how many threads (QWEN3NP_NUM_THREADS, else all cores)"
    parser.add_argument("--threads", metavar="N", help=threads)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the text goes on, and when it ends."""
    group = parser.add_argument_group("generation (defaults: the checkpoint's generation_config.json)")
    tokens = f"end after N tokens (without a default of the checkpoint: {DEFAULT_MAX_NEW_TOKENS})"
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=tokens)
    group.add_argument("--stop-id", type=int, action="append", metavar="ID", help="end after this id (repeatable)")
    group.add_argument(
        "--stop", type=text, action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (0: off)")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that make up P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    group.add_argument("--presence-penalty", type=float, metavar="P", help="above 0: no token of the answer twice")
    group.add_argument("--frequency-penalty", type=float, metavar="P", help="above 0: tokens of the answer less often")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text, for each prompt anew")


def generation_options(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of qwen3np.generate: the flags over the checkpoint's defaults."""
    given = {
        name: getattr(arguments, name, None) for name in (*GenerationSettings.__annotations__, "numerics", "engine")
    }
    given["stop"] = None  # the flag means strings; see Ends
    options = {**model.generation_defaults(), **{name: value for name, value in given.items() if value is not None}}
    return options | ({"stop_ids": tuple(arguments.stop_id)} if arguments.stop_id else {})


def load_named(arguments: argparse.Namespace) -> Model:
    """Return the model that the flags name."""
    model = load(named(arguments), revision=arguments.revision, weights_dtype=arguments.weights_dtype)
    return replace(model, config=scaled(model.config, arguments))


def load_model(arguments: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Return the model that the flags name, and its tokenizer. Raises ValueError where it has none."""
    model = load_named(arguments)
    size, stops = model.text.vocab_size, model.generation_defaults().get("stop_ids") or ()
    if any(token >= size for token in stops):
        raise ValueError(
            f"{arguments.model}: the tokenizer has {size} entries, but the model ends its answers with {stops}: "
            "they do not belong together"
        )
    return model, model.text


def text(argument: str) -> str:
    """Return an argument of the command line as the UTF-8 text it is, whatever the locale took it for."""
    return utf8(os.fsencode(argument), "argument")


def read_text(path: str) -> str:
    """Return the text of a file, or of stdin for "-", as it is. Raises ValueError where it is not UTF-8."""
    return utf8(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes(), path)


def read_texts(given: list[str], path: str | None, what: str) -> list[str]:
    """Return the texts given as arguments, else the lines of a file, or of stdin where no file is named either."""
    if given and path is not None:
        raise ValueError(f"{what} and --file are given; one of them is enough")
    if given:
        return given
    if path is None and sys.stdin.isatty():
        raise ValueError(f"no {what}: give them as arguments, or one a line with --file or on stdin")
    found = read_text("-" if path is None else path)
    return [line.removesuffix("\r") for line in found.removesuffix("\n").split("\n")] if found else []


def utf8(data: bytes, where: str) -> str:
    """Return the text of bytes that come from `where`. Raises ValueError where they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None


@dataclass(frozen=True)
class Ends:
    """What ends an answer: a stop id, or a stop string, which may be spread over several tokens."""

    tokenizer: Tokenizer
    ids: Collection[int]
    strings: Collection[str]

    def reached(self, new: list[int]) -> bool:
        """Whether the newest of these ids ends the answer."""
        # every token that says something is a byte or more, so a stop string lies within this many tokens
        width = 4 + max((len(string.encode()) for string in self.strings), default=0)
        tail = self.tokenizer.decode(new[-width:], skip_special_tokens=True) if self.strings else ""
        return new[-1] in self.ids or any(string in tail for string in self.strings)

    def text(self, ids: Iterator[int]) -> Iterator[str]:
        """Return the text of an answer, piece by piece, without what ended it."""
        said = (token for token in ids if token not in self.ids)
        return stop_at(self.tokenizer.stream(said, skip_special_tokens=True), self.strings)


def progress_bar(total: int | None, what: str, unit: str = "tok") -> Any:
    """Return a tqdm bar on stderr that counts tokens, where that is a terminal; it goes when it is closed."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of a name and a value, the values one below the other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
