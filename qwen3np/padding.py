"""Padded batches, as other libraries use them, to ragged sequences and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.numerics import Array


def unpadded(input_ids: ArrayLike, attention_mask: ArrayLike) -> list[list[int]]:
    """Return padded ids (B, S) as sequences. Raises ValueError for a mask of another shape, or with holes."""
    ids, mask = np.atleast_2d(np.asarray(input_ids)), np.atleast_2d(np.asarray(attention_mask))
    if ids.shape != mask.shape:
        raise ValueError(f"attention_mask: shape {mask.shape}, but the ids have shape {ids.shape}")
    for row, kept in enumerate(mask != 0):
        at = np.flatnonzero(kept)
        if not at.size or at[-1] - at[0] + 1 != at.size:
            problem = "a hole" if at.size else "no token"
            raise ValueError(f"attention_mask: row {row} has {problem}; padding is on the left or on the right only")
    return [row[kept].tolist() for row, kept in zip(ids, mask != 0, strict=True)]


def on_the_right(rows: Sequence[list[int]]) -> Array:
    """Return sequences as (B, S) ids, padded on the right, where no token sees the padding."""
    longest = max(map(len, rows))
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows])


def padded(found: Array, rows: Sequence[list[int]], mask: ArrayLike, last_only: bool) -> Array:
    """Place the result of each row's tokens where its mask is 1, or return the last token's alone."""
    if last_only:
        return np.stack([x[len(row) - 1 : len(row)] for x, row in zip(found, rows, strict=True)])
    kept = np.atleast_2d(np.asarray(mask)) != 0
    result = np.zeros((*kept.shape, found.shape[-1]), found.dtype)
    for x, row, places, out in zip(found, rows, kept, result, strict=True):
        out[places] = x[: len(row)]
    return result
