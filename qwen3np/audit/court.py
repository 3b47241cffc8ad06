"""What a difference can be explained with: the hypotheses, what each leaves, and which of them hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwen3np.audit import hypotheses as h
from qwen3np.audit.formats import Untried
from qwen3np.audit.hypotheses import Hypothesis
from qwen3np.audit.measure import Variant, View, away, is_large, plain_view, recorded_experts, reported, rounded, size
from qwen3np.audit.processed import NEUTRAL, fitted
from qwen3np.audit.rollouts import Rollout
from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.bench import TINY
from qwen3np.porting.floors import numerics_of
from qwen3np.tokenizer import Tokenizer

# How many floors a right program may be away: other sums (the floor has the worst order), other places to round.
MARGIN = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
SURE = 12.0  # nats of evidence against the plain reference, after a few hundred hypotheses
APART = 6.0  # nats of evidence between two causes
LIKE = 4.0  # standard deviations of the correlation with our own rounding
HIDDEN = 0.5  # of the difference: a sure verdict leaves no more than this without our own rounding's pattern
STEADY = 4.0  # standard errors above 0 of the evidence in single rollouts
CLEAR = 8.0  # times that a cause makes the difference smaller, if no other is tried on a large model
LEADERS = 4  # causes with which settings are fitted, and the size of rounding is measured, again
AMPLIFIED = 1.5  # how many times that rounding may be left
FINEST, COARSEST = 0.4, 64.0  # times the floor of int8 weights: no format of at most 8 bits is below, of 4 bits above
NEAR = 0.2  # a cause that explains less is not worth a line


@dataclass(frozen=True, eq=False)
class Trial:
    """What remains of the difference under a hypothesis, on the same numbers as before."""

    hypothesis: Hypothesis
    left: float
    before: float
    tokens: int
    values: Array
    view: View
    steady: float  # standard errors by which the evidence of one rollout is above 0 on average

    @property
    def evidence(self) -> float:
        """Nats by which it is likelier than the plain reference (differences with a Laplace distribution)."""
        return self.tokens * math.log(max(self.before, 1e-12) / max(self.left, 1e-12))

    @property
    def explained(self) -> float:
        """The share of the squared difference."""
        return 1 - (self.left / max(self.before, 1e-30)) ** 2


def limit(name: str, floors: Mapping[str, float], tokens: int) -> float:
    """Return the largest mean difference that is still rounding in these numerics: a few tokens may be unlucky."""
    return MARGIN[name] * floors[name] * (1 + 2 / math.sqrt(max(tokens, 1)))


@dataclass
class Court:
    """Hears hypotheses about the rollouts of a sample."""

    rollouts: Sequence[Rollout]
    right: Variant
    theirs: Array
    states: list[Array]
    base: Array
    runs: dict[str, Array]  # what each of the usual numerics makes of the sample
    allowed: tuple[str, ...]  # numerics whose rounding is no difference
    routing: float | None = None  # share of the squared difference that goes when the engine's experts are replayed
    trials: list[Trial] = field(default_factory=list[Trial])
    amplified: list[Trial] = field(default_factory=list[Trial])  # trials under which what is left is rounding, too

    @classmethod
    def of(
        cls, rollouts: Sequence[Rollout], weights: Mapping[str, Array], config: Config, computed_in: str | None
    ) -> Court:
        """Run the reference and its roundings."""
        names = list(MARGIN)
        if computed_in not in (None, *names):
            raise ValueError(f"computed_in={computed_in!r}: must be one of {', '.join(names)}")
        allowed = names if computed_in is None else names[: names.index(computed_in) + 1]
        right, theirs, share = Variant(weights, config), reported(rollouts), None
        states = list(right.states(rollouts))
        base = right.predicted(rollouts, states=states)
        if any(r.experts is not None for r in rollouts):
            replayed = replace(right, replayed=True)
            own = list(replayed.states(rollouts))
            other = replayed.predicted(rollouts, states=own)
            share = 1 - (size(away(theirs, other)) / max(size(away(theirs, base)), TINY)) ** 2
            if share > 0:
                right, states, base = replayed, own, other
        runs = {name: v.predicted(rollouts) for name, v in rounded(right).items()}
        return cls(rollouts, right, theirs, states, base, runs, tuple(allowed), share)

    @property
    def floors(self) -> dict[str, float]:
        """The mean absolute difference that each rounding makes, of the numbers that are compared and no others."""
        return {name: size(self.compared(x - self.base)) for name, x in self.runs.items()}

    def compared(self, x: Array) -> Array:
        """Return x (N, 1 + K), NaN where there is nothing to compare."""
        return np.where(np.isnan(away(self.theirs, self.base)), np.nan, x)

    def of_chosen(self) -> Court:
        """Return the court for the tokens that were chosen, without the other likely ones."""
        theirs = self.theirs.copy()
        theirs[:, 1:] = np.nan
        return replace(self, theirs=theirs)

    def first(self) -> Court:
        """Return the court for the first rollout alone."""
        rows, columns = self.rollouts[0].found.shape

        def kept(x: Array) -> Array:
            return x[:rows, :columns]

        runs = {name: kept(x) for name, x in self.runs.items()}
        some = replace(self, rollouts=self.rollouts[:1], states=self.states[:1], runs=runs)
        return replace(some, theirs=kept(self.theirs), base=kept(self.base))

    def routing_of_rounding(self) -> float | None:
        """Return how much of bfloat16's rounding comes from other experts being chosen; None without experts."""
        config, weights = self.right.config, self.right.weights
        if not config.num_experts or self.right.replayed:
            return None
        held = [replace(r, experts=recorded_experts(weights, config, r)) for r in self.rollouts]
        x = replace(self.right, numerics=numerics_of("bfloat16"), replayed=True).predicted(held)
        return 1 - (size(self.compared(x - self.base)) / max(self.floors["bfloat16"], TINY)) ** 2

    def rests(self, left: float, tokens: int) -> str | None:
        """Return the numerics whose rounding covers what is left; None if none does."""
        return next((name for name in self.allowed if left <= limit(name, self.floors, tokens)), None)

    def heard(self, hypothesis: Hypothesis, view: View = plain_view) -> Trial | None:
        """Compare what a hypothesis predicts with what the engine reported."""
        try:
            with np.errstate(all="ignore"):
                mine = hypothesis.predict(view)
        except Untried:
            return None
        mine = np.pad(mine, ((0, 0), (0, self.theirs.shape[1] - mine.shape[1])), constant_values=np.nan)
        d, before = away(self.theirs, mine), away(self.theirs, self.base)
        before = np.where(np.isnan(mine), np.nan, before)
        d = np.where(np.isnan(before), np.nan, d)
        tokens = int((~np.isnan(before)).any(-1).sum())
        if not tokens or np.array_equal(mine[~np.isnan(d)], self.base[~np.isnan(d)]):
            return None
        trial = Trial(hypothesis, size(d), size(before), tokens, mine, view, steadiness(self.rollouts, before, d))
        self.trials.append(trial)
        return trial

    def explains(self, t: Trial) -> bool:
        """Whether what is left is rounding, and there is evidence for the cause."""
        if t.evidence < SURE:
            return False
        return self.nothing_left(t) or self.rests(t.left, t.tokens) is not None or t in self.amplified

    def nothing_left(self, t: Trial) -> bool:
        """Whether what is left is rounding of float32; a model with a bug may amplify it."""
        return t.left <= max(limit("float32", self.floors, t.tokens), 1e-4 * t.before)

    def remainder(self, t: Trial) -> str:
        """Say what is left with a cause."""
        name = self.rests(t.left, t.tokens) or ("float32" if self.nothing_left(t) else None)
        return f"rounding of {name or self.allowed[-1]}" + ("" if name else ", which it amplifies")

    def leaders(self) -> list[Trial]:
        """The causes that leave the least."""
        return sorted((t for t in self.trials if t.explained > NEAR), key=lambda t: t.left / t.before)[:LEADERS]

    def amplify(self) -> None:
        """Find causes that make rounding larger than it is in the reference: a cache in 8 bits turns it into steps."""
        for t in self.leaders():
            variant, name = t.hypothesis.variant, self.allowed[-1]
            if variant is not None and not self.explains(t):
                rounded = replace(variant, numerics=numerics_of(name)).predicted(t.hypothesis.rollouts, t.view)
                if t.left <= AMPLIFIED * size(rounded - t.values):
                    self.amplified.append(t)

    def families(
        self, tokenizer: Tokenizer | None, others: Mapping[str, Any], rounds: bool
    ) -> Iterator[list[Hypothesis]]:
        """Yield the hypotheses, kind by kind, the cheapest first; where it `rounds`, ways to round among them."""
        right, rollouts, distance = self.right, self.rollouts, size(away(self.theirs, self.base))
        yield [*h.shifts(right, rollouts, self.states), *h.units(self.base)]
        yield [*h.checkpoints(right, rollouts, others), *h.prompts(right, rollouts, right.config, tokenizer)]
        yield [*h.bugs(right, rollouts)]
        if FINEST < distance / max(self.floors["int8 weights"], TINY) < COARSEST:
            yield [*h.quantised(right, rollouts)]
        rounds = rounds and distance <= 2 * limit("bfloat16", self.floors, len(self.base))
        yield [*h.settings(right, rollouts, rounds)]

    def search(
        self,
        tokenizer: Tokenizer | None,
        others: Mapping[str, Any],
        rounds: bool,
        progress: Callable[[int], object],
    ) -> None:
        """Hear all hypotheses, until one explains everything down to float32; first under the settings that fit."""
        large, settings = is_large(self.right.config), fitted(map(self.right.logits, self.states), self.rollouts)
        processed = f"processed by {settings}"

        def hear(family: Iterable[Hypothesis], view: View = plain_view, before: str = "") -> bool:
            for x in family:
                self.heard(replace(x, name=f"{before}{x.name}"), view)
                progress(1)
            return self.exact() or (large and self.clear())

        def fits(view: View) -> Iterator[Hypothesis]:
            plain = self.right.predicted(self.rollouts, view, self.states)
            return h.fits(self.right, self.rollouts, self.theirs, plain, view)

        if settings != NEUTRAL:

            def predict(view: View) -> Array:
                return self.right.predicted(self.rollouts, settings.view, self.states)

            if hear([Hypothesis(processed, h.PROCESSED, h.RAW, predict)]):
                return
        families = list(self.families(tokenizer, others, rounds))
        for family in (*families, fits(plain_view)):
            if hear(family):
                return
        if any(self.explains(t) for t in self.trials):
            return
        for t in self.leaders():  # a bug may hide the settings, as settings may hide the bug
            x, model = t.hypothesis, t.hypothesis.variant
            if model is not None and (own := fitted([model.logits(y) for y in x.states()], x.rollouts)) != NEUTRAL:
                hear([x], own.view, f"processed by {own}, and ")
        if settings == NEUTRAL or any(self.explains(t) for t in self.trials):
            return
        for family in (*families[1:], fits(settings.view)):  # with the same final states, except those that are fitted
            if hear(family, settings.view, f"{processed}, and "):
                return

    def exact(self) -> bool:
        """Whether a hypothesis explains all but rounding of float32."""
        return any(t.evidence >= 2 * SURE and self.nothing_left(t) for t in self.trials)

    def clear(self) -> bool:
        """Whether a hypothesis explains all but rounding so clearly that no other needs to be heard."""
        return any(self.explains(t) and t.left <= t.before / CLEAR for t in self.trials)

    def likeness(self, x: Array, y: Array) -> float:
        """Return the rank correlation of two arrays of differences from token to token, or 0 if there are too few.

        Ranks, because a few tokens with other experts would decide the correlation of the numbers themselves.
        """
        with np.errstate(all="ignore"):
            a, b = (np.nansum(self.compared(z), -1) / np.sum(~np.isnan(self.compared(z)), -1) for z in (x, y))
        seen = np.isfinite(a) & np.isfinite(b)
        ranks = [np.argsort(np.argsort(z[seen])) for z in (a, b)]
        return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if seen.sum() > 2 else 0.0

    def pattern(self, numerics: str) -> float:
        """Return how alike the engine's differences and those of these numerics are."""
        return self.likeness(self.theirs - self.base, self.runs[numerics] - self.base)

    def hidden(self, numerics: str) -> float:
        """Return the mean difference that is left without our own rounding: a smaller change would not show."""
        return size(away(self.theirs, self.runs[numerics]))

    def holds(self, t: Trial) -> bool:
        """Whether a cause also helps where the reference rounds as the engine seems to, and is more than luck.

        With experts, noise that makes the same choice of them in a few rollouts looks like evidence. So there the cause
        halves the difference, or helps in most rollouts, or what is left has the pattern of rounding.
        """
        if self.nothing_left(t):
            return True
        variant, numerics = t.hypothesis.variant, self.rests(t.left, t.tokens) or self.allowed[-1]
        clear = not self.right.config.num_experts or t.left <= t.before / 2 or t.steady >= STEADY
        if variant is None or numerics == "float32":
            return clear
        x = replace(variant, numerics=numerics_of(numerics)).predicted(t.hypothesis.rollouts, t.view)
        left, before = (size(away(self.theirs, y)) for y in (x, self.runs[numerics]))
        if t.tokens * math.log(before / max(left, 1e-12)) < APART:
            return False
        return clear or self.likeness(self.theirs - t.values, x - t.values) * math.sqrt(t.tokens) > LIKE


def steadiness(rollouts: Sequence[Rollout], before: Array, left: Array) -> float:
    """Return how many standard errors the mean evidence of the rollouts is above 0; 0 for fewer than three.

    Their tokens are not independent: once another expert was chosen, all later tokens differ.
    """
    ends = np.cumsum([len(r.ids) for r in rollouts])[:-1]
    pairs = [(size(b), size(d)) for b, d in zip(np.split(before, ends), np.split(left, ends), strict=True)]
    found = [math.log(max(b, 1e-12) / max(d, 1e-12)) for b, d in pairs if np.isfinite(b)]
    if len(found) < 3:
        return 0.0
    return float(np.mean(found) / max(np.std(found, ddof=1) / math.sqrt(len(found)), 1e-12))
