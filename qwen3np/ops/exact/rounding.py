"""Correct rounding: the float32 nearest to an exact result, and how to be sure of it.

Ziv's strategy (1991, https://doi.org/10.1145/114697.116813): approximate in float64 with a proven bound on the error;
where the bound leaves open which float32 is nearest, approximate again with twice the digits, all open elements
together; settle the rest in whole numbers. The nearest float32 depends on the exact result alone, so neither the order
of a sum nor a fused multiply-add nor a zero that a mask adds can change it.

Ties go to the even neighbour, as in IEEE 754. Results beyond the largest float32 are infinite. A zero is +0, even where
a tiny negative result rounds to it. A NaN is a NaN: its sign and payload mean nothing.

u = 2^-53 is half a unit in the last place of 1 in float64. TwoSum, TwoProduct and what is said of them: Muller et al.,
Handbook of Floating-Point Arithmetic, 2018, https://doi.org/10.1007/978-3-319-76526-6, chapters 4 and 5.

Flushing subnormal numbers to zero cannot matter in float64: float32 numbers other than 0 are multiples of 2^-149, so
their products, sums of products, and the terms of the series here stay above 2^-700, while the smallest normal float64
is 2^-1022. In float32 it would matter, so `require_subnormals` refuses to start on a thread that flushes; a new thread
inherits the setting of the one that starts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from qwen3np.numerics import Array

U = 2.0**-53
# Covers the rounding of a bound itself, which is computed with a relative error far below 1e-4.
SLACK = 1.0001


def quiet() -> np.errstate:
    """Return a context in which NumPy does not warn about infinite and NaN results: here they are results."""
    return np.errstate(over="ignore", invalid="ignore")


def nearest(
    s: Array,
    bound: Array,
    finish: Callable[[tuple[Array, ...]], Array],
    then: Callable[[Array], Array] | None = None,
    out: Array | None = None,
) -> Array:
    """Return the float32 nearest to the exact values that s (float64) approximates, rounded further by `then` if given.

    bound (broadcasts to s) is at least the error of s plus u (|s| + bound). The exact value then lies between the
    computed s - bound and s + bound, and since rounding is monotonic, it rounds as they do if both round alike. The
    other elements, and those that are not finite, are computed by finish(indices) -> (n,) float32.

    `then` (rounding to bfloat16) is monotonic, too. With it hardly any element stays open, not even a tie in float32.
    Call this inside `quiet`.
    """
    y, upper = np.empty(s.shape, np.float32) if out is None else out, np.empty(s.shape, np.float32)
    np.subtract(s, bound, out=y)
    np.add(s, bound, out=upper)
    if then:
        y[...], upper = then(y), then(upper)
    differs = y != upper
    if differs.any():
        still_open = np.unravel_index(np.flatnonzero(differs), s.shape)  # faster than nonzero
        found = finish(still_open)
        y[still_open] = then(found) if then else found
    y += 0  # -0 becomes +0
    return y


def nearest_sums(terms: Array, count: int = 1) -> Array:
    """Return the float32 nearest to the exact sum of each row, divided by count. terms (n, K) float64 -> (n,).

    The terms are float32 numbers or products of two. Each is cut in two without error (Rump, Ogita and Oishi, 2008,
    https://doi.org/10.1137/050645671): with sigma a power of two above (K + 2) max |term|, (term + sigma) - sigma is a
    multiple of u sigma, and what is left of the term is at most u sigma. The K high parts and all their partial sums
    are multiples of u sigma below sigma, so they are summed exactly, in any order. The sum of the low parts is off by
    at most K u times the sum of their absolute values (Jeannerod and Rump, 2013, https://doi.org/10.1137/120894488).

    The quotient hi / count may be rounded: a middle m between two float32 numbers has 25 bits, so m count is a float64
    for counts below 2^28, and its neighbours, divided by count, are more than half a unit away from m. So the quotient
    is m only if hi = m count, where lo decides, and is otherwise on the same side of m as the exact one.
    """
    k = terms.shape[1]
    largest = np.abs(terms).max(axis=1)
    sigma = np.ldexp(1.0, np.frexp(largest)[1] + (k + 1).bit_length())[:, None]
    high = terms + sigma
    high -= sigma
    low = terms - high
    hi, lo = two_sum(high.sum(axis=1), low.sum(axis=1))
    bound = (k + 2) * U * SLACK * np.abs(low).sum(axis=1)  # with u |lo|: |lo| is at most the sum of the low parts
    y, still_open = nearest_pairs(hi / count, lo / count, bound / count)
    finite = np.isfinite(largest)
    if not finite.all():  # infinite or NaN, whatever the order: no sum of finite terms overflows float64
        s = terms[~finite].sum(axis=1)
        y[~finite] = np.where(np.isnan(s), np.nan, s)
    for n in np.flatnonzero(still_open & finite).tolist():
        whole = sum(int(math.ldexp(term, 298)) for term in terms[n].tolist())  # terms are multiples of 2^-298
        y[n] = float32(Fraction(whole, count << 298))
    return y


def nearest_pairs(hi: Array, lo: Array, bound: Array) -> tuple[Array, Array]:
    """Return the float32 nearest to the exact values within bound of hi + lo, and which of them are still open.

    hi, lo (n,): float64 with hi = hi + lo rounded (or these, divided). bound: at least the error of hi + lo plus
    u |lo|, or 0 where hi + lo is exact. hi + lo ± bound is rounded to odd: unless it is a float64, to the one of its
    two neighbours whose last bit is 1. Rounding that to float32 gives what a single rounding would (Boldo and
    Melquiond, 2008, https://doi.org/10.1109/TC.2007.70819). Its neighbours are hi and the next number where bound is at
    most u |hi| / 4.
    """
    y, upper = (_to_odd(hi, t).astype(np.float32) for t in (lo - bound, lo + bound))
    return y, (y != upper) | ~(bound <= U / 4 * np.abs(hi))


def _to_odd(a: Array, t: Array) -> Array:
    """Return a + t rounded to odd, where a + t lies between a and its neighbour."""
    even = a.view(np.int64) & 1 == 0
    return np.where((t != 0) & even, np.nextafter(a, np.copysign(np.inf, t)), a)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded, and the error of that, which is a float64."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a b rounded, and the error of that, which is a float64. |a|, |b| < 2^996; a b is 0 or above 2^-900."""
    p = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2)


def _halves(a: Array) -> tuple[Array, Array]:
    """Cut float64 numbers into two of at most 26 bits (Veltkamp)."""
    c = a * (2.0**27 + 1)
    high = c - (c - a)
    return high, a - high


def float32(value: Fraction) -> np.float32:
    """Return the float32 nearest to a fraction, by way of the float64 that is rounded to odd."""
    f = float(value)  # correctly rounded
    rest = value - Fraction(f)
    if rest and not np.float64(f).view(np.int64) & 1:
        f = math.nextafter(f, math.inf if rest > 0 else -math.inf)
    with quiet():
        return np.float32(f)


def require_subnormals() -> None:
    """Raise ValueError if this process flushes subnormal numbers to zero."""
    if not np.full(1, 2.0**-149, np.float32) * np.float32(1):
        raise ValueError(
            "engine='exact': this process flushes subnormal numbers to zero, as libraries compiled with -ffast-math "
            "make it do; run it without that library"
        )
