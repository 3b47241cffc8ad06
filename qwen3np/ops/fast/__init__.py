"""The everyday engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import Array, Numerics
from qwen3np.ops.elementary import cos, log, mean_square, power, sin, total
from qwen3np.ops.fast.attention import attend
from qwen3np.ops.fast.experts import combine
from qwen3np.ops.fast.products import head, is_ready, linear
from qwen3np.ops.fast.threads import blas_threads, rowwise, threads_for

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


def session(weights: Mapping[str, Array], config: Config, new: int, last: int, num: Numerics) -> blas_threads:
    """Return a context manager that sets BLAS's own threads for one forward of `new` ids, up to `last` positions.

    BLAS threads have the lowest start-up latency but spin while idle, starving our pool: they are used for a single
    row, until attention costs half a layer (or there are experts).
    """
    matrix = config.hidden_size * config.intermediate_size
    attention = 2 * config.num_attention_heads * config.head_dim * last
    alone = (
        new == 1
        and is_ready(weights["model.embed_tokens.weight"], num)
        and attention < 4 * matrix
        and not config.num_experts
    )
    return blas_threads(threads_for(matrix) if alone else 1)


def softmax(x: Array) -> Array:
    """Return plain.softmax, in one array less."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    e /= total(e)
    return e


def silu(x: Array) -> Array:
    """Return plain.silu, in two arrays less."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        e = np.exp(-x)
    e += 1
    return np.divide(x, e, out=e)
