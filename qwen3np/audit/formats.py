"""Formats of weights that an engine may load, made again from the plain ones."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np

from qwen3np.audit.damage_kinds import GGUF, quantised_matrix
from qwen3np.numerics import Array
from qwen3np.ops.fast.threads import rowwise
from qwen3np.porting.settings import Short, blocks, typed

COMMON = (  # formats that are tried on large models, in the layers alone
    "weights in fp8 (e4m3), a scale for each row",
    "weights in fp8 (e4m3), a scale for each block",
    "weights in int8",
    "weights in 8 bits in groups of 32",
    "weights in 4 bits in groups of 128",
)


def formats() -> dict[str, tuple[Short, Short | None]]:
    """Return formats of weights by name: how a matrix is kept, and its inputs (None: as they are)."""
    found: dict[str, tuple[Short, Short | None]] = {}
    row, tensor, q8 = partial(rowwise, scaled_e4m3((-1,))), scaled_e4m3((-2, -1)), partial(rowwise, q8_0)

    def grouped(size: int, bits: int) -> Short:
        return partial(rowwise, blocks(size, bits))

    found["weights in fp8 (e4m3) without a scale"] = partial(rowwise, typed(ml_dtypes.float8_e4m3fn)), None
    found["weights in fp8 (e4m3), a scale for each tensor"] = tensor, None
    found["weights in fp8 (e4m3), a scale for each row"] = row, None
    found["weights in fp8 (e4m3), a scale for each block of 128 x 128"] = _blocks_of_e4m3, None
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


def _blocks_of_e4m3(w: Array) -> Array:
    return quantised_matrix(w, "fp8").astype(np.float32)


def scaled_e4m3(axes: tuple[int, ...]) -> Short:
    """Keep numbers as e4m3 times a scale: the largest along these axes becomes 448."""

    def short(x: Array) -> Array:
        scale = np.abs(x).max(axes, keepdims=True) / np.float32(448)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    return short
