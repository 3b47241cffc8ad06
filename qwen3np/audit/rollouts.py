"""Rollouts as engines and trainers write them: JSON lines of ids and log-probabilities, by whatever names.

Fields are found by name, through the objects that vLLM, SGLang, llama.cpp and OpenAI-style servers wrap them in. Files
are untrusted: every limit below is checked before a value is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen3np.audit.forms import answers, by_text, experts_from, kind_of, listed, number, of_the_answer
from qwen3np.errors import one_line
from qwen3np.files.limits import parse_json
from qwen3np.numerics import Array
from qwen3np.tokenizer import Tokenizer

LINE = 1 << 26  # bytes of one line
TOKENS = 1 << 20  # of all rollouts, prompts included
NUMBERS = 1 << 25  # log-probabilities, with as many at every position as at the fullest
ECHOED = 4  # ids at the start of an answer that are the prompt's: it is the prompt, repeated and perhaps cut
TOP = 1 << 8  # likeliest tokens at a position; a list of the whole vocabulary has its own form

# What each of our fields is called elsewhere; the first that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt_ids": ("prompt_ids", "prompt_token_ids", "prompts", "input_ids", "prompt_tokens"),
    "ids": (
        *(
            "ids",
            "completion_ids",
            "output_ids",
            "response_ids",
            "responses",
            "output_token_ids",
            "completion_token_ids",
        ),
        *("token_ids", "tokens"),
    ),
    "logprobs": (
        *("logprobs", "rollout_log_probs", "rollout_logprobs", "response_logprobs", "completion_logprobs"),
        *("generation_logprobs", "sampling_logprobs", "sampling_per_token_logps", "output_token_logprobs"),
        *("token_logprobs", "completion_probabilities", "log_probs", "old_log_probs", "old_per_token_logps"),
    ),
    "top": ("top", "top_logprobs", "output_top_logprobs"),
    "messages": ("messages",),
    "prompt": ("prompt", "input"),
    "mask": ("response_mask", "completion_mask", "loss_mask", "action_mask"),
    "routed_experts": ("routed_experts",),
}


@dataclass(frozen=True)
class Rollout:
    """One answer: the ids of prompt and answer, and the log-probabilities that the engine reported.

    found (n, 1 + k) are ids at the answer's n positions: the chosen one and k others, -1 where there are fewer;
    logprobs (n, 1 + k) belong to them, NaN where none was reported.
    """

    prompt: list[int]
    ids: list[int]
    found: Array
    logprobs: Array
    where: str
    messages: Any = None
    experts: Array | None = None  # (positions, layers, experts per token), or flat, as the engine chose them


@dataclass
class Fields:
    """Which key holds which field: given by the user, or the first known one; `used` collects them for the report."""

    given: Mapping[str, str] = field(default_factory=dict[str, str])
    used: dict[str, str] = field(default_factory=dict[str, str])
    unused: set[str] = field(default_factory=set[str])  # other keys that hold log-probabilities

    def __post_init__(self) -> None:
        """Raise ValueError for a field that does not exist."""
        for name in self.given:
            if name not in NAMES:
                raise ValueError(f"--field {name}=...: there is no such field; fields: {', '.join(NAMES)}")

    def of(self, row: Mapping[str, Any], name: str) -> Any:
        """Return the value of one of our fields, or None."""
        keys = (self.given[name],) if name in self.given else NAMES[name]
        here = [key for key in keys if row.get(key) is not None]
        if name == "logprobs":
            self.unused |= {*here[1:]} - {"output_token_logprobs"}
        if not here:
            return None
        self.used[name] = here[0]
        return row[here[0]]


def read_rollouts(
    source: str | Path | Iterable[Any],
    tokenizer: Tokenizer | None,
    vocabulary: int,
    fields: Fields | None = None,
    echoed: bool = False,
) -> list[Rollout]:
    """Read a file of JSON lines, or with one JSON array or object; or such objects themselves.

    With echoed, the prompts' log-probabilities are read as well where they are there. Raises ValueError, with the
    number of the line, for anything that cannot be used.
    """
    reader, found = _Reader(tokenizer, vocabulary, fields or Fields(), echoed), list[Rollout]()
    tokens = answers = width = 0
    is_file = isinstance(source, str | Path)
    values = _lines(Path(source)) if is_file else ((f"rollout {n}", x) for n, x in enumerate(source, 1))
    for where, value in values:
        try:
            some = list(reader.rollouts(value, where))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(one_line(f"{where}: {error}")) from None
        for rollout in some:
            tokens += len(rollout.prompt) + len(rollout.ids)
            if tokens > TOKENS:
                raise ValueError(f"{where}: more than {TOKENS:,} tokens; audit a part of the file")
            answers, width = answers + len(rollout.ids), max(width, rollout.found.shape[1])
            _check_numbers(answers, width, f"{where}: ")
        found += some
    if not found:
        raise ValueError(f"{source}: no rollouts" if is_file else "there are no rollouts")
    return found


def _check_numbers(tokens: int, width: int, where: str = "") -> None:
    if tokens * width > NUMBERS:
        raise ValueError(
            f"{where}{tokens:,} tokens with up to {width:,} log-probabilities each are too many; audit a part"
        )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each JSON value of a file, and where it is."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LINE:
                raise ValueError(f"{where}: longer than {LINE >> 20} MiB")
            if not line.strip():
                continue
            if number == 1 and line.strip() in (b"[", b"{"):  # a pretty-printed file, which is one value
                line += file.read(LINE + 1 - len(line))
                if len(line) > LINE:
                    raise ValueError(f"{path}: one JSON value longer than {LINE >> 20} MiB; write JSON lines")
            try:
                value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(one_line(f"{where}: not JSON: {error}")) from None
            yield from ((where, one) for one in (value if isinstance(value, list) else [value]))


@dataclass
class _Reader:
    tokenizer: Tokenizer | None
    vocabulary: int
    fields: Fields
    echoed: bool
    _by_bytes: dict[bytes, int] = field(default_factory=dict[bytes, int])

    def rollouts(self, value: Any, where: str) -> Iterator[Rollout]:
        """Yield the rollouts of a JSON object: one, or one for each answer or row of a batch."""
        if not isinstance(value, dict):
            raise ValueError(f"holds {kind_of(value)} where an object is needed")
        for row in answers(value):
            ids = self.fields.of(row, "ids")
            if isinstance(ids, list) and ids and isinstance(ids[0], list):
                lists = {key: x for key, x in row.items() if isinstance(x, list) and len(x) == len(ids)}
                for i in range(len(ids)):
                    yield self.rollout(row | {key: x[i] for key, x in lists.items()}, f"{where}, row {i + 1}")
            else:
                yield self.rollout(row, where)

    def rollout(self, row: Mapping[str, Any], where: str) -> Rollout:
        """Return the rollout in one flat object."""
        of = self.fields.of
        entries, top = self._entries(of(row, "logprobs")), self._entries(of(row, "top"))
        if entries is None:
            raise ValueError(
                f"no log-probabilities; known names: {', '.join(NAMES['logprobs'])} (--field logprobs=NAME)"
            )
        messages = of(row, "messages")
        ids, prompt = of(row, "ids"), self._prompt(row, messages)
        if ids is None:
            ids = [self._id(entry[0][0]) if entry and entry[0][0] is not None else None for entry in entries]
            if None in ids:  # half of a character, which servers replace: what follows cannot be known
                ids = ids[: ids.index(None)]
            if not ids:
                raise ValueError(f"no ids of the answer; known names: {', '.join(NAMES['ids'])} (--field ids=NAME)")
            entries, top = entries[: len(ids)], top and top[: len(ids)]
        ids = self._ids(ids, "the answer")
        echoes = self.echoed and len(entries) == len(ids) and ids[: len(prompt)] == prompt[: len(ids)]
        if echoes and len(ids) >= min(len(prompt) + 1, ECHOED):
            prompt, ids, entries, top = ids[:1], ids[1:], entries[1:], top and top[1:]
        if len(ids) > len(prompt) > 0 and ids[: len(prompt)] == prompt and len(entries) != len(ids):
            ids = ids[len(prompt) :]  # prompt and answer together
        count, whole = len(ids), len(ids) + len(prompt)
        entries, top = (
            of_the_answer(entries, count, whole, "log-probabilities"),
            of_the_answer(top or [], count, whole, "top"),
        )
        rows = [self._row(i, x, y) for i, x, y in zip(ids, entries, top or [[]] * count, strict=True)]
        if (mask := of(row, "mask")) is not None:
            kept = of_the_answer([[(None, float(x))] for x in mask], count, whole, "mask")
            rows = [r if k[0][1] else {} for r, k in zip(rows, kept, strict=True)]
        width = max([1, *map(len, rows)])
        _check_numbers(count, width)
        found, logprobs = np.full((count, width), -1), np.full((count, width), np.nan)
        for n, (token, r) in enumerate(zip(ids, rows, strict=True)):
            here = {token: r.get(token, math.nan)} | r
            found[n, : len(here)], logprobs[n, : len(here)] = list(here), list(here.values())
        return Rollout(prompt, ids, found, logprobs, where, messages, experts_from(of(row, "routed_experts")))

    def _prompt(self, row: Mapping[str, Any], messages: Any) -> list[int]:
        ids, text = self.fields.of(row, "prompt_ids"), self.fields.of(row, "prompt")
        if ids is not None:
            mask = row.get("attention_mask")
            if isinstance(mask, list) and len(mask) >= len(ids):  # padded on the left
                ids = [i for i, seen in zip(ids, mask, strict=False) if seen]
            return self._ids(ids, "the prompt")
        if isinstance(text, list) and text and isinstance(text[0], int):
            return self._ids(text, "the prompt")
        messages = text if isinstance(text, list) else messages
        if messages is None and not isinstance(text, str):
            raise ValueError(f"no prompt; known names: {', '.join((*NAMES['prompt_ids'], 'messages', 'prompt'))}")
        tokenizer = self._tokenizer("the prompt is a text")
        if messages is None:
            return tokenizer.encode(str(text))
        return tokenizer.apply_chat_template(messages, tokenize=True)

    def _tokenizer(self, why: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{why}, and the checkpoint has no tokenizer to read it with")
        return self.tokenizer

    def _ids(self, ids: Any, what: str) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise ValueError(
                f"the ids of {what} are {kind_of(ids)}, not a list of ids" if ids != [] else f"{what} is empty"
            )
        if len(ids) > TOKENS:
            raise ValueError(f"{what} has {len(ids):,} ids; at most {TOKENS:,} are read")
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocabulary:
                raise ValueError(f"{what}: {one_line(repr(i))[:60]} is not an id from 0 to {self.vocabulary - 1}")
        return ids

    def _id(self, token: Any) -> int | None:
        """Return the id of a token: a number, "token_id:N", its text or its bytes; None for an unknown text."""
        if isinstance(token, int):
            return token
        if isinstance(token, str) and token.startswith("token_id:") and token[9:29].isdecimal():
            return int(token[9:29])
        tokenizer = self._tokenizer("tokens are texts")
        if not self._by_bytes:
            ids = range(min(tokenizer.vocab_size, self.vocabulary) - 1, -1, -1)
            self._by_bytes.update((tokenizer.token_bytes(i), i) for i in ids)
        if isinstance(token, str) and token.startswith("bytes:"):  # as OpenAI writes half of a character
            token = [int(byte, 16) for byte in token[6:].split("\\x")[1:]]
        return self._by_bytes.get(bytes(token) if isinstance(token, list) else str(token).encode())

    def _entries(self, value: Any) -> list[list[tuple[Any, float]]] | None:
        """Return (token or None, log-probability) at each position, the chosen one first."""
        if isinstance(value, dict):  # OpenAI: chat, then completions
            content = value.get("content")
            numbers = value.get("token_logprobs")
            if content is None and isinstance(numbers, list):
                tokens, top = (value.get(key) or [None] * len(numbers) for key in ("token_ids", "top_logprobs"))
                if not value.get("token_ids") and value.get("tokens"):
                    tokens = value["tokens"]
                return [[(t, number(x)), *by_text(y)] for t, x, y in zip(tokens, numbers, top, strict=True)]
            value = content
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"log-probabilities are {kind_of(value)}, not a list")
        if len(value) > TOKENS:
            raise ValueError(f"{len(value):,} log-probabilities; at most {TOKENS:,} are read")
        return [listed(x) for x in value]

    def _row(self, token: int, entry: list[tuple[Any, float]], top: list[tuple[Any, float]]) -> dict[int, float]:
        """Return the log-probability of each id at one position."""
        if len(entry) == self.vocabulary and all(t is None for t, _ in entry):
            return {i: x for i, (_, x) in enumerate(entry)}  # of the whole vocabulary
        if len(entry) + len(top) > TOP:
            raise ValueError(
                f"{len(entry) + len(top)} log-probabilities at one position: neither a few nor the vocabulary"
            )
        found = dict[int, float]()
        for name, x in (*entry, *top):
            i = token if name is None else self._id(name)
            if i is None:
                continue
            if not 0 <= i < self.vocabulary:
                raise ValueError(f"a log-probability of id {i}, which the vocabulary does not have")
            found.setdefault(i, x)
        return found
