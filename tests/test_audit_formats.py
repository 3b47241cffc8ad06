"""Formats of weights that an engine may load, against ml_dtypes, the published values of NF4, and nearest codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qwen3np.audit.damage_kinds import quantised_matrix
from qwen3np.audit.formats import NF4, e4m3, nf4, squares_of_e4m3, with_zero_points


def test_e4m3_is_rounded_like_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    ties = (codes[1:] + codes[:-1]) / 2
    rng = np.random.default_rng(0)
    drawn = rng.choice([-1, 1], 10_000) * np.exp2(rng.uniform(-14, 8.8, 10_000))
    x = np.concatenate([codes, ties, np.nextafter(ties, np.float32(0)), drawn, [0]]).astype(np.float32)
    np.testing.assert_array_equal(e4m3(x), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_a_scale_for_each_square_is_what_qwen_releases_have():
    w = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32) ** 3
    np.testing.assert_array_equal(squares_of_e4m3(w), quantised_matrix(w, "fp8").astype(np.float32))


def test_nf4_has_the_published_values_and_takes_the_nearest():
    published = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    np.testing.assert_allclose(NF4, np.array(published.split(), float), atol=1e-7)
    w = np.random.default_rng(2).standard_normal((5, 160)).astype(np.float32)
    w[2] = 0
    for row, kept in zip(w, nf4(w), strict=True):
        for start in range(0, 160, 64):
            x, y = row[start : start + 64], kept[start : start + 64]
            codes = NF4 * np.abs(x).max()
            np.testing.assert_allclose(y, codes[np.abs(x[:, None] - codes).argmin(-1)], atol=1e-7)


@pytest.mark.parametrize(("size", "bits"), [(128, 4), (64, 4), (32, 8)])
def test_groups_with_zero_points_take_the_nearest_of_even_steps(size, bits):
    w = np.random.default_rng(3).standard_normal((6, 160)).astype(np.float32) + 0.7
    w[1] = 0
    kept = with_zero_points(size, bits)(w)
    for row, found in zip(w, kept, strict=True):
        for start in range(0, 160, size):
            x, y = row[start : start + size], found[start : start + size]
            step = np.float32(np.float16((max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1)))
            codes = np.unique(np.round(y / step) if step else y)
            assert len(codes) <= 2**bits
            np.testing.assert_allclose(y, np.round(y / (step or 1)) * step, atol=1e-6)
            assert np.abs(x - y).max() <= 1.01 * step
            assert np.median(np.abs(x - y)) <= 0.5 * step
