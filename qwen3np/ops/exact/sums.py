"""Products, sums and means, correctly rounded to float32.

A product of two float32 numbers has at most 48 bits and is exact in float64, so a dot product in float64 rounds only
where it adds, with a fused multiply-add or without. K terms added in any order are off by at most (K - 1) u times the
sum of their absolute values (Jeannerod and Rump, 2013, https://doi.org/10.1137/120894488), which is at most |x| |w|
(Cauchy and Schwarz). That holds for every BLAS that multiplies and adds in float64, but not for Strassen's algorithm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen3np.numerics import Array
from qwen3np.ops.exact.rounding import SLACK, U, nearest, nearest_sums, quiet

# Terms that are summed together where elements are open: they stay in the cache.
TOGETHER = 1 << 16


def product(x: Array, w: Array, then: Callable[[Array], Array] | None = None, out: Array | None = None) -> Array:
    """Return x wᵀ, rounded further by `then`. x (..., N, K), w (..., M, K), float64 -> (..., N, M) float32.

    x and w hold float32 numbers.
    """
    k = x.shape[-1]

    def finish(at: tuple[Array, ...]) -> Array:
        *batch, i, j = at
        step = max(TOGETHER // k, 1)
        found = np.empty(len(i), np.float32)
        for a in range(0, len(i), step):
            now = slice(a, a + step)
            rows, columns = ((*(n[now] for n in batch), last[now]) for last in (i, j))
            found[now] = nearest_sums(x[rows] * w[columns])
        return found

    with quiet():
        s = np.matmul(x, np.swapaxes(w, -1, -2))
        # (K - 1) u |x| |w| for the error, u |x| |w| for u |s|, and more than enough for u times the bound
        bound = ((k + 2) * U * SLACK * norms(x))[..., :, None] * norms(w)[..., None, :]
        return nearest(s, bound, finish, then, out)


def norms(x: Array) -> Array:
    """Return the Euclidean norm of each row, in float64. (..., K) -> (...)."""
    return np.sqrt(np.matmul(x[..., None, :], x[..., :, None])[..., 0, 0])


def total(x: Array) -> Array:
    """Return the sum over the last axis. float32 (..., N) -> (..., 1) float32."""
    terms = x.astype(np.float64)
    return _row_sums(terms, np.abs(terms).sum(axis=-1).ravel(), 1)


def mean_square(x: Array) -> Array:
    """Return the mean of the squares over the last axis, rounded once. float32 (..., N) -> (..., 1) float32."""
    squares = x.astype(np.float64)
    squares *= squares
    return _row_sums(squares, None, x.shape[-1])


def sum_of_positive(x: Array) -> Array:
    """Return total(x), faster, for an x without negative numbers."""
    return _row_sums(x, None, 1)


def _row_sums(terms: Array, absolute: Array | None, count: int) -> Array:
    """Return the sum of each row divided by count. terms (..., N) -> (..., 1).

    absolute: the sums of |terms|; None where no term is negative.
    """
    shape, n = (*terms.shape[:-1], 1), terms.shape[-1]
    terms = terms.reshape(-1, n)

    def finish(at: tuple[Array, ...]) -> Array:
        return nearest_sums(terms[at].astype(np.float64), count)

    with quiet():
        s = terms.sum(axis=1, dtype=np.float64)
        if count > 1:
            s /= count
        # (N - 1) u for the error, u for the division, u for u |s|, and more than enough for u times the bound
        bound = (n + 3) * U * SLACK / count * (s * count if absolute is None else absolute)
        return nearest(s, bound, finish).reshape(shape)
