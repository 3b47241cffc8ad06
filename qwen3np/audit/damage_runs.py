"""What quantisation costs: how far a model's predictions are from those of the model that it was made from.

For each token of a text both models give a distribution p (the reference) and q of the next token. The damage is
KL(p, q) = sum of p log(p / q), in nats (Kullback and Leibler, 1951, https://doi.org/10.1214/aoms/1177729694), together
with how often the likeliest token is another one, and the perplexities. Distributions are whole and in float64.

The text is cut into windows like those of llama.cpp's `llama-perplexity --kl-divergence`: one after the other, none
overlapping, whatever is left at the end unused; the first half of each window is only context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen3np.audit.damage_kinds import short_caches
from qwen3np.config import Config
from qwen3np.guard import checked_sequence, require_tensors, require_unchanged
from qwen3np.model import Model
from qwen3np.numerics import Array, Numerics
from qwen3np.ops.fast.threads import ELEMENT, IN_CACHE, share
from qwen3np.qwen3 import Scope, block, rms_norm
from qwen3np.rope import rotary_tables
from qwen3np.sampling import log_probabilities
from qwen3np.settings import Progress
from qwen3np.stored import FLOAT
from qwen3np.weights import weight_shapes

WINDOW = 512  # tokens, as in llama-perplexity
POSITIONS = 2048  # tokens computed at once
LOGITS = 1 << 26  # logits in memory at once
Tensors = Mapping[str, Any]  # arrays under their names, and functions under the names of the points that they change


@dataclass(frozen=True)
class Totals:
    """The damage over all scored tokens. KL in nats; kl_error is the standard error of its mean."""

    tokens: int
    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    flips: float
    perplexity_reference: float
    perplexity: float

    @classmethod
    def of(cls, figures: Array) -> Totals:
        """Summarise figures (N, 4), as Judge gives them."""
        kl, flip, before, after = figures.T
        return cls(
            tokens=len(kl),
            kl=float(kl.mean()),
            kl_error=float(kl.std() / max(len(kl) - 1, 1) ** 0.5),
            kl_median=float(np.median(kl)),
            kl_99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            flips=float(flip.mean()),
            perplexity_reference=float(np.exp(-before.mean())),
            perplexity=float(np.exp(-after.mean())),
        )


def windows(input_ids: Sequence[int], config: Config, window: int | None = None) -> Array:
    """Cut ids into windows (W, window), or a single shorter one. None: 512 tokens, or the context if that is shorter.

    Raises ValueError if there is nothing to score, and for windows that exceed the context.
    """
    ids, context = np.array(checked_sequence(input_ids, config)), config.max_position_embeddings
    window = min(WINDOW, context) if window is None else window
    if not 4 <= window <= context:
        raise ValueError(f"damage: window {window} must be from 4 to {context}, the context")
    window = min(window, len(ids))
    if window < 4:
        raise ValueError(f"damage: the text has {window} tokens; at least 4 are needed, since half of them are context")
    return ids[: len(ids) // window * window].reshape(-1, window)


def scored(window: int) -> slice:
    """Return the positions of a window whose predictions count: the second half, but not the last, which has none."""
    return slice(window // 2, window - 1)


@dataclass(frozen=True)
class Runner:
    """The forward pass over windows ids (W, S), in parts that can start at any layer.

    x may hold several models' states of the windows, one after the other: (A * W, S, D).
    """

    config: Config
    ids: Array
    num: Numerics
    progress: Progress | None = None  # is called with the layers passed, times windows

    def start(self, model: Tensors) -> Array:
        """Return the embeddings (W, S, D)."""
        return self.num.widen(model["model.embed_tokens.weight"][self.ids])

    def layer(self, model: Tensors, layer: int, x: Array) -> Array:
        """Return the states after a layer."""

        def edit(name: str, x: Array) -> Array | None:
            return model[name](x) if name in model else None  # on its way into the cache

        tables = rotary_tables(self.config, np.arange(self.ids.shape[1])[None], self.num)
        x = block(x, Scope(model, edit=edit) / f"model.layers.{layer}", layer, self.config, tables, num=self.num)
        if self.progress:
            self.progress(len(x))
        return x

    def layers(self, model: Tensors, x: Array, first: int = 0) -> Iterator[Array]:
        """Yield the states before layer `first`, and after it and each later one."""
        yield x
        for n in range(first, self.config.num_hidden_layers):
            yield (x := self.layer(decoded(model, f"model.layers.{n}."), n, x))

    def states(self, model: Tensors, x: Array, first: int = 0) -> Array:
        """Return what the head is given at the scored positions, (A, W * scored, D)."""
        [x] = deque(self.layers(model, x, first), maxlen=1)
        x = rms_norm(x[:, scored(x.shape[1])], model["model.norm.weight"], self.config.rms_norm_eps, self.num)
        return x.reshape(-1, len(self.ids) * x.shape[1], x.shape[2])

    def judge(self, model: Tensors) -> Judge:
        """Return a judge whose reference is this model."""
        targets = self.ids[:, 1:][:, scored(self.ids.shape[1])].reshape(-1)
        return Judge(self.states(model, self.start(model))[0], targets, model["lm_head.weight"], self.num)


@dataclass(frozen=True)
class Judge:
    """Compares predictions with the reference's: states (N, D) before its head (V, D), and the next tokens (N,)."""

    states: Array
    targets: Array
    head: Array
    num: Numerics

    def figures(self, states: Array, head: Array) -> Array:
        """Return KL, flip, log p and log q of the token, (A, N, 4), for states (A, N, D) of others before a head."""
        others, count, _ = states.shape
        found = np.empty((others, count, 4))
        step = max(LOGITS // (len(head) * (others + 1)), 1)
        near = max(IN_CACHE // len(head), 1)  # rows that are compared together
        for start in range(0, count, step):
            rows = slice(start, start + step)
            p = self.num.ops.head(self.states[rows], self.head, self.num)
            q = self.num.ops.head(states[:, rows], head, self.num)

            def compare(n: int, p: Array = p, q: Array = q, start: int = start) -> None:
                here, place = slice(n, n + near), slice(start + n, start + n + near)
                ours, targets = log_probabilities(p[here]), self.targets[place, None]
                for figures, logits in zip(found[:, place], q[:, here], strict=True):
                    theirs = log_probabilities(logits)
                    figures[:, 0] = (np.exp(ours) * (ours - theirs)).sum(-1)
                    figures[:, 1] = ours.argmax(-1) != theirs.argmax(-1)
                    figures[:, 2:3] = np.take_along_axis(ours, targets, -1)
                    figures[:, 3:4] = np.take_along_axis(theirs, targets, -1)

            share(range(0, len(p), near), ELEMENT * (p.size + q.size), compare)
        return found


def decoded(model: Tensors, prefix: str) -> Tensors:
    """Return the tensors under a prefix in float32, since they are used many times."""
    inside = {name: x for name, x in model.items() if name.startswith(prefix)}
    return {name: x if callable(x) else np.asarray(x, FLOAT) for name, x in inside.items()}


@dataclass(frozen=True)
class Pair:
    """A reference and what was made from it, with the same tensors: tied heads are tensors of their own in both."""

    config: Config
    reference: Tensors
    model: Tensors
    tied: bool  # whether the head is the embedding in both

    @classmethod
    def of(cls, reference: Model, model: Model | None, kv: str | None = None) -> Pair:
        """Check that they belong together. Raises ValueError, which says how they differ."""
        other = model or reference
        for one in (reference, other):
            require_unchanged(one.weights)
            require_tensors(one.weights, one.config)
            if not one.config.tie_word_embeddings and "lm_head.weight" not in one.weights:
                raise ValueError("damage: there is no lm_head.weight: a checkpoint makes embeddings, not text")
        ours, theirs = (_comparable(one.config).to_dict() for one in (reference, other))
        if differs := [key for key, value in ours.items() if theirs.get(key) != value]:
            raise ValueError(f"damage: the models differ in {', '.join(differs)}: one must be made from the other")
        before, after = ({name: one.weights[name] for name in weight_shapes(one.config)} for one in (reference, other))
        for one, tensors in ((reference, before), (other, after)):
            if one.config.tie_word_embeddings:
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        if kv is not None:
            caches = short_caches(reference.config, kv)
            before |= dict.fromkeys(caches, _unchanged)
            after |= caches
        tied = reference.config.tie_word_embeddings and other.config.tie_word_embeddings
        return cls(reference.config, before, after, tied)

    def size(self, model: Tensors) -> tuple[int, float]:
        """Return the bytes of a model of this pair, or of a mix of both, and its bits per weight."""
        tensors = [w for t, w in model.items() if not callable(w) and not (self.tied and t == "lm_head.weight")]
        nbytes = sum(w.nbytes for w in tensors)
        return nbytes, 8 * nbytes / sum(w.size for w in tensors)


def _unchanged(x: Array) -> Array:
    return x


def _comparable(config: Config) -> Config:
    """Return a config without what does not change a prediction."""
    return replace(
        config, tie_word_embeddings=False, max_position_embeddings=1, initializer_range=0.02, eos_token_id=()
    )


def totals(pair: Pair, ids: Array, num: Numerics, progress: Progress | None = None) -> Totals:
    """Compare the predictions on all windows ids (W, S)."""
    step = max(POSITIONS // ids.shape[1], 1)
    found: list[Array] = []
    for start in range(0, len(ids), step):
        runner = Runner(pair.config, ids[start : start + step], num, progress)
        judge = runner.judge(pair.reference)
        states = runner.states(pair.model, runner.start(pair.model))
        found.append(judge.figures(states, pair.model["lm_head.weight"])[0])
    return Totals.of(np.concatenate(found))
