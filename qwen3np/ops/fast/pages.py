"""Hints to the system about the pages of mapped weights.

For arrays that are not part of a mapped file, and on platforms without madvise, these functions do nothing.
"""

from __future__ import annotations

import mmap
from typing import Any, cast

import numpy as np

from qwen3np.numerics import Array
from qwen3np.stored import parts

# Linux reads ahead only the first part of a longer stretch: as much as the disk takes in one request.
AHEAD = 1 << 19


def will_need(tensor: Array) -> None:
    """Start reading a tensor from its file, and nothing around it."""
    _advise(tensor, "MADV_WILLNEED", AHEAD)


def release(tensor: Array) -> None:
    """Release the memory of a tensor; it is read from its file again when it is next used."""
    _advise(tensor, "MADV_DONTNEED", tensor.nbytes + mmap.PAGESIZE)


def _advise(tensor: Array, advice: str, size: int) -> None:
    """Give this advice for the pages of a tensor, `size` bytes at a time. Parts with gaps share pages with others."""
    for part in parts(tensor):
        owner: Any = part if part.flags.c_contiguous else None
        while isinstance(owner, np.ndarray):
            owner = cast("Any", owner).base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        if isinstance(owner, mmap.mmap) and hasattr(mmap, advice):
            start = part.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
            end = start + part.nbytes
            for page in range(start - start % mmap.PAGESIZE, end, size - size % mmap.PAGESIZE):
                owner.madvise(getattr(mmap, advice), page, min(size, end - page))
