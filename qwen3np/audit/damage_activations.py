"""The largest magnitude at each recorded point, next to the ranges of short formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3np.audit.damage_runs import windows
from qwen3np.guard import forward, position_axis
from qwen3np.model import Model
from qwen3np.numerics import Array

FLOAT16, FP8 = 65504.0, 448.0  # the largest finite numbers of float16 and of e4m3


@dataclass(frozen=True)
class Largest:
    """The largest magnitude at a point, where in the text it is, and its ratio to the ends of float16 and fp8."""

    point: str
    largest: float
    token: int  # the index in the text
    float16: float
    fp8: float


def activations(model: Model, input_ids: Sequence[int], *, window: int | None = None) -> list[Largest]:
    """Return the largest magnitude at each recorded point over a text, in the order of the forward pass.

    The arithmetic is float32, with windows as in damage. Ratios above 1 overflow. Raises ValueError as damage does.
    """
    found: dict[str, tuple[float, int]] = {}
    ids = windows(input_ids, model.config, window)

    def look(name: str, x: Array) -> None:
        if name.endswith("router_indices"):
            return
        sizes = np.abs(x)
        if name.endswith(".scores"):
            sizes[np.isinf(sizes)] = 0  # hidden positions
        place = np.unravel_index(sizes.argmax(), x.shape)
        if (largest := float(sizes[place])) > found.get(name, (-1.0, 0))[0]:
            found[name] = largest, start + int(place[position_axis(name)])

    for n, one in enumerate(ids):
        start = n * ids.shape[1]
        forward(model.weights, model.config, one, trace=look)
    return [Largest(name, x, token, x / FLOAT16, x / FP8) for name, (x, token) in found.items()]
