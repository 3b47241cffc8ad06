"""The exact engine: each operation's result is the float32 nearest to the exact one.

So results have the same bits on every machine, with every BLAS, number of threads, batch, chunk size and cache.

    rounding.py      the nearest float32, from a bound on the error: float64, then two terms, then whole numbers
    sums.py          products, sums, means of squares
    elementary.py    exp, cos, sin, powers
    layers.py        the seam: softmax, silu, linear, head, attend
"""

from __future__ import annotations

from typing import Any

from qwen3np.ops.exact.elementary import cos, log, power, sin
from qwen3np.ops.exact.layers import attend, head, linear, silu, softmax
from qwen3np.ops.exact.rounding import require_subnormals
from qwen3np.ops.exact.sums import mean_square, total
from qwen3np.ops.fast.experts import combine
from qwen3np.ops.fast.threads import blas_threads, rowwise

__all__ = [
    "attend",
    "combine",
    "cos",
    "head",
    "linear",
    "log",
    "mean_square",
    "power",
    "rowwise",
    "session",
    "silu",
    "sin",
    "softmax",
    "total",
]


def session(*_: Any) -> blas_threads:
    """Return a context manager around one forward. Raises ValueError if this process flushes subnormal numbers."""
    require_subnormals()
    return blas_threads()
