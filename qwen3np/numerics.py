"""Numerics: where numbers are rounded, and which engine computes them.

- float32: the everyday numerics.
- float64: the truth to measure against; everything is computed in float64, starting with the weights.
- bfloat16: float32 arithmetic whose results are rounded to bfloat16 wherever transformers' eager bfloat16 rounds them.
  In between, the values are bfloat16 numbers held in float32 arrays: ml_dtypes arrays have no matrix product of their
  own, and their sums and means lose what float32 keeps. The format: Kalamkar et al., 2019,
  https://arxiv.org/abs/1905.12322.
- bfloat16-grouped: the same, except for the sum over a token's experts: transformers' eager experts round after each
  addend, its grouped ones (`grouped_mm`, its default) once. Without experts it is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Trace: TypeAlias = Callable[[str, Array], object]  # is given the name and the array of each recorded point
Edit: TypeAlias = Callable[[str, Array], "Array | None"]  # ... and returns what replaces it; None: it stays

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Numerics:
    """The dtype that arithmetic runs in, the dtype that stores its results without loss, and the engine."""

    name: str
    dtype: np.dtype[Any]
    storage: np.dtype[Any]
    rounds: bool = False  # whether results are rounded to bfloat16
    grouped: bool = False  # whether the sum over experts is rounded only once
    engine: str = "plain"

    @cached_property
    def ops(self) -> Any:
        """The operations below the model, as this engine computes them: the module qwen3np.ops.<engine>."""
        return import_module(f"qwen3np.ops.{self.engine}")  # loaded on first use: most runs need one engine

    def round(self, x: Array) -> Array:
        """Return R(x): the nearest bfloat16 of each element, ties to even; x itself in the other numerics."""
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
NUMERICS = {n.name: n for n in (FLOAT32, FLOAT64, ROUNDED, GROUPED)}
ENGINES = ("fast", "plain", "exact")


@cache
def named(numerics: str, engine: str = "fast") -> Numerics:
    """Return the numerics of this name on this engine. Raises ValueError for unknown names, and for exact float64."""
    for key, name, known in (("numerics", numerics, tuple(NUMERICS)), ("engine", engine, ENGINES)):
        if name not in known:
            raise ValueError(f"{key}={name!r} is unknown; known: {', '.join(known)}")
    if (numerics, engine) == ("float64", "exact"):
        raise ValueError("numerics='float64' has no exact engine: choose float32 or bfloat16, or engine='plain'")
    return replace(NUMERICS[numerics], engine=engine)
