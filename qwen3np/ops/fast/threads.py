"""Threads for the parts of a layer. How many there are never changes a bit of the result.

A BLAS with threads of its own cuts a product where its number of threads says, and some kernels round differently
beside a cut. So BLAS runs on one thread here, and the cuts are ours: the same whatever the number of threads. Only
where it cannot matter does BLAS use its threads, which begin sooner than Python's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np

from qwen3np.numerics import Array

Part = TypeVar("Part")

# Threads that are used at most: an OpenBLAS of the usual builds has no more, and cuts elsewhere if asked for them.
MOST = 64
# Multiply-adds below which handing parts to other threads (about 0.1 ms) costs more than it saves.
WORTH_SHARING = 3 << 19
# What an element of a layer without products costs, in multiply-adds.
ELEMENT = 16
# Elements of a block of rows, which stays in the cache with what is computed from it on the way.
IN_CACHE = 1 << 18


def num_threads() -> int:
    """Return how many threads are used: QWEN3NP_NUM_THREADS, or the cores this process may run on; at most MOST.

    Raises ValueError where the variable is not a whole number from 1.
    """
    return _threads_of(os.environ.get("QWEN3NP_NUM_THREADS", ""))


@cache  # asked many times for each token
def _threads_of(setting: str) -> int:
    if not setting:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, MOST)
    check_threads(setting, "QWEN3NP_NUM_THREADS")
    return min(int(setting), MOST)


def check_threads(setting: str, name: str) -> None:
    """Raise ValueError unless this setting, of this name, is a whole number from 1."""
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"{name}={setting!r} is not a whole number from 1")


def threads_for(work: int) -> int:
    """Return how many threads it pays to use for this work (multiply-adds): one inside a part that is shared."""
    return num_threads() if work >= WORTH_SHARING and not _here.sharing else 1


def share(parts: Sequence[Part], work: int, task: Callable[[Part], None]) -> None:
    """Run task on every part, on all threads where the work (multiply-adds of all parts together) is worth it.

    A task that shares in turn runs its parts itself: the threads have their work already. After an error no further
    part begins, and the error comes out when those that had begun are done.
    """
    threads = min(threads_for(work), len(parts))
    if threads <= 1:
        with blas_threads():
            for part in parts:
                task(part)
        return
    left, lock = iter(parts), threading.Lock()

    def run() -> None:
        nonlocal left
        _here.sharing, held = True, _here.limit > 0
        try:
            while True:
                with lock:
                    part = next(left, None)
                if part is None:
                    return
                if not held:  # a thread of the pool: in MKL and with OpenMP each has a number of its own
                    for library in _blas():
                        _set_threads(library, 1)
                    held = True
                task(part)
        except BaseException:
            left = iter(())
            raise
        finally:
            _here.sharing = False

    with blas_threads():
        others: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # no more threads, or the main one has ended: this one does all
                for _ in range(threads - 1):
                    others.append(_pool(os.getpid()).submit(run))
            run()
        except BaseException:
            left = iter(())
            raise
        finally:
            wait(others)
        for other in others:
            other.result()


def rowwise(f: Callable[..., Array], *arrays: Array) -> Array:
    """Return f(*arrays), computed block by block along the last axis but one, in the cache and over the threads.

    For an f that treats every row by itself. The result has shape and dtype of the first array; the others have as
    many rows.
    """
    x = arrays[0]
    if x.size < 2 * IN_CACHE or x.ndim == 1 or x.shape[-2] == 1:
        return f(*arrays)
    y, step = np.empty_like(x), max(IN_CACHE * x.shape[-2] // x.size, 1)

    def apply(start: int) -> None:
        rows = slice(start, start + step)
        y[..., rows, :] = f(*(array[..., rows, :] for array in arrays))

    share(range(0, x.shape[-2], step), ELEMENT * x.size, apply)
    return y


def _keep_what_is_freed() -> None:
    """Let glibc keep up to 64 MB that is freed; it gives more back, and gets it anew page by page at the next call.

    It does so when a block of this size has come and gone (mallopt(3), M_MMAP_THRESHOLD), of which nothing is touched.
    A prompt of 512 tokens then takes a tenth less time: its arrays come back without 170,000 page faults.
    """
    np.empty((1 << 25) - (1 << 14), np.uint8)


_keep_what_is_freed()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a child made by fork has its own, since those of its parent are not in it."""
    return ThreadPoolExecutor(max_workers=MOST, thread_name_prefix=f"qwen3np-{process}")


class _Here(threading.local):
    """What this thread is doing: whether it runs a shared part, and what it holds BLAS to (0: nothing)."""

    sharing = False
    limit = 0


_here = _Here()
_lock = threading.Lock()
_held: dict[int, int] = {}  # a thread -> what it holds BLAS to
_before: list[int] = []


class blas_threads:  # a generator would take longer than a small product
    """Hold BLAS to `limit` threads, and give it back what it had when the last caller, in any thread, is done.

    More than one is for products whose bits do not depend on it; while several threads are inside, BLAS has one. (In
    MKL, and with OpenMP, each thread has a number of its own: one that leaves while others are inside keeps one.)
    """

    def __init__(self, limit: int = 1) -> None:
        """Take the limit; it holds from __enter__ to __exit__."""
        self.limit = limit

    def __enter__(self) -> None:
        """Begin to hold."""
        self.outside = _here.limit
        if self.limit != self.outside:
            try:
                _hold(self.limit)
            except BaseException:
                _hold(self.outside)
                raise

    def __exit__(self, *error: object) -> None:
        """Hold as before."""
        if self.limit != self.outside:
            _hold(self.outside)


def blas_limit() -> int:
    """Return what this thread holds BLAS to, 0 if to nothing."""
    return _here.limit


@cache
def cuts_keep_bits() -> bool:
    """Whether a matrix times one row has the same bits wherever BLAS cuts the matrix, by fours of its rows.

    OpenBLAS is so; BLIS and ATLAS are not, and of others it is not known.
    """
    return bool(_blas()) and all(library.internal_api == "openblas" for library in _blas())


def _hold(limit: int) -> None:
    """Let this thread hold BLAS to `limit` threads, or no longer (0)."""
    global _before
    with _lock:
        if not _held:
            _before = [library.get_num_threads() for library in _blas()]
        _here.limit = limit
        if limit:
            _held[threading.get_ident()] = 1 if _here.sharing else limit
        else:
            _held.pop(threading.get_ident(), None)
        alone = next(iter(_held.values())) if len(_held) == 1 else 1
        for library, before in zip(_blas(), _before, strict=True):
            _set_threads(library, alone if _held else before)


def _set_threads(library: Any, threads: int) -> None:
    """Let a BLAS have so many threads, if it has others."""
    if library.get_num_threads() != threads:
        _clear(library)
        library.set_num_threads(threads)
        _clear(library)


def _clear(library: Any) -> None:
    """Let any thread set the library: newer versions of threadpoolctl obey only the first one that does."""
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)


def _forget() -> None:
    """Begin anew in a child made by fork: the threads that were inside are not in it."""
    global _lock
    _lock = threading.Lock()
    _held.clear()
    _here.sharing, _here.limit = False, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@cache
def _blas() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return cast("list[Any]", ThreadpoolController().select(user_api="blas").lib_controllers)
