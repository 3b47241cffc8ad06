"""The experts of a sparse layer: each gets all of its tokens at once, and the threads share the experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen3np.numerics import Array, Numerics
from qwen3np.ops.fast.pages import will_need
from qwen3np.ops.fast.threads import share
from qwen3np.qwen3 import Scope


def combine(x: Array, chosen: Array, p: Array, expert: Callable[[int, Array], Array], m: Scope, num: Numerics) -> Array:
    """Return the sum over k of p * expert(x), for the experts that were chosen. x (B, S, D) -> (B, S, D).

    chosen and p (B, S, k). No other expert's weights are touched: of a mapped file only those are read. They are added
    in ascending order as by transformers' eager experts (models/qwen3_moe/modeling_qwen3_moe.py), in bfloat16 rounding
    each sum; in the order of p and rounding once if num.grouped, as by its grouped ones (integrations/moe.py).
    """
    if not num.grouped:
        order = np.argsort(chosen, axis=-1)
        chosen, p = np.take_along_axis(chosen, order, axis=-1), np.take_along_axis(p, order, axis=-1)
    rows, k = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
    chosen, by_weight = chosen.reshape(-1), p.reshape(-1, 1)
    outputs = np.empty((len(chosen), rows.shape[1]), x.dtype)  # (tokens * k, D)

    def apply(part: tuple[int, Array]) -> None:
        n, places = part
        for name in ("gate_proj", "up_proj", "down_proj"):  # page by page the system would read more, and wait more
            will_need(m[f"{n}.{name}.weight"])
        outputs[places] = num.round(expert(n, rows[places // k]) * by_weight[places])

    places = np.argsort(chosen, kind="stable")
    hit, starts = np.unique(chosen[places], return_index=True)
    parts = list(zip(hit.tolist(), np.split(places, starts[1:]), strict=True))
    share(parts, 3 * m[f"{hit[0]}.up_proj.weight"].size * len(chosen), apply)

    addends = outputs.reshape(len(rows), k, -1)
    y = addends[:, 0]
    for n in range(1, k):
        y = y + addends[:, n]
        if not num.grouped:
            y = num.round(y)
    return num.round(y).reshape(x.shape)
