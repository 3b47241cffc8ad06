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
from typing import Any, TypeAlias

import numpy as np

from qwen3np.commands import (
    Ends,
    add_chat,
    add_computation,
    add_generation,
    add_model,
    add_texts,
    chat_files,
    flags_of_generation,
    generation_options,
    load_model,
    progress_bar,
    read_text,
    read_texts,
    text,
)
from qwen3np.conversation import escaped
from qwen3np.files.limits import readable
from qwen3np.generate import Step, steps
from qwen3np.grammar import Grammars, Processor
from qwen3np.model import Model
from qwen3np.sampling import log_probabilities
from qwen3np.terminal import reasoning_apart, thinking_styled
from qwen3np.tokenizer import Tokenizer

EXAMPLE = 'qwen3np generate --model Qwen/Qwen3-0.6B "The capital of France is"'
HELP = "continue a text, or several at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompts", nargs="*", type=text, metavar="PROMPT", help="a text to continue (default: stdin)")
    also = "a prompt given as a flag (repeatable)"
    parser.add_argument("-p", "--prompt", type=text, action="append", default=[], metavar="PROMPT", help=also)
    add_texts(parser, "prompt")
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a user's message: apply the chat template"
    )
    add_chat(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line: ids, text, logprobs, timings"
    )
    top = "with --json: the N likeliest tokens of each step, before temperature and filters"
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="N", help=top)
    schema = "the answer is JSON that the JSON schema in a file describes (one prompt; needs the extra serve)"
    parser.add_argument("--json-schema", metavar="FILE", help=schema)
    add_generation(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation of each prompt as it comes, or as JSON when it is complete."""
    flags_of_generation(arguments)
    inputs, given = _inputs(arguments)
    began = time.perf_counter()
    model, tokenizer = load_model(arguments)
    if given is not None:
        messages, tools = given
        inputs = [_as_chat(tokenizer, messages, tools, message, arguments) for message in inputs or [None]]
    prompts = [tokenizer.encode_escaped(prompt) if given is not None else tokenizer.encode(prompt) for prompt in inputs]
    options = generation_options(model, arguments)
    if given is not None:
        options["stop_ids"] = tokenizer.turn_ends | {*options["stop_ids"]}
    if arguments.json_schema is not None:
        options["logits_processors"] = [_grammar(model, prompts, options["stop_ids"], arguments.json_schema)]
    ends, stop = Ends(tokenizer, options["stop_ids"], arguments.stop), options.get("stop")
    options["stop"] = ends.reached if stop is None else lambda new: stop(new) or ends.reached(new)
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

    rows = _by_row(chain([first], found), tokenizer, len(prompts), arguments.top_logprobs if arguments.json else None)
    count, guessed, cut = 0, 0, list[str]()
    for given_text, prompt, tokens in zip(inputs, prompts, rows, strict=True):
        answer: list[_Token] = []
        inside = given is not None and given_text.rstrip().endswith("<think>")
        pieces = ends.text(_collected(tokens, answer))
        if arguments.json:
            with progress_bar(options["max_new_tokens"], "answer") as bar:
                continuation = "".join(_counted(pieces, bar))
            ids = [token.id for token in answer]
            reasoning, said = reasoning_apart(continuation, inside) if given is not None else (None, continuation)
            result = {
                "prompt": tokenizer.unescaped(given_text),
                "prompt_ids": prompt,
                "text": said,
                **({} if reasoning is None else {"reasoning": reasoning}),
                "ids": ids,
                "logprobs": [token.logprob for token in answer],
                "top_logprobs": [token.top for token in answer],
                "finish_reason": "stop" if options["stop"](ids) else "length",
                "timings": {
                    "load_seconds": round(loaded - began, 6),
                    "prompt_seconds": round(prefilled - loaded, 6),
                    "generation_seconds": round(time.perf_counter() - prefilled, 6),
                },
            }
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            for piece in thinking_styled(pieces, inside, arguments.hide_thinking) if given is not None else pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
        count += len(answer)
        guessed += sum(token.guessed for token in answer)
        if not options["stop"]([token.id for token in answer]):
            cut.append("--max-new-tokens" if len(answer) == options["max_new_tokens"] else "the end of the context")
    seconds = time.perf_counter() - prefilled
    rate = f"{(count - 1) / seconds:.1f} tokens/s" if count > 1 else "one token"
    rate += f", {count / (count - guessed):.1f} a pass" if guessed else ""
    ended = f"; cut at {' and '.join(sorted(set(cut)))}" if cut else ""
    ended += f" ({len(cut)} of {len(prompts)})" if cut and len(prompts) > 1 else ""
    print(
        f"[prompt {sum(map(len, prompts))} tokens in {prefilled - loaded:.2f} s; answer {count} tokens, {rate}{ended}]",
        file=sys.stderr,
    )


def _grammar(model: Model, prompts: list[list[int]], ends: Collection[int], path: str) -> Processor:
    """Return the logits processor of the JSON schema in a file."""
    if len(prompts) != 1:
        raise ValueError(f"--json-schema is for one prompt, but {len(prompts)} are given")
    try:
        schema: Any = json.loads(read_text(path if path == "-" else str(readable(Path(path)))))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return Grammars(model.text, model.config.vocab_size, ends).json_schema(schema)


Given: TypeAlias = "tuple[list[dict[str, Any]], list[dict[str, Any]] | None]"


def _inputs(arguments: argparse.Namespace) -> tuple[list[str], Given | None]:
    """Return the prompts and, for a chat, the earlier messages and the tools."""
    chat: bool = arguments.chat or arguments.messages is not None
    if not chat and (arguments.system or arguments.think or arguments.tools or arguments.hide_thinking):
        raise ValueError("--system, --think, --hide-thinking and --tools need --chat")
    if arguments.top_logprobs < 0 or (arguments.top_logprobs and not arguments.json):
        raise ValueError(f"--top-logprobs {arguments.top_logprobs} must be 0 or more, and needs --json")
    prompts = [*arguments.prompts, *arguments.prompt]
    if arguments.messages is not None and not prompts and arguments.file is None:
        return [], chat_files(arguments)
    return read_texts(prompts, arguments, "prompt"), chat_files(arguments) if chat else None


def _as_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    message: str | None,
    arguments: argparse.Namespace,
) -> str:
    """Return the prompt of a chat. Without a new message, a final message of the assistant is continued."""
    messages = [*messages, {"role": "user", "content": message}] if message is not None else messages
    thinking = None if arguments.think is None else arguments.think == "on"
    return tokenizer.apply_chat_template(
        messages if arguments.special_tokens else escaped(messages, tokenizer),
        tools=tools,
        enable_thinking=thinking,
        continue_final_message=bool(messages) and messages[-1].get("role") == "assistant",
    )


@dataclass(frozen=True)
class _Token:
    id: int
    logprob: float
    top: list[dict[str, Any]]
    guessed: bool


def _by_row(found: Iterator[Step], tokenizer: Tokenizer, rows: int, top: int | None) -> list[Iterator[_Token]]:
    """Split the steps of a batch into one iterator per row, with log-probabilities if top is not None."""
    waiting: list[deque[tuple[_Token, bool]]] = [deque() for _ in range(rows)]

    def token(step: Step) -> _Token:
        if top is None:
            return _Token(step.id, 0.0, [], step.guessed)
        logprobs = log_probabilities(step.logits)
        best: list[int] = np.argsort(-logprobs, kind="stable")[:top].tolist()
        likeliest = [{"id": i, "text": tokenizer.decode([i]), "logprob": float(logprobs[i])} for i in best]
        return _Token(step.id, float(logprobs[step.id]), likeliest, step.guessed)

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
    """Yield the ids of tokens, and collect the tokens in answer."""
    for token in tokens:
        answer.append(token)
        yield token.id
