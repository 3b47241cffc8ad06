"""A conversation with a chat model that computes each token only once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3np.cache import KVCache
from qwen3np.generate import new_cache, steps
from qwen3np.model import Model
from qwen3np.tokenizer import Tokenizer

_CALL = re.compile(r"\n?<tool_call>\n?(.*?)\n?</tool_call>", re.DOTALL)


def tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and its tool calls: {"type": "function", "function": {name, arguments}}.

    Qwen3 writes <tool_call> around {"name": ..., "arguments": {...}}. A broken or unfinished one stays in the text.
    """
    after = text.rfind("</think>") + 1  # calls within the reasoning are not made
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call: Any = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
            return found[0]
        if not (isinstance(name, str) and isinstance(arguments, dict)):
            return found[0]
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        return ""

    return text[:after] + _CALL.sub(take, text[after:]), calls


def escaped(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the messages with all text escaped for Tokenizer.encode_escaped, except the assistant's."""

    def text(content: Any) -> Any:
        if isinstance(content, list):
            return [{**part, "text": text(part["text"])} if "text" in part else part for part in content]
        return tokenizer.escaped(content) if isinstance(content, str) else content

    return [dict(m) if m.get("role") == "assistant" else {**m, "content": text(m.get("content"))} for m in messages]


@dataclass
class Conversation:
    """The messages so far, and the cache of what the model has computed for them.

    As long as the chat template repeats answers unchanged, they enter the next prompt as the ids that the model chose:
    encoding their text again can give other ids. Then nothing is computed twice. Where the template changes an answer
    (Qwen3's hybrid models drop earlier reasoning), the cache is used up to the first difference.

    A model that calls functions, receives their results and continues:

        tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
            "a": {"type": "number"}, "b": {"type": "number"}}}}}]
        functions = {"add": lambda a, b: a + b}
        conversation = Conversation(model)
        answer = conversation.say("What is 17 + 25?", tools=tools)
        while calls := answer.get("tool_calls"):
            called = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            results = [json.dumps(functions[name](**arguments)) for name, arguments in called]
            answer = conversation.say([{"role": "tool", "content": result} for result in results], tools=tools)
        print(answer["content"])
    """

    model: Model
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    cache: KVCache | None = None
    escape: bool = True  # special tokens in the messages of users, system and tools are read as plain text
    guessed: int = 0  # tokens of the last answer that were guessed rightly, and so cost no pass of their own
    _text: str = ""  # the last prompt with its answer, and the ids of both
    _ids: list[int] = field(default_factory=list[int])

    def prompt_ids(self, **template_options: Any) -> list[int]:
        """Return the ids of the messages so far, ready for the assistant's answer."""
        tokenizer = self.tokenizer
        messages = escaped(self.messages, tokenizer) if self.escape else self.messages
        text = tokenizer.apply_chat_template(messages, **template_options)
        # an answer ends with a special token, so the text after it can be encoded separately
        if self._text and text.startswith(self._text):
            ids = self._ids + tokenizer.encode_escaped(text[len(self._text) :])
        else:
            ids = tokenizer.encode_escaped(text)
        self._text, self._ids = text, ids
        return ids

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError if it has none."""
        return self.model.text

    def reply(
        self,
        text: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int], object] | None = None,
        **template_options: Any,
    ) -> Generator[int]:
        """Add a user's message and yield the ids of the answer as they come; both stay in the conversation.

        text may also be one or more messages of any role: the result of a tool, for example. If the answer calls tools,
        the calls are in messages[-1]["tool_calls"]. options are arguments of qwen3np.generate, which override the
        checkpoint's defaults; an answer also ends where the chat template ends a turn. template_options are variables
        of the template: tools=..., enable_thinking=...

        If the caller stops iterating, or is interrupted, the conversation keeps the answer so far. If there is none
        yet, the new messages are removed again.
        """
        model, tokenizer, before = self.model, self.tokenizer, len(self.messages)
        settings: dict[str, Any] = {**model.generation_defaults(), **(options or {})}
        settings["stop_ids"] = tokenizer.turn_ends | {*(settings["stop_ids"] or ())}
        added = [{"role": "user", "content": text}] if isinstance(text, str) else text
        self.messages += [dict(added)] if isinstance(added, Mapping) else [dict(message) for message in added]
        answer: list[int] = []
        self.guessed = 0
        try:
            ids = self.prompt_ids(**template_options)
            if self.cache is None:
                numerics = settings.get("numerics", "float32")
                self.cache = new_cache(model.config, [ids], settings["max_new_tokens"], numerics)
            chosen = model.generation_settings({**settings, "cache": self.cache, "progress": progress})
            for step in steps(model.weights, model.config, [ids], **chosen):
                answer.append(step.id)
                self.guessed += step.guessed
                yield step.id
        finally:
            if answer:
                self._remember(answer, settings["stop_ids"])
            else:  # an error or an interrupt before the first token: the question is withdrawn
                del self.messages[before:]

    def say(self, text: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """Return the whole answer as a message: content, and tool_calls if there are any. Arguments as in reply."""
        for _ in self.reply(text, **options):
            pass
        return self.messages[-1]

    def _remember(self, answer: list[int], stop_ids: Collection[int]) -> None:
        said = self.tokenizer.decode(answer[:-1] if answer[-1] in stop_ids else answer)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if (self.opens_thinking or said.startswith("<think>")) and "</think>" not in said:  # cut off while reasoning
            message |= {"content": "", "reasoning_content": said.removeprefix("<think>").strip()}
        content, calls = tool_calls(message["content"])
        if calls:
            message |= {"content": content, "tool_calls": calls}
        self.messages.append(message)
        self._ids = self._ids + answer
        self._text += self.tokenizer.decode(answer)

    @property
    def opens_thinking(self) -> bool:
        """Whether the chat template opened the reasoning, so that the answer starts inside it."""
        return self._text.rstrip().endswith("<think>")

    def set_system(self, text: str | None) -> None:
        """Set the system message, or remove it; the other messages stay."""
        self.messages = ([{"role": "system", "content": text}] if text else []) + self.messages[self._systems :]

    def reset(self) -> None:
        """Forget all messages except the system message, whose part of the cache remains usable."""
        self.messages = self.messages[: self._systems]

    def drop(self, turns: int) -> int:
        """Forget the oldest turns, each a user's message and what followed it; return how many were forgotten."""
        starts = self._turns()[: turns + 1]
        end = starts[turns] if len(starts) > turns else len(self.messages)
        self.messages = self.messages[: self._systems] + self.messages[end:]
        return min(turns, len(starts))

    def undo(self) -> dict[str, Any] | None:
        """Take back the last turn; return its user's message, or None if there is none."""
        if not (starts := self._turns()):
            return None
        message = self.messages[starts[-1]]
        del self.messages[starts[-1] :]
        return message

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        return self.messages[0]["content"] if self._systems else None

    @property
    def _systems(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] in ("system", "developer"))

    def _turns(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]
