"""Logits -> the next id: processors, temperature, filters, a draw; in the order of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3np.processors import ALL, FILTERS, PROCESSORS
from qwen3np.settings import checked


def processed_logits(
    logits: ArrayLike, settings: Mapping[str, Any], previous_ids: ArrayLike = (), new: int = 0
) -> NDArray[np.float32]:
    """Return the (V,) float32 logits that are sampled from, given the model's logits (V,); dropped ids are -inf.

    settings are generation settings (settings.GenerationSettings); previous_ids are the ids so far, of which the last
    `new` were generated. At temperature 0 one id is left. Raises ValueError for settings out of range, logits without a
    finite maximum (NaN, +inf, all -inf), and ids outside [0, V).

    Examples
    --------
    >>> qwen3np.processed_logits([1.0, 3.0, 2.0], {"temperature": 0.5, "top_k": 2}).tolist()
    [-inf, 6.0, 4.0]
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
    """Return one id, drawn by inverse CDF. settings come from settings.checked; the rest is as in processed_logits.

    Every call takes exactly one number from rng, even a greedy one, so the stream does not depend on the settings.
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
    previous = np.asarray(previous_ids, np.intp)
    with np.errstate(all="ignore"):  # overflow is reported below
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or not scores.size:
            raise ValueError(f"logits must have the shape (V,), got {scores.shape}")
        if previous.size and not 0 <= previous.min() <= previous.max() < scores.size:
            raise ValueError(f"previous_ids must be in [0, {scores.size})")
        for name, process in PROCESSORS.items():
            if settings[name] is not None:
                process(scores, settings[name], settings, previous, new)
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
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value not in (None, ()))
        problem = "no id is left" if top == -np.inf else "logits leave the range of float32"
        raise ValueError(f"{problem} under {given[:300]}; temperature 0 is greedy")
    if temperature == 0:
        ids = np.array([scores.argmax()], np.int32)  # the lowest id on ties
        return ids, scores[ids]
    ids = np.arange(scores.size, dtype=np.int32)
    for name, keep in FILTERS.items():
        if settings[name] and settings[name] != ALL.get(name):
            kept = keep(scores, settings[name])
            ids, scores = ids[kept], scores[kept]
    return ids, scores


def generators(seed: int | Sequence[int] | None, rows: int) -> list[np.random.Generator]:
    """Return a generator for each row, seeded with (seed, row); row 0 gets seed itself."""
    return [generator(seed, row) for row in range(rows)]


def generator(seed: int | Sequence[int] | None, row: int) -> np.random.Generator:
    """Return the generator of one row, see generators."""
    if seed is None:
        return np.random.default_rng()
    parts = [*seed] if isinstance(seed, Sequence) else [seed]
    return np.random.default_rng([*parts, row] if row else parts)
