"""Arrays of a dump brought to the layout of a point: the reading of their shape that is nearest to the reference."""

from __future__ import annotations

from itertools import takewhile

import numpy as np

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import Array
from qwen3np.porting.points import split_layer, split_pass
from qwen3np.porting.record import HEADS, Recording, distance
from qwen3np.porting.shapes import COPIES, HEAD_ORDER, LAST, readings


def recognise(
    name: str, x: Array, golden: Recording, shape: tuple[int, ...], permuted: bool = True
) -> tuple[tuple[str, ...], Array, Array, Array] | None:
    """Return what had to be assumed of x; x in the reference's layout; the part that is compared; the reference's.

    Of the readings that fit the point's whole shape, or the shape of what the recording keeps of it, the one nearest to
    the reference; None where there is none. A less plain one must be nearer by far: noise alone decides between two
    wrong ones. Of several sequences that are read alike, the one farthest away, also where most of them are as near as
    a reading in which they would be positions.
    """
    reference, axis = golden.points[name], position_axis(name)
    start = _start(golden, name)
    options = [(reading, True) for reading in readings(name, x, shape, golden.config, start)]
    if reference.shape != shape:
        options += [(reading, False) for reading in readings(name, x, reference.shape, golden.config, whole=False)]
    best: dict[tuple[str, ...], tuple[float, Array, Array, Array]] = {}
    copies: dict[tuple[str, ...], list[float]] = {}
    for reading, is_whole in options:
        y = reading.x
        part = golden.cut(name, y) if is_whole and LAST not in reading.notes else y
        truth = np.take(reference, [-1], axis) if LAST in reading.notes else reference
        if part.shape != truth.shape:
            continue
        away = distance(part, truth, axis)[0]
        away = away if np.isfinite(away) else np.inf
        notes = (*reading.notes, *(() if is_whole or LAST in reading.notes else ("cut as the recording",)))
        is_copy = any(note.endswith(COPIES) for note in notes)
        if is_copy:
            copies.setdefault(notes, []).append(away)
        if notes not in best or (away > best[notes][0] if is_copy else away < 0.1 * best[notes][0]):
            best[notes] = away, y, part, truth
    if not best:
        return None
    chosen: tuple[str, ...] | None = None
    for notes, (away, *_) in best.items():
        if chosen is None or away < 0.1 * best[chosen][0]:
            chosen = notes
    assert chosen is not None
    for notes, each in copies.items():
        half = (len(each) - 1) // 2 if x.ndim >= len(shape) else len(each) // 2
        if chosen not in copies and sorted(each)[half] <= 10 * best[chosen][0]:
            chosen = notes
    away, y, part, truth = best[chosen]
    notes = tuple(note for note in chosen if note != "cut as the recording")
    if permuted and away > 0.1 and y.shape == shape and golden.heads is None:
        order = head_order(name, part, truth, golden.config)
        if order is not None:
            y, part = (_permuted(name, z, order, golden.config) for z in (y, part))
            if distance(part, truth, axis)[0] < 0.01:
                return (*notes, HEAD_ORDER), y, part, truth
            y, part = best[chosen][1:3]
    return notes, y, part, truth


def _heads_first(name: str, x: Array, config: Config) -> Array:
    kind = split_layer(name)[1].rpartition(".")[2]
    if kind in HEADS:
        return np.moveaxis(x, HEADS[kind], 0)
    return np.moveaxis(x.reshape(*x.shape[:2], -1, config.head_dim), 2, 0)


def head_order(name: str, x: Array, truth: Array, config: Config) -> list[int] | None:
    """Return the head of x that matches each head of the truth; None if heads are in the same order."""
    kind = split_layer(name)[1].rpartition(".")[2]
    if kind not in (*HEADS, "q_proj", "k_proj", "v_proj", "context"):
        return None
    mine, own = (_heads_first(name, z, config).astype(np.float64) for z in (x, truth))
    mine, own = (np.where(np.isfinite(z), z, 0).reshape(len(z), -1) for z in (mine, own))
    if len(own) < 2:
        return None
    norms = [np.linalg.norm(z, axis=1) + np.finfo(np.float64).tiny for z in (own, mine)]
    order = np.argmax((own @ mine.T) / np.outer(*norms), 1).tolist()
    return order if sorted(order) == list(range(len(own))) and order != sorted(order) else None


def _permuted(name: str, x: Array, order: list[int], config: Config) -> Array:
    kind = split_layer(name)[1].rpartition(".")[2]
    if kind in HEADS:
        return np.take(x, order, HEADS[kind])
    heads = x.reshape(*x.shape[:2], -1, config.head_dim)
    return np.take(heads, order, 2).reshape(x.shape)


def _start(golden: Recording, name: str) -> int:
    """Return how many positions come before a point's pass."""
    own = split_pass(name)[0]
    return sum(ids.shape[1] for _, ids, _ in takewhile(lambda p: p[0] != own, golden.passes))
