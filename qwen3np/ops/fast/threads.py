"""Threads for the parts of a layer. Their number never changes a bit of the result.

A multithreaded BLAS splits a product according to its thread count, and some kernels round differently next to a cut.
So BLAS runs on one thread here and the cuts are ours, the same for any number of threads. BLAS uses its own threads,
which start faster than Python's, only where that cannot matter.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np

from qwen3np.numerics import Array

Part = TypeVar("Part")

# The most threads to use: the usual builds of OpenBLAS have no more, and cut elsewhere when asked for more.
MOST = 64
# Below this many multiply-adds, handing parts to other threads (about 0.1 ms) costs more than it saves.
WORTH_SHARING = 3 << 19
# The cost of an element in a layer without products, in multiply-adds.
ELEMENT = 16
# Elements in a block of rows: it stays in the cache together with its intermediate results.
IN_CACHE = 1 << 18


def num_threads() -> int:
    """Return the number of threads: QWEN3NP_NUM_THREADS, or the cores this process may run on; at most MOST.

    Raises ValueError where the variable is not a whole number from 1.
    """
    return _threads_of(os.environ.get("QWEN3NP_NUM_THREADS", ""))


@cache  # called many times for each token
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
    """Return how many threads pay off for this work (multiply-adds): one inside a part that runs in parallel."""
    return num_threads() if work >= WORTH_SHARING and not _here.sharing else 1


def share(parts: Sequence[Part], work: int, task: Callable[[Part], None]) -> None:
    """Run task on every part, on all threads if the work (multiply-adds of all parts together) is worth it.

    A task that calls this in turn runs its parts itself, since the threads are busy already. After an error no further
    part starts, and the error is raised once those that had started are done.
    """
    threads = min(threads_for(work), len(parts))
    if threads <= 1:
        with blas_threads():
            for part in parts:
                task(part)
        return
    left, errors = deque(parts), list[BaseException]()

    def run() -> None:
        _here.sharing = True
        try:
            if not _here.limit:  # a thread of the pool: with MKL and OpenMP each has its own setting
                for library in _blas():
                    _set_threads(library, 1)
            while left:
                try:
                    part = left.popleft()
                except IndexError:  # another thread took it
                    return
                task(part)
        except BaseException as error:
            left.clear()
            errors.append(error)
        finally:
            _here.sharing = False

    def help_out(end: threading.Lock) -> None:
        run()
        end.release()

    with blas_threads():
        ends: list[threading.Lock] = []  # a lock wakes this thread sooner than a future does
        try:
            with suppress(RuntimeError):  # no more threads, or the main one has ended: this thread does it all
                for _ in range(threads - 1):
                    end = threading.Lock()
                    end.acquire()
                    _pool(os.getpid()).submit(help_out, end)
                    ends.append(end)
            run()
        finally:
            left.clear()
            for end in ends:
                end.acquire()
    if errors:
        raise errors.pop()


def rowwise(f: Callable[..., Array], *arrays: Array) -> Array:
    """Return f(*arrays), computed block by block along the last axis but one, in the cache and over the threads.

    For an f that treats each row separately. The result has shape and dtype of the first array; the others have as
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
    """Let glibc keep up to 64 MB of freed memory; otherwise it returns it, and faults it in again at the next call.

    It starts to do so once a block of this size has been allocated and freed (mallopt(3), M_MMAP_THRESHOLD), untouched.
    A prompt of 512 tokens then takes a tenth less time, without its 170,000 page faults.
    """
    np.empty((1 << 25) - (1 << 14), np.uint8)


_keep_what_is_freed()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process. A forked child needs its own: it does not inherit the parent's threads."""
    return ThreadPoolExecutor(max_workers=MOST, thread_name_prefix=f"qwen3np-{process}")


class _Here(threading.local):
    """What this thread is doing: whether it runs a part for others, and its limit on BLAS threads (0: none)."""

    sharing = False
    limit = 0


_here = _Here()
_lock = threading.Lock()
_held: dict[int, int] = {}  # a thread -> its limit on BLAS threads
_before: list[int] = []


class blas_threads:  # a class: a generator would take longer than a small product
    """Limit BLAS to `limit` threads, and restore the previous setting once the last holder, in any thread, exits.

    More than one is for products whose bits do not depend on it; while several threads are inside, BLAS has one. (With
    MKL and OpenMP each thread has its own setting: one that leaves while others are inside keeps one thread.)
    """

    def __init__(self, limit: int = 1) -> None:
        """Take the limit; it applies from __enter__ to __exit__."""
        self.limit = limit

    def __enter__(self) -> None:
        """Set the limit."""
        self.outside = _here.limit
        if self.limit != self.outside:
            try:
                _hold(self.limit)
            except BaseException:
                _hold(self.outside)
                raise

    def __exit__(self, *error: object) -> None:
        """Restore the limit that this thread had before."""
        if self.limit != self.outside:
            _hold(self.outside)


def blas_limit() -> int:
    """Return this thread's limit on BLAS threads, 0 if it has none."""
    return _here.limit


@cache
def cuts_keep_bits() -> bool:
    """Whether a matrix-vector product has the same bits wherever BLAS cuts the matrix, at multiples of four rows.

    It does in OpenBLAS, it does not in BLIS and ATLAS; of others it is not known.
    """
    return bool(_blas()) and all(library.internal_api == "openblas" for library in _blas())


def _hold(limit: int) -> None:
    """Set this thread's limit on BLAS threads, or lift it (0)."""
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
    """Set the number of threads of a BLAS, if it has another."""
    if library.get_num_threads() != threads:
        _clear(library)
        library.set_num_threads(threads)
        _clear(library)


def _clear(library: Any) -> None:
    """Allow any thread to set the library: newer versions of threadpoolctl obey only the first one that does."""
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)


def _forget() -> None:
    """Reset in a forked child, which does not inherit the parent's threads."""
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
