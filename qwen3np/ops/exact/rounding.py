"""Correct rounding: the float32 nearest to an exact result, and how to be sure of it.

Ziv's strategy (1991, https://doi.org/10.1145/114697.116813): approximate in float64 with a proven bound on the error; where
the bound leaves open which float32 is nearest, approximate again with twice the digits, all open elements at once; what
is still open then is settled in whole numbers. The nearest float32 depends on the exact result alone, so neither the
order of a sum nor a fused multiply-add nor a zero that a mask adds can change it. Ties go to the even neighbour, as in
IEEE 754; results beyond the largest float32 are infinite; a zero is +0, also when a tiny negative result rounds to it; a
NaN is a NaN.

u = 2^-53 is half a unit in the last place of 1 in float64. Lemmas and names (TwoSum, TwoProduct): Muller et al., Handbook of
Floating-Point Arithmetic, 2018, https://doi.org/10.1007/978-3-319-76526-6, sections 4 and 5.

Flushing subnormal numbers to zero cannot matter in float64: finite nonzero float32 numbers lie between 2^-149 and 2^128, so
products of two, and sums of products, are multiples of 2^-298, while the smallest normal float64 is 2^-1022. In float32
it would matter, so `require_subnormals` refuses a thread that flushes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from qwen3np.numerics import Array

U = 2.0**-53
# Covers the rounding of a bound itself: it is computed with a relative error far below 1e-4.
SLACK = 1.0001
# Numbers that are settled together in the second stage: they stay in the cache.
TOGETHER = 1 << 16


def quiet() -> np.errstate:
    """Return a context in which NumPy does not warn of results that are infinite or NaN: they are results here."""
    return np.errstate(over="ignore", invalid="ignore")


def nearest(
    s: Array,
    bound: Array,
    finish: Callable[[tuple[Array, ...]], Array],
    then: Callable[[Array], Array] | None = None,
    out: Array | None = None,
) -> Array:
    """Return the float32 nearest to the exact values that s (float64) approximates, rounded further by `then` if given.

    bound (broadcasts to s) is at least the error of s plus u (|s| + bound): then the exact value lies between the
    computed s - bound and s + bound, and if both round to the same number, so does it, since rounding is monotonic.
    finish(indices) -> (n,) float32 is asked for the others, and for what is not finite: call it under `quiet`. `then` (to
    bfloat16) is monotonic, too: with it, hardly any element is left open, not even ties in float32.
    """
    y, upper = np.empty(s.shape, np.float32) if out is None else out, np.empty(s.shape, np.float32)
    np.subtract(s, bound, out=y)
    np.add(s, bound, out=upper)
    if then:
        y[...], upper = then(y), then(upper)
    differs = y != upper
    if differs.any():
        still_open = differs.nonzero()
        found = finish(still_open)
        y[still_open] = then(found) if then else found
    y += 0  # -0 becomes +0
    return y


def nearest_sums(terms: Array, count: int = 1) -> Array:
    """Return the float32 nearest to the exact sum of each row, divided by count. terms (n, K) float64 -> (n,).

    The terms are float32 numbers or products of two. Each is cut in two (Rump, Ogita and Oishi, 2008,
    https://doi.org/10.1137/050645671): sigma is a power of two above (K + 2) max |term|, so (term + sigma) - sigma is the part
    of a term that is a multiple of u sigma, and the rest, at most u sigma, is left without error. K high parts together
    stay below sigma: their sum is exact in any order. The sum of the rests is off by at most K u times their absolute
    sum (Jeannerod and Rump, 2013, https://doi.org/10.1137/120894488), about 2^-85 of the largest term.
    """
    k = terms.shape[1]
    largest = np.abs(terms).max(axis=1, initial=0)
    sigma = np.ldexp(1.0, np.frexp(largest)[1] + (k + 1).bit_length())[:, None]
    high = terms + sigma
    high -= sigma
    low = terms - high
    hi, lo = two_sum(high.sum(axis=1), low.sum(axis=1))
    bound = (k + 2) * U * SLACK * np.abs(low).sum(axis=1)  # |lo| <= sum |low|: with lo's own rounding
    if count > 1:
        hi, lo, bound = _divide(hi, lo, bound, count)
    y, still_open = nearest_pairs(hi, lo, bound)
    finite = np.isfinite(largest)
    if not finite.all():  # infinite or NaN in any order: no sum of float32 products overflows float64
        y[~finite] = np.where(np.isnan(terms[~finite].sum(axis=1)), np.nan, terms[~finite].sum(axis=1))
    for n in np.flatnonzero(still_open & finite).tolist():
        whole = sum(int(math.ldexp(term, 298)) for term in terms[n].tolist())  # terms are multiples of 2^-298
        y[n] = float32(Fraction(whole, count << 298))
    return y


def nearest_pairs(hi: Array, lo: Array, bound: Array) -> tuple[Array, Array]:
    """Return the float32 nearest to the exact values within bound of hi + lo, and where the bound leaves it open.

    hi, lo (n,): float64, hi = hi + lo rounded; bound: at least the error of hi + lo plus u |lo|, or 0 if there is none.
    hi + lo +- bound is rounded to odd: to the neighbour in float64 whose last bit is 1 unless it is exact. Another
    rounding, to float32, then gives what a single one would (Boldo and Melquiond, 2008,
    https://doi.org/10.1109/TC.2007.70819). That needs hi + lo +- bound to lie next to hi.
    """
    y, upper = (_to_odd(hi, t).astype(np.float32) for t in (lo - bound, lo + bound))
    return y, (y != upper) | ~(bound <= U / 4 * np.abs(hi))


def _to_odd(a: Array, t: Array) -> Array:
    """Return a + t rounded to odd, where a + t lies between a and its neighbour."""
    even = a.view(np.int64) & 1 == 0
    return np.where((t != 0) & even, np.nextafter(a, np.copysign(np.inf, t)), a)


def _divide(hi: Array, lo: Array, bound: Array, count: int) -> tuple[Array, Array, Array]:
    """Return (hi + lo) / count as such a pair, and its bound: the remainder of a division is a float64 number."""
    quotient = hi / count
    product, error = two_product(quotient, np.float64(count))
    rest = (((hi - product) - error) + lo) / count
    hi, lo = two_sum(quotient, rest)
    return hi, lo, bound / count * SLACK + 4 * U * np.abs(rest)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return s = a + b rounded, and s's error: their sum is a + b."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return p = a b rounded, and p's error: their sum is a b. |a|, |b| < 2^996, and a b is 0 or above 2^-900."""
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
    """Raise ValueError if this thread flushes subnormal numbers to zero."""
    if not np.full(1, 2.0**-149, np.float32) * np.float32(1):
        raise ValueError(
            "engine='exact': this process flushes subnormal numbers to zero (as libraries compiled with -ffast-math make "
            "it do), which changes results; start it without that library"
        )
