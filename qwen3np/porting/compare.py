"""Hold another implementation's numbers against a recording: rounding, or the first step that is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import BFLOAT16, FLOAT64, Array, named
from qwen3np.porting.dumps import LANES, LAST, UNMASKED, namer, recognise
from qwen3np.porting.points import CHOICE, STEPS, Rerun, input_name, point_names, point_shape, split_layer, split_pass
from qwen3np.porting.record import HEADS, Recording, distance
from qwen3np.qwen3 import rotate
from qwen3np.rope import rotary_tables

# How many times the noise floor is still rounding: another order of summation, or another place to round.
MARGIN = 4.0
# No floor is below a share of the rounding of a single number: some points are exact in the reference.
LEAST = {"float32": 2**-25, "bfloat16": 2**-10, "float64": 2**-55}
DIGITS = {"float32": 23, "bfloat16": 7}  # binary, behind the first
HIDDEN = -9000.0  # scores below stand for -inf, as ports mask with -1e4, -1e9 or the lowest number of a type
SHIFTS = 16  # constant shifts of the positions that are tried


@dataclass(frozen=True)
class PointReport:
    """How far one point is from the reference. Distances are relative L2; None where there is no number to give."""

    name: str
    verdict: str  # "equal", "rounding", "different"
    rel_l2: float | None = None
    max_abs: float | None = None
    ulp: float | None = None  # the largest distance in units of the last place of the port's precision
    token: int | None = None  # the worst position and head
    head: int | None = None
    floor: float | None = None  # what rounding makes here
    added: float | None = None  # the distance from the reference step on the port's own inputs
    added_floor: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What a dump is: "equal" or "rounding", or "different" from first_point on; meaning says it in words."""

    verdict: str
    first_point: str | None
    meaning: str
    precision: str
    points: list[PointReport]
    missing: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Found:
    """A point of the dump in the reference's layout."""

    notes: tuple[str, ...]
    whole: Array
    part: Array  # what the recording keeps of it
    truth: Array
    fault: str = ""  # what is wrong whatever the distance


@dataclass(frozen=True)
class Aligned:
    """A dump by the names and in the layouts of a recording."""

    found: dict[str, Found]
    faults: dict[str, PointReport]  # the points whose shape fits in no way
    unknown: list[str]
    shapes: dict[str, tuple[int, ...]]  # of all points, whole
    precision: str  # the port's

    @property
    def given(self) -> dict[str, Array]:
        """The points that are there as a whole, to compute others from."""
        return {
            name: here.whole
            for name, here in self.found.items()
            if here.whole.shape == self.shapes[name] and not (name.endswith(CHOICE) and here.fault)
        }


def compare(
    golden: Recording,
    dump: Mapping[str, Array],
    about: Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
    weights: Mapping[str, Array] | None = None,
) -> Comparison:
    """Compare a dump, as read_dump gives it, with a recording, point by point.

    names maps names of the dump to points. precision is the port's, "float32" or "bfloat16"; None tells it from the
    numbers. With the weights each step is run on the port's own inputs, which gives the error that it adds.

    Raises ValueError for a dump of another prompt or of another model, and for one that has none of the points. Decode
    steps from the first that was fed another id are left out.
    """
    aligned = align(golden, dump, about, names, precision)
    if weights is not None:
        aligned = reroute(golden, aligned, weights)
    return judge(golden, aligned, weights)


def align(
    golden: Recording,
    dump: Mapping[str, Array],
    about: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
) -> Aligned:
    """Bring a dump to the names and the layouts of a recording. Raises ValueError as compare."""
    if precision not in (None, *DIGITS):
        raise ValueError(f"precision={precision!r} is unknown; known: {', '.join(DIGITS)}")
    dump = _comparable(golden, dump, about or {})
    point_of = namer(golden.config, names)
    named: dict[str, Array] = {}
    for name in sorted(dump, key=lambda name: name != point_of(name)):  # a plain name goes before a translated one
        named.setdefault(point_of(name), dump[name])
    unknown = [name for name in dump if point_of(name) not in golden.points]
    if len(unknown) == len(dump):
        raise ValueError(f"no name in the dump is a known point: {', '.join(unknown[:5])}; --map gives them names")

    found: dict[str, Found] = {}
    faults: dict[str, PointReport] = {}
    shapes = _shapes(golden)
    for name in golden.points:
        if name in named:
            here = _found(name, named[name], golden, shapes[name])
            if here is None:
                note = f"shape {named[name].shape}, dtype {named[name].dtype} instead of shape {shapes[name]}"
                faults[name] = PointReport(name, "different", notes=(note,))
            else:
                found[name] = here
    if not found:
        first = next(iter(faults.values()))
        raise ValueError(f"no shape fits, is it a dump of another model? {first.name}: {first.notes[0]}")
    _in_order(found)
    port = precision or _precision(found)
    for name in [name for name in found if name.endswith(CHOICE)]:
        here, gate = found[name], gate_of(name)
        if gate in golden.points:  # without the weights no more than this point can follow another choice
            logits = golden.points[gate]
            logits = np.take(logits, [-1], 1) if LAST in here.notes else logits
            truth = settle(here.part, here.truth, logits, tolerance(gate, golden, port)[1])
            found[name] = replace(here, truth=truth)
    return Aligned(found, faults, unknown, shapes, port)


def reroute(golden: Recording, aligned: Aligned, weights: Mapping[str, Array]) -> Aligned:
    """Let the reference follow the port where it chose another expert, of nearly equal probability.

    Which one it is, is rounding; but from there on all numbers are others.
    """
    given = aligned.given
    if not any(name in given for name in _other_choices(golden, aligned.found)):
        return aligned
    chosen: dict[str, Array] = {}
    run = Rerun(weights, golden.config, named(golden.numerics), golden.passes, chosen)
    found = dict(aligned.found)
    for prefix, _, _ in golden.passes:
        for name in (prefix + point for point in point_names(golden.config)):
            if name.endswith(CHOICE) and name in given:
                gate = gate_of(name)
                limit = tolerance(gate, golden, aligned.precision)[1]
                chosen[name] = settle(given[name], run.step(name), run.value(gate), limit)
            x = run.value(name)
            if name in found:
                found[name] = replace(found[name], truth=kept(golden, found[name], name, x))
    return replace(aligned, found=found)


def _other_choices(golden: Recording, found: Mapping[str, Found]) -> list[str]:
    """Return the points where the port has other experts than the recording, by rounding."""
    return [
        name
        for name, here in found.items()
        if name.endswith(CHOICE) and LAST not in here.notes and distance(here.truth, golden.points[name], 1)[0]
    ]


def gate_of(name: str) -> str:
    """Return the router's logits to a point of its choices."""
    return name.removesuffix("router_indices") + "gate"


def settle(x: Array, own: Array, logits: Array, floor: float) -> Array:
    """Return the choices x (B, S, k) of the tokens where they are as good as one's own, else one's own.

    As good: none has a logit (of logits (B, S, E)) below the k-th largest by more than rounding, which moves a token's
    logits by MARGIN times the floor, relative to their norm.
    """
    count, k = logits.shape[-1], x.shape[-1]
    inside = np.clip(x, 0, count - 1)
    norms: Array = np.sqrt(np.square(logits.astype(np.float64)).sum(-1, keepdims=True))
    slack = math.sqrt(2) * MARGIN * floor * np.maximum(norms, np.median(norms))
    least = np.sort(logits, -1)[..., count - k, None]
    good = (np.take_along_axis(logits, inside, -1) >= least - slack) & (inside == x)
    distinct = (np.diff(np.sort(x, -1)) > 0).all(-1)
    return np.where((good.all(-1) & distinct)[..., None], x, own)


def _in_order(found: dict[str, Found]) -> None:
    """Bring a token's experts into the reference's order: the one with the largest weight first."""
    for name in [name for name in found if name.endswith(CHOICE)]:
        weights = name.removesuffix("indices") + "weights"
        if weights in found and found[weights].whole.shape == found[name].whole.shape:
            for part in ("whole", "part"):
                order = np.argsort(-getattr(found[weights], part), -1, kind="stable")
                for one in (name, weights):
                    x = np.take_along_axis(getattr(found[one], part), order, -1)
                    found[one] = replace(found[one], **{part: x})


def judge(golden: Recording, aligned: Aligned, weights: Mapping[str, Array] | None = None) -> Comparison:
    """Measure every point of a dump, and say what it means."""
    found, faults, port = aligned.found, aligned.faults, aligned.precision
    added = {} if weights is None else _added(golden, aligned, weights)
    reports = [
        faults[name] if name in faults else _report(name, found[name], golden, port, added.get(name))
        for name in golden.points
        if name in found or name in faults
    ]
    verdict, first, meaning = _verdict(reports, found, golden, port)
    missing = [name for name in golden.points if name not in found and name not in faults]
    return Comparison(verdict, first, meaning, port, reports, missing, aligned.unknown)


def kept(golden: Recording, here: Found, name: str, x: Array) -> Array:
    """Return of a whole point what the recording and the dump have of it."""
    return np.take(x, [-1], position_axis(name)) if LAST in here.notes else golden.cut(name, x)


def _comparable(golden: Recording, dump: Mapping[str, Array], about: Mapping[str, Any]) -> dict[str, Array]:
    """Return what of a dump was made from the recording's ids, if it says what it was made from.

    Raises ValueError where that is another prompt, or another model.
    """
    if "config" in about and Config.from_dict(about["config"]) != golden.config:
        raise ValueError("the dump was made by another model: its config is not the recording's")
    points = {name: x for name, x in dump.items() if name != "ids"}
    given = about.get("ids", dump.get("ids"))
    if given is None:
        return points
    ids, own = np.atleast_2d(np.asarray(given)), golden.ids
    prompt = own.shape[1] - golden.steps
    if len(ids) != len(own) or ids.shape[1] - about.get("steps", max(ids.shape[1] - prompt, 0)) != prompt:
        raise ValueError(
            f"the dump was made from other ids: their shape is {ids.shape}, the prompt's {(len(own), prompt)}"
        )
    length = min(ids.shape[1], own.shape[1])
    differ = np.argwhere((ids[:, :length] != own[:, :length]).T)
    same = int(differ[0, 0]) if len(differ) else length
    if same < prompt:
        at, b = differ[0]
        raise ValueError(
            f"the dump was made from other ids: {ids[b, at]} instead of {own[b, at]} at position {at}"
            + (f" of sequence {b}" if len(own) > 1 else "")
        )
    other = tuple(f"decode.{i}." for i in range(same - prompt, golden.steps))
    return {name: x for name, x in points.items() if not name.startswith(other)}


def _shapes(golden: Recording) -> dict[str, tuple[int, ...]]:
    """Return the shape of each point, whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, ids, positions in golden.passes:
        batch, new, total = len(ids), ids.shape[1], int(positions[0, -1]) + 1
        shapes |= {
            prefix + name: point_shape(name, golden.config, batch, new, total) for name in point_names(golden.config)
        }
    return shapes


def _found(name: str, x: Array, golden: Recording, shape: tuple[int, ...]) -> Found | None:
    """Bring an array to the reference's layout, and its mask to -inf. None where it fits in no way."""
    if x.dtype.kind not in "fiuV" or (x.dtype.kind == "V" and x.dtype != BFLOAT16):
        return None
    if name.endswith(CHOICE):
        if not np.array_equal(x, np.trunc(x)):
            return None
        x = x.astype(np.int64)
    is_scores, hidden = name.endswith(".scores"), False
    short = (str(x.dtype),) if x.dtype in (np.float16, BFLOAT16) else ()
    if is_scores:
        with np.errstate(invalid="ignore"):
            hidden = bool((x <= HIDDEN).any())
        x = np.where(x <= HIDDEN, -np.inf, x.astype(np.float64) if x.dtype != np.float32 else x)
    recognised = recognise(name, x, golden, shape)
    if recognised is None:
        return None
    notes, whole, part, truth = recognised
    notes = (*notes, *short)
    fault = ""
    if is_scores and not hidden and not np.isfinite(truth).all():
        notes = (*notes, UNMASKED)
        if whole.shape == part.shape == truth.shape:
            whole = np.where(np.isfinite(truth), whole, -np.inf)
    elif is_scores and (np.isneginf(part) != np.isneginf(truth)).any():
        where = tuple(int(i) for i in np.argwhere(np.isneginf(part) != np.isneginf(truth))[0])
        fault = f"another mask, first at {where}"
    if name.endswith(CHOICE) and (none := (part < 0) | (part >= golden.config.num_experts)).any():
        where = tuple(int(i) for i in np.argwhere(none)[0])
        fault = f"{np.count_nonzero(none)} numbers are no expert's, first at {where}"
    broken = ~np.isfinite(part) & np.isfinite(truth)
    if broken.any() and not fault:
        where = tuple(int(i) for i in np.argwhere(broken)[0])
        fault = f"{np.count_nonzero(broken)} numbers are NaN or infinite, first at {where}"
    return Found(notes, whole, part, truth, fault)


def _precision(found: Mapping[str, Found]) -> str:
    """Return "bfloat16" for numbers with no more than its or float16's digits, as most points then have."""
    short = [0, 0]
    for name, here in found.items():
        if name.endswith(("embed_tokens", "probs", "scores", CHOICE)):  # gathered, zeros, integers
            continue
        sample = here.whole.ravel()[:65536]
        sample = sample[np.isfinite(sample)].astype(np.float64)
        with np.errstate(over="ignore"):
            kept = [int(np.sum(sample.astype(t).astype(np.float64) == sample)) for t in (BFLOAT16, np.float16)]
        is_short = max(kept) > 0.99 * sample.size
        short[is_short] += 1
    return "bfloat16" if short[True] > short[False] else "float32"


def tolerance(name: str, golden: Recording, port: str) -> tuple[float, float]:
    """Return the noise floors of a point, overall and at its worst position: the port's and the recording's own.

    A decode step has few numbers, whose floor may be small by luck: it is not taken below that of the prefill.
    """

    def floor(p: str, i: int) -> float:
        of = golden.floors.get(p, {})
        return max([LEAST[p], *(of[key][i] for key in {name, split_pass(name)[1]} if key in of)])

    return math.hypot(floor(port, 0), floor(golden.numerics, 0)), math.hypot(floor(port, 1), floor(golden.numerics, 1))


def _added(golden: Recording, aligned: Aligned, weights: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    """Return per point the distance from the reference step on the port's inputs, and what rounding makes of it."""
    found, port, given = aligned.found, aligned.precision, aligned.given
    runs = [Rerun(weights, golden.config, n, golden.passes, given) for n in (FLOAT64, named(port))]
    added: dict[str, tuple[float, float]] = {}
    floors: dict[str, float] = {}  # of a point in any pass so far
    for prefix, _, _ in golden.passes:
        for name in point_names(golden.config):
            exact, rounded = (run.step(prefix + name) for run in runs)
            if prefix + name in found:
                here, axis = found[prefix + name], position_axis(name)
                if name.endswith(CHOICE) and here.whole.shape == exact.shape:
                    gate = gate_of(name)
                    exact = settle(here.whole, exact, runs[0].value(prefix + gate), floors.get(gate, LEAST[port]))
                floors[name] = max(distance(rounded, exact, axis)[0], floors.get(name, LEAST[port]))
                exact = kept(golden, here, prefix + name, exact)
                added[prefix + name] = distance(here.part, exact, axis)[0], floors[name]
    return added


def _report(name: str, here: Found, golden: Recording, port: str, added: tuple[float, float] | None) -> PointReport:
    """Measure one point."""
    axis = position_axis(name)
    floor, worst_floor = tolerance(name, golden, port)
    x, truth = here.part.astype(np.float64), here.truth.astype(np.float64)
    is_choice = name.endswith(CHOICE)
    rel, by_token = distance(here.part, here.truth, axis) if is_choice else distance(x, truth, axis)
    seen = np.isfinite(truth)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(np.where(seen, x - np.where(seen, truth, 0), 0))
    place = np.exp2(np.floor(np.log2(np.maximum(np.abs(truth[seen]), 2.0**-126))) - DIGITS[port])
    head = None
    if (kind := name.rpartition(".")[2]) in HEADS:
        head = int(distance(x, truth, HEADS[kind])[1].argmax())
        head = golden.heads[head] if golden.heads is not None and kind[0] != "k" else head
    token = int(by_token.argmax())
    if LAST in here.notes:
        token = golden.ids.shape[1] - golden.steps - 1
    elif golden.tokens is not None and not name.startswith("decode."):
        token = golden.tokens[token]
    if here.fault:
        verdict = "different"
    elif rel == 0:
        verdict = "equal"
    else:
        within = rel <= MARGIN * floor and by_token.max() <= MARGIN * worst_floor
        within = within and not (is_choice and gate_of(name) in golden.points)  # those of rounding are settled
        verdict = "rounding" if within else "different"
    finite = bool(np.isfinite(rel))
    return PointReport(
        name,
        verdict,
        rel if finite else None,
        float(error.max()) if finite and not is_choice else None,
        float((error[seen] / place).max()) if finite and not is_choice else None,
        token,
        head,
        floor,
        *(added if added is not None and np.isfinite(added[0]) else (None, None)),
        notes=(*here.notes, *([here.fault] if here.fault else [])),
    )


def _verdict(
    reports: list[PointReport], found: Mapping[str, Found], golden: Recording, port: str
) -> tuple[str, str | None, str]:
    """Return the overall verdict, the first wrong point, and what it means."""
    different = [report for report in reports if report.verdict == "different"]
    permuted = any(LANES in report.notes for report in reports)
    if not different:
        if permuted:
            return "rounding", None, "the same up to a permutation of the RoPE layout"
        if all(report.verdict == "equal" for report in reports):
            return "equal", None, "equal in every bit"
        return "rounding", None, f"{port} rounding only"

    shifts = {report.name: _shift(report, found, golden, port) for report in different}
    shift = shifts[different[0].name]
    if shift is not None and set(shifts.values()) == {shift} and reports[-1].verdict != "different":
        return "rounding", None, f"positions shifted by {shift}, for queries and keys alike: this changes no score"

    first = different[0]
    adding = [
        r for r in reports if r.added is not None and r.added_floor is not None and r.added > MARGIN * r.added_floor
    ]
    (prefix, _), (layer, kind) = split_pass(first.name), split_layer(first.name)
    if first.name not in found or found[first.name].fault:
        return "different", first.name, f"a bug at {first.name}: {first.notes[-1]}"
    why = ""
    if shift is not None:
        why = f": positions shifted by {shift}"
    elif kind == "model.embed_tokens":
        why = ": other token ids, or another embedding"
    elif adding and reports.index(adding[0]) < reports.index(first):
        why = f", but the first step to add more than rounding is {adding[0].name}"
    elif first.added is not None and first not in adding:
        why = ": its error is inherited from steps before it"
    elif not {prefix + input_name(layer, x, golden.config) for x in STEPS[kind].inputs} & {r.name for r in reports}:
        why = ", or at a step before it that the dump does not have"
    if first.added is None and _other_choices(golden, found):
        why += "; or rounding, since other experts of nearly equal weight were chosen: see with --model"
    elif port == "bfloat16" and golden.config.num_experts and not any(name.endswith(CHOICE) for name in found):
        why += "; or rounding, if other experts of nearly equal weight were chosen: dump mlp.router_indices"
    # a port that computes in 16 bits is that far off nearly everywhere, a bug from one point on
    coarse = len(different) > 0.8 * len(reports) and all(
        r.rel_l2 is not None and 2**-14 < r.rel_l2 <= MARGIN * tolerance(r.name, golden, "bfloat16")[0]
        for r in different
    )
    if port == "float32" and coarse:
        why += "; or rounding, if the port computes in 16 bits anywhere: see with --precision bfloat16"
    return "different", first.name, f"a bug at {first.name}{why}"


def _shift(report: PointReport, found: Mapping[str, Found], golden: Recording, port: str) -> int | None:
    """Return by how many positions a rotation is off throughout; None where that does not explain the difference."""
    if not report.name.endswith("_rope") or report.rel_l2 is None:
        return None
    here = found[report.name]
    yarn = golden.config.rope_scaling
    config = replace(golden.config, rope_scaling=yarn and replace(yarn, attention_factor=1.0))  # the truth has it
    best, away = 0, report.rel_l2
    for shift in range(-SHIFTS, SHIFTS + 1):
        tables = rotary_tables(config, np.array([[shift]]), FLOAT64)
        distant = distance(here.part, rotate(here.truth.astype(np.float64), tables, FLOAT64), 2)[0]
        if distant < away:
            best, away = shift, distant
    return best if away <= 3 * MARGIN * tolerance(report.name, golden, port)[0] else None
