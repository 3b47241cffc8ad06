"""Weights stored in fewer bits: an array-like object that represents exact float32 numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from qwen3np.numerics import Array

FLOAT: np.dtype[Any] = np.dtype(np.float32)
IN_CACHE = 1 << 18  # numbers that are decoded at a time: they stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """A matrix (out, in) of float32 numbers in a stored format, whose rows are decoded on demand.

    Slicing rows returns another such matrix; any other index returns a float32 ndarray.
    """

    shape: tuple[int, int]

    @property
    def format(self) -> str:
        """The name of the format."""
        return type(self).__name__

    @abstractmethod
    def _rows(self, which: slice | Array) -> Stored:
        """Return the matrix of these rows, a slice with step 1 or an array of row numbers, without decoding it."""

    @abstractmethod
    def _fill(self, out: Array) -> None:
        """Decode all numbers into out, a contiguous float32 array of the same shape."""

    def read(self, out: Array) -> None:
        """Decode all numbers into out, a contiguous array of floats of the same shape."""
        step = max(IN_CACHE // max(self.shape[1], 1), 1)
        for start in range(0, len(self), step):
            here, some = out[start : start + step], self._rows(slice(start, start + step))
            if out.dtype == FLOAT:
                some._fill(here)
            else:
                np.copyto(here, np.asarray(some))

    @property
    def parts(self) -> tuple[Array, ...]:
        """The arrays in the file that the matrix consists of."""
        found: list[Array] = []
        for value in vars(self).values():
            if isinstance(value, Stored) or (isinstance(value, np.ndarray) and value.ndim == 2):
                found += parts(value)
        return tuple(found)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the numbers."""
        return FLOAT

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return 2

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes that are stored, scales included."""
        return sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Return a lazy matrix for a slice of rows, a float32 array for any other index."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._rows(slice(start, max(start, stop)))
        elif not isinstance(index, tuple):
            ids = np.asarray(index)
            if ids.dtype.kind in "iu":
                if ids.size and not -len(self) <= int(ids.min()) <= int(ids.max()) < len(self):
                    raise IndexError(f"a row is out of range: the matrix has {len(self)} rows")
                return np.asarray(self._rows(ids.reshape(-1) % len(self))).reshape(*ids.shape, self.shape[1])
        return np.asarray(self)[index]

    def astype(self, dtype: DTypeLike, copy: bool = True) -> Array:
        """Return all numbers in this dtype; always a copy."""
        out = np.empty(self.shape, FLOAT)
        self.read(out)
        return out.astype(dtype, copy=False)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return all numbers, for NumPy's functions."""
        return self.astype(FLOAT if dtype is None else dtype)

    @property
    def T(self) -> Array:
        """All numbers, transposed."""
        return np.asarray(self).T


def kind(tensor: Array | Stored) -> str:
    """Return how a weight is stored, in a word or two: its dtype, or its format."""
    return tensor.format if isinstance(tensor, Stored) else str(tensor.dtype)


def put(tensor: Array | Stored, out: Array) -> None:
    """Copy or decode a weight into a contiguous array of floats of the same shape."""
    if isinstance(tensor, Stored):
        tensor.read(out)
    else:
        np.copyto(out, tensor)


def parts(tensor: Array | Stored) -> tuple[Array, ...]:
    """Return the arrays that a weight consists of: itself, or the parts of a stored format."""
    return tensor.parts if isinstance(tensor, Stored) else (tensor,)
