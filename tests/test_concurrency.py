"""Threads that generate from one model at once get what each gets alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

THREADS, EACH = 8, 25


def generations(model, thread):
    """Return the ids of all generations of one thread: greedy, sampled, ragged, with the cache of earlier ones."""
    draw, found, cache, ids = np.random.default_rng(thread), [], None, []

    def prompt(longest):
        return draw.integers(0, model.config.vocab_size, draw.integers(1, longest)).tolist()

    for n in range(EACH):
        count, sampled = int(draw.integers(1, 7)), {"temperature": 1.0, "top_k": 50, "seed": n} if n % 2 else {}
        options = {"max_new_tokens": count, "stop_ids": (), **sampled}
        if n % 5 == 0:
            new, _ = model.generate([prompt(9), prompt(40), prompt(3)], **options)
        elif n % 5 == 1:
            new = list(model.stream(prompt(200), **options))
        else:  # a conversation, which goes on or is edited
            ids = [*ids[: len(ids) - int(draw.integers(0, 3))], *prompt(9)]
            new, cache = model.generate(ids, cache=cache, **options)
            ids = [*ids, *new]
        found.append(new)
    return found


@pytest.fixture(scope="module")
def alone(builtin):
    found = [generations(builtin, thread) for thread in range(THREADS)]
    assert len({str(ids) for ids in found}) == THREADS
    return found


@pytest.mark.parametrize("inside", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_eight_threads_get_the_ids_of_runs_alone(builtin, alone, inside, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", inside)
    together = threading.Barrier(THREADS)

    def run(thread):
        together.wait(10)
        return generations(builtin, thread)

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(run, range(THREADS))) == alone
