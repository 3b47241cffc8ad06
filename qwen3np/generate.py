"""Prefill, then one token after another, until a stop id or the length: ids in, ids out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

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
from qwen3np.numerics import Array, Edit, named
from qwen3np.sampling import sample
from qwen3np.settings import GenerationSettings, checked, lists_settings
from qwen3np.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

Ids: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"
Batch: TypeAlias = "Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]]"
Progress: TypeAlias = Callable[[int], object]

# Long prompts go through the model in pieces of this many positions: enough to be bound by arithmetic.
PREFILL_CHUNK = 512


class Step(NamedTuple):
    """One new token of one sequence."""

    row: int  # which sequence of the batch
    id: int
    logits: Array  # (V,) from which it was chosen; see sampling.log_probabilities
    done: bool  # whether it is the last one of its sequence


@overload
def generate(
    weights: Weights,
    config: Config,
    input_ids: Ids,
    *,
    cache: KVCache | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Progress | None = None,
    edit: Edit | None = None,
    **settings: Unpack[GenerationSettings],
) -> tuple[list[int], KVCache]: ...
@overload
def generate(
    weights: Weights,
    config: Config,
    input_ids: Batch,
    *,
    cache: KVCache | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Progress | None = None,
    edit: Edit | None = None,
    **settings: Unpack[GenerationSettings],
) -> tuple[list[list[int]], KVCache]: ...
@lists_settings
def generate(
    weights: Weights,
    config: Config,
    input_ids: Ids | Batch,
    *,
    cache: KVCache | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Progress | None = None,
    edit: Edit | None = None,
    **settings: Unpack[GenerationSettings],
) -> tuple[list[int] | list[list[int]], KVCache]:
    """Generate the ids that follow input_ids.

    Parameters
    ----------
    weights, config
        The model.
    input_ids
        The whole sequence so far, or a list of sequences: a ragged batch, in which each ends separately and then costs
        nothing.
    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, \
logits_processors, seed, stop_ids, stop
        The generation settings; settings.GenerationSettings has their ranges. temperature 0 is greedy. Each sequence
        draws from its own generator with this seed, so the rest of its batch makes no difference. stop_ids=None stops
        at the config's eos_token_id.
    cache
        The cache of an earlier call: only what follows the longest common prefix is computed. It grows when it must.
    numerics, engine, edit
        As in forward.
    progress
        Called with the number of prompt positions computed, piece by piece.

    Returns
    -------
    The new ids (a list for each sequence of a batch), which end with the stop id, if one came, or at max_new_tokens or
    the end of the context; and the cache, which makes continuing from here cheap.

    Raises
    ------
    ValueError
        For bad ids and settings (before anything is computed), and where prompts and new tokens need more memory than
        is free. ContextOverflowError for a prompt that leaves no room in config.max_position_embeddings,
        CheckpointError for a mapped file that changed after it was loaded, NonFiniteError where NaN or infinity came
        out.
    TypeError
        For unknown settings.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> new, cache = qwen3np.generate(model.weights, model.config, [281, 297, 272, 1132, 259], max_new_tokens=4)
    >>> new
    [1592, 256, 13, 2022]

    """
    batch, single = _as_batch(input_ids)
    if cache is None:
        cache = new_cache(config, batch, checked(settings)["max_new_tokens"], numerics)
    new: list[list[int]] = [[] for _ in batch]
    computation: dict[str, Any] = {"numerics": numerics, "engine": engine, "progress": progress, "edit": edit}
    for step in steps(weights, config, batch, cache, **computation, **settings):
        new[step.row].append(step.id)
    return (new[0] if single else new), cache


@lists_settings
def stream(
    weights: Weights,
    config: Config,
    input_ids: Ids,
    *,
    cache: KVCache | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Progress | None = None,
    edit: Edit | None = None,
    **settings: Unpack[GenerationSettings],
) -> Iterator[int]:
    """Yield the new ids of one sequence as they come; arguments and errors as in generate.

    A cache given here is filled on the way, and can be continued wherever the caller stops listening. Once another call
    has used it, this one can only end with a ValueError.
    """
    batch, single = _as_batch(input_ids)
    if not single:
        raise ValueError("stream: takes one sequence of ids; generate takes a batch")
    computation: dict[str, Any] = {"numerics": numerics, "engine": engine, "progress": progress, "edit": edit}
    found = steps(weights, config, batch, cache, **computation, **settings)
    return (step.id for step in found)


def new_cache(config: Config, batch: Batch, max_new_tokens: int, numerics: str = "float32") -> KVCache:
    """Return an empty cache with room for each of these prompts and max_new_tokens more."""
    checked({"max_new_tokens": max_new_tokens})
    longest = max((len(prompt) for prompt in batch), default=0)
    length = max(min(longest + max_new_tokens, config.max_position_embeddings), 1)
    return KVCache.allocate(config, max(len(batch), 1), length, named(numerics).storage)


@lists_settings
def steps(
    weights: Weights,
    config: Config,
    batch: Batch,
    cache: KVCache | None = None,
    *,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Progress | None = None,
    edit: Edit | None = None,
    **settings: Unpack[GenerationSettings],
) -> Iterator[Step]:
    """Yield each new token of each sequence with the logits it was chosen from: the loop behind generate and stream.

    Arguments and errors as in generate; errors come before the first step. After every step the cache holds each
    sequence without its newest token.
    """
    chosen = checked(_without_sampling(settings))
    if len(batch) == 0:
        raise ValueError("input_ids: an empty batch; at least one prompt is needed")
    if cache is None:
        cache = new_cache(config, batch, chosen["max_new_tokens"], numerics)
    context = config.max_position_embeddings
    prompts = [checked_sequence(prompt, config) for prompt in batch]
    for row, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise ContextOverflowError(
                f"input_ids: prompt {row} has {len(prompt)} tokens; the context of this model is {context}"
            )
    # the last new token is never an input, so it needs no room
    most = [min(chosen["max_new_tokens"], context + 1 - len(prompt)) for prompt in prompts]
    room = max(len(prompt) + n - 1 for prompt, n in zip(prompts, most, strict=True))
    check_cache(cache, weights, config, named(numerics, engine), len(batch), 0)
    require_unchanged(weights)
    require_room_in_cache(cache, room)
    if room > cache.max_length:
        cache.reserve(max(room, min(2 * cache.max_length, context)))  # doubled, so that copies do not add up
    stop_ids = frozenset(config.eos_token_id if chosen["stop_ids"] is None else chosen["stop_ids"])
    computation: dict[str, Any] = {"numerics": numerics, "engine": engine, "edit": edit}
    return _run(weights, config, prompts, cache, most, room, stop_ids, chosen, computation, progress)


def _run(
    weights: Weights,
    config: Config,
    prompts: list[list[int]],
    cache: KVCache,
    most: list[int],
    room: int,
    stop_ids: frozenset[int],
    settings: dict[str, Any],
    computation: dict[str, Any],
    progress: Progress | None,
) -> Iterator[Step]:
    """Yield the steps of prompts that were checked, each at most `most` long; the cache has `room` positions."""
    numerics, stop = computation["numerics"], settings["stop"]
    generators = [np.random.default_rng(settings["seed"]) for _ in prompts]
    logits = [
        _prefill(weights, config, prompt, cache.select([row]), computation, progress)
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
            chosen = sample(row_logits, settings, generators[row], ids[row, :end], len(new[row]))
            ids[row, end] = chosen
            new[row].append(chosen)
            done = len(new[row]) == most[row] or chosen in stop_ids or (stop is not None and stop(new[row]))
            if not done:
                going_on.append(row)
            yield Step(row, chosen, row_logits, done)
        active = going_on
        if active:
            for row in active:
                if not cache_holds(cache, row, ids[row, : len(prompts[row]) + len(new[row]) - 1]):
                    raise ValueError("cache: another call used it meanwhile, so this generation cannot go on")
            newest = [[new[row][-1]] for row in active]
            logits = list(forward(weights, config, newest, cache.select(active), last_only=True, **computation)[:, 0])


def _without_sampling(settings: GenerationSettings) -> dict[str, Any]:
    """Return the settings without `sampling`, which held some of them in earlier versions."""
    given: dict[str, Any] = dict(settings)
    if "sampling" in given:
        warnings.warn("sampling=...: give these settings as arguments", DeprecationWarning, stacklevel=3)
        given = {"stop_ids": (), **given.pop("sampling"), **given}
    return given


def _prefill(
    weights: Weights,
    config: Config,
    ids: list[int],
    cache: KVCache,
    computation: dict[str, Any],
    progress: Progress | None,
) -> Array:
    """Bring the cache of one sequence up to ids, computing only what it lacks; return the last logits (V,)."""
    start = cache.keep_prefix(0, ids[:-1])  # the last token is always computed: its logits are needed
    while True:
        chunk = ids[start : start + PREFILL_CHUNK]
        start += len(chunk)
        last = start == len(ids)
        logits = forward(weights, config, chunk, cache, last_only=True, head=last, **computation)
        if progress:
            progress(len(chunk))
        if last:
            return logits[0, 0]


def stop_at(pieces: Iterable[str], stop_strings: Collection[str]) -> Iterator[str]:
    """Yield text as it comes, up to the first stop string, none of which is yielded, however it is cut into pieces.

    Text that could still become a stop string is held back until that is known.
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
        # the longest end of the text with which some stop string starts
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
    return [cast("Sequence[int]", input_ids)], True
