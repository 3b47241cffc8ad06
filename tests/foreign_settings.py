"""What a port's author may choose, for `foreign.Foreign`: operations replaced, or weights kept with fewer digits."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def kept(dtype):
    """Keep numbers in a type."""
    return lambda x: x.astype(dtype).astype(np.float32)


def quantised(size, bits=8, scale=np.float16):
    """Keep integers in groups of the last axis (0: the whole of it), each with a scale."""

    def short(x):
        x = x.astype(np.float32)
        width = size or x.shape[-1]
        y = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % width)])
        y = y.reshape(*x.shape[:-1], -1, width)
        most = 2 ** (bits - 1) - 1
        step = (np.abs(y).max(-1, keepdims=True) / most).astype(scale).astype(np.float32)
        y = np.rint(y / np.where(step > 0, step, 1)) * step
        return y.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(np.float32)

    return short


def tf32(x):
    """Keep ten binary digits behind the first, by adding half of the last place to the bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> 13) & 1
    return ((bits + 0xFFF + odd) & 0xFFFFE000).view(np.float32)


half, brain = kept(np.float16), kept(ml_dtypes.bfloat16)


def cache(short):
    return {"cache": lambda own, at, kind, old, new: own(kind, old, short(new))}


def norms(short):
    return {"norm": lambda own, at, *x: short(own(*x))}


def inputs(short):
    """Multiply rounded inputs by the weights that there are."""
    return {
        "linear": lambda own, at, x, *w: own(short(x), *w),
        "head": lambda own, at, x: own(short(x)),
    }


def activations(short):
    """Keep in 16 bits what products and the activation give."""

    def linear(own, at, x, *w):
        return short(own(x, *w))

    return {
        "linear": linear,
        "act": lambda own, at, g, u: short(own(g, u)),
        "context": lambda own, at, p, v: short(own(p, v)),
    }


def attention(short):
    """Cast q, k and v for a kernel that keeps scores in float32, and probabilities and its result in 16 bits."""
    return {
        "scores": lambda own, at, q, k, v: own(short(q), short(k), v),
        "probs": lambda own, at, s: short(own(s)),
        "context": lambda own, at, p, v: short(own(p, short(v))),
    }


def autocast(short):
    """Take and give 16 bits in every product, as torch.autocast does."""

    def product(own, at, x, *w):
        return short(own(short(x), *w))

    def scores(own, at, q, k, v):
        return short(own(short(q), short(k), v))

    def context(own, at, p, v):
        return short(own(short(p), short(v)))

    return {"linear": product, "head": product, "scores": scores, "context": context}


def same(x):
    return x


# name (as compare says it) -> (what is replaced, how matrices are kept, how the embedding is kept)
SETTINGS = {
    "KV cache in float16": (cache(half), same, same),
    "KV cache in bfloat16": (cache(brain), same, same),
    "KV cache in 8 bits, one scale for each head": (cache(quantised(0, scale=np.float32)), same, same),
    "KV cache in 8 bits in blocks of 32": (cache(quantised(32)), same, same),
    "KV cache in float8 (e4m3)": (cache(kept(ml_dtypes.float8_e4m3fn)), same, same),
    "norms in bfloat16": (norms(brain), same, same),
    "norms in float16": (norms(half), same, same),
    "attention in bfloat16": (attention(brain), same, same),
    "activations in bfloat16": (activations(brain), same, same),
    "activations in float16": (activations(half), same, same),
    "inputs quantised to 8 bits in groups of 64": (inputs(quantised(64, scale=np.float32)), same, same),
    "inputs quantised to 8 bits with a scale for each row": (inputs(quantised(0, scale=np.float32)), same, same),
    "weights quantised to 8 bits in groups of 32": ({}, quantised(32), quantised(32)),
    "weights quantised to 8 bits in groups of 32, embedding not": ({}, quantised(32), same),
    "weights and inputs quantised to 8 bits in groups of 64": (
        inputs(quantised(64, scale=np.float32)),
        quantised(64, scale=np.float32),
        quantised(64, scale=np.float32),
    ),
    "weights quantised to 4 bits in groups of 32": ({}, quantised(32, 4), quantised(32, 4)),
    "weights in float8 (e4m3)": ({}, kept(ml_dtypes.float8_e4m3fn), kept(ml_dtypes.float8_e4m3fn)),
    "matrix products in TF32 or float16": (inputs(tf32), tf32, same),
    "matrix products in bfloat16": (inputs(brain), brain, same),
}


def chosen(setting, weights):
    """Return what is replaced, and the weights."""
    replaced, matrices, embedding = SETTINGS[setting]
    own = {}
    for name, w in weights.items():
        short = same if w.ndim < 2 else embedding if "embed_tokens" in name else matrices
        own[name] = w if short is same else short(w.astype(np.float32))
    return replaced, own
