"""Log-probabilities after sampling's settings: which temperature, filter and penalties an engine applied before it
reported them. Each setting is fitted to the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from qwen3np.audit.measure import away, by_rows, size
from qwen3np.audit.rollouts import Rollout
from qwen3np.numerics import Array

POSITIONS, LEAST, NUMBERS = 192, 16, 2 << 20  # positions on which settings are fitted, and their logits together
GAIN = 1.25  # how much smaller the difference must become with one more setting
TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0)
GRIDS: dict[str, tuple[float, ...]] = {
    "temperature": TEMPERATURES,
    "repetition_penalty": (0.9, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0),
    "presence_penalty": (-1.0, -0.5, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0),
    "frequency_penalty": (-1.0, -0.5, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0),
}
TOP_K = (1, 2, 3, 4, 5, 8, 10, 15, 16, 20, 25, 30, 32, 40, 50, 64, 80, 100, 128, 200, 256, 500, 512, 1000, 1024)
TOP_P = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
MIN_P = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
FILTERS: dict[str, tuple[float, ...]] = {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
NO_FILTERS: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class Settings:
    """Settings in the order in which they are applied; the defaults change nothing."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_k: float = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def changed(self) -> dict[str, float]:
        """The settings that do something."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value != getattr(NEUTRAL, name)}

    def __str__(self) -> str:
        """The settings in words: temperature 0.7 and top_p 0.9."""
        return " and ".join(f"{name} {value:.4g}" for name, value in self.changed.items())

    def scaled(self, logits: Array, before: Sequence[Array], new: Sequence[Array]) -> Array:
        """Return logits (n, V) after penalties and temperature, the largest 0.

        before and new are the ids so far, and those of them that were generated.
        """
        y = logits.astype(np.float64)
        for row, ids, own in zip(y, before, new, strict=True):
            if self.repetition_penalty != 1:
                seen = np.unique(ids)
                row[seen] *= np.where(row[seen] < 0, self.repetition_penalty, 1 / self.repetition_penalty)
            if self.presence_penalty or self.frequency_penalty:
                seen, counts = np.unique(own, return_counts=True)
                row[seen] -= self.presence_penalty + self.frequency_penalty * counts
        return (y - y.max(-1, keepdims=True)) / self.temperature

    def view(self, logits: Array, rollout: Rollout, rows: slice) -> Array:
        """Return what an engine reports that applies these settings first."""
        places = range(rows.start, rows.stop)
        new = [np.array(rollout.ids[:i], np.int64) for i in places]
        y = self.scaled(logits, [np.array([*rollout.prompt, *own], np.int64) for own in new], new)
        return self.normalised(y, *_summed(y, bool(self.filters)))

    @property
    def filters(self) -> dict[str, float]:
        """The settings that drop ids."""
        return {name: value for name, value in self.changed.items() if name in FILTERS}

    def normalised(self, y: Array, ordered: Array, mass: Array) -> Array:
        """Return the log-probabilities (n, K) of ids with these scaled logits, -inf for those that the filters drop.

        ordered and mass are what _summed returns, in order if there are filters. Each filter applies to what the one
        before has left.
        """
        count = np.full(len(mass), min(int(self.top_k) or mass.shape[-1], mass.shape[-1]))
        if self.top_p < 1:  # the fewest whose probabilities reach p
            enough = self.top_p * np.take_along_axis(mass, count[:, None] - 1, -1)
            count = np.minimum((mass < enough).sum(-1) + 1, count)
        if self.min_p:
            count = np.minimum((ordered >= np.log(self.min_p)).sum(-1), count)
        last = count[:, None] - 1
        logp = y - np.log(np.take_along_axis(mass, last, -1))
        if self.filters:
            logp[y < np.take_along_axis(ordered, last, -1) - 1e-12] = -np.inf
        return logp


def _summed(y: Array, in_order: bool) -> tuple[Array, Array]:
    """Return logits y (n, V) in descending order and the sums of their exponentials so far, or y and the whole sum."""
    if not in_order:
        return y, np.exp(y).sum(-1, keepdims=True)
    ordered = -np.sort(-y, axis=-1)
    return ordered, np.cumsum(np.exp(ordered), -1)


NEUTRAL = Settings()


@dataclass
class _Fit:
    """Some positions with all of their logits, and what the engine reported there."""

    logits: Array  # (n, V)
    found: Array  # (n, 1 + K)
    theirs: Array
    before: list[Array]
    new: list[Array]

    def error(self, settings: Settings) -> float:
        return self.errors([settings])[0]

    def errors(self, candidates: Sequence[Settings]) -> list[float]:
        """Return the mean difference under each of these settings. Filters add the same to all ids that they keep."""
        alike: dict[Settings, list[int]] = {}
        for n, one in enumerate(candidates):
            alike.setdefault(replace(one, **NO_FILTERS), []).append(n)
        mine = np.empty((len(candidates), *self.found.shape))

        def look(rows: slice) -> None:
            for plain, places in alike.items():
                y = plain.scaled(self.logits[rows], self.before[rows], self.new[rows])
                own = np.take_along_axis(y, np.maximum(self.found[rows], 0), -1)
                ordered, mass = _summed(y, any(candidates[n].filters for n in places))
                for n in places:
                    mine[n, rows] = candidates[n].normalised(own, ordered, mass)

        by_rows(self.logits, look)
        return [size(away(self.theirs, mine[n])) for n in range(len(candidates))]


def _searched(f: Callable[[float], float], low: float, high: float) -> float:
    """Return where f is smallest between two numbers (golden section)."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(30):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
    return (low + high) / 2


def _refined(fit: _Fit, settings: Settings, error: float) -> tuple[float, Settings]:
    """Return settings whose numbers are fitted, or rounder ones that are as good."""
    for name, value in settings.changed.items():
        if name in GRIDS:
            grid = sorted({*GRIDS[name], value, getattr(NEUTRAL, name)})
            place = grid.index(value)
            low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
            best = _searched(lambda x, name=name, s=settings: fit.error(replace(s, **{name: x})), low, high)
            tried = [replace(settings, **{name: float(f"{best:.{digits}g}")}) for digits in (1, 2, 3, 4, 12)]
            errors = fit.errors(tried)
            least = min(errors)
            if least < error:
                noise = 1 / len(fit.found) ** 0.5
                first = next(i for i, e in enumerate(errors) if e <= (1 + noise) * least)
                settings, error = tried[first], errors[first]
    return error, settings


def _cost(found: tuple[float, Settings]) -> float:
    """Return an error that each setting makes GAIN times larger."""
    return found[0] * GAIN ** len(found[1].changed)


def fitted(logits: Iterable[Array], rollouts: Sequence[Rollout]) -> Settings:
    """Return the settings that explain what the engine reported best; NEUTRAL if none helps. logits: (n, V) each.

    Settings are added one by one, the best first, as long as the difference becomes GAIN times smaller.
    """
    logits = list(logits)
    room = max(min(POSITIONS, NUMBERS // logits[0].shape[-1]), LEAST)
    rows = [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.ids))]
    rows = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, room).astype(int))]
    width = max(r.found.shape[1] for r in rollouts)

    def padded(x: Array, fill: float) -> Array:
        return np.pad(x, (0, width - len(x)), constant_values=fill)

    fit = _Fit(
        np.stack([logits[n][i] for n, i in rows]),
        np.stack([padded(rollouts[n].found[i], -1) for n, i in rows]),
        np.stack([padded(rollouts[n].logprobs[i], np.nan) for n, i in rows]),
        [np.array([*rollouts[n].prompt, *rollouts[n].ids[:i]]) for n, i in rows],
        [np.array(rollouts[n].ids[:i], np.int64) for n, i in rows],
    )
    settings, error = NEUTRAL, fit.error(NEUTRAL)
    while len(settings.changed) < 4:
        choices = [
            [replace(settings, **{name: value})]
            for name, grid in GRIDS.items()
            if name not in settings.changed
            for value in grid
        ]
        # a filter hides the temperature, which changes what it keeps: both together
        temperatures = (settings.temperature,) if "temperature" in settings.changed else TEMPERATURES[4:13]
        choices += [
            [
                replace(settings, temperature=t, **{name: value})
                for name, values in FILTERS.items()
                if name not in settings.changed
                for value in values
            ]
            for t in temperatures
        ]
        errors = iter(fit.errors([one for choice in choices for one in choice]))
        tried = [min(((next(errors), one) for one in choice), key=_cost) for choice in choices if choice]
        leaders = sorted(tried, key=_cost)[:3]
        least, best = min((_refined(fit, one, e) for e, one in leaders), key=_cost)
        if not least * GAIN < error:
            break
        settings, error = best, least
    return settings
