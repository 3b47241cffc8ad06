"""Prefill, then one token after another, until a stop id or the length: ids in, ids out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import numpy as np

from qwen3np import guard
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.drafts import PREFILL_CHUNK, Answer, drafts_of
from qwen3np.errors import ContextOverflowError
from qwen3np.numerics import Array, named
from qwen3np.padding import unpadded
from qwen3np.sampling import generators, sample
from qwen3np.settings import Batch, GenerationSettings, Ids, checked, lists_settings, require_ids
from qwen3np.terminal import counted
from qwen3np.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Step(NamedTuple):
    """One new token of one sequence."""

    row: int  # which sequence of the batch
    id: int
    logits: Array  # (V,) from which it was chosen; see sampling.log_probabilities
    done: bool  # whether it is the last one of its sequence
    guessed: bool = False  # whether it took no pass of its own; see drafts.py


@overload
def generate(
    weights: Weights, config: Config, input_ids: Ids, **settings: Unpack[GenerationSettings]
) -> tuple[list[int], KVCache]: ...
@overload
def generate(
    weights: Weights, config: Config, input_ids: Batch, **settings: Unpack[GenerationSettings]
) -> tuple[list[list[int]], KVCache]: ...
@lists_settings
def generate(
    weights: Weights, config: Config, input_ids: Ids | Batch, **settings: Unpack[GenerationSettings]
) -> tuple[list[int] | list[list[int]], KVCache]:
    """Generate the ids that follow input_ids.

    Parameters
    ----------
    weights, config
        The model.
    input_ids
        The whole sequence so far, or a list of sequences, which may differ in length; one that has ended costs nothing
        more.
    **settings
        See settings.GenerationSettings: max_new_tokens is required, temperature 0 is greedy. Each row draws from its
        own random stream, whatever else is in the batch: row 0 as if alone with this seed, row r as if alone with
        seed=(seed, r). With num_return_sequences the answers to the first prompt come first. With the cache of an
        earlier call, only what follows the longest common prefix is computed; it grows as needed.

    Returns
    -------
    The new ids (a list for each sequence of a batch), which end with the stop id, if one came, or at max_new_tokens or
    the end of the context; and the cache, which makes continuing from here cheap.

    Raises
    ------
    ValueError
        For bad ids and settings (before anything is computed), and where prompts and new tokens need more memory than
        is free. ContextOverflowError for a prompt that leaves no room in config.max_position_embeddings,
        CheckpointError for a mapped file that changed after it was loaded, NonFiniteError for NaN or infinity.
    TypeError
        For unknown settings.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> qwen3np.generate(model.weights, model.config, [281, 297, 272, 1132, 259], max_new_tokens=4)[0]
    [1592, 256, 13, 2022]

    """
    chosen = checked(settings)
    mask, answers = chosen.pop("attention_mask"), chosen.pop("num_return_sequences")
    batch, single = _as_batch(input_ids if mask is None else unpadded(cast("Any", input_ids), mask))
    if answers > 1:
        batch, single = [prompt for prompt in batch for _ in range(answers)], False
    if chosen["cache"] is None:
        chosen["cache"] = new_cache(config, batch, chosen["max_new_tokens"], chosen["numerics"])
    new: list[list[int]] = [[] for _ in batch]
    for step in steps(weights, config, batch, **chosen):
        new[step.row].append(step.id)
    return (new[0] if single else new), chosen["cache"]


@lists_settings
def stream(weights: Weights, config: Config, input_ids: Ids, **settings: Unpack[GenerationSettings]) -> Iterator[int]:
    """Yield the new ids of one sequence as they are generated; arguments and errors as in generate.

    A cache given here is filled along the way, and can be continued from wherever the caller stops. Once another call
    has used it, this one raises ValueError.
    """
    batch, single = _as_batch(input_ids)
    if not single:
        raise ValueError("stream: takes one sequence of ids; generate takes a batch")
    return (step.id for step in steps(weights, config, batch, **settings))


@lists_settings
def steps(
    weights: Weights, config: Config, batch: Batch, held: KVCache | None = None, **settings: Unpack[GenerationSettings]
) -> Iterator[Step]:
    """Yield each new token of each sequence with its logits: the loop behind generate and stream.

    Arguments and errors as in generate; errors come before the first step. `held` is the cache as a positional
    argument. After every step it holds each sequence without its newest token.
    """
    chosen = checked(settings)
    if len(batch) == 0:
        raise ValueError("input_ids: an empty batch; at least one prompt is needed")
    if chosen["attention_mask"] is not None or chosen["num_return_sequences"] != 1:
        raise ValueError("attention_mask and num_return_sequences are settings of generate only")
    require_ids(chosen, config)
    num, context = named(chosen["numerics"], chosen["engine"]), config.max_position_embeddings
    cache: KVCache = held or chosen["cache"] or new_cache(config, batch, chosen["max_new_tokens"], num.name)
    prompts = [guard.checked_sequence(prompt, config) for prompt in batch]
    for row, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise ContextOverflowError(
                f"input_ids: prompt {row} has {len(prompt)} tokens; the context of this model is {context}"
            )
    # the last new token is never an input, so it needs no room
    longest = min(context + 1, chosen["max_length"] or context + 1)
    most = [min(chosen["max_new_tokens"], longest - len(prompt)) for prompt in prompts]
    if min(most) < 1:
        raise ValueError(f"max_length={longest}: prompt {most.index(min(most))} is already that long")
    room = max(len(prompt) + n - 1 for prompt, n in zip(prompts, most, strict=True))
    guard.check_cache(cache, weights, config, num, len(batch), 0)
    guard.require_unchanged(weights)
    guard.require_room_in_cache(cache, room)
    if room > cache.max_length:
        cache.reserve(max(room, min(2 * cache.max_length, context)))  # doubled, so that copies do not add up

    def reported() -> Iterator[Step]:
        with counted(chosen["progress"], sum(map(len, prompts)) + sum(most), "generated") as count:
            for step in _run(weights, config, prompts, cache, most, {**chosen, "progress": count}):
                yield step
                if count is not None:
                    count(1)

    return reported()


def _run(
    weights: Weights,
    config: Config,
    prompts: list[list[int]],
    cache: KVCache,
    most: list[int],
    settings: dict[str, Any],
) -> Iterator[Step]:
    """Yield the steps of prompts that were checked, at most `most` of each, with room for all of them in the cache."""
    stop, stop_ids, until = settings["stop"], settings["stop_ids"], time.monotonic() + (settings["max_time"] or inf)
    rngs, answers, passed = generators(settings["seed"], len(prompts)), list[Answer](), list[Array]()
    for row, (prompt, n) in enumerate(zip(prompts, most, strict=True)):
        if row and prompt == prompts[row - 1] and settings["edit"] is None:  # another answer to the same prompt
            _copy(cache, row - 1, row, len(prompt))
        passed.append(_prefill(weights, config, prompt, cache.select([row]), settings))
        drafts = drafts_of(settings, config, len(prompt) + n)
        answers.append(Answer(row, np.array(prompt + [0] * n), len(prompt), n, rngs[row], drafts))
    active = answers
    while active:
        for answer, logits in zip(active, passed, strict=True):
            for n, token_logits in enumerate(logits):
                if n:  # the guess before is right, and in the cache
                    cache.lengths[cache.rows[answer.row]] += 1
                    _require_held(cache, answer.row, answer.ids[: answer.end])
                ids = answer.ids[: answer.end]
                if not settings["remove_invalid_values"]:
                    guard.require_finite(token_logits, weights, config, ids, settings["numerics"])
                chosen = sample(token_logits, settings, answer.rng, ids, len(answer.new))
                answer.add(chosen)
                done = len(answer.new) == answer.most or chosen in stop_ids or (stop is not None and stop(answer.new))
                answer.done = done or time.monotonic() > until
                yield Step(answer.row, chosen, token_logits, answer.done, n > 0)
                if answer.done or answer.guesses[n : n + 1] != [chosen]:
                    break
        active = [answer for answer in active if not answer.done]
        passed = _passes(weights, config, active, cache, settings)


def _passes(
    weights: Weights, config: Config, active: list[Answer], cache: KVCache, settings: dict[str, Any]
) -> list[Array]:
    """Return, for each sequence, the logits after its newest id and after each guess at the next: (1 + guesses, V)."""
    if not active:
        return []
    for answer in active:
        _require_held(cache, answer.row, answer.ids[: answer.end - 1])
    if len(active) == 1:  # several together share the reading of the weights already
        active[0].guess(settings)
    rows, inputs = [answer.row for answer in active], [[answer.new[-1], *answer.guesses] for answer in active]
    logits = _forward(weights, config, inputs, cache.select(rows), settings, last_only=False)
    for answer in active:
        cache.lengths[cache.rows[answer.row]] = answer.end  # without the guesses
    return list(logits)


def _require_held(cache: KVCache, row: int, ids: Array) -> None:
    if not guard.cache_holds(cache, row, ids):
        raise ValueError("cache: another call used it meanwhile, so this generation cannot go on")


def _copy(cache: KVCache, source: int, target: int, length: int) -> None:
    """Copy the first positions of one sequence of a cache to another."""
    a, b = cache.rows[[source, target]]
    for held in (cache.k, cache.v):
        held[:, b, :, :length] = held[:, a, :, :length]
    cache.ids[b, :length], cache.lengths[b] = cache.ids[a, :length], length


def _prefill(weights: Weights, config: Config, ids: list[int], cache: KVCache, settings: dict[str, Any]) -> Array:
    """Bring the cache of one sequence up to ids, computing only what it lacks; return the last logits (1, V)."""
    start = cache.keep_prefix(0, ids[:-1])  # the last token is always computed: its logits are needed
    while True:
        chunk = ids[start : start + PREFILL_CHUNK]
        start += len(chunk)
        logits = _forward(weights, config, chunk, cache, settings, head=start == len(ids))
        if settings["progress"]:
            settings["progress"](len(chunk))
        if start == len(ids):
            return logits[0]


def _forward(
    weights: Weights,
    config: Config,
    ids: Any,
    cache: KVCache,
    settings: dict[str, Any],
    *,
    last_only: bool = True,
    head: bool = True,
) -> Array:
    options = {name: settings[name] for name in ("numerics", "engine", "edit")}
    return guard.forward(weights, config, ids, cache, last_only=last_only, head=head, **options)


def new_cache(config: Config, batch: Batch, max_new_tokens: int, numerics: str = "float32") -> KVCache:
    """Return an empty cache with room for each of these prompts and max_new_tokens more."""
    checked({"max_new_tokens": max_new_tokens})
    longest = max((len(prompt) for prompt in batch), default=0)
    length = max(min(longest + max_new_tokens, config.max_position_embeddings), 1)
    return KVCache.allocate(config, max(len(batch), 1), length, named(numerics).storage)


def _as_batch(input_ids: Ids | Batch) -> tuple[Batch, bool]:
    """Return input_ids as a list of sequences, and whether it was a single one."""
    if len(input_ids) and all(isinstance(item, (Sequence, np.ndarray)) for item in input_ids):
        return cast("Batch", input_ids), False
    return [cast("Sequence[int]", input_ids)], True
