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
from qwen3np.audit.measure import Variant, View, away, plain_view, recorded_experts, reported, rounded, size
from qwen3np.audit.processed import NEUTRAL, fitted
from qwen3np.audit.rollouts import Rollout
from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.bench import TINY
from qwen3np.porting.compare import per_cent
from qwen3np.porting.floors import numerics_of
from qwen3np.tokenizer import Tokenizer

# How many floors a right program may be away: other sums (the floor has the worst order), other places to round.
MARGIN = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
SURE = 12.0  # nats of evidence against the plain reference, after about a hundred hypotheses
APART = 6.0  # nats of evidence between two causes
LIKE = 4.0  # standard deviations of the correlation with our own rounding
LEADERS = 4  # causes with which the size of rounding is measured again
AMPLIFIED = 1.5  # how many times that rounding may be left
FINEST = 0.4  # of the floor of int8 weights: what no format of at most 8 bits is below
NEAR = 0.2  # a cause that explains less is not worth a line
SHOWN = 3
FEWEST = 5  # tokens below which nothing is sure
UNKNOWN = "another checkpoint, or a change that is not in the catalogue"


@dataclass(frozen=True)
class Cause:
    """A hypothesis that explains part of the difference."""

    name: str
    kind: str
    explained: float | None  # of the squared difference
    sure: bool  # what is left is rounding, and no other cause does as well
    look: str
    left: float  # mean absolute difference that remains, nats
    alike: tuple[str, ...] = ()  # causes that these tokens cannot tell from it


@dataclass(frozen=True, eq=False)
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
    floors: dict[str, float]  # mean absolute difference that rounding makes of the chosen tokens
    sure: bool
    tried: int  # hypotheses
    sample: int  # tokens on which they were tried
    notes: list[str] = field(default_factory=list[str])
    routing: float | None = None  # share of the squared difference that comes from other experts being chosen
    routing_of_rounding: float | None = None  # the same of bfloat16's rounding, where the engine's choice is not known


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

    def amplify(self) -> None:
        """Find causes that make rounding larger than it is in the reference: a cache in 8 bits turns it into steps."""
        best = sorted((t for t in self.trials if t.explained > NEAR), key=lambda t: t.left / t.before)[:LEADERS]
        for t in best:
            variant, name = t.hypothesis.variant, self.allowed[-1]
            if variant is not None and not self.explains(t):
                rounded = replace(variant, numerics=numerics_of(name)).predicted(t.hypothesis.rollouts)
                if t.left <= AMPLIFIED * size(rounded - t.values):
                    self.amplified.append(t)

    def families(
        self, tokenizer: Tokenizer | None, others: Mapping[str, Any], view: View
    ) -> Iterator[Iterable[Hypothesis]]:
        """Yield the hypotheses, kind by kind, the cheapest first."""
        right, rollouts, distance = self.right, self.rollouts, size(away(self.theirs, self.base))
        if view is plain_view:
            yield h.shifts(right, rollouts, self.states)
            yield h.units(self.base)
        yield h.checkpoints(right, rollouts, others)
        yield h.prompts(right, rollouts, right.config, tokenizer)
        yield h.bugs(right, rollouts)
        if distance > FINEST * self.floors["int8 weights"]:
            yield h.quantised(right, rollouts)
        yield h.settings(right, rollouts, self.rests(distance, len(self.base)) is None)
        yield h.fits(right, rollouts, self.theirs, self.base, view)

    def search(self, tokenizer: Tokenizer | None, others: Mapping[str, Any], progress: Callable[[int], object]) -> None:
        """Hear all hypotheses, until one explains everything down to float32; first under the settings that fit."""
        settings = fitted([self.right.logits(x) for x in self.states], self.rollouts)
        view = plain_view
        if settings != NEUTRAL:
            view, look = settings.view, "ask the engine for raw log-probabilities (vLLM: logprobs_mode=raw_logprobs)"
            name = f"processed by {settings}"
            self.heard(
                Hypothesis(
                    name,
                    h.PROCESSED,
                    look,
                    lambda view: self.right.predicted(self.rollouts, settings.view, self.states),
                )
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

    def likeness(self, numerics: str) -> float:
        """Return the correlation of the difference with what these numerics make of the same tokens."""
        differences = (self.compared(x - self.base) for x in (self.theirs, self.runs[numerics]))
        a, b = (x[~np.isnan(x).all(-1)] for x in differences)
        a, b = np.nanmean(a, -1), np.nanmean(b, -1)
        seen = np.isfinite(a) & np.isfinite(b)
        return float(np.corrcoef(a[seen], b[seen])[0, 1]) if seen.sum() > 2 else 0.0

    def holds_in(self, t: Trial, numerics: str) -> bool:
        """Whether a cause also helps where the reference rounds to 16 bits as the engine seems to."""
        variant = t.hypothesis.variant
        if variant is None or numerics == "float32":
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
    computed_in: str | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Judgement:
    """Return why an engine's log-probabilities differ from the reference's, on a sample of rollouts.

    computed_in is what the engine is known to compute in, one of MARGIN; otherwise any of them counts as rounding.
    """
    court = Court.of(rollouts, weights, config, computed_in)
    d = away(court.theirs, court.base)
    tokens, distance = int((~np.isnan(d)).any(-1).sum()), size(d)
    rest, notes, chosen = court.rests(distance, tokens), list[str](), court.of_chosen()
    if rest is None and (own := chosen.rests(size(d[:, :1]), int((~np.isnan(d[:, 0])).sum()))):
        court, rest, distance = chosen, own, size(d[:, :1])
        notes.append("the chosen tokens agree, the other ids do not: they are read wrongly, or belong elsewhere")
    patterned = rest is not None and court.likeness(rest) * math.sqrt(tokens) > LIKE
    if rest != "float32" and not (patterned and h.is_large(config)):  # few tokens show nothing below rounding
        court.search(tokenizer, others, progress)
        court.amplify()
    found = [t for t in sorted(court.trials, key=lambda t: t.left / t.before) if court.explains(t)]
    found = [
        t
        for t in found
        if court.nothing_left(t) or court.holds_in(t, court.rests(t.left, t.tokens) or court.allowed[-1])
    ]
    of_them = chosen.floors if np.isfinite(size(d[:, :1])) else court.floors
    result = Judgement("rounding", "", [], of_them, True, len(court.trials), tokens, notes, court.routing)
    if rest != "float32":
        result = replace(result, routing_of_rounding=court.routing_of_rounding())
    if found:
        contenders = _contenders(found, court.theirs)
        verdicts = {"rounding" if t.hypothesis.kind == h.ROUNDING else "different" for t in contenders}
        cause = _cause(found[0], [t.hypothesis.name for t in contenders])
        meaning = f"{_named(cause)} explains {per_cent(found[0].explained)} of the squared difference"
        meaning += f"; what is left is {court.remainder(found[0])}"
        return replace(result, verdict=max(verdicts), meaning=meaning, causes=[cause], sure=len(verdicts) == 1)
    if rest is not None:
        likeness, alike = court.likeness(rest), rest == "float32" or patterned
        meaning = f"{distance:.2g} nats is what rounding of {rest} makes of these tokens ({court.floors[rest]:.2g})"
        if rest != "float32":
            meaning += f", and {'with' if alike else 'without'} its pattern (correlation {likeness:.2f})"
        return replace(result, meaning=meaning, sure=alike)
    largest = computed_in or "bfloat16"
    meaning = f"{distance / court.floors[largest]:.3g} times what rounding of {largest} makes of these tokens"
    nearest: dict[str, Trial] = {}
    for t in sorted(court.trials, key=lambda t: -t.explained):
        if t.explained > NEAR:
            nearest.setdefault(t.hypothesis.name, t)
    causes = [replace(_cause(t), sure=False) for t in list(nearest.values())[:SHOWN]]
    meaning += f"; none of {len(court.trials)} known causes explains it: {UNKNOWN}"
    unknown = Cause(
        UNKNOWN, h.CHECKPOINT, None, False, "--other FOLDER tries a checkpoint; porting/README.md finds a bug", distance
    )
    return replace(result, verdict="different", meaning=meaning, causes=[unknown, *causes], sure=tokens >= FEWEST)


def _contenders(found: Sequence[Trial], theirs: Array) -> list[Trial]:
    """Return the trials that these tokens cannot tell from the first, which is one of them."""
    best = found[0]

    def apart(t: Trial) -> float:
        both = np.isnan(t.values) | np.isnan(best.values)
        left, least = (size(np.where(both, np.nan, away(theirs, x.values))) for x in (t, best))
        return min(t.tokens, best.tokens) * math.log(max(left, 1e-9) / max(least, 1e-9))

    return [t for t in found if apart(t) < APART]


def _cause(t: Trial, names: Sequence[str] = ()) -> Cause:
    x = t.hypothesis
    alike = tuple(dict.fromkeys(name for name in names if name != x.name))
    return Cause(x.name, x.kind, t.explained, not alike, x.look, t.left, alike)


def _named(cause: Cause) -> str:
    return " or ".join((cause.name, *cause.alike))
