"""The verdict on a dump: every point measured, and the overall meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qwen3np.errors import one_line
from qwen3np.guard import position_axis
from qwen3np.numerics import FLOAT64, Array
from qwen3np.porting.align import Aligned, Found, gate_of, kept, other_choices, settle, tolerance
from qwen3np.porting.floors import DIGITS, HALFWAY, LEAST, MARGIN, limit, noisy_runs, numerics_of, root_mean
from qwen3np.porting.harmless import Moved, follows, misread, said, shifted
from qwen3np.porting.points import CHOICE, POINTS, Point, Rerun, input_name, point_names, split_layer, split_pass
from qwen3np.porting.record import HEADS, Recording, distance
from qwen3np.porting.shapes import HEAD_ORDER, LANES, LAST

OUTLIER = 32.0  # how many floors a single number may be off, relative to its neighbours


@dataclass(frozen=True)
class PointReport:
    """How far one point is from the reference. Distances are relative L2; None if there is no number."""

    name: str
    verdict: str  # "equal", "rounding", "different", "misread", "unread" (a shape that fits no layout)
    rel_l2: float | None = None
    max_abs: float | None = None
    ulp: float | None = None  # the largest distance in units in the last place of the port's precision
    token: int | None = None  # the worst position and head
    head: int | None = None
    floor: float | None = None  # the error that rounding causes here
    added: float | None = None  # the distance from the reference's formula on the port's own inputs
    added_floor: float | None = None
    notes: tuple[str, ...] = ()
    adds: bool = False  # whether it introduces more than rounding


@dataclass(frozen=True)
class Setting:
    """A choice of a port's author, such as a cache in 16 bits, and the fraction of the squared error it explains."""

    name: str
    explained: float
    point: str  # the first point that it changes


@dataclass(frozen=True)
class Comparison:
    """The verdict on a dump: "equal", "rounding", or "different" from first_point on; `meaning` says it in words."""

    verdict: str
    first_point: str | None
    meaning: str
    precision: str
    points: list[PointReport]
    missing: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    unmapped: list[str] = field(default_factory=list[str])  # names in the map that are not in the dump
    settings: list[Setting] = field(default_factory=list[Setting])
    doubt: str = ""  # how "different" may still be rounding; part of the meaning


def judge(
    golden: Recording,
    aligned: Aligned,
    weights: Mapping[str, Array] | None = None,
    table: Mapping[str, Point] = POINTS,
) -> tuple[Aligned, Comparison]:
    """Measure every point of a dump and judge the whole. `table` is the reference's, with the port's settings."""
    reports = _reports(golden, aligned, weights, table)
    wrong = {r.name: r.rel_l2 or 0.0 for r in reports if r.verdict == "different"}
    right = {
        r.name
        for r in reports
        if r.name in aligned.found
        and r.rel_l2 is not None
        and r.rel_l2 <= limit(r.floor or 0.0, aligned.found[r.name].part.size)
    }
    shifts = shifted(aligned.found, golden, aligned.precision) if wrong else {}
    shifts = {name: shift for name, shift in shifts.items() if shift.any()}
    turned = {name: x for name, x in wrong.items() if name not in shifts}
    others = misread(turned, right, aligned.found, aligned.precision) if turned else []
    if others:
        aligned = replace(aligned, misread=frozenset(others))
        reports = _reports(golden, aligned, weights, table)
    verdict, first, meaning = _verdict(reports, aligned, golden, shifts)
    doubt = _doubt(reports, aligned, golden)
    missing = [name for name in golden.points if name not in aligned.found and name not in aligned.misfits]
    meaning += doubt
    if verdict != "different":
        meaning += f"; {coverage(golden, aligned)}"
    elif isinstance(golden, Moved):
        meaning += f"; {golden.why}"
    return aligned, Comparison(
        verdict, first, meaning, aligned.precision, reports, missing, aligned.unknown, aligned.unmapped, doubt=doubt
    )


def coverage(golden: Recording, aligned: Aligned) -> str:
    """Say how much of a recording was compared."""
    count, total = len(aligned.found) - len(aligned.misread), len(golden.points)
    passes = [prefix for prefix, _, _ in golden.passes if any(split_pass(name)[0] == prefix for name in golden.points)]
    none = [
        p.rstrip(".") or "the prompt" for p in passes if not any(split_pass(name)[0] == p for name in aligned.found)
    ]
    text = f"{'all' if count == total else f'{count} of'} {total} recorded points compared"
    if none:
        text += f", none of {', '.join(none)}"
    if aligned.misfits:
        name, why = next(iter(aligned.misfits.items()))
        text += f"; no layout fits {name} ({why})" + (", ..." if len(aligned.misfits) > 1 else "")
    for what, names in (("not known", aligned.unknown), ("not in the dump, but in the map", aligned.unmapped)):
        if names:
            text += f"; {what}: {', '.join(map(one_line, names[:3]))}" + (", ..." if len(names) > 3 else "")
    return text


def added_errors(
    golden: Recording, aligned: Aligned, weights: Mapping[str, Array], table: Mapping[str, Point] = POINTS
) -> dict[str, tuple[float, float, bool]]:
    """Return for each point the distance from its formula on the port's inputs, its floor, and whether it has outliers.

    An outlier is a single number that is off by far more than its neighbours.
    """
    found, port, given = aligned.found, aligned.precision, aligned.given
    right = Rerun(weights, golden.config, FLOAT64, golden.passes, given, table)
    n = numerics_of(port)
    rounded = [replace(right, numerics=n, computed={})]
    drawn = noisy_runs(right, golden.ids.size * golden.config.hidden_size, port) if port == "float32" else []
    added: dict[str, tuple[float, float, bool]] = {}
    floors, worst = dict[str, float](), dict[str, float]()  # of a point in any pass so far; of its worst token
    for prefix, _, _ in golden.passes:
        for name in point_names(golden.config):
            with np.errstate(all="ignore"):
                exact = right.made(prefix + name)
                each = [[run.made(prefix + name) for run in runs] for runs in (rounded, drawn)]
            if prefix + name not in found:
                continue
            here, axis = found[prefix + name], position_axis(name)
            if name.endswith(CHOICE) and here.whole.shape == exact.shape:
                gate = gate_of(name)
                exact = settle(here.whole, exact, right.value(prefix + gate), floors.get(gate, LEAST[port]))
            away = [[distance(x, exact, axis) for x in xs] for xs in each if xs]
            own = [root_mean([overall for overall, _ in runs]) for runs in away]
            floors[name] = max([floors.get(name, LEAST[port]), *(x for x in own if math.isfinite(x))])
            # over many layers the errors of some tokens grow far more than those of others
            by_token = [float(tokens.max()) for runs in away for _, tokens in runs]
            worst[name] = max([worst.get(name, floors[name]), *(x for x in by_token if math.isfinite(x))])
            part = kept(golden, here, prefix + name, exact)
            scale = None if here.view is None else here.view.size(kept(golden, replace(here, view=None), name, exact))
            out = not name.endswith(CHOICE) and is_outlier(here.part, part, scale, _single(name, worst[name]))
            added[prefix + name] = distance(here.part, part, axis, scale)[0], floors[name], out
    return added


def _single(name: str, floor: float) -> float:
    """Return the floor for single numbers: of rotated ones some lanes are as far off as all may be."""
    return floor / HALFWAY if name.endswith("_rope") else floor


def is_outlier(x: Array, truth: Array, scale: Array | None, floor: float) -> bool:
    """Whether a single number is off by more than OUTLIER floors, relative to itself and its neighbours."""
    seen = np.isfinite(truth)
    own = np.where(seen, truth.astype(np.float64), 0)
    size = own if scale is None else scale
    row = np.sqrt(np.square(size).mean(-1, keepdims=True))
    with np.errstate(invalid="ignore"):
        error = np.abs(np.where(seen, x.astype(np.float64), 0) - own)
        return bool((error > OUTLIER * floor * np.hypot(size, np.maximum(row, np.median(row)))).any())


def _reports(
    golden: Recording, aligned: Aligned, weights: Mapping[str, Array] | None, table: Mapping[str, Point]
) -> list[PointReport]:
    """Return the reports in the order of computation."""
    added = {} if weights is None else added_errors(golden, aligned, weights, table)
    reports: list[PointReport] = []
    for name in golden.points:
        if name in aligned.misfits:
            reports.append(PointReport(name, "unread", notes=(aligned.misfits[name],)))
        elif name in aligned.misread:
            here = _report(name, aligned.found[name], golden, aligned.precision, None)
            note = "not what its successors were computed from: another tensor or layout"
            reports.append(replace(here, verdict="misread", notes=(*here.notes, note), adds=False))
        elif name in aligned.found:
            reports.append(_report(name, aligned.found[name], golden, aligned.precision, added.get(name)))
    return _inherited(reports, weights is not None)


def _inherited(reports: list[PointReport], with_weights: bool) -> list[PointReport]:
    """With the weights, count as errors only those that derive from a point that introduces one; the rest is rounding.

    A point that is right although it was computed from a wrong one in the dump introduces nothing.
    """
    if not with_weights:
        return reports
    wrong, settled = list[str](), list[PointReport]()
    for r in reports:
        if r.adds and r.verdict != "different":
            passed = any(follows(name, r.name) for name in wrong)
            r = replace(r, adds=False) if passed else replace(r, verdict="different")
        if r.adds:
            wrong.append(r.name)
        elif r.verdict == "different" and not wrong:
            r = replace(r, verdict="rounding")
        settled.append(r)
    return settled


def _report(
    name: str, here: Found, golden: Recording, port: str, added: tuple[float, float, bool] | None
) -> PointReport:
    """Measure one point."""
    axis = position_axis(name)
    floor, worst_floor = tolerance(name, golden, port)
    is_choice = name.endswith(CHOICE)
    x, truth = (y if is_choice else y.astype(np.float64) for y in (here.part, here.truth))
    scale = None
    if here.view is not None:
        whole = golden.points[name]
        scale = here.view.size(np.take(whole, [-1], axis) if LAST in here.notes else whole)
    rel, by_token = distance(x, truth, axis, scale)
    seen = np.isfinite(truth)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(np.where(seen, x - np.where(seen, truth, 0), 0))
    size = np.abs(truth if scale is None else scale)
    place = np.exp2(np.floor(np.log2(np.maximum(size[seen], 2.0**-126))) - DIGITS[port])
    head = None
    if (kind := name.rpartition(".")[2]) in HEADS and here.view is None:
        head = int(distance(x, truth, HEADS[kind])[1].argmax())
        head = golden.heads[head] if golden.heads is not None and kind[0] != "k" else head
    token = int(by_token.argmax()) if truth.shape[axis] > 1 or here.view is None else None
    if LAST in here.notes:
        token = golden.ids.shape[1] - golden.steps - 1
    elif token is not None and golden.tokens is not None and not name.startswith("decode."):
        token = golden.tokens[token]
    rows = truth.size // max(truth.shape[axis], 1)
    if here.fault:
        verdict = "different"
    elif rel == 0 and (here.view is None or here.view.resolution == 0):
        verdict = "equal"
    else:
        within = rel <= limit(floor, truth.size) and by_token.max() <= limit(worst_floor, rows)
        within = within and not (is_choice and gate_of(name) in golden.points)  # those of rounding are settled
        within = within and (is_choice or not is_outlier(x, truth, scale, _single(name, worst_floor)))
        verdict = "rounding" if within else "different"
    finite = bool(np.isfinite(rel))
    known = added is not None and math.isfinite(added[0])
    adds = bool(here.fault) or verdict == "different"  # as far as is known
    if known and added is not None and not here.fault:
        adds = added[0] > limit(added[1], truth.size) or added[2]
    return PointReport(
        name,
        verdict,
        rel if finite else None,
        float(error.max()) if finite and not is_choice else None,
        float((error[seen] / place).max()) if finite and not is_choice else None,
        token,
        head,
        floor,
        *(added[:2] if added is not None and known else (None, None)),
        notes=(*here.notes, *([here.fault] if here.fault else [])),
        adds=adds,
    )


def _verdict(
    reports: list[PointReport], aligned: Aligned, golden: Recording, shifts: Mapping[str, Array]
) -> tuple[str, str | None, str]:
    """Return the overall verdict, the first wrong point, and what it means."""
    found, port = aligned.found, aligned.precision
    different = [report for report in reports if report.verdict == "different"]
    if not different:
        notes = {note for report in reports for note in report.notes}
        alike = list[str]()
        if LANES in notes:
            alike.append("the same up to a permutation of the RoPE layout")
        if HEAD_ORDER in notes:
            alike.append("the same up to the order of the heads")
        if isinstance(golden, Moved):
            alike.append(golden.why)
        if aligned.misread:
            names = ", ".join(sorted(aligned.misread, key=list(found).index))
            alike.append(f"{names}: not what its successors were computed from, so another tensor or layout, not a bug")
        if alike:
            return "rounding", None, "; ".join(alike)
        if all(report.verdict in ("equal", "unread") for report in reports):
            return "equal", None, "equal in every bit"
        printed = any(here.view is not None and here.view.resolution for here in found.values())
        return "rounding", None, f"{port} rounding only" + (", as far as what was printed shows" if printed else "")

    first = different[0]
    (prefix, _), (layer, kind) = split_pass(first.name), split_layer(first.name)
    if found[first.name].fault:
        return "different", first.name, f"a bug at {first.name}: {first.notes[-1]}"
    why = ""
    if first.name in shifts:
        why = f": {said(shifts[first.name])}"
    elif kind == "model.embed_tokens":
        why = ": other token ids, or another embedding"
    elif not {prefix + input_name(layer, x, golden.config) for x in POINTS[kind].inputs} & found.keys():
        why = ", or at a point before it that the dump does not have"
    return "different", first.name, f"a bug at {first.name}{why}"


def _doubt(reports: list[PointReport], aligned: Aligned, golden: Recording) -> str:
    """Return how a dump that is different may still be rounding, as the end of a sentence; empty if it cannot be."""
    found, port, doubt = aligned.found, aligned.precision, ""
    different = [report for report in reports if report.verdict == "different"]
    if not different or found[different[0].name].fault:
        return ""
    if different[0].added is None and other_choices(golden, found):
        doubt += "; or rounding, since other experts of nearly equal weight were chosen: see with --model"
    elif port != "float32" and golden.config.num_experts and not any(name.endswith(CHOICE) for name in found):
        doubt += "; or rounding, if other experts of nearly equal weight were chosen: dump mlp.router_indices"
    # computing in 16 bits shows as an error of this size nearly everywhere, a bug only from one point on
    coarse = len(different) > 0.8 * len(reports) and all(
        r.rel_l2 is not None and 2**-14 < r.rel_l2 <= MARGIN * tolerance(r.name, golden, "bfloat16")[0]
        for r in different
    )
    if port == "float32" and coarse:
        doubt += "; or rounding, if the port computes in 16 bits anywhere: see with --precision bfloat16"
    return doubt
