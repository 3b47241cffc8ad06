"""The benchmarks measure what they say: the same model on both sides, and a cache that is full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from naive import distance

from qwen3np.commands.bench import filled_cache, seconds


@pytest.mark.parametrize("tied", [True, False])
def test_the_naive_forward_is_the_same_model(config, tied):
    assert distance(replace(config, tie_word_embeddings=tied)) < 1e-5  # float32 rounding; measured: 8e-7


def test_filled_cache(config):
    cache = filled_cache(config, 7, 3)
    assert cache.lengths.tolist() == [7, 7, 7]
    assert cache.max_length == 8
    for array in (cache.k, cache.v):
        assert np.all(array[..., :7, :] != 0)
        assert not np.array_equal(array[:, :, 0], array[:, :, 1])


def test_seconds_leaves_out_the_first_call():
    calls: list[None] = []
    assert len(seconds(lambda: calls.append(None), most=4)) == 3
    assert len(calls) == 4
    assert len(seconds(lambda: calls.append(None), budget=0)) == 1
