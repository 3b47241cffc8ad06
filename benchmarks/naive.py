"""The forward as it is written first: plain functions over float32 weights, whole arrays, nothing in place.

    python benchmarks/naive.py

What small models gain over it is measured by compare.py. This prints how far its logits are from those of qwen3np.
K and V are repeated for the query heads, the cache is concatenated, the mask is an array of booleans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import qwen3np
from qwen3np import Config, KVCache, Weights, init_weights

# 15 million parameters: the sizes of the largest of the small Llamas that are trained on TinyStories
CONFIG = Config(
    vocab_size=32000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=48,
    rope_theta=1e4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
Cache = dict[int, tuple[np.ndarray, np.ndarray]]  # layer -> keys and values (B, K, T, Dh)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Normalise the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def tables(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of the angles of all positions, (context, Dh) each."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.tile(np.outer(np.arange(config.max_position_embeddings), frequencies), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the pairs of lanes; x (B, heads, S, Dh)."""
    a, b = np.split(x, 2, -1)
    return x * cos + np.concatenate([-b, a], -1) * sin


def attention(
    x: np.ndarray, weights: Weights, layer: int, config: Config, cos: np.ndarray, sin: np.ndarray, cache: Cache
) -> np.ndarray:
    """Attend to what is in the cache and to x itself; (B, S, D) -> (B, S, D)."""
    prefix = f"model.layers.{layer}.self_attn."
    q, k, v = (
        (x @ weights[f"{prefix}{name}_proj.weight"].T).reshape(*x.shape[:2], -1, config.head_dim) for name in "qkv"
    )
    q = rms_norm(q, weights[prefix + "q_norm.weight"], config.rms_norm_eps).transpose(0, 2, 1, 3)
    k = rms_norm(k, weights[prefix + "k_norm.weight"], config.rms_norm_eps).transpose(0, 2, 1, 3)
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.transpose(0, 2, 1, 3)
    if layer in cache:
        k, v = (np.concatenate(pair, 2) for pair in zip(cache[layer], (k, v), strict=True))
    cache[layer] = k, v
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups > 1:
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(config.head_dim)
    new, total = scores.shape[2:]
    visible = np.tril(np.ones((new, total), bool), total - new)
    context = softmax(np.where(visible, scores, np.float32(-np.inf))) @ v
    return context.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ weights[prefix + "o_proj.weight"].T


def mlp(x: np.ndarray, weights: Weights, prefix: str) -> np.ndarray:
    """SwiGLU; (B, S, D) -> (B, S, D)."""
    gate, up = x @ weights[prefix + "gate_proj.weight"].T, x @ weights[prefix + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "down_proj.weight"].T


def forward(
    weights: Weights, config: Config, ids: np.ndarray, angles: tuple[np.ndarray, np.ndarray], cache: Cache
) -> np.ndarray:
    """Return the logits of the token after the last of ids (B, S): (B, V). What came before is in the cache."""
    start = cache[0][0].shape[2] if cache else 0
    cos, sin = (table[start : start + ids.shape[1]] for table in angles)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(h, weights, layer, config, cos, sin, cache)
        h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + mlp(h, weights, prefix + "mlp.")
    x = rms_norm(x[:, -1], weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ weights[head].T


def stream(weights: Weights, config: Config, ids: list[int], max_new_tokens: int) -> Iterator[int]:
    """Yield the likeliest next id, again and again."""
    cache: Cache = {}
    angles, newest = tables(config), ids
    for _ in range(max_new_tokens):
        logits = forward(weights, config, np.array([newest]), angles, cache)
        newest = [int(logits[0].argmax())]
        yield newest[0]


def distance(config: Config, prompt: int = 24, steps: int = 8) -> float:
    """Return the largest |a - b| / |b| between logits here (a) and of qwen3np (b), after a prompt and each step."""
    weights = init_weights(config, 0, trained_like=True)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, prompt + steps))
    ours, cache, angles, errors = KVCache.allocate(config, 2, prompt + steps), {}, tables(config), []
    for piece in np.split(ids, range(prompt, prompt + steps), 1):
        a = forward(weights, config, piece, angles, cache)
        b = qwen3np.forward(weights, config, piece, ours, last_only=True)[:, 0]
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return float(np.max(errors))  # NaN, where one is


if __name__ == "__main__":
    print(f"relative distance of the logits from those of qwen3np: {distance(CONFIG):.1e}")
