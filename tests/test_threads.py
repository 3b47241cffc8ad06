"""BLAS is limited to one thread while our threads work, and gets its threads back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from qwen3np.ops.fast import threads
from qwen3np.ops.fast.threads import blas_threads, num_threads, rowwise, share, threads_for


def now():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


with threadpool_limits(2, user_api="blas"):
    two = now() == {2}
can_be_held = pytest.mark.skipif(not two, reason="NumPy's BLAS has one thread, or a fixed number")


def test_blas_is_held_to_one_thread_and_given_back():
    with threadpool_limits(2, user_api="blas"):
        before = now()
        with blas_threads():
            with blas_threads():
                assert now() <= {1}
            assert now() <= {1}  # until the last caller leaves
        assert now() == before
        inside = []
        share([0, 1, 2], 1 << 30, lambda part: inside.append((part, now() <= {1})))
        assert sorted(inside) == [(0, True), (1, True), (2, True)]
        assert now() == before


@pytest.mark.parametrize("threads", ["1", "5"])
def test_every_part_is_done_once_and_errors_come_out(threads, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
    done = []
    share(range(100), 1 << 30, done.append)
    assert sorted(done) == list(range(100))
    with pytest.raises(ZeroDivisionError):
        share(range(100), 1 << 30, lambda part: 1 // (part - 50))


def test_after_an_error_no_part_begins_and_those_that_had_begun_are_done(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    both, begun, events = threading.Barrier(2), [], []

    def task(part):
        begun.append(part)
        if part < 2:
            both.wait(5)
        if threading.current_thread() is threading.main_thread():
            raise ZeroDivisionError
        time.sleep(0.2)  # the main thread is out of its part, and waits
        events.append((part, now() <= {1}))

    with pytest.raises(ZeroDivisionError):
        share(range(10), 1 << 30, task)
    assert sorted(begun) == [0, 1]
    assert [held for _, held in events] == [True]


def test_after_an_error_in_another_thread_no_part_begins(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    both, failed, begun = threading.Barrier(2), threading.Event(), []

    def task(part):
        begun.append(part)
        if part < 2:
            both.wait(5)
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise ZeroDivisionError
        failed.wait(5)
        time.sleep(0.2)  # the other thread is out of its part

    with pytest.raises(ZeroDivisionError):
        share(range(10), 1 << 30, task)
    assert sorted(begun) == [0, 1]


def meet(_):
    """A task of two parts that ends only if two threads run them at once."""
    meet.barrier.wait(5)


def test_a_share_inside_a_share_runs_where_it_is(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "3")
    barrier, inside = threading.Barrier(3), []

    def outer(part):
        barrier.wait(5)  # three threads are at work
        here = threading.get_ident()
        share(range(4), 1 << 30, lambda inner: inside.append((part, inner, threading.get_ident() == here)))

    share(range(3), 1 << 30, outer)
    assert sorted(inside) == [(part, inner, True) for part in range(3) for inner in range(4)]


@pytest.mark.parametrize(("parts", "work"), [([0, 1], 1), ([0], 1 << 30)], ids=["too little work", "one part"])
def test_a_share_inside_one_that_is_not_worth_it_has_its_threads(parts, work, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    meet.barrier = threading.Barrier(2)
    share(parts, work, lambda _: share([0, 1], 1 << 30, meet))


def test_after_an_error_inside_there_are_threads_again(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    with pytest.raises(ZeroDivisionError):
        share([0, 1], 1 << 30, lambda part: share([0], 1 << 30, lambda _: 1 // 0))
    meet.barrier = threading.Barrier(2)
    share([0, 1], 1 << 30, meet)


def test_the_number_of_threads(monkeypatch):
    monkeypatch.delenv("QWEN3NP_NUM_THREADS", raising=False)
    assert num_threads() >= 1
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "3")
    assert num_threads() == 3
    for bad in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", bad)
        with pytest.raises(ValueError, match=f"QWEN3NP_NUM_THREADS='{bad}' is not a whole number from 1"):
            num_threads()


@can_be_held
def test_blas_gets_all_threads_only_where_nothing_computes_beside(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")

    def threads_of_a_product():
        with blas_threads(2):
            return now()

    with threadpool_limits(1, user_api="blas"):
        assert threads_of_a_product() == {2}
        assert now() == {1}
        with blas_threads():
            assert threads_of_a_product() == {2}
            assert now() == {1}
            other = threading.Thread(target=lambda: found.append(threads_of_a_product()))
            found = []
            other.start()
            other.join()
        share([0, 1], 1 << 30, lambda part: found.append(threads_of_a_product()))
        assert found == [{1}, {1}, {1}]
        with blas_threads(2):  # other holders rely on one thread in the meantime
            other = threading.Thread(target=lambda: share([0], 1, lambda part: found.append(now())))
            other.start()
            other.join()
        assert found[-1] == {1}


@can_be_held
@pytest.mark.parametrize(("held", "outside"), [(1, 2), (2, 1)])
def test_blas_stays_as_it_is_held_when_another_thread_leaves(held, outside):
    with threadpool_limits(outside, user_api="blas"):
        with blas_threads(held):
            other = threading.Thread(target=lambda: share([0], 1, lambda part: None))
            other.start()
            other.join()
            assert now() == {held}
        assert now() == {outside}


@can_be_held
def test_any_thread_may_set_blas_threads_afterwards():
    done, leave = threading.Event(), threading.Event()

    def once():
        share([0], 1, lambda part: None)
        done.set()
        leave.wait(5)

    with threadpool_limits(2, user_api="blas"):
        other = threading.Thread(target=once)
        other.start()
        done.wait(5)
        with threadpool_limits(1, user_api="blas"):  # while a thread lives that was inside
            assert now() == {1}
        leave.set()
        other.join()


def test_a_part_that_has_nothing_to_share_is_still_a_part(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    found = []

    def task(part):
        share([], 1 << 30, lambda part: None)
        found.append(threads_for(1 << 30))

    share([0, 1], 1 << 30, task)
    assert found == [1, 1]


@can_be_held
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_made_by_fork_begins_anew():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with blas_threads():
            inside.set()
            leave.wait(5)

    other = threading.Thread(target=hold)
    other.start()
    inside.wait(5)
    child = os.fork()
    if not child:  # where the other thread is not
        with blas_threads(2):
            os._exit(0 if now() == {2} else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    other.join()


def test_a_thread_that_outlives_the_main_thread_goes_on():
    code = """
import threading
from qwen3np.ops.fast.threads import share

def work():
    threading.main_thread().join()
    found = []
    share(range(4), 1 << 30, found.append)
    print(sorted(found))

threading.Thread(target=work).start()
"""
    environment = os.environ | {"QWEN3NP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3]\n", "")


def test_a_part_stays_at_one_blas_thread_after_a_share_of_its_own(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    both, found = threading.Barrier(2), []

    def task(part):
        both.wait(5)  # each thread has a part; with OpenMP each has its own number of BLAS threads
        share([0], 1, lambda part: None)
        found.append(now() <= {1})

    share([0, 1], 1 << 30, task)
    assert found == [True, True]


class CountsByThread:
    """A BLAS in which each thread has its own thread count, four at first, as in MKL."""

    def __init__(self, internal_api="mkl"):
        self.internal_api, self.own = internal_api, threading.local()

    def get_num_threads(self):
        return getattr(self.own, "number", 4)

    def set_num_threads(self, number):
        self.own.number = number


def test_a_blas_that_counts_by_thread_has_one_in_each_part(monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "3")
    library, all_three, found = CountsByThread(), threading.Barrier(3), []
    monkeypatch.setattr(threads, "_blas", lambda: [library])

    def task(part):
        all_three.wait(5)
        found.append(library.get_num_threads())

    share(range(3), 1 << 30, task)
    assert found == [1, 1, 1]
    assert library.get_num_threads() == 4


@pytest.mark.parametrize(("names", "expected"), [(["openblas"], True), (["openblas", "mkl"], False), ([], False)])
def test_only_openblas_is_known_to_keep_bits_where_it_cuts(names, expected, monkeypatch):
    monkeypatch.setattr(threads, "_blas", lambda: [CountsByThread(name) for name in names])
    assert threads.cuts_keep_bits.__wrapped__() is expected


@pytest.mark.parametrize("shape", [(7,), (1, 7), (40, 3), (2, 40, 3), (2, 3, 40, 5)])
def test_blocks_of_rows_are_put_together_again(shape, monkeypatch):
    monkeypatch.setattr("qwen3np.ops.fast.threads.IN_CACHE", 16)
    x = np.random.default_rng(0).standard_normal(shape)
    y = np.moveaxis(x[None] ** 2, 0, -1)[..., 0]
    np.testing.assert_array_equal(
        rowwise(lambda x, y: x * np.sum(y, -1, keepdims=True), x, y), x * y.sum(-1, keepdims=True)
    )
