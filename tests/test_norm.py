"""RMSNorm: its defining properties, and its formula in exactly rounded sums."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from drawing import SEEDS, round_bfloat16
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.numerics import named
from qwen3np.qwen3 import rms_norm

FLOAT64, BF16 = named("float64"), named("bfloat16")
SIZES = st.integers(1, 70)
NO_EPS = 1e-200


def draw(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, n)) * 10 ** rng.uniform(-3, 3, (2, 3, 1))
    return x, np.exp(rng.standard_normal(n)), rng


@given(SEEDS, SIZES, st.floats(1e-8, 1e-2))
def test_formula(seed, n, eps):
    x, weight, _ = draw(seed, n)
    for name, rtol in (("float64", 2e-15), ("float32", 1e-6)):
        numerics = named(name)
        rounded, w = x.astype(numerics.dtype), weight.astype(np.float32)
        y = rms_norm(rounded, w, eps, numerics)
        assert y.dtype == numerics.dtype
        for row, out in zip(rounded.reshape(-1, n).tolist(), y.reshape(-1, n), strict=True):
            scale = 1 / math.sqrt(math.fsum(value * value for value in row) / n + eps)
            np.testing.assert_allclose(out, [w * value * scale for w, value in zip(w.tolist(), row, strict=True)], rtol)


@given(SEEDS, SIZES, st.integers(-20, 20), st.floats(0.1, 10))
def test_scale_invariant_without_eps(seed, n, exponent, factor):
    x, weight, _ = draw(seed, n)
    y = rms_norm(x, weight, NO_EPS, FLOAT64)
    np.testing.assert_array_equal(rms_norm(x * 4.0**exponent, weight, NO_EPS, FLOAT64), y)  # a power of two is exact
    np.testing.assert_allclose(rms_norm(x * factor, weight, NO_EPS, FLOAT64), y, rtol=2e-15)


@given(SEEDS, SIZES)
def test_unit_rms_before_the_weight(seed, n):
    x, _, _ = draw(seed, n)
    y = rms_norm(x, np.ones(n), NO_EPS, FLOAT64)
    np.testing.assert_allclose(np.mean(y**2, -1), 1, rtol=2e-15)


def test_eps_keeps_a_vector_of_zeros():
    np.testing.assert_array_equal(
        rms_norm(np.zeros((1, 4), np.float32), np.ones(4, np.float32), 1e-6), np.zeros((1, 4))
    )


@given(SEEDS, SIZES)
def test_odd(seed, n):
    x, weight, _ = draw(seed, n)
    for numerics in (FLOAT64, BF16):
        rounded = numerics.round(x.astype(numerics.dtype))
        y = rms_norm(rounded, weight, 1e-6, numerics)
        np.testing.assert_array_equal(rms_norm(-rounded, weight, 1e-6, numerics), -y)


@given(SEEDS, SIZES)
def test_commutes_with_permutations(seed, n):
    x, weight, rng = draw(seed, n)
    p = rng.permutation(n)
    y = rms_norm(x, weight, 1e-6, FLOAT64)
    np.testing.assert_allclose(rms_norm(x[..., p], weight[p], 1e-6, FLOAT64), y[..., p], rtol=2e-15)


@given(SEEDS, SIZES)
def test_rows_are_normalised_alone(seed, n):
    x, weight, rng = draw(seed, n)
    y = rms_norm(x, weight, 1e-6, FLOAT64)
    changed = x.copy()
    changed[1, 2] = rng.standard_normal(n)
    np.testing.assert_array_equal(rms_norm(changed, weight, 1e-6, FLOAT64)[0], y[0])
    np.testing.assert_array_equal(rms_norm(changed, weight, 1e-6, FLOAT64)[1, :2], y[1, :2])


@given(SEEDS)
def test_bfloat16_rounds_before_and_after_the_weight(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, (3, 64)).astype(np.float32)  # the sums of whole squares are exact, in any order
    weight = np.exp(rng.standard_normal(64)).astype(np.float32)
    scale = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True))
    truth = round_bfloat16(round_bfloat16(weight) * round_bfloat16(x * scale))
    for stored in (weight, weight.astype(ml_dtypes.bfloat16)):
        np.testing.assert_array_equal(rms_norm(x, stored, 1e-30, BF16), truth)
