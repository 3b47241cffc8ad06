"""Bugs with an unknown number, which is fitted to the port's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import FLOAT64, Array
from qwen3np.porting.align import kept
from qwen3np.porting.bench import Bench, Trial
from qwen3np.porting.catalogue import EPS_LOOK, HEAD_NORMS, LAYER_NORMS, NORMS, ROPE
from qwen3np.porting.changes import Bug, configured
from qwen3np.porting.points import split_pass

STEPS = 6  # of Gauss and Newton
STARTS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)


@dataclass(frozen=True)
class Family:
    """Bugs that differ in one number, which is fitted on a logarithmic scale."""

    name: str  # with {} for the number
    patterns: tuple[str, ...]
    key: str  # of the config
    starts: Callable[[Config], tuple[float, ...]]
    look: str

    def bug(self, pattern: str, value: float) -> Bug:
        """Return the bug with this number."""
        return Bug(self.name.format(number(value)), {pattern: configured(**{self.key: value})}, self.look)


def number(value: float) -> str:
    """Return a number in three digits, without trailing zeros: 12,000, 0.005 or 1e-4."""
    rounded = float(f"{value:.3g}")
    if rounded >= 1000:
        return f"{rounded:,.0f}"
    if rounded >= 1e-3:
        return f"{rounded:g}"
    digits, exponent = f"{rounded:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


FAMILIES = (
    Family(
        "rotary: rope_theta is {}",
        (ROPE,),
        "rope_theta",
        lambda config: tuple(x for x in STARTS if x != config.rope_theta),
        "newer config.json files keep it in rope_parameters.rope_theta",
    ),
    Family(
        "norm: rms_norm_eps is {}",
        (NORMS, HEAD_NORMS, LAYER_NORMS),
        "rms_norm_eps",
        lambda config: (1e-5 if config.rms_norm_eps != 1e-5 else 1e-6,),
        EPS_LOOK,
    ),
)


def neighbours(one: Trial, other: Trial) -> bool:
    """Whether two trials are bugs of one family, with numbers less than 5 % apart."""
    names = [trial.name.split(" is ") for trial in (one, other)]
    if any(len(n) != 2 for n in names) or names[0][0] != names[1][0]:
        return False
    a, b = (float(n[1].replace(",", "")) for n in names)
    return abs(a / b - 1) < 0.05


def fitted(bench: Bench) -> Iterator[Trial]:
    """Yield the families that change the point, each with the number that leaves the smallest error."""
    for family in FAMILIES:
        for pattern in family.patterns:
            found = _fit(bench, family, pattern)
            if found is not None:
                yield found


def _fit(bench: Bench, family: Family, pattern: str) -> Trial | None:
    """Return the best number: the best start, refined by Gauss-Newton iterations in its logarithm."""
    starts = list(family.starts(bench.golden.config))
    if family.key == "rope_theta":
        starts = [*_read_out(bench), *starts]
    tried = [(value, next(bench.attempt([(family.bug(pattern, value),)]), None)) for value in starts]
    trials = [(trial.left, value, trial) for value, trial in tried if trial is not None]
    if not trials:
        return None
    _, value, best = min(trials, key=lambda t: t[0])
    if best.left >= bench.error(bench.point):
        return None
    for _ in range(STEPS):
        step = _step(bench, family, pattern, value)
        tried = next(bench.attempt([(family.bug(pattern, value * np.exp(step)),)]), None)
        if tried is None or not tried.left < best.left:
            break
        gain = best.left / max(tried.left, 1e-300)
        best, value = tried, value * float(np.exp(step))
        if gain < 1.01:
            break
    for digits in (2, 1):  # a rounder number, if it is as good
        tried = next(bench.attempt([(family.bug(pattern, float(f"{value:.{digits}g}")),)]), None)
        if tried is not None and tried.left <= 1.02 * best.left:
            best = tried
    return best


def _step(bench: Bench, family: Family, pattern: str, value: float) -> float:
    """Return by how much the logarithm of the number should change, in float64, where rounding does not hide slopes."""
    h = 1e-3
    here = bench.aligned.found[bench.point]

    def made(value: float) -> Array:
        rerun = replace(bench.wrong([family.bug(pattern, value)]), numerics=FLOAT64, computed={})
        return kept(bench.golden, here, bench.point, rerun.made(bench.point)).astype(np.float64)

    at, beside = made(value), made(value * float(np.exp(h)))
    seen = np.isfinite(at) & np.isfinite(beside) & np.isfinite(here.part)
    slope, error = (beside - at)[seen] / h, here.part.astype(np.float64)[seen] - at[seen]
    return float(np.clip(slope @ error / max(slope @ slope, 1e-300), -2, 2))


def _read_out(bench: Bench) -> list[float]:
    """Return the theta implied by the rotation of the second position, if the dump has it before and after."""
    name = bench.point
    if not name.endswith("_rope"):
        return []
    after, before = bench.aligned.found[name], name.replace("_rope", "_norm")
    if before not in bench.aligned.given or after.whole.shape[2] < 2 or split_pass(name)[0]:
        return []
    half = bench.golden.config.head_dim // 2
    x = np.swapaxes(bench.aligned.given[before], 1, 2)[:, :, 1].astype(np.float64)
    y: Array = after.whole[:, :, 1].astype(np.float64)
    turned = ((y[..., :half] + 1j * y[..., half:]) * np.conj(x[..., :half] + 1j * x[..., half:])).sum((0, 1))
    angle = np.angle(turned)
    good = (angle > 1e-4) & (np.arange(half) > 0)
    if good.sum() < 2:
        return []
    lanes = np.arange(half)[good] * 2 / bench.golden.config.head_dim
    return [float(np.exp(-(lanes @ np.log(angle[good])) / (lanes @ lanes)))]
