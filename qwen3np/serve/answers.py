"""Jobs as their events, in the event loop; tokens as text and as log-probabilities."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from typing import Any

from qwen3np.serve.scheduler import Event, Job, Prompt, Scheduler, Token
from qwen3np.tokenizer import Tokenizer


class Answers:
    """The answers to one request: its jobs, queued, and their events in the order in which they come."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[dict[str, Any]], streamed: bool) -> None:
        """Queue a job for each of these arguments of Scheduler.job. Raises ValueError and Busy.

        Unless they are streamed, the events of a job come together at its end: waking the event loop for each token
        would slow down the scheduler's thread.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[list[tuple[int, Event]]]()

        def teller(index: int) -> Any:
            held: list[tuple[int, Event]] = []

            def tell(event: Event) -> None:
                held.append((index, event))
                if streamed or self._is_last(index, event):
                    with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                        loop.call_soon_threadsafe(events.put_nowait, held.copy())
                    held.clear()

            return tell

        self.jobs: list[Job] = [scheduler.job(tell=teller(n), **request) for n, request in enumerate(requests)]
        self._events = events
        scheduler.submit(*self.jobs)

    def _is_last(self, index: int, event: Event) -> bool:
        if isinstance(event, Prompt):
            return self.jobs[index].most == 0
        return isinstance(event, Exception) or event.reason is not None

    async def events(self) -> AsyncIterator[tuple[int, Prompt | Token]]:
        """Yield (job, event) until all jobs have ended. Raises what a job raised; leaving cancels the jobs."""
        left = len(self.jobs)
        try:
            while left:
                for index, event in await self._events.get():
                    if isinstance(event, Exception):
                        raise event
                    left -= self._is_last(index, event)
                    yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Let the scheduler drop what still runs."""
        for job in self.jobs:
            job.cancelled = True


class Text:
    """The text of an answer as its ids come, up to the first stop string, which may span several tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: Collection[str]) -> None:
        """Start before the first id."""
        self._tokenizer, self._stops, self._held, self._ended = tokenizer, stops, "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: Token) -> str:
        """Return the text that the token makes certain; with the last token, all that was held back."""
        data = self._tokenizer.token_bytes(token.id, skip_special_tokens=True)
        self._held += self._decoder.decode(data, final=token.reason is not None)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if self._ended or found:
            said = "" if self._ended else self._held[: min(found)]
            self._held, self._ended = "", True
            return said
        keep = max((n for stop in self._stops for n in range(len(stop)) if self._held.endswith(stop[:n])), default=0)
        keep = 0 if token.reason else keep
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return said


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """The object `logprobs` of a chat completion's choice; ids are an addition to OpenAI's interface."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data), "id": token}

    content = [{**entry(t.id, t.logprob), "top_logprobs": [entry(*one) for one in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """The object `logprobs` of a completion's choice, whose first token starts at this character of its text."""
    pieces = [tokenizer.token_bytes(token.id) for token in tokens]
    offsets: list[int] = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.decode(errors="ignore"))
    return {
        "tokens": [_name(piece) for piece in pieces],
        "token_ids": [token.id for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {_name(tokenizer.token_bytes(i)): lp for i, lp in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def prompt_logprobs(event: Prompt, tokenizer: Tokenizer) -> list[Any]:
    """The log-probabilities of a prompt's tokens but the first, each with the likeliest in its place, as in vLLM."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"logprob": logprob, "decoded_token": data.decode(errors="replace"), "bytes": list(data)}

    return [None, *({str(i): entry(i, lp) for i, lp in [(t.id, t.logprob), *t.top]} for t in event.tokens)]


def _name(data: bytes) -> str:
    """The token as text; one that is no whole UTF-8 as OpenAI writes it, so that different tokens stay different."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
