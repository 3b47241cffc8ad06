"""Guesses at the next tokens, so that one pass computes several: speculative decoding.

Reading the weights takes longer than multiplying a few rows by them, so a pass over guessed tokens costs little more
than a pass over one. Each token is still chosen from the model's own logits, with the random number that it would have
anyway; a right guess only means that the logits after it have been computed already. So the ids are the same with and
without guesses. (Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, keep the distribution of the ids.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.guard import forward
from qwen3np.numerics import Array
from qwen3np.sampling import sample
from qwen3np.settings import Checkpoint
from qwen3np.weights import count_parameters

PREFILL_CHUNK = 512  # positions of a long prompt computed at once: enough to be bound by arithmetic, not by memory
# With the token before them these are 8 rows, each of which has the bits that it has alone.
MOST = 7
# What a further row adds to the time of a pass: 0.1 (bfloat16, mapped) to 0.25 (float32), at the size of Qwen3-0.6B.
COST = 0.15
# How much a guess changes the estimate of how many are right.
WEIGHT = 0.2  # of ids per pass over twelve texts that repeat their prompt, 0.1 and 0.3 give no more
NGRAMS = (4, 3, 2)  # how many ids must have occurred before: the first of these for which they have

Choose: TypeAlias = Callable[[Array, "list[int]"], int]  # (logits (V,), guesses so far) -> the next guess
Guess: TypeAlias = Callable[[Array, int, Choose], "list[int]"]  # (ids so far, at most, choose) -> guesses


def look_up(ids: Array, most: int, choose: Choose) -> list[int]:
    """Return up to `most` ids that followed the last ids when they last occurred. ids (N,).

    Prompt lookup: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
    """
    for n in NGRAMS:
        if len(ids) > n:
            grams = np.lib.stride_tricks.sliding_window_view(ids[:-1], n)
            (places,) = (grams == ids[-n:]).all(axis=1).nonzero()
            if len(places):  # the latest that enough ids follow, or the earliest
                whole = places[places + n + most <= len(ids)]
                start = (whole[-1] if len(whole) else places[0]) + n
                return ids[start : start + most].tolist()
    return []


def small_model(model: Checkpoint, room: int) -> Guess:
    """Return guesses by another model with the same vocabulary, which keeps a cache of its own, for `room` ids."""
    cache = KVCache.allocate(model.config, 1, min(room, model.config.max_position_embeddings))

    def guess(ids: Array, most: int, choose: Choose) -> list[int]:
        guesses: list[int] = []
        new = ids[cache.keep_prefix(0, ids[:-1].tolist()) :].tolist()
        while len(guesses) < most and cache.lengths[0] + len(new) <= cache.max_length:
            while len(new) > PREFILL_CHUNK:
                forward(model.weights, model.config, new[:PREFILL_CHUNK], cache, last_only=True, head=False)
                new = new[PREFILL_CHUNK:]
            logits = forward(model.weights, model.config, new, cache, last_only=True)[0, 0]
            if not np.isfinite(logits).all():
                break
            new = [choose(logits, guesses)]
            guesses += new
        return guesses

    return guess


class Drafts:
    """Guesses for one sequence: as many as pay off, given how many have been right so far."""

    def __init__(self, guess: Guess, most: int, price: float = 0.0) -> None:
        """Make at most `most` guesses for a pass, each of which takes `price` passes."""
        self.guess, self.most, self.cost = guess, min(most, MOST), COST + price
        self.right = 0.7  # an estimate of how likely a guess is right
        self.wait = self.waited = 0  # passes until the next try
        self.made, self.start = list[int](), 0  # the last guesses, and how many ids there were

    def next(self, ids: Array, room: int, choose: Choose) -> list[int]:
        """Return guesses at the ids that follow, at most `room`."""
        self._learn(ids[self.start :])
        self.wait = max(self.wait - 1, 0)
        most = 0 if self.wait else min(max(self._best(), 1), room)
        self.made, self.start = self.guess(ids, most, choose) if most > 0 else [], len(ids)
        return self.made

    def _learn(self, ids: Array) -> None:
        """Update the estimate by the ids that did follow. Where guesses do not pay off, try one ever more rarely."""
        for guessed, followed in zip(self.made, ids.tolist(), strict=False):
            self.right += WEIGHT * ((guessed == followed) - self.right)
            if guessed != followed:
                break
        if self.made:
            self.waited = 0 if self._best() else min(2 * self.waited + 2, 64)
            self.wait = self.waited

    def _best(self) -> int:
        """Return how many guesses give the most ids for the time: (1 + r + ... + rⁿ) / (1 + n cost)."""
        n = np.arange(self.most + 1)
        return int(np.argmax(np.cumsum(self.right**n) / (1 + n * self.cost)))


def drafts_of(settings: Mapping[str, Any], config: Config, room: int) -> Drafts | None:
    """Return the guesses that these generation settings ask for, for a sequence of up to `room` ids.

    None where an edit could tell them from what is asked for, and for the plain engine, in which several positions do
    not have the bits of one.
    """
    model: Checkpoint | None = settings["assistant_model"]
    if settings["edit"] is not None or settings["engine"] == "plain":
        return None
    if model is not None:
        price = count_parameters(model.config)["active"] / count_parameters(config)["active"]
        return Drafts(small_model(model, room), MOST, price)
    return Drafts(look_up, most) if (most := settings["prompt_lookup_num_tokens"]) else None


def chooser(settings: Mapping[str, Any], rng: np.random.Generator, ids: Array, made: int) -> Choose:
    """Return what chooses guesses from a draft's logits, with the random numbers that the ids after these will have."""
    rng = deepcopy(rng)
    settings = {**settings, "logits_processors": ()}  # which may count on seeing each id once

    def choose(logits: Array, guesses: list[int]) -> int:
        return sample(logits, settings, rng, [*ids, *guesses], made + len(guesses))

    return choose


@dataclass(eq=False)
class Answer:
    """One sequence of a batch, as it grows."""

    row: int
    ids: Array  # (N,): the prompt and the new ids, with room for all of them
    end: int  # how many there are
    most: int  # at most this many are new
    rng: np.random.Generator
    drafts: Drafts | None
    new: list[int] = field(default_factory=list[int])
    guesses: list[int] = field(default_factory=list[int])  # at the ids after the newest
    done: bool = False

    def add(self, new: int) -> None:
        """Append a new id."""
        self.ids[self.end] = new
        self.new.append(new)
        self.end += 1

    def guess(self, settings: dict[str, Any]) -> None:
        """Guess at the next ids."""
        if self.drafts is not None:
            ids, room = self.ids[: self.end], self.most - len(self.new) - 1
            self.guesses = self.drafts.next(ids, room, chooser(settings, self.rng, ids, len(self.new)))
