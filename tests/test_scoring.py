"""Scores, against one plain forward in float64, split into windows by hand."""

from __future__ import annotations

import numpy as np
import pytest
from drawing import draw_ids
from hypothesis import given
from hypothesis import strategies as st

from qwen3np import forward, score


def plain(weights, config, ids):
    """Return log p of each token after the first, from one forward, by the definition of softmax."""
    logits = forward(weights, config, ids, numerics="float64")[0, :-1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.log(p[np.arange(len(ids) - 1), ids[1:]])


@given(st.integers(2, 90), st.integers(3, 40), st.data())
def test_windows(weights, config, length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = draw_ids(np.random.default_rng(length), config, length)
    # a token is scored by the first window that reaches it
    expected, seen = [], 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        if end > seen:
            expected += plain(weights, config, ids[start:end])[seen - start - 1 :].tolist()
            seen = end
    got = score(weights, config, ids, window=window, stride=stride, numerics="float64")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)  # measured: 3e-14


@pytest.mark.parametrize("length", [2, 3, 200])
def test_a_text_that_fits_is_one_plain_forward(weights, config, length):
    ids = draw_ids(np.random.default_rng(0), config, length)
    counts = []
    got = score(weights, config, ids, progress=counts.append)
    np.testing.assert_allclose(got, plain(weights, config, ids), rtol=0, atol=1e-5)  # float32; measured: 3e-6
    assert sum(counts) == length - 1


def test_bad_input(weights, config):
    with pytest.raises(ValueError, match="at least two"):
        score(weights, config, [1])
    with pytest.raises(ValueError, match="must be a flat list of ids"):
        score(weights, config, [[1, 2]])
    for window, stride in ((8, 8), (8, 0), (1, 1), (257, 3)):
        with pytest.raises(ValueError, match="0 < stride < window"):
            score(weights, config, [1, 2, 3], window=window, stride=stride)
