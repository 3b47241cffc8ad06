"""Causal attention in blocks of scores that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen3np.numerics import FLOAT32, Array, Numerics
from qwen3np.ops.fast.products import FEW_ROWS
from qwen3np.ops.fast.threads import share, threads_for
from qwen3np.ops.plain import softmax
from qwen3np.qwen3 import Scope

# A block of scores stays in the cache next to its keys and values. Its rows: the G queries of each of some positions.
# With 2 MB of L2 a core, these sizes are the fastest: half as many scores take 4 % longer at 4,096 positions.
BLOCK_ROWS, BLOCK_KEYS, BLOCK_SCORES = 256, 2048, 1 << 19


def attend(
    q: Array, keys: Sequence[Array], values: Sequence[Array], window: int | None, m: Scope, num: Numerics
) -> Array:
    """Return softmax(q kᵀ / sqrt(Dh)) v, causal: (B, S, H * Dh). See plain.attend for the arguments.

    Sequences may have different lengths, so each is computed separately. Scores and probabilities are kept only where
    somebody watches; what an edit of them changes is computed again from there.
    """
    if m.trace is None and m.edit is None:
        if len(q) == 1:
            return attend_one(q[0], keys[0], values[0], num, None, window)[None]
        contexts = np.empty((len(q), q.shape[2], q.shape[1] * q.shape[3]), num.dtype)

        def attend_sequence(b: int) -> None:
            contexts[b] = attend_one(q[b], keys[b], values[b], num, None, window)

        lengths = [k.shape[1] for k in keys]
        if threads_for(q[0].size * max(lengths)) == 1:  # too little work in each to be cut
            share(range(len(q)), q[0].size * sum(lengths), attend_sequence)
        else:
            for b in range(len(q)):
                attend_sequence(b)
        return contexts

    shape = (*q.shape[:3], max(k.shape[1] for k in keys))
    scores, probs = np.full(shape, -np.inf, num.dtype), np.zeros(shape, num.dtype)
    context = np.empty((len(q), q.shape[2], q.shape[1] * q.shape[3]), num.dtype)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        seen = scores[b, ..., : k.shape[1]], probs[b, ..., : k.shape[1]]
        context[b] = attend_one(q[b], k, v, num, seen, window)
    if m.edit is None:
        m.out("scores", scores)
        m.out("probs", probs)
        return context
    edited = m.out("scores", scores.copy())
    if not np.array_equal(edited, scores):
        probs = num.round(softmax(edited))
    edited = m.out("probs", probs.copy())
    if np.array_equal(edited, probs) and np.array_equal(probs, num.round(softmax(scores))):
        return context
    group = q.shape[1] // keys[0].shape[0]
    for b, v in enumerate(values):
        mixed = edited[b, ..., : v.shape[1]] @ np.repeat(num.widen(v), group, axis=0)  # (H, S, Dh)
        context[b] = num.round(mixed.swapaxes(0, 1)).reshape(q.shape[2], -1)
    return context


def attend_one(
    q: Array,
    k: Array,
    v: Array,
    num: Numerics = FLOAT32,
    watched: tuple[Array, Array] | None = None,
    window: int | None = None,
) -> Array:
    """Return softmax(q kᵀ / sqrt(Dh)) v for one sequence, causal. -> (S, H * Dh).

    q (H, S, Dh) are the queries of the last S of T positions, k and v (K, T, Dh) the keys and values of all. watched,
    if given, are two arrays (H, S, T), filled with -inf and 0, for the scores (scaled) and the probabilities. window,
    if given, is how many positions, its own the last of them, a query sees.

    Scores are made in blocks that stay in the cache, and only those that a query may see. A row longer than a block
    gets its softmax from running values: its largest score so far, and the sums relative to it (Milakov and Gimelshein,
    2018, https://arxiv.org/abs/1805.02867; Dao et al., 2022, https://arxiv.org/abs/2205.14135).
    """
    query_heads, new, head_dim = q.shape
    kv_heads, total, _ = k.shape
    group = query_heads // kv_heads
    # the G = H / K queries of a KV head are adjacent, so K and V are never repeated
    q = q.reshape(kv_heads, group, new, head_dim)
    context = np.empty((new, kv_heads, group, head_dim), num.dtype)
    if watched:
        watched = watched[0].reshape(*q.shape[:3], total), watched[1].reshape(*q.shape[:3], total)
    # positions in a block; a few are computed one by one, with the bits of one
    most = 1 if new <= FEW_ROWS else max(min(new, BLOCK_ROWS // group), 1)
    reach = total if window is None else min(total, window + most - 1)  # keys that some query of a block sees
    # bfloat16 rounds each probability, so it needs the sum of a whole row before it goes on
    width = reach if num.rounds else min(reach, BLOCK_KEYS)
    step = max(min(most, BLOCK_SCORES // (group * width)), 1)
    together = max(min(-(-kv_heads // threads_for(q.size * reach)), BLOCK_SCORES // (group * step * width)), 1)

    def attend_part(part: tuple[int, int]) -> None:
        head, start = part
        heads, queries = slice(head, head + together), slice(start, start + step)
        first, end = total - new + start, min(total - new + start + step, total)  # the positions of the queries
        seen = slice(0 if window is None else max(first - window + 1, 0), end)
        part_watched = watched and (watched[0][heads, :, queries, seen], watched[1][heads, :, queries, seen])
        keys, values = k[heads, seen], v[heads, seen]
        mixed = _attend_block(q[heads, :, queries], keys, values, width, num, part_watched, window)
        context[queries, heads] = mixed.transpose(2, 0, 1, 3)

    starts = reversed(range(0, new, step))  # the last queries see the most keys, so they start first
    parts = [(head, start) for start in starts for head in range(0, kv_heads, together)]
    share(parts, q.size * reach, attend_part)
    return context.reshape(new, -1)


def _attend_block(
    q: Array,
    k: Array,
    v: Array,
    width: int,
    num: Numerics,
    watched: tuple[Array, Array] | None,
    window: int | None,
) -> Array:
    """Attend with queries q (h, G, s, Dh) at the last s positions of k and v (h, T, Dh), `width` keys at a time.

    Returns context (h, G, s, Dh), and fills watched: scores and probabilities (h, G, s, T).
    """
    heads, _, last, head_dim = q.shape
    total: int = k.shape[1]
    r, rows, scale = num.round, q.reshape(heads, -1, head_dim), head_dim**-0.5
    if not num.rounds:  # fewer numbers than the scores
        rows = rows * scale
    largest = total_exp = mixed = np.empty(0)  # running values, of the blocks so far
    for a in range(0, total, width):
        keys, values = num.widen(k[:, a : a + width]), num.widen(v[:, a : a + width])
        scores = _product(rows, keys.swapaxes(1, 2))  # (h, G * s, width)
        if num.rounds:
            scores = r(r(scores) * scale)
        in_groups = scores.reshape(*q.shape[:3], -1)
        at, past = np.arange(total - last, total)[:, None], np.arange(a, a + keys.shape[1])
        near = max(total - last - a + 1, 0)  # every query sees the keys before this one
        if near < len(past):
            np.copyto(in_groups[..., near:], -np.inf, where=past[near:] > at)
        if window is not None and a < total - window:
            np.copyto(in_groups, -np.inf, where=past <= at - window)
        if watched:
            watched[0][..., a : a + width] = in_groups

        # a window may hide a whole block from a query: then a finite largest score makes each exp 0
        before, largest = largest, scores.max(axis=-1, keepdims=True, initial=np.finfo(scores.dtype).min)
        if a:
            np.maximum(largest, before, out=largest)
        scores -= largest
        np.exp(scores, out=scores)
        sums = scores @ np.ones((scores.shape[-1], 1), scores.dtype)  # faster than a sum
        if num.rounds:
            scores = r(scores / sums)
        products = _product(scores, values)
        if a:
            shrink = np.exp(before - largest)
            sums += total_exp * shrink
            products += mixed * shrink
        total_exp, mixed = sums, products
    if watched:
        watched[1][...] = r(softmax(watched[0]))
    return (r(mixed) if num.rounds else mixed / total_exp).reshape(q.shape)


def _product(x: Array, m: Array) -> Array:
    """Return x m; few rows of x one by one, since BLAS copies m to multiply more. (..., N, in), (..., in, out)."""
    if x.shape[-2] > FEW_ROWS:
        return x @ m
    return np.matmul(x[..., None, :], m[..., None, :, :])[..., 0, :]
