"""How much memory is free, and errors that state both sizes before anything too large is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]
LINE = 64  # bytes


def available_memory() -> int:
    """Return how many bytes of memory can be used without swapping, as the system estimates it; 0 if unknown.

    On Linux, the smaller of the machine's free memory and what the control groups of this process (a container, for
    example) allow.
    """
    meminfo, groups = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if meminfo.exists():
        own = ""
        with suppress(OSError):
            own = os.fsdecode(groups.read_bytes())  # a path
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return max(min([int(line.split()[1]) * 1024, *left_in_groups(own)]), 1)
    try:  # macOS and other Unix systems have no estimate of free memory: half of all memory counts as free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 0


def left_in_groups(own: str, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield how much each memory limit of a process leaves free. `own` is its /proc/PID/cgroup, of either version.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html. Pages of files do not count: the
    system reclaims them when it needs memory.
    """
    for line in own.splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, limit, usage, total = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, total = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = top / group.lstrip("/")
        for above in (folder, *folder.parents[: len(folder.parts) - len(top.parts)]):
            with suppress(OSError, ValueError, KeyError):  # not visible from inside a container; "max" means no limit
                left = int((above / limit).read_text("ascii")) - int((above / usage).read_text("ascii"))
                counts = dict(line.split() for line in (above / "memory.stat").read_text("ascii").splitlines())
                yield left + int(counts[f"{total}inactive_file"]) + int(counts[f"{total}active_file"])


def require_memory(size: int, what: str, way_out: str) -> None:
    """Raise ValueError if `what` takes more bytes than are free, provided that the system reports free memory."""
    free = available_memory()
    if 0 < free < size:
        raise ValueError(
            f"{what} would take {size / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB of memory is free; {way_out}"
        )


_FEWER = (
    "ask for fewer positions (max_new_tokens, --max-new-tokens) or sequences, "
    'or for a cache of half the size by numerics="bfloat16" (--numerics bfloat16)'
)


def require_cache(shape: tuple[int, ...], dtype: np.dtype[Any], *, in_memory: bool = True, taken: int = 0) -> None:
    """Raise ValueError for keys and values (L, B, K, T, Dh) with a size of 0 or an unsupported dtype.

    With in_memory, also if they need more memory than is free, not counting `taken` positions that already have it.
    """
    layers, batch_size, heads, length, head_dim = shape
    if dtype.name not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"KVCache: dtype {dtype} is not supported; supported: float32, bfloat16, float64")
    if batch_size < 1 or length < 1:
        raise ValueError(f"KVCache: batch_size {batch_size} and max_length {length} must be at least 1")
    if in_memory:
        size = 2 * layers * heads * head_dim * dtype.itemsize * (batch_size * length - taken)
        sequences = f"{batch_size} sequences of {length:,} positions" if batch_size > 1 else f"{length:,} positions"
        require_memory(size, f"cache: {sequences} in {dtype}", _FEWER)


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return an uninitialised array that starts at a cache line: a cast that writes across two takes twice as long."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def allocated(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return zeros. Raises ValueError if the system refuses the memory (Windows, or a limit on address space)."""
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:  # ValueError: larger than the address space
        raise ValueError(f"cache: {error}; {_FEWER}") from None


def grown(olds: tuple[Array, Array, Array], axes: tuple[int, int, int], used: int, length: int) -> list[Array]:
    """Return a cache's keys, values and ids, enlarged to `length` along their axes, with the first `used` positions.

    Raises ValueError if copying these positions needs more memory than is free.
    """
    require_cache((*olds[0].shape[:3], max(used, 1), olds[0].shape[4]), olds[0].dtype)
    news: list[Array] = []
    for old, axis in zip(olds, axes, strict=True):
        kept = (*(slice(None),) * axis, slice(used))
        news.append(allocated((*old.shape[:axis], length, *old.shape[axis + 1 :]), old.dtype))
        news[-1][kept] = old[kept]
    return news
