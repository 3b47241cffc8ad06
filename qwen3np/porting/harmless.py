"""Differences that are not bugs: positions shifted by a constant, and points that are misread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from qwen3np.numerics import FLOAT64, Array
from qwen3np.porting.align import Found, tolerance
from qwen3np.porting.floors import MARGIN, U
from qwen3np.porting.points import CHOICE, POINTS, split_layer, split_pass
from qwen3np.porting.record import Recording, distance
from qwen3np.qwen3 import rotate
from qwen3np.rope import inverse_frequencies, rotary_tables

FARTHEST = 1 << 16  # constant shifts of the positions that are tried
SCALED = 0.95  # the least cosine between a point and one that differs by factors
CLEARLY = {"float32": 0.05, "float16": 0.5, "bfloat16": 0.5}  # distances that successors could not overlook


def best_shift(x: Array, truth: Array, golden: Recording) -> int:
    """Return the shift, in whole positions, that brings the truth (heads, S, Dh) closest to x by rotation."""
    half = golden.config.head_dim // 2
    mine, own = (z[..., :half].astype(np.complex128) + 1j * z[..., half:] for z in (x, truth))
    lanes = (mine * own.conj()).sum((0, 1))
    frequencies = inverse_frequencies(golden.config, FLOAT64)
    best, score = 0, float(lanes.real.sum())
    for first in range(0, FARTHEST, 4096):
        shifts = np.arange(first, first + 4096)
        turned = np.exp(-1j * shifts[:, None] * frequencies)
        for sign, values in ((1, (turned @ lanes).real), (-1, (turned.conj() @ lanes).real)):
            at = int(values.argmax())
            if values[at] > score * (1 + 1e-12):
                best, score = sign * int(shifts[at]), float(values[at])
    return best


def left_after(x: Array, truth: Array, shift: int, golden: Recording) -> float:
    """Return the relative distance (heads, S, Dh) that remains after rotating the truth by a shift."""
    yarn = golden.config.rope_scaling
    config = replace(golden.config, rope_scaling=yarn and replace(yarn, attention_factor=1.0))  # the truth has it
    tables = rotary_tables(config, np.array([[shift]]), FLOAT64)
    return distance(x[None], rotate(truth[None].astype(np.float64), tables, FLOAT64), 2)[0]


def shifted(found: Mapping[str, Found], golden: Recording, port: str) -> tuple[dict[str, Array], bool]:
    """Return by how many positions each sequence (B,) of a rotated point is shifted, and whether all points agree.

    A shift is a whole number other than 0, and better by far than none. Points that are not shifted are left out.
    """
    shifts: dict[str, Array] = {}
    known: dict[int, list[int]] = {}
    names = [n for n, here in found.items() if n.endswith("_rope") and not here.fault and here.view is None]
    for name in names:
        here, floor = found[name], tolerance(name, golden, port)[0]
        mine: list[int] = []
        for b, (x, truth) in enumerate(zip(here.part, here.truth, strict=True)):
            away = left_after(x, truth, 0, golden)
            if away <= MARGIN * floor:
                mine.append(0)
                continue

            def fits(shift: int, x: Array = x, truth: Array = truth, away: float = away, floor: float = floor) -> bool:
                rest = left_after(x, truth, shift, golden)
                return rest < 0.1 * away and rest <= 3 * MARGIN * (floor + U * abs(shift))

            shift = next((s for s in known.get(b, ()) if fits(s)), None)
            if shift is None and len(known.get(b, ())) < 4:
                candidate = best_shift(x, truth, golden)
                shift = candidate if candidate and fits(candidate) else None
            if shift is None:
                break
            known.setdefault(b, []).append(shift)
            mine.append(shift)
        if len(mine) == len(here.part) and any(mine):
            shifts[name] = np.array(mine)
    values = list(shifts.values())
    agree = len(shifts) == len(names) and all(np.array_equal(v, values[0]) for v in values)
    return shifts, agree


def said(shift: Array) -> str:
    """Return a shift in words."""
    if len(set(shift.tolist())) == 1:
        return f"positions shifted by {shift[0]}"
    return f"positions shifted by {', '.join(map(str, shift))} in the sequences"


def follows(name: str, other: str) -> bool:
    """Whether the other point is computed from this one."""
    (own_pass, _), (other_pass, _) = split_pass(name), split_pass(other)
    (layer, kind), (other_layer, other_kind) = split_layer(name), split_layer(other)
    if own_pass != other_pass:  # later passes read keys and values
        before = not own_pass or (other_pass and int(own_pass.split(".")[1]) < int(other_pass.split(".")[1]))
        shared = kind.endswith(("k_rope", "v_proj")) and layer == other_layer
        return bool(before and shared and other_kind in _later(kind))
    if kind == "lm_head":
        return False
    if other_kind in ("model.norm", "lm_head"):
        return kind != "lm_head" and (kind, other_kind) != ("model.norm", "model.norm")
    if layer is None or other_layer is None:
        return kind == "model.embed_tokens" and other_layer is not None
    return other_layer > layer or (other_layer == layer and other_kind in _later(kind))


def shows(name: str, other: str, scaled: bool) -> bool:
    """Whether another point would be wrong if this one were; a norm on the way hides that one is scaled."""
    if not follows(name, other):
        return False
    (layer, kind), (other_layer, other_kind) = split_layer(name), split_layer(other)
    if not scaled or kind == "model.norm" or split_pass(name)[0] != split_pass(other)[0]:
        return True
    if layer == other_layer:
        return other_kind in _later(kind, norms=False)
    carried = kind in ("model.embed_tokens", "output") or "output" in _later(kind, norms=False)
    return carried and other_kind in ("attn_residual", "output")


def _later(kind: str, norms: bool = True) -> set[str]:
    """Return the kinds of the same layer that are computed from this one, also by way of norms or not."""
    later = {kind}
    for other, point in POINTS.items():
        if not norms and other.endswith("norm"):
            continue
        inputs = [x.removeprefix("all ") for x in point.inputs]
        inputs += ["mlp.down_proj", "mlp.experts"] if "mlp" in inputs else []
        if any(x in later for x in inputs):
            later.add(other)
    return later - {kind}


def is_wholesale(here: Found) -> bool:
    """Whether most numbers of a point differ, as in another tensor or layout, rather than a few."""
    truth = here.truth.astype(np.float64)
    seen = np.isfinite(truth)
    size = np.sqrt(np.square(truth[seen]).mean())
    return bool((np.abs(here.part.astype(np.float64)[seen] - truth[seen]) > 0.02 * size).mean() > 0.5)


def is_scaled(here: Found) -> bool:
    """Whether a point is the reference's but for a factor, nearly."""
    x, truth = (np.where(np.isfinite(here.truth), y, 0).astype(np.float64).ravel() for y in (here.part, here.truth))
    return bool(x @ truth > SCALED * np.linalg.norm(x) * np.linalg.norm(truth))


def misread(wrong: Mapping[str, float], right: Collection[str], found: Mapping[str, Found], port: str) -> list[str]:
    """Return the wrong points (name -> distance) that are merely misread.

    They are other than the reference's throughout, though the next point that is computed from them is right.
    """
    names: list[str] = []
    for name, away in wrong.items():
        if name not in found or found[name].fault or name.endswith(CHOICE):
            continue
        if away > CLEARLY[port] and is_wholesale(found[name]):
            scaled = is_scaled(found[name])
            after = next((other for other in found if shows(name, other, scaled)), None)
            if after in right:
                names.append(name)
    return names
