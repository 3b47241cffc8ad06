"""The whole audit: rollouts and a model in, a verdict with its numbers out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qwen3np.audit.causes import Judgement, judged
from qwen3np.audit.measure import Forced, away, forced, sampled, size
from qwen3np.audit.rollouts import Rollout
from qwen3np.model import Model
from qwen3np.numerics import Array

TIGHT, WIDE = (0.999, 1.002), (0.8, 1.2)  # bounds of importance ratios: what trainers hope for, and where they clip
QUANTILES = (0.5, 0.9, 0.99)
WORST, CONTEXT = 5, 12  # tokens that differ most, and how many ids before each are shown
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, np.inf)  # nats


@dataclass(frozen=True)
class Group:
    """The tokens between two positions, or two entropies."""

    start: float
    end: float
    tokens: int
    mean_abs: float
    bias: float


@dataclass(frozen=True)
class Worst:
    """A token whose log-probability differs most."""

    where: str
    position: int
    id: int
    theirs: float
    ours: float
    entropy: float
    context: list[int]  # the ids before it


@dataclass(frozen=True)
class Audit:
    """A verdict, its causes, and the numbers behind them. Differences are theirs - ours, in nats, of chosen tokens."""

    judgement: Judgement
    rollouts: int
    tokens: int
    mean_abs: float
    max_abs: float
    bias: float
    quantiles: dict[str, float]
    others_mean_abs: float | None  # of the likeliest tokens reported next to the chosen ones
    outside: dict[str, float]  # share of importance ratios outside of TIGHT and WIDE
    kl: dict[str, float]
    positions: list[Group]
    entropies: list[Group]
    worst: list[Worst]
    differences: list[float]  # of all tokens with a log-probability
    fields: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """Whether it is "rounding" or "different"."""
        return self.judgement.verdict

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single differences, as JSON can hold it."""
        found = asdict(self)
        del found["differences"]
        judgement = found.pop("judgement")
        return _plain(judgement | found)


def _plain(x: Any) -> Any:
    """Return a value without NaN and infinity, which JSON lacks."""
    if isinstance(x, dict):
        return {str(key): _plain(y) for key, y in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(y) for y in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x


def audited(
    rollouts: Sequence[Rollout],
    model: Model,
    *,
    others: Mapping[str, Any] | None = None,
    computed_in: str | None = None,
    engine: str = "fast",
    fields: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Audit:
    """Return the audit of rollouts; the arguments are those of qwen3np.audit."""
    longest = max(len(r.prompt) + len(r.ids) for r in rollouts)
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"a rollout has {longest:,} positions; the model's context has {model.config.max_position_embeddings:,}"
        )
    if not any(np.isfinite(r.logprobs).any() for r in rollouts):
        raise ValueError("no rollout has a finite log-probability")
    for name, (weights, config) in {"the model": (model.weights, model.config), **(others or {})}.items():
        if not config.tie_word_embeddings and "lm_head.weight" not in weights:
            raise ValueError(f"{name} has no lm_head.weight, so it has no log-probabilities")
        if config.vocab_size < (most := 1 + max(max(*r.prompt, *r.ids, int(r.found.max())) for r in rollouts)):
            raise ValueError(f"{name} has {config.vocab_size:,} ids, and the rollouts have id {most - 1:,}")
    with warnings.catch_warnings():  # a wrong model may overflow, in threads that np.errstate does not reach
        warnings.simplefilter("ignore", RuntimeWarning)
        judgement = judged(
            sampled(rollouts, model.config), model.weights, model.config, model.tokenizer, others or {}, computed_in
        )
    replayed = (judgement.routing or 0) > 0
    seen = forced(model.weights, model.config, rollouts, engine=engine, replayed=replayed, progress=progress)
    return _measured(rollouts, seen, judgement, fields or {})


def _measured(rollouts: Sequence[Rollout], seen: Forced, judgement: Judgement, fields: Mapping[str, str]) -> Audit:
    d = seen.theirs[:, 0] - seen.mine[:, 0]
    here = np.flatnonzero(np.isfinite(d))
    if not len(here):  # only the likeliest tokens are known, not the chosen one
        d = np.nanmean(np.where(np.isfinite(seen.theirs), seen.theirs - seen.mine, np.nan), -1)
        here = np.flatnonzero(np.isfinite(d))
    e, at, entropy = d[here], seen.at[here], seen.entropy[here]
    rest = away(seen.theirs, seen.mine)[:, 1:]
    quantiles = {f"{q:.0%}": float(np.quantile(np.abs(e), q)) for q in QUANTILES}
    edges = sorted({int(q) for q in np.quantile(at[:, 1], np.linspace(0, 1, 6))})
    edges = [*edges[:-1], int(at[:, 1].max()) + 1]
    return Audit(
        judgement=judgement,
        rollouts=len(rollouts),
        tokens=len(e),
        mean_abs=float(np.abs(e).mean()),
        max_abs=float(np.abs(e).max()),
        bias=float(e.mean()),
        quantiles=quantiles,
        others_mean_abs=None if np.isnan(rest).all() else size(rest),
        outside={f"[{a}, {b}]": _outside(e, a, b) for a, b in (TIGHT, WIDE)},
        kl=divergences(e),
        positions=_groups(at[:, 1], e, edges),
        entropies=_groups(entropy, e, ENTROPIES),
        worst=[_worst(rollouts, seen, int(here[i]), d) for i in np.argsort(-np.abs(e), kind="stable")[:WORST]],
        differences=e.tolist(),
        fields=dict(fields),
    )


def _outside(d: Array, low: float, high: float) -> float:
    """Return the share of the importance ratios exp(ours - theirs) outside of these bounds."""
    ratio = np.exp(-d)
    return float(((ratio < low) | (ratio > high)).mean())


def divergences(d: Array) -> dict[str, float]:
    """Return estimates of KL from tokens that the engine drew, d = theirs - ours (Schulman, 2020).

    With r = exp(-d), KL(theirs || ours) is the mean of k1 = d or of k3 = r - 1 + d, which is never negative; weighted
    by r the same tokens estimate KL(ours || theirs): k1 = -r d, k3 = 1 - r - r d.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        r = np.exp(np.clip(-d, None, 50))
    terms = {
        "theirs||ours k1": d,
        "theirs||ours k3": np.expm1(np.clip(-d, None, 50)) + d,
        "ours||theirs k1": -r * d,
        "ours||theirs k3": 1 - r - r * d,
    }
    return {name: float(x.mean()) for name, x in terms.items()}


def _groups(by: Array, d: Array, edges: Sequence[float]) -> list[Group]:
    found = list[Group]()
    for a, b in pairwise(edges):
        x = d[(by >= a) & (by < b)]
        if len(x):
            found.append(Group(a, b, len(x), float(np.abs(x).mean()), float(x.mean())))
    return found


def _worst(rollouts: Sequence[Rollout], seen: Forced, n: int, d: Array) -> Worst:
    row, position = seen.at[n].tolist()
    r = rollouts[row]
    ids = [*r.prompt, *r.ids]
    mine = float(seen.mine[n, 0])
    return Worst(
        r.where, position, ids[position], mine + float(d[n]), mine, float(seen.entropy[n]), ids[:position][-CONTEXT:]
    )
