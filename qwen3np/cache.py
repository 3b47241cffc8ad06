"""The KV cache: the keys and values of all positions so far, in two preallocated arrays.

No position sees those after it, so its keys and values never change, and a new token costs one position instead of all
of them (Pope et al., 2022, https://arxiv.org/abs/2211.05102). Keys are kept normalised and rotated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from qwen3np.config import Config
from qwen3np.memory import require_memory
from qwen3np.numerics import BFLOAT16, Array, Numerics


class ContextOverflowError(ValueError):
    """More positions than there is room for. Nothing was written."""


# Of a config, keys and values depend on all but these.
_OTHERS = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "eos_token_id")
_settings = attrgetter(*(field.name for field in fields(Config) if field.name not in _OTHERS))


class _Origin:
    """What a cache was filled with: which weights (the same arrays, or with the same first numbers), which settings."""

    def __init__(self) -> None:
        self.arrays: list[ref[Array]] = []
        self.sample: Array | None = None
        self.settings: object = None

    def keep(self, weights: Mapping[str, Array], config: Config, numerics: Numerics) -> None:
        """Remember these."""
        names = self._names(weights)
        self.arrays = [ref(weights[name]) for name in names]
        self.sample, self.settings = self._sample(weights), (numerics, *_settings(config))

    def differs(self, weights: Mapping[str, Array], config: Config, numerics: Numerics) -> str | None:
        """Say what of these is not what was kept last, nor a copy of it.

        What is changed in place, experts alone, and weights with the same first numbers are not told apart.
        """
        if self.sample is None:
            return None
        if self.settings != (numerics, *_settings(config)):
            return "another config or precision"
        names = self._names(weights)
        same = len(names) == len(self.arrays) and all(
            array() is weights[name] for array, name in zip(self.arrays, names, strict=True)
        )
        if not same:
            if not np.array_equal(self.sample, self._sample(weights)):
                return "other weights"
            self.arrays = [ref(weights[name]) for name in names]  # the next look is quick
        return None

    def __getstate__(self) -> dict[str, object]:
        """Leave out which arrays they were: in another process they are others."""
        return {**self.__dict__, "arrays": []}

    @staticmethod
    def _names(weights: Mapping[str, Array]) -> list[str]:
        # not of the experts: of a mapped file only those are read that are hit
        return [name for name in weights if name.startswith("model.") and ".experts." not in name]

    @classmethod
    def _sample(cls, weights: Mapping[str, Array]) -> Array:
        return np.concatenate([weights[name].flat[:8].astype(np.float64) for name in sorted(cls._names(weights))])


@dataclass(eq=False, repr=False)
class KVCache:
    """Rotated keys and values of every layer, and the ids they belong to.

    lengths says how many positions of each sequence hold something; what lies behind is never read. Sequences may have
    different lengths. To drop the end of one (the padding of a prompt, an answer to be written anew), set its length
    back: `cache.lengths[b] = n`. One call at a time: two threads need a cache each.
    """

    k: Array  # (L, B, K, max_length, Dh)
    v: Array  # (L, B, K, max_length, Dh)
    ids: Array  # (B, max_length)
    lengths: Array  # (B,)
    filled: Array  # (B,) the most that each length was: memory is taken for so many positions
    rows: Array  # the sequences this cache speaks of: all B, unless made by select
    origin: _Origin = field(default_factory=_Origin)
    whole: bool = True  # whether it was not made by select

    @classmethod
    def allocate(
        cls,
        config: Config,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> KVCache:
        """Return an empty cache for batch_size sequences of up to max_length positions (the config's maximum if None).

        dtype is float32, bfloat16 or float64. Systems that hand out memory on first use (Linux, macOS) take only what
        the positions in use need. Raises ValueError for sizes below 1 and other dtypes, and where there is less memory
        than max_length positions take in the end; without max_length, which asks for no number, generate looks at that.
        """
        dtype = np.dtype(dtype)
        if dtype not in (BFLOAT16, np.float32, np.float64):
            raise ValueError(f"KVCache: dtype {dtype} is not supported; supported: float32, bfloat16, float64")
        asked, max_length = max_length, config.max_position_embeddings if max_length is None else max_length
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"KVCache: batch_size {batch_size} and max_length {max_length} must be at least 1")
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        if asked is not None:
            _require_memory(shape, dtype)
        ids, (lengths, filled) = _zeros((batch_size, max_length), np.int64), np.zeros((2, batch_size), np.int64)
        return cls(_zeros(shape, dtype), _zeros(shape, dtype), ids, lengths, filled, np.arange(batch_size))

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return len(self.rows)

    @property
    def max_length(self) -> int:
        """How many positions each sequence has room for."""
        return self.k.shape[3]

    def select(self, rows: Sequence[int]) -> KVCache:
        """Return a cache of these sequences alone, in this order. It shares memory: what it writes is written here.

        Raises ValueError for a sequence that is named twice.
        """
        selected = self.rows[list(rows)]
        if len(set(selected.tolist())) < len(selected):
            raise ValueError(f"cache: a sequence is selected twice: {list(rows)}")
        return KVCache(self.k, self.v, self.ids, self.lengths, self.filled, selected, self.origin, whole=False)

    def reserve(self, max_length: int) -> None:
        """Make room for max_length positions in each sequence, by moving to larger arrays if need be.

        Selections that were made before share nothing with it from then on. Raises ValueError for a selection, and
        where there is less memory than a second copy of what it holds takes.
        """
        if max_length <= self.max_length:
            return
        if not self.whole:
            raise ValueError("cache: a selection cannot grow; reserve on the cache it was made from")
        used, olds = int(self.lengths.max()), (self.k, self.v, self.ids)
        layers, batch_size, heads, _, head_dim = self.k.shape
        _require_memory((layers, batch_size, heads, used, head_dim), self.k.dtype)
        axes = (3, 3, 1)
        news = [
            _zeros((*old.shape[:axis], max_length, *old.shape[axis + 1 :]), old.dtype)
            for old, axis in zip(olds, axes, strict=True)
        ]
        for old, new, axis in zip(olds, news, axes, strict=True):
            kept = (slice(None),) * axis + (slice(used),)
            new[kept] = old[kept]
        self.k, self.v, self.ids = news
        # selections that were made before keep the old arrays, and lengths of their own
        self.lengths, self.filled, self.origin = self.lengths.copy(), np.full_like(self.filled, used), copy(self.origin)

    def require_memory(self, length: int) -> None:
        """Raise ValueError unless there is memory for `length` positions of each sequence, less what it has already."""
        layers, _, heads, _, head_dim = self.k.shape
        taken = np.minimum(self.filled[self.rows], length)
        _require_memory((layers, len(self.rows), heads, length, head_dim), self.k.dtype, taken)

    def keep_prefix(self, b: int, ids: Sequence[int]) -> int:
        """Drop what sequence b holds beyond its longest common prefix with ids, and return that prefix's length."""
        row = self.rows[b]
        held = self.ids[row, : min(self.lengths[row], len(ids))]
        differs = np.flatnonzero(held != ids[: len(held)])
        self.lengths[row] = differs[0] if len(differs) else len(held)
        return int(self.lengths[row])

    def holds(self, b: int, ids: Array) -> bool:
        """Whether sequence b holds these ids (N,), and no more."""
        row = self.rows[b]
        return bool(self.lengths[row] == len(ids) and np.array_equal(self.ids[row, : len(ids)], ids))

    def check(
        self, weights: Mapping[str, Array], config: Config, numerics: Numerics, batch_size: int, new: int
    ) -> None:
        """Raise ValueError unless `new` more positions of batch_size sequences fit, for this model and precision.

        ContextOverflowError, a ValueError, when there is no room for them.
        """
        layers, _, heads, room, head_dim = self.k.shape
        expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        if (layers, heads, head_dim) != expected:
            raise ValueError(
                f"cache: made for another config: its (layers, KV heads, head_dim) are {(layers, heads, head_dim)}, "
                f"the model's {expected}"
            )
        if not np.can_cast(numerics.storage, self.k.dtype, "safe"):
            raise ValueError(f"cache: dtype {self.k.dtype} cannot hold the precision asked for, {numerics.name}")
        if batch_size != self.batch_size:
            raise ValueError(f"cache: holds {self.batch_size} sequences, but input_ids has {batch_size}")
        if self.lengths.any() and (difference := self.origin.differs(weights, config, numerics)):
            raise ValueError(f"cache: what it holds was made with {difference}; use a new one, or set its lengths to 0")
        for row, length in zip(self.rows.tolist(), self.lengths[self.rows].tolist(), strict=True):
            if not 0 <= length <= room - new:
                raise ContextOverflowError(
                    f"cache: sequence {row} holds {length} of {room} positions; {new} more do not fit"
                )

    def write(self, layer: int, b: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Put k and v (K, S, Dh) behind what sequence b holds, and return all of it: two views (K, T, Dh).

        The lengths stay as they are until `advance`, when all layers are done.
        """
        row: int = self.rows.item(b)
        start: int = self.lengths.item(row)
        end = start + k.shape[1]
        self.k[layer, row, :, start:end] = k
        self.v[layer, row, :, start:end] = v
        return self.k[layer, row, :, :end], self.v[layer, row, :, :end]

    def advance(self, ids: Array, weights: Mapping[str, Array], config: Config, numerics: Numerics) -> None:
        """Count the positions that `write` filled in every layer, with this model: those of ids (B, S)."""
        if not self.lengths.any():
            self.origin.keep(weights, config, numerics)
        for row, new in zip(self.rows.tolist(), ids, strict=True):
            start: int = self.lengths.item(row)
            self.ids[row, start : start + len(new)] = new
        self.lengths[self.rows] += ids.shape[1]
        np.maximum(self.filled, self.lengths, out=self.filled)


_FEWER = (
    "ask for fewer positions (max_new_tokens, --max-new-tokens) or sequences, "
    'or for a cache of half the size by numerics="bfloat16" (--numerics bfloat16)'
)


def _require_memory(shape: tuple[int, ...], dtype: np.dtype[Any], taken: ArrayLike = 0) -> None:
    """Raise ValueError unless there is memory for keys and values of this shape, less those of `taken` positions."""
    layers, batch_size, heads, length, head_dim = shape
    size = 2 * layers * heads * head_dim * dtype.itemsize * (batch_size * length - int(np.sum(taken)))
    sequences = f"{batch_size} sequences of {length:,} positions" if batch_size > 1 else f"{length:,} positions"
    require_memory(size, f"cache: {sequences} in {dtype}", _FEWER)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return zeros. Raises ValueError where the system refuses them (Windows, and under a limit of addresses)."""
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:  # ValueError: more than there are addresses
        raise ValueError(f"cache: {error}; {_FEWER}") from None
