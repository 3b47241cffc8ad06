"""/v1/chat/completions: messages in, a message out, with its reasoning and tool calls apart."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from qwen3np.conversation import escaped
from qwen3np.serve.answers import Answers, Text, chat_logprobs
from qwen3np.serve.calls import Parts, check_tools, forced
from qwen3np.serve.fields import BadRequest
from qwen3np.serve.scheduler import Token
from qwen3np.serve.service import Service, Stream, collected, heading, prompt_logprobs, strings, usage
from qwen3np.tokenizer import Tokenizer

_TAKEN = ("self", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize")


def prompt_text(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> str:
    """The chat template's text of a request, for Tokenizer.encode_escaped: special tokens in its texts are text."""
    messages = [_message(message, n) for n, message in enumerate(fields["messages"])]
    extra = fields["chat_template_kwargs"] or {}
    for name, value in extra.items():
        if name in _TAKEN or not isinstance(value, (bool, int, float, str)):
            raise BadRequest(f"chat_template_kwargs: {name[:100]!r} cannot be set", parameter="chat_template_kwargs")
    return tokenizer.apply_chat_template(
        escaped(messages, tokenizer),
        tools=_escaped(fields["tools"] or None, tokenizer),
        add_generation_prompt=fields["add_generation_prompt"],
        continue_final_message=fields["continue_final_message"],
        **_escaped(extra, tokenizer),
    )


def _message(message: Mapping[str, Any], n: int) -> dict[str, Any]:
    """A message as templates expect it: the arguments of tool calls as objects. Raises BadRequest."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
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
    check_tools(fields["tools"] or [])
    fields = {**fields, "tools": [] if fields["tool_choice"] == "none" else fields["tools"] or []}
    text = await asyncio.to_thread(prompt_text, tokenizer, fields)
    ids = await asyncio.to_thread(tokenizer.encode_escaped, text)
    inside = text.rstrip().endswith("<think>")
    calls = forced(fields["tools"], fields["tool_choice"], fields["parallel_tool_calls"])
    most = fields["max_completion_tokens"] or fields["max_tokens"]
    if most == 0:
        raise BadRequest("max_tokens must be whole numbers from 1", parameter="max_tokens")
    after = tokenizer.token_to_id("</think>") if inside else None
    jobs: list[dict[str, Any]] = []
    for row in range(fields["n"]):
        wanted = {"type": "grammar", "grammar": calls} if calls else fields["response_format"]
        grammar = await asyncio.to_thread(service.grammar, wanted, after)
        settings = service.settings(fields, most, tokenizer.turn_ends, grammar)
        top = fields["top_logprobs"] if fields["logprobs"] else None
        jobs.append({"ids": ids, "settings": settings, "row": row, "top": top, "prompt_top": fields["prompt_logprobs"]})
    answers = service.answers(jobs)
    if fields["stream"]:
        return Stream(answers, _chunks(service, fields, answers, inside))
    prompts, tokens = await collected(answers)
    choices = [_choice(service, fields, n, answer, inside) for n, answer in enumerate(tokens)]
    body = {**heading(service, "chat.completion", "chatcmpl"), "choices": choices, "usage": usage(answers, fields["n"])}
    if fields["prompt_logprobs"] is not None:
        body["prompt_logprobs"] = prompt_logprobs(prompts[0], tokenizer)
    return body


def _choice(service: Service, fields: Mapping[str, Any], index: int, tokens: list[Token], inside: bool) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    saying = _Saying(service, fields, inside)
    for token in tokens:
        for delta in saying.deltas(token):
            for name, value in delta.items():
                if name == "tool_calls":
                    calls = [{key: part for key, part in call.items() if key != "index"} for call in value]
                    message[name] = message.get(name, []) + calls
                else:
                    message[name] = (message.get(name) or "") + value
    if "tool_calls" not in message and message["content"] is None:
        message["content"] = ""
    logprobs = chat_logprobs(tokens, service.tokenizer) if fields["logprobs"] else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": saying.reason}


async def _chunks(
    service: Service, fields: Mapping[str, Any], answers: Answers, inside: bool
) -> AsyncIterator[dict[str, Any]]:
    head = heading(service, "chat.completion.chunk", "chatcmpl")
    sayings = [_Saying(service, fields, inside) for _ in answers.jobs]

    def chunk(index: int, delta: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for index in range(len(sayings)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in answers.events():
        if isinstance(event, Token):
            deltas = sayings[index].deltas(event)
            logprobs = chat_logprobs([event], service.tokenizer) if fields["logprobs"] else None
            for n, delta in enumerate(deltas or ([{}] if logprobs else [])):
                yield chunk(index, delta, None if n else logprobs)
            if event.reason:
                yield chunk(index, {}, None, sayings[index].reason)
    if (fields["stream_options"] or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": usage(answers, fields["n"])}


class _Saying:
    """One answer: its tokens as the deltas of a message, and why it ended."""

    def __init__(self, service: Service, fields: Mapping[str, Any], inside: bool) -> None:
        self.reason: str | None = None
        self._text, self._calls = Text(service.tokenizer, strings(fields["stop"])), 0
        self._parts = Parts(inside, bool(fields["tools"]))

    def deltas(self, token: Token) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in self._parts.add(self._text.add(token), last=token.reason is not None):
            if "call" in part:
                arguments = json.dumps(part["call"]["arguments"], ensure_ascii=False)
                call: dict[str, Any] = {"index": self._calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                call["function"] = {"name": part["call"]["name"], "arguments": arguments}
                found.append({"tool_calls": [call]})
                self._calls += 1
            else:
                found.append(part)
        self.reason = "tool_calls" if self._calls and token.reason == "stop" else token.reason
        return found
