"""Differences that are not bugs: positions shifted by a constant, and points that are misread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from qwen3np.numerics import FLOAT64, Array
from qwen3np.porting.align import Found, tolerance
from qwen3np.porting.floors import MARGIN, farthest_tables
from qwen3np.porting.points import CHOICE, POINTS, split_layer, split_pass
from qwen3np.porting.record import Recording, distance
from qwen3np.qwen3 import rotate
from qwen3np.rope import inverse_frequencies, rotary_tables

FARTHEST = 1 << 16  # constant shifts of the positions that are tried
SCALED = 0.95  # the least cosine between a point and one that differs by factors
CLEARLY = {"float32": 0.05, "float16": 0.5, "bfloat16": 0.5}  # distances that successors could not overlook


@dataclass(frozen=True, eq=False)
class Moved(Recording):
    """A recording of the same ids at other positions: all of a sequence are shifted alike, which changes no score."""

    shift: Array = field(default_factory=lambda: np.zeros(1, np.int64))  # of each sequence (B,)

    @property
    def passes(self) -> list[tuple[str, Array, Array]]:
        """The forward passes, at the shifted positions."""
        return [(prefix, ids, positions + self.shift[:, None]) for prefix, ids, positions in super().passes]

    @property
    def why(self) -> str:
        """Why it is harmless, in words."""
        return f"{said(self.shift)}, for queries and keys alike: this changes no score"


def moved(golden: Recording, shift: Array) -> Moved:
    """Return a recording at other positions, with queries and keys rotated further, and their floors there."""
    points, floors = dict(golden.points), {port: dict(of) for port, of in golden.floors.items()}
    own: dict[str, Any] = {f.name: getattr(golden, f.name) for f in fields(golden)}
    own |= {"points": points, "floors": floors, "shift": shift}
    found = Moved(**own)
    for prefix, _, positions in found.passes:
        at = positions if prefix or golden.tokens is None else positions[:, list(golden.tokens)]
        exact, farthest = rotary_tables(golden.config, at, FLOAT64), farthest_tables(golden.config, at)
        for name in (n for n in golden.points if n.endswith("_rope") and split_pass(n)[0] == prefix):
            x = golden.points[name].astype(np.float64)
            points[name] = turned(x, shift, golden).astype(golden.points[name].dtype)
            away, by_token = distance(rotate(x, farthest, FLOAT64), rotate(x, exact, FLOAT64), 2)
            for of in floors.values():
                overall, worst = of.get(name, (0.0, 0.0))
                of[name] = max(overall, away), max(worst, float(by_token.max()))
    return found


def turned(x: Array, shift: Array, golden: Recording) -> Array:
    """Return queries or keys (B, heads, S, Dh) rotated further, by a shift (B,) of the positions."""
    yarn = golden.config.rope_scaling
    config = replace(golden.config, rope_scaling=yarn and replace(yarn, attention_factor=1.0))  # they have it already
    return rotate(x.astype(np.float64), rotary_tables(config, shift[:, None], FLOAT64), FLOAT64)


def best_shift(x: Array, truth: Array, golden: Recording) -> int:
    """Return the shift, in whole positions, that brings the truth (heads, S, Dh) closest to x by rotation."""
    half = golden.config.head_dim // 2
    mine, own = (z[..., :half].astype(np.complex128) + 1j * z[..., half:] for z in (x, truth))
    lanes = (mine * own.conj()).sum((0, 1))
    frequencies = inverse_frequencies(golden.config, FLOAT64)
    best, score = 0, float(lanes.real.sum())
    for first in range(0, FARTHEST, 4096):
        shifts = np.arange(first, first + 4096)
        turns = np.exp(-1j * shifts[:, None] * frequencies)
        for sign, values in ((1, (turns @ lanes).real), (-1, (turns.conj() @ lanes).real)):
            at = int(values.argmax())
            if values[at] > score * (1 + 1e-12):
                best, score = sign * int(shifts[at]), float(values[at])
    return best


def left_after(x: Array, truth: Array, shift: int, golden: Recording) -> float:
    """Return the relative distance (heads, S, Dh) that remains after rotating the truth by a shift."""
    return distance(x[None], turned(truth[None], np.array([shift]), golden), 2)[0]


def common_shift(found: Mapping[str, Found], golden: Recording, port: str) -> Array | None:
    """Return the shift (B,) that rotated points have; None without one, or if no later point shows what it does.

    Those of the first layer must have it, and none another one: what is wrong in between may hide it in later layers.
    """
    shifts = shifted(found, golden, port)
    layers = {name: split_layer(name)[0] or 0 for name in found if name.endswith("_rope")}
    first = [name for name, layer in layers.items() if layer == min(layers.values())]
    if not first or not all(name in shifts for name in first) or not any(follows(first[0], name) for name in found):
        return None
    shift = shifts[first[0]]
    return shift if shift.any() and all(np.array_equal(shift, other) for other in shifts.values()) else None


def shifted(found: Mapping[str, Found], golden: Recording, port: str) -> dict[str, Array]:
    """Return by how many positions each sequence (B,) of a rotated point is shifted, perhaps by none.

    A shift is a whole number other than 0, and better by far than none. Points that are wrong otherwise are left out.
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

            def fits(shift: int, x: Array = x, truth: Array = truth, away: float = away) -> bool:
                return left_after(x, truth, shift, golden) < 0.1 * away

            shift = next((s for s in known.get(b, ()) if fits(s)), None)
            if shift is None and len(known.get(b, ())) < 4:
                candidate = best_shift(x, truth, golden)
                shift = candidate if candidate and fits(candidate) else None
            if shift is None:
                break
            known.setdefault(b, []).append(shift)
            mine.append(shift)
        if len(mine) == len(here.part):
            shifts[name] = np.array(mine)
    return shifts


def said(shift: Array) -> str:
    """Return a shift (B,) in words."""
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
