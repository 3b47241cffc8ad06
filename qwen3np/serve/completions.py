"""/v1/completions: text in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from qwen3np.serve.answers import Answers, Text, completion_logprobs
from qwen3np.serve.fields import BadRequest
from qwen3np.serve.scheduler import Prompt, Token
from qwen3np.serve.service import Service, Stream, collected, heading, prompt_logprobs, strings, usage


async def complete(service: Service, fields: Mapping[str, Any]) -> dict[str, Any] | Stream:
    """Answer a request. Special tokens written in a prompt are special: clients apply their own chat templates."""
    given = fields["prompt"]
    given = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    encode = service.tokenizer.encode
    prompts = await asyncio.to_thread(lambda: [encode(p) if isinstance(p, str) else p for p in given])
    if fields["max_tokens"] == 0 and not fields["echo"] and fields["prompt_logprobs"] is None:
        raise BadRequest("max_tokens 0 needs echo or prompt_logprobs", parameter="max_tokens")
    if fields["stream"] and (fields["echo"] or fields["prompt_logprobs"] is not None):
        raise BadRequest("echo and prompt_logprobs do not stream", parameter="stream")
    echoed = fields["logprobs"] if fields["echo"] else None
    wanted = [count for count in (echoed, fields["prompt_logprobs"]) if count is not None]
    jobs: list[dict[str, Any]] = []
    for ids in prompts:
        for _ in range(fields["n"]):
            grammar = await asyncio.to_thread(service.grammar, fields["response_format"])
            settings = service.settings(fields, fields["max_tokens"], grammar=grammar)
            options = {"row": len(jobs), "top": fields["logprobs"], "prompt_top": max(wanted, default=None)}
            jobs.append({"ids": ids, "settings": settings, **options})
    answers = service.answers(jobs)
    if fields["stream"]:
        return Stream(answers, _chunks(service, fields, answers))
    events, tokens = await collected(answers)
    choices = [_choice(service, fields, n, answers, events[n], tokens[n]) for n in range(len(tokens))]
    body = heading(service, "text_completion", "cmpl")
    return {**body, "choices": choices, "usage": usage(answers, fields["n"])}


def _choice(
    service: Service, fields: Mapping[str, Any], index: int, answers: Answers, prompt: Prompt, tokens: list[Token]
) -> dict[str, Any]:
    text, before = Text(service.tokenizer, strings(fields["stop"])), ""
    said, listed = "".join(map(text.add, tokens)), tokens
    if fields["echo"]:
        before = service.tokenizer.decode(answers.jobs[index].ids)
        listed = [Token(answers.jobs[index].ids[0], None, []), *prompt.tokens, *tokens]
    choice: dict[str, Any] = {
        "index": index,
        "text": before + said,
        "logprobs": None if fields["logprobs"] is None else completion_logprobs(listed, service.tokenizer, 0),
        "finish_reason": tokens[-1].reason if tokens else "length",
    }
    if fields["prompt_logprobs"] is not None:
        choice["prompt_logprobs"] = prompt_logprobs(prompt, service.tokenizer)
    return choice


async def _chunks(service: Service, fields: Mapping[str, Any], answers: Answers) -> AsyncIterator[dict[str, Any]]:
    head, tokenizer = heading(service, "text_completion", "cmpl"), service.tokenizer
    texts, said = [Text(tokenizer, strings(fields["stop"])) for _ in answers.jobs], [0] * len(answers.jobs)
    async for index, event in answers.events():
        if isinstance(event, Token):
            piece, logprobs = texts[index].add(event), None
            if fields["logprobs"] is not None:
                logprobs = completion_logprobs([event], tokenizer, said[index])
            said[index] += len(tokenizer.token_bytes(event.id).decode(errors="ignore"))
            if piece or logprobs or event.reason:
                choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": event.reason}
                yield {**head, "choices": [choice]}
    if (fields["stream_options"] or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": usage(answers, fields["n"])}
