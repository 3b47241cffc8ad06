"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), in the half-split layout.

Lane i of a head is paired with lane i + Dh/2 and the pair is turned by the angle position / theta^(2i/Dh). The dot
product of a query and a key then depends on their positions only through the distance.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import FLOAT32, Array, Numerics
from qwen3np.threads import in_blocks


@cache  # asked for with every token
def inverse_frequencies(config: Config, numerics: Numerics = FLOAT32) -> Array:
    """Return 1 / theta^(2i/Dh) for i < Dh/2: (Dh/2,), radians per position.

    Rounded step by step as transformers does it in float32, because the model was trained with those numbers
    (compute_default_rope_parameters in models/qwen3/modeling_qwen3.py).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=numerics.dtype) / numerics.dtype.type(config.head_dim)
    base = numerics.dtype.type(config.rope_theta)
    # NumPy's float32 power is off by an ulp too often; torch's is almost always the float64 one, rounded
    powers = np.power(base, exponents, dtype=np.float64).astype(numerics.dtype)
    frequencies = 1 / powers
    frequencies.setflags(write=False)
    return frequencies


def rotary_tables(config: Config, positions: Array, numerics: Numerics = FLOAT32) -> tuple[Array, Array]:
    """Return R(cos), R(sin) of the angles. positions (B, S) -> two arrays (B, 1, S, Dh/2), to broadcast over heads."""
    angles = positions[:, None, :, None].astype(numerics.dtype) * inverse_frequencies(config, numerics)
    # through float64, so that each value is the correctly rounded one on every machine
    cos = np.cos(angles, dtype=np.float64).astype(numerics.dtype)
    sin = np.sin(angles, dtype=np.float64).astype(numerics.dtype)
    return numerics.round(cos), numerics.round(sin)


def rotate(x: Array, tables: tuple[Array, Array], numerics: Numerics = FLOAT32) -> Array:
    """Turn each pair (a, b) of lanes (i, i + Dh/2) to (a cos - b sin, b cos + a sin). x (B, heads, S, Dh) -> same."""
    r, half = numerics.round, x.shape[-1] // 2  # in bfloat16 both products are rounded before they are added

    def turn(x: Array, cos: Array, sin: Array) -> Array:
        pairs = x.reshape(*x.shape[:-1], 2, half)
        by_cos, by_sin, y = r(pairs * cos[..., None, :]), r(pairs * sin[..., None, :]), np.empty_like(x)
        np.subtract(by_cos[..., 0, :], by_sin[..., 1, :], out=y[..., :half])
        np.add(by_cos[..., 1, :], by_sin[..., 0, :], out=y[..., half:])
        return r(y)

    return in_blocks(turn, x, *tables)
