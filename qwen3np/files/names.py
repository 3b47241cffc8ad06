"""Tensor names as training and export tools write them -> the names of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import Array

# What tools add to names: prefixes (DistributedDataParallel, PEFT, TRL), and wrappers around any module
# (torch.compile, FSDP, activation checkpointing).
_PREFIXES = ("module.", "base_model.model.", "pretrained_model.", "policy.")
_AROUND = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Buffers, value heads for training, scales of activations and caches: the text model's forward pass does not use them.
_UNUSED = re.compile(
    r"(.*\.)?(rotary_emb\..+|masked_bias|position_ids|embed_positions|(input|output|[kvq])_scale|kv_scale"
    r"|activation_scale)|v_head\..+|value_head\..+"
)


def known_names(found: Mapping[str, Array | None]) -> tuple[dict[str, Array | None], list[str]]:
    """Return the tensors under the model's names, without those that change nothing, and remarks about renaming.

    Names without `model.` (in files saved without the head) get this prefix.
    """
    tensors, remarks = {name: tensor for name, tensor in found.items() if not _UNUSED.fullmatch(name)}, list[str]()

    def rename(pattern: str, new: str = "", why: str = "") -> None:
        nonlocal tensors
        renamed = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys() and len(renamed) == len(tensors):
            tensors = renamed
            remarks.append(f"{why} is removed from the names of tensors")

    for around in _AROUND:
        rename(re.escape(around), why=around)
    for _ in range(2):  # two may be nested
        for prefix in _PREFIXES:
            if tensors and all(name.startswith((prefix, "score.")) for name in tensors):
                rename(f"^{re.escape(prefix)}", why=prefix)
    rename(r"^model\.model\.", "model.", why="one of two model.")
    rename(r"^model\.lm_head\.", "lm_head.", why="model.")
    rename(r"^model\.language_model\.", "model.", why="language_model.")
    if not any(name.startswith("model.") for name in tensors):
        outside = ("lm_head.", "score.")
        tensors = {name if name.startswith(outside) else f"model.{name}": tensor for name, tensor in tensors.items()}
    return tensors, remarks


def without_zeros(found: Mapping[str, Array | None], expected: Mapping[str, object]) -> dict[str, Array | None]:
    """Return the tensors without biases that the model does not have, provided that these are all zeros."""
    return {
        name: tensor
        for name, tensor in found.items()
        if name in expected or not name.endswith(".bias") or tensor is None or np.asarray(tensor, np.float32).any()
    }


def split_experts(found: Mapping[str, Array | None], config: Config) -> tuple[dict[str, Array | None], list[str]]:
    """Split transformers 5's fused experts into views of each expert. Returns all tensors, and problems.

    mlp.experts.gate_up_proj (E, 2F, D) and mlp.experts.down_proj (E, D, F).
    """
    e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    tensors, problems = dict[str, "Array | None"](), list[str]()
    for name, tensor in found.items():
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        if not prefix.endswith(".mlp.experts") or kind not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor
            continue
        shape = (e, 2 * f, d) if kind == "gate_up_proj" else (e, d, f)
        if tensor is not None and tensor.shape != shape:
            problems.append(f"{name}: shape {tensor.shape}, but the config requires {shape}")
            tensor = None
        for n in range(e):
            expert = None if tensor is None else tensor[n]
            parts = {"down_proj": slice(None)}
            if kind == "gate_up_proj":
                parts = {"gate_proj": slice(0, f), "up_proj": slice(f, 2 * f)}
            for part, rows in parts.items():
                tensors[f"{prefix}.{n}.{part}.weight"] = None if expert is None else expert[rows]
    return tensors, problems
