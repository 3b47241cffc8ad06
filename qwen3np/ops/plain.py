"""Each operation below the model as its formula, on whole arrays: the text to study, and what a port starts from."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from qwen3np.numerics import Array, Numerics
from qwen3np.ops.elementary import cos, log, mean_square, power, sin, total
from qwen3np.qwen3 import Scope

__all__ = ["attend", "combine", "cos", "head", "linear", "log", "mean_square", "power", "rowwise", "session", "silu"]
__all__ += ["sin", "softmax", "total"]


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; the largest is subtracted so that exp does not overflow."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / total(e)


def silu(x: Array) -> Array:
    """SiLU: x * sigmoid(x) = x / (1 + exp(-x)), elementwise (Elfwing et al., 2017, https://arxiv.org/abs/1702.03118)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        return x / (1 + np.exp(-x))


def linear(x: Array, m: Scope, names: Sequence[str], num: Numerics, bias: bool = False) -> list[Array]:
    """R(x Wᵀ + b), W a row for each output. x (..., in), W (out, in), b (out,) -> (..., out) for each name."""
    ys = [x @ num.widen(m[f"{name}.weight"]).T + (num.widen(m[f"{name}.bias"]) if bias else 0) for name in names]
    return [m.out(name, num.round(y)) for name, y in zip(names, ys, strict=True)]


def head(x: Array, w: Array, num: Numerics) -> Array:
    """R(x wᵀ): the logits. x (..., D), w (V, D) -> (..., V)."""
    return num.round(x @ num.widen(w).T)


def attend(
    q: Array, keys: Sequence[Array], values: Sequence[Array], window: int | None, m: Scope, num: Numerics
) -> Array:
    """softmax(q kᵀ / sqrt(Dh)) v, where a query sees itself and what is before it, `window` positions at most.

    q (B, H, S, Dh) are the last S of T positions; keys and values have (K, T, Dh) for each sequence -> (B, S, H * Dh).
    """
    R, length = num.round, max(k.shape[1] for k in keys)  # shorter sequences are padded: no query sees that

    def repeated(arrays: Sequence[Array]) -> Array:  # once for each query head: (B, H, T, Dh)
        padded = [np.pad(num.widen(a), ((0, 0), (0, length - a.shape[1]), (0, 0))) for a in arrays]
        return np.repeat(np.stack(padded), q.shape[1] // len(padded[0]), axis=1)

    at = np.array([a.shape[1] for a in keys])[:, None, None, None] + np.arange(-q.shape[2], 0)[:, None]  # (B, 1, S, 1)
    past = np.arange(length)
    seen = (past <= at) & (past > at - (window or length))
    scores = R(R(q @ np.swapaxes(repeated(keys), 2, 3)) * q.shape[-1] ** -0.5)  # (B, H, S, T)
    scores = m.out("scores", np.where(seen, scores, scores.dtype.type(-np.inf)))
    context = R(m.out("probs", R(softmax(scores))) @ repeated(values))  # (B, H, S, Dh)
    return np.swapaxes(context, 1, 2).reshape(len(q), q.shape[2], -1)


def combine(x: Array, chosen: Array, p: Array, expert: Callable[[int, Array], Array], m: Scope, num: Numerics) -> Array:
    """The sum of p * expert(x) over the k experts of each token, in the order of their numbers. -> (B, S, D)."""
    rows, chosen, p = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, p))
    y = np.zeros_like(rows)
    for n in np.unique(chosen).tolist():
        token, slot = np.nonzero(chosen == n)
        more = y[token] + num.round(expert(n, rows[token]) * p[token, slot, None])
        y[token] = more if num.grouped else num.round(more)
    return num.round(y).reshape(x.shape)


def rowwise(f: Callable[..., Array], *arrays: Array) -> Array:
    """f(*arrays), for an f that treats each row separately."""
    return f(*arrays)


def session(*_: Any) -> nullcontext[None]:
    """Nothing to set up around a forward."""
    return nullcontext()
