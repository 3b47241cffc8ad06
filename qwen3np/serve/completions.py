"""/v1/completions: text in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from qwen3np.serve.answers import Text, completion_logprobs, prompt_logprobs
from qwen3np.serve.fields import ANSWERS, BadRequest
from qwen3np.serve.scheduler import Job, Prompt, Token
from qwen3np.serve.service import Service, Stream, answered, strings

_KINDS = "text_completion", "text_completion", "cmpl"


async def complete(service: Service, fields: Mapping[str, Any]) -> dict[str, Any] | Stream:
    """Answer a request. Special tokens written in a prompt are special: clients apply their own chat templates."""
    given = fields["prompt"]
    given = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    encode = service.tokenizer.encode
    prompts = await asyncio.to_thread(lambda: [encode(p) if isinstance(p, str) else p for p in given])
    if len(prompts) * fields["n"] > ANSWERS:
        raise BadRequest(f"{len(prompts)} prompts with n {fields['n']} are more than {ANSWERS} answers", parameter="n")
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
    return await answered(service, fields, jobs, _KINDS, lambda n, job: _Saying(service, fields, n, job))


class _Saying:
    """One answer, as service.Saying describes it."""

    def __init__(self, service: Service, fields: Mapping[str, Any], index: int, job: Job) -> None:
        self._tokenizer, self._fields, self._index, self._job = service.tokenizer, fields, index, job
        self._text = Text(service.tokenizer, strings(fields["stop"]))
        self._said, self._offset, self._tokens = "", 0, list[Token]()
        self._prompt = Prompt([], 0)

    def start(self) -> list[dict[str, Any]]:
        return []

    def add(self, event: Prompt | Token) -> list[dict[str, Any]]:
        if isinstance(event, Prompt):
            self._prompt = event
            return []
        piece = self._text.add(event)
        choice = self._choice(piece, [event], event.reason)
        self._offset += len(self._tokenizer.token_bytes(event.id).decode(errors="ignore"))
        self._said += piece
        self._tokens.append(event)
        return [choice] if piece or choice["logprobs"] or event.reason else []

    def whole(self) -> dict[str, Any]:
        before, listed, self._offset = "", self._tokens, 0
        if self._fields["echo"]:
            before = self._tokenizer.decode(self._job.ids)
            listed = [Token(self._job.ids[0], None, []), *self._prompt.tokens, *self._tokens]
        choice = self._choice(before + self._said, listed, self._tokens[-1].reason if self._tokens else "length")
        if self._fields["prompt_logprobs"] is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._prompt, self._tokenizer)
        return choice

    def _choice(self, text: str, tokens: list[Token], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._fields["logprobs"] is not None:
            logprobs = completion_logprobs(tokens, self._tokenizer, self._offset)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
