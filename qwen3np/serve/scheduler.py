"""One thread runs the model for all requests: prompts in pieces, then one token for everybody, and again.

An answer is a function of its request alone. Prompts are cut at multiples of PIECE, wherever they are computed or
reused, and at most ROWS sequences are decoded together, which gives each the bits it has alone (see ops/fast).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from qwen3np import guard
from qwen3np.cache import KVCache
from qwen3np.drafts import Drafts, chooser, drafts_of
from qwen3np.errors import ContextOverflowError
from qwen3np.model import Model
from qwen3np.numerics import Array, named
from qwen3np.sampling import generator, log_probabilities, sample
from qwen3np.serve.prefixes import Joined, Prefixes
from qwen3np.settings import checked, require_ids

PIECE = 128  # positions of a prompt computed at once: others wait this long for their next token
ROWS = 8


class Busy(Exception):
    """The queue is full, or the server is stopping."""


class Token(NamedTuple):
    """A token with its log-probability under the raw distribution, if asked for, and the likeliest in its place."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]
    reason: str | None = None  # with the last token of an answer: why it ended, "stop" or "length"


class Prompt(NamedTuple):
    """The prompt was computed."""

    tokens: list[Token]  # every token but the first, if their log-probabilities were asked for
    reused: int  # tokens that were not computed again


Event: TypeAlias = "Prompt | Token | Exception"


@dataclass(eq=False)
class Job:
    """One answer to one prompt. `tell` gets its events, in the scheduler's thread; a Token with a reason is the last.

    With max_new_tokens 0 the Prompt is the last event.
    """

    ids: list[int]
    settings: dict[str, Any]  # of qwen3np.generate
    tell: Callable[[Event], object]
    most: int  # new tokens
    row: int = 0  # of the random stream, as in generate
    top: int | None = None  # None: no log-probabilities; else with this many of the likeliest
    prompt_top: int | None = None
    until: float = inf  # time.monotonic()
    cancelled: bool = False
    new: list[int] = field(default_factory=list[int])
    prompt_tokens: list[Token] = field(default_factory=list[Token])
    reused: int = 0
    cache: KVCache | None = None
    rng: np.random.Generator | None = None
    drafts: Drafts | None = None

    @property
    def room(self) -> int:
        """Positions that its cache needs."""
        return len(self.ids) + max(self.most - 1, 0)


class Scheduler:
    """The queue, the running jobs, and the thread that serves them."""

    def __init__(
        self,
        model: Model,
        *,
        waiting: int,
        memory: int,
        numerics: str = "float32",
        engine: str = "fast",
        guesses: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the thread.

        With `waiting` jobs in the queue no request is taken; `memory`: bytes for all caches; guesses: the settings
        prompt_lookup_num_tokens or assistant_model.
        """
        self.model, self.memory, self.limit, self.guesses = model, memory, waiting, dict(guesses or {})
        self.options: dict[str, Any] = {"numerics": numerics, "engine": engine}
        self.counts: Counter[str] = Counter()  # for /metrics
        draft: Model | None = self.guesses.get("assistant_model")
        self._per_position = _bytes_per_position(model, numerics) + (_bytes_per_position(draft) if draft else 0)
        self._waiting: deque[Job] = deque()
        self._tasks: deque[Callable[[], object]] = deque()
        self._running: list[Job] = []
        self._prefixes = Prefixes(PIECE)
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def job(self, ids: list[int], settings: dict[str, Any], tell: Callable[[Event], object], **options: Any) -> Job:
        """Return a job, checked. Raises ValueError as generate, and for one that exceeds the memory for caches."""
        config, echo = self.model.config, settings["max_new_tokens"] == 0
        chosen = checked({**settings, **({"max_new_tokens": 1} if echo else {}), **self.guesses}) | self.options
        require_ids(chosen, config)
        ids = guard.checked_sequence(ids, config)
        context = config.max_position_embeddings
        if len(ids) > context:
            raise ContextOverflowError(f"the prompt has {len(ids)} tokens; the context of this model is {context}")
        most = 0 if echo else min(chosen["max_new_tokens"], context + 1 - len(ids))
        job = Job(ids, chosen, tell, most, **options)
        if (needed := job.room * self._per_position) > self.memory:
            raise ValueError(
                f"prompt and answer of {job.room} tokens need {needed / 1e9:.2f} GB for their cache; this server has "
                f"{self.memory / 1e9:.2f} GB: ask for fewer tokens"
            )
        return job

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none. Raises Busy."""
        self._add(self._waiting, *jobs)

    def call(self, *tasks: Callable[[], object]) -> None:
        """Queue calls that use the model; one runs between two tokens of the answers. Raises Busy."""
        self._add(self._tasks, *tasks)

    def _add(self, queue: deque[Any], *new: Any) -> None:
        with self._changed:
            if self._closed or len(self._waiting) + len(self._tasks) >= self.limit:
                raise Busy("the server is stopping" if self._closed else "too many requests are waiting")
            queue.extend(new)
            self._changed.notify()

    @property
    def load(self) -> dict[str, int]:
        """How many jobs wait and run, and the bytes of kept prefixes."""
        return {
            "requests_waiting": len(self._waiting) + len(self._tasks),
            "requests_running": len(self._running),
            "prefix_bytes": self._prefixes.bytes,
        }

    def close(self) -> None:
        """Stop: what still waits or runs fails with Busy."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in [*self._running, *self._waiting]:
            job.tell(Busy("the server is stopping"))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._tasks or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                task = self._tasks.popleft() if self._tasks else None
            if task is not None:
                task()
            self._leave()
            self._admit()
            filling = next((job for job in self._running if not self._filled(job)), None)
            decoding = [job for job in self._running if self._filled(job)]
            if filling is not None:
                self._guarded([filling], self._fill_piece)
            for start in range(0, len(decoding), ROWS):
                self._guarded(decoding[start : start + ROWS], self._step)

    def _guarded(self, jobs: list[Job], work: Callable[[list[Job]], object]) -> None:
        """Do work for jobs. They fail with its error, and nobody else does."""
        try:
            work(jobs)
        except Exception as error:
            for job in jobs:
                if job in self._running:
                    self._end(job, error)

    def _leave(self) -> None:
        """Drop jobs that were cancelled, and end those whose time is over."""
        now = time.monotonic()
        self._running = [job for job in self._running if not job.cancelled]
        for job in [job for job in self._running if now > job.until]:
            self._end(job, TimeoutError("the time limit of this server was reached"))
        with self._changed:
            for job in [job for job in self._waiting if job.cancelled or now > job.until]:
                self._waiting.remove(job)
                job.tell(Busy("the request waited too long"))

    def _admit(self) -> None:
        """Start waiting jobs, first come first served, as far as there is memory."""
        while self._waiting:
            job = self._waiting[0]
            taken = self._per_position * sum(other.room for other in [*self._running, job])
            if taken > self.memory:
                return
            while taken + self._prefixes.bytes > self.memory and self._prefixes.drop_oldest():
                pass
            with self._changed:
                self._waiting.popleft()
            self._running.append(job)
            self._guarded([job], self._start)

    def _start(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.cache = self._new_cache(job.room)
            job.rng = generator(job.settings["seed"], job.row)
            job.drafts = drafts_of(job.settings, self.model.config, job.room + 1) if job.most else None
            if job.prompt_top is None:
                job.reused = self._prefixes.fill(job.cache, job.ids)

    def _new_cache(self, length: int) -> KVCache:
        return KVCache.allocate(self.model.config, 1, length, named(self.options["numerics"]).storage)

    @staticmethod
    def _filled(job: Job) -> bool:
        assert job.cache is not None
        return int(job.cache.lengths[0]) >= len(job.ids)

    def _forward(self, ids: Any, cache: KVCache, **options: Any) -> Array:
        return guard.forward(self.model.weights, self.model.config, ids, cache, **self.options, **options)

    def _fill_piece(self, jobs: list[Job]) -> None:
        """Compute the next piece of a prompt; after the last one, its first new token."""
        (job,) = jobs
        assert job.cache is not None
        start = int(job.cache.lengths[0])
        end = min(start - start % PIECE + PIECE, len(job.ids))
        whole = job.prompt_top is not None
        logits = self._forward(job.ids[start:end], job.cache, last_only=not whole, head=whole or end == len(job.ids))[0]
        self.counts["prompt_tokens"] += end - start
        if job.prompt_top is not None:
            guard.require_finite(logits, *self._place(job, end))
            following = job.ids[start + 1 : end + 1]
            for row, token in zip(log_probabilities(logits[: len(following)]), following, strict=True):
                job.prompt_tokens.append(_scored(row, token, job.prompt_top))
        if end < len(job.ids):
            return
        self.counts["reused_tokens"] += job.reused
        job.tell(Prompt(job.prompt_tokens, job.reused))
        if job.most == 0:
            self._end(job, None)
        else:
            self._choose(job, logits[-1])

    def _step(self, jobs: list[Job]) -> None:
        """Compute the next token of up to ROWS jobs; for a job that runs alone, also those that were guessed right."""
        guesses = self._guesses(jobs[0]) if len(self._running) == 1 else []
        cache = Joined([job.cache for job in jobs if job.cache is not None])
        passed = self._forward([[job.new[-1], *guesses] for job in jobs], cache, last_only=not guesses)
        for job, logits in zip(jobs, passed, strict=True):
            self._guarded([job], lambda _, job=job, logits=logits: self._take(job, logits, guesses))

    def _guesses(self, job: Job) -> list[int]:
        if job.drafts is None:
            return []
        assert job.rng is not None
        ids, made = np.array(job.ids + job.new), len(job.new)
        return job.drafts.next(ids, job.most - made - 1, chooser(job.settings, job.rng, ids, made))

    def _take(self, job: Job, passed: Array, guesses: list[int]) -> None:
        """Choose the next id, and further ones while guesses are right: their logits are in passed (1 + guesses, V)."""
        self.counts["guesses"] += len(guesses)
        for n, logits in enumerate(passed):
            self.counts["guesses_right"] += n > 0
            self._choose(job, logits)
            if job.cache is None or guesses[n : n + 1] != job.new[-1:]:
                break
        if job.cache is not None:
            job.cache.lengths[0] = len(job.ids) + len(job.new) - 1  # without the wrong ones

    def _choose(self, job: Job, logits: Array) -> None:
        """Choose the next id from logits (V,), and end the job if it was the last one."""
        assert job.rng is not None
        settings, before = job.settings, job.ids + job.new
        if not settings["remove_invalid_values"]:
            guard.require_finite(logits, *self._place(job, len(before)))
        chosen = sample(logits, settings, job.rng, before, len(job.new))
        job.new.append(chosen)
        self.counts["generated_tokens"] += 1
        reason = "length" if len(job.new) == job.most else None
        if chosen in settings["stop_ids"] or (settings["stop"] is not None and settings["stop"](job.new)):
            reason = "stop"
        scored = Token(chosen, None, [])
        if job.top is not None:
            scored = _scored(log_probabilities(logits), chosen, job.top)
        if reason:
            self._end(job, scored._replace(reason=reason))
        else:
            job.tell(scored)

    def _place(self, job: Job, end: int) -> tuple[Any, Any, list[int], str]:
        return self.model.weights, self.model.config, (job.ids + job.new)[:end], self.options["numerics"]

    def _end(self, job: Job, event: Event | None) -> None:
        """Take a job out, tell its last event, and keep the beginning of its prompt for later ones."""
        self._running.remove(job)
        if event is not None:
            job.tell(event)
        if not isinstance(event, Exception):
            with suppress(ValueError):  # too little memory is free
                self._keep(job)
        job.cache = job.drafts = None

    def _keep(self, job: Job) -> None:
        length = len(job.ids) // PIECE * PIECE
        if job.cache is None or self._prefixes.holds(job.ids):
            return
        taken = self._per_position * (length + sum(other.room for other in self._running))
        if taken > self.memory:
            return
        while taken + self._prefixes.bytes > self.memory and self._prefixes.drop_oldest():
            pass
        self._prefixes.keep(job.cache, job.ids, self._new_cache(length))


def _bytes_per_position(model: Model, numerics: str = "float32") -> int:
    """Return the bytes of keys and values at one position."""
    config, storage = model.config, named(numerics).storage
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * np.dtype(storage).itemsize


def _scored(logprobs: Array, token: int, top: int) -> Token:
    """A token with its log-probability and the `top` likeliest, given those of all ids (V,)."""
    best = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top]
    best = best[np.lexsort((best, -logprobs[best]))]
    return Token(token, float(logprobs[token]), [(int(i), float(logprobs[i])) for i in best])
