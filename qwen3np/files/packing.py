"""The tensors of a quantised checkpoint -> matrices under the names of the model.

The format follows from the names, bits and groups from the shapes; quantization_config, if given, must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from qwen3np.config import Config
from qwen3np.errors import CheckpointError
from qwen3np.files.quantized import AWQ, FP8, GPTQ, MLX, unpacked_columns
from qwen3np.numerics import Array
from qwen3np.stored import Stored

_FLOATS = ("float16", "bfloat16", "float32")
# Tensor names of bitsandbytes and other formats, none of which Qwen publishes.
_FOREIGN = {
    "quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    "quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    "SCB": "bitsandbytes int8",
    "weight_packed": "compressed-tensors in packed integers",
    "weight_format": "bitsandbytes int8",
    "trellis": "EXL3",
    "q_weight": "EXL2",
    "W_q": "HQQ",
    "_data": "quanto",
    "weight._data": "quanto",
}
# (hidden_size, num_hidden_layers) -> the official repository.
_OFFICIAL = {
    (1024, 28): "Qwen/Qwen3-0.6B",
    (2048, 28): "Qwen/Qwen3-1.7B",
    (2560, 36): "Qwen/Qwen3-4B",
    (4096, 36): "Qwen/Qwen3-8B",
    (5120, 40): "Qwen/Qwen3-14B",
    (5120, 64): "Qwen/Qwen3-32B",
    (2048, 48): "Qwen/Qwen3-30B-A3B",
    (4096, 94): "Qwen/Qwen3-235B-A22B",
}


def packed(
    found: Mapping[str, Array | None], shapes: Mapping[str, tuple[int, ...]], config: Config, settings: object
) -> tuple[dict[str, Array | Stored | None], list[str]]:
    """Return the tensors with each quantised matrix combined into one Stored, and a list of problems.

    `settings` is the quantization_config. None represents a tensor in an unreadable file. Raises CheckpointError for an
    unsupported format: one line that names it and what to use instead.
    """
    given = _settings(settings)
    _refuse_foreign(found, config, given)
    tensors: dict[str, Array | Stored | None] = dict(found)
    problems: list[str] = []
    for name, shape in shapes.items():
        prefix = name.removesuffix("weight")
        parts = {part: tensors.pop(prefix + part) for part in _PARTS if prefix + part in tensors}
        if not parts:
            continue
        if name in tensors:
            parts["weight"] = tensors[name]
        if any(tensor is None for tensor in parts.values()):
            tensors[name] = None
            continue
        try:
            tensors[name] = _matrix(cast("dict[str, Array]", parts), cast("tuple[int, int]", shape), given)
        except ValueError as error:
            problems.append(f"{name.removesuffix('.weight')}: {error}")
            tensors[name] = None
    return tensors, problems


# Tensors next to a weight, or in its place.
_PARTS = ("weight_scale_inv", "weight_scale", "weight_zero_point", "scales", "biases", "qweight", "qzeros", "g_idx")


def _settings(settings: object) -> dict[str, Any]:
    return cast("dict[str, Any]", settings) if isinstance(settings, dict) else {}


def _refuse_foreign(found: Mapping[str, object], config: Config, given: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an unsupported format."""
    for end, what in _FOREIGN.items():
        if any(name.endswith(f".{end}") for name in found):
            official = _OFFICIAL.get((config.hidden_size, config.num_hidden_layers))
            use = (
                f"{official}, {official}-FP8 or a GGUF file of it" if official else "the model in bfloat16, FP8 or GGUF"
            )
            raise CheckpointError(f"its weights are quantised by {what}, which is not supported: use {use}")
    if given.get("quant_method") == "awq" and any(name.endswith(".qweight") for name in found):
        version = given.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise CheckpointError(f"AWQ version {version!r} is not supported; supported: gemm")


def _matrix(parts: Mapping[str, Array], shape: tuple[int, int], given: Mapping[str, Any]) -> Stored:
    """Return the matrix that these parts form. Raises ValueError if they do not fit together."""
    if "qweight" in parts:
        return _awq_or_gptq(parts, shape, given)
    if "weight" not in parts:
        raise ValueError(f"has {' and '.join(parts)}, but no weight")
    weight = parts["weight"]
    if "scales" in parts:
        return _mlx(parts, shape, given)
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    if scale is None or weight.dtype.name != "float8_e4m3fn":
        raise ValueError(f"a weight of {weight.dtype} with {' and '.join(set(parts) - {'weight'})} is not supported")
    if "weight_zero_point" in parts:
        raise ValueError("FP8 with zero points is not supported")
    _require("weight", weight, shape)
    if scale.dtype.name not in _FLOATS:
        raise ValueError(f"scales of {scale.dtype}; supported: {', '.join(_FLOATS)}")
    rows, columns = _block(given) if "weight_scale_inv" in parts else _block_of(scale, shape)
    lines = (-(-shape[0] // rows), -(-shape[1] // columns))
    _require("scales", scale.reshape(lines) if scale.size == 1 else scale, lines)
    return FP8.of(weight, scale.reshape(lines), (rows, columns))


def _block(given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and inputs of a block of FP8."""
    block = given.get("weight_block_size") or [128, 128]
    sizes = cast("list[Any]", block) if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in sizes):
        raise ValueError(
            f"weight_block_size = {block!r} is not supported; supported: lists of two sizes, such as [128, 128]"
        )
    return sizes[0], sizes[1]


def _block_of(scale: Array, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the block size of compressed-tensors' FP8 from its scales: a row, the whole matrix, or 128 x 128."""
    if scale.size == 1:
        return shape
    return (1, shape[1]) if scale.shape == (shape[0], 1) else (128, 128)


def _awq_or_gptq(parts: Mapping[str, Array], shape: tuple[int, int], given: Mapping[str, Any]) -> Stored:
    """Return an AWQ or GPTQ matrix: AWQ packs the outputs into words of 32 bits, GPTQ the inputs."""
    if missing := [part for part in ("qzeros", "scales") if part not in parts]:
        raise ValueError(f"has a qweight, but no {' and no '.join(missing)}")
    words, zeros, scales, (out, inputs) = parts["qweight"], parts["qzeros"], parts["scales"], shape
    for name in ("qweight", "qzeros"):
        if parts[name].dtype != np.int32 or parts[name].ndim != 2:
            raise ValueError(f"{name} of {parts[name].dtype} {parts[name].shape}; supported: int32 matrices")
    if scales.dtype.name not in _FLOATS or scales.ndim != 2 or scales.shape[1] != out:
        raise ValueError(f"scales of {scales.dtype} {scales.shape}, where (groups, {out}) floats are needed")
    groups = len(scales)
    if not groups or inputs % groups:
        raise ValueError(f"{groups} groups do not divide its {inputs} inputs")
    _agree(given, "group_size", inputs // groups, also=(-1,) if groups == 1 else ())
    if words.shape == (inputs, out // 8) or given.get("quant_method") == "awq":
        if out % 8:
            raise ValueError(f"AWQ needs a multiple of 8 outputs, not {out}")
        _require("qweight", words, (inputs, out // 8))
        _require("qzeros", zeros, (groups, out // 8))
        _agree(given, "bits", 4)
        return AWQ(shape, words, zeros, scales)
    bits = 32 * len(words) // inputs
    if bits not in (4, 8) or out * bits % 32:
        raise ValueError(f"qweight {words.shape} is neither GPTQ with 4 or 8 bits nor AWQ for {shape}")
    _require("qweight", words, (inputs * bits // 32, out))
    _require("qzeros", zeros, (groups, out * bits // 32))
    _agree(given, "bits", bits)
    less = 0 if given.get("checkpoint_format") == "gptq_v2" else 1
    if less and (unpacked_columns(zeros, bits, np.arange(out)) == 2**bits - 1).any():
        raise ValueError(f"zeros out of range: one more than {2**bits - 1} does not fit into {bits} bits")
    group = parts.get("g_idx")
    if group is not None:
        if group.shape != (inputs,) or group.dtype.kind not in "iu":
            raise ValueError(f"g_idx of {group.dtype} {group.shape}, where ({inputs},) whole numbers are needed")
        if not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise ValueError(f"g_idx names groups from {group.min()} to {group.max()}; there are {groups}")
        if np.array_equal(group, np.arange(inputs) // (inputs // groups)):
            group = None
    return GPTQ(shape, words, zeros, scales, group, bits, less, np.arange(out))


def _mlx(parts: Mapping[str, Array], shape: tuple[int, int], given: Mapping[str, Any]) -> MLX:
    words, scales, (out, inputs) = parts["weight"], parts["scales"], shape
    biases = parts.get("biases")
    if words.dtype != np.uint32 or words.ndim != 2:
        raise ValueError(f"MLX words of {words.dtype} {words.shape}; supported: uint32 matrices")
    if biases is None or any(x.dtype.name not in _FLOATS or x.ndim != 2 for x in (scales, biases)):
        raise ValueError("MLX needs scales and biases, matrices of floats")
    bits = 32 * words.shape[1] // inputs
    if bits not in (4, 8):
        raise ValueError(f"MLX with {32 * words.shape[1] / inputs:g} bits is not supported; supported: 4 and 8")
    groups = scales.shape[1]
    if not groups or inputs % groups:
        raise ValueError(f"{groups} groups do not divide its {inputs} inputs")
    _require("weight", words, (out, inputs * bits // 32))
    _require("scales", scales, (out, groups))
    _require("biases", biases, (out, groups))
    return MLX(shape, words, scales, biases, bits)


def _agree(given: Mapping[str, Any], key: str, value: int, also: tuple[int, ...] = ()) -> None:
    """Raise ValueError if quantization_config contradicts the shapes."""
    if given.get(key) is not None and given[key] not in (value, *also):
        raise ValueError(f"its shapes imply {key} {value}, but quantization_config says {given[key]!r}")


def _require(what: str, tensor: Array, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{what} has shape {tensor.shape}, but must have {shape}")
