"""The feed-forward layer: SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

Each position by itself goes to F lanes twice, by the matrices gate and up; silu of the one says how much of the other
passes, and the matrix down brings the product back to D lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen3np.numerics import Array, Numerics, Record, silu
from qwen3np.ops.fast.linear import linear, linears
from qwen3np.ops.fast.threads import in_blocks


def swiglu(x: Array, weights: Mapping[str, Array], prefix: str, numerics: Numerics, record: Record) -> Array:
    """Return (silu(x gateᵀ) * (x upᵀ)) downᵀ. x (..., D) -> (..., D), through (..., F).

    prefix is the layer's: "model.layers.0.mlp.", or an expert's: "model.layers.0.mlp.experts.0.".
    """

    def activate(gate: Array, up: Array) -> Array:
        return numerics.round(numerics.round(silu(gate)) * up)

    gate, up = linears(x, [(weights[f"{prefix}{name}.weight"], None) for name in ("gate_proj", "up_proj")], numerics)
    record(f"{prefix}gate_proj", gate)
    record(f"{prefix}up_proj", up)
    act = in_blocks(activate, gate, up)
    record(f"{prefix}act", act)
    down = linear(act, weights[f"{prefix}down_proj.weight"], None, numerics)
    record(f"{prefix}down_proj", down)
    return down
