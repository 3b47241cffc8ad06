"""Weights: a dictionary from Hugging Face's tensor names to arrays. Names and shapes, counts, random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from qwen3np.config import Config
from qwen3np.memory import require_memory
from qwen3np.numerics import Array

Weights: TypeAlias = Mapping[str, Array]


class MappedWeights(dict[str, Array]):
    """Weights by name that are views of mapped files. A plain dict of them is not asked whether these have changed."""

    files: Mapping[Path, tuple[int, int, int]] = MappingProxyType({})  # what identity said when they were mapped


def identity(path: Path) -> tuple[int, int, int]:
    """Return what tells whether it is still the same file, unchanged: its number, size and time of change."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of this model, in the order of use."""
    d, dh = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * dh, config.num_key_value_heads * dh
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,)}
    for name, outputs, inputs in (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)):
        layer[f"self_attn.{name}.weight"] = (outputs, inputs)
        if config.attention_bias:
            layer[f"self_attn.{name}.bias"] = (outputs,)
    layer |= {"self_attn.q_norm.weight": (dh,), "self_attn.k_norm.weight": (dh,)}
    layer |= {"post_attention_layernorm.weight": (d,)}

    def mlp(prefix: str, f: int) -> dict[str, tuple[int, ...]]:
        projections = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        return {f"{prefix}{name}.weight": shape for name, shape in projections.items()}

    dense, sparse = mlp("mlp.", config.intermediate_size), {"mlp.gate.weight": (config.num_experts, d)}
    for expert in range(config.num_experts):
        sparse |= mlp(f"mlp.experts.{expert}.", config.moe_intermediate_size)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for n in range(config.num_hidden_layers):
        whole = layer | (sparse if config.is_sparse(n) else dense)
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in whole.items()}
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def count_parameters(config: Config) -> dict[str, int]:
    """Return how many parameters the model has.

    "total" counts a tied head as a matrix of its own, "unique" counts what is stored, "non_embedding" leaves out the
    embedding and the head, "active" is what one token uses: all that is unique but the experts it is not sent to.
    """
    embedding = config.vocab_size * config.hidden_size
    unique = sum(math.prod(shape) for shape in weight_shapes(config).values())
    total = unique + embedding * config.tie_word_embeddings
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    active = unique - sparse * (config.num_experts - config.num_experts_per_tok) * expert
    return {"total": total, "unique": unique, "non_embedding": total - 2 * embedding, "active": active}


def init_weights(config: Config, seed: int, *, trained_like: bool = False) -> dict[str, Array]:
    """Return random float32 weights; the same seed gives the same weights.

    As a training run starts: matrices normal with initializer_range, norm weights 1, biases 0. trained_like instead
    scales matrices by their number of inputs and draws norm weights and biases, as they are after training: with norm
    weights of 1 many bugs of a port cannot be seen, since a norm then commutes with the rotation. Raises ValueError
    where there is less memory than they take.
    """
    require_memory(4 * count_parameters(config)["unique"], "random weights in float32", "choose smaller sizes")
    weights: dict[str, Array] = {}
    for index, (name, shape) in enumerate(weight_shapes(config).items()):
        rng = np.random.default_rng([seed, index])
        if len(shape) == 2:
            std = 1 / math.sqrt(shape[1]) if trained_like else config.initializer_range
            weights[name] = rng.standard_normal(shape, np.float32)
            weights[name] *= np.float32(std)
        elif not trained_like:
            weights[name] = np.full(shape, name.endswith("norm.weight"), np.float32)
        elif name.endswith(".bias"):
            weights[name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            weights[name] = np.exp(0.4 * rng.standard_normal(shape)).astype(np.float32)
    return weights
