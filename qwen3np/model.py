"""The whole model: embedding, L blocks, final norm, head (Qwen3 technical report, 2025, https://arxiv.org/abs/2505.09388).

Weights are a dictionary with Hugging Face's tensor names; config, weights and cache are arguments of every call.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.attention import self_attention
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.guard import checked_ids, require_unchanged
from qwen3np.memory import require_memory
from qwen3np.mlp import swiglu
from qwen3np.moe import mixture
from qwen3np.norm import rms_norm
from qwen3np.numerics import Array, Numerics, Record, ignore, precision
from qwen3np.ops.fast.linear import is_ready, linear
from qwen3np.ops.fast.threads import blas_threads, in_blocks, threads_for
from qwen3np.rope import rotary_tables

LARGE = 1 << 28  # bytes of logits from which on the system is asked whether there is memory for them


def forward(
    weights: Mapping[str, Array],
    config: Config,
    input_ids: ArrayLike,
    cache: KVCache | None = None,
    *,
    numerics: str = "float32",
    last_only: bool = False,
    head: bool = True,
    trace: Record | None = None,
) -> Array:
    """Return the logits of the next token after each position: (B, S, V), or (B, 1, V) with last_only.

    Without the head it is the hidden states after the final norm instead, (B, S, D) or (B, 1, D).

    input_ids: (B, S) token ids, or (S,) read as B = 1. With a cache, sequence b goes on at position cache.lengths[b],
    its keys and values are added, and the lengths advance when all is done. numerics is "float32", "float64",
    "bfloat16" (which rounds where transformers' eager bfloat16 does) or "bfloat16-grouped" (the same, but for the sum
    over experts); logits are float32, or float64 for "float64".
    trace is called once for each recorded point, in order, with its name and its array, to keep but not to change.

    Raises ValueError for ids that are empty, out of range or no integers, and for a cache that does not match
    (ContextOverflowError when it is full), for logits that are larger than the memory that is free, and CheckpointError
    for a mapped file that was changed since it was loaded; nothing is changed then.
    """
    require_unchanged(weights)
    n, record = precision(numerics), ignore if trace is None else trace
    if head and not config.tie_word_embeddings and "lm_head.weight" not in weights:
        raise ValueError("weights: there is no lm_head.weight: this checkpoint makes embeddings, not text")
    ids = checked_ids(input_ids, config)
    batch: int = ids.shape[0]
    new: int = ids.shape[1]
    if head and not last_only:
        _require_room(ids.size, config, n)
    if cache is not None:
        cache.check(weights, config, n, batch, new)
    starts = np.zeros(batch, np.int64) if cache is None else cache.lengths[cache.rows]
    tables = rotary_tables(config, starts[:, None] + np.arange(new), n)

    embedding = weights["model.embed_tokens.weight"]
    x = n.widen(embedding[ids])  # (B, S, D)
    record("model.embed_tokens", x)
    # BLAS's own threads begin soonest, but wait awake, in the way of ours: for one row, until attention is half a layer
    # (or experts are)
    matrix = config.hidden_size * config.intermediate_size
    attention = 2 * config.num_attention_heads * config.head_dim * int(starts.max() + new)
    alone = ids.size == 1 and is_ready(embedding, n) and attention < 4 * matrix and not config.num_experts
    with blas_threads(threads_for(matrix) if alone else 1):
        for layer in range(config.num_hidden_layers):
            x = block(x, weights, layer, config, tables, cache, n, record)
    if last_only:
        x = x[:, -1:]
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps, n)
    record("model.norm", x)
    if head:
        w = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        with blas_threads(threads_for(embedding.size) if alone else 1):
            x = linear(x, w, None, n)
        record("lm_head", x)
    if cache is not None:
        cache.advance(ids, weights, config, n)
    return x


def block(
    x: Array,
    weights: Mapping[str, Array],
    layer: int,
    config: Config,
    tables: tuple[Array, Array],
    cache: KVCache | None,
    numerics: Numerics,
    record: Record,
) -> Array:
    """One decoder layer: x + attention(norm(x)), then the same with the MLP, or experts. x (B, S, D) -> (B, S, D)."""
    prefix = f"model.layers.{layer}."

    def normalise(y: Array, name: str) -> Array:
        y = rms_norm(y, weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)
        record(f"{prefix}{name}", y)
        return y

    def add(x: Array, h: Array) -> Array:
        return numerics.round(x + h)

    h = normalise(x, "input_layernorm")
    here, window = None if cache is None else (cache, layer), config.window(layer)
    h = self_attention(h, weights, f"{prefix}self_attn.", config, tables, here, window, numerics, record)
    x = in_blocks(add, x, h)
    record(f"{prefix}attn_residual", x)
    h = normalise(x, "post_attention_layernorm")
    if config.is_sparse(layer):
        h = mixture(h, weights, f"{prefix}mlp.", config, numerics, record)
    else:
        h = swiglu(h, weights, f"{prefix}mlp.", numerics, record)
    x = in_blocks(add, x, h)
    record(prefix[:-1], x)
    return x


def _require_room(positions: int, config: Config, numerics: Numerics) -> None:
    """Raise ValueError where the logits of so many positions are larger than the memory that is free."""
    size = positions * config.vocab_size * numerics.dtype.itemsize
    if size > LARGE:
        way_out = "ask for those of the last position (last_only=True), or go on with a cache, a piece at a time"
        require_memory(size, f"logits: {positions:,} positions in {numerics.dtype}", way_out)
