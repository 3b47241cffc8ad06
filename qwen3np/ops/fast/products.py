"""y = x Wᵀ + b: the matrix products behind every projection, the MLP and the head.

The formula is one line; the rest cuts it into blocks that stay in the processor's cache and go to the threads, always
at the same places, so that neither the number of threads nor the storage of the weights changes a bit (how a BLAS
multiplies one block: Goto and van de Geijn, 2008, https://doi.org/10.1145/1356052.1356053).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

from qwen3np.memory import aligned
from qwen3np.numerics import BFLOAT16, Array, Numerics
from qwen3np.ops.fast.threads import blas_limit, blas_threads, cuts_keep_bits, share, threads_for
from qwen3np.qwen3 import Scope
from qwen3np.stored import Stored, put

# At or below this many rows of x, use one matrix-vector product per row: a matrix product would first copy W into an
# order of its own, which costs more than these rows do.
FEW_ROWS = 8
# Rows of W that all of these rows are multiplied by while they are in the cache.
NEAR = 64
# Rows of x and of W in one product of many rows. A BLAS rounds differently next to the edges of a product, so they are
# the same for every storage of W and every number of threads.
TILE_ROWS, TILE_OUTPUTS = 512, 256
# Up to this many rows of x, (W xᵀ)ᵀ is faster than x Wᵀ: by up to 1.4 times with OpenBLAS's AVX-512 kernels.
SHORT_ROWS = 64
# Elements of W that are upcast at a time for a few rows, which are multiplied by them while they are in the cache.
BLOCK_ELEMENTS = 1 << 18


def linear(x: Array, m: Scope, names: Sequence[str], num: Numerics, bias: bool = False) -> list[Array]:
    """Return R(x Wᵀ + b) for each name, as the points of these names. x (..., in), W (out, in) -> (..., out)."""
    ys = products(x, [(m[f"{name}.weight"], m[f"{name}.bias"] if bias else None) for name in names], num)
    return [m.out(name, y) for name, y in zip(names, ys, strict=True)]


def head(x: Array, w: Array, num: Numerics) -> Array:
    """Return R(x wᵀ). x (..., D), w (V, D) -> (..., V)."""
    with blas_threads(threads_for(w.size) if x.size == x.shape[-1] else 1):
        return products(x, [(w, None)], num)[0]


def products(x: Array, layers: Sequence[tuple[Array, Array | None]], num: Numerics) -> list[Array]:
    """Return R(x Wᵀ + b) for each (W, b), accumulated in num.dtype. They start together, which saves waiting.

    x (..., in), W (out, in) as in torch.nn.Linear, used where it lies, mapped or in memory; b (out,) or None.
    """
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    ws = [w for w, _ in layers]
    threads = threads_for(sum([w.size for w in ws]))
    whole = len(rows) == 1 and (threads == 1 or blas_limit() != 1) and cuts_keep_bits()
    if whole and all(is_ready(w, num) for w in ws):
        ys = _dot_products(rows[0], ws, threads)
    elif len(rows) <= FEW_ROWS:
        ys = _few_products(rows, ws, num, threads)
    else:
        ys = _tile_products(rows, ws, num)
    found: list[Array] = []
    for y, (w, bias) in zip(ys, layers, strict=True):
        if bias is not None:
            y += num.widen(bias)
        found.append(num.round(y).reshape(*x.shape[:-1], len(w)))
    return found


def is_ready(w: Array, num: Numerics) -> bool:
    """Whether BLAS can use W in place, without an upcast, rounding or a copy."""
    if isinstance(w, Stored) or not w.dtype == num.dtype == num.storage:
        return False
    flags = w.flags
    return flags.c_contiguous and flags.aligned


def _dot_products(x: Array, ws: Sequence[Array], threads: int) -> list[Array]:
    """Return W x (out,) for each W. Memory is the limit, and BLAS's own threads start fastest.

    OpenBLAS gives each thread an equal part of the rows. As long as the parts are multiples of four, the bits stay the
    same.
    """

    def apply(w: Array) -> Array:
        cut = len(w) if threads == 1 else _multiple(len(w), 4 * threads)
        if cut == len(w):
            return w.dot(x)  # less overhead than w @ x, which matters in small models
        return np.concatenate([w[:cut].dot(x), *[w[a:b].dot(x) for a, b in _pieces(cut, len(w), 4)]])

    with blas_threads(threads):
        return [apply(w) for w in ws]


def _few_products(rows: Array, ws: Sequence[Array], num: Numerics, threads: int) -> list[Array]:
    """Return rows Wᵀ (N, out) for each W, block by block on all threads."""
    ys = [np.empty((len(rows), len(w)), num.dtype) for w in ws]

    def apply(block: tuple[Array, Array]) -> None:
        w, y = block
        _few_rows(rows, _block(w, num), y)

    blocks: list[tuple[Array, Array]] = []
    for w, y in zip(ws, ys, strict=True):
        each = -(-len(w) // (NEAR * threads)) if is_ready(w, num) else BLOCK_ELEMENTS // (NEAR * w.shape[1])
        step = max(each, 1) * NEAR
        blocks += [(w[a:b], y[:, a:b]) for a, b in _pieces(0, len(w), step)]
    share(blocks, len(rows) * sum(w.size for w in ws), apply)
    return ys


def _tile_products(rows: Array, ws: Sequence[Array], num: Numerics) -> list[Array]:
    """Return rows Wᵀ (N, out) for each W, tile by tile on all threads."""
    ys = [np.empty((len(rows), len(w)), num.dtype) for w in ws]

    def apply(tile: tuple[int, tuple[int, int], tuple[int, int]]) -> None:
        n, (start, stop), (a, b) = tile
        x, w, y = rows[start:stop], _block(ws[n][a:b], num), ys[n][start:stop, a:b]
        if len(x) <= SHORT_ROWS:
            y[:] = (w @ x.T).T
        else:
            np.matmul(x, w.T, out=y)

    tiles = [
        (n, *tile)
        for n, w in enumerate(ws)
        for tile in product(_pieces(0, len(rows), TILE_ROWS), _pieces(0, len(w), TILE_OUTPUTS))
    ]
    share(tiles, len(rows) * sum(w.size for w in ws), apply)
    return ys


def _block(w: Array, num: Numerics) -> Array:
    """Return num.widen(w) as BLAS takes it: other layouts would not reach it, or give other bits."""
    ready = _ready(w, num)
    kept = ready.flags.c_contiguous and ready.flags.aligned
    return ready if kept else np.require(ready, None, ["C", "A"])


def _few_rows(x: Array, w: Array, y: Array) -> None:
    """Write x Wᵀ to y, one row of x at a time: dot products, with the bits of a single row."""
    if len(x) == 1 and cuts_keep_bits():
        np.dot(w, x[0], out=y[0])
        return
    cut = _multiple(len(w), NEAR)
    for start, stop, near in ((0, cut, NEAR), (cut, len(w), len(w) - cut)):
        if start < stop:
            blocks = w[start:stop].reshape(-1, 1, near, w.shape[1])
            products = np.matmul(blocks, x[:, :, None])  # (blocks, N, near, 1)
            y[:, start:stop] = products.swapaxes(0, 1).reshape(len(y), stop - start)


def _multiple(length: int, size: int) -> int:
    """Return the largest multiple of size that does not leave a remainder of 1.

    BLAS handles single rows with another kernel, whose rounding differs.
    """
    return max(length - 2, 0) // size * size if length % size == 1 else length // size * size


def _pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut start to stop into pieces of this size; a last piece of 1 joins the one before it, see _multiple."""
    edges = [*range(start, stop, size), stop]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return list(pairwise(edges))


class _Scratch(threading.local):
    """Memory for the tiles a thread upcasts, kept between calls: allocating it again costs more than the upcast."""

    memory: Array = np.empty(0, np.uint8)


_scratch = _Scratch()


def _ready(w: Array, num: Numerics) -> Array:
    """Return num.widen(w), if an upcast in this thread's scratch memory, valid until the next one."""
    stored = type(w) is not np.ndarray and isinstance(w, Stored)  # the second takes a microsecond
    if not stored and (w.dtype == num.dtype or (num.rounds and w.dtype != BFLOAT16)):
        return num.widen(w)
    size = w.size * num.dtype.itemsize
    if _scratch.memory.size < size:
        _scratch.memory = aligned((size,), np.uint8)
    upcast = _scratch.memory[:size].view(num.dtype).reshape(w.shape)
    put(w, upcast)
    return num.round(upcast) if stored else upcast
