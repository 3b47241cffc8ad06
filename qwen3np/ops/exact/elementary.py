"""exp, cos, sin and powers, correctly rounded to float32: from +, -, *, / and tables made here, with no libm.

Open elements of exp, which comes in millions, are approximated again in two-term arithmetic. cos and sin leave one of
thirty million open, and powers are few: those go to `decimal` at once, with ever more digits. None of them is a tie:
exp, cos and sin of a rational number other than 0 are transcendental (Lindemann), and a power with an exponent in
[0, 1) that has 25 bits has fewer (see `power`).
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

# Beyond these exp is 0 or infinite in float32, and the tables end.
LOWEST, HIGHEST, STEPS = -104, 89, 256
# The first bits of pi / 2, and the following ones: two parts of 33 bits, whose products with 20 bits are exact, and a rest.
HALF_PI = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a6p-34"), float.fromhex("0x1.3198a2e037073p-69"))
# |angles| up to which that is enough.
LARGEST_ANGLE = 2.0**20


def exp(x: Array) -> Array:
    """Return e^x, elementwise. float32 -> float32; exp(-inf) = 0, exp(inf) = inf.

    x = k / 256 + r with a whole k and |r| <= 2^-9: both are exact in float32, r because it is a multiple of x's last
    bit (or x itself). e^x = t (1 + r + r²/2 + r³/6 + r⁴/24) with t = e^(k/256) from a table. The series leaves out less than
    1.01 |r|⁵ / 120 <= 2^-51.8; t, rounded, is off by u, and so are at most five of the further roundings, the last
    ones, the others being scaled by |r|: in all less than 2^-51.8 + 7 u < 2^-49 of the result, with u (|s| + bound).
    """
    hi, _ = _exp_table()
    with quiet():
        x = np.clip(x, np.float32(LOWEST), np.float32(HIGHEST))
        k = np.rint(x * np.float32(STEPS))
        r = (x - k * np.float32(1 / STEPS)).astype(np.float64)
        k -= np.float32(LOWEST * STEPS)
        t = hi.take(k.astype(np.intp), mode="clip")  # for a NaN any entry: r is NaN
        s = r * (1 / 24)
        s += 1 / 6
        s *= r
        s += 1 / 2
        s *= r
        s += 1
        s *= r
        s *= t
        s += t
        return nearest(s, s * 2.0**-49, lambda at: _exp_again(x[at]))


def _exp_again(x: Array) -> Array:
    """Return e^x for x (n,) within the table's range, or NaN, from two-term arithmetic.

    r has at most 24 bits, so r² is exact, and so is 1 + r + r²/2 as an unevaluated sum of two float64 numbers and a
    small one. The series from r³/6 on, up to r⁸/8!, is off by less than 4 u r³/6 + r⁹/9! < 2^-80. With the table's two
    terms, off by 2^-103, and products whose smallest parts are rounded, the result is off by less than 2^-79.
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
        exact = Decimal(float(x[n]))
        y[n] = _settled(exact.exp)
    return y


@cache
def _exp_table() -> tuple[Array, Array]:
    """Return e^(k/256) for every k between the ends: twice (n,), float64 numbers and what they lack.

    As products e^i e^(j/256) of two-term numbers: each factor is off by 2^-106, the products by less than 2^-103.
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

    r = x - n pi/2 with the nearest whole n, in three steps (Cody and Waite, 1980). |n| < 2^20, so n times the first two
    parts of pi/2 is exact; x - n part_0 is exact: if n is not 0 both are multiples of 2^-33, and the difference is below 1.
    Subtracting n part_1 leaves an error that is kept; what follows is off by less than 2^-96: the fourth part of pi/2,
    and the rounding of n part_2 < 2^-48. So r, rounded once, is off by u |r| + 2^-95, and that is what its sine is off by,
    its cosine by less. On |r| < 0.786 the series end with r^17/17! and r^16/16!, leave out less than 2^-58, and their
    last three roundings count by u each, the others together by less: relative errors below 2^-50 with u (|s| + bound).
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

    No power is a tie: with e = p / 2^k in lowest terms, base^e is rational only if base = c^(2^k) for a rational c, and then
    its odd part, a p-th power, has no more bits than base's, a 2^k-th power: at most 24, where a tie has 25.
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
    """Return the natural logarithm of a positive number, the float64 nearest to it but for one case in 10^20."""
    with localcontext(Context(prec=40)):
        return float(Decimal(x).ln())


def _decimal_sine(x: Decimal, quarters: int) -> Decimal:
    """Return sin(x + quarters pi/2) by its series, to the digits of the context. x: a float32 number."""
    with localcontext() as context:
        context.prec += 60  # |x| < 10^39 loses 39 digits to the reduction, and comes no nearer than 10^-20 to n pi/2
        half = _decimal_pi() / 2
        n = (x / half).to_integral_value()
        r, turns = x - n * half, (int(n) + quarters) & 3
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
    """Return the float32 nearest to what f returns with a relative error below 10^(9 - digits) of the decimal context."""
    digits = 40
    while True:
        with localcontext(Context(prec=digits)):
            value, error = Fraction(f()), Fraction(10) ** (9 - digits)
        low, high = float32(value * (1 - error)), float32(value * (1 + error))
        if low == high:
            return low
        digits *= 2
