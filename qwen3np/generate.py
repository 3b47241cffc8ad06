"""Prefill, then one token after another, until a stop id or the length: ids in, ids out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
from qwen3np.padding import unpadded
from qwen3np.sampling import sample
from qwen3np.settings import GenerationSettings, checked, lists_settings
from qwen3np.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qwen3np.tokenizer import Tokenizer

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
    attention_mask: ArrayLike | None = None,
    num_return_sequences: int = 1,
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
    attention_mask: ArrayLike | None = None,
    num_return_sequences: int = 1,
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
    attention_mask: ArrayLike | None = None,
    num_return_sequences: int = 1,
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
    max_new_tokens and other settings
        The generation settings; settings.GenerationSettings has their ranges. temperature 0 is greedy. Each row draws
        from its own stream of the seed, whatever else is in the batch: row 0 as alone with that seed, row r as alone
        with seed=(seed, r). stop_ids=None stops at the config's eos_token_id.
    attention_mask
        For padded ids (B, S), which may be padded on the left or on the right: 1 for tokens, 0 for padding.
    num_return_sequences
        How many answers to each prompt: a list of them all is returned, those to the first prompt first.
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
    batch, single = _as_batch(input_ids if attention_mask is None else unpadded(input_ids, attention_mask))
    if num_return_sequences != 1:
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be a whole number from 1, got {num_return_sequences!r}")
        batch, single = cast("Batch", [prompt for prompt in batch for _ in range(num_return_sequences)]), False
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
    _check_ids(chosen, config)
    context = config.max_position_embeddings
    prompts = [checked_sequence(prompt, config) for prompt in batch]
    for row, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise ContextOverflowError(
                f"input_ids: prompt {row} has {len(prompt)} tokens; the context of this model is {context}"
            )
    # the last new token is never an input, so it needs no room
    longest = min(context + 1, chosen["max_length"] or context + 1)
    most = [min(chosen["max_new_tokens"], longest - len(prompt)) for prompt in prompts]
    if min(most) < 1:
        raise ValueError(f"max_length={longest}: prompt {most.index(min(most))} is that long, or longer, already")
    room = max(len(prompt) + n - 1 for prompt, n in zip(prompts, most, strict=True))
    check_cache(cache, weights, config, named(numerics, engine), len(batch), 0)
    require_unchanged(weights)
    require_room_in_cache(cache, room)
    if room > cache.max_length:
        cache.reserve(max(room, min(2 * cache.max_length, context)))  # doubled, so that copies do not add up
    computation: dict[str, Any] = {"numerics": numerics, "engine": engine, "edit": edit}
    return _run(weights, config, prompts, cache, most, room, chosen, computation, progress)


def _run(
    weights: Weights,
    config: Config,
    prompts: list[list[int]],
    cache: KVCache,
    most: list[int],
    room: int,
    settings: dict[str, Any],
    computation: dict[str, Any],
    progress: Progress | None,
) -> Iterator[Step]:
    """Yield the steps of prompts that were checked, each at most `most` long; the cache has `room` positions."""
    numerics, stop, stop_ids = computation["numerics"], settings["stop"], settings["stop_ids"]
    generators = _generators(settings["seed"], len(prompts))
    began = time.monotonic()
    logits: list[Array] = []
    for row, prompt in enumerate(prompts):
        if row and prompt == prompts[row - 1] and computation["edit"] is None:  # one of several answers to a prompt
            _copy(cache, row - 1, row, len(prompt))
        logits.append(_prefill(weights, config, prompt, cache.select([row]), computation, progress))
    new: list[list[int]] = [[] for _ in prompts]
    ids = np.zeros((len(prompts), room + 1), np.int64)  # of prompts and answers, to be compared with the cache's
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    active = list(range(len(prompts)))
    while active:
        going_on: list[int] = []
        for row, row_logits in zip(active, logits, strict=True):
            end = len(prompts[row]) + len(new[row])
            if not settings["remove_invalid_values"]:
                require_finite(row_logits, weights, config, ids[row, :end], numerics)
            chosen = sample(row_logits, settings, generators[row], ids[row, :end], len(new[row]))
            ids[row, end] = chosen
            new[row].append(chosen)
            done = len(new[row]) == most[row] or chosen in stop_ids or (stop is not None and stop(new[row]))
            done = done or (settings["max_time"] is not None and time.monotonic() - began > settings["max_time"])
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


def _copy(cache: KVCache, source: int, target: int, length: int) -> None:
    """Copy the first positions of one sequence of a cache to another."""
    a, b = cache.rows[[source, target]]
    for held in (cache.k, cache.v):
        held[:, b, :, :length] = held[:, a, :, :length]
    cache.ids[b, :length], cache.lengths[b] = cache.ids[a, :length], length


def _generators(seed: int | Sequence[int] | None, rows: int) -> list[np.random.Generator]:
    """Return a generator for each row: of (seed, row), for row 0 of seed itself."""
    if seed is None:
        return [np.random.default_rng() for _ in range(rows)]
    parts = [*seed] if isinstance(seed, Sequence) else [seed]
    return [np.random.default_rng([*parts, row] if row else parts) for row in range(rows)]


def _check_ids(chosen: dict[str, Any], config: Config) -> None:
    """Make the stop ids a set. Raises ValueError for ids of settings that the vocabulary does not have."""
    if chosen["stop_strings"]:
        raise ValueError("stop_strings need a tokenizer: Model.generate has one; here stop= takes a callable")
    end, biases = chosen["forced_eos_token_id"], chosen["sequence_bias"] or ()
    given: dict[str, Any] = {
        "stop_ids": chosen["stop_ids"] or (),
        "bad_words_ids": [i for word in chosen["bad_words_ids"] or () for i in word],
        "sequence_bias": [i for ids, *_ in (biases.items() if isinstance(biases, dict) else biases) for i in ids],
        "forced_eos_token_id": end if isinstance(end, Collection) else () if end is None else [end],
    }
    for name, ids in given.items():
        if beyond := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise ValueError(f"{name}: the vocabulary has no id {beyond[0]}; its ids are 0 to {config.vocab_size - 1}")
    chosen["stop_ids"] = frozenset(config.eos_token_id if chosen["stop_ids"] is None else chosen["stop_ids"])


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


def said_in(tokenizer: Tokenizer, strings: Collection[str]) -> Callable[[list[int]], bool]:
    """Return a rule `stop` for generate: whether the text of the newest ids ends, or goes past, one of the strings."""
    # every token that says something is a byte or more, so a stop string lies within this many tokens
    width = 4 + max((len(string.encode()) for string in strings), default=0)

    def ended(new: list[int]) -> bool:
        tail = tokenizer.decode(new[-width:], skip_special_tokens=True) if strings else ""
        return any(string in tail for string in strings)

    return ended


def _as_batch(input_ids: Ids | Batch) -> tuple[Batch, bool]:
    """Return input_ids as a list of sequences, and whether it was a single one."""
    if len(input_ids) and all(isinstance(item, (Sequence, np.ndarray)) for item in input_ids):
        return cast("Batch", input_ids), False
    return [cast("Sequence[int]", input_ids)], True
