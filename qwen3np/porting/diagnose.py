"""Why another implementation's numbers are wrong: known bugs, tried at the first wrong point on its own inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import takewhile
from typing import Any

import numpy as np

from qwen3np.numerics import FLOAT64, Array, position_axis
from qwen3np.porting.catalogue import BUGS, Bug
from qwen3np.porting.align import Aligned, Found, gate_of, kept, settle, tolerance
from qwen3np.porting.compare import Comparison, PointReport, compared
from qwen3np.porting.floors import MARGIN, numerics_of
from qwen3np.porting.points import CHOICE, POINTS, Rerun, point_names, split_layer, split_pass
from qwen3np.porting.record import HEADS, Recording, distance
from qwen3np.porting.shapes import UNMASKED

SURE = 0.99  # the least share of the squared error that a cause must explain; besides, what is left must be rounding
SHOWN = 5  # causes in a report
TINY = float(np.finfo(np.float64).tiny)
LEADERS = 3  # the bugs that are tried together with each other one


@dataclass(frozen=True)
class Cause:
    """A bug of the catalogue, or two, and the share of the squared error that goes with it."""

    name: str
    step: str  # the first that it changes
    explained: float
    sure: bool  # it explains SURE of the error, and what is left is rounding
    look: str


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong from first_point on: the likeliest causes first, and in words what it means and what is known."""

    verdict: str  # "equal", "rounding", "different", as of compare
    first_point: str | None
    meaning: str
    causes: list[Cause] = field(default_factory=list[Cause])
    unexplained: list[str] = field(default_factory=list[str])  # points that add an error of another cause
    known: list[str] = field(default_factory=list[str])


def diagnose(
    golden: Recording,
    dump: Mapping[str, Array],
    about: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, Array],
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
) -> Diagnosis:
    """Compare a dump with a recording, and try the catalogue of bugs where it goes wrong.

    Each bug is planted in the reference, which is run from the port's own numbers: those before the first wrong point,
    or the ids alone where the port dumps no more than logits. Arguments and errors are those of compare.
    """
    aligned, comparison = compared(golden, dump, about, names, precision, weights)
    if comparison.first_point is None:
        return Diagnosis(comparison.verdict, None, comparison.meaning)
    first, point = comparison.first_point, _judged(comparison)
    here = aligned.found.get(point)
    if here is None or not _usable(here):
        return Diagnosis("different", first, f"{comparison.meaning}: nothing can be tried on such numbers")

    bench = _Bench(golden, aligned, weights, point)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # with some bugs numbers grow from layer to layer
        trials = bench.trials()
    causes: dict[str, Cause] = {}
    for trial in trials:
        cause = bench.cause(trial)
        if cause.explained > 0:
            causes.setdefault(cause.name, cause)
    best = next(iter(causes.values()), None)
    unexplained: list[str] = []
    if best is not None and best.sure:
        unexplained = bench.unexplained(trials[0].bugs, comparison)
        meaning = f"{_sentence(best)} at {point}; look at: {best.look}"
        if unexplained:
            meaning += f". It does not explain the error that {unexplained[0]} adds"
    elif best is not None and best.explained > 0.5 and trials[0].left <= bench.rounding(point):
        meaning = f"perhaps: {_sentence(best)} at {point}. What is left is rounding, but the error is hardly more"
    else:
        nearest = f"; the nearest: {_sentence(best)}" if best is not None else ""
        meaning = f"nothing in the catalogue explains the error at {point}{nearest}"
    known = [comparison.meaning, *bench.known()]
    return Diagnosis("different", first, meaning, list(causes.values())[:SHOWN], unexplained, known)


def _usable(here: Found) -> bool:
    """Whether all numbers are finite, but for a mask where there is one."""
    masked = bool(np.isneginf(here.truth).any())
    return bool((np.isfinite(here.part) | (np.isneginf(here.part) & masked)).all())


def _sentence(cause: Cause) -> str:
    return f"{cause.name} explains {share(cause.explained)} of the error"


def share(explained: float) -> str:
    """Return a share in per cent, with as many nines as there are."""
    return f"{100 * explained:.{6 if explained > SURE else 2}g} %"


def adds(report: PointReport) -> bool:
    """Whether a step adds more than rounding to what it is given."""
    return report.added is not None and report.added_floor is not None and report.added > MARGIN * report.added_floor


def _judged(comparison: Comparison) -> str:
    """Return the first wrong point that adds an error to what it is given; the first wrong one where none does."""
    different = [report for report in comparison.points if report.verdict == "different"]
    return next((report.name for report in different if adds(report)), different[0].name)


@dataclass(frozen=True)
class _Trial:
    """What these bugs leave of the error, squared: at the point, and beside it if that is explained."""

    bugs: tuple[Bug, ...]
    left: float
    beside: Mapping[str, float]

    @property
    def sure(self) -> bool:
        """Whether the point is explained."""
        return bool(self.beside)

    @property
    def rank(self) -> tuple[bool, float]:
        """What explains the point is ranked by all that is beside it, to tell apart what is alike there."""
        return not self.sure, sum(self.beside.values()) if self.sure else self.left


@dataclass(frozen=True)
class _Bench:
    """Where bugs are tried: at a point, and at those that follow it in its layer."""

    golden: Recording
    aligned: Aligned
    weights: Mapping[str, Array]
    point: str

    @cached_property
    def names(self) -> list[str]:
        """All points of all passes."""
        return [prefix + name for prefix, _, _ in self.golden.passes for name in point_names(self.golden.config)]

    @cached_property
    def beside(self) -> list[str]:
        """The points that the dump has of the same layer: before the point, in any pass, and after it in its own."""
        own, layer = split_pass(self.point)[0], split_layer(self.point)[0]
        names = [name for name in self.names if name in self.aligned.found and split_layer(name)[0] == layer]
        return [name for name in names if self.is_before(name) or split_pass(name)[0] == own]

    def is_before(self, name: str) -> bool:
        """Whether this is computed before the point."""
        return self.names.index(name) < self.names.index(self.point)

    @cached_property
    def right(self) -> Rerun:
        """The reference, given the port's own numbers."""
        n = numerics_of(self.aligned.precision)
        # of scores before their mask the port's next step was given others
        given = {k: x for k, x in self.aligned.given.items() if UNMASKED not in self.aligned.found[k].notes}
        return Rerun(self.weights, self.golden.config, n, self.golden.passes, given)

    @cached_property
    def error(self) -> float:
        """What a bug has to explain."""
        return self.left(self.right, self.point)

    def wrong(self, bugs: Iterable[Bug]) -> Rerun:
        """Return the reference with these bugs; what it has computed before the first of them is not done again."""
        steps = reduce(lambda steps, bug: bug.planted(steps), bugs, POINTS)
        same = takewhile(lambda name: steps[split_layer(name)[1]] is POINTS[split_layer(name)[1]], self.names)
        computed = {name: self.right.computed[name] for name in same if name in self.right.computed}
        return replace(self.right, table=steps, computed=computed)

    def left(self, rerun: Rerun, name: str) -> float:
        """Return the squared distance of the port's point from this implementation's, relative to its own size."""
        here = self.aligned.found[name]
        if name.endswith(CHOICE):
            gate, own = gate_of(name), rerun.made(name)
            if here.whole.shape == own.shape:
                limit = tolerance(gate, self.golden, self.aligned.precision)[1]
                own = settle(here.whole, own, rerun.value(gate), limit)
            return distance(here.part, kept(self.golden, here, name, own), 1)[0] ** 2
        mine, other = (x.astype(np.float64) for x in (here.part, kept(self.golden, here, name, rerun.made(name))))
        if UNMASKED in here.notes:
            mine, other = (np.where(np.isfinite(here.truth), x, 0) for x in (mine, other))
        seen = np.isfinite(mine)
        hidden = -np.abs(mine[seen]).max(initial=0)  # stands for -inf, so that another mask is not beyond all measure
        mine, other = np.where(seen, mine, hidden), np.where(np.isfinite(other), other, hidden)
        return float(np.sum((mine - other) ** 2) / max(np.sum(mine**2), TINY))

    def rounding(self, name: str) -> float:
        """Return the squared distance that is still rounding."""
        return (MARGIN * tolerance(name, self.golden, self.aligned.precision)[0]) ** 2

    def explains(self, left: float, error: float, name: str) -> bool:
        """Whether what is left of an error is a small share of it, and no more than compare would call rounding."""
        return left <= (1 - SURE) * error and left <= self.rounding(name)

    def attempt(self, candidates: Iterable[tuple[Bug, ...]]) -> list[_Trial]:
        """Try bugs; return those that make a difference at the point, and none where the port is right before it."""
        trials: list[_Trial] = []
        for bugs in candidates:
            wrong = self.wrong(bugs)
            left = self.left(wrong, self.point)
            if left == self.error:
                continue
            sure = self.explains(left, self.error, self.point)
            beside = {name: self.left(wrong, name) for name in self.beside} if sure else {}
            if not any(self.is_before(name) and rest > self.rounding(name) for name, rest in beside.items()):
                trials.append(_Trial(bugs, left, beside))
        return trials

    def trials(self) -> list[_Trial]:
        """Return the bugs that make a difference at the point, the best first.

        Parts of bugs are tried where no whole one explains the layer, pairs where none leaves only rounding.
        """
        bugs = [bug for bug in BUGS if bug.applies(self.golden.config)]
        found = self.attempt((bug,) for bug in bugs)
        if not any(t.sure and all(rest <= self.rounding(name) for name, rest in t.beside.items()) for t in found):
            found += self.attempt((part,) for bug in bugs for part in bug.parts)
        found.sort(key=lambda trial: trial.rank)
        if found and not found[0].sure and found[0].left > self.rounding(self.point):
            unlike = list({trial.left: trial.bugs[0] for trial in reversed(found)}.values())[::-1]
            both = [(a, b) for i, a in enumerate(unlike[:LEADERS]) for b in unlike[i + 1 :] if a.name != b.name]
            both += [(b, a) for a, b in both if {*a.steps} & {*b.steps}]  # one may undo the other
            pairs = self.attempt(both)
            found = sorted((t for t in pairs if t.sure), key=lambda trial: trial.rank) + found
        return found

    def cause(self, trial: _Trial) -> Cause:
        """Return a trial as it is reported."""
        steps = [step for step in POINTS if any(step in bug.steps for bug in trial.bugs)]
        kind = split_layer(self.point)[1]
        return Cause(
            " and ".join(sorted({bug.name for bug in trial.bugs})),
            kind if kind in steps else steps[0],
            1 - trial.left / max(self.error, TINY),
            trial.sure,
            "; ".join(dict.fromkeys(bug.look for bug in trial.bugs)),
        )

    def unexplained(self, bugs: Iterable[Bug], comparison: Comparison) -> list[str]:
        """Return the points that add an error which these bugs do not explain."""
        wrong = self.wrong(bugs)
        exact = replace(wrong, numerics=FLOAT64, computed={})

        def floor(name: str) -> float:  # a bug may make more of rounding than the right model does
            return (MARGIN * distance(wrong.made(name), exact.made(name), position_axis(name))[0]) ** 2

        points = [report.name for report in comparison.points if report.name in self.aligned.found and adds(report)]
        left = {name: self.left(wrong, name) for name in points}
        return [name for name in points if left[name] > self.rounding(name) and left[name] > floor(name)]

    def known(self) -> list[str]:
        """Return what the numbers say by themselves: where the error is, and whether a factor undoes it."""
        here, known = self.aligned.found[self.point], list[str]()
        right = kept(self.golden, here, self.point, self.right.made(self.point)).astype(np.float64)
        mine = here.part.astype(np.float64)
        limit = MARGIN * tolerance(self.point, self.golden, self.aligned.precision)[1]
        kind = split_layer(self.point)[1].rpartition(".")[2]
        if self.point.endswith(CHOICE):
            return known
        axes = {"positions": position_axis(self.point)} | ({"heads": HEADS[kind]} if kind in HEADS else {})
        for what, axis in axes.items():
            is_wrong = ~(distance(mine, right, axis)[1] <= limit)
            if 0 < is_wrong.sum() < is_wrong.size:
                wrong = [str(i) for i in np.flatnonzero(is_wrong)]
                some = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
                known.append(f"wrong at {len(wrong)} of {is_wrong.size} {what}: {some}")
        seen = np.isfinite(right) & np.isfinite(mine)
        x, y = mine[seen], right[seen]
        factor = float(x @ y / max(y @ y, TINY))
        if np.sum((x - factor * y) ** 2) <= (1 - SURE) * np.sum((x - y) ** 2):
            known.append(f"it is {factor:.6g} times what it should be")
        return known
