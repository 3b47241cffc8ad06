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
from qwen3np.guard import require_unchanged
from qwen3np.model import Model
from qwen3np.numerics import Array, Numerics
from qwen3np.ops.fast.threads import ELEMENT, share
from qwen3np.qwen3 import Scope, block, rms_norm
from qwen3np.rope import rotary_tables
from qwen3np.sampling import log_probabilities
from qwen3np.settings import Progress
from qwen3np.stored import FLOAT

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
        tokens = len(figures)
        return cls(
            tokens,
            float(kl.mean()),
            float(kl.std() / max(tokens - 1, 1) ** 0.5),
            *(float(np.quantile(kl, level)) for level in (0.5, 0.99, 1)),
            float(flip.mean()),
            float(np.exp(-before.mean())),
            float(np.exp(-after.mean())),
        )


def windows(ids: Sequence[int] | Array, window: int) -> Array:
    """Cut ids into windows (W, window), or one shorter one. Raises ValueError if there is nothing to score."""
    window = min(window, len(ids))
    if window < 4:
        raise ValueError(f"damage: a window of {window} tokens; at least 4 are needed, of which half are context")
    return np.asarray(ids)[: len(ids) // window * window].reshape(-1, window)


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
        for start in range(0, count, step):
            rows = slice(start, start + step)
            p = self.num.ops.head(self.states[rows], self.head, self.num)
            q = self.num.ops.head(states[:, rows], head, self.num)

            def compare(n: int, p: Array = p, q: Array = q, start: int = start) -> None:
                ours, target = log_probabilities(p[n]), self.targets[start + n]
                for other, logits in enumerate(q[:, n]):
                    theirs = log_probabilities(logits)
                    kl = np.exp(ours) @ (ours - theirs)
                    flip = ours.argmax() != theirs.argmax()
                    found[other, start + n] = kl, flip, ours[target], theirs[target]

            share(range(len(p)), ELEMENT * (p.size + q.size), compare)
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
        ours, theirs = (_comparable(one.config) for one in (reference, other))
        if ours != theirs:
            differs = [key for key, value in ours.to_dict().items() if theirs.to_dict().get(key) != value]
            raise ValueError(
                f"damage: the two models have other configs ({', '.join(differs)}): one must come from the other"
            )
        pair = [
            {**one.weights, "lm_head.weight": one.weights["model.embed_tokens.weight"]}
            if one.config.tie_word_embeddings
            else dict[str, Any](one.weights)
            for one in (reference, other)
        ]
        if kv is not None:
            caches = short_caches(reference.config, kv)
            pair = [pair[0] | dict.fromkeys(caches, _unchanged), pair[1] | caches]
        tied = reference.config.tie_word_embeddings and other.config.tie_word_embeddings
        return cls(reference.config, *pair, tied)

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
