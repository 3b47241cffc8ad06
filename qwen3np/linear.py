"""y = x Wᵀ + b: the matrix product behind every projection."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np

from qwen3np.numerics import BFLOAT16, FLOAT32, Array, Numerics
from qwen3np.threads import num_threads, share

# Rows of W in one product of several rows of x. A BLAS rounds differently beside the edges of a product, so they are
# the same for every way to store W and every number of threads.
TILE = 256
# Elements of stored weights that are upcast at a time: few enough to be applied while they are in the cache.
BLOCK_ELEMENTS = 1 << 19


def linear(x: Array, w: Array, bias: Array | None = None, numerics: Numerics = FLOAT32) -> Array:
    """Return R(x Wᵀ + b), accumulated in float32 (float64). x (..., in), w (out, in), bias (out,) -> (..., out).

    The layout of torch.nn.Linear: a row of W for each output. W is used where it lies, mapped or in memory.
    """
    outputs, inputs = w.shape
    rows = np.ascontiguousarray(x.reshape(-1, inputs))
    y = np.empty((len(rows), outputs), numerics.dtype)
    if len(rows) == 1:  # dot products, four rows of W at a time: the same bits wherever they are cut between those
        step = -(-outputs // (4 * num_threads())) * 4
        block = step if w.dtype == numerics.storage == numerics.dtype else max(BLOCK_ELEMENTS // inputs // 4, 1) * 4
    else:
        step = block = TILE

    def pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
        """Cut into pieces of this size; a last piece of one row, which would have bits of its own, is joined."""
        edges = [*range(start, stop, size), stop]
        if len(edges) > 2 and edges[-1] - edges[-2] == 1:
            del edges[-2]
        return list(pairwise(edges))

    def apply(piece: tuple[int, int]) -> None:
        for a, b in pieces(*piece, block):
            # other layouts would not reach BLAS, or would have other bits
            part = np.require(_ready(w[a:b], numerics), None, ["C", "A"])
            np.matmul(rows, np.transpose(part), out=y[:, a:b])

    share(pieces(0, outputs, step), y.size * inputs, apply)
    if bias is not None:
        y += numerics.widen(bias)
    return numerics.round(y).reshape(*x.shape[:-1], outputs)


class _Scratch(threading.local):
    """Memory for what a thread upcasts, kept from call to call: to get it anew costs more than the upcast itself."""

    memory: Array = np.empty(0, np.uint8)


_scratch = _Scratch()


def _ready(w: Array, numerics: Numerics) -> Array:
    """Return numerics.widen(w), in this thread's scratch memory if it is an upcast: good until the next one."""
    if w.dtype == numerics.dtype or (numerics.rounds and w.dtype != BFLOAT16):
        return numerics.widen(w)
    size = w.size * numerics.dtype.itemsize
    if _scratch.memory.size < size:
        _scratch.memory = np.empty(size, np.uint8)
    upcast = _scratch.memory[:size].view(numerics.dtype).reshape(w.shape)
    np.copyto(upcast, w)
    return upcast
