"""A matched filter for bugs that no distance shows, because they are smaller than rounding at every single point.

e is the error that the port's formula makes on its own inputs, d what a bug changes there. a = <e, d> / <d, d> over all
points is near 1 if the port has the bug and near 0 if it does not, however small d is next to the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qwen3np.numerics import FLOAT64, Array
from qwen3np.porting.align import kept
from qwen3np.porting.bench import Bench
from qwen3np.porting.catalogue import BUGS
from qwen3np.porting.changes import Bug
from qwen3np.porting.points import CHOICE

SIGNIFICANT = 15.0  # standard deviations: noise of many numbers is not quite independent
NEAR = 0.15  # how far a may be from 1


@dataclass(frozen=True)
class Match:
    """A bug whose pattern is in the error: a, and how many standard deviations that is from 0."""

    bug: Bug
    amount: float
    significance: float
    point: str


def matches(bench: Bench) -> list[Match]:
    """Return the bugs of the catalogue whose pattern is in the errors, the most significant first."""
    right = replace(bench.right, numerics=FLOAT64, computed={})
    names = [n for n in bench.seen if not n.endswith(CHOICE) and not bench.aligned.found[n].fault]
    exact = {name: _kept(bench, name, right.made(name)) for name in names}
    mine = {name: bench.aligned.found[name].part.astype(np.float64) for name in names}
    found: list[Match] = []
    for bug in BUGS:
        if not bug.applies(bench.golden.config):
            continue
        wrong = replace(right, table=bug.planted(bench.table), computed={})
        with np.errstate(all="ignore"):
            match = _match(bench, bug, exact, mine, {name: _kept(bench, name, wrong.made(name)) for name in names})
        if match is not None:
            found.append(match)
    return sorted(found, key=lambda m: -m.significance)


def _kept(bench: Bench, name: str, x: Array) -> Array:
    return kept(bench.golden, bench.aligned.found[name], name, x).astype(np.float64)


def _match(
    bench: Bench, bug: Bug, exact: Mapping[str, Array], mine: Mapping[str, Array], wrong: Mapping[str, Array]
) -> Match | None:
    product = power = 0.0
    first = ""
    for name, right in exact.items():
        seen = np.isfinite(right) & np.isfinite(wrong[name]) & np.isfinite(mine[name])
        d = np.where(seen, wrong[name] - np.where(seen, right, 0), 0)
        if not d.any():
            continue
        first = first or name
        e = np.where(seen, mine[name] - np.where(seen, right, 0), 0)
        size = float(np.square(right[seen]).mean()) if seen.any() else 0.0
        floor = bench.reports[name].added_floor or 0.0
        noise = max(floor * floor * size, float(np.square(e[seen]).mean()), 1e-300)  # of one number, squared
        product += float((e * d).sum()) / noise
        power += float((d * d).sum()) / noise
    if power <= 0:
        return None
    amount, significance = product / power, product / power**0.5
    if significance < SIGNIFICANT or abs(amount - 1) > NEAR:
        return None
    return Match(bug, amount, significance, first)
