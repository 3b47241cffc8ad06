"""Random test inputs: small configs over every switch of the mathematics, trained-like weights, ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qwen3np.config import Config, Yarn
from qwen3np.numerics import FLOAT32, Numerics
from qwen3np.ops.fast.attention import attend_one
from qwen3np.ops.fast.products import products
from qwen3np.weights import init_weights

SEEDS = st.integers(0, 2**32 - 1)
SMALL = dict[str, Any](
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
)
SMALL_IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def draw_config(rng: np.random.Generator) -> Config:
    """Draw a small dense config: tied or not, G from 1 to 8, Dh other than D / H, theta from 1e4 to 1e7."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 9))
    hidden_size = 8 * int(rng.integers(3, 13))
    head_dims = [dh for dh in (4, 6, 8, 16, 32) if dh * heads != hidden_size]
    return Config(
        vocab_size=int(rng.integers(64, 257)),
        hidden_size=hidden_size,
        intermediate_size=int(rng.integers(24, 161)),
        num_hidden_layers=int(rng.integers(1, 5)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice(head_dims)),
        rope_theta=float(10 ** rng.uniform(4, 7)),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        max_position_embeddings=1024,
        attention_bias=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
    )


def draw_any_config(rng: np.random.Generator) -> Config:
    """Draw a small config of the whole family: each of YaRN, sliding windows and experts comes in half of them."""
    config, changes = draw_config(rng), dict[str, Any]()
    layers = config.num_hidden_layers
    if rng.integers(2):
        changes["rope_scaling"] = Yarn(
            factor=float(rng.uniform(2, 8)),
            original_max_position_embeddings=int(rng.choice([64, 100, 512])),
            truncate=bool(rng.integers(2)),
            **[{}, {}, {"attention_factor": 0.9}, {"mscale": 0.7, "mscale_all_dim": 1.1}, {"beta_fast": 20.0}][
                rng.integers(5)
            ],
        )
    if rng.integers(2):
        changes["num_experts"] = experts = int(rng.integers(2, 17))
        changes["num_experts_per_tok"] = int(rng.integers(1, min(experts, 8) + 1))
        changes["moe_intermediate_size"] = int(rng.integers(8, 41))
        changes["norm_topk_prob"] = bool(rng.integers(2))
        changes["decoder_sparse_step"] = int(rng.integers(1, 3))
        changes["mlp_only_layers"] = tuple(np.flatnonzero(rng.random(layers) < 0.2).tolist())
    if rng.integers(2):
        changes["sliding_window"] = int(rng.integers(2, 65))
        if "num_experts" not in changes and rng.integers(2):
            kinds = np.where(rng.random(layers) < 0.5, "sliding_attention", "full_attention")
            kinds[rng.integers(layers)] = "sliding_attention"
            changes["layer_types"] = tuple(kinds.tolist())
        elif "num_experts" not in changes:
            changes["max_window_layers"] = int(rng.integers(layers))
    return replace(config, **changes)


def trained_like(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Return float32 weights as they are after training: norm weights other than 1, matrices scaled by their inputs."""
    return init_weights(config, seed, trained_like=True)


def draw_ids(rng: np.random.Generator, config: Config, *shape: int) -> np.ndarray:
    """Draw token ids of this shape."""
    return rng.integers(0, config.vocab_size, shape)


def relative(x: np.ndarray, truth: np.ndarray) -> float:
    """Return the relative L2 distance of x from the truth."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 numbers to bfloat16, ties to even, with integers alone: x plus just under half of the last bit."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) & 0xFFFF0000).view(np.float32)


def attended(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, numerics: Numerics = FLOAT32, window: int | None = None
) -> tuple[np.ndarray, ...]:
    """Return what attend gives, and the scores and probabilities (H, S, T) on the way."""
    shape = (*q.shape[:2], k.shape[1])
    steps = np.full(shape, -np.inf, numerics.dtype), np.zeros(shape, numerics.dtype)
    return attend_one(q, k, v, numerics, steps, window), *steps


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, num: Numerics = FLOAT32) -> np.ndarray:
    """Return R(x wᵀ + bias) by the fast engine."""
    return products(x, [(w, bias)], num)[0]
