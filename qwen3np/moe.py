"""The sparse feed-forward layer: a router sends each token to a few of E experts, each a small MLP of its own.

Mixture of experts: Shazeer et al., 2017, https://arxiv.org/abs/1701.06538; this router, which takes the softmax over
all experts before it chooses: Qwen3 technical report, 2025, https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwen3np.config import Config
from qwen3np.mlp import swiglu
from qwen3np.numerics import Array, Numerics, Record, ignore, softmax
from qwen3np.ops.fast.linear import linear
from qwen3np.ops.fast.pages import will_need
from qwen3np.ops.fast.threads import share


def mixture(
    x: Array, weights: Mapping[str, Array], prefix: str, config: Config, numerics: Numerics, record: Record
) -> Array:
    """Return the sum of each token's chosen experts, by their weights. x (B, S, D) -> (B, S, D).

    prefix is the layer's: "model.layers.0.mlp.".
    """
    logits, indices, shares = route(x, weights[f"{prefix}gate.weight"], config, numerics)
    record(f"{prefix}gate", logits)
    record(f"{prefix}router_indices", indices)
    record(f"{prefix}router_weights", shares)
    y = experts(x, weights, f"{prefix}experts.", indices, shares, numerics)
    record(f"{prefix}experts", y)
    return y


def route(x: Array, gate: Array, config: Config, numerics: Numerics) -> tuple[Array, Array, Array]:
    """Return the router's logits, and each token's experts with their weights, the largest first.

    x (B, S, D), gate (E, D) -> (B, S, E) and twice (B, S, k): p = softmax(x gateᵀ) over all experts, of which the k
    largest stay, divided by their sum if norm_topk_prob. bfloat16 rounds the logits, and the weights at the end.
    """
    logits = linear(x, gate, None, numerics)
    p = softmax(logits)
    p[~np.isfinite(logits).all(axis=-1)] = np.nan  # -inf would pass for an expert that nobody needs
    indices = choose(p, config)
    return logits, indices, weigh(p, indices, config, numerics)


def choose(p: Array, config: Config) -> Array:
    """Return the k most probable experts, the largest first. p (..., E) -> (..., k)."""
    # stable: of equal ones, which bfloat16 makes, the lower numbers; torch.topk leaves that open
    return np.argsort(-p, axis=-1, kind="stable")[..., : config.num_experts_per_tok]


def weigh(p: Array, indices: Array, config: Config, numerics: Numerics) -> Array:
    """Return the weights of these experts. p (..., E), indices (..., k) -> (..., k)."""
    shares = np.take_along_axis(p, indices, axis=-1)
    if config.norm_topk_prob:
        shares /= np.sum(shares, axis=-1, keepdims=True)
    return numerics.round(shares)


def experts(
    x: Array, weights: Mapping[str, Array], prefix: str, indices: Array, shares: Array, numerics: Numerics
) -> Array:
    """Return the sum over k of shares * expert(x), the experts that indices name. x (B, S, D) -> (B, S, D).

    indices and shares (B, S, k). Each expert gets all of its tokens at once, and no other expert's weights are touched:
    of a mapped file only those are read. Expert by expert in ascending order as transformers' eager experts
    (models/qwen3_moe/modeling_qwen3_moe.py), in bfloat16 rounding each sum; in the order of the weights and rounding
    once if numerics.grouped, as its grouped ones (integrations/moe.py).
    """
    if not numerics.grouped:
        order = np.argsort(indices, axis=-1)
        indices, shares = np.take_along_axis(indices, order, axis=-1), np.take_along_axis(shares, order, axis=-1)
    rows, k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    chosen, by_weight = indices.reshape(-1), shares.reshape(-1, 1)
    outputs = np.empty((len(chosen), rows.shape[1]), x.dtype)  # (tokens * k, D)

    def apply(part: tuple[int, Array]) -> None:
        expert, places = part
        for name in ("gate_proj", "up_proj", "down_proj"):  # page by page the system would read more, and wait more
            will_need(weights[f"{prefix}{expert}.{name}.weight"])
        y = swiglu(rows[places // k], weights, f"{prefix}{expert}.", numerics, ignore)
        outputs[places] = numerics.round(y * by_weight[places])

    places = np.argsort(chosen, kind="stable")
    hit, starts = np.unique(chosen[places], return_index=True)
    parts = list(zip(hit.tolist(), np.split(places, starts[1:]), strict=True))
    share(parts, 3 * weights[f"{prefix}{hit[0]}.up_proj.weight"].size * len(chosen), apply)

    addends = outputs.reshape(len(rows), k, -1)
    y = addends[:, 0]
    for n in range(1, k):
        y = y + addends[:, n]
        if not numerics.grouped:
            y = numerics.round(y)
    return numerics.round(y).reshape(x.shape)
