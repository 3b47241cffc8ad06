"""Token ids as they are given, checked: what a model computes from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.config import Config
from qwen3np.numerics import Array


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
