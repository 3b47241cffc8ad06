"""/v1/chat/completions: messages in, a message out, with its reasoning and tool calls apart."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any

from qwen3np.conversation import escaped
from qwen3np.serve.answers import Text, chat_logprobs, prompt_logprobs
from qwen3np.serve.calls import Parts, forced
from qwen3np.serve.fields import BadRequest
from qwen3np.serve.scheduler import Prompt, Token
from qwen3np.serve.service import Service, Stream, answered, strings
from qwen3np.tokenizer import Tokenizer

_KINDS = "chat.completion", "chat.completion.chunk", "chatcmpl"
_TAKEN = ("self", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize")


def prompt_text(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> str:
    """The chat template's text of a request, for Tokenizer.encode_escaped: special tokens in its texts are text."""
    messages = [_message(message, n) for n, message in enumerate(fields["messages"])]
    extra = fields["chat_template_kwargs"] or {}
    if fields["reasoning_effort"] == "none":
        extra = {"enable_thinking": False, **extra}
    for name, value in extra.items():
        if name in _TAKEN or not isinstance(value, (bool, int, float, str)):
            raise BadRequest(f"chat_template_kwargs: {name[:100]!r} cannot be set", parameter="chat_template_kwargs")
    try:
        tools, extra = _escaped(fields["tools"] or None, tokenizer), _escaped(extra, tokenizer)
    except RecursionError:
        raise BadRequest("tools: nested too deeply", parameter="tools") from None
    return tokenizer.apply_chat_template(
        escaped(messages, tokenizer),
        tools=tools,
        add_generation_prompt=fields["add_generation_prompt"],
        continue_final_message=fields["continue_final_message"],
        **extra,
    )


def _message(message: Mapping[str, Any], n: int) -> dict[str, Any]:
    """A message as templates expect it: the arguments of tool calls as objects. Raises BadRequest."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and not all(
        isinstance(part, dict) and isinstance(part.get("text", ""), str) for part in content
    ):
        raise BadRequest(f"messages[{n}].content must be a text or a list of text parts", parameter="messages")
    if calls is None:
        return dict(message)
    try:
        functions: list[dict[str, Any]] = [dict(call["function"]) for call in calls]
        for function in functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        wanted = 'must be a list of {"type": "function", "function": {"name", "arguments"}}'
        raise BadRequest(f"messages[{n}].tool_calls {wanted}", parameter="messages") from None
    return {**message, "tool_calls": [{"type": "function", "function": function} for function in functions]}


def _escaped(value: Any, tokenizer: Tokenizer) -> Any:
    """A value with all of its texts, names included, escaped for Tokenizer.encode_escaped."""
    if isinstance(value, str):
        return tokenizer.escaped(value)
    if isinstance(value, dict):
        return {_escaped(name, tokenizer): _escaped(part, tokenizer) for name, part in value.items()}
    return [_escaped(part, tokenizer) for part in value] if isinstance(value, list) else value


async def chat(service: Service, fields: Mapping[str, Any]) -> dict[str, Any] | Stream:
    """Answer a request."""
    tokenizer = service.tokenizer
    calls = forced(fields["tools"] or [], fields["tool_choice"], fields["parallel_tool_calls"])
    fields = {**fields, "tools": [] if fields["tool_choice"] == "none" else fields["tools"] or []}
    text = await asyncio.to_thread(prompt_text, tokenizer, fields)
    ids = await asyncio.to_thread(tokenizer.encode_escaped, text)
    inside = text.rstrip().endswith("<think>")
    most = fields["max_completion_tokens"] or fields["max_tokens"]
    if most == 0:
        raise BadRequest("max_tokens must be whole numbers from 1", parameter="max_tokens")
    if fields["stream"] and fields["prompt_logprobs"] is not None:
        raise BadRequest("prompt_logprobs does not stream", parameter="stream")
    after = tokenizer.token_to_id("</think>") if inside else None
    jobs: list[dict[str, Any]] = []
    for row in range(fields["n"]):
        wanted = {"type": "grammar", "grammar": calls} if calls else fields["response_format"]
        grammar = await asyncio.to_thread(service.grammar, wanted, after)
        settings = service.settings(fields, most, tokenizer.turn_ends, grammar)
        top = fields["top_logprobs"] if fields["logprobs"] else None
        jobs.append({"ids": ids, "settings": settings, "row": row, "top": top, "prompt_top": fields["prompt_logprobs"]})
    return await answered(service, fields, jobs, _KINDS, lambda n, job: _Saying(service, fields, n, inside))


class _Saying:
    """One answer, as service.Saying describes it."""

    def __init__(self, service: Service, fields: Mapping[str, Any], index: int, inside: bool) -> None:
        self._tokenizer, self._fields, self._index = service.tokenizer, fields, index
        self._text, self._parts = Text(service.tokenizer, strings(fields["stop"])), Parts(inside, bool(fields["tools"]))
        self._message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        self._calls, self._tokens = list[dict[str, Any]](), list[Token]()
        self._prompt: Prompt | None = None

    def start(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def add(self, event: Prompt | Token) -> list[dict[str, Any]]:
        if isinstance(event, Prompt):
            self._prompt = event
            return []
        self._tokens.append(event)
        parts = self._parts.add(self._text.add(event), last=event.reason is not None)
        deltas = [self._delta(name, text) for part in parts for name, text in part.items()]
        logprobs = chat_logprobs([event], self._tokenizer) if self._fields["logprobs"] else None
        chunks = [
            self._chunk(delta, None if n else logprobs) for n, delta in enumerate(deltas or [{}] * bool(logprobs))
        ]
        return [*chunks, self._chunk({}, None, self._reason)] if event.reason else chunks

    def whole(self) -> dict[str, Any]:
        message = self._message | ({"tool_calls": self._calls} if self._calls else {})
        if not self._calls and message["content"] is None:
            message["content"] = ""
        choice: dict[str, Any] = {
            "index": self._index,
            "message": message,
            "logprobs": chat_logprobs(self._tokens, self._tokenizer) if self._fields["logprobs"] else None,
            "finish_reason": self._reason,
        }
        if self._prompt is not None and self._fields["prompt_logprobs"] is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._prompt, self._tokenizer)
        return choice

    @property
    def _reason(self) -> str | None:
        reason = self._tokens[-1].reason
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _chunk(self, delta: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, name: str, text: str) -> dict[str, Any]:
        """Add a part to the message, and return it as a stream says it."""
        if name == "call":
            function = {"name": text, "arguments": ""}
            self._calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            call = {**self._calls[-1], "function": dict(function)}
        elif name == "arguments":
            self._calls[-1]["function"]["arguments"] += text
            call = {"function": {"arguments": text}}
        else:
            self._message[name] = (self._message.get(name) or "") + text
            return {name: text}
        return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}
