"""What wrong numbers reveal without trying bugs: where the error is, and simple explanations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from qwen3np.guard import position_axis
from qwen3np.numerics import Array
from qwen3np.porting.align import kept
from qwen3np.porting.bench import SURE, TINY, Bench
from qwen3np.porting.floors import limit
from qwen3np.porting.points import CHOICE, POINTS, Place, input_name, split_layer, split_pass
from qwen3np.porting.record import HEADS, distance
from qwen3np.porting.shapes import LAST

TENSORS = 400  # other tensors of the same shape that are tried


def telltales(bench: Bench) -> list[str]:
    """Return sentences about the numbers of the bench's point."""
    if bench.point.endswith(CHOICE):
        return []
    here = bench.aligned.found[bench.point]
    right = kept(bench.golden, here, bench.point, bench.right.made(bench.point)).astype(np.float64)
    mine = here.part.astype(np.float64)
    floor = bench.reports[bench.point].added_floor or 0.0
    found = list(_places(bench, mine, right, floor))
    seen = np.isfinite(right) & np.isfinite(mine)
    x, y = mine[seen], right[seen]
    factor = float(x @ y / max(y @ y, TINY))
    if np.sum((x - factor * y) ** 2) <= (1 - SURE) * np.sum((x - y) ** 2):
        found.append(f"it is {factor:.6g} times what it should be")
    if here.whole.shape == bench.aligned.shapes[bench.point] and here.view is None and LAST not in here.notes:
        found += _sources(bench, here.whole.astype(np.float64))
    return found


def _some(indices: Sequence[int]) -> str:
    """Return indices in words, with ranges combined."""
    if len(indices) > 2 and indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")


def _places(bench: Bench, mine: Array, right: Array, floor: float) -> Iterator[str]:
    name = bench.point
    kind = split_layer(name)[1].rpartition(".")[2]
    axes = {"positions": position_axis(name)} | ({"heads": HEADS[kind]} if kind in HEADS else {})
    axes |= {"sequences": 0} if mine.shape[0] > 1 else {}
    features = mine.ndim - 1
    if kind not in ("scores", "probs") and bench.aligned.found[name].view is None:
        axes["features"] = features
    for what, axis in axes.items():
        count = mine.size // max(mine.shape[axis], 1)
        away = distance(mine, right, axis)[1]
        is_wrong = ~(away <= limit(floor, count) * (2 if what == "features" else 1))
        if 0 < is_wrong.sum() < is_wrong.size and (what != "features" or is_wrong.sum() <= 0.75 * is_wrong.size):
            wrong = np.flatnonzero(is_wrong).tolist()
            tail = ""
            part = np.take(mine, wrong, axis)
            if not part.any() and np.take(right, wrong, axis).any():
                tail = ", where all is 0"
            yield f"wrong at {len(wrong)} of {is_wrong.size} {what}: {_some(wrong)}{tail}"


def _sources(bench: Bench, mine: Array) -> list[str]:
    """Return what the numbers are instead: the result of another tensor, the input, a point shifted by one position."""
    name = bench.point
    prefix, (layer, kind) = split_pass(name)[0], split_layer(name)
    right = bench.right.made(name).astype(np.float64)
    limit_here = max(bench.rounding(name), 1e-4 * bench.error(name))

    def is_it(y: Array) -> bool:
        if y.size != mine.size:
            return False
        y = y.reshape(mine.shape).astype(np.float64)
        seen = np.isfinite(mine) & np.isfinite(y)
        left = np.sum((mine - y)[seen] ** 2) / max(np.sum(mine[seen] ** 2), TINY)
        return bool(seen.any() and left <= limit_here)

    found: list[str] = []
    if not mine.any():
        return ["all is 0"]
    inputs = [input_name(layer, x, bench.golden.config) for x in POINTS[kind].inputs]
    for source in inputs:
        if prefix + source in bench.aligned.given and is_it(bench.aligned.given[prefix + source]):
            found.append(f"it is {source}: nothing was done")
    axis = position_axis(name)
    if mine.shape[axis] > 2:
        for by, words in ((1, "one position too late"), (-1, "one position too early")):
            cut = [slice(None)] * mine.ndim
            own, other = list(cut), list(cut)
            own[axis] = slice(1, None) if by > 0 else slice(None, -1)
            other[axis] = slice(None, -1) if by > 0 else slice(1, None)
            x, y = mine[tuple(own)], right[tuple(other)]
            seen = np.isfinite(x) & np.isfinite(y)
            if seen.any() and np.sum((x - y)[seen] ** 2) <= limit_here * max(np.sum(x[seen] ** 2), TINY):
                found.append(f"it stands {words}")
    return found + list(_other_tensor(bench, mine, is_it))


def _other_tensor(bench: Bench, mine: Array, is_it: object) -> Iterator[str]:
    """Yield other tensors of the same shape that produce these numbers."""
    assert callable(is_it)
    name = bench.point
    prefix, point = split_pass(name)
    layer, kind = split_layer(name)
    if f"{point}.weight" not in bench.weights:
        return
    own = bench.weights[f"{point}.weight"]
    _, ids, positions = next(p for p in bench.golden.passes if p[0] == prefix)
    place = Place(point, bench.weights, bench.golden.config, bench.right.numerics, ids, positions)
    inputs = [prefix + input_name(layer, x, bench.golden.config) for x in POINTS[kind].inputs]
    values = [bench.right.value(x) for x in inputs]
    others = [k for k, w in bench.weights.items() if w.shape == own.shape and k != f"{point}.weight"][:TENSORS]
    for other in others:
        swapped = replace(place, weights={**bench.weights, f"{point}.weight": bench.weights[other]})
        if is_it(bench.table[kind].run(swapped, *values)):
            yield f"this is what {other} makes"
            return
    if own.ndim == 2 and own.shape[0] == own.shape[1]:
        swapped = replace(place, weights={**bench.weights, f"{point}.weight": np.ascontiguousarray(own.T)})
        if is_it(bench.table[kind].run(swapped, *values)):
            yield f"this is what {point}.weight makes when it is transposed"
