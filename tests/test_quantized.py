"""Stored formats, against the formula of each in integers and float32, and against their own packers."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.files.quantized import AWQ, FP8, GPTQ, MLX
from qwen3np.numerics import named
from qwen3np.stored import Stored

SEEDS = st.integers(0, 2**32 - 1)
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which column of a word its nth 4 bits hold (AutoAWQ, awq/utils/packing_utils.py)


def packed(q, bits, axis):
    """Pack whole numbers along an axis into 32-bit words, one number at a time, the lowest bits first."""
    per, q = 32 // bits, np.moveaxis(q, axis, -1).astype(np.int64)
    words = sum(q[..., n::per] << (bits * n) for n in range(per))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def fp8(rng, out=None, columns=None, block=(128, 128), nan=True):
    out, columns = out or int(rng.integers(1, 300)), columns or int(rng.integers(1, 300))
    codes = rng.integers(0, 256, (out, columns), dtype=np.uint8)
    if not nan:
        codes[codes & 127 == 127] = 0
    scales = rng.random((-(-out // block[0]), -(-columns // block[1]))).astype(rng.choice([np.float32, np.float16]))
    truth = np.empty((out, columns), np.float32)
    for i, j in np.ndindex(out, columns):  # one at a time, by ml_dtypes' own cast
        code = np.float32(codes[i : i + 1, j].view(ml_dtypes.float8_e4m3fn)[0])
        truth[i, j] = code * np.float32(scales[i // block[0], j // block[1]])
    return FP8.of(codes.view(ml_dtypes.float8_e4m3fn), scales, block), truth


def mlx(rng):
    bits, out, groups = int(rng.choice([4, 8])), int(rng.integers(1, 20)), int(rng.integers(1, 4))
    q = rng.integers(0, 2**bits, (out, groups * 64))
    scales, biases = (rng.standard_normal((out, groups)).astype(ml_dtypes.bfloat16) for _ in "sb")
    s, b = (np.repeat(x.astype(np.float32), 64, axis=1) for x in (scales, biases))
    return MLX(q.shape, packed(q, bits, 1).view(np.uint32), scales, biases, bits), q.astype(np.float32) * s + b


def gptq(rng):
    bits, out, groups = int(rng.choice([4, 8])), 8 * int(rng.integers(1, 6)), int(rng.integers(1, 4))
    less, q = int(rng.integers(0, 2)), rng.integers(0, 2**bits, (groups * 32, out))
    zeros, scales = rng.integers(1, 2**bits, (groups, out)), rng.standard_normal((groups, out)).astype(np.float16)
    order = np.arange(groups * 32) // 32
    group = rng.permutation(order).astype(np.int32) if rng.random() < 0.5 else None
    g = order if group is None else group
    truth = ((q - zeros[g]).astype(np.float32) * scales.astype(np.float32)[g]).T
    stored = packed(q, bits, 0), packed(zeros - less, bits, 1), scales
    return GPTQ(truth.shape, *stored, group, bits, less, np.arange(out)), truth


def awq(rng):
    out, groups = 8 * int(rng.integers(1, 6)), int(rng.integers(1, 4))
    q, zeros = rng.integers(0, 16, (groups * 32, out)), rng.integers(0, 16, (groups, out))
    scales = rng.standard_normal((groups, out)).astype(np.float16)
    g = np.arange(groups * 32) // 32
    truth = ((q - zeros[g]).astype(np.float32) * scales.astype(np.float32)[g]).T
    inside = [8 * word + column for word in range(out // 8) for column in ORDER]
    return AWQ(truth.shape, packed(q[:, inside], 4, 1), packed(zeros[:, inside], 4, 1), scales), truth


@pytest.mark.parametrize("make", [fp8, mlx, gptq, awq])
@given(seed=SEEDS)
def test_each_format_gives_the_numbers_of_its_formula(make, seed):
    rng = np.random.default_rng(seed)
    w, truth = make(rng)
    assert isinstance(w, Stored)
    assert (w.shape, w.ndim, w.size, len(w), w.dtype) == (truth.shape, 2, truth.size, len(truth), np.float32)
    np.testing.assert_array_equal(np.asarray(w), truth)
    np.testing.assert_array_equal(w.T, truth.T)
    np.testing.assert_array_equal(w.astype(np.float64), truth.astype(np.float64))
    a, b = sorted(rng.integers(0, len(truth) + 1, 2).tolist())
    part = w[a:b]
    assert isinstance(part, Stored)
    np.testing.assert_array_equal(np.asarray(part), truth[a:b])
    c, d = sorted(rng.integers(0, b - a + 1, 2).tolist())
    np.testing.assert_array_equal(np.asarray(part[c:d]), truth[a:b][c:d])
    ids = rng.integers(-len(truth), len(truth), (2, 3))
    np.testing.assert_array_equal(w[ids], truth[ids])
    np.testing.assert_array_equal(w[ids[0, 0]], truth[ids[0, 0]])
    np.testing.assert_array_equal(w[::-2], truth[::-2])
    np.testing.assert_array_equal(w[:, 0], truth[:, 0])
    with pytest.raises(IndexError, match="out of range"):
        w[[len(truth)]]


@given(SEEDS, st.sampled_from([1e-45, 1e-39, 1.0, 127.9, 128.0, 1e4, 3e38, np.inf, np.nan]))
def test_fp8_with_any_scale_and_code(seed, scale):
    """NaN, the smallest numbers and large scales take another way: every code, times scales of any size."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(256).astype(np.uint8)[None]
    for nan in (0x7F, 0xFF):
        if rng.random() < 0.5:
            codes[codes == nan] = 1
    codes = codes.view(ml_dtypes.float8_e4m3fn)
    with np.errstate(all="ignore"):
        truth = codes.astype(np.float32) * np.float32(scale)
        found = np.asarray(FP8.of(codes, np.full((1, 2), scale, np.float32), (128, 128)))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.oracle  # torch can set this
def test_fp8_in_a_process_that_flushes_subnormal_numbers():
    torch = pytest.importorskip("torch")
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)[None]
    truth = codes.astype(np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        found = np.asarray(FP8.of(codes, np.ones((1, 1), np.float32), (1, 127)))
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found, truth)


def test_a_scale_for_each_row_or_for_all():
    rng = np.random.default_rng(0)
    for block in ((1, 64), (50, 64)):
        w, truth = fp8(rng, 50, 64, block)
        np.testing.assert_array_equal(np.asarray(w), truth)


def test_it_stays_as_small_as_it_is_stored():
    w, _ = fp8(np.random.default_rng(0), 256, 256)
    assert w.nbytes <= 256 * 256 + 4 * 4 * 2
    assert w[10:20].nbytes < 256 * 11 + 16


@pytest.mark.parametrize("make", [partial(fp8, nan=False), mlx, gptq, awq])
@given(seed=SEEDS, numerics=st.sampled_from(["float32", "float64", "bfloat16"]), threads=st.integers(1, 4))
def test_products_have_the_bits_of_a_float32_copy(make, seed, numerics, threads):
    rng = np.random.default_rng(seed)
    w, truth = make(rng)
    for engine in ("fast", "plain"):
        num = named(numerics, engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QWEN3NP_NUM_THREADS", str(threads))
            block = int(rng.choice([1, 1 << 18]))  # 64 rows at a time, or all
            patch.setattr("qwen3np.ops.fast.products.BLOCK_ELEMENTS", block)
            for rows in (1, 3, 20):
                x = num.widen(rng.standard_normal((rows, truth.shape[1])).astype(np.float32))
                found = num.ops.head(x, w, num)
                np.testing.assert_array_equal(found, num.ops.head(x, np.ascontiguousarray(truth), num))
