"""Functions of NumPy that the plain and the fast engine share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qwen3np.numerics import Array

log = math.log


def power(base: Any, exponents: Array) -> Array:
    """Return base ** exponents in their dtype; NumPy's float32 power is off by an ulp too often, float64's is not."""
    return np.power(base, exponents, dtype=np.float64).astype(exponents.dtype)


def cos(x: Array) -> Array:
    """Return the cosine in the dtype of x, through float64: a float32 result is nearly always the nearest one."""
    return np.cos(x, dtype=np.float64).astype(x.dtype)


def sin(x: Array) -> Array:
    """Return the sine, likewise."""
    return np.sin(x, dtype=np.float64).astype(x.dtype)


def total(x: Array) -> Array:
    """Return the sum over the last axis. (..., N) -> (..., 1)."""
    return np.add.reduce(x, axis=-1, keepdims=True)


def mean_square(x: Array) -> Array:
    """Return the mean of the squares over the last axis. (..., N) -> (..., 1)."""
    return total(x * x) / x.shape[-1]
