"""Which hypothesis explains a difference, how much of it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from qwen3np.audit import hypotheses as h
from qwen3np.audit.hypotheses import Hypothesis
from qwen3np.audit.measure import Variant, View, away, plain_view, reported, rounded, size
from qwen3np.audit.processed import NEUTRAL, fitted
from qwen3np.audit.rollouts import Rollout
from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.floors import numerics_of
from qwen3np.tokenizer import Tokenizer

# How many floors a right program may be away: other sums (the floor has the worst order), other places to round.
MARGIN = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
SURE = 12.0  # nats of evidence against the plain reference, after about a hundred hypotheses
APART = 6.0  # nats of evidence between two causes
SHOWN = 5


@dataclass(frozen=True)
class Cause:
    """A hypothesis that explains part of the difference."""

    name: str
    kind: str
    explained: float  # of the squared difference
    sure: bool  # what is left is rounding, and no other cause does as well
    look: str
    left: float  # mean absolute difference that remains, nats
    alike: tuple[str, ...] = ()  # causes that these tokens cannot tell from it


@dataclass(frozen=True)
class Trial:
    """What remains of the difference under a hypothesis, on the same numbers as before."""

    hypothesis: Hypothesis
    left: float
    before: float
    tokens: int
    values: Array

    @property
    def evidence(self) -> float:
        """Nats by which it is likelier than the plain reference (differences with a Laplace distribution)."""
        return self.tokens * math.log(max(self.before, 1e-12) / max(self.left, 1e-12))

    @property
    def explained(self) -> float:
        """The share of the squared difference."""
        return 1 - (self.left / max(self.before, 1e-30)) ** 2


@dataclass(frozen=True)
class Judgement:
    """The verdict, with what it rests on."""

    verdict: str  # "rounding" or "different"
    meaning: str
    causes: list[Cause]
    floors: dict[str, float]  # mean absolute difference that rounding makes on these tokens
    sure: bool
    tried: int  # hypotheses
    sample: int  # tokens on which they were tried
    notes: list[str] = field(default_factory=list[str])


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
    floors: dict[str, float]
    runs: dict[str, Array]  # what each of the usual numerics makes of the sample
    trials: list[Trial] = field(default_factory=list[Trial])

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], weights: Mapping[str, Array], config: Config) -> Court:
        """Run the reference and its roundings."""
        right = Variant(weights, config)
        states = list(right.states(rollouts))
        base = right.predicted(rollouts, states=states)
        runs = {name: v.predicted(rollouts) for name, v in rounded(right).items()}
        floors = {name: size(x - base) for name, x in runs.items()}
        return cls(rollouts, right, reported(rollouts), states, base, floors, runs)

    def rests(self, left: float, tokens: int) -> str | None:
        """Return the numerics whose rounding covers what is left; None if none does."""
        return next((name for name in MARGIN if left <= limit(name, self.floors, tokens)), None)

    def heard(self, hypothesis: Hypothesis, view: View = plain_view) -> Trial | None:
        """Compare what a hypothesis predicts with what the engine reported."""
        try:
            with np.errstate(all="ignore"):
                mine = hypothesis.predict(view)
        except h.Untried:
            return None
        mine = np.pad(mine, ((0, 0), (0, self.theirs.shape[1] - mine.shape[1])), constant_values=np.nan)
        d, before = away(self.theirs, mine), away(self.theirs, self.base)
        before = np.where(np.isnan(mine), np.nan, before)
        d = np.where(np.isnan(before), np.nan, d)
        tokens = int((~np.isnan(before)).any(-1).sum())
        if not tokens or np.array_equal(mine[~np.isnan(d)], self.base[~np.isnan(d)]):
            return None
        trial = Trial(hypothesis, size(d), size(before), tokens, mine)
        self.trials.append(trial)
        return trial

    def explains(self, t: Trial) -> bool:
        """Whether what is left is rounding, and there is evidence for the cause."""
        small = t.left < 1e-3 * t.before  # a model with a bug may amplify rounding
        return t.evidence >= SURE and (small or self.rests(t.left, t.tokens) is not None)

    def families(self, tokenizer: Tokenizer | None, others: Mapping[str, Any], view: View) -> Iterator[Iterable[Hypothesis]]:
        """Yield the hypotheses, kind by kind, the cheapest first."""
        right, rollouts = self.right, self.rollouts
        if view is plain_view:
            yield h.shifts(right, rollouts, self.states)
            yield h.units(self.base)
        yield h.checkpoints(right, rollouts, others)
        yield h.prompts(right, rollouts, right.config, tokenizer)
        yield h.bugs(right, rollouts)
        yield h.quantised(right, rollouts)
        yield h.settings(right, rollouts)
        yield h.fits(right, rollouts, self.theirs, view)

    def search(self, tokenizer: Tokenizer | None, others: Mapping[str, Any], progress: Callable[[int], object]) -> None:
        """Hear all hypotheses, until one explains everything down to float32; first under the settings that fit."""
        settings = fitted([self.right.logits(x) for x in self.states], self.rollouts)
        view = plain_view
        if settings != NEUTRAL:
            view, look = settings.view, "ask the engine for raw log-probabilities (vLLM: logprobs_mode=raw_logprobs)"
            name = f"processed by {settings}"
            self.heard(
                Hypothesis(name, h.PROCESSED, look, lambda view: self.right.predicted(self.rollouts, settings.view, self.states))
            )
            if self.exact():
                return
        for family in self.families(tokenizer, others, plain_view):
            for hypothesis in family:
                self.heard(hypothesis)
                progress(1)
            if self.exact():
                return
        if view is plain_view or any(self.explains(t) for t in self.trials):
            return
        for family in self.families(tokenizer, others, view):
            for hypothesis in family:
                self.heard(replace(hypothesis, name=f"processed by {settings}, and {hypothesis.name}"), view)
                progress(1)
            if self.exact():
                return

    def exact(self) -> bool:
        """Whether a hypothesis explains all but rounding of float32."""
        return any(t.evidence >= 2 * SURE and self.nothing_left(t) for t in self.trials)

    def nothing_left(self, t: Trial) -> bool:
        """Whether what is left is rounding of float32; a model with a bug may amplify it."""
        return t.left <= max(limit("float32", self.floors, t.tokens), 1e-4 * t.before)

    def holds_in(self, t: Trial, numerics: str) -> bool:
        """Whether a cause also helps where the reference rounds to 16 bits as the engine seems to."""
        variant = t.hypothesis.variant
        if variant is None:
            return True
        x = replace(variant, numerics=numerics_of(numerics)).predicted(t.hypothesis.rollouts)
        left, before = (size(away(self.theirs, y)) for y in (x, self.runs[numerics]))
        return t.tokens * math.log(before / max(left, 1e-12)) >= APART


def judged(
    rollouts: Sequence[Rollout],
    weights: Mapping[str, Array],
    config: Config,
    tokenizer: Tokenizer | None = None,
    others: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[int], object] = lambda n: None,
) -> Judgement:
    """Return why an engine's log-probabilities differ from the reference's, on a sample of rollouts."""
    court = Court.of(rollouts, weights, config)
    d = away(court.theirs, court.base)
    tokens, distance = int((~np.isnan(d)).any(-1).sum()), size(d)
    rest = court.rests(distance, tokens)
    if rest != "float32":
        court.search(tokenizer, others, progress)
    found = [t for t in sorted(court.trials, key=lambda t: -t.evidence / t.tokens) if court.explains(t)]
    found = [t for t in found if court.nothing_left(t) or court.holds_in(t, court.rests(t.left, t.tokens) or "bfloat16")]
    result = Judgement("rounding", "", [], court.floors, True, len(court.trials), tokens)
    if found:
        best, alike = found[0], list[str]()
        for t in found[1:]:
            n = min(t.tokens, best.tokens)
            if t.hypothesis.name != best.hypothesis.name and n * math.log(max(t.left, 1e-9) / max(best.left, 1e-9)) < APART:
                alike.append(t.hypothesis.name)
        cause = _cause(best, not alike, tuple(dict.fromkeys(alike)))
        verdict = "rounding" if best.hypothesis.kind == h.ROUNDING else "different"
        return replace(result, verdict=verdict, causes=[cause], sure=cause.sure)
    if rest is not None:
        return replace(result, meaning=rest, sure=rest == "float32")
    nearest = {t.hypothesis.name: t for t in sorted(court.trials, key=lambda t: -t.explained)[::-1] if t.explained > 0.1}
    causes = [_cause(t, False) for t in sorted(nearest.values(), key=lambda t: -t.explained)[:SHOWN]]
    return replace(result, verdict="different", causes=causes, sure=True)


def _cause(t: Trial, sure: bool, alike: tuple[str, ...] = ()) -> Cause:
    x = t.hypothesis
    return Cause(x.name, x.kind, t.explained, sure, x.look, t.left, alike)
