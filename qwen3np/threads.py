"""Threads for the parts of a layer. How many there are never changes a bit of the result.

A BLAS with threads of its own cuts a product where its number of threads says, and some kernels round differently
beside a cut. So BLAS runs on one thread here, and the cuts are ours: the same whatever the number of threads. Only
where it cannot matter does BLAS use its threads, which begin sooner than Python's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np

from qwen3np.numerics import Array

Part = TypeVar("Part")

# Multiply-adds below which handing parts to other threads (about 0.1 ms) costs more than it saves.
WORTH_SHARING = 3 << 19

# Elements of a block of rows, which stays in the cache with what is computed from it on the way.
IN_CACHE = 1 << 18


def num_threads() -> int:
    """Return how many threads are used: QWEN3NP_NUM_THREADS, or the cores this process may run on.

    Raises ValueError where the variable is not a whole number from 1.
    """
    return _threads_of(os.environ.get("QWEN3NP_NUM_THREADS", ""))


@cache  # asked many times for each token
def _threads_of(setting: str) -> int:
    if not setting:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"QWEN3NP_NUM_THREADS={setting!r} is not a whole number from 1")
    return int(setting)


def threads_for(work: int) -> int:
    """Return how many threads it pays to use for this work (multiply-adds): one inside a part that is shared."""
    return num_threads() if work >= WORTH_SHARING and not _here.sharing else 1


def share(parts: Sequence[Part], work: int, task: Callable[[Part], None]) -> None:
    """Run task on every part, on all threads where the work (multiply-adds of all parts together) is worth it.

    A task that shares in turn runs its parts itself: the threads have their work already. After an error no further
    part begins, and the error comes out when those that had begun are done.
    """
    threads = min(threads_for(work), len(parts))
    if threads == 1:
        with blas_threads():
            for part in parts:
                task(part)
        return
    left, lock = iter(parts), threading.Lock()

    def run() -> None:
        nonlocal left
        _here.sharing = True
        try:
            while True:
                with lock:
                    part = next(left, None)
                if part is None:
                    return
                task(part)
        except BaseException:
            left = iter(())
            raise
        finally:
            _here.sharing = False

    with blas_threads():
        others = [_pool(os.getpid()).submit(run) for _ in range(threads - 1)]
        try:
            run()
        finally:
            wait(others)
        for other in others:
            other.result()


def in_blocks(f: Callable[..., Array], *arrays: Array) -> Array:
    """Return f(*arrays), computed block by block along the last axis but one, in the cache and over the threads.

    For an f that treats every row by itself. The result has shape and dtype of the first array.
    """
    x = arrays[0]
    if x.size < 2 * IN_CACHE or x.ndim == 1:
        return f(*arrays)
    y, step = np.empty_like(x), max(IN_CACHE * x.shape[-2] // x.size, 1)

    def apply(start: int) -> None:
        rows = slice(start, start + step)
        y[..., rows, :] = f(*(array[..., rows, :] for array in arrays))

    share(range(0, x.shape[-2], step), WORTH_SHARING, apply)
    return y


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a child made by fork has its own, since those of its parent are not in it."""
    return ThreadPoolExecutor(max_workers=max(64, os.cpu_count() or 1), thread_name_prefix=f"qwen3np-{process}")


class _Here(threading.local):
    """What this thread is doing: whether it runs a shared part, and what it holds BLAS to (0: nothing)."""

    sharing = False
    limit = 0


_here = _Here()
_lock = threading.Lock()
_inside = 0  # how many threads hold BLAS to something
_before: list[int] = []


@contextmanager
def blas_threads(limit: int = 1) -> Generator[None]:
    """Hold BLAS to this many threads, and give it back what it had in the end.

    More than one is for products whose bits do not depend on it, and is one while other threads are inside.
    """
    global _inside, _before
    outside = _here.limit
    if outside == limit:
        yield
        return

    def hold(limit: int) -> None:
        _here.limit = limit
        counts = _before if _inside == 0 else [limit if _inside == 1 and not _here.sharing else 1] * len(_before)
        _set_blas_threads(counts)

    with _lock:
        if _inside == 0:
            _before = [library.get_num_threads() for library in _blas()]
        _inside += outside == 0
        hold(limit)
    try:
        yield
    finally:
        with _lock:
            _inside -= outside == 0
            hold(outside)


def _set_blas_threads(counts: Sequence[int]) -> None:
    for library, count in zip(_blas(), counts, strict=True):
        # newer versions of threadpoolctl obey only the first thread that sets it; here a lock keeps order
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)
        library.set_num_threads(count)


@cache
def _blas() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return cast("list[Any]", ThreadpoolController().select(user_api="blas").lib_controllers)
