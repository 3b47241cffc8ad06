"""Threads for the parts of a layer. How many there are never changes a bit of the result.

A BLAS with threads of its own cuts a product where its number of threads says, and some kernels round differently
beside a cut. So BLAS runs on one thread here, and the cuts are ours: the same whatever the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

Part = TypeVar("Part")

# Multiply-adds below which handing parts to other threads (about 0.1 ms) costs more than it saves.
WORTH_SHARING = 1 << 20


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


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a child made by fork has its own, since those of its parent are not in it."""
    return ThreadPoolExecutor(max_workers=max(64, os.cpu_count() or 1), thread_name_prefix=f"qwen3np-{process}")


class _Here(threading.local):
    """What this thread is doing."""

    sharing = False


_here = _Here()
_lock = threading.Lock()
_holders = 0
_limit: Any = None


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Hold BLAS to one thread while any caller, in any thread, is inside; then give it back what it had."""
    global _holders, _limit
    with _lock:
        if _holders == 0:
            _limit = _blas().limit(limits=1, user_api="blas")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _limit.restore_original_limits()


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
