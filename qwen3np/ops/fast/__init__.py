"""The everyday engine: the operations in blocks that fit the cache, on all cores, straight from mapped files.

A product of many rows is cut into tiles, which the threads take one after the other:

                     w: a row for each output             threads.py   takes tiles to the threads
                   +---------+---------+---------+        products.py  cuts W (stored, upcast tile by tile) and x
                   | 256     | 256     | ...     |        attention.py cuts queries and keys, with a running softmax
         +-----+   +---------+---------+---------+        experts.py   gives each expert all of its tokens at once
    x    | 512 |   |  tile   |         |         |        pages.py     tells the system which pages are needed
         +-----+   +---------+---------+---------+
         | 512 |   |         |         |         |        y = x wᵀ
         +-----+   +---------+---------+---------+

Why cut here and not leave it to BLAS:
- A BLAS rounds differently next to the edges of a product. The tiles are the same for every way to store W and every
  number of threads, so neither changes a bit; BLAS itself runs on one thread.
- A stored bfloat16 tile is upcast into scratch memory that stays in the cache, so the file is read once and never
  copied. A single row is bound by memory: there the whole of W goes to BLAS's own threads.
- Up to 8 rows (a batch of decode steps, or positions with guesses) are multiplied one by one, 64 rows of W at a time,
  so each has the bits it has alone; a matrix product would first copy W into an order of its own, which costs more than
  8 rows do. The threads take blocks of W from one queue, each as soon as it is free.
"""

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
