"""BLAS is held to one thread while parts are shared out, and gets its threads back."""

from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from qwen3np.threads import num_threads, one_blas_thread, share


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_is_held_to_one_thread_and_given_back():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with one_blas_thread():
            with one_blas_thread():
                assert blas_threads() <= {1}
            assert blas_threads() <= {1}  # until the last caller leaves
        assert blas_threads() == before
        inside = []
        share([0, 1, 2], 1 << 30, lambda part: inside.append((part, blas_threads() <= {1})))
        assert sorted(inside) == [(0, True), (1, True), (2, True)]
        assert blas_threads() == before


@pytest.mark.parametrize("threads", ["1", "5"])
def test_every_part_is_done_once_and_errors_come_out(threads, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
    done = []
    share(range(100), 1 << 30, done.append)
    assert sorted(done) == list(range(100))
    with pytest.raises(ZeroDivisionError):
        share(range(100), 1 << 30, lambda part: 1 // (part - 50))


def test_the_number_of_threads(monkeypatch):
    monkeypatch.delenv("QWEN3NP_NUM_THREADS", raising=False)
    assert num_threads() >= 1
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "3")
    assert num_threads() == 3
    for bad in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", bad)
        with pytest.raises(ValueError, match=f"QWEN3NP_NUM_THREADS='{bad}' is not a whole number from 1"):
            num_threads()
