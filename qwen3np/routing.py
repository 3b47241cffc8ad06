"""Experts that somebody else chose, in the place of the router's choice."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.config import Config
from qwen3np.numerics import Array, Edit


def replayed(routed: ArrayLike, config: Config, ids: Array, edit: Edit | None) -> Edit:
    """Return an edit that replaces the router's choices, then applies edit. Raises ValueError for impossible ones."""
    experts: Array = np.asarray(routed)
    experts = experts[None] if experts.ndim == 3 else experts
    shape = (*ids.shape, config.num_hidden_layers, config.num_experts_per_tok)
    if experts.shape != shape or experts.dtype.kind not in "iu":
        raise ValueError(f"routed_experts: {experts.dtype} {experts.shape}; expected integers (B, S, L, k) = {shape}")
    points = {f"model.layers.{n}.mlp.router_indices": n for n in range(shape[2]) if config.is_sparse(n)}
    chosen = np.sort(experts[:, :, list(points.values())], -1)
    twice = (chosen[..., 1:] == chosen[..., :-1]).any(-1)
    outside = (chosen[..., 0] < 0) | (chosen[..., -1] >= config.num_experts)
    if (bad := np.argwhere((twice | outside) & (chosen != -1).any(-1))).size:
        row, position, n = bad[0].tolist()
        raise ValueError(
            f"routed_experts: {chosen[row, position, n].tolist()} at row {row}, position {position}, layer "
            f"{[*points.values()][n]}: must be different experts from 0 to {config.num_experts - 1}, or all -1"
        )

    def replay(name: str, x: Array) -> Array | None:
        own = edit or (lambda name, x: None)
        if name not in points:
            return own(name, x)
        given = experts[:, :, points[name]]
        chosen = np.where(given < 0, x, given)
        edited = own(name, chosen)
        return chosen if edited is None else edited

    return replay
