"""The checks at the door: ids, changed files, finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.errors import CheckpointError
from qwen3np.numerics import Array, position_axis, precision
from qwen3np.weights import LoadedWeights, identity


def checked_sequence(ids: ArrayLike, config: Config) -> list[int]:
    """Return the ids of one sequence as a list. Raises ValueError as checked_ids, and for more than one sequence."""
    checked = checked_ids(ids, config)
    if np.ndim(ids) != 1:
        raise ValueError(f"input_ids: a sequence must be a flat list of ids, not an array of shape {checked.shape}")
    return checked[0].tolist()


def checked_ids(input_ids: ArrayLike, config: Config, name: str = "input_ids") -> Array:
    """Return ids as an integer array (B, S). Raises ValueError, which says what is wrong with `name`, and where."""
    try:
        ids: np.ndarray[Any, Any] = np.asarray(input_ids)
    except ValueError:
        raise ValueError(f"{name}: rows of different lengths; pad them on the right to one length") from None
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"{name}: shape {ids.shape}; expected (B, S) or (S,) ids (text is encoded first)")
    if ids.size == 0:
        raise ValueError(f"{name}: empty; a prompt needs at least one token")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: dtype {ids.dtype}; token ids are integers from 0 to {config.vocab_size - 1}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        outside = np.argwhere((ids < 0) | (ids >= config.vocab_size))
        row, column = outside[0]
        raise ValueError(
            f"{name}: id {ids[row, column]} at row {row}, position {column} is outside the vocabulary: "
            f"0 to {config.vocab_size - 1}" + (f" ({len(outside)} such ids)" if len(outside) > 1 else "")
        )
    return ids


def require_unchanged(weights: Mapping[str, Array]) -> None:
    """Raise CheckpointError if a mapped file was written to or cut since: its weights are not those that were checked.

    A file that was put in the place of it, or deleted, does no harm: the old one stays mapped.
    """
    if isinstance(weights, LoadedWeights):
        for path, (number, *before) in weights.files.items():
            try:
                now, *found = identity(path)
            except OSError:
                continue
            if now == number and found != before:
                raise CheckpointError(f"{path}: was changed after it was loaded; load it again")


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
    from qwen3np.model import forward

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
