"""Damage: how far a quantised model is from its reference on a text, and which of its tensors are to blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwen3np.audit.damage_kinds import what_if
from qwen3np.audit.damage_parts import Sources, grouped, parts_of, passes, sources
from qwen3np.audit.damage_runs import Pair, Runner, Totals, totals, windows
from qwen3np.model import Model
from qwen3np.numerics import named
from qwen3np.settings import Progress
from qwen3np.terminal import counted
from qwen3np.weights import LoadedWeights

RANKED_WINDOW = 256  # tokens of a window on which the parts are measured, at most
WORK = 16 * 10**10  # tokens times weights for which each part is measured, unless otherwise asked


@dataclass(frozen=True)
class Damage:
    """How far the model is from the reference: over all windows, and where that comes from."""

    window: int
    windows: int
    ranked: int  # windows that the sources were measured on
    totals: Totals
    reference_nbytes: int
    reference_bits: float  # of each weight
    nbytes: int
    bits: float
    sources: Sources | None


def damage(
    reference: Model,
    model: Model | str | None,
    input_ids: Sequence[int],
    *,
    kv: str | None = None,
    window: int | None = None,
    ranked: int | None = None,
    progress: Progress | bool | None = True,
) -> Damage:
    """Compare the predictions of a quantised model with those of the model it was made from.

    Parameters
    ----------
    reference
        The model before quantisation. Load it with weights_dtype="mapped", else its size is that of a float32 copy.
    model
        The quantised model; or what to quantise the reference to, one of q4_0, q4_1, q5_0, q5_1, q8_0, fp8 and int8; or
        None, if only the cache is to be shortened.
    input_ids
        The ids of a text that is like those the model will see.
    kv
        Keep the model's keys and values as float16, q8_0 or fp8.
    window
        Tokens seen at once; the second half of each window is scored, as llama-perplexity does. None: 512, or the
        context if that is shorter.
    ranked
        On how many windows, evenly spread and cut to 256 tokens, each part is measured; 0 leaves the parts out. None:
        on one for models of 0.6 billion parameters or more, and on more for smaller ones.
    progress
        Called with the number of layers passed; True shows a bar.

    Returns
    -------
    Damage
        totals: KL (mean, median, 99 %, largest), share of other likeliest tokens, and perplexities, over all windows.
        sources: each part (a matrix), layer and kind: the KL if it alone is quantised, what is saved if it is as in the
        reference, and its share; and the curve of KL against size of the best mixes of both models.

    Raises
    ------
    ValueError
        If the models have different configs, the window is not within the context, an id is out of range, or a kind is
        unknown.

    Examples
    --------
    >>> model = qwen3np.load(weights_dtype="mapped")
    >>> ids = model.text.encode("The capital of France is Paris. The opposite of hot is cold.")
    >>> found = qwen3np.damage(model, "q4_0", ids)
    >>> round(found.totals.kl, 4), found.sources.parts[0].name
    (0.0038, 'model.embed_tokens')
    """
    ids = windows(input_ids, reference.config, window)
    if ranked is None:
        ranked = max(WORK // (RANKED_WINDOW * sum(w.size for w in reference.weights.values())), 1)
    num = named("float32")
    if isinstance(model, str):
        model = replace(reference, weights=LoadedWeights(what_if(reference.weights, model)))
    pair = Pair.of(reference, model, kv)
    parts = parts_of(pair) if ranked else []
    layers, kinds = grouped(parts, pair)
    some = ids[np.linspace(0, len(ids) - 1, min(ranked, len(ids))).astype(int), :RANKED_WINDOW]
    depth = reference.config.num_hidden_layers
    work = 2 * depth * len(ids) + len(some) * passes([*parts, *layers, *kinds], depth) * bool(parts)
    with (
        counted(progress, work, "layers", "layer") as count,
        num.ops.session(pair.reference, pair.config, ids.size, ids.shape[1], num),
    ):
        whole = totals(pair, ids, num, count)
        found = sources(pair, Runner(pair.config, some, num, count), parts, layers, kinds) if parts else None
    return Damage(
        ids.shape[1],
        len(ids),
        len(some) * bool(parts),
        whole,
        *pair.size(pair.reference),
        *pair.size(pair.model),
        found,
    )
