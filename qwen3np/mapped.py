"""Mapped weights: whether their files are still as they were, and what the system is told about their pages.

For arrays that are not part of a mapped file, and on systems that do not ask, these functions do nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from qwen3np.errors import CheckpointError
from qwen3np.numerics import Array

# Linux reads ahead only the first part of a longer stretch: as much as the disk takes in one request.
AHEAD = 1 << 19


class MappedWeights(dict[str, Array]):
    """Weights by name that are views of mapped files. A plain dict of them is not asked whether these have changed."""

    files: Mapping[Path, tuple[int, int, int]] = MappingProxyType({})  # what identity said when they were mapped


def identity(path: Path) -> tuple[int, int, int]:
    """Return what tells whether it is still the same file, unchanged: its number, size and time of change."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def require_unchanged(weights: Mapping[str, Array]) -> None:
    """Raise CheckpointError if a mapped file was written to or cut since: its weights are not those that were checked.

    A file that was put in the place of it, or deleted, does no harm: the old one stays mapped.
    """
    if isinstance(weights, MappedWeights):
        for path, (number, *before) in weights.files.items():
            try:
                now, *found = identity(path)
            except OSError:
                continue
            if now == number and found != before:
                raise CheckpointError(f"{path}: was changed after it was loaded; load it again")


def will_need(tensor: Array) -> None:
    """Let the system begin to read a tensor from its file, and nothing around it."""
    _advise(tensor, "MADV_WILLNEED", AHEAD)


def release(tensor: Array) -> None:
    """Let go of the memory of a tensor, which is read from its file again when it is next used."""
    _advise(tensor, "MADV_DONTNEED", tensor.nbytes + mmap.PAGESIZE)


def _advise(tensor: Array, advice: str, size: int) -> None:
    """Give this advice for the pages of a tensor, so many bytes at a time."""
    owner: Any = tensor
    while isinstance(owner, np.ndarray):
        owner = cast("Any", owner).base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, advice):
        start = tensor.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        end = start + tensor.nbytes
        for page in range(start - start % mmap.PAGESIZE, end, size - size % mmap.PAGESIZE):
            owner.madvise(getattr(mmap, advice), page, min(size, end - page))
