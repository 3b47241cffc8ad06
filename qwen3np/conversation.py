"""A conversation with a chat model that pays for each token once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3np.cache import KVCache
from qwen3np.generate import new_cache
from qwen3np.loading import Model
from qwen3np.tokenizer import Tokenizer


@dataclass
class Conversation:
    """Messages so far, and what the model has already computed of them.

    The answers go back into the next prompt as the ids that the model chose, not as their text encoded anew (which
    can give other ids), as long as the chat template repeats them unchanged: then nothing is computed twice. Where it
    does not (Qwen3's hybrid models drop earlier reasoning), the cache serves up to the first difference.
    """

    model: Model
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    cache: KVCache | None = None
    _text: str = ""  # the last prompt with its answer, and the ids of both
    _ids: list[int] = field(default_factory=list[int])

    def prompt_ids(self, **template_options: Any) -> list[int]:
        """Return the ids of the messages so far, ready for the assistant's answer."""
        tokenizer = self.tokenizer
        text = tokenizer.apply_chat_template(self.messages, **template_options)
        # an answer ends with a special token, so the text behind it can be encoded by itself
        if self._text and text.startswith(self._text):
            ids = self._ids + tokenizer.encode(text[len(self._text) :])
        else:
            ids = tokenizer.encode(text)
        self._text, self._ids = text, ids
        return ids

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError where it has none."""
        return self.model.text

    def reply(
        self,
        text: str,
        *,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int], object] | None = None,
        **template_options: Any,
    ) -> Generator[int]:
        """Add a user message and yield the ids of the answer as they come; both stay in the conversation.

        options are those of qwen3np.generate, over the checkpoint's own defaults. An answer that is cut off (the
        caller stops listening, or interrupts) stays as far as it came; without one the message is dropped again.
        """
        self.messages.append({"role": "user", "content": text})
        model = self.model
        settings: dict[str, Any] = {**model.generation_defaults(), **(options or {})}
        answer: list[int] = []
        try:
            ids = self.prompt_ids(**template_options)
            if self.cache is None:
                numerics = settings.get("numerics", "float32")
                self.cache = new_cache(model.config, [ids], settings["max_new_tokens"], numerics)
            for token in model.stream(ids, cache=self.cache, progress=progress, **settings):
                answer.append(token)
                yield token
        finally:
            if answer:
                self._remember(answer, settings["stop_ids"] or ())
            else:  # refused, or interrupted before the first token: as if it had not been asked
                self.messages.pop()

    def _remember(self, answer: list[int], stop_ids: Collection[int]) -> None:
        said = self.tokenizer.decode(answer[:-1] if answer[-1] in stop_ids else answer)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if (self.opens_thinking or said.startswith("<think>")) and "</think>" not in said:  # cut off while reasoning
            message |= {"content": "", "reasoning_content": said.removeprefix("<think>").strip()}
        self.messages.append(message)
        self._ids = self._ids + answer
        self._text += self.tokenizer.decode(answer)

    @property
    def opens_thinking(self) -> bool:
        """Whether the chat template opened the reasoning itself, so that the answer begins inside of it."""
        return self._text.rstrip().endswith("<think>")

    def set_system(self, text: str | None) -> None:
        """Set the system message, or take it away; the other messages stay."""
        rest = self.messages[1:] if self.messages and self.messages[0]["role"] == "system" else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def reset(self) -> None:
        """Forget all messages but the system message. What the cache holds of that stays useful."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
