"""Logits -> the next id: penalties, processors, temperature, top-k, top-p, min-p, in the order of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3np.settings import checked


def processed_logits(
    logits: ArrayLike, settings: Mapping[str, Any], previous_ids: ArrayLike = (), new: int = 0
) -> NDArray[np.float32]:
    """Return the (V,) float32 logits that are sampled from, given the model's logits (V,); dropped ids are -inf.

    settings are generation settings (settings.GenerationSettings); previous_ids are the ids so far, the last `new` of
    them generated. At temperature 0 one id is left. Raises ValueError for settings out of range, where the logits have
    no finite maximum (NaN, +inf, all -inf), and for an id that is not in [0, V).
    """
    ids, scores = _candidates(logits, checked(settings, needed=False), previous_ids, new)
    processed = np.full(np.shape(logits), -np.inf, np.float32)
    processed[ids] = scores
    return processed


def sample(
    logits: ArrayLike,
    settings: Mapping[str, Any],
    rng: np.random.Generator,
    previous_ids: ArrayLike = (),
    new: int = 0,
) -> int:
    """Return one id, drawn by inverse CDF. settings are settings.checked; see processed_logits for the rest.

    Every call takes exactly one number from rng, a greedy one too: the stream does not depend on the settings.
    """
    ids, scores = _candidates(logits, settings, previous_ids, new)
    cdf = np.cumsum(np.exp(scores - scores.max()), dtype=np.float64)
    # side="right" steps over ids of probability 0; random() < 1, so the index stays in range.
    return int(ids[np.searchsorted(cdf, rng.random() * cdf[-1], side="right")])


def log_probabilities(logits: ArrayLike) -> NDArray[np.float64]:
    """Return the log-softmax of logits (..., V) in float64; ValueError where a row has no finite maximum."""
    scores = np.asarray(logits, np.float64)
    top = scores.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError(_NOT_FINITE)
    scores = scores - top
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


_NOT_FINITE = "logits have no finite maximum (NaN, +inf or all -inf): check the weights and the numerics"


def _candidates(
    logits: ArrayLike, settings: Mapping[str, Any], previous_ids: ArrayLike, new: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Logits (V,) -> the ids that stay, ascending, and their processed scores, (N,) each."""
    temperature: float = settings["temperature"]
    with np.errstate(all="ignore"):  # overflow is reported below
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or not scores.size:
            raise ValueError(f"logits must have the shape (V,), got {scores.shape}")
        if settings["repetition_penalty"] is not None:
            _penalize(scores, settings["repetition_penalty"], np.asarray(previous_ids, np.intp))
        if (settings["presence_penalty"] or settings["frequency_penalty"]) and new:
            _penalize_new(scores, settings, np.asarray(previous_ids, np.intp)[-new:])
        for process in settings["logits_processors"]:
            scores = np.array(process(np.asarray(previous_ids), scores), np.float32)
            if scores.shape != np.shape(logits):
                raise ValueError(f"logits_processors: {process!r} gave {scores.shape} for {np.shape(logits)} logits")
        if temperature > 0:
            scores /= np.float32(temperature)
        top = scores.max()
    if not np.isfinite(top):
        if not np.isfinite(np.max(logits)):
            raise ValueError(_NOT_FINITE)
        given = ", ".join(f"{name}={value}" for name, value in settings.items() if isinstance(value, (int, float)))
        raise ValueError(f"logits leave the range of float32 under {given}; temperature 0 is greedy")
    if temperature == 0:
        ids = np.array([scores.argmax()], np.int32)  # the lowest id on ties
        return ids, scores[ids]
    ids = np.arange(scores.size, dtype=np.int32)
    for name, keep in (("top_k", _top_k), ("top_p", _top_p), ("min_p", _min_p)):
        if settings[name] and not (name == "top_p" and settings[name] == 1):
            kept = keep(scores, settings[name])
            ids, scores = ids[kept], scores[kept]
    return ids, scores


def _penalize(scores: NDArray[np.float32], penalty: float, previous_ids: NDArray[np.intp]) -> None:
    """Divide (below 0: multiply) the scores of previous_ids by penalty, in place; repeats count once."""
    if previous_ids.size and not 0 <= previous_ids.min() <= previous_ids.max() < scores.size:
        raise ValueError(f"previous_ids must be in [0, {scores.size})")
    previous = scores[previous_ids]
    factor = np.float32(penalty)
    scores[previous_ids] = np.where(previous < 0, previous * factor, previous / factor)


def _penalize_new(scores: NDArray[np.float32], settings: Mapping[str, Any], new_ids: NDArray[np.intp]) -> None:
    """Subtract, in place, presence_penalty from each generated id, and frequency_penalty for each time it came."""
    ids, counts = np.unique(new_ids, return_counts=True)
    scores[ids] -= np.float32(settings["presence_penalty"] or 0)
    scores[ids] -= np.float32(settings["frequency_penalty"] or 0) * counts.astype(np.float32)


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the indices of the k highest scores (N,), and of all that tie with the last of them."""
    first = max(scores.size - k, 0)
    return np.flatnonzero(scores >= np.partition(scores, first)[first])


def _top_p(scores: NDArray[np.float32], p: float) -> NDArray[np.intp]:
    """Return the indices kept after dropping the least likely tokens while their total stays <= 1 - p. Scores (N,)."""
    ordered = np.sort(scores)
    probabilities = np.exp(ordered - ordered[-1])
    probabilities /= probabilities.sum()
    # As torch does: float32 probabilities, added in float64, compared in float32. It decides exact ties: of ten
    # equal logits and p = 0.9, float64 throughout would keep ten, not nine. All below `tail` are less than 1 - p
    # together, so one sum does for them.
    tail = np.searchsorted(probabilities, np.float32((1 - p) / (2 * scores.size)))
    cumulative = np.cumsum(probabilities[tail:], dtype=np.float64)
    cumulative += probabilities[:tail].sum(dtype=np.float64)
    dropped = np.searchsorted(cumulative.astype(np.float32), np.float32(1 - p), side="right")
    stay = max(cumulative.size - int(dropped), 1)

    # Of equal scores the lower ids go first: the order of a stable sort, without its time.
    last = ordered[-stay]
    keep = scores > last
    ties = np.flatnonzero(scores == last)
    keep[ties[np.count_nonzero(keep) - stay :]] = True
    return np.flatnonzero(keep)


def _min_p(scores: NDArray[np.float32], p: float) -> NDArray[np.intp]:
    """Return the indices of scores (N,) at least p times as likely as the likeliest."""
    return np.flatnonzero(np.exp(scores - scores.max()) >= np.float32(p))
