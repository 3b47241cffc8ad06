"""Root mean square normalisation (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

Every vector is brought to a root mean square of 1, and each lane is then scaled by a learned weight. It stands before
attention, before the MLP and before the head, and inside attention on each head of the queries and keys.
"""

from __future__ import annotations

import numpy as np

from qwen3np.numerics import FLOAT32, Array, Numerics
from qwen3np.ops.fast.threads import in_blocks


def rms_norm(x: Array, weight: Array, eps: float, numerics: Numerics = FLOAT32) -> Array:
    """Return weight * x / sqrt(mean(x²) + eps), the mean over the last axis. x (..., N), weight (N,) -> (..., N).

    In bfloat16 it rounds twice: the normalised x, then its product with the weight (Qwen3RMSNorm in transformers,
    models/qwen3/modeling_qwen3.py).
    """
    weight = numerics.widen(weight)

    def normalise(x: Array) -> Array:
        mean_square = np.add.reduce(x * x, axis=-1, keepdims=True) / x.shape[-1]
        y = numerics.round(x * (1 / np.sqrt(mean_square + eps)))
        y *= weight
        return numerics.round(y)

    return in_blocks(normalise, x.reshape(-1, x.shape[-1])).reshape(x.shape)
