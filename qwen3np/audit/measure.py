"""Teacher forcing: the reference's log-probabilities of the ids in rollouts, plain or under a changed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np

from qwen3np import routing
from qwen3np.audit.formats import places, scaled_e4m3
from qwen3np.audit.rollouts import Rollout
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.generate import PREFILL_CHUNK
from qwen3np.guard import forward, require_finite
from qwen3np.memory import require_memory
from qwen3np.numerics import FLOAT32, Array, Numerics, named
from qwen3np.ops.fast.threads import ELEMENT, IN_CACHE, rowwise, share
from qwen3np.porting.changes import Bug
from qwen3np.porting.floors import Draws, noisy, numerics_of
from qwen3np.porting.logprobs import log_softmax
from qwen3np.porting.points import CHOICE, POINTS, Place, Point, Rerun, split_layer
from qwen3np.porting.settings import blocks
from qwen3np.weights import count_parameters

ROWS = 256  # positions whose logits (V each) are in memory at once
WORK = 1e11  # parameters times positions of the sample on which changed models run
LARGE = 1e8  # parameters: of larger models fewer changes are tried, on fewer tokens
FEWEST, MOST = 192, 1024  # positions of that sample
SCORES = 1 << 24  # numbers of attention scores that are in memory at once
SHORTEST = 32  # tokens of an answer in it, if it has as many
CAP = 50.0  # nats: a larger difference counts as this
EDGE = 1.0  # nats: an id that the reference drops and the engine does not, as rounding makes it at the edge of a filter

View = Callable[[Array, Rollout, slice], Array]  # logits (n, V) of these positions of an answer -> log-probabilities


def plain_view(logits: Array, rollout: Rollout, rows: slice) -> Array:
    """Return the log-probabilities of logits."""
    return log_softmax(logits)


@dataclass(frozen=True)
class Forced:
    """What the reference says about rollouts: arrays over all positions of all answers, one after the other."""

    mine: Array  # (N, 1 + K): the reference's log-probabilities of the ids
    theirs: Array  # (N, 1 + K): the engine's; NaN where there is none
    entropy: Array  # (N,)
    at: Array  # (N, 2): rollout, and position in the sequence


def stacked(arrays: Sequence[Array], fill: float = np.nan) -> Array:
    """Return arrays (n, k) one below the other, narrower ones filled up on the right."""
    width = max(a.shape[1] for a in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays])


def reported(rollouts: Sequence[Rollout]) -> Array:
    """Return the engine's log-probabilities (N, 1 + K) of all positions."""
    return stacked([r.logprobs for r in rollouts])


def forced(
    weights: Mapping[str, Array],
    config: Config,
    rollouts: Sequence[Rollout],
    *,
    engine: str = "fast",
    replayed: bool = False,
    progress: Callable[[int], object] = lambda n: None,
) -> Forced:
    """Run every rollout through the reference in float32, with the experts that the engine chose if replayed.

    progress is called with the number of positions done.
    """
    num, mine, entropy = named("float32", engine), list[Array](), list[Array]()
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    for rollout in rollouts:
        ids = np.array([*rollout.prompt, *rollout.ids])
        cache = KVCache.allocate(config, 1, len(ids), num.storage)
        experts = experts_of(rollout, config) if replayed else None
        states = list[Array]()
        for i in range(0, len(ids), PREFILL_CHUNK):
            part = slice(i, i + PREFILL_CHUNK)
            given = None if experts is None else experts[part]
            x = forward(weights, config, ids[part], cache, engine=engine, head=False, routed_experts=given)
            states.append(x[0])
        states = np.concatenate(states)[len(rollout.prompt) - 1 : -1]
        for i in range(0, len(states), ROWS):
            logits = num.ops.head(states[None, i : i + ROWS], head, num)[0]
            require_finite(logits, weights, config, ids, num.name)
            for kept, some in zip((mine, entropy), _looked_up(logits, rollout.found[i : i + ROWS]), strict=True):
                kept.append(some)
        progress(len(ids))
    at = [(n, len(r.prompt) + i) for n, r in enumerate(rollouts) for i in range(len(r.ids))]
    return Forced(stacked(mine), reported(rollouts), np.concatenate(entropy), np.array(at))


def _looked_up(logits: Array, found: Array) -> tuple[Array, Array]:
    """Return the log-probabilities (n, 1 + K) of the ids found, and the entropies (n,)."""
    mine, entropy = np.empty(found.shape), np.empty(len(found))

    def look(rows: slice) -> None:
        logp = log_softmax(logits[rows])
        mine[rows] = np.take_along_axis(logp, np.maximum(found[rows], 0), -1)
        entropy[rows] = -(np.exp(logp) * logp).sum(-1)

    by_rows(logits, look)
    return mine, entropy


def by_rows(x: Array, look: Callable[[slice], None]) -> None:
    """Call look for all rows of x (n, V): on all threads, with as many rows at a time as fit the cache."""
    near = max(IN_CACHE // x.shape[-1], 1)
    share([slice(n, min(n + near, len(x))) for n in range(0, len(x), near)], ELEMENT * x.size, look)


def experts_of(rollout: Rollout, config: Config) -> Array | None:
    """Return the experts that the engine chose (positions, L, k), -1 where it does not say. ValueError for misfits."""
    if rollout.experts is None:
        return None
    layers, k = config.num_hidden_layers, config.num_experts_per_tok
    if not k:
        raise ValueError(f"{rollout.where}: routed_experts, but the model has no experts")
    sparse = [n for n in range(layers) if config.is_sparse(n)]
    given, count, new = rollout.experts, len(rollout.prompt) + len(rollout.ids), len(rollout.ids)
    if given.ndim == 1:
        given = given.reshape(-1, layers, k) if given.size % (layers * k) == 0 else given[None, None]
    places = {count: 0, count - 1: 0, new: count - new, new - 1: count - new}
    if len(given) not in places or given.shape[1] not in (layers, len(sparse)) or given.shape[2] != k:
        raise ValueError(f"{rollout.where}: routed_experts of shape {given.shape}; expected {(count, layers, k)}")
    found, start = np.full((count, layers, k), -1), places[len(given)]
    found[start : start + len(given), sparse] = given if given.shape[1] == len(sparse) else given[:, sparse]
    try:
        routing.replayed(found, config, np.zeros((1, count)), None)
    except ValueError as error:
        raise ValueError(f"{rollout.where}: {error}") from None
    return found


def recorded_experts(weights: Mapping[str, Array], config: Config, rollout: Rollout) -> Array:
    """Return the experts that the reference chooses (positions, L, k), -1 in dense layers."""
    ids = [*rollout.prompt, *rollout.ids]
    found = np.full((len(ids), config.num_hidden_layers, config.num_experts_per_tok), -1)

    def keep(name: str, x: Array) -> None:
        if name.endswith(CHOICE):
            found[:, split_layer(name)[0]] = x[0]

    forward(weights, config, ids, head=False, trace=keep)
    return found


def shortened(r: Rollout, count: int, config: Config) -> Rollout:
    """Return a rollout with the first `count` tokens of its answer."""
    experts = experts_of(r, config)
    if experts is not None:
        experts = experts[: len(r.prompt) + count]
    return replace(r, ids=r.ids[:count], found=r.found[:count], logprobs=r.logprobs[:count], experts=experts)


def sampled(rollouts: Sequence[Rollout], config: Config) -> list[Rollout]:
    """Return some of the rollouts, evenly spaced and perhaps cut short, on which many changed models can be run.

    For a large model it is only the start of the answers to the shortest prompts.
    """
    rollouts = [r for r in rollouts if np.isfinite(r.logprobs).any()]
    room = int(np.clip(WORK / count_parameters(config)["active"], FEWEST, MOST))
    part = min(1, room / sum(len(r.prompt) + len(r.ids) for r in rollouts))
    count = 0 if is_large(config) else int(len(rollouts) * part)
    places = np.linspace(0, len(rollouts) - 1, count).round().astype(int).tolist()
    found = list[Rollout]()
    for r in [rollouts[n] for n in places] or sorted(rollouts, key=lambda r: len(r.prompt)):
        known = np.flatnonzero(np.isfinite(r.logprobs).any(-1))
        keep = min(len(r.ids), max(room - len(r.prompt) if places else 0, int(known[:SHORTEST][-1]) + 1))
        found.append(shortened(r, keep, config))
        room -= len(r.prompt) + keep
        if room < SHORTEST:
            break
    return found


@dataclass(frozen=True)
class Variant:
    """The reference, or a changed one: other weights, another config, a bug in its table of points, other numerics."""

    weights: Mapping[str, Array]
    config: Config
    table: Mapping[str, Point] = field(default_factory=lambda: POINTS)
    numerics: Numerics = field(default_factory=lambda: named(FLOAT32.name))
    stepped: bool = False  # the prompt, then one token after another, as an engine generates
    alone: bool = False  # no two rollouts in one batch: later positions of another one would be seen
    replayed: bool = False  # with the experts that the rollouts name

    def states(self, rollouts: Sequence[Rollout]) -> Iterator[Array]:
        """Yield the final hidden states (n, D) from which each answer was chosen."""
        for group in self._groups(rollouts):
            starts, width = [len(r.prompt) for r in group], max(len(r.prompt) + len(r.ids) for r in group)
            ids = np.zeros((len(group), width), np.int64)
            for row, r in zip(ids, group, strict=True):
                row[: len(r.prompt) + len(r.ids)] = [*r.prompt, *r.ids]
            cuts = [0, *(range(starts[0], width) if self.stepped else ()), width]
            passes = [
                (f"decode.{a}." if a else "", ids[:, a:b], np.tile(np.arange(a, b), (len(group), 1)))
                for a, b in pairwise(cuts)
            ]
            scores = len(group) * self.config.num_attention_heads * width**2 * self.numerics.dtype.itemsize
            require_memory(3 * scores, f"auditing a rollout of {width:,} positions", "leave the longest ones out")
            with self.numerics.ops.session(self.weights, self.config, ids.size, width, self.numerics):
                rerun = Rerun(self.weights, self.config, self.numerics, passes, {}, self._table(group, width))
                x = np.concatenate([rerun.made(f"{prefix}model.norm") for prefix, _, _ in passes], axis=1)
            yield from (x[b, p - 1 : p - 1 + len(r.ids)] for b, (p, r) in enumerate(zip(starts, group, strict=True)))

    def _table(self, group: Sequence[Rollout], width: int) -> Mapping[str, Point]:
        if not self.replayed:
            return self.table
        own = self.table[CHOICE]
        experts = np.full((len(group), width, self.config.num_hidden_layers, self.config.num_experts_per_tok), -1)
        for row, r in zip(experts, group, strict=True):
            if (given := experts_of(r, self.config)) is not None:
                row[: len(given)] = given

        def choose(at: Place, logits: Array) -> Array:
            chosen, given = own.run(at, logits), experts[:, at.positions[0], at.layer]
            return np.where(given < 0, chosen, given)

        return {**self.table, CHOICE: replace(own, run=choose)}

    def _groups(self, rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
        group, longest = list[Rollout](), 0
        for r in rollouts:
            longest = max(longest, len(r.prompt) + len(r.ids))
            size = (len(group) + 1) * longest**2 * self.config.num_attention_heads
            if group and (size > SCORES or self.stepped or self.alone):
                yield group
                group, longest = [], len(r.prompt) + len(r.ids)
            group.append(r)
        yield group

    def logits(self, states: Array) -> Array:
        """Return the logits (n, V) of final hidden states (n, D)."""
        nothing = np.zeros((1, 1), np.int64)
        at = Place("lm_head", self.weights, self.config, self.numerics, nothing, nothing)
        return self.table["lm_head"].run(at, self.numerics.widen(states[None]))[0]

    def predicted(
        self, rollouts: Sequence[Rollout], view: View = plain_view, states: Sequence[Array] | None = None
    ) -> Array:
        """Return the log-probabilities (N, 1 + K) that an engine with this model would report."""
        made = self.states(rollouts) if states is None else states
        return stacked([self._of_ids(r, x, view) for r, x in zip(rollouts, made, strict=True)])

    def _of_ids(self, rollout: Rollout, states: Array, view: View) -> Array:
        mine = np.empty(rollout.found.shape)
        for start in range(0, len(states), ROWS):
            logits = self.logits(states[start : start + ROWS])

            def look(part: slice, start: int = start, logits: Array = logits) -> None:
                rows = slice(start + part.start, start + part.stop)
                logp = view(logits[part], rollout, rows)
                mine[rows] = np.take_along_axis(logp, np.maximum(rollout.found[rows], 0), -1)

            by_rows(logits, look)
        return mine


def away(theirs: Array, mine: Array) -> Array:
    """Return the absolute differences (N, 1 + K), at most CAP; NaN where either is unknown, EDGE where mine is -inf."""
    with np.errstate(invalid="ignore"):
        d = np.where(theirs == mine, 0, np.abs(theirs - mine))
    d = np.where(np.isneginf(mine) & np.isfinite(theirs), EDGE, np.minimum(d, CAP))
    return np.where(np.isneginf(theirs) & np.isfinite(mine), np.nan, d)


def size(d: Array) -> float:
    """Return the mean absolute difference: over each position, then over positions. NaN if there is nothing."""
    with np.errstate(all="ignore"):
        rows = np.nansum(np.abs(d), -1) / np.sum(~np.isnan(d), -1)
    return float(np.nanmean(rows)) if np.isfinite(rows).any() else np.nan


def is_large(config: Config) -> bool:
    """Whether a run of this model takes so long that fewer are made."""
    return count_parameters(config)["active"] > LARGE


WEIGHTS_8 = {"fp8 weights": scaled_e4m3((-1,)), "int8 weights": blocks(0, 8)}  # with a scale for each row


def rounded(variant: Variant) -> dict[str, Variant]:
    """Return right programs that round as usual: in float32 with sums in the worst order, in 16 bits, 8-bit weights."""
    found = {"float32": replace(variant, table=noisy(Draws(0), variant.table))}
    found |= {name: replace(variant, numerics=numerics_of(name)) for name in ("float16", "bfloat16")}
    for name, short in WEIGHTS_8.items():
        everywhere, _, in_layers = places(partial(rowwise, short))
        bug = Bug(name, in_layers if is_large(variant.config) else everywhere, "")
        found[name] = replace(variant, table=bug.planted(variant.table))
    return found
