"""The door: inputs are checked here, once, before qwen3.forward runs.

Ids, caches, memory, mapped files that changed on disk, and numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike

from qwen3np import qwen3
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ContextOverflowError, NonFiniteError
from qwen3np.memory import require_cache, require_memory
from qwen3np.numerics import Array, Edit, Numerics, Trace, named
from qwen3np.padding import on_the_right, padded, unpadded
from qwen3np.routing import replayed
from qwen3np.weights import LoadedWeights, identity, weight_shapes

LARGE = 1 << 28  # bytes: for larger logits we first check that there is enough free memory
CHUNK = 16  # positions searched together for non-finite numbers, which takes memory for all of their scores


def forward(
    weights: Mapping[str, Array],
    config: Config,
    input_ids: ArrayLike,
    cache: KVCache | None = None,
    *,
    numerics: str = "float32",
    engine: str = "fast",
    last_only: bool = False,
    head: bool = True,
    trace: Trace | None = None,
    edit: Edit | None = None,
    attention_mask: ArrayLike | None = None,
    routed_experts: ArrayLike | None = None,
) -> Array:
    """Compute the logits of the next token after each position.

    Parameters
    ----------
    weights
        Arrays under Hugging Face's tensor names.
    config
        The sizes of the model.
    input_ids
        (B, S) token ids, or (S,) read as B = 1.
    cache
        Keys and values of earlier positions. Sequence b continues at position cache.lengths[b]; its keys and values are
        appended, and the lengths advance at the end.
    numerics
        "float32", "float64", "bfloat16" (rounds where transformers' eager bfloat16 does) or "bfloat16-grouped" (the
        same, except for the sum over experts).
    engine
        "fast", "plain" (the formulas) or "exact" (each operation correctly rounded; float32 and bfloat16).
    last_only
        Compute the logits of the last position only.
    head
        False: return the hidden states after the final norm instead of logits.
    trace
        A callable (name, array), called once for each recorded point, in order. It may keep the array, not change it.
    edit
        A callable (name, array) -> array or None; an array takes the place of that point.
    attention_mask
        For padded ids (B, S): 1 for tokens, 0 for padding, on the left or on the right. Logits at padding are 0. Points
        are recorded with all rows moved to the left.
    routed_experts
        (B, S, L, k), or (S, L, k) read as B = 1: the experts of each token in each layer, instead of the router's
        choice, as an engine recorded them; -1 in all k places leaves the choice to the router. Their weights are still
        the router's, and dense layers ignore theirs.

    Returns
    -------
    (B, S, V) logits, or (B, 1, V) with last_only; without the head (B, S, D) or (B, 1, D). float64 for "float64",
    float32 otherwise.

    Raises
    ------
    ValueError
        For ids that are empty, out of range or not integers; a cache that does not match (ContextOverflowError when it
        is full); unknown numerics or engine; logits larger than the free memory. CheckpointError for a mapped file that
        changed after it was loaded. After an error nothing has been changed.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> qwen3np.forward(model.weights, model.config, [281, 297, 272, 1132, 259]).shape
    (1, 5, 2048)

    """
    if attention_mask is not None:
        if cache is not None or routed_experts is not None:
            raise ValueError(
                "attention_mask: cannot be combined with a cache or routed_experts, which know each position"
            )
        rows = unpadded(input_ids, attention_mask)
        options: dict[str, Any] = {"numerics": numerics, "engine": engine, "head": head, "trace": trace, "edit": edit}
        return padded(forward(weights, config, on_the_right(rows), **options), rows, attention_mask, last_only)
    num = named(numerics, engine)
    require_unchanged(weights)
    if head and not config.tie_word_embeddings and "lm_head.weight" not in weights:
        raise ValueError("weights: there is no lm_head.weight: this checkpoint makes embeddings, not text")
    ids = checked_ids(input_ids, config)
    if routed_experts is not None:
        edit = replayed(routed_experts, config, ids, edit)
    if head and not last_only:
        _require_room(ids.size, config, num)
    last: int = ids.shape[1]
    if cache is not None:
        check_cache(cache, weights, config, num, *ids.shape)
        last += int(cache.lengths[cache.rows].max())
        _note(cache, weights, config, num, ids.shape[1])
    with num.ops.session(weights, config, ids.size, last, num):
        try:
            return qwen3.forward(
                weights,
                config,
                ids,
                cache,
                num,
                last_only=last_only,
                head=head,
                trace=trace,
                edit=None if edit is None else _checked_edit(edit),
            )
        except (KeyError, ValueError):
            require_tensors(weights, config)  # says which tensor is missing or of another shape
            raise


def require_tensors(weights: Mapping[str, Array], config: Config) -> None:
    """Raise ValueError, with both shapes, for the first tensor that is missing or has another shape."""
    for name, shape in weight_shapes(config).items():
        if name not in weights:
            if name == "lm_head.weight":  # a model without a head still computes hidden states
                continue
            raise ValueError(f"weights: there is no {name}, which must be {shape}")
        if np.shape(weights[name]) != shape:
            raise ValueError(f"weights: {name} is {np.shape(weights[name])}, and must be {shape} (out, in)")


def _checked_edit(edit: Edit) -> Edit:
    """Return an edit whose arrays have the shape and dtype of the point they replace, or raise ValueError."""

    def checked(name: str, x: Array) -> Array | None:
        edited = edit(name, x)
        if edited is None:
            return None
        y = np.asarray(edited)
        if y.shape != x.shape or not np.can_cast(y.dtype, x.dtype, "same_kind"):
            raise ValueError(f"edit: {name} must stay {x.dtype} {x.shape}, but became {y.dtype} {y.shape}")
        return y.astype(x.dtype, copy=False)

    return checked


def checked_sequence(ids: ArrayLike, config: Config) -> list[int]:
    """Return the ids of one sequence as a list. Raises ValueError as checked_ids, and for more than one sequence."""
    checked = checked_ids(ids, config)
    if np.ndim(ids) != 1:
        raise ValueError(f"input_ids: a sequence must be a flat list of ids, not an array of shape {checked.shape}")
    return checked[0].tolist()


def checked_ids(input_ids: ArrayLike, config: Config, name: str = "input_ids") -> Array:
    """Return ids as an integer array (B, S). Raises ValueError, which says what is wrong with `name` and where."""
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
    """Raise CheckpointError if a mapped file was modified or truncated after loading: its weights are unchecked.

    Replacing or deleting the file is harmless: the old one stays mapped.
    """
    if isinstance(weights, LoadedWeights):
        for path, (number, *before) in weights.files.items():
            try:
                now, *found = identity(path)
            except OSError:
                continue
            if now == number and found != before:
                raise CheckpointError(f"{path}: was changed after it was loaded; load it again")


def _require_room(positions: int, config: Config, num: Numerics) -> None:
    """Raise ValueError if the logits of this many positions would exceed the free memory."""
    size = positions * config.vocab_size * num.dtype.itemsize
    if size > LARGE:
        way_out = "ask only for the last position (last_only=True), or proceed in pieces with a cache"
        require_memory(size, f"logits: {positions:,} positions in {num.dtype}", way_out)


def check_cache(
    cache: KVCache, weights: Mapping[str, Array], config: Config, num: Numerics, batch_size: int, new: int
) -> None:
    """Raise ValueError unless `new` more positions of batch_size sequences fit, for this model and these numerics.

    ContextOverflowError, a ValueError, when there is no room for them.
    """
    layers, _, heads, room, head_dim = cache.k.shape
    expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    if (layers, heads, head_dim) != expected:
        raise ValueError(
            f"cache: made for another config: its (layers, KV heads, head_dim) are {(layers, heads, head_dim)}, "
            f"the model's {expected}"
        )
    if not np.can_cast(num.storage, cache.k.dtype, "safe"):
        raise ValueError(f"cache: dtype {cache.k.dtype} cannot hold numerics {num.name!r}")
    if batch_size != cache.batch_size:
        raise ValueError(f"cache: holds {cache.batch_size} sequences, but input_ids has {batch_size}")
    origin = cache.notes.get("origin")
    if origin and cache.lengths.any() and (difference := origin.differs(weights, config, num)):
        raise ValueError(f"cache: what it holds was made with {difference}; use a new one, or set its lengths to 0")
    for row, length in zip(cache.rows.tolist(), cache.lengths[cache.rows].tolist(), strict=True):
        if not 0 <= length <= room - new:
            raise ContextOverflowError(
                f"cache: sequence {row} holds {length} of {room} positions; {new} more do not fit"
            )


def require_room_in_cache(cache: KVCache, length: int) -> None:
    """Raise ValueError unless there is memory for `length` positions per sequence, not counting what is in use."""
    layers, _, heads, _, head_dim = cache.k.shape
    taken = int(np.minimum(cache.notes.get("filled", cache.lengths)[cache.rows], length).sum())
    require_cache((layers, len(cache.rows), heads, length, head_dim), cache.k.dtype, taken=taken)


def cache_holds(cache: KVCache, b: int, ids: Array) -> bool:
    """Whether sequence b of the cache holds exactly these ids (N,)."""
    row = cache.rows[b]
    return bool(cache.lengths[row] == len(ids) and np.array_equal(cache.ids[row, : len(ids)], ids))


def _note(cache: KVCache, weights: Mapping[str, Array], config: Config, num: Numerics, new: int) -> None:
    """Note what an empty cache is filled with, and how much memory is in use."""
    if not cache.lengths.any():
        cache.notes["origin"] = _Origin(weights, config, num)
    if "filled" not in cache.notes:
        cache.notes["filled"] = np.zeros_like(cache.lengths)  # the maximum of each length so far
    np.maximum(cache.notes["filled"], cache.lengths + new, out=cache.notes["filled"])  # at most `new` too many


# The fields of a config that keys and values do not depend on.
_OTHERS = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "eos_token_id")
_settings = attrgetter(*(field.name for field in fields(Config) if field.name not in _OTHERS))


class _Origin:
    """What a cache was filled with: which weights (the same arrays, or the same first numbers) and which settings."""

    def __init__(self, weights: Mapping[str, Array], config: Config, num: Numerics) -> None:
        self.arrays = self._refs(weights)
        self.sample, self.settings = self._sample(weights), (num.name, num.engine, *_settings(config))

    def differs(self, weights: Mapping[str, Array], config: Config, num: Numerics) -> str | None:
        """Say what of these is neither what the cache was filled with nor a copy of it.

        Changes in place, changes of experts alone, and weights with the same first numbers go unnoticed.
        """
        if self.settings != (num.name, num.engine, *_settings(config)):
            return "another config, other numerics or another engine"
        if not self.arrays or any(array() is not weights.get(name) for name, array in self.arrays.items()):
            if not np.array_equal(self.sample, self._sample(weights)):
                return "other weights"
            self.arrays = self._refs(weights)  # the next look is quick
        return None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the arrays, which do not exist in another process."""
        return {**self.__dict__, "arrays": {}}

    @staticmethod
    def _names(weights: Mapping[str, Array]) -> list[str]:
        # without experts: of a mapped file, only chosen experts are read
        return [name for name in weights if name.startswith("model.") and ".experts." not in name]

    @classmethod
    def _refs(cls, weights: Mapping[str, Array]) -> dict[str, ref[Array]]:
        return {name: ref(weights[name]) for name in cls._names(weights)}

    @classmethod
    def _sample(cls, weights: Mapping[str, Array]) -> Array:
        return np.concatenate(
            [np.ravel(weights[name][:8])[:8].astype(np.float64) for name in sorted(cls._names(weights))]
        )


def require_finite(
    logits: Array, weights: Mapping[str, Array], config: Config, ids: Sequence[int] | Array, numerics: str
) -> None:
    """Raise NonFiniteError if logits hold NaN or infinity; it names the first such point and its token in ids."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(_where(weights, config, ids, numerics))


def require_finite_point(
    name: str, x: Array, weights: Mapping[str, Array], config: Config, ids: Array, numerics: str
) -> None:
    """Raise NonFiniteError if a recorded point of ids (B, S) holds NaN or infinity."""
    if (bad := _not_finite(name, x)).any():
        raise NonFiniteError(_where(weights, config, ids[np.argwhere(bad)[0, 0]].tolist(), numerics))


class _Found(Exception):
    pass


def position_axis(name: str) -> int:
    """Return the axis of a recorded point that runs over the new positions."""
    return 2 if name.endswith(("_rope", ".scores", ".probs")) else 1


def _not_finite(name: str, x: Array) -> Array:
    """Return where a recorded point is NaN or infinite. Masked scores are -inf, which is fine."""
    return np.isnan(x) | np.isposinf(x) if name.endswith(".scores") else ~np.isfinite(x)


def _where(weights: Mapping[str, Array], config: Config, ids: Sequence[int] | Array, numerics: str) -> str:
    """Compute ids again, and describe the first point that is not finite."""
    cache = KVCache.allocate(config, 1, len(ids), named(numerics).storage)
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
    """Say whether the weights of a point are to blame, as the end of a sentence."""
    module = "model.embed_tokens" if point == "lm_head" and config.tie_word_embeddings else point
    for name, tensor in weights.items():
        own = name.removeprefix(f"{module}.")
        if own != name and ("." not in own or module.endswith(".experts")):
            bad = tensor.size - int(np.isfinite(tensor).sum())
            if bad:
                return f": {name} holds {bad:,} of {tensor.size:,} that are not finite, so the checkpoint is damaged"
    return f": values overflow {numerics}"
