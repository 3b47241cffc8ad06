"""A PEFT LoRA folder -> the weights of its base model, with each adapted matrix W replaced by W + scale B A.

Hu et al., 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732. The files: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.folders import ADAPTER
from qwen3np.files.limits import check_links, read_json
from qwen3np.files.tensors import map_tensors
from qwen3np.numerics import Array
from qwen3np.stored import FLOAT, Stored, put
from qwen3np.weights import LoadedWeights, identity, weight_shapes

_WEIGHTS = "adapter_model.safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NAME = re.compile(r"(?:base_model\.model\.)?(.+?)\.(lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?")
# Adapters that change the weights in other ways; users can merge them with PEFT.
_OTHERS = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "arrow_config")


@dataclass(frozen=True, eq=False)
class LowRank(Stored):
    """W + scale B A: a matrix with the product of two small ones added. A (r, in), B (out, r)."""

    base: Array | Stored
    a: Array
    b: Array
    scale: float

    @property
    def format(self) -> str:
        """The rank, after the format of the matrix."""
        return f"LoRA of rank {len(self.a)}"

    def _rows(self, which: slice | Array) -> LowRank:
        b = self.b[which]
        return replace(self, shape=(len(b), self.shape[1]), base=self.base[which], b=b)

    def _fill(self, out: Array) -> None:
        put(self.base, out)
        out += (self.b @ self.a) * FLOAT.type(self.scale)


def adapted(config: Config, weights: LoadedWeights, folder: str | Path) -> tuple[Config, LoadedWeights]:
    """Return the config and weights of a base model with the adapter in this folder applied to them.

    An adapted head is no longer tied to the embedding. Raises CheckpointError for an adapter of another model, or of an
    unsupported kind.
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{folder}: not an adapter: it has no {ADAPTER}")
    check_links(folder)
    try:
        settings = read_json(folder / ADAPTER)
    except ConfigError as error:
        raise CheckpointError(f"{folder / ADAPTER}: {error}") from None
    _require_lora(folder, settings)
    path = folder / _WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {_WEIGHTS}; save the adapter as safetensors with PEFT")
    try:
        files = {**weights.files, path.absolute(): identity(path)}
        pairs, whole = _parts(map_tensors(path), settings)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    changed = dict[str, Array](weights)
    if config.tie_word_embeddings and (_HEAD in pairs or _HEAD in whole):
        config = replace(config, tie_word_embeddings=False)
        changed[_HEAD] = changed[_EMBEDDING]
    shapes = weight_shapes(config)
    for name, tensor in whole.items():
        _require(folder, name, tensor.shape, shapes.get(name))
        changed[name] = tensor
    for name, (a, b, alpha) in pairs.items():
        rank = len(a)
        _require(folder, name, (len(b), a.shape[1]), shapes.get(name))
        if b.shape[1] != rank or not rank:
            raise CheckpointError(f"{folder}: {name}: A {a.shape} and B {b.shape} are not of one rank")
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        low = LowRank((len(b), a.shape[1]), changed[name], a.astype(FLOAT), b.astype(FLOAT), scale)
        changed[name] = cast("Array", low)
    remark = f"{folder}: LoRA on {len(pairs)} matrices" + (f", {len(whole)} tensors replaced" if whole else "")
    return config, LoadedWeights(changed, files, [*weights.remarks, remark])


def _require_lora(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the adapter is plain LoRA with settings of the right types."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder / ADAPTER}: peft_type = {kind!r} is not supported; supported: LORA")
    for key in _OTHERS:
        if settings.get(key):
            raise CheckpointError(
                f"{folder / ADAPTER}: {key} is not supported: merge the adapter with PEFT (merge_and_unload), "
                "and load the merged model"
            )
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    values = [alpha, *(cast("dict[str, Any]", patterns).values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise CheckpointError(f"{folder / ADAPTER}: lora_alpha and alpha_pattern must hold finite numbers")


def _parts(
    tensors: Mapping[str, Array], settings: Mapping[str, Any]
) -> tuple[dict[str, tuple[Array, Array, float]], dict[str, Array]]:
    """Return A, B and alpha of each adapted weight, and the tensors that are stored whole."""
    halves: dict[str, dict[str, Array]] = {}
    whole: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.name not in ("float16", "bfloat16", "float32"):
            raise CheckpointError(f"{name}: dtype {tensor.dtype}; supported: bfloat16, float16, float32")
        if match := _NAME.fullmatch(name):
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            place = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            whole[place.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
    pairs: dict[str, tuple[Array, Array, float]] = {}
    patterns = cast("dict[str, float]", settings.get("alpha_pattern") or {})
    for module, found in halves.items():
        if found.keys() == {"lora_A", "lora_B"}:
            a, b = found["lora_A"], found["lora_B"]
        elif found.keys() == {"lora_embedding_A", "lora_embedding_B"}:  # they adapt W transposed
            a, b = found["lora_embedding_B"].T, found["lora_embedding_A"].T
        else:
            raise CheckpointError(f"{module}: an incomplete pair: only {' and '.join(sorted(found))}")
        if a.ndim != 2 or b.ndim != 2:
            raise CheckpointError(f"{module}: A {a.shape} and B {b.shape} are not matrices")
        key = next((key for key in patterns if _matches(key, module)), None)
        pairs[f"{module}.weight"] = a, b, settings["lora_alpha"] if key is None else patterns[key]
    return pairs, whole


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT applies a pattern to a module: it matches the end of the path. CheckpointError for slow patterns."""
    if pattern.count("*") + pattern.count("+") > 3 or re.search(r"[)\]][*+?{]", pattern):
        raise CheckpointError(f"alpha_pattern {pattern!r}: may take forever to match; write plain names")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _require(folder: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    if wanted is None:
        raise CheckpointError(f"{folder}: {name}: the base model has no such tensor; give the model it was trained on")
    if shape != wanted:
        raise CheckpointError(
            f"{folder}: {name}: made for {shape}, but the base model has {wanted}; give the model it was trained on"
        )
