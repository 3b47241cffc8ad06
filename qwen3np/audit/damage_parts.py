"""Where the damage comes from: each part quantised alone, each part left as in the reference, and what that costs.

Everything is measured, none of it estimated, on a few windows. A part of layer n changes nothing before layer n, so the
layers before it are computed only once; different parts go through the layers after it side by side.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qwen3np.audit.damage_runs import POSITIONS, Judge, Pair, Runner, Tensors, decoded
from qwen3np.numerics import Array
from qwen3np.stored import FLOAT

KINDS = ("q", "k", "k cache", "v", "v cache", "o", "attention", "router", "gate", "up", "down", "mlp")  # in a layer
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}  # the norm before each half of a layer
# Some methods, such as AWQ, move scales between a norm and the matrices around it. Such matrices can be exchanged only
# together. The relative L2 distances of a norm and of a matrix above which we take it for one of these.
NORM_MOVED, MATRIX_MOVED = 0.01, 0.5
BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the bytes between the model and the reference
_PIECE = 1 << 22  # numbers decoded at a time


@dataclass(frozen=True)
class Part:
    """Tensors that are quantised together, and the damage they do.

    alone is the KL if only this part is quantised. saved is how much lower the KL of the model is if this part is as in
    the reference. share is the mean of both over the KL of the model: as long as the effects of parts matter only in
    pairs, which they do while the damage is small, the shares of all parts add up to 1. weight_error is the relative L2
    distance of a part's weights. extra is how many more bytes the part takes in the reference.
    """

    name: str
    kind: str
    layer: int | None
    tensors: tuple[str, ...] = field(repr=False)
    extra: int
    weight_error: float | None = None
    alone: float = math.nan
    saved: float = math.nan
    share: float = math.nan


@dataclass(frozen=True)
class Mix:
    """The model with some of its parts as in the reference: their names, the size of it all, and its KL."""

    kept: tuple[str, ...]
    nbytes: int
    bits: float  # of each weight
    kl: float


@dataclass(frozen=True)
class Sources:
    """Where the damage comes from, on windows where the KL of the model is `kl`.

    The largest KL alone comes first: of the three figures it varies least from text to text.
    """

    tokens: int
    kl: float
    parts: tuple[Part, ...]
    layers: tuple[Part, ...]
    kinds: tuple[Part, ...]
    curve: tuple[Mix, ...]


def parts_of(pair: Pair) -> list[Part]:
    """Return the parts that differ, unmeasured: each matrix, with the experts of a layer together, and each cache.

    Where scales were moved between tensors, the whole attention or MLP of a layer is one part. Raises ValueError if
    even the embedding is another one, as after a rotation.
    """
    squares = {name: _squares(ours, pair.model[name]) for name, ours in pair.reference.items() if not callable(ours)}
    members: defaultdict[tuple[str, str, int | None], list[str]] = defaultdict(list)
    for name in pair.reference:
        members[_place(name, pair.tied)].append(name)
    found: list[Part] = []
    for (name, kind, layer), tensors in members.items():
        if kind != "norm" and (part := _part(pair, squares, name, kind, layer, tensors)).weight_error != 0:
            found.append(part)
    embedding = _error(squares, ["model.embed_tokens.weight"])
    if embedding > MATRIX_MOVED:
        raise ValueError(
            f"damage: the embeddings of the two models are {embedding:.0%} apart: their parts cannot be exchanged; "
            "--totals compares the models as wholes"
        )
    for layer in range(pair.config.num_hidden_layers):
        for half, norm in NORMS.items():
            name = f"model.layers.{layer}.{half}"
            inside = [part for part in found if part.name.startswith(f"{name}.") and "cache" not in part.kind]
            moved = _error(squares, [f"model.layers.{layer}.{norm}.weight"]) > NORM_MOVED
            if inside and (moved or any((part.weight_error or 0) > MATRIX_MOVED for part in inside)):
                tensors = [t for t in squares if t.startswith((f"{name}.", f"model.layers.{layer}.{norm}."))]
                kind = "attention" if half == "self_attn" else half
                found = [part for part in found if part not in inside]
                found.append(_part(pair, squares, name, kind, layer, tensors))
    return found


def _place(name: str, tied: bool) -> tuple[str, str, int | None]:
    """Return the part that a tensor, or the point of a cache, belongs to: name, kind and layer."""
    layer = int(found[1]) if (found := re.match(r"model\.layers\.(\d+)\.", name)) else None
    module, _, last = re.sub(r"\.experts\.\d+\.", ".experts.*.", name).rpartition(".")
    if last not in ("weight", "bias"):
        letter = last[0]
        return f"{module}.{letter}_cache", f"{letter} cache", layer
    if module == "model.embed_tokens" or (tied and module == "lm_head"):
        return "model.embed_tokens", "embedding", layer
    own = module.rpartition(".")[2]
    if own.endswith("norm"):
        return module, "norm", layer
    return module, {"lm_head": "head", "gate": "router"}.get(own, own.removesuffix("_proj")), layer


def _part(
    pair: Pair, squares: dict[str, Array], name: str, kind: str, layer: int | None, tensors: Sequence[str]
) -> Part:
    """Return these tensors as an unmeasured part."""
    counted = [t for t in tensors if t in squares and not (pair.tied and t == "lm_head.weight")]
    extra = sum(pair.reference[t].nbytes - pair.model[t].nbytes for t in counted)
    error = _error(squares, counted) if counted else None  # a cache
    return Part(name, kind, layer, tuple(tensors), extra, error)


def _squares(ours: Array, theirs: Array) -> Array:
    """Return the sums of (theirs - ours)² and ours²."""
    found, step = np.zeros(2), max(_PIECE * len(ours) // max(ours.size, 1), 1)
    for n in range(0, len(ours), step):
        x, y = (w[n : n + step].astype(FLOAT) for w in (ours, theirs))
        found += np.sum((y - x) ** 2, dtype=float), np.sum(x**2, dtype=float)
    return found


def _error(squares: dict[str, Array], tensors: Sequence[str]) -> float:
    """Return the relative L2 distance of these tensors."""
    difference, whole = np.sum([squares[t] for t in tensors], axis=0)
    return float(np.sqrt(difference / whole)) if whole else float(difference > 0)


def grouped(parts: Sequence[Part], pair: Pair) -> tuple[list[Part], list[Part]]:
    """Return the layers, with all that is in them, and the kinds, as unmeasured parts."""
    layers, kinds = [], []
    for n in sorted({part.layer for part in parts if part.layer is not None}):
        tensors = [t for t in pair.reference if t.startswith(f"model.layers.{n}.")]
        extra = sum(part.extra for part in parts if part.layer == n)
        layers.append(Part(f"model.layers.{n}", "layer", n, tuple(tensors), extra))
    for kind in dict.fromkeys(part.kind for part in parts):
        same = [part for part in parts if part.kind == kind]
        tensors = [t for part in same for t in part.tensors]
        kinds.append(Part(kind, kind, None, tuple(tensors), sum(part.extra for part in same)))
    return layers, kinds


def passes(parts: Sequence[Part], layers: int) -> int:
    """Return how many layers `sources` passes for each window."""
    return 2 * (layers + sum(layers - (part.layer or 0) for part in parts)) + layers * (2 + len(BUDGETS))


def sources(
    pair: Pair, runner: Runner, parts: Sequence[Part], layers: Sequence[Part], kinds: Sequence[Part]
) -> Sources:
    """Measure all of these parts, and mixes of the model and the reference, on the windows of runner."""
    judge = runner.judge(pair.reference)
    everything = {part.tensors: part.layer for part in (*parts, *layers, *kinds)}
    alone = _swapped(runner, judge, pair.reference, pair.model, everything)
    left_out = _swapped(runner, judge, pair.model, pair.reference, everything)
    kl = _kl(runner, judge, pair.model)

    def measured(some: Sequence[Part]) -> tuple[Part, ...]:
        found: list[Part] = []
        for part in some:
            saved = kl - left_out[part.tensors]
            share = (alone[part.tensors] + saved) / 2 / kl if kl else 0.0
            found.append(replace(part, alone=alone[part.tensors], saved=saved, share=share))
        return tuple(sorted(found, key=lambda part: -part.alone))

    parts = measured(parts)
    curve = [Mix((), *pair.size(pair.model), kl)]
    for kept in _choices(parts):
        view = {**pair.model, **{t: pair.reference[t] for part in kept for t in part.tensors}}
        curve.append(Mix(tuple(part.name for part in kept), *pair.size(view), _kl(runner, judge, view)))
    return Sources(len(judge.targets), kl, parts, measured(layers), measured(kinds), tuple(curve))


def _kl(runner: Runner, judge: Judge, model: Tensors) -> float:
    return float(judge.figures(runner.states(model, runner.start(model)), model["lm_head.weight"])[0, :, 0].mean())


def _swapped(
    runner: Runner, judge: Judge, base: Tensors, other: Tensors, everything: dict[tuple[str, ...], int | None]
) -> dict[tuple[str, ...], float]:
    """Return the KL of `base` with each of these groups of tensors, of one layer or of several, as in `other`."""
    found: dict[tuple[str, ...], float] = {}
    head = decoded(base, "lm_head.")["lm_head.weight"]
    side = max(POSITIONS // runner.ids.size, 1)
    for n, x in zip(range(runner.config.num_hidden_layers), runner.layers(base, runner.start(base)), strict=False):
        here = [tensors for tensors, layer in everything.items() if layer == n]
        ours, theirs = (decoded(model, f"model.layers.{n}.") for model in (base, other))
        for start in range(0, len(here), side):
            some = here[start : start + side]
            views = [{**ours, **{t: theirs[t] for t in tensors}} for tensors in some]
            states = runner.states(base, np.concatenate([runner.layer(view, n, x) for view in views]), n + 1)
            found |= zip(some, judge.figures(states, head)[..., 0].mean(1).tolist(), strict=True)
    for tensors, layer in everything.items():
        if layer is None:
            found[tensors] = _kl(runner, judge, {**base, **{t: other[t] for t in tensors}})
    return found


def _choices(parts: Sequence[Part]) -> list[list[Part]]:
    """Return for each budget the parts that do the most damage for each byte, as long as they fit."""
    worth = sorted((part for part in parts if part.extra > 0), key=lambda part: -part.alone / part.extra)
    whole, found = sum(part.extra for part in worth), list[list[Part]]()
    for budget in BUDGETS:
        left, chosen = budget * whole, list[Part]()
        for part in worth:
            if part.extra <= left:
                chosen.append(part)
                left -= part.extra
        if chosen and chosen not in found:
            found.append(chosen)
    return found
