"""Which hypothesis explains a difference, how much of it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from qwen3np.audit import hypotheses as h
from qwen3np.audit.court import APART, HIDDEN, LIKE, NEAR, Court, Trial, limit
from qwen3np.audit.measure import away, is_large, size
from qwen3np.audit.rollouts import Rollout
from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.compare import per_cent
from qwen3np.tokenizer import Tokenizer

SHOWN = 3
MISREAD = 4  # times the largest rounding that other ids are off, if they are read wrongly
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
    misread = distance > MISREAD * limit("bfloat16", court.floors, tokens)
    if misread and (own := chosen.rests(size(d[:, :1]), int((~np.isnan(d[:, 0])).sum()))):
        court, rest, distance = chosen, own, size(d[:, :1])
        notes.append("the chosen tokens agree, the other ids do not: they are read wrongly, or belong elsewhere")
    likeness = court.pattern(rest) if rest else 0.0
    patterned = likeness * math.sqrt(tokens) > LIKE
    if rest != "float32" and not (patterned and is_large(config)):  # few tokens show nothing below rounding
        court = court.first() if is_large(config) else court
        court.search(tokenizer, others, rest is None or not (patterned or is_large(config)), progress)
        court.amplify()
    by_size = sorted(court.trials, key=lambda t: t.left / t.before)
    found = [t for t in by_size if court.explains(t) and court.holds(t)]
    of_them = chosen.floors if np.isfinite(size(d[:, :1])) else court.floors
    result = Judgement("rounding", "", [], of_them, True, len(court.trials), tokens, notes, court.routing)
    if rest != "float32":
        result = replace(result, routing_of_rounding=court.routing_of_rounding())
    if found:
        contenders = _contenders(found, court)
        verdicts = {"rounding" if t.hypothesis.kind == h.ROUNDING else "different" for t in contenders}
        cause = _cause(found[0], [t.hypothesis.name for t in contenders])
        meaning = f"{_named(cause)} explains {per_cent(found[0].explained)} of the squared difference"
        meaning += f"; what is left is {court.remainder(found[0])}"
        return replace(result, verdict=max(verdicts), meaning=meaning, causes=[cause], sure=len(verdicts) == 1)
    if rest is not None:
        meaning = f"{distance:.2g} nats is what rounding of {rest} makes of these tokens ({court.floors[rest]:.2g})"
        if rest == "float32":
            return replace(result, meaning=meaning)
        hidden = min(court.hidden(rest), distance)
        sure = patterned and hidden <= HIDDEN * distance
        meaning += f", {'and with' if sure else 'partly with' if patterned else 'but without'} its pattern"
        meaning += f" (correlation {likeness:.2f})"
        if not sure:
            meaning += f": a change below {hidden:.2g} nats would not show"
        return replace(result, meaning=meaning, sure=sure)
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


def _contenders(found: Sequence[Trial], court: Court) -> list[Trial]:
    """Return the trials that these tokens cannot tell from the first, which is one of them.

    Some bugs are equal in exact arithmetic, such as rotating backwards and exchanging cos and sin: a difference no
    larger than rounding must not decide between them.
    """
    best, rounding = found[0], court.floors["float32"]

    def apart(t: Trial) -> float:
        both = np.isnan(t.values) | np.isnan(best.values)
        sizes = (size(np.where(both, np.nan, away(court.theirs, x.values))) for x in (t, best))
        left, least = (max(x, rounding, 1e-9) for x in sizes)
        return min(t.tokens, best.tokens) * math.log(left / least)

    return [t for t in found if apart(t) < APART]


def _cause(t: Trial, names: Sequence[str] = ()) -> Cause:
    x = t.hypothesis
    alike = tuple(dict.fromkeys(name for name in names if name != x.name))
    return Cause(x.name, x.kind, t.explained, not alike, x.look, t.left, alike)


def _named(cause: Cause) -> str:
    return " or ".join((cause.name, *cause.alike))
