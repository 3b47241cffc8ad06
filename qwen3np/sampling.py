"""Logits -> the next id: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda t: 0 <= t < inf, "a finite number >= 0 (0 is greedy)"),
    "top_k": (Integral, lambda k: k >= 0, "an integer >= 1 (None or 0 is off)"),
    "top_p": (Real, lambda p: 0 < p <= 1, "a number in (0, 1]"),
    "min_p": (Real, lambda p: 0 <= p <= 1, "a number in [0, 1]"),
    "repetition_penalty": (Real, lambda r: 0 < r < inf, "a finite number > 0"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """How the next id is chosen; None is off, and so is a top_k of 0, as in generation_config.json.

    Raises ValueError with the name and the value of the first parameter that is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None  # Fan et al. 2018, arXiv:1805.04833
    top_p: float | None = None  # Holtzman et al. 2019, arXiv:1904.09751
    min_p: float | None = None  # Nguyen et al. 2024, arXiv:2407.01082
    repetition_penalty: float | None = None  # Keskar et al. 2019, arXiv:1909.05858

    def __post_init__(self) -> None:
        """Check every value once, before any generation starts."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind, valid, rule = _RULES[field.name]
            if value is None and field.default is None:
                continue
            if not (isinstance(value, kind) and valid(value)):
                raise ValueError(f"{field.name} must be {rule}, got {value!r}")


def processed_logits(
    logits: ArrayLike, parameters: SamplingParameters, previous_ids: ArrayLike = ()
) -> NDArray[np.float32]:
    """Logits (V,) -> the (V,) float32 logits that are sampled from; dropped ids are -inf.

    previous_ids: prompt and answer so far, for the repetition penalty. At temperature 0 one id is left.
    Raises ValueError where the logits have no finite maximum (NaN, +inf, all -inf) or an id is not in [0, V).
    """
    ids, scores = _candidates(logits, parameters, previous_ids)
    processed = np.full(np.shape(logits), -np.inf, np.float32)
    processed[ids] = scores
    return processed


def sample(
    logits: ArrayLike,
    parameters: SamplingParameters,
    rng: np.random.Generator,
    previous_ids: ArrayLike = (),
) -> int:
    """Logits (V,) -> one id, by inverse CDF; errors as in processed_logits.

    Every call takes exactly one number from rng, a greedy one too: the stream does not depend on the parameters.
    """
    ids, scores = _candidates(logits, parameters, previous_ids)
    cdf = np.cumsum(np.exp(scores - scores.max()), dtype=np.float64)
    # side="right" steps over ids of probability 0; random() < 1, so the index stays in range.
    return int(ids[np.searchsorted(cdf, rng.random() * cdf[-1], side="right")])


def log_probabilities(logits: ArrayLike) -> NDArray[np.float64]:
    """Log-softmax of logits (..., V) -> (..., V) in float64; ValueError where a row has no finite maximum."""
    scores = np.asarray(logits, np.float64)
    top = scores.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError(_NOT_FINITE)
    scores = scores - top
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores


_NOT_FINITE = "logits have no finite maximum (NaN, +inf or all -inf): check the weights and the numerics"


def _candidates(
    logits: ArrayLike, parameters: SamplingParameters, previous_ids: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Logits (V,) -> the ids that stay, ascending, and their processed scores, (N,) each."""
    with np.errstate(all="ignore"):  # what overflows here is reported below
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or not scores.size:
            raise ValueError(f"logits must have the shape (V,), got {scores.shape}")
        if parameters.repetition_penalty is not None:
            _penalize(scores, parameters.repetition_penalty, np.asarray(previous_ids, np.intp))
        if parameters.temperature > 0:
            scores /= np.float32(parameters.temperature)
        top = scores.max()
    if not np.isfinite(top):
        if not np.isfinite(np.max(logits)):
            raise ValueError(_NOT_FINITE)
        raise ValueError(f"logits leave the range of float32 under {parameters}; temperature 0 is greedy")
    if parameters.temperature == 0:
        ids = np.array([scores.argmax()], np.int32)  # the lowest id on ties
        return ids, scores[ids]

    ids = np.arange(scores.size, dtype=np.int32)
    if parameters.top_k:
        kept = _top_k(scores, parameters.top_k)
        ids, scores = ids[kept], scores[kept]
    if parameters.top_p is not None and parameters.top_p < 1:
        kept = _top_p(scores, parameters.top_p)
        ids, scores = ids[kept], scores[kept]
    if parameters.min_p:
        kept = _min_p(scores, parameters.min_p)
        ids, scores = ids[kept], scores[kept]
    return ids, scores


def _penalize(scores: NDArray[np.float32], penalty: float, previous_ids: NDArray[np.intp]) -> None:
    """Divide (below 0: multiply) the scores of previous_ids by penalty, in place; repeats count once."""
    if previous_ids.size and not 0 <= previous_ids.min() <= previous_ids.max() < scores.size:
        raise ValueError(f"previous_ids must be in [0, {scores.size})")
    previous = scores[previous_ids]
    factor = np.float32(penalty)
    scores[previous_ids] = np.where(previous < 0, previous * factor, previous / factor)


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Scores (N,) -> the places of the k highest and of all that tie with the last of them."""
    first = max(scores.size - k, 0)
    return np.flatnonzero(scores >= np.partition(scores, first)[first])


def _top_p(scores: NDArray[np.float32], p: float) -> NDArray[np.intp]:
    """Scores (N,) -> the places that stay when the least likely go as long as their sum is <= 1 - p."""
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
    """Scores (N,) -> the places at least p times as likely as the likeliest."""
    return np.flatnonzero(np.exp(scores - scores.max()) >= np.float32(p))
