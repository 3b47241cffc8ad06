"""`qwen3np generate`: continue a text, or several at once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from qwen3np.commands import (
    Ends,
    add_computation,
    add_generation,
    add_model,
    generation_options,
    load_model,
    progress_bar,
    read_text,
    text,
)
from qwen3np.generate import Step, steps
from qwen3np.sampling import log_probabilities
from qwen3np.tokenizer import Tokenizer

EXAMPLE = 'qwen3np generate --model Qwen/Qwen3-0.6B "The capital of France is"'
HELP = "continue a text, or several at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompts", nargs="*", type=text, metavar="PROMPT", help="a text to continue (default: stdin)")
    parser.add_argument("--file", metavar="F", help="read the prompt from a file, less its last line break")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--system", type=text, metavar="TEXT", help="a system message (with --chat)")
    parser.add_argument("--think", choices=("on", "off"), help="reasoning before the answer (with --chat)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line: ids, text, logprobs, timings")
    top = "with --json: the N likeliest ids of each step, before temperature and filters"
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="N", help=top)
    add_generation(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation of each prompt as it comes, or as JSON when it is whole."""
    inputs = _prompts(arguments)
    began = time.perf_counter()
    model, tokenizer = load_model(arguments)
    if arguments.chat:
        inputs = [_as_chat(tokenizer, message, arguments) for message in inputs]
    prompts = [tokenizer.encode(prompt) for prompt in inputs]
    options = generation_options(model, arguments)
    ends = Ends(tokenizer, options["stop_ids"], arguments.stop)
    options["stop"] = ends.reached
    loaded = time.perf_counter()
    with progress_bar(sum(map(len, prompts)), "prompt") as bar:
        found = steps(
            model.weights,
            model.config,
            prompts,
            progress=bar.update,
            **options,
        )
        first = next(found)
    prefilled = time.perf_counter()

    rows = _by_row(chain([first], found), len(prompts), arguments.top_logprobs if arguments.json else None)
    count = 0
    for given, prompt, tokens in zip(inputs, prompts, rows, strict=True):
        answer: list[_Token] = []
        pieces = ends.text(_collected(tokens, answer))
        if arguments.json:
            with progress_bar(options["max_new_tokens"], "answer") as bar:
                continuation = "".join(_counted(pieces, bar))
            ids = [token.id for token in answer]
            result = {
                "prompt": given,
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
    if arguments.top_logprobs < 0 or (arguments.top_logprobs and not arguments.json):
        raise ValueError(f"--top-logprobs {arguments.top_logprobs} must be 0 or more, and belongs to --json")
    if arguments.prompts and arguments.file is not None:
        raise ValueError("a prompt and --file are given; one of them is enough")
    if arguments.prompts:
        return arguments.prompts
    if arguments.file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --file, or on stdin")
    return [read_text(arguments.file or "-").removesuffix("\n").removesuffix("\r")]


def _as_chat(tokenizer: Tokenizer, message: str, arguments: argparse.Namespace) -> str:
    messages = [{"role": "user", "content": message}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    thinking = None if arguments.think is None else arguments.think == "on"
    return tokenizer.apply_chat_template(messages, enable_thinking=thinking)


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


def _counted(pieces: Iterator[str], bar: Any) -> Iterator[str]:
    for piece in pieces:
        bar.update()
        yield piece


def _collected(tokens: Iterator[_Token], answer: list[_Token]) -> Iterator[int]:
    """Yield the ids of tokens, and keep the tokens themselves in answer."""
    for token in tokens:
        answer.append(token)
        yield token.id
