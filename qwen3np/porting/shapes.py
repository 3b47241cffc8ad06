"""Converts the shapes in which programs print a point to the reference's.

Every axis of a point has a letter: B sequences, h heads, S new positions, T positions so far, d the lanes of a head, f
other features. A dump may join neighbouring axes, put them in another order, leave out those of length 1, keep one
position or too many, and repeat key heads or sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import prod

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.points import split_layer

# What may have to be assumed of an array.
LAST, LANES, UNMASKED = "only the last position", "RoPE lanes interleaved", "before the mask"
HEAD_ORDER, SO_FAR, PADDED = "heads in another order", "only the positions so far", "positions of padding left out"
WINDOW, CACHE, REPEATED = "only the positions in the window", "the new positions of a cache", "heads repeated"
COPIES = "equal sequences"
EXCHANGED, FLATTENED, APART = "heads and positions exchanged", "heads flattened", "heads apart"
FLAT = ("q_proj", "k_proj", "v_proj", "context")  # with one axis for heads and lanes
ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm", "q_rope", "k_rope")


@dataclass(frozen=True)
class Reading:
    """An array in the reference's layout, and the assumptions behind the conversion."""

    notes: tuple[str, ...]
    x: Array


def letters(kind: str) -> str:
    """Return the axes of a point in the reference's order; flat points join h and d."""
    kind = kind.rpartition(".")[2]
    if kind in (*FLAT, "q_norm", "k_norm"):
        return "BShd"
    return {"q_rope": "BhSd", "k_rope": "BhSd", "scores": "BhST", "probs": "BhST"}.get(kind, "BSf")


def slides(config: Config) -> bool:
    """Whether any layer has a sliding window."""
    return any(config.window(i) is not None for i in range(config.num_hidden_layers))


def sizes_of(kind: str, shape: Sequence[int], config: Config) -> dict[str, int]:
    """Return the length of each axis of a point of this shape."""
    of = letters(kind)
    if len(shape) == 3 and of == "BShd":
        shape = (*shape[:2], shape[2] // config.head_dim, config.head_dim)
    return dict(zip(of, shape, strict=True))


def readings(
    name: str, x: Array, shape: tuple[int, ...], config: Config, start: int = 0, whole: bool = True
) -> Iterator[Reading]:
    """Yield every interpretation of x as a point of this shape, the simplest first.

    start is the first position of the pass. Unless whole, shape is what a recording kept of the point.
    """
    kind = split_layer(name)[1]
    sizes = sizes_of(kind, shape, config)
    forms = [x, *_ungrouped(kind, x, config)]
    for notes, wanted in _lengths(kind, x, sizes, config, start) if whole else [((), sizes)]:
        for how, y in (found for form in forms for found in _arranged(kind, form, wanted)):
            for more, z in _selected(y, wanted, sizes, kind, start):
                found = z.reshape(*shape[:1], *(_target(kind, shape, sizes, z)))
                all_notes = (*notes, *how, *more)
                yield Reading(all_notes, found)
                if kind.endswith(ROTATED):
                    lanes = found.reshape(-1, config.head_dim // 2, 2)  # pairs side by side: half-split order undone
                    yield Reading((*all_notes, LANES), np.swapaxes(lanes, 1, 2).reshape(found.shape))


def _target(kind: str, shape: tuple[int, ...], sizes: dict[str, int], z: Array) -> tuple[int, ...]:
    of = letters(kind)
    new = z.shape[of.index("S")]
    at = 2 if of[1] == "h" else 1
    return tuple(new if i == at else n for i, n in enumerate(shape) if i)


def _ungrouped(kind: str, x: Array, config: Config) -> Iterator[Array]:
    """Yield x with two neighbouring axes joined that may be key heads and the query heads of each."""
    pair = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for i in range(x.ndim - 1):
        if "h" in letters(kind) and 1 not in pair and x.shape[i : i + 2] == pair:
            yield x.reshape(*x.shape[:i], pair[0] * pair[1], *x.shape[i + 2 :])


def _lengths(
    kind: str, x: Array, sizes: dict[str, int], config: Config, start: int
) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """Yield lengths of the axes, B, h, S and T other than the point's where x has more or fewer numbers."""
    forms: list[tuple[tuple[str, ...], dict[str, int]]] = [((), sizes)]
    if kind.endswith(("_rope", "_norm", "k_proj", "v_proj")) and kind.rpartition(".")[2][0] in "kv":
        heads = config.num_attention_heads
        if heads > sizes["h"]:
            forms.append(((REPEATED,), sizes | {"h": heads}))
    whole = x.ndim >= len(sizes) - kind.endswith(FLAT)
    if whole and x.shape[0] > sizes["B"] and x.shape[0] % sizes["B"] == 0:  # copies
        forms += [(notes, form | {"B": x.shape[0]}) for notes, form in forms]
    yield from forms
    if sizes["S"] > 1:
        yield from (((*notes, LAST), form | {"S": 1}) for notes, form in forms)
    for axis in ("S", "T", "B", *("f" if kind == "lm_head" else "")):
        for notes, form in forms:
            if axis not in form:
                continue
            length, rest = divmod(x.size, max(prod(form.values()) // form[axis], 1))
            if rest or length <= 0 or length == form[axis]:
                continue
            if length > form[axis] or (axis == "T" and slides(config)):
                yield notes, form | {axis: length}
    if "T" in sizes:  # a padded prefill has square scores
        for notes, form in forms:
            heads = max(form["B"] * form["h"], 1)
            square = round((x.size / heads) ** 0.5)
            if square > sizes["T"] and square * square * heads == x.size:
                yield notes, form | {"S": square, "T": square}
            if sizes["S"] > 1 and x.size % heads == 0:
                yield (*notes, LAST), form | {"S": 1, "T": x.size // heads}


def _arranged(kind: str, x: Array, sizes: dict[str, int]) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Yield x as an array of these lengths in the reference's order of axes, from every order and joining that fits."""
    if x.size != prod(sizes.values()):
        return
    of, seen = letters(kind), [n for n in x.shape if n != 1]
    axes = [a for a in of if sizes[a] != 1]
    flat = kind.endswith(FLAT)
    natural = _joins(seen, axes, sizes)
    for order in permutations(axes):
        joined = _joins(seen, order, sizes)
        if joined is None or not all(_buffer(part, axes) for part in joined):
            continue
        plain = list(order) == axes
        # with the reference's own shape another order is no layout, unless two axes are as long as each other
        as_long = [sizes[a] for a in order] == [sizes[a] for a in axes] and all(len(part) == 1 for part in joined)
        is_own = natural is not None and all(len(part) == 1 for part in natural if part != ["h", "d"])
        if not plain and is_own and not as_long:
            continue
        y = x.reshape([sizes[a] for a in order])
        y = np.transpose(y, [order.index(a) for a in axes]).reshape([sizes[a] for a in of])
        notes: list[str] = []
        if sizes["B"] == 1 and sizes["S"] != 1 and len(x.shape) < len(of) - flat and x.shape[:1] != (1,):
            notes.append("no batch axis")
        hd = ["h", "d"]
        is_joined = any(part[-2:] == hd for part in joined)
        if not plain and [a for a in order if a not in "hS"] == [a for a in axes if a not in "hS"]:
            notes.append(EXCHANGED)
        elif not plain:
            notes.append("axes in another order")
        if "h" in of and "d" in of and sizes["h"] > 1:
            if is_joined and not flat:
                notes.append(FLATTENED)
            elif flat and not is_joined and EXCHANGED not in notes:
                notes.append(APART)
        if any(len(part) > 1 and part != hd for part in joined):
            notes.append("flattened")
        yield tuple(notes), y


def _joins(seen: Sequence[int], order: Sequence[str], sizes: dict[str, int]) -> list[list[str]] | None:
    """Return which axes each axis of x joins; None if the lengths do not fit."""
    parts, rest = list[list[str]](), list(order)
    for length in seen:
        part, size = list[str](), 1
        while size < length and rest:
            part.append(rest.pop(0))
            size *= sizes[part[-1]]
        if size != length:
            return None
        parts.append(part)
    return None if rest else parts


def _buffer(part: Sequence[str], axes: Sequence[str]) -> bool:
    """Whether a program would join these axes in this order: lanes and features run fastest, sequences slowest."""
    if len(part) == 1:
        return True
    if part[0] == "B" and part[1] in "df" and "S" in axes:
        return False
    return all(a not in "dfT" for a in part[:-1]) and (part[-1] in "dfT" or "".join(part) in ("BS", "Bh", "BhS"))


def _selected(
    y: Array, wanted: dict[str, int], sizes: dict[str, int], kind: str, start: int
) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Yield the parts of a larger array that may be the point."""
    of = letters(kind)
    choices: list[list[tuple[str | None, slice]]] = []
    for axis in of:
        have, need = wanted[axis], sizes[axis]
        if axis == "h" and have != need:  # repeated: all copies must be equal
            group = have // need
            copies = y.reshape(*y.shape[: of.index("h")], need, group, *y.shape[of.index("h") + 1 :])
            same = np.take(copies, [0], of.index("h") + 1)
            if not np.array_equal(copies, np.broadcast_to(same, copies.shape), equal_nan=True):
                return
            choices.append([(None, slice(0, have, group))])
        elif axis == "S" and have > need:
            first = [("the first positions of a padded prompt", slice(0, need))] if start == 0 else []
            cached = [(CACHE, slice(start, start + need))] if start and start + need <= have else []
            choices.append([*first, *cached, ("the last positions", slice(have - need, have))])
        elif axis == "T" and have > need:
            choices.append([(SO_FAR, slice(0, need)), ("the last positions so far", slice(have - need, have))])
        elif axis == "f" and have > need:
            choices.append([("padding of the vocabulary left out", slice(0, need))])
        elif axis == "B" and have > need:
            choices.append([(f"{have // need} {COPIES}", slice(i, i + need)) for i in range(0, have - need + 1, need)])
        else:
            choices.append([(None, slice(None))])
    sequences, lengths = choices[0], range(max(map(len, choices[1:])))
    for one, i in product(sequences, lengths):  # positions and keys are padded on the same side
        picks = [one, *(c[min(i, len(c) - 1)] for c in choices[1:])]
        z = y[tuple(s for _, s in picks)]
        if "T" in of and z.shape[of.index("T")] < sizes["T"]:
            before = [(0, 0)] * (z.ndim - 1) + [(sizes["T"] - z.shape[-1], 0)]
            z = np.pad(z, before, constant_values=0 if kind.endswith("probs") else -np.inf)
            picks = [*picks, (WINDOW, slice(None))]
        if z.shape[of.index("B")] == sizes["B"]:
            yield tuple(note for note, _ in picks if note), z
