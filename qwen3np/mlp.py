"""The feed-forward layer: SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping

from qwen3np.linear import linear
from qwen3np.numerics import Array, Numerics, Record, silu


def swiglu(x: Array, weights: Mapping[str, Array], prefix: str, numerics: Numerics, record: Record) -> Array:
    """Return (silu(x gateᵀ) * (x upᵀ)) downᵀ. x (B, S, D) -> (B, S, D), through (B, S, F).

    prefix is the layer's: "model.layers.0.mlp.".
    """

    def project(y: Array, name: str) -> Array:
        y = linear(y, weights[f"{prefix}{name}.weight"], None, numerics)
        record(f"{prefix}{name}", y)
        return y

    gate, up = project(x, "gate_proj"), project(x, "up_proj")
    act = numerics.round(numerics.round(silu(gate)) * up)
    record(f"{prefix}act", act)
    return project(act, "down_proj")
