"""FP8, AWQ, GPTQ and MLX: how the published quantised checkpoints store a matrix, and how to decode it.

In all of them a group of inputs shares a scale. Transposed means that the file holds W as (in, out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import ml_dtypes
import numpy as np

from qwen3np.numerics import Array
from qwen3np.stored import FLOAT, Stored

# The value of each byte as e4m3 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433).
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(FLOAT)
_E4M3_UNIT = FLOAT.type(2.0**120)  # what _put_e4m3 divides by
_SUBNORMAL = 5e-324  # times 1.0 it is 0 in a thread that flushes subnormal numbers
# The two 4-bit numbers in each byte, the lower bits first, as one element of 8 bytes: one look-up finds both.
_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(FLOAT).view(np.uint64)[:, 0]
# AWQ's "gemm" order: which of its 8 columns each 4 bits of a word hold, the lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, eq=False)
class FP8(Stored):
    """w = float32(code) * float32(scale of its block). codes (out, in) float8_e4m3fn, scales (blocks, blocks of in)."""

    codes: Array
    scales: Array
    rows: range | Array  # which of the file's matrix these are
    block: tuple[int, int]  # rows and inputs of a block
    scaling: Callable[[], tuple[Array, bool]]  # see of

    @classmethod
    def of(cls, codes: Array, scales: Array, block: tuple[int, int]) -> FP8:
        """The matrix whose blocks have this many rows and inputs."""

        @cache  # a look at every code, the first time that one is decoded
        def scaling() -> tuple[Array, bool]:
            """Return the scales as float32, and whether _put_e4m3 can unpack all codes for them."""
            nan = codes.view(np.int8).max(initial=0) == 0x7F or codes.view(np.uint8).max(initial=0) == 0xFF
            found = scales.astype(FLOAT)
            return found, not nan and bool((np.abs(found) < 128).all())

        return cls(codes.shape, codes, scales, range(len(codes)), block, scaling)

    def _rows(self, which: slice | Array) -> FP8:
        codes = self.codes[which]
        rows = self.rows[which] if isinstance(which, slice) else np.asarray(self.rows)[which]
        return FP8(codes.shape, codes, self.scales, rows, self.block, self.scaling)

    def _fill(self, out: Array) -> None:
        scales, ordinary = self.scaling()
        (height, width), columns = self.block, self.shape[1]
        first, last = int(self.rows[0]) // height, int(self.rows[-1]) // height
        # in as few calls as possible: after each, threads wait for the GIL
        if isinstance(self.rows, range) and (first == last or len(out) == (last - first + 1) * height):
            scales, blocks = scales[first : last + 1], out.reshape(last - first + 1, -1, columns)
        else:
            scales, blocks = scales[np.asarray(self.rows) // height], out[:, None]
        if ordinary and _SUBNORMAL * 1.0:
            _put_e4m3(self.codes.view(np.int8), out)
            scales = scales * _E4M3_UNIT
        else:
            np.take(_E4M3, self.codes.view(np.uint8), out=out, mode="clip")
        if width < columns:
            scales = np.repeat(scales, width, axis=1)[:, :columns]
        blocks *= scales[:, None]


def _put_e4m3(codes: Array, out: Array) -> None:
    """Put 2^-120 times the numbers of e4m3 codes (n, in), seen as int8, into out.

    The bits seeeemmm of a code move to s0000eeeemmm000... of a float32, denormal codes included. This is three times as
    fast as a look-up in _E4M3, but not for NaN, scales from 128 (2^120 times them is infinite) and processes that flush
    denormal numbers to 0.
    """
    bits = out.view(np.int32)
    np.left_shift(codes, 20, out=bits, dtype=np.int32)
    np.bitwise_and(bits, np.int32(-0x80000000 | 0x07F00000), out=bits)


@dataclass(frozen=True, eq=False)
class MLX(Stored):
    """w = q * scale + bias. words (out, in * bits / 32) uint32, scales and biases (out, groups)."""

    words: Array
    scales: Array
    biases: Array
    bits: int

    @property
    def format(self) -> str:
        """The name of the format."""
        return f"MLX {self.bits}-bit"

    def _rows(self, which: slice | Array) -> MLX:
        words = self.words[which]
        shape = len(words), self.shape[1]
        return replace(self, shape=shape, words=words, scales=self.scales[which], biases=self.biases[which])

    def _fill(self, out: Array) -> None:
        _unpack(self.words, self.bits, out)
        groups = out.reshape(*self.scales.shape, -1)
        groups *= self.scales.astype(FLOAT)[:, :, None]
        groups += self.biases.astype(FLOAT)[:, :, None]


@dataclass(frozen=True, eq=False)
class GPTQ(Stored):
    """w = (q - zero) * scale. Transposed: words (in * bits / 32, out) int32, packed along the input.

    zeros (groups, out * bits / 32) int32, packed along the output and less by `less` (1 in the first version of the
    format); scales (groups, out); group (in,): the group of each input, or None if the groups are in order.
    """

    words: Array
    zeros: Array
    scales: Array
    group: Array | None
    bits: int
    less: int
    columns: Array  # (out,): the position of each row in zeros

    @property
    def format(self) -> str:
        """The name of the format."""
        return f"GPTQ {self.bits}-bit"

    def _rows(self, which: slice | Array) -> GPTQ:
        columns = self.columns[which]
        shape = len(columns), self.shape[1]
        return replace(self, shape=shape, words=self.words[:, which], scales=self.scales[:, which], columns=columns)

    def _fill(self, out: Array) -> None:
        _unpack(self.words.T, self.bits, out)
        zeros = unpacked_columns(self.zeros, self.bits, self.columns).T + self.less
        _apply(out, zeros, self.scales.T, self.group)


@dataclass(frozen=True, eq=False)
class AWQ(Stored):
    """w = (q - zero) * scale. Transposed: words (in, out / 8) int32, zeros (groups, out / 8), both in AWQ_ORDER."""

    words: Array
    zeros: Array
    scales: Array  # (groups, out)
    start: int = 0  # the first row, of 8 in the first word

    def _rows(self, which: slice | Array) -> Stored:
        if not isinstance(which, slice):
            return _Rows((len(which), self.shape[1]), self, which)
        start, stop, _ = which.indices(len(self))
        words = slice((self.start + start) // 8, -(-(self.start + stop) // 8))
        return replace(
            self,
            shape=(stop - start, self.shape[1]),
            words=self.words[:, words],
            zeros=self.zeros[:, words],
            scales=self.scales[:, start:stop],
            start=(self.start + start) % 8,
        )

    def _fill(self, out: Array) -> None:
        here = slice(self.start, self.start + len(self))
        whole = len(self) == 8 * self.words.shape[1]
        q = out if whole else np.empty((8 * self.words.shape[1], self.shape[1]), FLOAT)
        words = np.ascontiguousarray(self.words.T).view(np.uint32)  # (out / 8, in)
        for n, column in enumerate(AWQ_ORDER):
            np.copyto(q.reshape(-1, 8, self.shape[1])[:, column], (words >> (4 * n)) & 15)
        if not whole:
            np.copyto(out, q[here])
        columns = np.arange(8 * self.words.shape[1])[here]
        _apply(out, unpacked_columns(self.zeros, 4, columns, AWQ_ORDER).T, self.scales.T, None)


@dataclass(frozen=True, eq=False)
class _Rows(Stored):
    """Rows of a matrix in any order, for formats that store rows in blocks."""

    matrix: Stored
    which: Array

    def _rows(self, which: slice | Array) -> _Rows:
        rows = self.which[which]
        return replace(self, shape=(len(rows), self.shape[1]), which=rows)

    def _fill(self, out: Array) -> None:
        for n, row in enumerate(self.which.tolist()):
            self.matrix._rows(slice(row, row + 1))._fill(out[n : n + 1])


def unpacked_columns(words: Array, bits: int, columns: Array, order: tuple[int, ...] = ()) -> Array:
    """Return the numbers of these columns (N,) from rows of packed words (n, M), the lowest bits first: (n, N) int32.

    order gives the column of each number within a word, if they are not in order.
    """
    per = 32 // bits
    place = np.argsort(order) if order else np.arange(per)
    shifts = (bits * place[columns % per]).astype(np.uint32)
    return ((words.view(np.uint32)[:, columns // per] >> shifts) & ((1 << bits) - 1)).astype(np.int32)


def _unpack(words: Array, bits: int, out: Array) -> None:
    """Put the numbers of packed words (n, M), the lowest bits first, into out (n, 32 M / bits)."""
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        np.copyto(out, codes)
    else:
        np.take(_NIBBLES, codes, out=out.view(np.uint64), mode="clip")


def _apply(out: Array, zeros: Array, scales: Array, group: Array | None) -> None:
    """Turn q in out (n, in) into (q - zero) * scale; zeros and scales (n, groups)."""
    zeros, scales = zeros.astype(FLOAT), scales.astype(FLOAT)
    if group is None:
        groups = out.reshape(*scales.shape, -1)
        groups -= zeros[:, :, None]
        groups *= scales[:, :, None]
    else:
        out -= zeros[:, group]
        out *= scales[:, group]
