"""Grouped-query attention with normalised queries and keys.

Attention: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; groups of query heads that share a key and value
head: Ainslie et al., 2023, https://arxiv.org/abs/2305.13245; norms on queries and keys: Qwen3 technical report, 2025,
https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.linear import linear
from qwen3np.norm import rms_norm
from qwen3np.numerics import FLOAT32, Array, Numerics, Record, ignore, softmax
from qwen3np.rope import rotate
from qwen3np.threads import share


def self_attention(
    x: Array,
    weights: Mapping[str, Array],
    prefix: str,
    config: Config,
    tables: tuple[Array, Array],
    cache: tuple[KVCache, int] | None,
    numerics: Numerics,
    record: Record,
) -> Array:
    """Project, normalise, rotate, attend, project back. x (B, S, D) -> (B, S, D).

    prefix is the layer's ("model.layers.0.self_attn."), tables come from rotary_tables, cache is the KVCache with the
    layer's number, or None when nothing comes before x and nothing shall follow it.
    """

    def project(y: Array, name: str) -> Array:
        bias = weights[f"{prefix}{name}.bias"] if config.attention_bias else None
        y = linear(y, weights[f"{prefix}{name}.weight"], bias, numerics)
        record(f"{prefix}{name}", y)
        return y

    def heads(y: Array) -> Array:  # (B, S, heads * Dh) -> (B, S, heads, Dh)
        return y.reshape(*y.shape[:2], -1, config.head_dim)

    def normalise(y: Array, name: str) -> Array:
        y = rms_norm(heads(y), weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)
        record(f"{prefix}{name}", y)
        return np.swapaxes(y, 1, 2)  # (B, heads, S, Dh)

    q, k, v = project(x, "q_proj"), project(x, "k_proj"), project(x, "v_proj")
    q, k, v = normalise(q, "q_norm"), normalise(k, "k_norm"), np.swapaxes(heads(v), 1, 2)
    q, k = rotate(q, tables, numerics), rotate(k, tables, numerics)
    record(f"{prefix}q_rope", q)
    record(f"{prefix}k_rope", k)

    contexts: list[Array] = []
    steps: list[tuple[Array, Array]] = []
    for b in range(len(x)):  # sequences may have different lengths
        keys, values = (k[b], v[b]) if cache is None else cache[0].write(cache[1], b, k[b], v[b])
        context, *scores_and_probs = attend(q[b], keys, values, numerics)
        contexts.append(context)
        if record is not ignore:  # one sequence's scores alone are large; they are kept only for a trace
            steps.append((scores_and_probs[0], scores_and_probs[1]))
    if record is not ignore:
        record(f"{prefix}scores", _stack([scores for scores, _ in steps], -np.inf))
        record(f"{prefix}probs", _stack([probs for _, probs in steps], 0))
    context = np.stack(contexts)
    record(f"{prefix}context", context)
    return project(context, "o_proj")


def attend(q: Array, k: Array, v: Array, numerics: Numerics = FLOAT32) -> tuple[Array, Array, Array]:
    """Return softmax(q kᵀ / sqrt(Dh)) v for one sequence, causal, and the two steps on the way.

    q (H, S, Dh) are the queries of the last S of T positions, k and v (K, T, Dh) the keys and values of all. Returns
    context (S, H * Dh), scores (H, S, T; scaled, -inf where a key lies behind its query) and probs (H, S, T).
    """
    query_heads, new, head_dim = q.shape
    kv_heads, total, _ = k.shape
    r = numerics.round
    # the G = H / K queries of a KV head lie side by side, so that K and V are never repeated
    q = q.reshape(kv_heads, -1, new, head_dim)  # (K, G, S, Dh)
    hidden = np.triu(np.ones((new, total), np.bool_), total - new + 1)  # (S, T): keys behind the query
    scores = np.empty((*q.shape[:3], total), numerics.dtype)
    probs = np.empty_like(scores)
    context = np.empty((new, *q.shape[:2], head_dim), numerics.dtype)

    def attend_group(head: int) -> None:
        keys, values = numerics.widen(k[head]), numerics.widen(v[head])
        products = r(q[head].reshape(-1, head_dim) @ np.transpose(keys))  # (G * S, T)
        scores[head] = r(products * head_dim**-0.5).reshape(scores.shape[1:])
        np.copyto(scores[head], -np.inf, where=hidden)
        probs[head] = r(softmax(scores[head]))
        mixed = r(probs[head].reshape(-1, total) @ values)  # (G * S, Dh)
        context[:, head] = np.swapaxes(mixed.reshape(q.shape[1:]), 0, 1)

    share(range(kv_heads), 2 * q.size * total, attend_group)
    whole = (query_heads, new, total)
    return context.reshape(new, -1), scores.reshape(whole), probs.reshape(whole)


def _stack(arrays: Sequence[Array], fill: float) -> Array:
    """Stack (H, S, T) arrays of different T to (B, H, S, max T)."""
    stacked = np.empty((len(arrays), *arrays[0].shape[:-1], max(a.shape[-1] for a in arrays)), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[..., : array.shape[-1]] = array
        row[..., array.shape[-1] :] = fill
    return stacked
