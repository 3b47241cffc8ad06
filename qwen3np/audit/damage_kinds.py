"""What if: a plain checkpoint quantised on the fly, and caches that keep fewer digits."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qwen3np.config import Config
from qwen3np.files.gguf_blocks import Blocks
from qwen3np.files.quantized import FP8, GPTQ
from qwen3np.numerics import Array
from qwen3np.ops.fast.threads import share
from qwen3np.porting.settings import SHORT, Short, by_head
from qwen3np.stored import FLOAT, Stored
from qwen3np.weights import Weights

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
KINDS = (*GGUF, "fp8", "int8")
CACHES = {"float16": "float16", "q8_0": "8 bits in blocks of 32", "fp8": "float8 (e4m3)"}  # -> names in SHORT
_BLOCK = 128  # rows and inputs that share a scale in Qwen's FP8 releases


def is_router(name: str) -> bool:
    """Whether a tensor chooses experts: no format quantises those."""
    return name.endswith(".mlp.gate.weight")


def what_if(weights: Weights, kind: str) -> dict[str, Array]:
    """Return these weights with every matrix, except routers, quantised.

    The ggml project's own package (`pip install "qwen3np[gguf]"`) quantises to GGUF kinds. fp8 is e4m3 with a scale for
    each block of 128 x 128, as in Qwen's releases; int8 has a scale for each row, the output channel. Nothing is
    calibrated: each number becomes its nearest code. Raises ValueError for unknown kinds, and for rows that the blocks
    of a kind do not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"what_if={kind!r} is unknown; known: {', '.join(KINDS)} (K-quants: llama-quantize, --model)")
    found = dict(weights)
    names = [name for name, w in weights.items() if w.ndim == 2 and not is_router(name)]

    def quantise(name: str) -> None:
        w = weights[name].astype(FLOAT)
        try:
            found[name] = quantised_matrix(w, kind)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    share(names, sum(weights[name].size for name in names), quantise)
    return found


def quantised_matrix(w: Array, kind: str) -> Stored:
    """Return a float32 matrix (out, in) in this kind."""
    if kind == "fp8":
        return _fp8(w)
    if kind == "int8":
        return _int8(w)
    try:
        import gguf
    except ImportError:
        raise ValueError(f'{kind} needs the gguf package: pip install "qwen3np[gguf]"') from None
    number = gguf.GGMLQuantizationType[kind.upper()]
    if w.shape[1] % 32:
        raise ValueError(f"rows of {w.shape[1]} numbers cannot be cut into blocks of 32, which {kind} needs")
    return Blocks(w.shape, gguf.quants.quantize(w, number), int(number))  # pyright: ignore[reportArgumentType]


def _fp8(w: Array) -> FP8:
    """Return w in e4m3: each block's largest number becomes 448, the largest of e4m3."""
    out, columns = w.shape
    padded = np.zeros((-(-out // _BLOCK) * _BLOCK, -(-columns // _BLOCK) * _BLOCK), FLOAT)
    padded[:out, :columns] = w
    blocks = padded.reshape(padded.shape[0] // _BLOCK, _BLOCK, -1, _BLOCK)
    scales = np.abs(blocks).max((1, 3)) / FLOAT.type(448)
    blocks /= np.where(scales > 0, scales, 1)[:, None, :, None]
    codes = padded[:out, :columns].astype(ml_dtypes.float8_e4m3fn)
    return FP8.of(codes, scales, (_BLOCK, _BLOCK))


def _int8(w: Array) -> GPTQ:
    """Return w as whole numbers from -127 to 127 times a scale for each row."""
    out, columns = w.shape
    if columns % 4 or out % 4:
        raise ValueError(f"int8 needs multiples of 4, not {out} x {columns}")
    scales = np.abs(w).max(1) / FLOAT.type(127)
    codes = np.rint(w / np.where(scales > 0, scales, 1)[:, None]) + 128
    words = np.ascontiguousarray(codes.astype(np.uint8)).view(np.int32).T
    zeros = np.full((1, out), 128, np.uint8).view(np.int32)
    return GPTQ(w.shape, words, zeros, scales[None], None, 8, 0, np.arange(out))  # pyright: ignore[reportArgumentType]


def short_caches(config: Config, kind: str) -> dict[str, Short]:
    """Return what happens to keys and values on their way into a cache of this kind: a function for each point.

    float16 and fp8 (e4m3 without a scale, at most 448) round each number; q8_0 keeps 8 bits in blocks of 32. Raises
    ValueError for unknown kinds.
    """
    if kind not in CACHES:
        raise ValueError(f"kv={kind!r} is unknown; known: {', '.join(CACHES)}")

    def short(x: Array) -> Array:
        return SHORT[CACHES[kind]](np.clip(x, -448, 448) if kind == "fp8" else x)  # the largest of e4m3

    def values(x: Array) -> Array:  # (B, S, K * Dh)
        return by_head(short, x, config.head_dim)

    found: dict[str, Short] = {}
    for layer in range(config.num_hidden_layers):
        found[f"model.layers.{layer}.self_attn.k_rope"] = short
        found[f"model.layers.{layer}.self_attn.v_proj"] = values
    return found
