"""Tries bugs: each is planted in the reference, which then runs on the port's own numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile

import numpy as np

from qwen3np.guard import position_axis
from qwen3np.numerics import FLOAT32, FLOAT64, Array
from qwen3np.porting.align import Aligned, Found, gate_of, kept, settle, tolerance
from qwen3np.porting.changes import Bug
from qwen3np.porting.floors import MARGIN, Draws, limit, noisy, numerics_of
from qwen3np.porting.judge import PointReport
from qwen3np.porting.points import CHOICE, POINTS, Point, Rerun, point_names, split_layer, split_pass
from qwen3np.porting.record import Recording, distance
from qwen3np.porting.shapes import UNMASKED

SURE = 0.99  # the smallest fraction of the squared error that a cause must explain; the rest must also be rounding
TINY = float(np.finfo(np.float64).tiny)
MOST_LAYERS = 64  # layers in which bugs are tried apart, where only a whole forward pass can tell


def usable(here: Found) -> bool:
    """Whether all numbers are finite, except where masked."""
    masked = bool(np.isneginf(here.truth).any())
    return bool((np.isfinite(here.part) | (np.isneginf(here.part) & masked)).all())


@dataclass(frozen=True)
class Trial:
    """The squared error that remains with these bugs, at the first wrong point and at all others."""

    bugs: tuple[Bug, ...]
    left: float
    everywhere: Mapping[str, float] = field(default_factory=dict[str, float])
    consistent: bool = False  # no point speaks against them
    rest: tuple[str, ...] = ()  # points that add an error which has nothing to do with them

    @property
    def name(self) -> str:
        """The names of the bugs."""
        return " and ".join(sorted({bug.name for bug in self.bugs}))

    @property
    def total(self) -> float:
        """The total that remains, relative to rounding."""
        return sum(self.everywhere.values())


@dataclass(frozen=True)
class Bench:
    """Tries bugs at one point, and at all others of the dump."""

    golden: Recording
    aligned: Aligned
    weights: Mapping[str, Array]
    reports: Mapping[str, PointReport]
    point: str
    table: Mapping[str, Point] = field(default_factory=lambda: POINTS)  # with the settings that are known

    @cached_property
    def names(self) -> list[str]:
        """All points of all passes."""
        return [prefix + name for prefix, _, _ in self.golden.passes for name in point_names(self.golden.config)]

    @cached_property
    def seen(self) -> list[str]:
        """The points of the dump with usable numbers, in the order of computation."""
        return [
            n for n in self.names if n in self.reports and n in self.aligned.found and n not in self.aligned.misread
        ]

    @cached_property
    def adding(self) -> list[str]:
        """The points that introduce an error."""
        return [name for name in self.seen if self.reports[name].adds]

    @cached_property
    def right(self) -> Rerun:
        """The reference, running on the port's own numbers."""
        n = numerics_of(self.aligned.precision)
        # of scores before their mask the port's softmax was given others
        given = {k: x for k, x in self.aligned.given.items() if UNMASKED not in self.aligned.found[k].notes}
        return Rerun(self.weights, self.golden.config, n, self.golden.passes, given, self.table)

    @cached_property
    def _errors(self) -> dict[str, float]:
        return {}

    def error(self, name: str) -> float:
        """Return the squared error at a point, which a bug has to explain."""
        if name not in self._errors:
            self._errors[name] = self.left(self.right, name)
        return self._errors[name]

    def wrong(self, bugs: Iterable[Bug]) -> Rerun:
        """Return the reference with these bugs, reusing what was computed before the first of them."""
        bugs, table = list(bugs), self.table
        for bug in bugs:
            table = bug.planted(table)
        same = takewhile(lambda name: not any(bug.changed(name) for bug in bugs), self.names)
        computed = {name: self.right.computed[name] for name in same if name in self.right.computed}
        return replace(self.right, table=table, computed=computed)

    def left(self, rerun: Rerun, name: str) -> float:
        """Return the squared distance of the port's point from this implementation's, relative to its own size."""
        here = self.aligned.found[name]
        if name.endswith(CHOICE):
            gate, own = gate_of(name), rerun.made(name)
            if here.whole.shape == own.shape:
                floor = tolerance(gate, self.golden, self.aligned.precision)[1]
                own = settle(here.whole, own, rerun.value(gate), floor)
            return distance(here.part, kept(self.golden, here, name, own), 1)[0] ** 2
        mine, other = (x.astype(np.float64) for x in (here.part, kept(self.golden, here, name, rerun.made(name))))
        if UNMASKED in here.notes:
            mine, other = (np.where(np.isfinite(here.truth), x, 0) for x in (mine, other))
        seen = np.isfinite(mine)
        hidden = -np.abs(mine[seen]).max(initial=0)  # replaces -inf, so that another mask has a finite distance
        mine, other = np.where(seen, mine, hidden), np.where(np.isfinite(other), other, hidden)
        size = mine
        if here.view is not None:
            size = here.view.size(kept(self.golden, replace(here, view=None), name, rerun.made(name)))
        return float(np.sum((mine - other) ** 2) / max(np.sum(np.square(size)), TINY))

    def rounding(self, name: str) -> float:
        """Return the squared distance that is still rounding."""
        here = self.aligned.found[name]
        floor = self.reports[name].added_floor or tolerance(name, self.golden, self.aligned.precision)[0]
        return limit(floor, here.part.size) ** 2 + (here.view.resolution**2 if here.view is not None else 0.0)

    def own_rounding(self, wrong: Rerun, exact: Rerun, name: str) -> float:
        """Return the same for a bug that amplifies rounding more than the right model does."""
        away = distance(wrong.made(name), exact.made(name), position_axis(name))[0]
        floor = limit(away, self.aligned.found[name].part.size) ** 2
        return max(self.rounding(name), floor if np.isfinite(floor) else 0.0)

    def scatter(self, trial: Trial) -> dict[str, float]:
        """Return the squared distance, at points that add an error, that float32 rounding makes of these changes.

        A decode step has few numbers, in which perhaps no digit falls to the other side: the prefill's counts, too.
        """
        if self.aligned.precision != FLOAT32.name:
            return {}
        one = self.wrong(trial.bugs)
        other = replace(one, table=noisy(Draws(0), one.table), numerics=FLOAT32, computed={})

        def away(name: str) -> float:
            return distance(other.made(name), one.made(name), position_axis(name))[0] ** 2

        found: dict[str, float] = {}
        for name in self.adding:
            plain = split_pass(name)[1]
            found[name] = max(away(name), found.get(plain, 0.0) or (away(plain) if plain in self.seen else 0.0))
        return found

    def attempt(self, candidates: Iterable[tuple[Bug, ...]]) -> Iterator[Trial]:
        """Try bugs; yield those that make a difference at the point."""
        for bugs in candidates:
            try:
                left = self.left(self.wrong(bugs), self.point)
            except ValueError:  # two that do not go together, such as no window and windows elsewhere
                continue
            if left != self.error(self.point):
                yield Trial(bugs, left)

    def explains(self, left: float, name: str) -> bool:
        """Whether the rest of an error is a small fraction of it, and within what compare calls rounding."""
        return left <= (1 - SURE) * self.error(name) and left <= self.rounding(name)

    def spoils(self, trial: Trial) -> bool:
        """Whether bugs would break a point that introduces no error."""
        wrong = self.wrong(trial.bugs)
        return any(
            name not in self.adding and self.left(wrong, name) > 2 * max(self.rounding(name), self.error(name))
            for name in self.seen
        )

    def held(self, trial: Trial) -> Trial:
        """Check a trial that explains the point against all other points of the dump, in all passes.

        Speaks against it: a point it should explain and does not, and a right point that it makes wrong. A point that
        adds an error on which it has no influence has another cause.
        """
        wrong = self.wrong(trial.bugs)
        exact = replace(wrong, numerics=FLOAT64, computed={})
        everywhere: dict[str, float] = {}
        rest: list[str] = []
        consistent = True
        for name in self.seen:
            error, left = self.error(name), self.left(wrong, name)
            rounding = self.rounding(name)
            everywhere[name] = left / max(rounding, TINY)
            if left <= rounding or left <= self.own_rounding(wrong, exact, name):
                continue
            touched = abs(left - error) > 1e-3 * max(left, error)
            if name in self.adding and not touched:
                rest.append(name)
            elif self.reports[name].adds or touched:
                consistent = False
        return replace(trial, everywhere=everywhere, consistent=consistent, rest=tuple(rest))

    def scopes(self, bug: Bug, apart: bool = False) -> Iterator[Bug]:
        """Yield a bug in parts: in some of its points, in some passes, in some layers.

        Points that are changed in different ways belong together, unless they are said to be apart: half of two changes
        is another bug.
        """
        yield from bug.parts
        passes = [split_pass(name)[0] for name in self.adding]
        alone: list[Bug] = []
        if self.golden.steps:
            if all(passes):
                alone.append(replace(bug, decode=True))
            elif not any(passes) or split_pass(self.point)[0] == "":
                alone.append(replace(bug, decode=False))
        layers = [split_layer(name)[0] for name in self.adding]
        kinds = [split_layer(name)[1] for name in self.adding]
        own = [kind for kind in bug.points if kind in kinds]
        if all(layer is not None for layer in layers):
            some = frozenset(layer for layer in layers if layer is not None)
            if len(some) < self.golden.config.num_hidden_layers:
                alone += [replace(b, layers=some) for b in (bug, *alone)]
        elif not any(split_layer(name)[0] is not None for name in self.seen):
            count = self.golden.config.num_hidden_layers
            if 1 < count <= MOST_LAYERS and all(split_layer(f"model.layers.0.{p}")[1] == p for p in bug.points):
                alone += [replace(bug, layers=frozenset([i])) for i in range(count)]
        yield from alone
        apart = apart or len(set(bug.changes.values())) == 1
        if apart and own and len(own) < len(bug.points):
            yield from (b.at(*own) for b in (bug, *alone))


def told_apart(one: Trial, other: Trial, bench: Bench) -> bool:
    """Whether what the other leaves is more than what the one leaves, by more than noise can make.

    Below half a floor it is how a right program rounds its tables that decides, and says nothing of either.
    """
    for name in one.everywhere.keys() & other.everywhere.keys():
        here, there = max(one.everywhere[name], (0.5 / MARGIN) ** 2), other.everywhere[name]
        count = bench.aligned.found[name].part.size
        if there > 1.3 * here and (there - here) / here * count > 400:
            return True
    return False


def by_rank(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials: first those that no point contradicts, then by the error they leave."""
    return sorted(trials, key=lambda t: (not t.consistent, t.total if t.everywhere else np.inf, t.left))
