"""Formats of weights that an engine may load, made again from the plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import NormalDist

import ml_dtypes
import numpy as np

from qwen3np.audit.damage_kinds import GGUF, quantised_matrix
from qwen3np.numerics import Array
from qwen3np.ops.fast.threads import ELEMENT, rowwise, share
from qwen3np.porting.changes import Change
from qwen3np.porting.settings import HEAD, PRODUCTS, Short, blocks, typed, weighed

COMMON = (  # formats that are tried on large models, in the layers alone
    "weights in fp8 (e4m3), a scale for each row",
    "weights in fp8 (e4m3), a scale for each block",
    "weights in int8",
    "weights in 8 bits in groups of 32",
    "weights in 4 bits in groups of 128",
)
SQUARE = 128  # rows and inputs that share a scale in Qwen's FP8 releases


def formats() -> dict[str, tuple[Short, Short | None]]:
    """Return formats of weights by name: how a matrix is kept, and its inputs (None: as they are)."""
    found: dict[str, tuple[Short, Short | None]] = {}
    row, tensor, q8 = partial(rowwise, scaled_e4m3((-1,))), scaled_e4m3((-2, -1)), partial(rowwise, q8_0)

    def grouped(size: int, bits: int) -> Short:
        return partial(rowwise, blocks(size, bits))

    found["weights in fp8 (e4m3) without a scale"] = partial(rowwise, typed(ml_dtypes.float8_e4m3fn)), None
    found["weights in fp8 (e4m3), a scale for each tensor"] = tensor, None
    found["weights in fp8 (e4m3), a scale for each row"] = row, None
    found["weights in fp8 (e4m3), a scale for each block of 128 x 128"] = squares_of_e4m3, None
    found["weights and inputs in fp8 (e4m3), a scale for each tensor and token"] = tensor, row
    found["weights and inputs in fp8 (e4m3), a scale for each row and token"] = row, row
    found["weights in int8, a scale for each row"] = grouped(0, 8), None
    found["weights and inputs in int8, a scale for each row and token"] = grouped(0, 8), grouped(0, 8)
    found["weights in 8 bits in groups of 32 (Q8_0)"] = q8, None
    found["weights and inputs in 8 bits in groups of 32 (Q8_0, as llama.cpp multiplies)"] = q8, grouped(32, 8)
    for size in (64, 128):
        found[f"weights in 8 bits in groups of {size}"] = grouped(size, 8), None
    for size in (32, 64, 128):
        found[f"weights in 4 bits in groups of {size}"] = grouped(size, 4), None
    for size in (64, 128):
        name = f"weights in 4 bits in groups of {size} with zero points"
        found[name] = partial(rowwise, with_zero_points(size, 4)), None
    found["weights in NF4 in groups of 64 (bitsandbytes)"] = partial(rowwise, nf4), None
    for kind in GGUF:
        if kind != "q8_0":
            found[f"weights in {kind.upper()}"] = partial(_ggml, kind), None
    return found


def q8_0(w: Array) -> Array:
    """Keep 8 bits in blocks of 32, whose scales are rounded to float16 after the division; ties go to even."""
    parts = np.pad(w, [(0, 0), (0, -w.shape[1] % 32)]).reshape(len(w), -1, 32)
    scale = np.abs(parts).max(-1, keepdims=True) / np.float32(127)
    kept = np.round(parts / np.where(scale > 0, scale, 1)) * scale.astype(np.float16).astype(np.float32)
    return kept.reshape(len(w), -1)[:, : w.shape[1]]


def _ggml(kind: str, w: Array) -> Array:
    """Keep a matrix as ggml's own package quantises it. Raises ValueError where that cannot be."""
    try:
        return quantised_matrix(w, kind).astype(np.float32)
    except ValueError as error:
        raise Untried(str(error)) from None


class Untried(ValueError):
    """A hypothesis that cannot be run here."""


def places(short: Short, inputs: Short | None = None) -> Iterator[Mapping[str, Change]]:
    """Yield what is kept like this: all matrices, all but the embedding, those within the layers."""
    within: dict[str, Change] = dict.fromkeys((PRODUCTS, "mlp.experts"), weighed(short, inputs))
    heads: dict[str, Change] = within | {HEAD: weighed(short, inputs)}
    yield heads | {"model.embed_tokens": weighed(short)}
    yield heads
    yield within


def e4m3(x: Array) -> Array:
    """Round float32 numbers of at most 448 to e4m3, ties to even: it has 3 binary digits, and 2^-9 is its smallest.

    Next to 1.5 * 2^20 times their power of two the last place of float32 is e4m3's. ml_dtypes takes ten times as long.
    """
    power = np.maximum((x.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32), np.float32(2**-6))
    far = power * np.float32(1.5 * 2**20)
    return (x + far) - far


def scaled_e4m3(axes: tuple[int, ...]) -> Short:
    """Keep numbers as e4m3 times a scale: the largest along these axes becomes 448."""

    def short(x: Array) -> Array:
        scale = np.abs(x).max(axes, keepdims=True) / np.float32(448)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        return e4m3(x / scale) * scale

    return short


def squares_of_e4m3(w: Array) -> Array:
    """Keep a matrix as e4m3 with a scale for each block of SQUARE x SQUARE."""
    found, short = np.empty_like(w), scaled_e4m3((0, 2))

    def keep(start: int) -> None:
        rows = w[start : start + SQUARE]
        parts = np.pad(rows, [(0, 0), (0, -w.shape[1] % SQUARE)]).reshape(len(rows), -1, SQUARE)
        found[start : start + SQUARE] = short(parts).reshape(len(rows), -1)[:, : w.shape[1]]

    share(range(0, len(w), SQUARE), ELEMENT * w.size, keep)
    return found


def with_zero_points(size: int, bits: int) -> Short:
    """Keep whole numbers from 0 in groups, each with a scale in float16 and a zero point (AWQ, GPTQ uncalibrated)."""
    most = 2**bits - 1

    def short(w: Array) -> Array:
        parts = np.pad(w, [(0, 0), (0, -w.shape[1] % size)]).reshape(len(w), -1, size)
        low, high = np.minimum(parts.min(-1, keepdims=True), 0), np.maximum(parts.max(-1, keepdims=True), 0)
        scale = ((high - low) / most).astype(np.float16).astype(np.float32)
        scale = np.where(scale > 0, scale, 1)
        zero = np.rint(-low / scale)
        kept = (np.clip(np.rint(parts / scale) + zero, 0, most) - zero) * scale
        return kept.reshape(len(w), -1)[:, : w.shape[1]].astype(np.float32)

    return short


def _quantiles(count: int) -> list[float]:
    ends = np.linspace(0.9677083, 0.5, count + 1)[:-1]
    return [NormalDist().inv_cdf(p) for p in ends.tolist()]


# 16 quantiles of a normal distribution, over the largest (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314)
_NORMAL = np.array(sorted([*(-x for x in _quantiles(7)), 0, *_quantiles(8)]), np.float32)
NF4 = _NORMAL / _NORMAL.max()


def nf4(w: Array) -> Array:
    """Keep the nearest of NF4 times the largest of each 64 numbers."""
    parts = np.pad(w, [(0, 0), (0, -w.shape[1] % 64)]).reshape(len(w), -1, 64)
    scale = np.abs(parts).max(-1, keepdims=True)
    kept = NF4[np.searchsorted((NF4[1:] + NF4[:-1]) / 2, parts / np.where(scale > 0, scale, 1))] * scale
    return kept.reshape(len(w), -1)[:, : w.shape[1]]
