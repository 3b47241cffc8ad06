"""Bugs that are in no catalogue, for `foreign.Foreign`: name -> (operations replaced, the first wrong point).

Points are in layer 0 of the prompt unless stated otherwise. Written without a look at how the package tries bugs.
"""

from __future__ import annotations

import numpy as np

A, M = "self_attn.", "mlp."


def only(when, change):
    """Change an operation where `when` holds."""
    return lambda own, at, *x: change(own, at, *x) if when(at) else own(*x)


def after(change):
    """Change what an operation gives."""
    return lambda own, at, *x: change(own(*x))


def named(*kinds):
    return lambda at: at.kind in kinds


def layer(i):
    return lambda at: at.layer == i


def decoding(at):
    return bool(at.prefix)


def both(*conditions):
    return lambda at: all(c(at) for c in conditions)


def zeroed(*index):
    def change(own, at, *x):
        y = np.array(own(*x))
        y[index] = 0
        return y

    return change


def rolled(by, axis):
    return after(lambda y: np.roll(y, by, axis))


def weights_of(other):
    return lambda own, at, x: own(x, own.__self__.weights[f"{at.name.rpartition('.')[0]}.{other}.weight"])


def layer_weights(i):
    def change(own, at, x, *more):
        name = at.name.replace(f"layers.{at.layer}.", f"layers.{i}.")
        return own(x, own.__self__.weights[f"{name}.weight"])

    return change


def mean_of_absolutes(own, at, x, *more):
    return own.__self__.weights[f"{at.name}.weight"] * x / (np.abs(x).mean(-1, keepdims=True) + 1e-6)


def layer_norm(own, at, x, *more):
    x = x - x.mean(-1, keepdims=True)
    return own.__self__.weights[f"{at.name}.weight"] * x / (x.std(-1, keepdims=True) + 1e-6)


def half_normalised(own, at, x, *more):
    n = x.shape[-1] // 2
    y = np.array(own(x))
    y[..., n:] *= np.sqrt((x**2).mean(-1) / (x[..., n:] ** 2).mean(-1))[..., None]
    return y


def turned_by(angle):
    """Rotate by angle(positions, frequencies)."""

    def change(own, at, x, positions):
        port = own.__self__
        turns = np.exp(1j * angle(positions[:, None].astype(float), port.frequencies()))
        half = x.shape[-1] // 2
        z = (x[..., :half].astype(float) + 1j * x[..., half:]) * turns[:, None]
        return np.moveaxis(np.concatenate((z.real, z.imag), -1), 2, 1)

    return change


def masked_by(seen):
    """Hide what seen(i, j, total) does not let through."""

    def change(own, at, q, k, v):
        s = own(q, k, v)
        new, total = s.shape[-2:]
        i, j = np.arange(total - new, total)[:, None], np.arange(total)
        return np.where(seen(i, j, total), s, -np.inf)

    return change


def capped(limit):
    return after(lambda y: np.where(np.isfinite(y), limit * np.tanh(np.where(np.isfinite(y), y, 0) / limit), y))


def with_sink(own, at, s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / (e.sum(-1, keepdims=True) + 1)


def stale(kind, by):
    """A cache that returns the keys or values of decode steps from a neighbouring place."""

    def change(own, at, which, old, new):
        return own(which, old, np.roll(old[:, :, -1:], 0, 2) if which == kind and old is not None and by else new)

    return change


def truncated(kind):
    """A cache that forgets the first position in decode steps."""

    def change(own, at, which, old, new):
        if old is not None and which == kind:
            old = old.copy()
            old[:, :, 0] = 0
        return own(which, old, new)

    return change


def scaled_heads(own, at, p, v):
    y = np.array(own(p, v))
    heads = y.reshape(*y.shape[:2], p.shape[1], -1)
    heads[:, :, -1] *= 1.5
    return y


def other_group(own, at, q, k, v):
    return own(q, k[:, ::-1], v)


N, Q, K, V, O = "input_layernorm", f"{A}q_proj", f"{A}k_proj", f"{A}v_proj", f"{A}o_proj"  # noqa: E741
QN, KN, QR, KR = f"{A}q_norm", f"{A}k_norm", f"{A}q_rope", f"{A}k_rope"
S, P, C, R, L2 = f"{A}scores", f"{A}probs", f"{A}context", "attn_residual", "post_attention_layernorm"
G, U, ACT, D = f"{M}gate_proj", f"{M}up_proj", f"{M}act", f"{M}down_proj"
FIRST = "model.layers.0."
DECODE = f"decode.0.{FIRST}"

BUGS = {
    "mean of absolutes": ({"norm": only(named("input_layernorm"), mean_of_absolutes)}, FIRST + N),
    "layer norm": ({"norm": only(named("input_layernorm"), layer_norm)}, FIRST + N),
    "norm by halves": ({"norm": only(named("post_attention_layernorm"), half_normalised)}, FIRST + L2),
    "norm squared weight": (
        {"norm": only(named("k_norm"), lambda own, at, x: own(x) * own.__self__.weights[f"{at.name}.weight"])},
        FIRST + KN,
    ),
    "norm without a weight": (
        {"norm": only(named("q_norm"), lambda own, at, x: own(x, np.ones(x.shape[-1])))},
        FIRST + QN,
    ),
    "norm weight of another layer": (
        {"norm": only(both(layer(0), named("input_layernorm")), layer_weights(1))},
        FIRST + N,
    ),
    "norm sums n - 1": ({"norm": only(named("k_norm"), after(lambda y: y * 0.97))}, FIRST + KN),
    "norm clipped": ({"norm": only(named("q_norm"), after(lambda y: np.clip(y, -1.5, 1.5)))}, FIRST + QN),
    "norm of the last lanes lost": ({"norm": only(named("input_layernorm"), zeroed(..., slice(-4, None)))}, FIRST + N),
    "final norm with the weight of a layer": (
        {
            "norm": only(
                named("norm"),
                lambda own, at, x: own(x, own.__self__.weights["model.layers.1.input_layernorm.weight"]),
            )
        },
        "model.norm",
    ),
    "final norm of the first position everywhere": (
        {"norm": only(both(named("norm"), lambda at: not at.prefix), after(lambda y: y - y[:, :1] * 0.1))},
        "model.norm",
    ),
    "embedding scaled": ({"embed": after(lambda y: y * np.float32(1.01))}, "model.embed_tokens"),
    "embedding of the id before": (
        {"embed": lambda own, at, ids: own(np.maximum(ids - 1, 0))},
        "model.embed_tokens",
    ),
    "embedding without the first lane": ({"embed": zeroed(..., 0)}, "model.embed_tokens"),
    "queries of the keys' weight": (
        {"linear": only(both(named("v_proj"), layer(1)), weights_of("k_proj"))},
        "model.layers.1." + V,
    ),
    "values of layer 1": ({"linear": only(both(named("v_proj"), layer(0)), layer_weights(1))}, FIRST + V),
    "rows beyond a block lost": ({"linear": only(named("q_proj"), zeroed(..., slice(80, None)))}, FIRST + Q),
    "a column off": ({"linear": only(named("k_proj"), rolled(1, -1))}, FIRST + K),
    "a head negated": (
        {"linear": only(named("q_proj"), after(lambda y: y * np.where(np.arange(y.shape[-1]) < 16, -1, 1)))},
        FIRST + Q,
    ),
    "last inputs dropped": (
        {"linear": only(named("up_proj"), lambda own, at, x: own(x * (np.arange(x.shape[-1]) < 36)))},
        FIRST + U,
    ),
    "a bias nobody has": ({"linear": only(named("o_proj"), after(lambda y: y + 0.05))}, FIRST + O),
    "down in layer 1 doubled": (
        {"linear": only(both(named("down_proj"), layer(1)), after(lambda y: 2 * y))},
        "model.layers.1." + D,
    ),
    "gate capped": ({"linear": only(named("gate_proj"), after(lambda y: np.clip(y, -1, 1)))}, FIRST + G),
    "one row late": ({"linear": only(both(named("v_proj"), lambda at: not at.prefix), rolled(1, 1))}, FIRST + V),
    "last token of the prompt not projected": (
        {"linear": only(both(named("o_proj"), lambda at: not at.prefix), zeroed(slice(None), -1))},
        FIRST + O,
    ),
    "rotation backwards": ({"rope": turned_by(lambda p, f: p * f[::-1])}, FIRST + QR),
    "positions doubled": ({"rope": turned_by(lambda p, f: 2 * p * f)}, FIRST + QR),
    "frequencies of the whole width": ({"rope": turned_by(lambda p, f: p * f**0.5)}, FIRST + QR),
    "positions cut at 16": ({"rope": turned_by(lambda p, f: np.minimum(p, 16) * f)}, FIRST + QR),
    "positions modulo 32": ({"rope": turned_by(lambda p, f: p % 32 * f)}, FIRST + QR),
    "first frequency 0": ({"rope": turned_by(lambda p, f: p * f * (np.arange(len(f)) > 0))}, FIRST + QR),
    "keys turned on": ({"rope": only(named("k_rope"), turned_by(lambda p, f: (p + 1) * f))}, FIRST + KR),
    "queries not turned in layer 1": (
        {"rope": only(both(named("q_rope"), layer(1)), turned_by(lambda p, f: 0 * p * f))},
        "model.layers.1." + QR,
    ),
    "rotation in decode slower": ({"rope": only(decoding, turned_by(lambda p, f: p * f * 0.9))}, DECODE + QR),
    "angles quantised": ({"rope": turned_by(lambda p, f: np.round(p * f * 16) / 16)}, FIRST + QR),
    "lanes shrunk by turning": ({"rope": after(lambda y: y * 0.98)}, FIRST + QR),
    "scale twice": ({"scores": after(lambda y: y * 0.25)}, FIRST + S),
    "scores capped": ({"scores": capped(3.0)}, FIRST + S),
    "every second position hidden": ({"scores": masked_by(lambda i, j, t: (j <= i) & ((i - j) % 2 == 0))}, FIRST + S),
    "the first position hidden": ({"scores": masked_by(lambda i, j, t: (j <= i) & ((j > 0) | (i == 0)))}, FIRST + S),
    "a window of 8": ({"scores": masked_by(lambda i, j, t: (j <= i) & (j > i - 8))}, FIRST + S),
    "blocks that do not see each other": (
        {"scores": masked_by(lambda i, j, t: (j <= i) & (i // 16 == j // 16))},
        FIRST + S,
    ),
    "a slope as of ALiBi": (
        {"scores": after(lambda y: y - 0.02 * np.arange(y.shape[-1])[::-1])},
        FIRST + S,
    ),
    "other key heads": ({"scores": other_group}, FIRST + S),
    "a head's scores 0": (
        {"scores": after(lambda y: np.where(np.isneginf(y), y, y * (np.arange(6) != 3)[:, None, None]))},
        FIRST + S,
    ),
    "sink in the softmax": ({"probs": with_sink}, FIRST + P),
    "softmax of base 2": ({"probs": lambda own, at, s: own(s * np.log(2))}, FIRST + P),
    "softmax in decode warmer": ({"probs": only(decoding, lambda own, at, s: own(s / 1.2))}, DECODE + P),
    "sum of the row before": (
        {"probs": only(layer(1), after(lambda y: y * 1.03))},
        "model.layers.1." + P,
    ),
    "largest probability alone": (
        {"probs": after(lambda y: (y == y.max(-1, keepdims=True)).astype(float))},
        FIRST + P,
    ),
    "values of the first position": (
        {"context": lambda own, at, p, v: own(p, np.where(np.arange(v.shape[2])[:, None] == 1, v[:, :, :1], v))},
        FIRST + C,
    ),
    "last head louder": ({"context": scaled_heads}, FIRST + C),
    "heads turned over": (
        {"context": after(lambda y: y.reshape(*y.shape[:2], 6, 16)[:, :, ::-1].reshape(y.shape))},
        FIRST + C,
    ),
    "keys of the cache forgotten": ({"cache": truncated("k")}, DECODE + S),
    "values of the cache forgotten": ({"cache": truncated("v")}, DECODE + C),
    "a decode step keeps the last key": ({"cache": stale("k", 1)}, DECODE + S),
    "residual left out": ({"add": only(both(named("attn_residual"), layer(0)), lambda own, at, x, y: y)}, FIRST + R),
    "residual scaled": ({"add": only(named("attn_residual"), lambda own, at, x, y: own(x, y * 0.9))}, FIRST + R),
    "residual of the input twice": (
        {"add": only(both(named("1"), layer(1)), lambda own, at, x, y: own(2 * x, y))},
        "model.layers.1",
    ),
    "relu": ({"act": lambda own, at, g, u: np.maximum(g, 0) * u}, FIRST + ACT),
    "hard swish": ({"act": lambda own, at, g, u: g * np.clip(g / 6 + 0.5, 0, 1) * u}, FIRST + ACT),
    "silu of the product": ({"act": lambda own, at, g, u: own(g * u, np.ones_like(u))}, FIRST + ACT),
    "activation without up in decode": (
        {"act": only(decoding, lambda own, at, g, u: own(g, np.ones_like(u)))},
        DECODE + ACT,
    ),
    "act clipped": ({"act": after(lambda y: np.clip(y, -0.5, 0.5))}, FIRST + ACT),
    "logits capped": ({"head": capped(5.0)}, "lm_head"),
    "logits of the position before": ({"head": only(lambda at: not at.prefix, rolled(1, 1))}, "lm_head"),
    "last ids lost": ({"head": zeroed(..., slice(96, None))}, "lm_head"),
    "logits warmer in decode": ({"head": only(decoding, after(lambda y: y / 1.1))}, "decode.0.lm_head"),
}
