"""The exact engine's operations, against fractions and decimal: each result is the nearest float32."""

from __future__ import annotations

import math
from decimal import Context, Decimal, getcontext, localcontext
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from drawing import round_bfloat16
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3np.numerics import named
from qwen3np.ops import exact
from qwen3np.ops.exact import elementary, rounding, sums

SEEDS = st.integers(0, 2**32 - 1)
# hypothesis prefers awkward ones: zeros of both signs, subnormals, the largest, one bit off a power of two
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = Fraction(float(np.finfo(np.float32).max))
PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651"
)


def nearest(value: Fraction) -> np.float32:
    """Return the nearest float32 of a fraction, ties to even, by comparing distances; a zero is +0."""
    if abs(value) >= LARGEST + Fraction(2) ** 103:
        return np.float32(math.copysign(math.inf, value))
    near = np.float32(float(min(max(value, -LARGEST), LARGEST)))
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    finite = [y for y in around if np.isfinite(y)]
    return min(finite, key=lambda y: (abs(Fraction(float(y)) - value), y.view(np.uint32) & 1)) + np.float32(0)


def nearest_decimal(value: Decimal) -> np.float32:
    """Return the nearest float32 of a number that is not a tie."""
    return nearest(Fraction(value))


def fractions(x: np.ndarray) -> list[Fraction]:
    return [Fraction(v) for v in x.astype(np.float64).tolist()]


def same(y: Any, truth: Any) -> None:
    """Compare bits: +0 is not -0, but a NaN is a NaN."""
    y, truth = np.asarray(y, np.float32), np.asarray(truth, np.float32)
    np.testing.assert_array_equal(y, truth)
    np.testing.assert_array_equal(np.signbit(y)[~np.isnan(y)], np.signbit(truth)[~np.isnan(y)])


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return sums.product(x.astype(np.float64), w.astype(np.float64))


def dot(x: np.ndarray, w: np.ndarray) -> Fraction:
    return sum((a * b for a, b in zip(fractions(x), fractions(w), strict=True)), Fraction(0))


def midpoint(y: np.float32) -> Fraction:
    """Return the number halfway from y to the next larger one."""
    above = np.nextafter(y, np.float32(np.inf))
    return (Fraction(float(y)) + (Fraction(2) ** 128 if np.isinf(above) else Fraction(float(above)))) / 2


def hard_terms(rng: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray, Fraction]:
    """Draw x and w (k,) whose dot product lies at or next to the middle between two float32 numbers, and return it too.

    The middle is cut into pieces; pairs of large terms cancel; a term as small as float32 has it may tip the balance.
    """
    y = np.abs(rng.integers(0, 0x7F7FFFFF, dtype=np.uint32).view(np.float32))
    y = y if rng.integers(4) else np.uint32(rng.integers(0, 1 << 24)).view(np.float32)  # subnormal numbers
    step = np.spacing(y).astype(np.float64) / 2
    terms = [(float(y), 1.0)]
    if step >= 2.0**-149:
        terms.append((step, 1.0))
    else:  # half of the smallest subnormal
        terms.append((2.0**-100, step * 2.0**100))
    for _ in range(int(rng.integers(0, k // 2))):
        big, other = rng.standard_normal(2).astype(np.float32) * np.float32(2.0 ** rng.integers(-20, 60))
        terms += [(float(big), float(other)), (float(-big), float(other))]
    tip = [0.0, 1.0, -1.0][rng.integers(3)]
    terms.append((tip * 2.0 ** int(rng.integers(-149, -60)), 2.0 ** int(rng.integers(-149, -20))))
    terms += [(0.0, 1.0)] * max(k - len(terms), 0)
    if rng.integers(2):
        terms = [(-a, b) for a, b in terms]
    x, w = np.array(terms, np.float32)[rng.permutation(len(terms))].T
    return x, w, dot(x, w)


@given(SEEDS, st.integers(4, 40))
def test_products_next_to_the_middle_between_two_numbers(seed, k):
    x, w, exact_sum = hard_terms(np.random.default_rng(seed), k)
    same(product(x[None], w[None])[0, 0], nearest(exact_sum))


@given(
    st.integers(1, 12).flatmap(lambda k: st.lists(st.lists(NUMBERS, min_size=k, max_size=k), min_size=2, max_size=6))
)
@example([[1.0, 2.0**-24], [1.0, 1.0]])
@example([[1.0, 2.0**-24, 2.0**-149], [1.0, 1.0, -(2.0**-149)]])
@example([[2.0**127, 2.0**127], [2.0, -2.0]])
@example([[-0.0, -0.0], [1.0, 1.0]])
@example([[-(2.0**-149)], [2.0**-149]])
@example([[3.4028234663852886e38, 1.0], [1.0, 2.0**103]])
def test_products_of_awkward_numbers(rows):
    x = np.array(rows, np.float32)
    same(product(x, x[::-1]), [[nearest(dot(a, b)) for b in x[::-1]] for a in x])


@given(SEEDS, st.integers(1, 300))
def test_products_as_a_model_has_them(seed, k):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((2, 5, k)) * 2.0 ** rng.integers(-30, 30, (2, 5, 1))).astype(np.float32)
    same(product(x, w), [[nearest(dot(a, b)) for b in w] for a in x])


@given(SEEDS, st.integers(1, 200))
def test_neither_zeros_nor_the_order_change_a_bit(seed, k):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((2, 6, k)).astype(np.float32)
    order, where = rng.permutation(k), np.sort(rng.integers(0, k + 1, 7))
    padded = np.insert(x, where, 0, axis=1), np.insert(w, where, rng.choice([-0.0, 1e30, 5.0]), axis=1)
    truth = product(x, w)
    same(product(x[:, order], w[:, order]), truth)
    same(product(*padded), truth)
    same(product(-padded[0], -padded[1]), truth)


@given(SEEDS, st.integers(1, 60))
def test_the_error_of_the_first_stage_is_within_its_bound(seed, k):
    rng, seen = np.random.default_rng(seed), []

    def spy(s, bound, finish, then=None, out=None):
        seen.append((s, np.broadcast_to(bound, s.shape)))
        return np.zeros(s.shape, np.float32)

    spread = 2.0 ** rng.integers(-12, 12, (4, k))
    x, w = rng.standard_normal((2, 4, k)).astype(np.float32) * spread.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "nearest", spy)
        product(x, w), exact.total(x), exact.mean_square(x)
    truths = [
        [[dot(a, b) for b in w] for a in x],
        [sum(fractions(a)) for a in x],
        [dot(a, a) / k for a in x],
    ]
    for (s, bound), truth in zip(seen, truths, strict=True):
        for value, allowed, v in zip(s.ravel().tolist(), bound.ravel().tolist(), np.ravel(truth), strict=True):
            rounding_s = Fraction(2) ** -53 * (abs(Fraction(value)) + Fraction(allowed))
            assert abs(Fraction(value) - v) + rounding_s <= allowed


@given(SEEDS, st.integers(2, 40))
def test_sums_next_to_the_middle_between_two_numbers(seed, k):
    x, w, _ = hard_terms(np.random.default_rng(seed), k)
    terms = (x * w)[np.isfinite(x * w)]  # rounded: other numbers, still in pairs that cancel
    same(exact.total(terms), [nearest(sum(fractions(terms)))])
    same(exact.total(np.stack([terms, -terms])), [[nearest(sum(fractions(t)))] for t in (terms, -terms)])


@given(st.lists(NUMBERS, min_size=1, max_size=30))
@example([1.0, 2.0**-24, 2.0**-149])
@example([-0.0])
@example([3.4028234663852886e38, 3.4028234663852886e38])
@example([2.0**-75, 2.0**-75, 0.0, 0.0])
def test_sums_and_means_of_awkward_numbers(numbers):
    x = np.array(numbers, np.float32)
    same(exact.total(x), [nearest(sum(fractions(x)))])
    same(exact.mean_square(x), [nearest(dot(x, x) / len(x))])


@given(SEEDS, st.integers(1, 70))
def test_means_that_are_ties(seed, k):
    rng = np.random.default_rng(seed)
    x = rng.integers(4096, 5792, k).astype(np.float32)  # squares in [2^24, 2^25], where float32 is even
    found = rng.integers(0, k)
    for _ in range(20):  # until the mean is an odd number, a tie
        x[found] += 1
        if dot(x, x) % (2 * k) == k:
            break
    same(exact.mean_square(x), [nearest(dot(x, x) / k)])


@given(SEEDS, st.integers(1, 300), st.integers(1, 300))
def test_many_terms_next_to_a_tie(seed, k, count):
    """All bits of float64 in use, a sum that needs many more, a divisor, and a tie that tiny terms tip, or do not."""
    rng = np.random.default_rng(seed)
    terms = ((rng.random(k) + 0.5) * 2.0 ** rng.integers(-3, 3, k)).tolist()
    total = sum(map(Fraction, terms))
    tie = midpoint(np.float32(float(total / count))) * count
    rest = tie - total
    while rest:  # in as many float64 numbers as it takes
        terms.append(float(rest))
        rest -= Fraction(terms[-1])
    terms += [2.0**-100, -(2.0**-100), 2.0**-280, -(2.0**-280)] * int(rng.integers(2))
    terms.append([0.0, 2.0**-90, 2.0**-298, np.spacing(float(tie))][rng.integers(4)] * int(rng.choice([-1, 1])))
    row = np.array([terms])[:, rng.permutation(len(terms))]
    same(rounding.nearest_sums(row, count), [nearest(sum(map(Fraction, terms)) / count)])


@given(SEEDS, st.integers(4, 40))
def test_products_that_are_rounded_further(seed, k):
    """Next to the middle between two bfloat16 numbers, float32 may round to the middle: bfloat16 then goes to even."""
    rng, bfloat16 = np.random.default_rng(seed), named("bfloat16")
    x, w, _ = hard_terms(rng, k)
    y = bfloat16.round(rng.standard_normal(1).astype(np.float32))
    half = np.copysign(np.ldexp(1.0, np.frexp(y[0])[1] - 9), y[0])  # of a step from y to the next bfloat16
    x[:3], x[3:], w[:3] = [y[0], half, 2.0**-60 * rng.integers(-1, 2)], 0, 1
    truth = round_bfloat16(np.array([nearest(dot(x, w))]))
    same(sums.product(x[None].astype(np.float64), w[None].astype(np.float64), bfloat16.round)[0], truth)


def test_what_is_not_finite():
    inf, nan, big = np.inf, np.nan, 3e38
    x = np.array([[inf, 1], [inf, 0], [nan, 1], [-inf, 1], [big, big], [0, 1]], np.float32)
    w = np.array([[1, 1], [0, 1], [big, -inf], [-0.0, -0.0]], np.float32)
    truth = [
        [inf, nan, nan, nan],
        [inf, nan, nan, nan],
        [nan, nan, nan, nan],
        [-inf, nan, -inf, nan],
        [inf, big, -inf, 0],
        [1, 1, -inf, 0],
    ]
    same(product(x, w), truth)
    same(
        exact.total(np.array([[inf, -inf], [inf, 1], [nan, 0], [-inf, big]], np.float32)), [[nan], [inf], [nan], [-inf]]
    )
    same(exact.mean_square(np.array([[inf, 1], [nan, 1], [big, 0]], np.float32)), [[inf], [nan], [inf]])
    same(elementary.exp(np.array([inf, -inf, nan, -0.0], np.float32)), [inf, 0, nan, 1])
    for f in (exact.cos, exact.sin):
        same(f(np.array([inf, -inf, nan], np.float32)), [nan, nan, nan])
    same(
        exact.softmax(np.array([[-inf, 0, -inf], [-inf] * 3, [0, nan, 1]], np.float32)),
        [[0, 1, 0], [nan] * 3, [nan] * 3],
    )
    same(exact.silu(np.array([-big, big, -0.0, nan], np.float32)), [-0.0, big, -0.0, nan])


@given(SEEDS)
def test_two_terms_hold_a_sum_and_a_product_without_error(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 50)) * 2.0 ** rng.integers(-200, 200, (2, 50))
    for f, truth in ((rounding.two_sum, Fraction.__add__), (rounding.two_product, Fraction.__mul__)):
        for p, error, v in zip(*f(a, b), map(truth, map(Fraction, a.tolist()), map(Fraction, b.tolist())), strict=True):
            assert Fraction(p.item()) + Fraction(error.item()) == v


@given(SEEDS)
def test_pairs_are_rounded_once(seed):
    rng = np.random.default_rng(seed)
    hi = np.array([float(midpoint(y)) for y in rng.integers(0, 0x7F7FFFFF, 40, np.uint32).view(np.float32)])
    hi = np.nextafter(hi, hi * rng.integers(0, 3, 40))  # a middle, or one of its neighbours
    lo = np.spacing(hi) * rng.choice([0, 2.0**-30, -(2.0**-30), 0.5, -0.25], 40)
    for bound in (0.0, 2.0**-70):
        y, still_open = rounding.nearest_pairs(*rounding.two_sum(hi, lo), np.abs(hi) * bound)
        truth = [nearest(Fraction(a) + Fraction(b)) for a, b in zip(hi.tolist(), lo.tolist(), strict=True)]
        same(y[~still_open], np.array(truth)[~still_open])
        assert bound or not still_open.any()


def in_digits(f: Any, x: np.ndarray, digits: int = 40) -> np.ndarray:
    """Return the nearest float32 of f(Decimal) for each x."""
    with localcontext(Context(prec=digits)):
        return np.array([nearest_decimal(f(Decimal(v))) for v in x.astype(np.float64).tolist()], np.float32)


def every(start: float, count: int) -> np.ndarray:
    """Return `count` float32 numbers in a row, away from 0."""
    return (np.float32(start).view(np.uint32) + np.arange(count, dtype=np.uint32)).view(np.float32)


@pytest.mark.parametrize(
    "start",
    [1e-45, -1e-45, 2.0**-26, -(2.0**-25), -(2.0**-21), 2.0**-9, -0.7, 1.0, -3.0, 20.0, -87.33, 88.72, -103.0, -103.97],
)
def test_exp_of_every_number_in_a_row(start):
    x = every(start, 1500)
    same(elementary.exp(x), in_digits(Decimal.exp, x))


@given(SEEDS)
def test_exp(seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(-105, 90, 60), rng.choice([-1, 1], 40) * 2.0 ** rng.uniform(-30, 6, 40)])
    x = x.astype(np.float32)
    same(elementary.exp(x), in_digits(Decimal.exp, x))
    x = np.clip(x, -104, 89)
    with rounding.quiet():
        same(elementary._exp_again(x), in_digits(Decimal.exp, x))


def test_exp_next_to_ties():
    """Next to 1 every other number x makes 1 + x a tie, and x² / 2 alone decides."""
    x = np.arange(-3001, 3001, 2).astype(np.float32) * np.float32(2.0**-25)
    same(elementary.exp(x), in_digits(Decimal.exp, x))


def decimal_sine(x: Decimal, quarters: int = 0) -> Decimal:
    """Return sin(x + quarters pi/2) from its series, for |x| below 10^40."""
    with localcontext(Context(prec=105)):
        r = x % (2 * PI) if abs(x) > 1 else x
        r += quarters * PI / 2
        total, term, n = Decimal(0), r, 1
        while abs(term) > Decimal(10) ** -100 * (abs(total) or 1) or n < 12:
            total += term
            term *= -r * r / ((n + 1) * (n + 2))
            n += 2
        return total


@given(SEEDS)
def test_cos_and_sin(seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate(
        [
            np.float32(rng.integers(0, 262144, 8)) * (1 / np.float32(1e6) ** np.float32(rng.uniform(0, 1, 8))),
            rng.uniform(-262144, 262144, 8),
            rng.choice([-1, 1], 8) * 2.0 ** rng.uniform(-149, 30, 8),
            float(PI) / 2 * rng.integers(0, 1 << 17, 8),  # next to zeros
            [0.0, -0.0],
        ]
    ).astype(np.float32)
    same(exact.sin(x), in_digits(decimal_sine, x))
    same(exact.cos(x), in_digits(partial(decimal_sine, quarters=1), x))
    with localcontext(Context(prec=40)):
        for v in x[:20].tolist():
            for quarters in (0, 1):
                truth = decimal_sine(Decimal(v), quarters)
                assert abs(elementary._decimal_sine(Decimal(v), quarters) - truth) <= abs(truth) * Decimal("1e-31")


def test_the_errors_of_the_elementary_functions_are_within_their_bounds():
    rng, seen = np.random.default_rng(0), []

    def spy(s, bound, finish):
        seen.append((s, np.broadcast_to(bound, s.shape)))
        return s

    angles = np.concatenate([rng.uniform(-300000, 300000, 300), rng.uniform(-1, 1, 100)]).astype(np.float32)
    exponents = rng.uniform(-103, 88, 400).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementary, "nearest", spy)
        exact.sin(angles), exact.cos(angles), elementary.exp(exponents)
    functions = [(decimal_sine, angles), (partial(decimal_sine, quarters=1), angles), (Decimal.exp, exponents)]
    for (s, bound), (f, x) in zip(seen, functions, strict=True):
        with localcontext(Context(prec=60)):
            for value, allowed, v in zip(s.tolist(), bound.tolist(), x.tolist(), strict=True):
                assert abs(Decimal(value) - f(Decimal(v))) + Decimal(2) ** -53 * Decimal(abs(value)) < Decimal(allowed)


def test_the_error_of_two_terms_is_within_its_bound(monkeypatch):
    rng, seen = np.random.default_rng(0), []

    def spy(*pair):
        seen.append(pair)
        return pair[0].astype(np.float32), np.zeros(len(pair[0]), np.bool_)

    monkeypatch.setattr(elementary, "nearest_pairs", spy)
    tiny = 2.0 ** rng.uniform(-60, -20, 100)
    x = np.concatenate([rng.uniform(-103, 88, 300), rng.uniform(-0.1, 0.1, 100), tiny]).astype(np.float32)
    elementary._exp_again(x)
    with localcontext(Context(prec=60)):
        for hi, lo, bound, v in zip(*(a.tolist() for a in (*seen[0], x)), strict=True):
            assert abs(Decimal(hi) + Decimal(lo) - Decimal(v).exp()) + Decimal(abs(lo)) / 2**53 <= Decimal(bound)


@given(st.floats(1.5, 1e8, width=32), SEEDS)
@example(1e6, 0)
@example(65536.0, 0)
def test_power(base, seed):
    exponents = np.concatenate([np.arange(16) / 16, np.random.default_rng(seed).random(8)]).astype(np.float32)
    exponents = exponents[exponents < 1]
    same(exact.power(np.float32(base), exponents), in_digits(lambda e: (e * Decimal(base).ln()).exp(), exponents))


def test_power_outside_its_domain():
    for base, exponent in ((0.0, 0.5), (-1.0, 0.5), (np.nan, 0.5), (2.0, 1.0), (2.0, -0.5)):
        with pytest.raises(ValueError, match="power: needs a positive base"):
            exact.power(np.float32(base), np.array([exponent], np.float32))


def test_log():
    for x in (1e6, 32.0, 1.0, 1e-3):
        assert exact.log(x) == float(Decimal(x).ln(Context(prec=60)))


@given(st.fractions(min_value=-(2**130), max_value=2**130))
def test_fractions_are_rounded_once(value):
    for v in (value, value * Fraction(2) ** -140, midpoint(np.float32(float(value / 8))) + value / 10**60):
        same(rounding.float32(v) + np.float32(0), nearest(v))


def test_more_digits_until_it_is_settled():
    digits = []

    def f() -> Decimal:
        digits.append(getcontext().prec)
        return 1 + Decimal(2) ** -24 + Decimal(10) ** -70  # next to a tie

    same(elementary._settled(f), 1 + np.float32(2.0**-23))
    assert digits == [40, 80]


@pytest.mark.oracle  # torch can set this
def test_a_process_that_flushes_subnormal_numbers_is_refused():
    torch = pytest.importorskip("torch")
    rounding.require_subnormals()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        with pytest.raises(ValueError, match="flushes subnormal numbers to zero"):
            exact.session()
    finally:
        torch.set_flush_denormal(False)
