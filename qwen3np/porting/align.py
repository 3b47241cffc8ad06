"""The points of a dump, by the names and in the layouts of a recording."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import BFLOAT16, Array, named
from qwen3np.porting.dumps import namer
from qwen3np.porting.excerpts import SUM, Excerpt, view_of_excerpt
from qwen3np.porting.floors import LEAST, MARGIN
from qwen3np.porting.layouts import recognise
from qwen3np.porting.logprobs import VIEWS, View, view_of
from qwen3np.porting.points import CHOICE, Rerun, point_names, point_shape, split_layer, split_pass
from qwen3np.porting.record import Recording, distance
from qwen3np.porting.shapes import LAST, UNMASKED

PRECISIONS = ("float32", "float16", "bfloat16")
HIDDEN = -9000.0  # scores below count as -inf: ports mask with -1e4, -1e9 or the lowest number of a type


@dataclass(frozen=True)
class Found:
    """A point of the dump, in the reference's layout."""

    notes: tuple[str, ...]
    whole: Array
    part: Array  # the part that the recording keeps
    truth: Array
    fault: str = ""  # what is wrong whatever the distance
    view: View | None = None  # what the dump has instead of logits


@dataclass(frozen=True)
class Aligned:
    """A dump with the names and layouts of a recording."""

    found: dict[str, Found]
    misfits: dict[str, str]  # the points whose shape fits no layout, and why
    unknown: list[str]
    unmapped: list[str]  # names of the map that the dump does not have
    shapes: dict[str, tuple[int, ...]]  # of all points, whole
    precision: str  # the port's
    misread: frozenset[str] = field(default=frozenset[str]())  # what its successors were not computed from

    @property
    def given(self) -> dict[str, Array]:
        """The complete points, from which others can be computed."""
        return {
            name: here.whole
            for name, here in self.found.items()
            if here.whole.shape == self.shapes[name]
            and here.view is None
            and not (name.endswith(CHOICE) and here.fault)
            and name not in self.misread
        }


def align(
    golden: Recording,
    dump: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
    permuted: bool = True,
) -> Aligned:
    """Convert a dump to the names and layouts of a recording. Raises ValueError like compare.

    permuted says whether heads may be in another order.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision={precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    printed = {name: x for name, x in dump.items() if isinstance(x, Excerpt)}
    arrays = {name: as_array(x) for name, x in dump.items() if name not in printed}
    sums = [name for name, x in arrays.items() if name.endswith(SUM) and x.size == 1]
    printed |= {name.removesuffix(SUM): Excerpt(float(arrays.pop(name).item())) for name in sums}
    arrays = _comparable(golden, arrays, about or {})
    point_of = namer(golden.config, names)
    views = {name: point_of(name) for name in arrays}
    named: dict[str, Array] = {}
    for name in sorted(arrays, key=lambda name: _precedence(name, views[name])):
        named.setdefault(views[name], arrays[name])
    known = {*golden.points, *(split_pass(name)[0] + view for name in golden.points for view in VIEWS)}
    excerpts = {point_of(name): x for name, x in printed.items()}
    unknown = [name for name in arrays if views[name] not in known]
    unknown += [name for name in printed if point_of(name) not in golden.points]
    if len(unknown) == len(arrays) + len(printed):
        raise ValueError(f"no name in the dump is a known point: {', '.join(unknown[:5])}; --map gives them names")

    found: dict[str, Found] = {}
    misfits: dict[str, str] = {}
    shapes = _shapes(golden)
    for name in golden.points:
        here = _viewed(name, named, golden, shapes[name]) if split_layer(name)[1] == "lm_head" else None
        if here is None and name in named:
            here = _found(name, named[name], golden, shapes[name], permuted)
            if here is None:
                x = named[name]
                misfits[name] = f"shape {x.shape}, dtype {x.dtype} instead of shape {shapes[name]}"
        elif here is None and name in excerpts and not name.endswith(CHOICE):
            here = _printed(name, excerpts[name], golden, shapes[name])
            if here is None:
                misfits[name] = f"shape {excerpts[name].shape} instead of {shapes[name]}, or numbers that have no sum"
        if here is not None:
            found[name] = here
    if not found:
        name, note = next(iter(misfits.items()))
        raise ValueError(f"no shape fits, is it a dump of another model? {name}: {note}")
    _in_order(found)
    port = precision or _precision(found)
    for name in [name for name in found if name.endswith(CHOICE)]:
        here, gate = found[name], gate_of(name)
        if gate in golden.points:  # without the weights no more than this point can follow another choice
            logits = golden.points[gate]
            logits = np.take(logits, [-1], 1) if LAST in here.notes else logits
            truth = settle(here.part, here.truth, logits, tolerance(gate, golden, port)[1])
            found[name] = replace(here, truth=truth)
    return Aligned(found, misfits, unknown, _unmapped(names, {**arrays, **printed}), shapes, port)


def as_array(x: Any) -> Array:
    """Convert an array from torch, MLX, JAX or plain numbers to NumPy; bfloat16 and float16 keep their types."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach"):  # torch
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            return x.float().numpy().astype(BFLOAT16)
        return x.numpy()
    if str(getattr(x, "dtype", "")) == "mlx.core.bfloat16":
        import importlib

        return np.asarray(x.astype(importlib.import_module("mlx.core").float32)).astype(BFLOAT16)
    return np.asarray(x)


def reroute(golden: Recording, aligned: Aligned, weights: Mapping[str, Array]) -> Aligned:
    """Let the reference follow the port where the port chose another expert of nearly equal probability.

    Which one it is, is rounding; but from there on all numbers are others.
    """
    given = aligned.given
    if not any(name in given for name in other_choices(golden, aligned.found)):
        return aligned
    chosen: dict[str, Array] = {}
    run = Rerun(weights, golden.config, named(golden.numerics), golden.passes, chosen)
    found = dict(aligned.found)
    for prefix, _, _ in golden.passes:
        for name in (prefix + point for point in point_names(golden.config)):
            if name.endswith(CHOICE) and name in given:
                gate = gate_of(name)
                limit = tolerance(gate, golden, aligned.precision)[1]
                chosen[name] = settle(given[name], run.made(name), run.value(gate), limit)
            x = run.value(name)
            if name in found:
                found[name] = replace(found[name], truth=kept(golden, found[name], name, x))
    return replace(aligned, found=found)


def other_choices(golden: Recording, found: Mapping[str, Found]) -> list[str]:
    """Return the points where the port chose other experts than the recording because of rounding."""
    return [
        name
        for name, here in found.items()
        if name.endswith(CHOICE) and LAST not in here.notes and distance(here.truth, golden.points[name], 1)[0]
    ]


def gate_of(name: str) -> str:
    """Return the name of the router's logits for a point with its choices."""
    return name.removesuffix("router_indices") + "gate"


def settle(x: Array, own: Array, logits: Array, floor: float) -> Array:
    """Return the port's choices x (B, S, k) for tokens where they are as good as ours, else our own.

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


def kept(golden: Recording, here: Found, name: str, x: Array) -> Array:
    """Return the part of a whole point that both the recording and the dump have."""
    x = np.take(x, [-1], position_axis(name)) if LAST in here.notes else golden.cut(name, x)
    return x if here.view is None else here.view.of(x)


def tolerance(name: str, golden: Recording, port: str) -> tuple[float, float]:
    """Return the noise floors of a point, overall and at its worst position: the port's plus the recording's.

    A decode step has few numbers, and may have a small floor by luck: the prefill's floor is the minimum.
    """

    def floor(p: str, i: int) -> float:
        of = golden.floors.get(p, {})
        return max([LEAST[p], *(of[key][i] for key in {name, split_pass(name)[1]} if key in of)])

    return math.hypot(floor(port, 0), floor(golden.numerics, 0)), math.hypot(floor(port, 1), floor(golden.numerics, 1))


def _in_order(found: dict[str, Found]) -> None:
    """Sort a token's experts in the reference's order: largest weight first."""
    for name in [name for name in found if name.endswith(CHOICE)]:
        weights = name.removesuffix("indices") + "weights"
        if weights in found and found[weights].whole.shape == found[name].whole.shape:
            for part in ("whole", "part"):
                order = np.argsort(-getattr(found[weights], part), -1, kind="stable")
                for one in (name, weights):
                    x = np.take_along_axis(getattr(found[one], part), order, -1)
                    found[one] = replace(found[one], **{part: x})


def _precedence(name: str, point: str) -> int:
    """Return the order of names of one point: plain ones, translated ones, and those that only lack their "model.".

    llama.cpp's graph has both a `norm` and a `result_norm`; the former is the final norm before its weight.
    """
    own_pass, own = split_pass(name)
    return 0 if name == point else 2 if point == f"{own_pass}model.{own}" else 1


def _unmapped(names: Mapping[str, str] | None, dump: Mapping[str, Any]) -> list[str]:
    """Return the names in a map that match nothing in the dump."""
    missing: list[str] = []
    for mine in names or {}:
        pattern = re.compile(r"(decode\.\d+\.)?" + re.escape(mine).replace(r"\{N\}", r"\d+"))
        if not any(pattern.fullmatch(name) for name in dump):
            missing.append(mine)
    return missing


def _comparable(golden: Recording, dump: Mapping[str, Array], about: Mapping[str, Any]) -> dict[str, Array]:
    """Return the part of a dump that was computed from the recording's ids, if the dump says so.

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
    """Return the shape of each whole point."""
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for prefix, ids, _ in golden.passes:
        batch, new = ids.shape
        total += new
        shapes |= {
            prefix + name: point_shape(name, golden.config, batch, new, total) for name in point_names(golden.config)
        }
    return shapes


def _viewed(name: str, named: Mapping[str, Array], golden: Recording, shape: tuple[int, ...]) -> Found | None:
    """Return the point of a dump that holds log-probabilities or ids instead of logits."""
    view = view_of(split_pass(name)[0], named, golden.points[name], shape)
    if view is None:
        return None
    notes = (view.note, *((LAST,) if view.is_last else ()))
    reference = np.take(golden.points[name], [-1], 1) if view.is_last else golden.points[name]
    return Found(notes, view.mine, view.mine, view.of(reference), view.fault, view)


def _printed(name: str, excerpt: Excerpt, golden: Recording, shape: tuple[int, ...]) -> Found | None:
    """Return a point of which a program printed a sum and a few numbers."""
    seen = view_of_excerpt(name, excerpt, golden.points[name], shape, golden.config)
    if seen is None:
        return None
    view, notes = seen
    reference = np.take(golden.points[name], [-1], position_axis(name)) if view.is_last else golden.points[name]
    fault = "" if np.isfinite(view.mine).all() else "numbers are NaN or infinite"
    return Found((view.note, *notes), view.mine, view.mine, view.of(reference), fault, view)


def _found(name: str, x: Array, golden: Recording, shape: tuple[int, ...], permuted: bool) -> Found | None:
    """Convert an array to the reference's layout, and its mask to -inf. None if it fits no layout."""
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
    recognised = recognise(name, x, golden, shape, permuted)
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


def digits(name: str, here: Found) -> str | None:
    """Return the precision to which the numbers of a point belong; None for points that do not show it."""
    if name.endswith(("embed_tokens", "probs", "scores", CHOICE)):  # gathered, zeros, integers
        return None
    if here.view is not None:
        return here.view.precision if here.view.precision != "float32" else None
    sample = here.whole.ravel()[:65536]
    sample = sample[np.isfinite(sample)].astype(np.float64)
    if not sample.any():
        return None
    with np.errstate(over="ignore"):
        kept = {p: np.mean(sample.astype(t).astype(np.float64) == sample) for p, t in _SHORT.items()}
    return next((p for p in _SHORT if kept[p] > 0.99), "float32")


def _precision(found: Mapping[str, Found]) -> str:
    """Return the precision of most points."""
    votes = [digits(name, here) for name, here in found.items()]
    return max(PRECISIONS, key=votes.count)


_SHORT: dict[str, Any] = {"bfloat16": BFLOAT16, "float16": np.float16}
