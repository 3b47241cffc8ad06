"""Weights: a dictionary from Hugging Face's tensor names to arrays. Names and shapes, counts, random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qwen3np.config import Config
from qwen3np.memory import require_memory
from qwen3np.numerics import Array
from qwen3np.stored import kind

Weights: TypeAlias = Mapping[str, Array]
_SHOWN = 10  # lines for tensors in a repr


class LoadedWeights(dict[str, Array]):
    """The weights of a checkpoint by name, with a repr that fits a notebook cell.

    `files` holds the identity of each mapped file when it was loaded; it is empty for copies. guard.py checks whether
    these files have changed since, which it cannot do for a plain dict.
    """

    def __init__(
        self,
        weights: Weights,
        files: Mapping[Path, tuple[int, int, int]] | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        """Wrap the weights; `files` maps each file to its `identity`, `remarks` describe anything unusual in them."""
        super().__init__(weights)
        self.files, self.remarks = dict(files or {}), tuple(remarks)

    def __repr__(self) -> str:
        """Return the sizes of the whole, and a line for each of the first and last tensors."""
        dtypes = " and ".join(sorted({kind(w) for w in self.values()}))
        size, nbytes = sum(w.size for w in self.values()), sum(w.nbytes for w in self.values())
        mapped = ", mapped" if self.files else ""
        lines = [f"{len(self)} tensors, {size:,} parameters, {dtypes}, {nbytes / 1e6:,.1f} MB{mapped}"]
        names = list(self)
        shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 3], *names[-2:]]
        width = max(map(len, shown), default=0)
        lines += [f"  {name:{width}}  {self[name].shape!s:14}  {kind(self[name])}" for name in shown]
        if len(shown) < len(names):
            lines.insert(-2, "  ...")
        return "\n".join(lines)


def identity(path: Path) -> tuple[int, int, int]:
    """Return what identifies a file and its version: inode, size and modification time."""
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
    """Count the parameters of a model.

    Parameters
    ----------
    config
        The sizes of the model; no weights are needed.

    Returns
    -------
    dict[str, int]
        "total" counts a head that is tied to the embedding as a separate matrix. "unique" counts what is stored.
        "non_embedding" leaves out the embedding and the head. "active" is what one token uses: "unique" without the
        experts that it is not routed to.

    Examples
    --------
    >>> qwen3np.count_parameters(qwen3np.load().config)
    {'total': 2070432, 'unique': 1742752, 'non_embedding': 1415072, 'active': 1742752}
    """
    embedding = config.vocab_size * config.hidden_size
    unique = sum(math.prod(shape) for shape in weight_shapes(config).values())
    total = unique + embedding * config.tie_word_embeddings
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    active = unique - sparse * (config.num_experts - config.num_experts_per_tok) * expert
    return {"total": total, "unique": unique, "non_embedding": total - 2 * embedding, "active": active}


def init_weights(config: Config, seed: int, *, trained_like: bool = False) -> dict[str, Array]:
    """Draw random float32 weights.

    Parameters
    ----------
    config
        The sizes of the model, and with initializer_range the standard deviation of its matrices.
    seed
        The same seed gives the same weights.
    trained_like
        False: as at the start of a training run, with norm weights of 1 and biases of 0. True: more like trained
        weights, with matrices scaled by their number of inputs, and random norm weights and biases. With norm weights
        of 1 a norm commutes with the rotation, which hides many of the bugs a port can have.

    Returns
    -------
    dict[str, numpy.ndarray]
        The weights under Hugging Face's names, in the order of use.

    Raises
    ------
    ValueError
        If the weights would exceed the free memory.

    Examples
    --------
    >>> weights = qwen3np.init_weights(qwen3np.load().config, seed=0)
    >>> weights["model.norm.weight"].dtype
    dtype('float32')
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
