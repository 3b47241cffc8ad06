"""What programs print of a tensor: its shape, its sum, and the first and last numbers along each axis.

llama-eval-callback prints that of every node of llama.cpp's graph. An excerpt shows which point is wrong first, as far
as a few numbers of four decimals can: an error below half a unit of what was printed leaves no trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import Array
from qwen3np.porting.floors import U
from qwen3np.porting.logprobs import View
from qwen3np.porting.shapes import LAST, readings

SUM = ".sum"  # the ending of a dump's name that holds the sum of a point and nothing else
ENDS = 3  # numbers that are printed at each end of an axis
# common_debug_cb_eval:   Qcur-0 = (f32)   ROPE(Qcur_normed-0{64, 16, 5, 1}, ...}) = {64, 16, 5, 1}
HEADER = re.compile(
    r"^\S+:\s+(?P<name>\S.*?) = \((?P<type>\w+)\)\s+(?P<made>\w+)\((?P<from>.*)\) = \{(?P<shape>[\d, ]+)\}$"
)
NUMBER = re.compile(r"-?(?:\d+\.\d+(?:e[-+]?\d+)?|nan|inf)", re.IGNORECASE)


@dataclass(frozen=True)
class Excerpt:
    """shape None: not known. numbers are in C order, ENDS from each end of each axis; unit is their last decimal."""

    sum: float
    shape: tuple[int, ...] | None = None
    numbers: tuple[float, ...] = ()
    unit: float = 1e-4


def read_excerpts(path: Path) -> dict[str, Excerpt]:
    """Return the excerpts in what llama-eval-callback printed. Of nodes of one name the last of a pass counts.

    Every look-up in the embedding begins a pass: the first is the prompt, the others are decode steps.
    """
    found: dict[str, Excerpt] = {}
    count, last = -1, 0
    for head, numbers, total in _blocks(path):
        if head["made"] == "GET_ROWS" and "token_embd" in head["from"]:
            count += 1
        name = head["name"]
        if re.search(r"\(|^node_|^leaf_|^norm(-\d+)?$", name) or head["type"] != "f32":
            continue
        shape = [int(n) for n in head["shape"].split(",")]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        last = max(count, 0)
        values = tuple(float(number) for number in numbers)
        unit = 10.0 ** -len(numbers[0].partition(".")[2]) if numbers else 1e-4
        found[f"decode.{last - 1}.{name}" if last else name] = Excerpt(total, tuple(shape[::-1]), values, unit)
    return found


def _blocks(path: Path) -> Iterator[tuple[re.Match[str], list[str], float]]:
    """Yield the header, the numbers and the sum of each node of a text."""
    head: re.Match[str] | None = None
    numbers: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if at := HEADER.match(line.rstrip()):
                head, numbers = at, []
            elif head is not None and (total := re.match(r"\s*sum = (\S+)", line)):
                yield head, numbers, float(total[1])
                head = None
            elif head is not None:
                numbers += NUMBER.findall(line)


def view_of_excerpt(
    name: str, excerpt: Excerpt, reference: Array, shape: tuple[int, ...], config: Config
) -> tuple[View, tuple[str, ...]] | None:
    """Return how a point is seen through an excerpt, and what was assumed of its layout.

    None where its shape fits in no way, or the point has numbers that no sum can hold. reference is the whole point.
    """
    if reference.shape != shape or not np.isfinite(reference).all():
        return None
    best: tuple[float, View, tuple[str, ...]] | None = None
    for notes, places in _layouts(name, excerpt, shape, config):
        if excerpt.numbers and len(excerpt.numbers) != prod(min(n, 2 * ENDS) for n in excerpt.shape or ()):
            return None
        is_last = LAST in notes
        own = np.take(reference, [-1], position_axis(name)) if is_last else reference
        view = _view(excerpt, places, own, is_last)
        away = float(np.linalg.norm(view.mine - view.of(own)))
        if best is None or away < 0.1 * best[0]:
            best = away, view, notes
    return None if best is None else best[1:]


def _layouts(
    name: str, excerpt: Excerpt, shape: tuple[int, ...], config: Config
) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Yield the notes of each reading, and where in the excerpt's tensor each number of the point stands."""
    if excerpt.shape is None:
        yield (), np.arange(prod(shape)).reshape(shape)
        return
    places = np.arange(prod(excerpt.shape)).reshape(excerpt.shape)
    for reading in readings(name, places, shape, config):
        yield reading.notes, reading.x


def _view(excerpt: Excerpt, places: Array, reference: Array, is_last: bool) -> View:
    """See numbers, relative to the root mean square of all, and the sum, relative to what noise makes of it."""
    count = prod(excerpt.shape) if excerpt.shape else places.size

    def arranged(x: Array) -> Array:
        y = np.zeros(count)
        y[places.ravel()] = x.astype(np.float64).ravel()
        return y

    def seen(x: Array) -> Array:
        y = arranged(x)
        total = [y.sum() / np.sqrt(count)]
        if not excerpt.numbers:
            return np.array(total).reshape(1, 1, 1, -1)
        ends = y.reshape(excerpt.shape)
        for axis, n in enumerate(ends.shape):
            if n > 2 * ENDS:
                ends = np.take(ends, [*range(ENDS), *range(n - ENDS, n)], axis)
        return np.concatenate((ends.ravel(), total)).reshape(1, 1, 1, -1)

    def size(x: Array) -> Array:
        y = seen(x)
        usual = np.sqrt(np.square(arranged(x)).mean())
        scale = np.hypot(y, usual)
        scale[..., -1] = 2 * usual
        return scale

    truth = seen(reference)
    mine = np.array([*excerpt.numbers, excerpt.sum / np.sqrt(count)]).reshape(truth.shape)
    # Half a unit of what was printed; the sum was added one by one, in float32.
    drift = 3 * U * np.sqrt(count) * np.abs(np.add.accumulate(arranged(reference))).max()
    slack = np.full(truth.shape, 0.51 * excerpt.unit)
    slack[..., -1] = (0.51e-6 + drift) / np.sqrt(count)
    near = mine - truth
    mine = truth + np.sign(near) * np.maximum(np.abs(near) - slack, 0)
    # Rounded once in printing, and moved as far again towards the reference.
    left = 2 * np.linalg.norm(slack) / max(np.linalg.norm(size(reference)), 1e-300)
    note = "a sum and a few numbers, as printed" if excerpt.numbers else "a sum"
    return View(note, mine, seen, size, is_last, resolution=float(left))
