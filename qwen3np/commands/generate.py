"""`qwen3np generate`: continue a text, or several at once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from qwen3np.commands import (
    add_computation,
    add_generation,
    add_model,
    generation_options,
    load_model,
    progress_bar,
    read_text,
)
from qwen3np.generate import Step, new_cache, steps, stop_at
from qwen3np.sampling import SamplingParameters, log_probabilities
from qwen3np.tokenizer import Tokenizer

EXAMPLE = 'qwen3np generate --model Qwen/Qwen3-0.6B "The capital of France is"'
HELP = "continue a text, or several at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue (default: read stdin)")
    parser.add_argument("--file", type=Path, metavar="F", help="read the prompt from a file")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message (with --chat)")
    parser.add_argument("--think", choices=("on", "off"), help="reasoning before the answer (with --chat)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line: ids, text, logprobs, timings")
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="N", help="with --json: the N likeliest ids too")
    add_generation(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation of each prompt as it comes, or as JSON when it is whole."""
    texts = _prompts(arguments)
    began = time.perf_counter()
    model, tokenizer = load_model(arguments)
    if arguments.chat:
        texts = [_as_chat(tokenizer, text, arguments) for text in texts]
    prompts = [tokenizer.encode(text) for text in texts]
    options = generation_options(model, arguments)
    ends = _Ends(tokenizer, options["stop_ids"], arguments.stop)
    filters = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    loaded = time.perf_counter()
    with progress_bar(sum(map(len, prompts)), "prompt") as bar:
        found = steps(
            model.weights,
            model.config,
            prompts,
            new_cache(model.config, prompts, options["max_new_tokens"], arguments.numerics),
            max_new_tokens=options["max_new_tokens"],
            sampling=SamplingParameters(**{name: options[name] for name in filters if name in options}),
            stop=ends.reached,
            seed=arguments.seed,
            numerics=arguments.numerics,
            progress=bar.update,
        )
        first = next(found)
    prefilled = time.perf_counter()

    rows = _by_row(chain([first], found), len(prompts), arguments.top_logprobs if arguments.json else None)
    count = 0
    for text, prompt, tokens in zip(texts, prompts, rows, strict=True):
        answer: list[_Token] = []
        pieces = ends.text(_collected(tokens, answer))
        if arguments.json:
            continuation = "".join(pieces)
            ids = [token.id for token in answer]
            result = {
                "prompt": text,
                "prompt_ids": prompt,
                "text": continuation,
                "ids": ids,
                "logprobs": [token.logprob for token in answer],
                "top_logprobs": [token.top for token in answer],
                "finish_reason": "stop" if ends.reached(ids) else "length",
                "timings": {
                    "load_seconds": round(loaded - began, 6),
                    "prompt_seconds": round(prefilled - loaded, 6),
                    "generation_seconds": round(time.perf_counter() - prefilled, 6),
                },
            }
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        count += len(answer)
    seconds = time.perf_counter() - prefilled
    rate = f"{(count - 1) / seconds:.1f} tokens/s" if count > 1 else "one token"
    print(
        f"[prompt {sum(map(len, prompts))} tokens in {prefilled - loaded:.2f} s; answer {count} tokens, {rate}]",
        file=sys.stderr,
    )


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if not arguments.chat and (arguments.system or arguments.think):
        raise ValueError("--system and --think belong to --chat")
    if arguments.file is not None:
        if arguments.prompts:
            raise ValueError("a prompt and --file are given; one of them is enough")
        return [read_text(arguments.file)]
    if arguments.prompts:
        return arguments.prompts
    if sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --file, or on stdin")
    return [sys.stdin.read()]


def _as_chat(tokenizer: Tokenizer, text: str, arguments: argparse.Namespace) -> str:
    messages = [{"role": "user", "content": text}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    thinking = None if arguments.think is None else arguments.think == "on"
    return tokenizer.apply_chat_template(messages, enable_thinking=thinking)


@dataclass(frozen=True)
class _Ends:
    """What ends an answer: a stop id, or a stop string, which may be spread over several tokens."""

    tokenizer: Tokenizer
    ids: Collection[int]
    strings: Collection[str]

    def reached(self, new: list[int]) -> bool:
        """Whether the newest of these ids ends the answer."""
        # every token that says something is a byte or more, so a stop string lies within this many tokens
        width = 4 + max((len(text.encode()) for text in self.strings), default=0)
        tail = self.tokenizer.decode(new[-width:]) if self.strings else ""
        return new[-1] in self.ids or any(text in tail for text in self.strings)

    def text(self, ids: Iterator[int]) -> Iterator[str]:
        """Return the text of an answer, piece by piece, without what ended it."""
        said = (token for token in ids if token not in self.ids)
        return stop_at(self.tokenizer.stream(said, skip_special_tokens=True), self.strings)


@dataclass(frozen=True)
class _Token:
    id: int
    logprob: float
    top: list[dict[str, float]]


def _by_row(found: Iterator[Step], rows: int, top: int | None) -> list[Iterator[_Token]]:
    """Take the steps of a batch apart into one iterator for each row; log-probabilities only if top is not None."""
    waiting: list[deque[tuple[_Token, bool]]] = [deque() for _ in range(rows)]

    def token(step: Step) -> _Token:
        if top is None:
            return _Token(step.id, 0.0, [])
        logprobs = log_probabilities(step.logits)
        best = np.argsort(-logprobs, kind="stable")[:top]
        return _Token(step.id, float(logprobs[step.id]), [{"id": int(i), "logprob": float(logprobs[i])} for i in best])

    def row_tokens(row: int) -> Iterator[_Token]:
        done = False
        while not done:
            while not waiting[row]:
                step = next(found)
                waiting[step.row].append((token(step), step.done))
            newest, done = waiting[row].popleft()
            yield newest

    return [row_tokens(row) for row in range(rows)]


def _collected(tokens: Iterator[_Token], answer: list[_Token]) -> Iterator[int]:
    """Yield the ids of tokens, and keep the tokens themselves in answer."""
    for token in tokens:
        answer.append(token)
        yield token.id
