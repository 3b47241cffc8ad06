"""Why another implementation's numbers are wrong: tries known bugs at the first wrong point, on the port's inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from qwen3np.numerics import Array
from qwen3np.porting.bench import TINY, Bench, Trial, by_rank, told_apart, usable
from qwen3np.porting.catalogue import BUGS
from qwen3np.porting.changes import Bug
from qwen3np.porting.compare import WHOLE, Compared, compared, per_cent
from qwen3np.porting.fits import FAMILIES, fitted, neighbours
from qwen3np.porting.matched import Match, matches
from qwen3np.porting.points import POINTS, split_layer, split_pass
from qwen3np.porting.record import Recording
from qwen3np.porting.settings import SETTINGS
from qwen3np.porting.telltales import telltales

SHOWN = 5  # causes in a report
LEADERS = 3  # the best bugs, which are tried in combination with every other one
MUCH = 0.25  # of what a bug leaves may be left if a setting comes with it
ROUNDS = 3  # how many causes at different points are searched for


@dataclass(frozen=True)
class Cause:
    """One or two bugs of the catalogue, and the fraction of the squared error that they explain."""

    name: str
    point: str  # the first point that it changes
    explained: float
    sure: bool  # it explains SURE of the error, the rest is rounding, and no point contradicts it
    look: str
    scope: str = ""  # where it is, if not everywhere
    alike: tuple[str, ...] = ()  # causes that this dump cannot distinguish from it
    at: str = ""  # the point that it explains

    @property
    def step(self) -> str:
        """The old name of `point`, for one more version."""
        warnings.warn("Cause.step is called Cause.point now", DeprecationWarning, stacklevel=2)
        return self.point


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong from first_point on: the likeliest causes first, with the meaning and other findings in words."""

    verdict: str  # "equal", "rounding", "different", as of compare
    first_point: str | None
    meaning: str
    causes: list[Cause] = field(default_factory=list[Cause])
    unexplained: list[str] = field(default_factory=list[str])  # points that introduce an error with another cause
    known: list[str] = field(default_factory=list[str])


def diagnose(
    golden: Recording,
    dump: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, Array],
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
    require: Sequence[str] = (),
    bugs: Sequence[Bug] = (),
) -> Diagnosis:
    """Compare a dump with a recording, and try known bugs where it goes wrong.

    Each bug is planted in the reference, which then runs on the port's own numbers: those before the first wrong point,
    or only the ids if the port dumps nothing but logits.

    Parameters
    ----------
    golden, dump, about, weights, names, precision, require
        As in compare.
    bugs
        Bugs of your own, tried in addition to the catalogue.

    Returns
    -------
    Diagnosis
        The likeliest causes first, and their meaning in words.

    Raises
    ------
    ValueError
        As compare.

    Examples
    --------
    >>> from qwen3np.porting import record
    >>> from qwen3np.porting.diagnose import diagnose
    >>> model = qwen3np.load()
    >>> golden = record(model.weights, model.config, [281, 297, 272])
    >>> port = {**golden.points, "lm_head": golden.points["lm_head"] / 2}
    >>> diagnose(golden, port, weights=model.weights).first_point
    'lm_head'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # with some bugs numbers grow from layer to layer
        result = compared(golden, dump, about, names, precision, weights, require)
        if result.comparison.verdict != "different":
            return _hidden(result, weights)
        return _found(result, weights, tuple(bugs))


def _found(result: Compared, weights: Mapping[str, Array], more: tuple[Bug, ...]) -> Diagnosis:
    comparison, aligned = result.comparison, result.aligned
    first = comparison.first_point
    assert first is not None
    point = next((name for name, r in result.reports.items() if r.adds), first)
    if point not in aligned.found or not usable(aligned.found[point]):
        return Diagnosis("different", first, f"{comparison.meaning}: nothing can be tried on such numbers")
    known = [comparison.meaning]
    causes: list[Cause] = []
    unexplained: list[str] = []  # by the first cause
    sentences: list[str] = []
    bench = Bench(result.golden, aligned, weights, result.reports, point, result.table)
    while True:
        known += telltales(bench)
        trials = _tried(bench, (*more, *SETTINGS) if sentences else more)  # compare tried them at the first point
        own = _causes(bench, trials)
        causes += own[: 1 if sentences else SHOWN]
        sentences.append(_said(bench, trials, own[0] if own else None, comparison.doubt if not sentences else ""))
        if not own or not own[0].sure or len(sentences) == ROUNDS:
            break
        unexplained = unexplained or list(trials[0].rest)
        rest = next((name for name in trials[0].rest if usable(aligned.found[name])), None)
        if rest is None:
            break
        bench = replace(
            bench, point=rest, table=reduce(lambda table, bug: bug.planted(table), trials[0].bugs, bench.table)
        )
    meaning = ". Besides: ".join(sentences)
    return Diagnosis("different", first, meaning, causes, unexplained, known)


def _said(bench: Bench, trials: Sequence[Trial], best: Cause | None, doubt: str) -> str:
    """Return what was found at a point, in words; with compare's doubt if that is nothing."""
    point = bench.point
    if best is not None and best.sure:
        return f"{_sentence(best)} at {point}; look at: {best.look}"
    spoken_against = bool(trials) and bool(trials[0].everywhere) and not trials[0].consistent
    within = bool(trials) and (trials[0].consistent or trials[0].left <= bench.rounding(point))
    if best is not None and best.explained > 0.5 and within and not spoken_against:
        return f"perhaps: {_sentence(best)} at {point}. What is left is rounding, but it is not sure"
    nearest = f"; the nearest: {_sentence(best)}" if best is not None else ""
    return f"nothing in the catalogue explains the error at {point}{nearest}{doubt}"


def _sentence(cause: Cause) -> str:
    names = cause.name + (f" ({cause.scope})" if cause.scope else "")
    if cause.alike:
        names = f"{names}, or {' or '.join(cause.alike)}, which this dump cannot tell apart,"
    return f"{names} explains {per_cent(cause.explained)} of the error"


def _causes(bench: Bench, trials: Sequence[Trial]) -> list[Cause]:
    """Return trials as they are reported, each name once."""
    causes: dict[str, Cause] = {}
    for i, trial in enumerate(trials):
        explained = 1 - trial.left / max(bench.error(bench.point), TINY)
        if explained <= 0 or trial.name in causes:
            continue
        sure = i == 0 and trial.consistent and bench.explains(trial.left, bench.point)
        alike: list[str] = []
        if sure:
            rivals = [t for t in trials[1:] if t.consistent and t.name != trial.name]
            alike = list(dict.fromkeys(t.name for t in rivals if not told_apart(trial, t, bench)))
        kinds = [kind for kind in POINTS if any(kind in bug.points for bug in trial.bugs)]
        own = split_layer(bench.point)[1]
        causes[trial.name] = Cause(
            trial.name,
            own if own in kinds else kinds[0],
            explained,
            sure,
            "; ".join(dict.fromkeys(bug.look for bug in trial.bugs)),
            "; ".join(dict.fromkeys(bug.scope for bug in trial.bugs if bug.scope)),
            tuple(a for a in alike if not (" and " in a and trial.name in a)),
            bench.point,
        )
    return list(causes.values())


def _tried(bench: Bench, more: tuple[Bug, ...]) -> list[Trial]:
    """Return the bugs that make a difference at the point, the best first.

    Whole ones first, then those with a fitted number, then parts of bugs, and pairs where nothing else will do.
    """
    bugs = [*more, *(bug for bug in BUGS if bug.applies(bench.golden.config))]
    if bench.adding and all(split_pass(name)[0] for name in bench.adding):
        bugs += [replace(bug, decode=True) for bug in bugs]
    trials = sorted(bench.attempt((bug,) for bug in bugs), key=lambda t: t.left)

    def held(some: Sequence[Trial]) -> list[Trial]:
        return [bench.held(t) if bench.explains(t.left, bench.point) else t for t in some]

    trials, fits = by_rank(held(trials)), list[Trial]()
    families = tuple(family.name.split(" is ")[0] for family in FAMILIES)
    leaders = [t.name for t in trials[:LEADERS]]
    if not trials or not trials[0].consistent or any(name.startswith(families) for name in leaders):
        fits = held(list(fitted(bench)))
        trials = _without_neighbours(trials, fits, bench)
    if not trials or not trials[0].consistent:
        parts = list(
            bench.attempt((part,) for bug in (*bugs, *(t.bugs[0] for t in fits)) for part in bench.scopes(bug))
        )
        trials = by_rank([*trials, *held(parts)])
    if trials and not trials[0].consistent and trials[0].left > bench.rounding(bench.point):
        trials = by_rank([*trials, *(bench.held(t) for t in _pairs(bench, trials))])
    return _first_named(trials, bench)


def _first_named(trials: list[Trial], bench: Bench) -> list[Trial]:
    """Put first, of causes that the dump cannot tell apart, a whole one, the first of them in the catalogue."""
    if not trials or not trials[0].consistent:
        return trials
    order = {bug.name: i for i, bug in reversed(list(enumerate(BUGS)))}
    alike = [t for t in trials if t.consistent and len(t.bugs) == 1 and not told_apart(trials[0], t, bench)]
    first = min(alike, key=lambda t: (t.bugs[0].decode is not None, order.get(t.name, -1)), default=trials[0])
    if len(trials[0].bugs) > 1 or trials[0].name not in order or first.name not in order:
        return trials
    return [first, *(t for t in trials if t is not first)]


def _without_neighbours(trials: list[Trial], fits: list[Trial], bench: Bench) -> list[Trial]:
    """Return trials and fits: a number of the catalogue, unless a fitted one is better by more than noise."""
    kept = list[Trial]()
    for fit in fits:
        known = next((t for t in trials if neighbours(t, fit)), None)
        if known is None or not known.consistent or told_apart(fit, known, bench):
            kept.append(fit)
            trials = [t for t in trials if t is not known]
    return by_rank([*trials, *kept])


def _pairs(bench: Bench, trials: Sequence[Trial]) -> list[Trial]:
    """Return pairs of bugs that explain the point; if there is none, bugs with a setting, whose scatter is left."""
    unlike = list({t.left: t.bugs[0] for t in reversed(trials) if len(t.bugs) == 1}.values())[::-1]
    both = [(a, b) for i, a in enumerate(unlike[:LEADERS]) for b in unlike[i + 1 :] if a.name != b.name]
    both += [(b, a) for a, b in both if {*a.points} & {*b.points}]  # one may undo the other
    found = [t for t in bench.attempt(both) if bench.explains(t.left, bench.point)]
    return found or _with_setting(bench, unlike, MUCH * trials[0].left)


def _with_setting(bench: Bench, bugs: Sequence[Bug], most: float) -> list[Trial]:
    """Return the best bugs, or those whose pattern is in the errors, with the setting that leaves the least error."""
    leaders = [*bugs[:1], *(match.bug for match in matches(bench)[:1])]
    settings = [s for s in SETTINGS if s.applies(bench.golden.config)]
    best = min(bench.attempt((b, s) for b in leaders for s in settings), key=lambda t: t.left, default=None)
    if best is None or best.left > most:
        return []
    others = bench.attempt((b, best.bugs[1]) for b in bugs[:LEADERS] if b is not best.bugs[0])
    return [best, *(t for t in others if t.left <= most)]


def _hidden(result: Compared, weights: Mapping[str, Array]) -> Diagnosis:
    """Return what a dump is that shows no bug: its settings, and bugs that hide in their scatter and in rounding."""
    comparison = result.comparison
    causes = [
        Cause(bug.name, split_layer(at)[1], explained, explained >= WHOLE, bug.look, bug.scope, at=at)
        for at, bug, explained in result.settings
    ]
    first = result.settings[0][0] if result.settings else None
    found = list[Match]()
    if comparison.verdict != "equal":
        point = next(iter(result.aligned.found))
        found = matches(Bench(result.golden, result.aligned, weights, result.reports, point, result.table))
    if not found:
        return Diagnosis(comparison.verdict, first, comparison.meaning, causes)
    best = found[0]
    meaning = (
        f"{best.bug.name}: its pattern is in the errors with {best.amount:.2f} of its size, "
        f"{best.significance:.0f} standard deviations from none, though other errors hide it at each point; "
        f"look at: {best.bug.look}"
    )
    alike = dict.fromkeys(m.bug.name for m in found[1:] if m.significance > 0.97 * best.significance)
    alike = tuple(name for name in alike if name != best.bug.name)
    cause = Cause(best.bug.name, best.bug.points[0], best.amount, False, best.bug.look, "", alike, best.point)
    return Diagnosis("different", best.point, meaning, [cause, *causes], [], [comparison.meaning])
