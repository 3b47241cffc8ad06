"""linear, against exactly rounded sums; storage and threads must not change its bits."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from drawing import SEEDS, linear, round_bfloat16
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from qwen3np.numerics import named

STORED = [np.float32, np.float16, ml_dtypes.bfloat16]


def exact(x, w, bias=None):
    """Return x Wᵀ + b, each element summed without any rounding but the last."""
    rows, w = x.reshape(-1, x.shape[-1]).astype(np.float64).tolist(), w.astype(np.float64).tolist()
    bias = [0.0] * len(w) if bias is None else bias.astype(np.float64).tolist()
    y = [
        [math.fsum([b, *(p * q for p, q in zip(row, out, strict=True))]) for out, b in zip(w, bias, strict=True)]
        for row in rows
    ]
    return np.reshape(y, (*x.shape[:-1], len(w)))


def unaligned(array, offset):
    """The same numbers, read-only and `offset` bytes behind the place a number of their dtype would start."""
    raw = bytes(offset) + array.tobytes()
    return np.frombuffer(raw, array.dtype, array.size, offset).reshape(array.shape)


@given(SEEDS, st.sampled_from(STORED), st.booleans())
def test_float64_and_float32_match_exact_sums(seed, stored, biased):
    rng = np.random.default_rng(seed)
    lead = rng.integers(1, 4, rng.integers(0, 4))  # no, one, two or three axes before the last
    inputs, outputs = rng.integers(1, 50, 2)
    x = rng.standard_normal((*lead, inputs)).astype(np.float32)
    w = rng.standard_normal((outputs, inputs)).astype(stored)
    bias = rng.standard_normal(outputs).astype(stored) if biased else None
    truth = exact(x, w, bias)
    scale = np.abs(x).sum(-1, keepdims=True, dtype=np.float64) * float(np.abs(w).max()) + 4
    for name in ("float64", "float32"):
        numerics = named(name)
        y = linear(numerics.widen(x), w, bias, numerics)
        assert y.dtype == numerics.dtype
        assert y.shape == (*lead, outputs)
        assert np.all(np.abs(y - truth) <= 4 * np.finfo(y.dtype).eps * scale)


@given(SEEDS, st.sampled_from([1, 2, 3, 40]), st.integers(1, 5))
def test_cutting_the_weights_changes_nothing_but_rounding(seed, rows, threads):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, 24)), rng.standard_normal((61, 24)).astype(ml_dtypes.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN3NP_NUM_THREADS", str(threads))
        patch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)
        for name in ("TILE_ROWS", "TILE_OUTPUTS", "NEAR"):
            patch.setattr(f"qwen3np.ops.fast.products.{name}", int(rng.integers(1, 70)))
        patch.setattr("qwen3np.ops.fast.products.BLOCK_ELEMENTS", 24 * int(rng.integers(1, 70)))
        y = linear(x, w, None, named("float64"))
    np.testing.assert_allclose(y, x @ w.astype(np.float64).T, rtol=0, atol=1e-13)


# (rows, in, out): one token, a few, many; the last two hold more than one block
SIZES = [(1, 40, 300), (7, 40, 300), (1, 512, 1100), (33, 512, 1100)]
SIZES += [(513, 24, 300), (1030, 24, 60)]
SIZES += [
    (rows, inputs, outputs) for rows in (1, 5) for inputs, outputs in ((40, 9), (40, 33), (1024, 513), (300, 257))
]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_bits_do_not_depend_on_how_the_weights_are_stored(rows, inputs, outputs, name):
    rng, numerics = np.random.default_rng(0), named(name)
    x = numerics.widen(rng.standard_normal((rows, inputs), np.float32))
    w = rng.standard_normal((outputs, inputs), np.float32).astype(ml_dtypes.bfloat16)
    y = linear(x, w, None, numerics)
    copy = w.astype(np.float32)
    for other in (
        copy,
        unaligned(w, 1),
        unaligned(copy, 4),
        unaligned(copy, 2),
        unaligned(copy, 1),
        np.asfortranarray(copy),
    ):
        np.testing.assert_array_equal(linear(x, other, None, numerics), y)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        *SIZES,
        (1, 1024, 3072),
        (1, 1024, 3073),
        (1, 2048, 1030),
        (64, 1024, 512),
        (513, 24, 300),
        (514, 24, 257),
        (1030, 24, 60),
    ],
)
def test_bits_do_not_depend_on_the_number_of_threads(rows, inputs, outputs, stored, monkeypatch):
    rng, numerics = np.random.default_rng(0), named("float64" if stored is np.float64 else "float32")
    x = rng.standard_normal((rows, inputs), np.float32).astype(numerics.dtype)
    w = rng.standard_normal((outputs, inputs), np.float32).astype(stored)
    results = []
    for threads, blas_threads in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (7, 1)):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", str(threads))
        with threadpool_limits(blas_threads):
            results.append(linear(x, w, None, numerics))
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


@pytest.mark.parametrize("outputs", [9, 513, 3073])
def test_bits_of_a_row_where_the_cuts_of_blas_would_show(outputs, monkeypatch):
    monkeypatch.setattr("qwen3np.ops.fast.products.cuts_keep_bits", lambda: False)
    monkeypatch.setattr("qwen3np.ops.fast.products._dot_products", None)  # BLAS would cut there by its own threads
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 1024), np.float32), rng.standard_normal((outputs, 1024)).astype(ml_dtypes.bfloat16)
    expected = linear(x, w)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
        np.testing.assert_array_equal(linear(x, w.astype(np.float32)), expected)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("outputs", [1, 5, 64, 65, 129, 257, 1030])
def test_few_rows_have_the_bits_of_each_alone(outputs, stored):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 300), np.float32), rng.standard_normal((outputs, 300), np.float32).astype(stored)
    alone = np.concatenate([linear(row[None], w) for row in x])
    for rows in range(2, 9):
        np.testing.assert_array_equal(linear(x[:rows], w), alone[:rows])


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 4, 5), (1, 4, 0), (3, 4, 0), (9, 4, 0), (0, 4, 0)])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_nothing_in_gives_nothing_out(rows, inputs, outputs, stored):
    y = linear(np.ones((rows, inputs), np.float32), np.ones((outputs, inputs), stored))
    assert (y.shape, y.dtype) == ((rows, outputs), np.float32)


@given(SEEDS, st.booleans())
def test_bfloat16_rounds_once_the_sum_with_its_bias(seed, biased):
    rng = np.random.default_rng(seed)
    # small whole numbers: every sum is exact, so the one rounding is all that can be seen
    x = rng.integers(-16, 17, (5, 30)).astype(np.float32)
    w = rng.integers(-16, 17, (11, 30)).astype(ml_dtypes.bfloat16)
    bias = rng.integers(-16, 17, 11).astype(ml_dtypes.bfloat16) if biased else None
    y = linear(x, w, bias, named("bfloat16"))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, round_bfloat16(exact(x, w, bias)))


def test_bfloat16_rounds_weights_that_are_stored_wider():
    w = np.array([[1.001, 1.0]], np.float32)
    y = linear(np.array([[256, -256]], np.float32), w, None, named("bfloat16"))
    np.testing.assert_array_equal(y, [[0]])
