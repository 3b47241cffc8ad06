"""What programs return instead of logits: log-probabilities, the likeliest ones with their ids, or only ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qwen3np.numerics import Array

LOGPROBS, TOP, IDS = "lm_head.logprobs", "lm_head.top_logprobs", "lm_head.top_ids"
CHOSEN = "lm_head.ids"
VIEWS = (LOGPROBS, TOP, IDS, CHOSEN)
NEAR_ONE = 0.02  # how far from 0 the logarithm of the sum of probabilities may be, in 16 bits


@dataclass(frozen=True)
class View:
    """Numbers made of a point: mine, and of(point) the reference's. size(point) is what distances are relative to."""

    note: str
    mine: Array
    of: Callable[[Array], Array]
    size: Callable[[Array], Array]
    is_last: bool = False
    precision: str = "float32"  # to which the digits of the logits belong, as far as can be seen
    fault: str = ""
    resolution: float = 0.0  # the relative distance that the printing of few digits may leave


def log_softmax(x: Array) -> Array:
    """Return the log-probabilities of logits, over the last axis, in float64."""
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def view_of(prefix: str, named: Mapping[str, Array], reference: Array, shape: tuple[int, ...]) -> View | None:
    """Return the view of a pass's logits in a dump; None if it has the logits themselves, or nothing.

    reference (B, S, V) are the logits of the recording, of the point's whole shape; a cut one has no view.
    """
    if reference.shape != shape:
        return None
    batch, new, count = shape
    x = named.get(f"{prefix}lm_head", named.get(f"{prefix}{LOGPROBS}"))
    if x is not None and x.dtype.kind == "f" and x.ndim and x.shape[-1] == count:
        rows = x.reshape(-1, count)
        if len(rows) in (batch * new, batch) and _sums_to_one(rows) and not _sums_to_one(reference.reshape(-1, count)):
            mine = rows.reshape(batch, -1, count)
            is_last = mine.shape[1] != new
            own = reference[:, -1:] if is_last else reference
            note = "log-probabilities"
            return View(note, mine, log_softmax, lambda y: y, is_last, _digits(mine, own, None))
    top, ids = named.get(f"{prefix}{TOP}"), named.get(f"{prefix}{IDS}")
    if top is not None and ids is not None and top.shape == ids.shape and top.ndim and ids.dtype.kind in "iu":
        k = top.shape[-1]
        if top.size // k in (batch * new, batch):
            mine, ids = top.reshape(batch, -1, k), ids.reshape(batch, -1, k).astype(np.int64)
            return _top(mine, ids, reference, new)
    ids = named.get(f"{prefix}{CHOSEN}", ids if top is None else None)
    if ids is None and x is not None and x.dtype.kind in "iu" and x.size in (batch * new, batch):
        ids = x
    if ids is not None and ids.dtype.kind in "iu" and ids.size in (batch * new, batch):
        return _ids(ids.reshape(batch, -1, 1).astype(np.int64), count, new)
    return None


def _sums_to_one(rows: Array) -> bool:
    rows = rows[np.isfinite(rows).all(-1)].astype(np.float64)
    if not len(rows) or (rows > NEAR_ONE).any():
        return False
    return bool((np.abs(np.log(np.exp(rows).sum(-1))) < NEAR_ONE).mean() > 0.9)


def _outside(ids: Array, count: int) -> str:
    wrong = (ids < 0) | (ids >= count)
    return f"{np.count_nonzero(wrong)} ids are outside of the vocabulary" if wrong.any() else ""


def _top(mine: Array, ids: Array, reference: Array, new: int) -> View:
    inside = np.clip(ids, 0, reference.shape[-1] - 1)

    def of(y: Array) -> Array:
        return np.take_along_axis(log_softmax(y), inside, -1)

    def size(y: Array) -> Array:
        y = y.astype(np.float64)
        return np.hypot(np.take_along_axis(y, inside, -1), np.sqrt(np.square(y).mean(-1, keepdims=True)))

    is_last = mine.shape[1] != new
    own = reference[:, -1:] if is_last else reference
    note = f"the {mine.shape[-1]} likeliest log-probabilities"
    return View(note, mine, of, size, is_last, _digits(mine, own, inside), _outside(ids, reference.shape[-1]))


def _ids(ids: Array, count: int, new: int) -> View:
    """Only ids: how far each is below the likeliest, which should be within rounding."""
    inside = np.clip(ids, 0, count - 1)

    def of(y: Array) -> Array:
        y = y.astype(np.float64)
        return y.max(-1, keepdims=True) - np.take_along_axis(y, inside, -1)

    def size(y: Array) -> Array:
        return np.sqrt(2 * np.square(y.astype(np.float64)).mean(-1, keepdims=True))

    note = "the chosen ids alone, which show few bugs"
    return View(note, np.zeros(ids.shape), of, size, ids.shape[1] != new, fault=_outside(ids, count))


def _digits(mine: Array, logits: Array, ids: Array | None) -> str:
    """Return the precision of the logits behind log-probabilities.

    Logits of one power of two are multiples of the last place of bfloat16 or float16, and so are their differences.
    """
    own = logits if ids is None else np.take_along_axis(logits, ids, -1)
    rows, values = mine.reshape(-1, mine.shape[-1]), own.reshape(-1, mine.shape[-1]).astype(np.float64)
    hits = {"bfloat16": 0, "float16": 0}
    total = 0
    for row, value in list(zip(rows, values, strict=True))[:64]:
        # 1 for numbers from 1 to 2, 2 for those from 2 to 4; negative for negative ones; 0 for those near 0
        power = np.floor(np.log2(np.maximum(2 * np.abs(value), 1))) * np.sign(value)
        usual, counts = np.unique(power[power != 0], return_counts=True)
        if not len(usual) or counts.max() < 3:
            continue
        chosen = row[power == usual[counts.argmax()]].astype(np.float64)[:64]
        place = 2.0 ** (abs(usual[counts.argmax()]) - 1)
        total += len(chosen) - 1
        for name, bits in (("bfloat16", 7), ("float16", 10)):
            steps = (chosen[1:] - chosen[0]) / (place * 2.0**-bits)
            hits[name] += int((np.abs(steps - np.round(steps)) < 0.05).sum())
    return next((name for name, hit in hits.items() if total >= 8 and hit > 0.8 * total), "float32")
