"""Config, weights and tokenizer -> a .gguf file, with the names and types of llama.cpp's own converter."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from qwen3np.config import Config
from qwen3np.errors import CheckpointError
from qwen3np.files.gguf import ARCHITECTURES, BF16, F16, F32, MAGIC, PLAIN, SIZES, gguf_name
from qwen3np.files.gguf_blocks import Q8_0
from qwen3np.files.writing import written_aside
from qwen3np.numerics import Array
from qwen3np.stored import FLOAT
from qwen3np.weights import Weights, weight_shapes

KINDS = {"F32": (F32, 0), "F16": (F16, 1), "BF16": (BF16, 32), "Q8_0": (Q8_0, 7)}  # the type, and general.file_type
_ALIGNMENT = 32
_PIECE = 1 << 22  # numbers written at a time
_FORMS = {str: 8, bool: 7, int: 4, float: 6}  # Python type -> type of a value: text, bool, uint32, float32
_ARRAY, _INT32 = 9, 5
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types
Value: TypeAlias = "str | bool | int | float | list[str] | list[int]"


def write_gguf(
    path: str | Path,
    config: Config,
    weights: Weights,
    tokenizer: Mapping[str, Any] | None = None,
    *,
    kind: str = "F16",
    name: str = "Qwen3",
    chat_template: str | None = None,
) -> None:
    """Write a .gguf file that llama.cpp reads, whole or not at all.

    tokenizer is the content of tokenizer.json. Matrices become `kind`; vectors and routers stay F32, and in a Q8_0 file
    matrices whose rows are not a multiple of 32 become F16. Raises ValueError for another kind, CheckpointError for
    settings that GGUF cannot express and for numbers that float16 cannot hold.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; known: {', '.join(KINDS)}")
    metadata = _metadata(path, config, kind, name)
    metadata |= {} if tokenizer is None else _vocabulary(tokenizer, config)
    metadata |= {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    tensors: dict[str, list[Array]] = {}  # the experts of a layer are one tensor
    for tensor in weight_shapes(config):
        tensors.setdefault(gguf_name(tensor)[0], []).append(weights[tensor])
    header = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset, kinds = 0, {}
    for tensor, arrays in tensors.items():
        shape = arrays[0].shape if len(arrays) == 1 and "_exps" not in tensor else (len(arrays), *arrays[0].shape)
        kinds[tensor] = _kind(tensor, shape, KINDS[kind][0])
        header += _text(tensor) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kinds[tensor], offset)
        size = (
            math.prod(shape) // 32 * 34 if kinds[tensor] == Q8_0 else math.prod(shape) * PLAIN[kinds[tensor]].itemsize
        )
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    try:
        with written_aside(path) as part, part.open("wb") as file:
            file.write(header)
            for tensor, arrays in tensors.items():
                _pad(file)
                for array in arrays:
                    for piece in _pieces(array):
                        file.write(_encoded(piece, kinds[tensor]))
            _pad(file)
            file.flush()
            os.fsync(file.fileno())
    except FloatingPointError:
        raise CheckpointError(f"{path}: not written: a weight is too large for {kind}") from None


def q8_0(x: Array) -> Array:
    """Return float32 numbers (..., 32 n) as Q8_0 blocks (..., n, 34) uint8: max|x| / 127, and whole numbers."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scales = np.max(np.abs(blocks), axis=-1, keepdims=True) / FLOAT.type(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales == 0, FLOAT.type(0), 1 / scales)
    with np.errstate(over="raise"):
        halves = scales.astype("<f2")
    q = blocks * inverse
    q = np.trunc(q + np.copysign(FLOAT.type(0.5), q)).astype(np.int8)  # halves away from 0
    return np.concatenate([halves.view(np.uint8), q.view(np.uint8)], axis=-1)


def _metadata(path: Path, config: Config, kind: str, name: str) -> dict[str, Value]:
    """Return the metadata that describes a config. Raises CheckpointError for settings that llama.cpp lacks."""
    only = {
        "sliding_window": (config.sliding_window, None),
        "norm_topk_prob": (config.norm_topk_prob or not config.num_experts, True),
        "rope_scaling.truncate": (config.rope_scaling is None or config.rope_scaling.truncate, True),
    }
    for key, (value, supported) in only.items():
        if value != supported:
            raise CheckpointError(f"{path}: not written: GGUF cannot express {key} = {value}")
    architecture = {model: name for name, model in ARCHITECTURES.items()}[
        "qwen3_moe" if config.num_experts else "qwen3"
    ]
    metadata: dict[str, Value] = {"general.architecture": architecture, "general.name": name}
    metadata |= {"general.file_type": KINDS[kind][1], "general.quantization_version": 2}
    for key, place in SIZES.items():
        if config.num_experts or "expert" not in place:
            value = getattr(config, key)
            metadata[f"{architecture}.{place}"] = float(value) if key in ("rope_theta", "rms_norm_eps") else value
    metadata[f"{architecture}.attention.value_length"] = config.head_dim
    if yarn := config.rope_scaling:
        usual = 1 + 0.1 * math.log(yarn.factor)
        if yarn.attention_factor is not None:
            attention = yarn.attention_factor
        elif yarn.mscale and yarn.mscale_all_dim:
            attention = (1 + 0.1 * yarn.mscale * math.log(yarn.factor)) / (
                1 + 0.1 * yarn.mscale_all_dim * math.log(yarn.factor)
            )
        else:
            attention = usual
        scaling: dict[str, Value] = {
            "type": "yarn",
            "factor": float(yarn.factor),
            "original_context_length": yarn.original_max_position_embeddings,
            "attn_factor": attention / usual,
            "yarn_beta_fast": float(yarn.beta_fast),
            "yarn_beta_slow": float(yarn.beta_slow),
        }
        metadata |= {f"{architecture}.rope.scaling.{key}": value for key, value in scaling.items()}
    return metadata


def _vocabulary(tokenizer: Mapping[str, Any], config: Config) -> dict[str, Value]:
    """Return the metadata that describes a byte-level BPE tokenizer."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts = {number: text for text, number in vocab.items()} | {n: token["content"] for n, token in added.items()}
    tokens = [texts.get(n, f"[PAD{n}]") for n in range(config.vocab_size)]
    types = [
        (_CONTROL if added[n]["special"] else _USER_DEFINED) if n in added else _NORMAL if n in texts else _UNUSED
        for n in range(config.vocab_size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    if config.eos_token_id:
        metadata["tokenizer.ggml.eos_token_id"] = config.eos_token_id[0]
    return metadata


def _kind(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Return the type of a tensor in a file of this type, as llama.cpp's converter chooses it."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return F32
    return F16 if kind == Q8_0 and shape[-1] % 32 else kind


def _pieces(array: Array) -> Iterator[Array]:
    """Yield the rows of a weight as float32, some at a time."""
    step = max(_PIECE * len(array) // array.size, 1)
    for start in range(0, len(array), step):
        yield np.asarray(array[start : start + step], FLOAT)


def _encoded(piece: Array, kind: int) -> memoryview:
    """Return rows of float32 numbers as the bytes of this type."""
    with np.errstate(over="raise"):
        stored = q8_0(piece) if kind == Q8_0 else piece.astype(PLAIN[kind], copy=False)
    return np.ascontiguousarray(stored).view(np.uint8).data


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """Return a value of the metadata, after its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        if not value or isinstance(value[0], str):  # an empty one is that of merges
            texts = b"".join(_text(str(text)) for text in value)
            return struct.pack("<IIQ", _ARRAY, _FORMS[str], len(value)) + texts
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    form = {bool: "<I?", int: "<II", float: "<If"}[type(value)]
    return struct.pack(form, _FORMS[type(value)], value)
