"""The precisions, and how numbers get into them.

- float32: the everyday precision.
- float64: the truth to measure against; everything is computed in float64, from the upcast of the weights on.
- bfloat16: float32 arithmetic whose results are rounded to bfloat16 at the points where transformers' eager bfloat16
  rounds them. Between those points the values are bfloat16 numbers held in float32 arrays: ml_dtypes arrays have no
  matrix product of their own, and their sums and means lose what float32 keeps. The format: Kalamkar et al., 2019,
  https://arxiv.org/abs/1905.12322.
- bfloat16-grouped: the same, but for the sum over a token's experts. transformers' eager experts round after each
  addend, its grouped ones (`grouped_mm`, its default) once. Without experts it is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Record: TypeAlias = Callable[[str, Array], object]


def ignore(name: str, array: Array) -> None:
    """Record nothing: what layers are given when nobody asked for a trace."""


def position_axis(name: str) -> int:
    """Return which axis of a recorded point runs over the new positions."""
    return 2 if name.endswith(("_rope", ".scores", ".probs")) else 1


BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Numerics:
    """A precision: the dtype that arithmetic runs in, and the dtype that holds its results without loss."""

    name: str
    dtype: np.dtype[Any]
    storage: np.dtype[Any]
    rounds: bool = False  # whether results are rounded to bfloat16
    grouped: bool = False  # whether the sum over experts is rounded only once

    def round(self, x: Array) -> Array:
        """Return R(x): the nearest bfloat16 of each element, ties to even; x itself in the other precisions."""
        return x.astype(BFLOAT16).astype(self.dtype) if self.rounds else x

    def widen(self, x: Array) -> Array:
        """Return stored weights, keys or values, of any dtype, ready to compute with; x itself if it already is."""
        if self.rounds and x.dtype != BFLOAT16:
            return self.round(x)
        return x.astype(self.dtype, copy=False)


FLOAT32 = Numerics("float32", np.dtype(np.float32), np.dtype(np.float32))
FLOAT64 = Numerics("float64", np.dtype(np.float64), np.dtype(np.float64))
ROUNDED = Numerics("bfloat16", np.dtype(np.float32), BFLOAT16, rounds=True)
GROUPED = Numerics("bfloat16-grouped", np.dtype(np.float32), BFLOAT16, rounds=True, grouped=True)
PRECISIONS = {n.name: n for n in (FLOAT32, FLOAT64, ROUNDED, GROUPED)}


def precision(name: str) -> Numerics:
    """Return the precision of this name. Raises ValueError for an unknown one."""
    if name not in PRECISIONS:
        raise ValueError(f"numerics={name!r} is unknown; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis, in the dtype of x; -inf gives exactly 0.

    The largest element is subtracted first, which changes nothing but keeps exp from overflowing.
    """
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    e /= np.sum(e, axis=-1, keepdims=True)
    return e


def silu(x: Array) -> Array:
    """Return x * sigmoid(x) = x / (1 + exp(-x)), elementwise (Elfwing et al., 2017, https://arxiv.org/abs/1702.03118)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        e = np.exp(-x)
    e += 1
    return np.divide(x, e, out=e)
