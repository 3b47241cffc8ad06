"""y = x Wᵀ + b: the matrix product behind every projection."""

from __future__ import annotations

import numpy as np

from qwen3np.numerics import FLOAT32, Array, Numerics

# Rows of W are upcast and applied this many elements at a time: a block in float32 (1 MiB) stays in the L2 cache, and
# a mapped bfloat16 matrix never exists as a whole float32 copy. float32 matrices are cut in the same places, so the
# bits of the result do not depend on how the weights are stored.
BLOCK_ELEMENTS = 1 << 18


def linear(x: Array, w: Array, bias: Array | None = None, numerics: Numerics = FLOAT32) -> Array:
    """Return R(x Wᵀ + b), accumulated in float32 (float64). x (..., in), w (out, in), bias (out,) -> (..., out).

    The layout of torch.nn.Linear: a row of W for each output.
    """
    outputs, inputs = w.shape
    rows = x.reshape(-1, inputs)
    y = np.empty((len(rows), outputs), numerics.dtype)
    step = max(4, BLOCK_ELEMENTS // inputs // 4 * 4)
    for start in range(0, outputs, step):
        block = numerics.widen(w[start : start + step])
        np.matmul(rows, np.transpose(block), out=y[:, start : start + step])
    if bias is not None:
        y += numerics.widen(bias)
    return numerics.round(y).reshape(*x.shape[:-1], outputs)
