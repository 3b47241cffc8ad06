"""What a port's author may choose: numbers kept or multiplied with fewer digits than the rest.

A setting introduces an error, but is not a bug. Like a bug, each one is a change of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from qwen3np.numerics import BFLOAT16, Array
from qwen3np.ops.fast.threads import rowwise
from qwen3np.porting.changes import Bug, Change, not_normalised
from qwen3np.porting.points import Place

Short = Callable[[Array], Array]  # an array as it is kept


def typed(dtype: Any) -> Short:
    """Keep numbers in a type."""
    few = np.dtype(dtype).itemsize == 1  # looking those up takes a tenth of the time of astype
    table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) if few else np.empty(0)

    def short(x: Array) -> Array:
        with np.errstate(over="ignore"):
            kept = x.astype(dtype)
        return (table[kept.view(np.uint8)] if few else kept).astype(x.dtype, copy=False)

    return short


def mantissa(bits: int) -> Short:
    """Keep a number of binary digits after the first; TF32 keeps 10."""

    def short(x: Array) -> Array:
        fraction, exponent = np.frexp(x)
        return np.ldexp(np.round(fraction * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent).astype(x.dtype)

    return short


def blocks(size: int, bits: int, scale: Any = np.float32) -> Short:
    """Keep integers of blocks along the last axis, with one scale each; size 0: of the whole axis."""
    most = 2 ** (bits - 1) - 1

    def short(x: Array) -> Array:
        length = x.shape[-1]
        width = size or length
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % width)])
        parts = padded.reshape(*x.shape[:-1], -1, width)
        step = (np.abs(parts).max(-1, keepdims=True) / most).astype(scale).astype(x.dtype)
        kept = np.round(parts / np.where(step > 0, step, 1)) * step
        return kept.reshape(padded.shape)[..., :length].astype(x.dtype)

    return short


SHORT: dict[str, Short] = {
    "float16": typed(np.float16),
    "bfloat16": typed(BFLOAT16),
    "8 bits in blocks of 32": blocks(32, 8, np.float16),
    "8 bits, one scale for each head": blocks(0, 8),
    "8 bits, one float16 scale for each head": blocks(0, 8, np.float16),
    "float8 (e4m3)": typed(ml_dtypes.float8_e4m3fn),
    "float8 (e5m2)": typed(ml_dtypes.float8_e5m2),
    "4 bits in blocks of 32": blocks(32, 4, np.float16),
}


def by_head(short: Short, x: Array, head_dim: int) -> Array:
    """Shorten values (B, T, K * Dh) head by head."""
    return short(x.reshape(*x.shape[:2], -1, head_dim)).reshape(x.shape)


def cached(short: Short) -> dict[str, Change]:
    """Keep keys and values in the cache with fewer digits."""

    def scores(run: Change, at: Place, q: Array, k: Array) -> Array:
        return run(at, q, short(k))

    def context(run: Change, at: Place, probs: Array, v: Array) -> Array:
        return run(at, probs, by_head(short, v, at.config.head_dim))

    return {"self_attn.scores": scores, "self_attn.context": context}


def results(short: Short) -> Change:
    """Keep what a formula gives with fewer digits."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        return short(run(at, *x))

    return change


def _given(short: Short, at: Place, x: tuple[Array, ...]) -> list[Array]:
    """Shorten what a product is given; of experts the states alone, not their choice and their weights."""
    return [y if i and at.name.endswith("experts") else short(y) for i, y in enumerate(x)]


def inputs(short: Short) -> Change:
    """Give a formula numbers with fewer digits."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        return run(at, *_given(short, at, x))

    return change


def short_norm(twice: bool) -> Change:
    """Normalise numbers of bfloat16: only the result is rounded, or the input and the normalised numbers as well."""
    short = typed(BFLOAT16)

    def change(run: Change, at: Place, x: Array) -> Array:
        if not twice:
            return short(run(at, x))
        rows = not_normalised(run, at, short(x))
        y = short(rows / np.sqrt(np.square(rows).mean(-1, keepdims=True) + rows.dtype.type(at.config.rms_norm_eps)))
        return short(y * at.numerics.widen(at.weight))

    return change


@dataclass(frozen=True)
class _Shortened(Mapping[str, Array]):
    """Weights, of which matrices are kept with fewer digits: made when they are asked for, and not kept."""

    weights: Mapping[str, Array]
    short: Short

    def __getitem__(self, name: str) -> Array:
        w = self.weights[name]
        return w if w.ndim < 2 else self.short(w.astype(np.float32))

    def __iter__(self):
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def weighed(short: Short, with_inputs: Short | None = None) -> Change:
    """Multiply by matrices, and perhaps inputs, that are kept with fewer digits."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        weights = _Shortened(at.weights, short)
        if with_inputs is not None:
            return run(replace(at, weights=weights), *_given(with_inputs, at, x))
        return run(replace(at, weights=weights), *x)

    return change


def kernel(short: Short) -> Change:
    """Multiply with fewer digits, and keep the product so, as a kernel that takes and gives 16 bits."""
    product = weighed(short, short)

    def change(run: Change, at: Place, *x: Array) -> Array:
        return short(product(run, at, *x))

    return change


PRODUCTS, HEAD = "[ms]*_proj", "lm_head"
SPARSE = "mlp.gate", "mlp.router_weights", "mlp.experts"
DEQUANTISED = "record from the dequantised weights, and only other errors remain"
TF32, HALF, BRAIN = mantissa(10), typed(np.float16), typed(BFLOAT16)


def _products(change: Change, attention: Change | None = None) -> dict[str, Change]:
    """Change every matrix product, of experts too."""
    of = dict.fromkeys((PRODUCTS, "mlp.gate", "mlp.experts", HEAD), change)
    return of | ({} if attention is None else {"self_attn.scores": attention, "self_attn.context": attention})


def _caches() -> list[Bug]:
    return [Bug(f"KV cache in {name}", cached(of), f"the type of the cache: {name}") for name, of in SHORT.items()]


def _layers() -> list[Bug]:
    within = ("*norm", "*_proj", "*_rope", "*.scores", "*.probs", "*.context", "*residual", "mlp.act", "output")
    return [
        Bug(f"layers in {name}", dict.fromkeys((*within, *SPARSE), results(short)), f"some layers are kept in {name}")
        for name, short in {"bfloat16": BRAIN, "float16": HALF}.items()
    ]


def _others() -> list[Bug]:
    found = list[Bug]()
    for name in ("float16", "bfloat16", "8 bits in blocks of 32"):
        for what, (point, change) in zip(("keys", "values"), cached(SHORT[name]).items(), strict=True):
            found.append(Bug(f"{what} cached in {name}", {point: change}, f"the type of the cache: {name}"))
    look = "rms_norm gives bfloat16, whatever the port computes in"
    found += [Bug("norms in bfloat16", {"*norm": short_norm(twice)}, look) for twice in (False, True)]
    found.append(Bug("norms in float16", {"*norm": results(HALF)}, "rms_norm gives float16"))
    for name, short in {"bfloat16": BRAIN, "float16": HALF}.items():
        changes = {point: results(short) for point in ("*_proj", "mlp.act", "*.context", "mlp.experts")}
        found.append(Bug(f"activations in {name}", changes, f"results of matrix products kept in {name}"))
        residual: dict[str, Change] = dict.fromkeys(("attn_residual", "output"), results(short))
        found.append(Bug(f"residual stream in {name}", residual, f"sums of the residual stream kept in {name}"))
        found.append(Bug(f"rotated heads in {name}", {"*_rope": results(short)}, f"rotated q and k kept in {name}"))
        found.append(Bug(f"logits in {name}", {HEAD: results(short)}, f"logits kept in {name}"))
        found.append(Bug(f"probabilities in {name}", {"*.probs": results(short)}, f"softmax gives {name}"))
    for name, short in {"bfloat16": BRAIN, "TF32 or float16": TF32}.items():
        look = "inputs of matrix products are rounded: allow_tf32, or its like"
        for attention in (None, inputs(short)):
            found.append(Bug(f"matrix products in {name}", _products(weighed(short, short), attention), look))
    for name, short in {"bfloat16": BRAIN, "float16": HALF}.items():
        look = f"torch.autocast, or its like: matrix products take and give {name}"
        found.append(Bug(f"autocast to {name}", _products(kernel(short), kernel(short)), look))
        after: dict[str, Change] = {"self_attn.context": kernel(short), "*.probs": results(short)}
        for scores in (kernel(short), inputs(short)):  # flash attention keeps scores in float32
            look = f"q, k and v are cast to {name} for attention"
            found.append(Bug(f"attention in {name}", {"self_attn.scores": scores, **after}, look))
    inner = (PRODUCTS, "mlp.gate", "mlp.experts")

    def weights_kept(name: str, short: Short, with_inputs: Short | None, look: str) -> list[Bug]:
        """Return a setting of all matrices, of all but the embedding, and of those within the layers."""
        short = partial(rowwise, short)
        change = weighed(short, with_inputs)
        plain = weighed(short)
        within: dict[str, Change] = dict.fromkeys(inner, change)
        without: dict[str, Change] = within | {HEAD: change}
        whole: dict[str, Change] = without | {"model.embed_tokens": plain}
        return [Bug(name, changes, look) for changes in (whole, without, within)]

    for size in (32, 64, 0):
        name = f"in groups of {size}" if size else "with a scale for each row"
        for scale in (np.float32, np.float16):
            short = blocks(size, 8, scale)
            changes = _products(inputs(short))
            found.append(Bug(f"inputs quantised to 8 bits {name}", changes, "the reference has the same weights"))
            found += weights_kept(f"weights quantised to 8 bits {name}", short, None, DEQUANTISED)
            found += weights_kept(f"weights and inputs quantised to 8 bits {name}", short, short, "as qwen3.c does")
    for name, short in {"bfloat16": BRAIN, "float16": HALF, "float8 (e4m3)": typed(ml_dtypes.float8_e4m3fn)}.items():
        found += weights_kept(f"weights in {name}", short, None, DEQUANTISED)
    for scale in (np.float32, np.float16):
        found += weights_kept("weights quantised to 4 bits in groups of 32", blocks(32, 4, scale), None, DEQUANTISED)
    for bits in (8, 4):  # of the head, or of head and embedding alone, as GGUF files have them
        change = weighed(blocks(32, bits, np.float16))
        for points in ((HEAD,), (HEAD, "model.embed_tokens")):
            name = f"weights quantised to {bits} bits in groups of 32"
            found.append(Bug(name, dict.fromkeys(points, change), DEQUANTISED))
    return found


CACHES, LAYERS = tuple(_caches()), tuple(_layers())
SETTINGS = (*CACHES, *_others(), *LAYERS)
