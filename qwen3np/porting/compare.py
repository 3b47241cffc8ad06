"""Compare another implementation's numbers with a recording: rounding, or the first point that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

from qwen3np.numerics import Array
from qwen3np.porting.align import PRECISIONS, Aligned, align, digits, reroute, tolerance
from qwen3np.porting.bench import TINY, Bench, Trial, usable
from qwen3np.porting.changes import Bug
from qwen3np.porting.floors import limit
from qwen3np.porting.harmless import Moved, common_shift, moved
from qwen3np.porting.judge import Comparison, PointReport, Setting, coverage, judge
from qwen3np.porting.points import POINTS, Point, split_layer, split_pass
from qwen3np.porting.record import Recording
from qwen3np.porting.settings import CACHES, LAYERS, SETTINGS
from qwen3np.porting.shapes import HEAD_ORDER

# The share of the squared error from which on a setting is the whole reason, or is one next to a bug.
WHOLE, EXPLAINED = 0.98, 0.9
# A setting that explains less is the whole reason, too, if it leaves no more than OWN times its scatter: what float32
# rounding before it changes in it, as numbers fall to the other side of a digit, more with each layer. Measured on
# logits after 4 layers at the widths of Qwen3-0.6B: right settings leave up to 2.1 times their scatter and explain 0.41
# to 0.75; wrong ones with more than SCATTERED are nearly the right one (of another group size, say).
SCATTERED, OWN = 1 / 3, 3.0
ALIKE = 1e-6  # settings whose fractions differ by less cannot be told apart
MOST = 4  # settings of one port, and candidates for each
# A setting that leaves more times the error makes a larger one itself. A part of it, whose roundings fall otherwise
# next to the other part, leaves up to twice the error.
LOUD = 2.5
# Two settings together must explain at least this share of the error. So many pairs are tried that one can explain 42 %
# of a bug's error by chance; pairs that were really there explained 86 % or more, even from logits alone.
PAIRED = 0.75


@dataclass(frozen=True)
class Compared:
    """A comparison, with everything that it was made from."""

    golden: Recording  # at the port's positions
    aligned: Aligned
    comparison: Comparison
    table: Mapping[str, Point]  # the reference's points, with the port's settings
    reports: dict[str, PointReport]  # of the reference with the port's settings
    settings: list[tuple[str, Bug, float]]  # the point, the setting, the fraction it explains


def compare(
    golden: Recording,
    dump: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    precision: str | None = None,
    weights: Mapping[str, Array] | None = None,
    require: Sequence[str] = (),
) -> Comparison:
    """Compare a dump with a recording, point by point.

    Parameters
    ----------
    golden
        The recording.
    dump, about
        As read_dump returns them; dump may also hold torch tensors. Decode steps are compared up to the first that was
        fed another id.
    names
        Maps names of the dump to points.
    precision
        What the port computes in: "float32", "float16" or "bfloat16"; None: inferred from the numbers.
    weights
        If given, each formula is run on the port's own inputs, and the error that it adds there decides.
    require
        Patterns of points that must be in the dump.

    Returns
    -------
    Comparison
        The verdict, the first wrong point, and a report for each point.

    Raises
    ------
    ValueError
        For a dump of another prompt or another model, without any of the points, or without a required one.

    Examples
    --------
    >>> from qwen3np.porting import compare, record
    >>> model = qwen3np.load()
    >>> golden = record(model.weights, model.config, [281, 297])
    >>> compare(golden, golden.points).verdict
    'equal'
    """
    return compared(golden, dump, about, names, precision, weights, require).comparison


def compared(
    golden: Recording,
    dump: Mapping[str, Any],
    about: Mapping[str, Any] | None,
    names: Mapping[str, str] | None,
    precision: str | None,
    weights: Mapping[str, Array] | None,
    require: Sequence[str] = (),
) -> Compared:
    """Compare, and return the comparison with what it was made from. Arguments and errors as in compare."""

    def attempt(permuted: bool, precision: str | None = precision) -> Compared:
        aligned = align(golden, dump, about, names, precision, permuted)
        if (shift := common_shift(aligned.found, golden, aligned.precision)) is not None:
            own = moved(golden, shift)
            result = judged(own, align(own, dump, about, names, precision, permuted))
            both = {name.rpartition(".")[2] for name in aligned.found} >= {"q_rope", "k_rope"}
            # without the keys only right numbers after it show that a shift is harmless
            if both or result.comparison.verdict != "different":
                return result
        return judged(golden, aligned)

    def judged(own: Recording, aligned: Aligned) -> Compared:
        aligned = aligned if weights is None else reroute(own, aligned, weights)
        aligned, found = judge(own, aligned, weights)
        return Compared(own, aligned, found, POINTS, {r.name: r for r in found.points}, [])

    result = attempt(True)
    if result.comparison.verdict == "different" and any(HEAD_ORDER in r.notes for r in result.comparison.points):
        result = attempt(False)
    aligned = result.aligned
    given = [name for name in aligned.found if name not in aligned.misread]
    lacking = [pattern for pattern in require if not any(_matches(name, pattern) for name in given)]
    if lacking:
        raise ValueError(f"nothing in the dump is {', '.join(lacking)}, which is required")
    if weights is not None and result.comparison.verdict == "different":
        result = with_settings(result, weights)
    if weights is not None and precision is None and aligned.precision != "float32" and _is_mixed(aligned):
        other = with_settings(attempt(True, "float32"), weights)
        result = other if other.comparison.verdict == "rounding" else result
    aligned = result.aligned
    views = [here.view is not None and not here.view.resolution for here in aligned.found.values()]
    if result.comparison.verdict == "different" and precision is None and all(views) and aligned.precision == "float32":
        result = _by_probabilities(result, attempt)
    return result


def _by_probabilities(result: Compared, attempt: Callable[[bool, str], Compared]) -> Compared:
    """Also judge log-probabilities, which do not reveal the port's precision, by the coarser precisions."""
    for name in PRECISIONS[1:]:
        other = attempt(True, name)
        if other.comparison.verdict != "different":
            meaning = f"{name} rounding only, though log-probabilities do not show in what a port computes: give it as "
            meaning += "--precision float32 if it should be no more than that; "
            meaning += coverage(other.golden, other.aligned)
            return replace(result, comparison=replace(other.comparison, meaning=meaning))
    return result


def _is_mixed(aligned: Aligned) -> bool:
    """Whether some points have the digits of float32."""
    return any(digits(name, here) == "float32" for name, here in aligned.found.items())


def _matches(name: str, pattern: str) -> bool:
    prefix, point = split_pass(name)
    return any(fnmatchcase(prefix + form, pattern) for form in (point, point.removeprefix("model.")))


def with_settings(result: Compared, weights: Mapping[str, Array]) -> Compared:
    """Find settings that explain the errors of points, and judge the dump by a reference with these settings."""
    golden, aligned, now = result.golden, result.aligned, result.comparison
    table, found, reports = dict(POINTS), list[tuple[str, Bug, float]](), dict(result.reports)
    while len(found) < MOST:
        point = next((r.name for r in now.points if r.adds and r.verdict == "different"), None)
        if point is None or point not in aligned.found or not usable(aligned.found[point]):
            break
        bench = Bench(golden, aligned, weights, reports, point, table)
        alone = sorted(bench.attempt((s,) for s in SETTINGS), key=lambda t: t.left)
        best = _best(bench, _nearest(bench, alone), result.reports)
        best = best or _best(bench, _nearest(bench, _together(bench, alone)), result.reports)
        if best is None:
            break
        trial, now = best
        table = _planted(trial, table)
        found += [(point, bug, 1 - trial.left / max(bench.error(point), TINY)) for bug in trial.bugs]
        reports = {r.name: r for r in now.points}
    if not found:
        return result
    return _told(replace(result, table=table, reports=reports, settings=found), now)


def _planted(trial: Trial, table: Mapping[str, Point]) -> Mapping[str, Point]:
    return reduce(lambda changed, bug: bug.planted(changed), trial.bugs, table)


def _best(bench: Bench, trials: Sequence[Trial], first: Mapping[str, PointReport]) -> tuple[Trial, Comparison] | None:
    """Return the settings after which the fewest points add an error, and the verdict by a reference with them.

    first: the reports without any settings.
    """
    before = set(bench.adding)
    best: tuple[bool, int, Trial, Comparison] | None = None
    for trial in trials:
        _, after = judge(bench.golden, bench.aligned, bench.weights, _planted(trial, bench.table))
        own = bench.scatter(trial)
        after = replace(after, points=[_settled(r, first[r.name], own.get(r.name, 0.0)) for r in after.points])
        adding = {r.name for r in after.points if r.adds}
        in_part = bench.point in adding
        named = not in_part or trial.left <= (1 - EXPLAINED) * bench.error(bench.point)
        if named and not adding - before and (best is None or (in_part, len(adding)) < best[:2]):
            best = in_part, len(adding), trial, after
    return best and best[2:]


def _together(bench: Bench, alone: Sequence[Trial]) -> list[Trial]:
    """Return settings next to a short cache, which many programs have by default, and single layers in 16 bits.

    Two settings that round do not show one by one: next to the other's numbers, each rounds otherwise. They are not
    tried, since they take a while, where an error is larger than 16 bits throughout could make it.
    """
    error, size = bench.error(bench.point), bench.aligned.found[bench.point].part.size
    if error > limit(tolerance(bench.point, bench.golden, "bfloat16")[0], size) ** 2:
        return []
    small = [t.bugs[0] for t in alone if t.left <= LOUD * error]
    pairs = [(s, c) for c in CACHES if c in small for s in small if s not in CACHES]
    parts = [(part,) for s in LAYERS for part in bench.scopes(s)]
    found = [t for t in bench.attempt((*pairs, *parts)) if len(t.bugs) == 1 or t.left <= (1 - PAIRED) * error]
    return sorted(found, key=lambda t: t.left)


def _nearest(bench: Bench, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, sorted, that leave the least error; only in part where the whole spoils other points."""
    if not trials or trials[0].left > (1 - SCATTERED) * bench.error(bench.point):
        return []
    found: list[Trial] = []
    for trial in [t for t in trials if t.left <= 1.01 * trials[0].left + ALIKE * bench.error(bench.point)][:MOST]:
        parts = [trial]
        if bench.spoils(trial):
            parts = list(bench.attempt((part,) for part in bench.scopes(trial.bugs[0], apart=True)))
            parts = [t for t in parts if t.left <= 1.01 * trial.left and not bench.spoils(t)]
            parts = sorted(parts, key=lambda t: -len(t.bugs[0].points))[:1]
        found += parts
    return found


def _settled(now: PointReport, before: PointReport, own: float) -> PointReport:
    """Take for rounding what a setting leaves, if that is next to nothing, or no more than its own scatter."""
    if not now.adds or not before.adds or now.added is None or before.added is None:
        return now
    error = before.added**2
    left = max((1 - WHOLE) * error, min(OWN * own, (1 - SCATTERED) * error))
    return replace(now, adds=False) if now.added**2 <= left else now


def _told(result: Compared, now: Comparison) -> Compared:
    """Report the settings, in addition to anything that is wrong."""
    first, aligned = result.comparison, result.aligned
    wrong = [r for r in now.points if r.adds]
    shown: list[PointReport] = []
    bad = False
    for r in first.points:
        bad |= result.reports[r.name].adds
        if r.verdict == "different" and not bad:
            names = [bug.name for _, bug, _ in result.settings if split_layer(r.name)[1] in bug.points]
            r = replace(r, verdict="rounding", notes=(*r.notes, *(names if r.adds else ())))
        shown.append(r)
    settings = [Setting(f"{bug.name}{f' ({bug.scope})' if bug.scope else ''}", x, at) for at, bug, x in result.settings]
    together: dict[tuple[str, float], list[str]] = {}
    for s in settings:
        together.setdefault((s.point, s.explained), []).append(s.name)
    told = "; ".join(
        f"{' together with '.join(names)} explains {per_cent(explained)} of the error that {point} adds"
        for (point, explained), names in together.items()
    )
    if wrong:
        comparison = replace(now, points=shown, settings=settings, meaning=f"{now.meaning}. Besides, {told}")
    else:
        hidden = any(s.explained < WHOLE for s in settings)
        rest = "; the rest may be its scatter, or a smaller bug: see qwen3np diagnose" if hidden else ""
        place = f"; {result.golden.why}" if isinstance(result.golden, Moved) else ""
        meaning = f"{aligned.precision} rounding, but for what was chosen: {told}{rest}{place}"
        meaning += f"; {coverage(result.golden, aligned)}"
        comparison = replace(
            first, verdict="rounding", first_point=None, meaning=meaning, points=shown, settings=settings
        )
    return replace(result, comparison=comparison)


def per_cent(explained: float) -> str:
    """Format a fraction in per cent, without rounding 99.99 up to 100."""
    return f"{100 * explained:.{6 if explained > 0.99 else 2}g} %"
