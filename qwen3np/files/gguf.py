"""A .gguf file -> config, weights and metadata: mapped, with quantised matrices decoded block by block.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. F32, F16, BF16 and Q8_0 are read here, the other
types by the ggml project's own package (`pip install "qwen3np[gguf]"`).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import lfs_pointer
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.stored import FLOAT, Stored
from qwen3np.weights import LoadedWeights, identity, weight_shapes

MAGIC = b"GGUF"
MOST_BYTES = 1 << 26  # of the metadata; a vocabulary of 151,936 tokens takes 6 million
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
PLAIN: dict[int, np.dtype[Any]] = {F32: FLOAT, F16: np.dtype("<f2"), BF16: BFLOAT16}
ARCHITECTURES = {"qwen3": "qwen3", "qwen3moe": "qwen3_moe"}  # -> model_type
# The name of each tensor in the file.
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
# Config key -> metadata key, after the architecture's name.
SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
Tensor: TypeAlias = tuple[Array | Stored, tuple[int, ...]]  # a matrix (or a vector), and the shape in the file
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, eq=False)
class Blocks(Stored):
    """Rows of blocks (out, bytes per row) uint8, each block with its own scales, of the GGML type `kind`."""

    data: Array
    kind: int

    @property
    def format(self) -> str:
        """The name of the type."""
        if self.kind == Q8_0:
            return "Q8_0"
        import gguf

        return gguf.GGMLQuantizationType(self.kind).name

    def _rows(self, which: slice | Array) -> Blocks:
        data = self.data[which]
        return replace(self, shape=(len(data), self.shape[1]), data=data)

    def _fill(self, out: Array) -> None:
        if self.kind != Q8_0:
            import gguf

            kind = gguf.GGMLQuantizationType(self.kind)
            with np.errstate(all="ignore"):  # damaged scales are found as NonFiniteError
                np.copyto(out, gguf.quants.dequantize(self.data, kind).reshape(self.shape))
            return
        blocks = np.ascontiguousarray(self.data).reshape(-1, 34)  # a float16 scale, then 32 whole numbers
        groups = out.reshape(-1, 32)
        np.copyto(groups, blocks[:, 2:].view(np.int8))
        groups *= np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(FLOAT)


def read_gguf(path: str | Path) -> tuple[Config, LoadedWeights, dict[str, Any]]:
    """Return config, mapped weights and metadata of a .gguf file, or of all files of a split one.

    Raises CheckpointError for an unusable file: one line that says what is wrong with it; ConfigError for missing or
    unsupported sizes.
    """
    first, metadata, weights = Path(path), dict[str, Any](), dict[str, Array]()
    stored: dict[str, Tensor] = {}
    identities: dict[Path, tuple[int, int, int]] = {}
    for file in _shards(first):
        found, tensors = _map_file(file)
        identities[file.absolute()] = identity(file)
        if twice := stored.keys() & tensors.keys():
            raise CheckpointError(f"{file}: {min(twice)} is also in another file")
        stored |= tensors
        metadata = metadata or found  # the first file has all of it
    config = _config(first, metadata, stored)
    used: set[str] = set()
    for name, shape in weight_shapes(config).items():
        place, expert = gguf_name(name)
        if place not in stored:
            raise CheckpointError(f"{first}: {place}: missing")
        (tensor, given), wanted = stored[place], shape if expert is None else (config.num_experts, *shape)
        if given != wanted:
            raise CheckpointError(f"{first}: {place}: shape {given}, but its metadata requires {wanted}")
        weights[name] = cast("Array", tensor if expert is None else tensor[expert * shape[0] : (expert + 1) * shape[0]])
        used.add(place)
    if left := sorted(stored.keys() - used):
        raise CheckpointError(f"{first}: {left[0]}: extra: this model has no such tensor ({len(left)} of them)")
    return config, LoadedWeights(weights, identities), metadata


def gguf_name(name: str) -> tuple[str, int | None]:
    """Return the place of a tensor in a GGUF file: the name there, and the index of the expert."""
    if name in OUTSIDE:
        return OUTSIDE[name], None
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    if module.startswith("mlp.experts."):
        _, _, expert, module = module.split(".")
        return f"blk.{layer}.{EXPERTS[module]}.{kind}", int(expert)
    return f"blk.{layer}.{MODULES[module]}.{kind}", None


def _shards(path: Path) -> Iterator[Path]:
    """Yield all files of a split model, or just this file."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        yield path
        return
    count = int(split[3])
    if not 1 <= count <= 1000:
        raise CheckpointError(f"{path}: its name says that it is split over {count} files")
    for n in range(1, count + 1):
        file = path.with_name(f"{split[1]}-{n:05}-of-{split[3]}.gguf")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {path.name} is one of {count} files: put them into one folder")
        yield file


def _map_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the mapped tensors of one file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if pointer := lfs_pointer(path):
                raise CheckpointError(f"{path}: {pointer}")
            if file.read(4) != MAGIC:
                raise CheckpointError(
                    f"{path}: not a GGUF file{'; it is empty: download it again' if not size else ''}"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    reader = _Reader(mapped)
    try:
        version, tensors, entries = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; supported: 2 and 3 (little-endian)")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = reader.text()
            metadata[key] = reader.value(reader.number("<I"))
        places = [reader.tensor() for _ in range(tensors)]
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: its header is damaged or cut off: {error}") from None
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment = {alignment!r} is not supported; supported: 8 to 2^20")
    start = -(-reader.at // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, kind, offset in places:
        if name in found:
            raise CheckpointError(f"{path}: {name} is stored twice")
        try:
            found[name] = _mapped(mapped, shape, kind, start + offset), shape
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    return metadata, found


def _mapped(file: mmap.mmap, shape: tuple[int, ...], kind: int, offset: int) -> Array | Stored:
    """Return a tensor of the file, flattened to a matrix if it has more dimensions. ValueError if impossible."""
    if kind in PLAIN:
        block, size = 1, PLAIN[kind].itemsize
    else:
        block, size = (32, 34) if kind == Q8_0 else _block(kind)
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} numbers are not made of blocks of {block}")
    count = math.prod(shape) // block * size
    if not 0 < count <= len(file) - offset:
        raise ValueError(f"truncated: the file has {len(file)} bytes of at least {offset + count}; download it again")
    lines = math.prod(shape[:-1])
    if kind in PLAIN:
        return np.ndarray(shape if len(shape) == 1 else (lines, shape[-1]), PLAIN[kind], file, offset)
    data = np.ndarray((lines, count // lines), np.uint8, file, offset)
    return Blocks((lines, shape[-1]), data, kind)


def _block(kind: int) -> tuple[int, int]:
    """Return how many numbers and bytes a block has. Raises ValueError for a type that cannot be read."""
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


class _Reader:
    """Reads the values of a header one by one. Raises ValueError or struct.error for anything malformed."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def number(self, form: str) -> Any:
        """Return the next number."""
        [value] = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        if self.at > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes of metadata")
        return value

    def text(self) -> str:
        """Return the next text."""
        length = self.number("<Q")
        start, self.at = self.at, self.at + length
        if self.at > min(len(self.data), MOST_BYTES):
            raise ValueError(f"a text of {length} bytes")
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """Return the next value of metadata, of this type."""
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if count > MOST_BYTES or kind not in (_TEXT, *_NUMBERS):
            raise ValueError(f"an array of {count} values of type {kind}")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        form = np.dtype(_NUMBERS[kind])
        start, self.at = self.at, self.at + count * form.itemsize
        if self.at > min(len(self.data), MOST_BYTES):
            raise ValueError(f"an array of {count} numbers")
        return np.ndarray(count, form, self.data, start).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor."""
        name, dimensions = self.text(), self.number("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")


def _config(path: Path, metadata: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Config:
    """Return the config that the metadata and the names of the tensors describe."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: its architecture is {architecture!r}; supported: {known} (text models)")

    def given(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        # the shortest number that is this float32: 1e-06 is stored as 9.999999974752427e-07
        return float(str(np.float32(value))) if isinstance(value, float) else value

    embedding = stored.get("token_embd.weight")
    d = {key: given(name) for key, name in SIZES.items()}
    layers = d["num_hidden_layers"] if type(d["num_hidden_layers"]) is int else 0
    d |= {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": embedding[1][0] if embedding else None,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "tie_word_embeddings": "output.weight" not in stored,
        "eos_token_id": stop_ids(metadata),
        "norm_topk_prob": True,  # llama.cpp always normalises
        "mlp_only_layers": [n for n in range(min(layers, 1000)) if f"blk.{n}.ffn_gate.weight" in stored],
    }
    if given("rope.scaling.type") not in (None, "none"):
        factor, original = given("rope.scaling.factor"), given("rope.scaling.original_context_length")
        d["rope_scaling"] = {"type": given("rope.scaling.type"), "factor": factor}
        d["rope_scaling"] |= {} if original is None else {"original_max_position_embeddings": original}
        attention = given("rope.scaling.attn_factor")
        if attention is not None and isinstance(factor, (int, float)) and factor > 0:
            d["rope_scaling"]["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    try:
        return Config.from_dict(d)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None


def generation_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a generation_config.json: the stop ids, and sampling settings if the file has any."""
    keys = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {key: metadata.get(f"general.sampling.{name}") for key, name in keys.items()}
    sampling = {key: value for key, value in found.items() if value is not None}
    stops = stop_ids(metadata)
    return ({"do_sample": True, **sampling} if sampling else {}) | ({"eos_token_id": stops} if stops else {})


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids that end an answer: those named in the metadata, and <|im_end|> and <|endoftext|>."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(kinds, list):
        texts = cast("list[Any]", tokens)
        for text in ("<|im_end|>", "<|endoftext|>"):
            if text in texts and texts.index(text) < len(kinds) and kinds[texts.index(text)] == 3:
                named.append(texts.index(text))
    return list(dict.fromkeys(token for token in named if type(token) is int))
