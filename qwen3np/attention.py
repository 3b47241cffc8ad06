"""Grouped-query attention with normalised queries and keys.

Attention: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; groups of query heads that share a key and value
head: Ainslie et al., 2023, https://arxiv.org/abs/2305.13245; norms on queries and keys: Qwen3 technical report, 2025,
https://arxiv.org/abs/2505.09388; windows: Beltagy et al., 2020, https://arxiv.org/abs/2004.05150.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.norm import rms_norm
from qwen3np.numerics import FLOAT32, Array, Numerics, Record, ignore, softmax
from qwen3np.ops.fast.linear import FEW_ROWS, linears
from qwen3np.ops.fast.threads import share, threads_for
from qwen3np.rope import rotate

# A block of scores stays in the cache beside its keys and values. Its rows: the G queries of each of some positions.
BLOCK_ROWS, BLOCK_KEYS, BLOCK_SCORES = 256, 1024, 1 << 18


def self_attention(
    x: Array,
    weights: Mapping[str, Array],
    prefix: str,
    config: Config,
    tables: tuple[Array, Array],
    cache: tuple[KVCache, int] | None,
    window: int | None,
    numerics: Numerics,
    record: Record,
) -> Array:
    """Project, normalise, rotate, attend, project back. x (B, S, D) -> (B, S, D).

    prefix is the layer's ("model.layers.0.self_attn."), tables come from rotary_tables, cache is the KVCache with the
    layer's number, or None when nothing comes before x and nothing shall follow it, window is config.window(layer).
    """

    def project(y: Array, *names: str) -> list[Array]:
        of = [f"{prefix}{name}" for name in names]
        biases = [weights[f"{name}.bias"] if config.attention_bias else None for name in of]
        ys = linears(y, [(weights[f"{name}.weight"], bias) for name, bias in zip(of, biases, strict=True)], numerics)
        for name, projected in zip(of, ys, strict=True):
            record(name, projected)
        return ys

    def heads(y: Array) -> Array:  # (B, S, heads * Dh) -> (B, S, heads, Dh)
        return y.reshape(*y.shape[:2], -1, config.head_dim)

    def normalise(y: Array, name: str) -> Array:
        y = rms_norm(heads(y), weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)
        record(f"{prefix}{name}", y)
        return np.swapaxes(y, 1, 2)  # (B, heads, S, Dh)

    q, k, v = project(x, "q_proj", "k_proj", "v_proj")
    q, k, v = normalise(q, "q_norm"), normalise(k, "k_norm"), np.swapaxes(heads(v), 1, 2)
    q, k = rotate(q, tables, numerics), rotate(k, tables, numerics)
    record(f"{prefix}q_rope", q)
    record(f"{prefix}k_rope", k)

    contexts: list[Array] = []
    steps: list[tuple[Array, Array]] = []
    for b in range(len(x)):  # sequences may have different lengths
        keys, values = (k[b], v[b]) if cache is None else cache[0].write(cache[1], b, k[b], v[b])
        if record is not ignore:  # one sequence's scores alone are large; they are kept only for a trace
            shape = (*q[b].shape[:2], keys.shape[1])
            steps.append((np.full(shape, -np.inf, numerics.dtype), np.zeros(shape, numerics.dtype)))
        contexts.append(attend(q[b], keys, values, numerics, steps[b] if steps else None, window))
    if steps:
        record(f"{prefix}scores", _stack([scores for scores, _ in steps], -np.inf))
        record(f"{prefix}probs", _stack([probs for _, probs in steps], 0))
    context = contexts[0][None] if len(x) == 1 else np.stack(contexts)
    record(f"{prefix}context", context)
    return project(context, "o_proj")[0]


def attend(
    q: Array,
    k: Array,
    v: Array,
    numerics: Numerics = FLOAT32,
    steps: tuple[Array, Array] | None = None,
    window: int | None = None,
) -> Array:
    """Return softmax(q kᵀ / sqrt(Dh)) v for one sequence, causal. -> (S, H * Dh).

    q (H, S, Dh) are the queries of the last S of T positions, k and v (K, T, Dh) the keys and values of all. steps, if
    given, are two arrays (H, S, T), filled with -inf and 0, that get the scores (scaled) and the probabilities. window,
    if given, is how many positions, its own the last of them, a query sees.

    Scores are made in blocks that stay in the cache, and only those that a query may see. A row longer than a block
    gets its softmax from running values: its largest score so far, and the sums relative to it (Milakov and Gimelshein,
    2018, https://arxiv.org/abs/1805.02867; Dao et al., 2022, https://arxiv.org/abs/2205.14135).
    """
    query_heads, new, head_dim = q.shape
    kv_heads, total, _ = k.shape
    group = query_heads // kv_heads
    # the G = H / K queries of a KV head lie side by side, so that K and V are never repeated
    q = q.reshape(kv_heads, group, new, head_dim)
    context = np.empty((new, kv_heads, group, head_dim), numerics.dtype)
    if steps:
        steps = steps[0].reshape(*q.shape[:3], total), steps[1].reshape(*q.shape[:3], total)
    most = max(min(new, BLOCK_ROWS // group), 1)  # queries in a block
    reach = total if window is None else min(total, window + most - 1)  # keys that some query of a block sees
    # bfloat16 rounds each probability, so it needs the sum of a whole row before it goes on
    width = reach if numerics.rounds else min(reach, BLOCK_KEYS)
    step = max(min(most, BLOCK_SCORES // (group * width)), 1)
    together = max(min(-(-kv_heads // threads_for(q.size * reach)), BLOCK_SCORES // (group * step * width)), 1)

    def attend_part(part: tuple[int, int]) -> None:
        head, start = part
        heads, queries = slice(head, head + together), slice(start, start + step)
        first, end = total - new + start, min(total - new + start + step, total)  # the positions of the queries
        seen = slice(0 if window is None else max(first - window + 1, 0), end)
        part_steps = steps and (steps[0][heads, :, queries, seen], steps[1][heads, :, queries, seen])
        keys, values = k[heads, seen], v[heads, seen]
        mixed = _attend_block(q[heads, :, queries], keys, values, width, numerics, part_steps, window)
        context[queries, heads] = np.transpose(mixed, (2, 0, 1, 3))

    starts = reversed(range(0, new, step))  # the last queries see most, and come first
    parts = [(head, start) for start in starts for head in range(0, kv_heads, together)]
    share(parts, q.size * reach, attend_part)
    return context.reshape(new, -1)


def _attend_block(
    q: Array,
    k: Array,
    v: Array,
    width: int,
    numerics: Numerics,
    steps: tuple[Array, Array] | None,
    window: int | None,
) -> Array:
    """Attend with queries q (h, G, s, Dh) at the last s positions of k and v (h, T, Dh), `width` keys at a time.

    Returns context (h, G, s, Dh), and fills steps: scores and probabilities (h, G, s, T).
    """
    heads, _, last, head_dim = q.shape
    total: int = k.shape[1]
    r, rows = numerics.round, q.reshape(heads, -1, head_dim)
    largest = total_exp = mixed = np.empty(0)  # running values, of the blocks so far
    for a in range(0, total, width):
        keys, values = numerics.widen(k[:, a : a + width]), numerics.widen(v[:, a : a + width])
        scores = r(_product(rows, np.swapaxes(keys, 1, 2)))  # (h, G * s, width)
        scores *= head_dim**-0.5
        scores = r(scores)
        in_groups = scores.reshape(*q.shape[:3], -1)
        if a + width > total - last + 1:
            hidden = np.triu(np.ones((last, keys.shape[1]), np.bool_), total - last - a + 1)
            np.copyto(in_groups, -np.inf, where=hidden)
        if window is not None and a < total - window:
            hidden = np.tril(np.ones((last, keys.shape[1]), np.bool_), total - last - a - window)
            np.copyto(in_groups, -np.inf, where=hidden)
        if steps:
            steps[0][..., a : a + width] = in_groups

        # a window may hide a whole block from a query: a finite largest score then makes each exp 0
        before, largest = largest, scores.max(axis=-1, keepdims=True, initial=np.finfo(scores.dtype).min)
        if a:
            np.maximum(largest, before, out=largest)
        scores -= largest
        np.exp(scores, out=scores)
        sums = scores.sum(axis=-1, keepdims=True)
        if numerics.rounds:
            scores = r(scores / sums)
        products = _product(scores, values)
        if a:
            shrink = np.exp(before - largest)
            sums += total_exp * shrink
            products += mixed * shrink
        total_exp, mixed = sums, products
    if steps:
        steps[1][...] = r(softmax(steps[0]))
    return (r(mixed) if numerics.rounds else mixed / total_exp).reshape(q.shape)


def _product(x: Array, m: Array) -> Array:
    """Return x m; few rows of x one by one, since BLAS copies m to multiply more. (..., N, in), (..., in, out)."""
    if x.shape[-2] > FEW_ROWS:
        return x @ m
    return np.matmul(x[..., None, :], m[..., None, :, :])[..., 0, :]


def _stack(arrays: Sequence[Array], fill: float) -> Array:
    """Stack (H, S, T) arrays of different T to (B, H, S, max T)."""
    stacked = np.empty((len(arrays), *arrays[0].shape[:-1], max(a.shape[-1] for a in arrays)), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[..., : array.shape[-1]] = array
        row[..., array.shape[-1] :] = fill
    return stacked
