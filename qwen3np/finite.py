"""Numbers that are not finite are named, with their place in the model, instead of becoming text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.model import forward
from qwen3np.numerics import Array, position_axis, precision

CHUNK = 16  # positions that are looked at together: all their scores are in memory at once


class NonFiniteError(ValueError):
    """NaN or infinity where there must be numbers; the message names the first recorded point and token."""


class _Found(Exception):
    pass


def require_finite(
    logits: Array, weights: Mapping[str, Array], config: Config, ids: Sequence[int] | Array, numerics: str
) -> None:
    """Raise NonFiniteError where logits hold NaN or infinity; it says at which point and token of ids they begin."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(_where(weights, config, ids, numerics))


def require_finite_point(
    name: str, x: Array, weights: Mapping[str, Array], config: Config, ids: Array, numerics: str
) -> None:
    """Raise the same where a recorded point of ids (B, S) holds NaN or infinity."""
    if (bad := _not_finite(name, x)).any():
        raise NonFiniteError(_where(weights, config, ids[np.argwhere(bad)[0, 0]].tolist(), numerics))


def _not_finite(name: str, x: Array) -> Array:
    """Return where a recorded point is NaN or infinite. Scores are -inf where they are hidden."""
    return np.isnan(x) | np.isposinf(x) if name.endswith(".scores") else ~np.isfinite(x)


def _where(weights: Mapping[str, Array], config: Config, ids: Sequence[int] | Array, numerics: str) -> str:
    """Compute ids once more, and say what is the first point that is not finite."""
    cache = KVCache.allocate(config, 1, len(ids), precision(numerics).storage)
    head = config.tie_word_embeddings or "lm_head.weight" in weights

    def look(name: str, x: Array) -> None:
        if (bad := _not_finite(name, x)).any():
            raise _Found(name, int(np.argwhere(bad)[:, position_axis(name)].min()))

    for start in range(0, len(ids), CHUNK):
        try:
            with np.errstate(all="ignore"):
                piece = ids[start : start + CHUNK]
                forward(weights, config, piece, cache, numerics=numerics, head=head, trace=look)
        except _Found as found:
            point, token = found.args
            at = start + token
            return (
                f"{point} is NaN or infinite at position {at} (id {ids[at]}){_cause(weights, config, point, numerics)}"
            )
    return "the logits are NaN or infinite"


def _cause(weights: Mapping[str, Array], config: Config, point: str, numerics: str) -> str:
    """Say whether the weights of a point are to blame."""
    module = "model.embed_tokens" if point == "lm_head" and config.tie_word_embeddings else point
    for name, tensor in weights.items():
        own = name.removeprefix(f"{module}.")
        if own != name and ("." not in own or module.endswith(".experts")):
            bad = tensor.size - int(np.isfinite(tensor).sum())
            if bad:
                return f": {name} holds {bad:,} of {tensor.size:,} that are not finite, so the checkpoint is damaged"
    return f": the numbers outgrow {numerics}"
