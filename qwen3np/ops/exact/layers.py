"""The layers of the seam, from the operations that are correctly rounded; other steps (+, *, /) are IEEE 754's."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from qwen3np.numerics import BFLOAT16, Array, Numerics
from qwen3np.ops.exact.elementary import exp
from qwen3np.ops.exact.rounding import quiet
from qwen3np.ops.exact.sums import product, sum_of_positive
from qwen3np.ops.fast.threads import num_threads, share
from qwen3np.qwen3 import Scope

# Rows of x and elements of W in one product. With smaller blocks the threads wait for each other between them.
TILE_ROWS, BLOCK_ELEMENTS = 512, 1 << 20
# Scores in one block: they stay in the cache.
BLOCK_SCORES = 1 << 16


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis; -inf gives exactly 0, a NaN in a row makes all of it NaN."""
    with quiet():
        e = exp(x - np.max(x, axis=-1, keepdims=True))
        e /= sum_of_positive(e)
    return e


def silu(x: Array) -> Array:
    """Return x / (1 + exp(-x)), elementwise."""
    with quiet():
        e = exp(-x)
        e += 1
        return np.divide(x, e, out=e)


def linear(x: Array, m: Scope, names: Sequence[str], num: Numerics, bias: bool = False) -> list[Array]:
    """Return R(x Wᵀ + b) for each name, as the points of these names. x (..., in), W (out, in) -> (..., out)."""
    ys = _products(x, [m[f"{name}.weight"] for name in names], num, bias)
    if bias:
        ys = [num.round(y + num.widen(m[f"{name}.bias"])) for name, y in zip(names, ys, strict=True)]
    return [m.out(name, y) for name, y in zip(names, ys, strict=True)]


def head(x: Array, w: Array, num: Numerics) -> Array:
    """Return R(x wᵀ). x (..., D), w (V, D) -> (..., V)."""
    return _products(x, [w], num)[0]


def _products(x: Array, ws: Sequence[Array], num: Numerics, more: bool = False) -> list[Array]:
    """Return R(x wᵀ) for each w (out, in), or x wᵀ if there is more to add: in blocks, over the threads."""
    then = num.round if num.rounds and not more else None
    rows = x.reshape(-1, x.shape[-1])
    ys = [np.empty((len(rows), len(w)), np.float32) for w in ws]
    tiles = [(a, rows[a : a + TILE_ROWS]) for a in range(0, len(rows), TILE_ROWS)]
    few = rows.astype(np.float64) if len(tiles) == 1 else None
    step = max(BLOCK_ELEMENTS // x.shape[-1], 1)

    def apply(part: tuple[int, int, tuple[int, Array]]) -> None:
        n, b, (a, tile) = part
        w = _widened(ws[n][b : b + step], num)
        y = ys[n][a : a + TILE_ROWS, b : b + step]
        product(tile.astype(np.float64) if few is None else few, w, then, y)

    parts = [(n, b, tile) for n, w in enumerate(ws) for b in range(0, len(w), step) for tile in tiles]
    share(parts, 2 * len(rows) * sum(len(w) * x.shape[-1] for w in ws), apply)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


class _Scratch(threading.local):
    """Memory for the weights that a thread widens, kept from call to call."""

    memory: Array = np.empty(0)


_scratch = _Scratch()


def _widened(w: Array, num: Numerics) -> Array:
    """Return num.widen(w) in float64, in this thread's scratch memory: valid until the next call."""
    if not (w.dtype == BFLOAT16 or (w.dtype == np.float32 and not num.rounds)):  # those need no step in between
        w = num.widen(w)
    if _scratch.memory.size < w.size:
        _scratch.memory = np.empty(w.size)
    widened = _scratch.memory[: w.size].reshape(w.shape)
    np.copyto(widened, w)
    return widened


def attend(
    q: Array, keys: Sequence[Array], values: Sequence[Array], window: int | None, m: Scope, num: Numerics
) -> Array:
    """Return softmax(q kᵀ / sqrt(Dh)) v, where a query sees itself and what is before it, `window` positions at most.

    q (B, H, S, Dh) are the last S of T positions; keys and values: (K, T, Dh) for each sequence -> (B, S, H * Dh). In
    blocks of queries, each with the keys that some of them see; whole only where scores or probabilities are watched.
    """
    batch, _, new, _ = q.shape
    q = q.reshape(batch, len(keys[0]), -1, *q.shape[2:])  # (B, K, G, S, Dh)
    watched = m.trace is not None or m.edit is not None
    if watched:
        probs = _watched(q, keys, window, m, num)
        contexts = [_mixed(p[..., : v.shape[1]], num.widen(v), num) for p, v in zip(probs, values, strict=True)]
    else:
        contexts = [_attend(*qkv, window, num) for qkv in zip(q, keys, values, strict=True)]
    return np.transpose(np.stack(contexts), (0, 3, 1, 2, 4)).reshape(batch, new, -1)


def _watched(q: Array, keys: Sequence[Array], window: int | None, m: Scope, num: Numerics) -> Array:
    """Return the probabilities of all queries, by the points of them and of their scores. -> (B, K, G, S, T)."""
    scores = np.full((*q.shape[:4], max(k.shape[1] for k in keys)), -np.inf, np.float32)
    for b, k in enumerate(keys):
        scores[b, ..., : k.shape[1]] = _scores(q[b], num.widen(k), window, num)
    in_heads = (len(q), -1, *scores.shape[3:])
    scores = m.out("scores", scores.reshape(in_heads))
    return m.out("probs", num.round(softmax(scores))).reshape(*q.shape[:4], -1)


def _attend(q: Array, k: Array, v: Array, window: int | None, num: Numerics) -> Array:
    """Attend in one sequence: q (K, G, S, Dh), k and v (K, T, Dh) -> (K, G, S, Dh)."""
    kv_heads, group, new, _ = q.shape
    length, context = k.shape[1], np.empty(q.shape, np.float32)
    reach = length if window is None else min(length, window + new - 1)  # at most: the keys that all new queries see
    step = max(min(new, BLOCK_SCORES // (group * reach)), 1)
    together = max(min(-(-kv_heads // num_threads()), BLOCK_SCORES // (group * step * reach)), 1)

    def apply(part: tuple[int, int]) -> None:
        head, start = part
        at, end = (slice(head, head + together), slice(None), slice(start, start + step)), min(start + step, new)
        first = 0 if window is None else max(length - new + start - window + 1, 0)
        seen = slice(head, head + together), slice(first, length - new + end)
        probs = num.round(softmax(_scores(q[at], num.widen(k[seen]), window, num)))
        context[at] = _mixed(probs, num.widen(v[seen]), num)

    starts = reversed(range(0, new, step))  # the last queries see most, and come first
    parts = [(head, start) for start in starts for head in range(0, kv_heads, together)]
    share(parts, 4 * q.size * reach, apply)
    return context


def _scores(q: Array, k: Array, window: int | None, num: Numerics) -> Array:
    """Return R(R(q kᵀ) / sqrt(Dh)), -inf where hidden. q (h, G, S, Dh) at the last of T positions -> (h, G, S, T)."""
    heads, _, new, head_dim = q.shape
    length, then = k.shape[1], num.round if num.rounds else None
    scores = product(q.reshape(heads, -1, head_dim).astype(np.float64), k.astype(np.float64), then)
    scores *= np.float32(1 / math.sqrt(head_dim))  # IEEE operations; ** would be the C library's pow
    scores = num.round(scores).reshape(*q.shape[:3], length)
    if new > 1 or (window is not None and length > window):
        at, past = np.arange(length - new, length)[:, None], np.arange(length)
        hidden = past > at if window is None else (past > at) | (past <= at - window)
        np.copyto(scores, -np.inf, where=hidden)
    return scores


def _mixed(probs: Array, v: Array, num: Numerics) -> Array:
    """Return R(probs v). (h, G, S, T), (h, T, Dh) -> (h, G, S, Dh).

    A probability of 0 adds nothing to the sum, not even where v is infinite or NaN: what is hidden is as if it were not
    there.
    """
    heads, _, _, length = probs.shape
    p, finite = probs.reshape(heads, -1, length).astype(np.float64), np.isfinite(v)
    then = num.round if num.rounds else None
    if finite.all():
        mixed = product(p, np.swapaxes(v.astype(np.float64), 1, 2), then)
    else:
        mixed = product(p, np.swapaxes(np.where(finite, v, 0).astype(np.float64), 1, 2), then)
        with quiet():
            terms = np.where(p[..., None] == 0, 0, p[..., None] * np.where(finite, 0, v)[:, None])  # (h, G S, T, Dh)
            infinite = terms.sum(axis=2)
        mixed = np.where(infinite == 0, mixed, infinite).astype(np.float32)
    return mixed.reshape(*probs.shape[:3], -1)
