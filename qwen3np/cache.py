"""The KV cache: keys (normalised and rotated) and values of all positions so far, in two preallocated arrays.

They never change, since no position sees those after it (Pope et al., 2022, https://arxiv.org/abs/2211.05102).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from qwen3np.config import Config
from qwen3np.memory import allocated, grown, require_cache
from qwen3np.numerics import Array


@dataclass(eq=False, repr=False)
class KVCache:
    """Keys and values of every layer, and the ids they belong to. One call at a time: two threads need a cache each.

    Only the first lengths[b] positions of sequence b are read. To drop its end, set it back: `cache.lengths[b] = n`.
    """

    k: Array  # (L, B, K, max_length, Dh)
    v: Array  # (L, B, K, max_length, Dh)
    ids: Array  # (B, max_length)
    lengths: Array  # (B,)
    rows: Array  # the sequences that this cache stands for: all B, unless made by select
    whole: bool = True  # whether it was not made by select
    notes: dict[str, Any] = field(default_factory=dict[str, Any])  # by guard: what filled the cache, and how far

    @classmethod
    def allocate(
        cls, config: Config, batch_size: int = 1, max_length: int | None = None, dtype: DTypeLike = np.float32
    ) -> KVCache:
        """Return an empty cache in float32, bfloat16 or float64; max_length=None is the config's maximum.

        Linux and macOS take memory only for positions in use. Raises ValueError for sizes below 1, other dtypes, and a
        max_length that needs more memory than is free (None: generate checks that).
        """
        length = config.max_position_embeddings if max_length is None else max_length
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, length, config.head_dim)
        require_cache(shape, np.dtype(dtype), in_memory=max_length is not None)
        k, v, ids = allocated(shape, dtype), allocated(shape, dtype), allocated((batch_size, length), np.int64)
        return cls(k, v, ids, np.zeros(batch_size, np.int64), np.arange(batch_size))

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return len(self.rows)

    @property
    def max_length(self) -> int:
        """The number of positions that each sequence has room for."""
        return self.k.shape[3]

    def __repr__(self) -> str:
        """Show sizes, not arrays."""
        return f"KVCache({self.k.dtype}, up to {self.max_length} positions, lengths {self.lengths[self.rows].tolist()})"

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of these sequences, in this order and in the same memory. ValueError for one named twice."""
        selected = self.rows[list(rows)]
        if len(set(selected.tolist())) < len(selected):
            raise ValueError(f"cache: a sequence is selected twice: {list(rows)}")
        return replace(self, rows=selected, whole=False)

    def reserve(self, max_length: int) -> None:
        """Make room for max_length positions; earlier selections keep the old arrays. ValueError as allocate."""
        if max_length > self.max_length:
            if not self.whole:
                raise ValueError("cache: a selection cannot grow; reserve on the cache it was made from")
            self.k, self.v, self.ids = grown((self.k, self.v, self.ids), (3, 3, 1), int(self.lengths.max()), max_length)
            self.notes = dict(self.notes, filled=np.full_like(self.lengths, self.lengths.max()))
            self.lengths = self.lengths.copy()

    def write(self, layer: int, k: Array, v: Array) -> tuple[list[Array], list[Array]]:
        """Append k and v (B, K, S, Dh) to what each sequence holds; return views of all of it, (K, T, Dh) each."""
        seen: tuple[list[Array], list[Array]] = [], []
        for b, row in enumerate(self.rows.tolist()):
            for held, new, views in ((self.k, k, seen[0]), (self.v, v, seen[1])):
                views.append(held[layer, row, :, : self.lengths.item(row) + new.shape[2]])
                views[-1][:, -new.shape[2] :] = new[b]
        return seen

    def advance(self, ids: Array) -> None:
        """Count the positions of ids (B, S), when `write` has filled them in every layer."""
        for row, new in zip(self.rows.tolist(), ids, strict=True):
            self.ids[row, self.lengths[row] :][: len(new)] = new
        self.lengths[self.rows] += ids.shape[1]

    def keep_prefix(self, b: int, ids: Sequence[int]) -> int:
        """Drop what sequence b holds beyond its longest common prefix with ids, and return that prefix's length."""
        row = self.rows[b]
        held = self.ids[row, : min(self.lengths[row], len(ids))]
        self.lengths[row] = np.append(held != ids[: len(held)], True).argmax()
        return int(self.lengths[row])
