"""Every recorded point as a function of earlier points: the forward pass of qwen3.py, cut at each of them.

`Rerun` computes a point from the points that somebody else's implementation had, so that the error it adds can be told
from the error that it was given. A table of points with one function changed is an implementation with one bug.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import Array, Numerics
from qwen3np.qwen3 import Scope, rms_norm, rotate, router_weights, swiglu, top_k
from qwen3np.rope import rotary_tables


@dataclass(frozen=True)
class Place:
    """Where a point is computed, and what it may use besides its input points."""

    name: str  # the point without its pass: "model.layers.0.self_attn.q_proj"
    weights: Mapping[str, Array]
    config: Config
    numerics: Numerics
    ids: Array  # (B, S), those of the pass
    positions: Array  # (B, S)

    @property
    def layer(self) -> int:
        """The layer of the point."""
        return split_layer(self.name)[0] or 0

    @property
    def weight(self) -> Array:
        """A tensor of the module with the name of the point."""
        return self.weights[f"{self.name}.weight"]


@dataclass(frozen=True)
class Point:
    """inputs are points of the same layer; "all ..." reaches back to position 0.

    "input" is what the layer is given, "mlp" what its feed-forward part, dense or sparse, gives.
    """

    run: Callable[..., Array]  # (place, *inputs) -> the point
    inputs: tuple[str, ...] = ()


def project(x: Array, w: Array, bias: Array | None, num: Numerics) -> Array:
    """Return R(x Wᵀ + b). x (..., in), w (out, in), bias (out,) or None -> (..., out)."""
    if bias is None:
        return num.ops.head(x, w, num)
    return num.ops.linear(x, Scope({"y.weight": w, "y.bias": bias}), ("y",), num, True)[0]


def _embed(at: Place) -> Array:
    return at.numerics.widen(at.weight[at.ids])


def _project(at: Place, x: Array) -> Array:
    bias = at.weights.get(f"{at.name}.bias") if at.config.attention_bias else None
    return project(x, at.weight, bias, at.numerics)


def _head(at: Place, x: Array) -> Array:
    name = "model.embed_tokens" if at.config.tie_word_embeddings else "lm_head"
    return project(x, at.weights[f"{name}.weight"], None, at.numerics)


def _normalise(at: Place, x: Array) -> Array:
    return rms_norm(x, at.weight, at.config.rms_norm_eps, at.numerics)


def _normalise_heads(at: Place, x: Array) -> Array:  # (B, S, heads * Dh) -> (B, S, heads, Dh)
    return _normalise(at, x.reshape(*x.shape[:2], -1, at.config.head_dim))


def _rotate(at: Place, x: Array) -> Array:  # (B, S, heads, Dh) -> (B, heads, S, Dh)
    return rotate(np.swapaxes(x, 1, 2), rotary_tables(at.config, at.positions, at.numerics), at.numerics)


def _scores(at: Place, q: Array, k: Array) -> Array:  # (B, H, S, Dh), (B, K, T, Dh) -> (B, H, S, T)
    seen: dict[str, Array] = {}
    at.numerics.ops.attend(q, k, k, at.config.window(at.layer), Scope({}, seen.__setitem__), at.numerics)
    return seen["scores"]


def _probs(at: Place, scores: Array) -> Array:
    return at.numerics.round(at.numerics.ops.softmax(scores))


def _context(at: Place, probs: Array, v: Array) -> Array:  # (B, H, S, T), (B, T, K * Dh) -> (B, S, H * Dh)
    kv_heads, head_dim = at.config.num_key_value_heads, at.config.head_dim
    batch, _, new, total = probs.shape
    v = np.swapaxes(v.reshape(batch, total, kv_heads, head_dim), 1, 2)[:, :, None]  # (B, K, 1, T, Dh)
    mixed = probs.reshape(batch, kv_heads, -1, new, total) @ v  # (B, K, G, S, Dh)
    return at.numerics.round(np.transpose(mixed, (0, 3, 1, 2, 4))).reshape(batch, new, -1)


def _add(at: Place, x: Array, h: Array) -> Array:
    return at.numerics.round(x + h)


def _activate(at: Place, gate: Array, up: Array) -> Array:
    return at.numerics.round(at.numerics.round(at.numerics.ops.silu(gate)) * up)


def _choose(at: Place, logits: Array) -> Array:  # (B, S, E) -> (B, S, k)
    return top_k(at.numerics.ops.softmax(logits), at.config.num_experts_per_tok)


def _weigh(at: Place, logits: Array, indices: Array) -> Array:  # (B, S, E), (B, S, k) -> (B, S, k)
    return router_weights(at.numerics.ops.softmax(logits), indices, at.config, at.numerics)


def _mix(at: Place, x: Array, indices: Array, p: Array) -> Array:  # (B, S, D), twice (B, S, k) -> (B, S, D)
    m, num = Scope(at.weights, prefix=f"{at.name}."), at.numerics
    return num.ops.combine(x, indices, p, lambda n, rows: swiglu(rows, m / str(n), num), m, num)


CHOICE = "mlp.router_indices"  # the one point of integers
# In the order in which forward records them. "output" is the layer's own point, "model.layers.N".
LAYER: dict[str, Point] = {
    "input_layernorm": Point(_normalise, ("input",)),
    "self_attn.q_proj": Point(_project, ("input_layernorm",)),
    "self_attn.k_proj": Point(_project, ("input_layernorm",)),
    "self_attn.v_proj": Point(_project, ("input_layernorm",)),
    "self_attn.q_norm": Point(_normalise_heads, ("self_attn.q_proj",)),
    "self_attn.k_norm": Point(_normalise_heads, ("self_attn.k_proj",)),
    "self_attn.q_rope": Point(_rotate, ("self_attn.q_norm",)),
    "self_attn.k_rope": Point(_rotate, ("self_attn.k_norm",)),
    "self_attn.scores": Point(_scores, ("self_attn.q_rope", "all self_attn.k_rope")),
    "self_attn.probs": Point(_probs, ("self_attn.scores",)),
    "self_attn.context": Point(_context, ("self_attn.probs", "all self_attn.v_proj")),
    "self_attn.o_proj": Point(_project, ("self_attn.context",)),
    "attn_residual": Point(_add, ("input", "self_attn.o_proj")),
    "post_attention_layernorm": Point(_normalise, ("attn_residual",)),
    "mlp.gate_proj": Point(_project, ("post_attention_layernorm",)),
    "mlp.up_proj": Point(_project, ("post_attention_layernorm",)),
    "mlp.act": Point(_activate, ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.down_proj": Point(_project, ("mlp.act",)),
    "mlp.gate": Point(_project, ("post_attention_layernorm",)),
    CHOICE: Point(_choose, ("mlp.gate",)),
    "mlp.router_weights": Point(_weigh, ("mlp.gate", CHOICE)),
    "mlp.experts": Point(_mix, ("post_attention_layernorm", CHOICE, "mlp.router_weights")),
    "output": Point(_add, ("attn_residual", "mlp")),
}
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.act", "mlp.down_proj")
SPARSE = ("mlp.gate", CHOICE, "mlp.router_weights", "mlp.experts")
POINTS: dict[str, Point] = {
    "model.embed_tokens": Point(_embed),
    **LAYER,
    "model.norm": Point(_normalise, ("last output",)),
    "lm_head": Point(_head, ("model.norm",)),
}


def point_names(config: Config) -> list[str]:
    """Return the points of one pass, in the order in which forward records them."""
    layers = [
        point_name(i, kind)
        for i in range(config.num_hidden_layers)
        for kind in LAYER
        if kind not in (DENSE if config.is_sparse(i) else SPARSE)
    ]
    return ["model.embed_tokens", *layers, "model.norm", "lm_head"]


def input_name(layer: int | None, x: str, config: Config) -> str:
    """Return the point to which an input of a Point refers in this layer (None: outside the layers)."""
    x = x.removeprefix("all ")
    if x == "last output":
        return point_name(config.num_hidden_layers - 1, "output")
    if layer is None:
        return x
    if x == "input":
        return point_name(layer - 1, "output")
    if x == "mlp":
        x = "mlp.experts" if config.is_sparse(layer) else "mlp.down_proj"
    return point_name(layer, x)


def point_name(layer: int, kind: str) -> str:
    """Return the name of a layer's point; the output of layer -1 is the embedding."""
    if layer < 0:
        return "model.embed_tokens"
    return f"model.layers.{layer}" + ("" if kind == "output" else f".{kind}")


def split_pass(name: str) -> tuple[str, str]:
    """Return the pass and the point: "decode.0." and the rest; the prefill is ""."""
    found = re.match(r"decode\.\d+\.", name)
    return (found[0], name[found.end() :]) if found else ("", name)


def split_layer(name: str) -> tuple[int | None, str]:
    """Return the layer and the key of POINTS: (3, "self_attn.q_proj"), (3, "output") or (None, "lm_head")."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", split_pass(name)[1])
    return (int(found[1]), found[2] or "output") if found else (None, split_pass(name)[1])


def point_shape(name: str, config: Config, batch: int, new: int, total: int) -> tuple[int, ...]:
    """Return the shape of a whole point of `new` positions, the last of `total`."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    kind = split_layer(name)[1].rpartition(".")[2]
    own = kv_heads if kind[0] in "kv" else heads
    if kind in ("q_proj", "k_proj", "v_proj", "context"):
        return batch, new, own * head_dim
    if kind in ("q_norm", "k_norm"):
        return batch, new, own, head_dim
    if kind in ("q_rope", "k_rope"):
        return batch, own, new, head_dim
    if kind in ("scores", "probs"):
        return batch, heads, new, total
    sizes = dict.fromkeys(("gate_proj", "up_proj", "act"), config.intermediate_size)
    sizes |= dict.fromkeys(("router_indices", "router_weights"), config.num_experts_per_tok)
    sizes |= {"gate": config.num_experts, "lm_head": config.vocab_size}
    return batch, new, sizes.get(kind, config.hidden_size)


@dataclass(frozen=True)
class Rerun:
    """Points of the reference, computed from the given points of each pass; missing ones are computed as well.

    passes are (prefix, ids (B, S), positions (B, S)): "" for the prefill, then "decode.0." and so on. given has whole
    points in the reference's shapes.
    """

    weights: Mapping[str, Array]
    config: Config
    numerics: Numerics
    passes: Sequence[tuple[str, Array, Array]]
    given: Mapping[str, Array]
    table: Mapping[str, Point] = field(default_factory=lambda: POINTS)
    computed: dict[str, Array] = field(default_factory=dict[str, Array])

    def value(self, name: str) -> Array:
        """Return the point as given, or else as its formula computes it."""
        if name not in self.given:
            return self.made(name)
        return self.given[name] if name.endswith(CHOICE) else self.numerics.widen(self.given[name])

    def made(self, name: str) -> Array:
        """Return the point as the reference computes it from the values of its inputs."""
        if name not in self.computed:
            own_pass, point = split_pass(name)
            index = [prefix for prefix, _, _ in self.passes].index(own_pass)
            layer, kind = split_layer(name)
            inputs = [self._input(index, layer, x) for x in self.table[kind].inputs]
            place = Place(point, self.weights, self.config, self.numerics, *self.passes[index][1:])
            self.computed[name] = self.table[kind].run(place, *inputs)
            if kind == "output":  # of a finished layer, later passes ask for keys and values alone
                for other in [k for k in self.computed if k.startswith(f"{name}.")]:
                    if not other.endswith(("k_rope", "v_proj")):
                        del self.computed[other]
        return self.computed[name]

    def _input(self, index: int, layer: int | None, x: str) -> Array:
        prefix, name = self.passes[index][0], input_name(layer, x, self.config)
        if x == "last output" or (x == "input" and layer is not None):
            return self._output(prefix, self.config.num_hidden_layers - 1 if layer is None else layer - 1)
        if not x.startswith("all "):
            return self.value(prefix + name)
        return np.concatenate([self.value(p + name) for p, _, _ in self.passes[: index + 1]], position_axis(name))

    def _output(self, prefix: str, layer: int) -> Array:
        """Return the output of a layer. Earlier layers are computed in a loop, to avoid deep recursion."""
        names = [prefix + point_name(i, "output") for i in range(-1, layer + 1)]
        known = [i for i, name in enumerate(names) if name in self.given or name in self.computed]
        for name in names[max(known, default=0) :]:
            self.value(name)
        return self.value(names[-1])
