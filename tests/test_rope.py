"""The rotation, against complex numbers; its tables, against 50-digit arithmetic."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from drawing import SEEDS, draw_config, round_bfloat16
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.config import Yarn
from qwen3np.numerics import named
from qwen3np.qwen3 import rotate
from qwen3np.rope import attention_factor, inverse_frequencies, rotary_tables

FLOAT64 = named("float64")
POSITIONS = st.integers(0, 40_959)
ANGLE = 5e-11  # what rounding an angle of 40,959 radians to float64, more than once, can do: 1.3e-11 was measured
PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164")


def draw(seed):
    """Return a config and queries (1, heads, 1, Dh) in float64."""
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    return config, rng.standard_normal((1, 3, 1, config.head_dim))


def turned(config, x, position):
    return rotate(x, rotary_tables(config, np.array([[position]]), FLOAT64), FLOAT64)


def as_complex(x):
    """Lane i and lane i + Dh/2 as one complex number."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


@given(SEEDS, POSITIONS)
def test_turns_each_pair_of_the_two_halves_by_its_angle(seed, position):
    config, x = draw(seed)
    dh = config.head_dim
    speeds = np.array([config.rope_theta ** -(2 * i / dh) for i in range(dh // 2)])
    truth = as_complex(x) * np.exp(1j * position * speeds)
    np.testing.assert_allclose(as_complex(turned(config, x, position)), truth, rtol=0, atol=ANGLE)


@given(SEEDS)
def test_position_0_is_the_identity(seed):
    config, x = draw(seed)
    np.testing.assert_array_equal(turned(config, x, 0), x)


@given(SEEDS, POSITIONS)
def test_keeps_the_norm_of_every_pair(seed, position):
    config, x = draw(seed)
    np.testing.assert_allclose(np.abs(as_complex(turned(config, x, position))), np.abs(as_complex(x)), rtol=2e-15)


@given(SEEDS, st.integers(0, 20_000), st.integers(0, 20_000))
def test_two_turns_are_one_by_the_sum(seed, a, b):
    config, x = draw(seed)
    once = turned(config, x, a + b)
    np.testing.assert_allclose(turned(config, turned(config, x, a), b), once, rtol=0, atol=ANGLE)


@given(SEEDS, st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 20_000))
def test_a_product_depends_on_the_distance_alone(seed, a, b, shift):
    config, q = draw(seed)
    k = np.random.default_rng([seed, 1]).standard_normal(q.shape)
    here = np.sum(turned(config, q, a) * turned(config, k, b), -1)
    there = np.sum(turned(config, q, a + shift) * turned(config, k, b + shift), -1)
    np.testing.assert_allclose(there, here, rtol=0, atol=ANGLE)


@given(SEEDS)
def test_every_sequence_and_position_has_its_own_angle(seed):
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    positions = rng.integers(0, 1000, (2, 5))
    x = rng.standard_normal((2, 3, 5, config.head_dim))
    y = rotate(x, rotary_tables(config, positions, FLOAT64), FLOAT64)
    for b, s in np.ndindex(2, 5):
        alone = turned(config, x[None, b, :, s, None], positions[b, s])
        np.testing.assert_array_equal(y[b, :, s], alone[0, :, 0])


def sine(angle: Decimal) -> Decimal:
    """Return sin to 40 digits and more, by its power series."""
    angle = angle % (2 * PI)
    term, total, n = angle, angle, 1
    while abs(term) > Decimal("1e-45"):
        term *= -angle * angle / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


SIZES = pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (128, 5e6), (128, 1e7), (64, 1e4), (6, 123456.0)])
SOME = np.array([0, 1, 2, 3, 255, 256, 257, 511, 4095, 32767, 40959])


def tables_by_hand(head_dim, theta, rounded):
    """Return inverse frequencies, cos and sin at SOME positions; after each step `rounded` (Decimal -> number)."""
    with localcontext() as context:
        context.prec = 60

        def step(value):
            return Decimal(float(rounded(value)))

        frequencies = [step(1 / step(Decimal(theta) ** step(Decimal(2 * i) / head_dim))) for i in range(head_dim // 2)]
        angles = [[step(int(position) * f) for f in frequencies] for position in SOME]
        cos = [[rounded(sine(angle + PI / 2)) for angle in row] for row in angles]
        sin = [[rounded(sine(angle)) for angle in row] for row in angles]
    return [rounded(f) for f in frequencies], np.array(cos), np.array(sin)


@SIZES
def test_float32_tables_are_the_correctly_rounded_steps(config, head_dim, theta):
    config = replace(config, head_dim=head_dim, rope_theta=theta)
    frequencies, cos, sin = tables_by_hand(head_dim, theta, lambda value: np.float32(float(value)))
    np.testing.assert_array_equal(inverse_frequencies(config), frequencies)
    for name, rounded in (("float32", lambda x: x), ("bfloat16", round_bfloat16)):
        tables = rotary_tables(config, SOME[None], named(name))
        for table, truth in zip(tables, (cos, sin), strict=True):
            assert table.dtype == np.float32
            assert table.shape == (1, 1, len(SOME), head_dim // 2)
            np.testing.assert_array_equal(table[0, 0], rounded(truth))


@SIZES
def test_float64_tables_are_right_to_the_rounding_of_the_angle(config, head_dim, theta):
    config = replace(config, head_dim=head_dim, rope_theta=theta)
    frequencies, cos, sin = tables_by_hand(head_dim, theta, lambda value: value)
    frequencies = np.array(frequencies, np.float64)
    assert inverse_frequencies(config, FLOAT64).dtype == np.float64
    np.testing.assert_allclose(inverse_frequencies(config, FLOAT64), frequencies, rtol=1e-15)
    for table, truth in zip(rotary_tables(config, SOME[None], FLOAT64), (cos, sin), strict=True):
        assert table.dtype == np.float64
        error = np.abs(table[0, 0] - truth.astype(np.float64))
        assert np.all(error <= 2**-52 * (1 + 2 * SOME[:, None] * frequencies))


def test_yarn_of_the_released_models(config):
    """The published values for theta 1e6, heads of 128 and 32,768 positions, extended four times."""
    plain = replace(config, head_dim=128, rope_theta=1e6, max_position_embeddings=32768)
    ratios = inverse_frequencies(plain.extended(4), FLOAT64) / inverse_frequencies(plain, FLOAT64)
    expected = {0: 1, 23: 1, 24: 0.955882, 31: 0.647059, 39: 0.294118, 40: 0.25, 63: 0.25}
    np.testing.assert_allclose(ratios[list(expected)], list(expected.values()), rtol=0, atol=5e-7)
    assert attention_factor(plain.extended(4)) == pytest.approx(1.1386294, abs=5e-8)
    assert attention_factor(plain) == 1
    for numerics in ("float32", "float64", "bfloat16"):
        cos, _ = rotary_tables(plain.extended(4), np.zeros((1, 1), int), named(numerics))
        assert cos.ravel() == pytest.approx(np.full(64, 1.1386294), rel=4e-3 if numerics == "bfloat16" else 1e-7)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [  # as the paper has it; the last two as transformers does
        ({}, 1.1386294),
        ({"attention_factor": 0.9}, 0.9),
        ({"mscale": 0.7, "mscale_all_dim": 1.1}, (1 + 0.07 * np.log(4)) / (1 + 0.11 * np.log(4))),
        ({"mscale": 0.7}, 1.1386294),
        ({"mscale_all_dim": 1.1}, 1.1386294),
    ],
)
def test_attention_factor(config, settings, factor):
    config = replace(config, rope_scaling=Yarn(4, 32, **settings))
    assert attention_factor(config) == pytest.approx(factor, rel=1e-7)
    cos, sin = rotary_tables(config, np.array([[1]]), FLOAT64)
    np.testing.assert_allclose(cos**2 + sin**2, factor**2, rtol=1e-7)


@given(SEEDS, st.floats(1, 16), st.booleans())
def test_yarn_slows_no_lane_more_than_factor_and_the_slow_ones_most(seed, factor, truncate):
    config, _ = draw(seed)
    yarn = Yarn(factor, 2048, truncate=truncate)
    plain = inverse_frequencies(config, FLOAT64)
    ratios = inverse_frequencies(replace(config, rope_scaling=yarn), FLOAT64) / plain
    assert np.all(np.diff(ratios) <= 1e-15)
    assert np.all((ratios >= (1 - 1e-15) / factor) & (ratios <= 1 + 1e-15))
    turns = 2048 * plain / (2 * np.pi)  # in the original context: from 32 on a lane stays, up to 1 it is slowed wholly
    if not truncate:
        np.testing.assert_allclose(ratios[turns >= 32], 1, rtol=1e-14)
        np.testing.assert_allclose(ratios[turns <= 1], 1 / factor, rtol=1e-14)


def test_yarn_of_a_context_in_which_no_lane_turns_once(config):
    """Both bounds of the ramp are lane 0: it stays, and all others are slowed wholly."""
    plain = inverse_frequencies(config, FLOAT64)
    ratios = inverse_frequencies(replace(config, rope_scaling=Yarn(4, 6)), FLOAT64) / plain
    np.testing.assert_allclose(ratios, [1, *[0.25] * (len(plain) - 1)], rtol=1e-15)


@given(SEEDS, POSITIONS)
def test_bfloat16_rounds_both_products_then_their_sum(seed, position):
    config, x = draw(seed)
    x = round_bfloat16(x)
    numerics = named("bfloat16")
    cos, sin = rotary_tables(config, np.array([[position]]), numerics)
    a, b = np.split(x, 2, axis=-1)
    r = round_bfloat16
    truth = r(np.concatenate([r(a * cos) + r(-b * sin), r(b * cos) + r(a * sin)], -1))
    np.testing.assert_array_equal(rotate(x, (cos, sin), numerics), truth)
