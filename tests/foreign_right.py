"""Right ports that compute in another way, for `foreign.Foreign`: each operation in the forms that programs have.

The order of a sum, a table of angles, a softmax in one pass: float32 rounding is all that separates them.
"""

from __future__ import annotations

import numpy as np
from foreign import Foreign

F32 = np.float32


# --- products (..., N) x (O, N) -> (..., O), in float32 ---------------------------------------------------------------


def one_by_one(x, w):
    y = np.zeros((*x.shape[:-1], len(w)), F32)
    for i in range(x.shape[-1]):
        y += x[..., i : i + 1] * w[:, i]
    return y


def in_blocks(size):
    """Sum within blocks by BLAS, then the blocks one by one."""
    return lambda x, w: sum(x[..., i : i + size] @ w[:, i : i + size].T for i in range(0, x.shape[-1], size))


def in_lanes(count):
    """Keep `count` sums at a time, as vector registers do, and add them at the end."""

    def product(x, w):
        pad = -x.shape[-1] % count
        x, w = (np.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, pad)]) for y in (x, w))
        lanes = np.zeros((*x.shape[:-1], len(w), count), F32)
        for i in range(0, x.shape[-1], count):
            lanes += x[..., None, i : i + count] * w[:, i : i + count]
        return np.add.accumulate(lanes, -1)[..., -1]

    return product


def backwards(x, w):
    return np.ascontiguousarray(x[..., ::-1]) @ np.ascontiguousarray(w[:, ::-1]).T


def in_float64(x, w):
    return x.astype(np.float64) @ w.astype(np.float64).T


PRODUCTS = {
    "BLAS": lambda x, w: x @ w.T,
    "one by one": one_by_one,
    "blocks of 4": in_blocks(4),
    "blocks of 16": in_blocks(16),
    "8 lanes": in_lanes(8),
    "backwards": backwards,
    "float64": in_float64,
}


def linear(product):
    def change(own, at, x, *weight):
        port = own.__self__
        w = weight[0] if weight else port.weights[f"{at.name}.weight"]
        bias = port.weights.get(f"{at.name}.bias")
        y = product(x, w.astype(F32))
        return y if bias is None else y + bias.astype(F32)

    return change


def head(product):
    def change(own, at, x):
        port = own.__self__
        name = "model.embed_tokens" if port.config.tie_word_embeddings else "lm_head"
        return product(x, port.weights[f"{name}.weight"].astype(F32))

    return change


# --- norms, activation, softmax, attention ----------------------------------------------------------------------------


def norm(mean_square, inverse_root, rounded=False):
    """Normalise in float32; rounded: as eager 16-bit programs do, before the weight as well."""

    def change(own, at, x):
        port = own.__self__
        scale = inverse_root(mean_square(x.astype(F32)) + F32(port.config.rms_norm_eps))
        y = x * scale
        if rounded:
            y = y.astype(port.short).astype(F32)
        return port.weights[f"{at.name}.weight"].astype(F32) * y

    return change


def squares_one_by_one(x):
    return np.add.accumulate(x * x, -1, dtype=F32)[..., -1:] / F32(x.shape[-1])


def newton(x):
    y = (1 / np.sqrt(x.astype(np.float16))).astype(F32)
    for _ in range(3):
        y = y * (F32(1.5) - F32(0.5) * x * y * y)
    return y


MEAN_SQUARES = {"mean": lambda x: np.mean(x * x, -1, keepdims=True, dtype=F32), "one by one": squares_one_by_one}
INVERSE_ROOTS = {"division": lambda x: 1 / np.sqrt(x), "power": lambda x: x ** F32(-0.5)}


def silu(rounded):
    def change(own, at, g, u):
        with np.errstate(over="ignore"):
            y = g / (1 + np.exp(-g))
        return (y.astype(own.__self__.short).astype(F32) if rounded else y) * u

    return change


def softmax(own, at, s):
    e = np.exp((s - s.max(-1, keepdims=True)).astype(F32))
    return e / e.sum(-1, keepdims=True, dtype=F32)


def softmax_online(own, at, s):
    """One pass over blocks of 8 keys with a running maximum, as flash attention."""
    s = s.astype(F32)
    most = np.full((*s.shape[:-1], 1), -np.inf, F32)
    total = np.zeros_like(most)
    for i in range(0, s.shape[-1], 8):
        block = s[..., i : i + 8]
        now = np.maximum(most, block.max(-1, keepdims=True))
        base = np.where(np.isneginf(now), 0, now)  # so far a window hides all
        total = total * np.exp(most - base) + np.exp(block - base).sum(-1, keepdims=True, dtype=F32)
        most = now
    return np.exp(s - most) / total


def scores(product, first=False, rounded=False):
    """Q kT with another sum; first: queries are scaled before it."""

    def change(own, at, q, k, v):
        port = own.__self__
        group, size = q.shape[1] // k.shape[1], F32(q.shape[-1] ** -0.5)
        q = q * size if first else q
        s = np.stack([[product(q[b, h], k[b, h // group]) for h in range(q.shape[1])] for b in range(len(q))]).astype(
            F32
        )
        if rounded:
            s = s.astype(port.short).astype(F32)
        return np.where(port.visible(q.shape[2], k.shape[2]), s if first else s * size, -np.inf)

    return change


def context(product):
    def change(own, at, p, v):
        group = p.shape[1] // v.shape[1]
        p = p.astype(F32)
        turned = np.swapaxes(v, 2, 3)
        pairs = [(b, h) for b in range(len(p)) for h in range(p.shape[1])]
        y = np.array([product(p[b, h], np.ascontiguousarray(turned[b, h // group])) for b, h in pairs], F32)
        return np.moveaxis(y.reshape(*p.shape[:3], -1), 1, 2).reshape(len(p), p.shape[2], -1)

    return change


# --- rotary angles (S, Dh / 2), in float32 ----------------------------------------------------------------------------

ANGLES = {
    "power": lambda p, n, t: p[:, None].astype(F32) * (1 / t ** (np.arange(n, dtype=F32) / n)),
    "reciprocal power": lambda p, n, t: p[:, None].astype(F32) * t ** (-np.arange(n, dtype=F32) / n),
    "exp2": lambda p, n, t: p[:, None].astype(F32) * np.exp2(-np.arange(n, dtype=F32) / n * np.log2(t)),
    "recurrence": lambda p, n, t: np.multiply.accumulate(
        np.concatenate((p[:, None], np.full((len(p), n - 1), t ** F32(-1 / n))), 1).astype(F32), 1, dtype=F32
    ),
    "float64": lambda p, n, t: p[:, None] * np.float64(t) ** (-np.arange(n) / n),
}


def rope(angles, rounded=False):
    """Rotate x (B, S, heads, Dh); rounded: tables and products in 16 bits, as eager programs do."""

    def change(own, at, x, positions):
        port = own.__self__
        half = x.shape[-1] // 2
        a = angles(positions, half, F32(port.config.rope_theta))
        r = (lambda y: y.astype(port.short).astype(F32)) if rounded else (lambda y: y.astype(F32))
        cos, sin = r(np.cos(a))[:, None], r(np.sin(a))[:, None]
        x0, x1 = x[..., :half], x[..., half:]
        y = np.concatenate((r(x0 * cos) + r(-x1 * sin), r(x1 * cos) + r(x0 * sin)), -1)
        return np.moveaxis(y, 2, 1)

    return change


# --- a port of drawn forms --------------------------------------------------------------------------------------------


class InChunks(Foreign):
    """Feeds a prompt some positions at a time; its points are those of the chunks, joined."""

    def __init__(self, *arguments, size, **more):
        super().__init__(*arguments, **more)
        self.size = size

    def forward(self, ids, start):
        if self.prefix or not self.size:
            return super().forward(ids, start)
        parts, total = [], ids.shape[1]
        for i in range(0, total, self.size):
            super().forward(ids[:, i : i + self.size], i)
            parts.append(dict(self.points))
        for name in parts[0]:
            kind = name.rpartition(".")[2]
            pieces = [part[name] for part in parts]
            if kind in ("scores", "probs"):
                empty = -np.inf if kind == "scores" else 0
                pieces = [np.pad(x, [(0, 0)] * 3 + [(0, total - x.shape[-1])], constant_values=empty) for x in pieces]
            axis = 2 if kind in ("scores", "probs", "q_rope", "k_rope") else 1
            self.points[name] = np.concatenate(pieces, axis)
        return None


def draw_port(rng, config, weights, short=np.float32):
    """Draw a right port, and say what it is: the form of each operation, and the size of its chunks."""

    def one(forms):
        name = str(rng.choice(list(forms)))
        return name, forms[name]

    said, p = one(PRODUCTS)
    square, root, angles = one(MEAN_SQUARES), one(INVERSE_ROOTS), one(ANGLES)
    rounded = short is not np.float32 and bool(rng.integers(2))
    attended, summed = one(PRODUCTS), one(PRODUCTS)
    first = bool(rng.integers(2)) and not rounded
    soft = one({"softmax": softmax, "online softmax": softmax_online})
    size = int(rng.choice([0, 0, 1, 7, 16]))
    port = InChunks(
        config,
        weights,
        short,
        size=size,
        linear=linear(p),
        head=head(p),
        norm=norm(square[1], root[1], rounded),
        act=silu(rounded),
        rope=rope(angles[1], rounded),
        scores=scores(attended[1], first, rounded),
        probs=soft[1] if rng.integers(4) else lambda own, at, s: own(s),
        context=context(summed[1]),
    )
    parts = [said, square[0], root[0], angles[0], attended[0], summed[0], soft[0], f"chunks of {size}"]
    return port, ", ".join([*parts, *(["eager"] if rounded else []), *(["queries scaled"] if first else [])])
