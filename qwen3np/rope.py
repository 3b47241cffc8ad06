"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864): the angles of each position.

Lane i of a head is paired with lane i + Dh/2, and the pair is turned by the angle position / theta^(2i/Dh). The dot
product of a query and a key then depends on their positions only through the distance.

YaRN (Peng et al., 2023, https://arxiv.org/abs/2309.00071) makes a context `factor` times as long: lanes that turn less
than once in the original context turn `factor` times as slowly, lanes that turn often stay, those between are mixed.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import FLOAT32, Array, Numerics


@cache  # needed with every token
def inverse_frequencies(config: Config, num: Numerics = FLOAT32) -> Array:
    """Return 1 / theta^(2i/Dh) for i < Dh/2, under YaRN mixed with its factor-th part: (Dh/2,), radians per position.

    Rounded step by step as transformers does it in float32, because the model was trained with those numbers
    (compute_default_rope_parameters in models/qwen3/modeling_qwen3.py, _compute_yarn_parameters in
    modeling_rope_utils.py).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=num.dtype) / num.dtype.type(config.head_dim)
    powers = num.ops.power(num.dtype.type(config.rope_theta), exponents)
    frequencies = 1 / powers
    if config.rope_scaling:
        kept = 1 - _slowed(config, num)
        frequencies = 1 / (config.rope_scaling.factor * powers) * (1 - kept) + frequencies * kept
    frequencies.setflags(write=False)
    return frequencies


def _slowed(config: Config, num: Numerics) -> Array:
    """Return how far each lane is slowed down, from 0 to 1: clip((i - low) / (high - low), 0, 1) for i < Dh/2.

    low and high are the lanes that turn beta_fast and beta_slow times in the original context, rounded outwards.
    """
    yarn, head_dim = config.rope_scaling, config.head_dim
    assert yarn

    def lane(turns: float) -> float:
        length = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * num.ops.log(length) / (2 * num.ops.log(config.rope_theta))

    low, high = lane(yarn.beta_fast), lane(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2, dtype=num.dtype) - low) / (high - low), 0, 1)


def attention_factor(config: Config, num: Numerics = FLOAT32) -> float:
    """Return the scale of queries and keys under YaRN: 0.1 ln(factor) + 1 unless the config has its own; else 1."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * num.ops.log(yarn.factor) + 1

    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1)


def rotary_tables(config: Config, positions: Array, num: Numerics = FLOAT32) -> tuple[Array, Array]:
    """Return R(cos), R(sin) of the angles, times the attention factor.

    positions (B, S) -> two arrays (B, 1, S, Dh/2), to broadcast over heads.
    """
    angles = positions[:, None, :, None].astype(num.dtype) * inverse_frequencies(config, num)
    scale = attention_factor(config, num)
    return num.round(num.ops.cos(angles) * scale), num.round(num.ops.sin(angles) * scale)
