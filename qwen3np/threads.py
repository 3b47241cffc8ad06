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
    setting = os.environ.get("QWEN3NP_NUM_THREADS", "")
    if not setting:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"QWEN3NP_NUM_THREADS={setting!r} is not a whole number from 1")
    return int(setting)


def share(parts: Sequence[Part], work: int, task: Callable[[Part], None]) -> None:
    """Run task on every part, on all threads where the work (multiply-adds of all parts together) is worth it.

    A task that shares in turn runs its parts itself: the threads have their work already. After an error no further
    part begins, and the error comes out when those that had begun are done.
    """
    threads = min(num_threads(), len(parts)) if work >= WORTH_SHARING and not _here.sharing else 1
    left, lock = iter(parts), threading.Lock()

    def run() -> None:
        nonlocal left
        outside, _here.sharing = _here.sharing, _here.sharing or threads > 1
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
            _here.sharing = outside

    with one_blas_thread():
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
    """What this thread is doing: whether it runs a part, and how often it is inside one_blas_thread."""

    sharing = False
    inside = 0


_here = _Here()
_lock = threading.Lock()
_inside = 0  # the same, of all threads together
_before: list[int] = []


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Hold BLAS to one thread while any caller, in any thread, is inside; then give it back what it had."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = [library.get_num_threads() for library in _blas()]
        if _here.inside == 0:
            _set_blas_threads([1 for _ in _before])
        _inside += 1
        _here.inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            _here.inside -= 1
            if _inside == 0:
                _set_blas_threads(_before)


@contextmanager
def all_blas_threads() -> Generator[None]:
    """Give BLAS all threads for a product whose bits do not depend on it, unless other threads compute beside it."""
    with one_blas_thread():
        with _lock:
            if _inside == _here.inside and not _here.sharing:
                _set_blas_threads([num_threads() for _ in _before])
        try:
            yield
        finally:
            with _lock:
                _set_blas_threads([1 for _ in _before])


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
