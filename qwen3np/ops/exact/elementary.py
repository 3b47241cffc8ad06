"""exp, cos, sin and powers, correctly rounded to float32: from +, -, *, / and tables made here, without a libm.

exp is needed millions of times: its open elements are approximated again in two-term arithmetic. cos and sin leave one
element in ten million open, and powers are few: `decimal` settles those, with as many digits as it takes. It does take
a finite number, since no result is a tie: exp, cos and sin of a rational number other than 0 are transcendental
(Lindemann, 1882), and for powers see `power`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal, getcontext, localcontext
from fractions import Fraction
from functools import cache, partial

import numpy as np

from qwen3np.numerics import Array
from qwen3np.ops.exact.rounding import float32, nearest, nearest_pairs, quiet, two_product, two_sum

# Below the one and above the other, exp is 0 or infinite in float32; the table has STEPS entries per unit in between.
LOWEST, HIGHEST, STEPS = -104, 89, 256
# pi / 2 in three parts: two of 33 bits, whose products with whole numbers below 2^20 are exact, and the rest, rounded.
HALF_PI = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a6p-34"), float.fromhex("0x1.3198a2e037073p-69"))
# The largest |angle| for which that is enough.
LARGEST_ANGLE = 2.0**20


def exp(x: Array) -> Array:
    """Return the exponential, elementwise. float32 -> float32; 0 for -inf, inf for inf.

    x = k / 256 + r with a whole k and |r| <= 2^-9. Both are exact in float32: r is x itself or a multiple of the last
    bit of x. With t = e^(k/256) from a table, e^x = t (1 + r + r²/2 + r³/6 + r⁴/24 + ...). What is left out is below
    1.01 |r|⁵ / 120 < 2^-51.8. The rounding of t and the last addition contribute u each, all other roundings, which
    are scaled by |r|, 0.1 u. So the relative error is below 2^-51.8 + 2.1 u < 4.5 u, and 2^-50 = 8 u is a bound.
    """
    hi, _ = _exp_table()
    with quiet():
        x = np.clip(x, np.float32(LOWEST), np.float32(HIGHEST))
        k = np.rint(x * np.float32(STEPS))
        r = (x - k * np.float32(1 / STEPS)).astype(np.float64)
        k -= np.float32(LOWEST * STEPS)
        t = hi.take(k.astype(np.intp), mode="clip")  # for a NaN any entry will do: r is NaN
        s = r * (1 / 24)
        s += 1 / 6
        s *= r
        s += 1 / 2
        s *= r
        s += 1
        s *= r
        s *= t
        s += t
        return nearest(s, s * 2.0**-50, lambda at: _exp_again(x[at]))


def _exp_again(x: Array) -> Array:
    """Return the exponential of x (n,), numbers within the table's range or NaN, by two-term arithmetic.

    r has at most 24 bits, so r²/2 is exact, and 1 + r + r²/2 is the sum of three float64 numbers a + b + c, a the
    largest. The series from r³/6 to r⁸/8! is off by less than 4 u r³ / 6 + r⁹ / 9! < 2^-80. It is below 2^-29, as is
    all that is added to it, so each of the roundings after that, four at most, contributes less than 2^-81.5. The
    table's two terms are off by 2^-102. What the second of them would add beyond a is left out: less than 2^-82. So the
    relative error is below 2^-78.
    """
    k = np.rint(np.nan_to_num(x).astype(np.float64) * STEPS)
    r = x.astype(np.float64) - k / STEPS
    t_hi, t_lo = (table[k.astype(np.intp) - LOWEST * STEPS] for table in _exp_table())
    rest = np.full_like(r, 1 / math.factorial(8))
    for n in range(7, 2, -1):
        rest = rest * r + 1 / math.factorial(n)
    a, b = two_sum(np.ones_like(r), r)
    a, c = two_sum(a, r * r / 2)
    hi, lo = two_product(t_hi, a)
    hi, lo = two_sum(hi, lo + (t_hi * (b + c + r * r * r * rest) + t_lo * a))
    y, still_open = nearest_pairs(hi, lo, 2.0**-77 * hi)
    for n in np.flatnonzero(still_open & ~np.isnan(x)).tolist():
        y[n] = _settled(Decimal(float(x[n])).exp)
    return y


@cache
def _exp_table() -> tuple[Array, Array]:
    """Return e^(k/256) for each k of the table's range as two-term numbers: (n,) float64, and (n,) what they lack.

    The products e^i e^(j/256): each factor is off by 2^-106, the products by less than 2^-102.
    """

    def pairs(arguments: list[Decimal]) -> tuple[Array, Array]:
        with localcontext(Context(prec=50)):
            exact = [d.exp() for d in arguments]
            hi = [float(d) for d in exact]
            lo = [float(d - Decimal(h)) for d, h in zip(exact, hi, strict=True)]
        return np.array(hi), np.array(lo)

    whole_hi, whole_lo = (a[:, None] for a in pairs([Decimal(i) for i in range(LOWEST, HIGHEST + 1)]))
    part_hi, part_lo = pairs([Decimal(j) / STEPS for j in range(STEPS)])
    hi, lo = two_product(whole_hi, part_hi)
    hi, lo = two_sum(hi, lo + (whole_hi * part_lo + whole_lo * part_hi))
    return hi.reshape(-1), lo.reshape(-1)


def cos(x: Array) -> Array:
    """Return the cosine of angles in radians, elementwise. float32 -> float32; NaN for what is not finite."""
    return _sine(x, 1)


def sin(x: Array) -> Array:
    """Return the sine of angles in radians, elementwise. float32 -> float32; NaN for what is not finite."""
    return _sine(x, 0)


def _sine(x: Array, quarters: int) -> Array:
    """Return sin(x + quarters pi/2).

    r = x - n pi/2, with n the nearest whole number, is computed part by part (Cody and Waite, 1980). |n| < 2^20, so n
    times the first two parts of pi/2 is exact. x - n part_0 is exact: if n is not 0, both are multiples of 2^-32, and
    the difference is below 1. The error of subtracting n part_1 is kept. The rest is off by less than 2^-99: the error
    of part_2 and the roundings of n part_2 < 2^-48 and of its difference to what was kept. So r, rounded at the end, is
    off by less than u |r| + 2^-99, and no sine or cosine by more.

    The series end with r^17/17! and r^16/16!. For |r| < 0.786 what is left out is below 2^-58 of the result. The error
    of r and the last subtraction contribute u each; the roundings of the other terms, which are below 0.42 of the
    result, 1.3 u together. So the relative error is below 3.4 u: 2^-50 = 8 u is a bound, with 2^-94 where n is not 0.
    """
    small = np.abs(x) <= np.float32(LARGEST_ANGLE)  # not NaN either
    angles = np.where(small, x, 0).astype(np.float64)
    n = np.rint(angles * (2 / np.pi))
    r, rest = two_sum(angles - n * HALF_PI[0], -n * HALF_PI[1])
    r += rest - n * HALF_PI[2]
    square = r * r
    sine, cosine = np.full_like(r, 1 / math.factorial(17)), np.full_like(r, 1 / math.factorial(16))
    for m in range(15, 1, -2):  # r (1 - r²/3! + r⁴/5! - ...) and 1 - r²/2! + r⁴/4! - ..., from the end
        sine, cosine = 1 / math.factorial(m) - square * sine, 1 / math.factorial(m - 1) - square * cosine
    sine, cosine = r - r * square * sine, 1 - square * cosine
    turns = (n.astype(np.int64) + quarters) & 3
    s = np.where(turns & 1, cosine, sine)
    s = np.where(turns & 2, -s, s)

    def finish(at: tuple[Array, ...]) -> Array:
        found = [
            _settled(partial(_decimal_sine, Decimal(v), quarters)) if math.isfinite(v) else np.nan
            for v in x[at].tolist()
        ]
        return np.array(found, np.float32)

    bound = 2.0**-50 * np.abs(s) + (n != 0) * 2.0**-94
    with quiet():
        return nearest(s, np.where(small, bound, np.nan), finish)


def power(base: float | np.float32, exponents: Array) -> Array:
    """Return base^exponents, elementwise, for a float32 base above 0 and exponents in [0, 1). float32 -> float32.

    No power is a tie. With e = p / 2^k in lowest terms, base^e is rational only if base = c^(2^k) with a rational c.
    Then base^e = c^p, and p < 2^k: its odd part has no more bits than that of base, at most 24, where a tie has 25.
    """
    if not (0 < base < np.inf and np.all((exponents >= 0) & (exponents < 1))):
        raise ValueError(f"power: needs a positive base and exponents in [0, 1), got {base} and {exponents}")
    found = [_power(float(base), exponent) for exponent in exponents.ravel().tolist()]
    return np.array(found, np.float32).reshape(exponents.shape)


@cache
def _power(base: float, exponent: float) -> np.float32:
    return _settled(lambda: (Decimal(exponent) * Decimal(base).ln()).exp())


@cache
def log(x: float) -> float:
    """Return the natural logarithm of a positive number in float64, the same on every machine."""
    with localcontext(Context(prec=40)):
        return float(Decimal(x).ln())


def _decimal_sine(x: Decimal, quarters: int) -> Decimal:
    """Return sin(x + quarters pi/2) by its series, to the digits of the context. x: a float32 number."""
    with localcontext() as context:
        context.prec += 60  # |x| < 10^39 loses 39 digits in the reduction, and a small r another 20 at most
        half = _decimal_pi() / 2
        n = (x / half).to_integral_value()
        r, turns = x - n * half, (int(n) + quarters) & 3
        assert not n or abs(r) > Decimal("1e-20"), "no float32 number is nearer to a multiple of pi/2"
        term = total = Decimal(1) if turns & 1 else r
        m = 2 - (turns & 1)  # cos r = 1 - r²/(1 2) + ..., sin r = r - r³/(2 3) + ...
        while total + term != total or term == total:
            term *= -r * r / (m * (m + 1))
            total += term
            m += 2
    return -total if turns & 2 else +total


def _decimal_pi() -> Decimal:
    """Return pi to the digits of the context, within a few units of the last (Brent, 1976; Salamin, 1976)."""
    a, b, t, p = Decimal(1), 1 / Decimal(2).sqrt(), Decimal("0.25"), 1
    while a != b and abs(a - b) > Decimal(10) ** (3 - getcontext().prec):
        a, b, t, p = (a + b) / 2, (a * b).sqrt(), t - p * ((a - b) / 2) ** 2, 2 * p
    return (a + b) ** 2 / (4 * t)


def _settled(f: Callable[[], Decimal]) -> np.float32:
    """Return the float32 nearest to what f computes in `decimal` with a relative error below 10^(9 - digits)."""
    digits = 40
    while True:
        with localcontext(Context(prec=digits)):
            value, error = Fraction(f()), Fraction(10) ** (9 - digits)
        low, high = float32(value * (1 - error)), float32(value * (1 + error))
        if low == high:
            return low
        digits *= 2
