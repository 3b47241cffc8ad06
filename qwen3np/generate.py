"""Prefill, then one token after another, until a stop id or the length: ids in, ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple, TypeAlias, cast

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.errors import ContextOverflowError
from qwen3np.guard import (
    cache_holds,
    check_cache,
    checked_sequence,
    forward,
    require_finite,
    require_room_in_cache,
    require_unchanged,
)
from qwen3np.numerics import Array, named
from qwen3np.sampling import SamplingParameters, sample
from qwen3np.weights import Weights

Ids: TypeAlias = Sequence[int]
Batch: TypeAlias = Sequence[Sequence[int]]

# Long prompts go through the model in pieces of so many positions: enough to be bound by arithmetic.
PREFILL_CHUNK = 512


class Step(NamedTuple):
    """One new token of one sequence."""

    row: int  # which sequence of the batch
    id: int
    logits: Array  # (V,) what it was chosen from; see sampling.log_probabilities
    done: bool  # whether it is the last one of its sequence


def generate(
    weights: Weights,
    config: Config,
    input_ids: Ids | Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
    numerics: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> tuple[list[int] | list[list[int]], KVCache]:
    """Return the new ids after input_ids, and the cache, which makes going on from here cheap.

    input_ids: the full sequence so far, or a list of such (a ragged batch; each stops by itself, and then costs
    nothing); the new ids come in the same form and end with the stop id, if one came, or at max_new_tokens or the end
    of the context. With the cache of an earlier call only what comes after the longest common prefix is computed; it
    grows when it must. temperature 0 is greedy; see sampling.SamplingParameters for the others. Each sequence draws
    from a generator of its own with this seed, so it does not matter what else is in its batch. progress is told, piece
    by piece, how many positions of the prompts were computed.

    Raises ValueError for bad ids and parameters (before anything is computed), ContextOverflowError for a prompt that
    leaves no room in config.max_position_embeddings, ValueError with the numbers where there is less memory than the
    cache of prompts and new tokens takes in the end, CheckpointError for a mapped file that was changed since, and
    NonFiniteError where NaN or infinity came out.
    """
    batch, single = _as_batch(input_ids)
    if cache is None:
        cache = new_cache(config, batch, max_new_tokens, numerics)
    new: list[list[int]] = [[] for _ in batch]
    for step in steps(
        weights,
        config,
        batch,
        cache,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParameters(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        stop=_stop(stop_ids),
        seed=seed,
        numerics=numerics,
        progress=progress,
    ):
        new[step.row].append(step.id)
    return (new[0] if single else new), cache


def stream(
    weights: Weights,
    config: Config,
    input_ids: Ids,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
    numerics: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> Iterator[int]:
    """Yield the new ids of one sequence as they come; arguments and errors as in generate.

    A cache given here is filled on the way, and is good for going on wherever the caller stops listening. When another
    call has used it, this one can only end with a ValueError.
    """
    batch, single = _as_batch(input_ids)
    if not single:
        raise ValueError("stream: takes one sequence of ids; generate takes a batch")
    found = steps(
        weights,
        config,
        batch,
        new_cache(config, batch, max_new_tokens, numerics) if cache is None else cache,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParameters(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        stop=_stop(stop_ids),
        seed=seed,
        numerics=numerics,
        progress=progress,
    )
    return (step.id for step in found)


def _check_count(max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number, at least 1, got {max_new_tokens!r}")


def _stop(stop_ids: Collection[int]) -> Callable[[list[int]], bool]:
    """Return the rule that a sequence ends after one of these ids."""
    try:
        ids = frozenset(stop_ids)
    except TypeError:
        raise ValueError(f"stop_ids must be a collection of ids, got {stop_ids!r}") from None
    return lambda new: new[-1] in ids


def new_cache(config: Config, batch: Batch, max_new_tokens: int, numerics: str = "float32") -> KVCache:
    """Return an empty cache with room for each of these prompts and max_new_tokens more."""
    _check_count(max_new_tokens)
    longest = max((len(prompt) for prompt in batch), default=0)
    length = max(min(longest + max_new_tokens, config.max_position_embeddings), 1)
    return KVCache.allocate(config, max(len(batch), 1), length, named(numerics).storage)


def steps(
    weights: Weights,
    config: Config,
    batch: Batch,
    cache: KVCache,
    *,
    max_new_tokens: int,
    sampling: SamplingParameters,
    stop: Callable[[list[int]], bool],
    seed: int | None = None,
    numerics: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> Iterator[Step]:
    """Yield each new token of each sequence with the logits it was chosen from: the engine of generate and stream.

    Arguments and errors as in generate, errors before the first step; stop is given the new ids of a sequence and says
    whether they end it. After every step the cache holds each sequence without its newest token.
    """
    _check_count(max_new_tokens)
    if len(batch) == 0:
        raise ValueError("input_ids: an empty batch; at least one prompt is needed")
    context = config.max_position_embeddings
    prompts = [checked_sequence(prompt, config) for prompt in batch]
    for row, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise ContextOverflowError(
                f"input_ids: prompt {row} has {len(prompt)} tokens; the context of this model is {context}"
            )
    # the last new token is never an input, so it needs no room
    most = [min(max_new_tokens, context + 1 - len(prompt)) for prompt in prompts]
    room = max(len(prompt) + n - 1 for prompt, n in zip(prompts, most, strict=True))
    check_cache(cache, weights, config, named(numerics), len(batch), 0)
    require_unchanged(weights)
    require_room_in_cache(cache, room)
    if room > cache.max_length:
        cache.reserve(max(room, min(2 * cache.max_length, context)))  # doubled, so that copies do not add up

    try:
        generators = [np.random.default_rng(seed) for _ in prompts]
    except (ValueError, TypeError):
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}") from None

    def run() -> Iterator[Step]:
        logits = [
            _prefill(weights, config, prompt, cache.select([row]), numerics, progress)
            for row, prompt in enumerate(prompts)
        ]
        new: list[list[int]] = [[] for _ in prompts]
        ids = np.zeros((len(prompts), room + 1), np.int64)  # of prompts and answers, to be compared with the cache's
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        active = list(range(len(prompts)))
        while active:
            going_on: list[int] = []
            for row, row_logits in zip(active, logits, strict=True):
                end = len(prompts[row]) + len(new[row])
                require_finite(row_logits, weights, config, ids[row, :end], numerics)
                ids[row, end] = chosen = sample(row_logits, sampling, generators[row], ids[row, :end])
                new[row].append(chosen)
                done = len(new[row]) == most[row] or stop(new[row])
                if not done:
                    going_on.append(row)
                yield Step(row, new[row][-1], row_logits, done)
            active = going_on
            if active:
                for row in active:
                    if not cache_holds(cache, row, ids[row, : len(prompts[row]) + len(new[row]) - 1]):
                        raise ValueError("cache: another call used it meanwhile, so this generation cannot go on")
                newest = [[new[row][-1]] for row in active]
                selected = cache.select(active)
                logits = list(forward(weights, config, newest, selected, numerics=numerics, last_only=True)[:, 0])

    return run()


def _prefill(
    weights: Weights,
    config: Config,
    ids: list[int],
    cache: KVCache,
    numerics: str,
    progress: Callable[[int], object] | None,
) -> Array:
    """Bring the cache of one sequence up to ids, computing only what it lacks; return the last logits (V,)."""
    start = cache.keep_prefix(0, ids[:-1])  # the last token is always computed: its logits are needed
    while True:
        chunk = ids[start : start + PREFILL_CHUNK]
        start += len(chunk)
        last = start == len(ids)
        logits = forward(weights, config, chunk, cache, numerics=numerics, last_only=True, head=last)
        if progress:
            progress(len(chunk))
        if last:
            return logits[0, 0]


def stop_at(pieces: Iterable[str], stop_strings: Collection[str]) -> Iterator[str]:
    """Yield text as it comes, up to the first stop string, of which nothing is yielded, however it is cut into pieces.

    What could still become a stop string is held back until it is known.
    """
    if "" in stop_strings:
        raise ValueError("stop strings must not be empty")
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stop_strings if (at := held.find(stop)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        # the longest end of the text that begins some stop string
        keep = max((n for stop in stop_strings for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _as_batch(input_ids: Ids | Batch) -> tuple[Batch, bool]:
    """Return input_ids as a list of sequences, and whether it was a single one."""
    if len(input_ids) and all(isinstance(item, (Sequence, np.ndarray)) for item in input_ids):
        return cast("Batch", input_ids), False
    return [cast("Ids", input_ids)], True
