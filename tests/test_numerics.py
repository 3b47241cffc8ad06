"""Rounding to bfloat16, against integer arithmetic on the bits; softmax and SiLU, against exact sums."""

from __future__ import annotations

import math
import warnings

import ml_dtypes
import numpy as np
import pytest
from drawing import SEEDS, round_bfloat16
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.numerics import BFLOAT16, NUMERICS, named
from qwen3np.ops.plain import silu, softmax

BF16 = named("bfloat16")
FLOATS = st.floats(width=32, allow_nan=False)


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def test_rounding_keeps_every_bfloat16_number():
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    x = patterns.view(np.float32)
    with np.errstate(invalid="ignore"):  # some NaN are signalling ones
        rounded = BF16.round(x)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(rounded), np.isnan(x))
    np.testing.assert_array_equal(bits(rounded)[~np.isnan(x)], patterns[~np.isnan(x)])  # infinities and -0 too


@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_rounding_is_to_nearest_and_ties_go_to_even(sign):
    low = np.arange(0x7F80, dtype=np.uint32)  # every finite bfloat16 number, and the next one (infinity after the last)
    even = low + low % 2
    for tail, expected in ((0x7FFF, low), (0x8000, even), (0x8001, low + 1)):
        x = (low << 16 | tail | sign).view(np.float32)
        np.testing.assert_array_equal(bits(BF16.round(x)), expected << 16 | sign)
        np.testing.assert_array_equal(bits(BF16.round(x)), bits(x.astype(ml_dtypes.bfloat16)))
    # 0x8000 is the midpoint as a number too
    x = (low[:-1] << 16 | 0x8000 | sign).view(np.float32).astype(np.float64)
    below, above = ((n << 16 | sign).view(np.float32).astype(np.float64) for n in (low[:-1], low[:-1] + 1))
    np.testing.assert_array_equal(x - below, above - x)


@given(FLOATS, FLOATS)
def test_rounding_is_idempotent_monotonic_odd_and_near(a, b):
    x = np.array([min(a, b), max(a, b)], np.float32)
    y = BF16.round(x)
    np.testing.assert_array_equal(bits(y), bits(round_bfloat16(x)))
    np.testing.assert_array_equal(BF16.round(y), y)
    assert y[0] <= y[1]
    np.testing.assert_array_equal(bits(BF16.round(-x)), bits(-y))
    finite = np.isfinite(y) & (np.abs(x) >= np.finfo(np.float32).tiny)
    exact, rounded = x[finite].astype(np.float64), y[finite].astype(np.float64)
    assert np.all(np.abs(rounded - exact) <= np.abs(exact) * 2**-8)  # half of the last of eight bits


def test_only_bfloat16_rounds():
    x = np.array([1.0, 1.001, 1e-30], np.float32)
    assert named("float32").round(x) is x
    assert named("float64").round(x) is x


@pytest.mark.parametrize("name", NUMERICS)
@pytest.mark.parametrize("stored", [BFLOAT16, np.float16, np.float32, np.float64])
def test_widen_upcasts_exactly_and_rounds_in_bfloat16_alone(name, stored):
    x = np.array([1, 1 / 3, 1.00390625, -65504, 6e-8]).astype(stored)
    wide = named(name).widen(x)
    assert wide.dtype == (np.float64 if name == "float64" else np.float32)
    exact = x.astype(np.float64)
    if named(name).rounds:
        exact = round_bfloat16(exact.astype(np.float32))
    elif name == "float32":
        exact = exact.astype(np.float32)
    np.testing.assert_array_equal(wide, exact)
    if x.dtype == wide.dtype and not named(name).rounds:
        assert wide is x


def test_unknown_precision_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"numerics='fp8' is unknown; known: float32, float64, bfloat16"):
        named("fp8")


@given(SEEDS, st.integers(1, 50), st.floats(0.1, 200))
def test_softmax_matches_exact_sums(seed, n, spread):
    x = spread * np.random.default_rng(seed).standard_normal((3, n))
    for dtype in (np.float64, np.float32):
        rounded = x.astype(dtype)
        probs = softmax(rounded)
        assert probs.dtype == dtype
        rtol = np.finfo(dtype).eps * (8 + np.ptp(rounded))  # exp turns the rounding of x - max into a relative error
        for row, p in zip(rounded.astype(np.float64), probs, strict=True):
            exps = [math.exp(value - row.max()) for value in row]
            np.testing.assert_allclose(p, np.array(exps) / math.fsum(exps), rtol=rtol, atol=1e-37)


def test_softmax_of_infinities_and_of_the_largest_numbers():
    x = np.array([[-np.inf, 1e38, 1e38, -1e38], [-np.inf, -np.inf, -np.inf, -1e38]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(softmax(x), [[0, 0.5, 0.5, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-15), (np.float32, 5e-7)])
def test_silu_matches_the_formula(dtype, rtol):
    x = np.linspace(-80, 80, 997).astype(dtype)
    y = silu(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, [v / (1 + math.exp(-v)) for v in x.tolist()], rtol=rtol)


def test_silu_far_out_is_zero_or_x_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            silu(np.array([-1e30, -1000, 0, 1000, 2**99], np.float32)), [0, 0, 0, 1000, 2**99]
        )
