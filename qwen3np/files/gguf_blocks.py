"""The quantised types of GGUF: rows of blocks, each with scales of its own, and the numbers that they stand for.

Q8_0 and Q4_K are unpacked here, with the same bits; the other types by the ggml project's own package
(`pip install "qwen3np[gguf]"`), whose source says what each block holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qwen3np.numerics import Array
from qwen3np.stored import FLOAT, Stored

Q8_0, Q4_K = 8, 12
OWN = {Q8_0: (32, 34, "Q8_0"), Q4_K: (256, 144, "Q4_K")}  # the numbers and the bytes of a block, and the name


@dataclass(frozen=True, eq=False)
class Blocks(Stored):
    """Rows of blocks (out, bytes of a row) uint8, of the GGML type `kind`."""

    data: Array
    kind: int

    @property
    def format(self) -> str:
        """The name of the type."""
        if self.kind in OWN:
            return OWN[self.kind][2]
        import gguf

        return gguf.GGMLQuantizationType(self.kind).name

    def _rows(self, which: slice | Array) -> Blocks:
        data = self.data[which]
        return replace(self, shape=(len(data), self.shape[1]), data=data)

    def _fill(self, out: Array) -> None:
        with np.errstate(all="ignore"):  # damaged scales are found as NonFiniteError
            if self.kind == Q8_0:
                _put_q8_0(np.ascontiguousarray(self.data).reshape(-1, 34), out.reshape(-1, 32))
            elif self.kind == Q4_K:
                _put_q4_k(np.ascontiguousarray(self.data).reshape(-1, 144), out.reshape(-1, 8, 32))
            else:
                import gguf

                kind = gguf.GGMLQuantizationType(self.kind)
                np.copyto(out, gguf.quants.dequantize(self.data, kind).reshape(self.shape))


def _put_q8_0(blocks: Array, out: Array) -> None:
    """Put the numbers of blocks (n, 34) into out (n, 32): w = scale q. A float16 scale, then int8 q."""
    np.copyto(out, blocks[:, 2:].view(np.int8))
    out *= blocks.view("<f2")[:, :1].astype(FLOAT)


def _put_q4_k(blocks: Array, out: Array) -> None:
    """Put the numbers of blocks (n, 144) into out (n, 8, 32): w = (d s) q - (dmin m), s and m for each group of 32.

    float16 d and dmin; s and m of 6 bits: the first four of each whole, the last four as 4 bits, with 2 more on top of
    the first ones; then q, the first group of a pair in the lower 4 bits of its bytes, the second in the upper ones.
    """
    factors = blocks.view("<f2")[:, :2].astype(FLOAT)
    s, m, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([s & 63, (last & 15) | ((s >> 2) & 48)], axis=1) * factors[:, :1]
    minima = np.concatenate([m & 63, (last >> 4) | ((m >> 2) & 48)], axis=1) * factors[:, 1:]
    codes, pairs = blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32)
    np.copyto(pairs[:, :, 0], codes & 15)
    np.copyto(pairs[:, :, 1], codes >> 4)
    out *= scales[:, :, None]
    out -= minima[:, :, None]


def block_of(kind: int) -> tuple[int, int]:
    """Return the numbers and bytes of a block. Raises ValueError for a type that nobody can read."""
    if kind in OWN:
        return OWN[kind][:2]
    try:
        import gguf
    except ImportError:
        raise ValueError(f'type {kind} needs the gguf package: pip install "qwen3np[gguf]"') from None
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(f"type {kind} is unknown; use a file in Q8_0, Q6_K, Q5_K, Q4_K, BF16 or F16") from None
    return block, size
