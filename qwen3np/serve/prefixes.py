"""Caches that several requests share: rows of different caches as one batch, and prefixes kept for later requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.numerics import Array


class Joined(KVCache):
    """Caches of one sequence each, as one cache of B sequences; they stay separate arrays, so any may leave."""

    def __init__(self, parts: Sequence[KVCache]) -> None:
        """Join caches that have room for the next position."""
        widest = max(parts, key=lambda part: part.max_length)
        lengths = np.array([part.lengths[0] for part in parts])
        super().__init__(widest.k, widest.v, widest.ids, lengths, np.arange(len(parts)), whole=False)
        self.parts = parts

    def write(self, layer: int, k: Array, v: Array) -> tuple[list[Array], list[Array]]:
        """Append k and v (B, K, S, Dh), each row to its own cache; return views of all of it, as KVCache.write."""
        views = [part.write(layer, k[b : b + 1], v[b : b + 1]) for b, part in enumerate(self.parts)]
        return [keys for (keys,), _ in views], [values for _, (values,) in views]

    def advance(self, ids: Array) -> None:
        """Count the positions of ids (B, S)."""
        for part, new in zip(self.parts, ids, strict=True):
            part.advance(new[None])


class Prefixes:
    """Keys and values of the beginnings of earlier prompts, the least recently used first.

    A beginning is kept and reused only in whole pieces of `piece` positions, which every request computes alike. So a
    reused prefix has the bits that computing it again would give, and no answer depends on earlier requests.
    """

    def __init__(self, piece: int) -> None:
        """Start empty."""
        self.piece, self.bytes = piece, 0
        self._kept: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    def fill(self, cache: KVCache, ids: Sequence[int]) -> int:
        """Copy the longest kept beginning of ids into an empty cache, except their last token; return its length."""
        limit, best, source = (len(ids) - 1) // self.piece * self.piece, 0, None
        for key in self._kept:
            same = 0
            while same < min(limit, len(key)) and key[same : same + self.piece] == tuple(ids[same : same + self.piece]):
                same += self.piece
            if same > best:
                best, source = same, key
        if source is not None:
            self._kept.move_to_end(source)
            _copy(self._kept[source], cache, best)
        return best

    def keep(self, cache: KVCache, ids: Sequence[int], config_cache: KVCache) -> None:
        """Keep the whole pieces of ids that the cache starts with, in config_cache, which has room for just these."""
        key = tuple(ids[: len(ids) // self.piece * self.piece])
        for other in [other for other in self._kept if key[: len(other)] == other]:
            self._forget(other)
        _copy(cache, config_cache, len(key))
        self._kept[key] = config_cache
        self.bytes += size(config_cache)

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether all whole pieces of ids are kept, or there are none."""
        key = tuple(ids[: len(ids) // self.piece * self.piece])
        return any(kept[: len(key)] == key for kept in self._kept) or not key

    def drop_oldest(self) -> bool:
        """Forget the least recently used beginning; False if there is none."""
        if not self._kept:
            return False
        self._forget(next(iter(self._kept)))
        return True

    def _forget(self, key: tuple[int, ...]) -> None:
        self.bytes -= size(self._kept.pop(key))


def size(cache: KVCache) -> int:
    """The bytes of keys and values of a cache."""
    return cache.k.nbytes + cache.v.nbytes


def _copy(source: KVCache, target: KVCache, length: int) -> None:
    for old, new in ((source.k, target.k), (source.v, target.v)):
        new[..., :length, :] = old[..., :length, :]
    target.ids[:, :length], target.lengths[:] = source.ids[:, :length], length
