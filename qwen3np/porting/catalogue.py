"""The bugs that ports of Qwen3 had: each a small change of one step, or of the few steps that it spoils together.

To add one, write into BUGS its name, what it does to which steps, and where to look. A change is a function (run, at,
*inputs) that returns the wrong point: `run` is the right step, to be called with another place, or with other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from qwen3np.config import Config, Yarn
from qwen3np.norm import rms_norm
from qwen3np.numerics import BFLOAT16, Array, silu
from qwen3np.ops.fast.linear import linear
from qwen3np.porting.points import POINTS, Place, Point
from qwen3np.rope import attention_factor, inverse_frequencies, rotary_tables, rotate

Change = Callable[..., Array]  # (run, place, *inputs) -> the point


def _always(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class Bug:
    """Changes of steps, by the names or patterns of steps. A pattern stands for places that one port may have apart."""

    name: str
    changes: Mapping[str, Change]
    look: str  # where to look, or what to do instead
    applies: Callable[[Config], bool] = _always  # to models of this config

    @property
    def steps(self) -> list[str]:
        """The keys of POINTS that it changes, in their order."""
        return [step for step in POINTS if any(fnmatchcase(step, pattern) for pattern in self.changes)]

    @property
    def parts(self) -> list[Bug]:
        """The same bug in only one of the places that its one pattern names; none where it has no such pattern."""
        steps = self.steps if len(self.changes) == 1 else []
        return [
            replace(self, changes=dict.fromkeys([step], *self.changes.values())) for step in steps if len(steps) > 1
        ]

    def planted(self, steps: Mapping[str, Point]) -> dict[str, Point]:
        """Return the table of steps with this bug."""
        changed = dict(steps)
        for pattern, change in self.changes.items():
            for step in self.steps:
                if fnmatchcase(step, pattern):
                    changed[step] = replace(steps[step], run=partial(change, steps[step].run))
        return changed


# --- changes that several bugs are made of ----------------------------------------------------------------------------


def _placed(move: Callable[[Place], Place]) -> Change:
    """Run the right step at another place."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        return run(move(at), *x)

    return change


def _configured(**values: Any) -> Change:
    return _placed(lambda at: replace(at, config=replace(at.config, **values)))


def _reconfigured(change: Callable[[Config], Config]) -> Change:
    return _placed(lambda at: replace(at, config=change(at.config)))


def _with_weights_of(own: str, other: str) -> Change:
    return _placed(lambda at: replace(at, name=at.name.replace(own, other)))


def _moved(move: Callable[[Array], Array]) -> Change:
    return _placed(lambda at: replace(at, positions=move(at.positions)))


def _scaled(factor: Callable[[Config], float]) -> Change:
    def change(run: Change, at: Place, *x: Array) -> Array:
        return at.numerics.round(run(at, *x) * at.numerics.dtype.type(factor(at.config)))

    return change


def _same(x: Array) -> Array:
    return x


def _short(x: Array) -> Array:
    return x.astype(BFLOAT16).astype(x.dtype)


def _rotated(
    frequencies: Callable[[Array], Array] = _same,
    angles: Callable[[Array], Array] = _same,
    tables: Callable[[Array], Array] = _same,
) -> Change:
    """Rotate by tables in whose making something is rounded."""

    def change(run: Change, at: Place, x: Array) -> Array:
        by = frequencies(inverse_frequencies(at.config, at.numerics))
        turned = angles(angles(at.positions[:, None, :, None].astype(by.dtype)) * angles(by))
        scale = attention_factor(at.config)
        cos, sin = (tables(at.numerics.round(f(turned) * scale)) for f in (np.cos, np.sin))
        return rotate(np.swapaxes(x, 1, 2), (cos, sin), at.numerics)

    return change


# --- norms ------------------------------------------------------------------------------------------------------------


def _not_normalised(run: Change, at: Place, x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1, at.config.head_dim) if "self_attn" in at.name else x


def _one_plus_weight(at: Place) -> Place:
    return replace(at, weights={**at.weights, f"{at.name}.weight": at.numerics.widen(at.weight) + 1})


def _over_all_heads(run: Change, at: Place, x: Array) -> Array:
    heads = _not_normalised(run, at, x)
    weight = np.tile(at.weight, heads.shape[2])
    return rms_norm(x, weight, at.config.rms_norm_eps, at.numerics).reshape(heads.shape)


def _normalised_after(run: Change, at: Place, x: Array) -> Array:
    weight = at.weights[f"{at.name.replace('rope', 'norm')}.weight"]
    return rms_norm(run(at, x), weight, at.config.rms_norm_eps, at.numerics)


def _rotated_before(run: Change, at: Place, x: Array) -> Array:
    tables = rotary_tables(at.config, at.positions, at.numerics)
    turned = rotate(np.swapaxes(_not_normalised(run, at, x), 1, 2), tables, at.numerics)
    return run(at, np.swapaxes(turned, 1, 2).reshape(x.shape))


# --- rotation ---------------------------------------------------------------------------------------------------------


def _interleaved(run: Change, at: Place, x: Array) -> Array:
    halves = np.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
    y = run(at, halves)
    return np.swapaxes(y.reshape(*y.shape[:-1], 2, -1), -1, -2).reshape(y.shape)


def _not_rotated(run: Change, at: Place, x: Array) -> Array:
    return np.swapaxes(x, 1, 2)


# --- attention --------------------------------------------------------------------------------------------------------


def _tiled(run: Change, at: Place, by_head: Array, kv: Array) -> Array:
    """Let query head h meet the KV head h % K: on the place of a head that does, and back."""
    heads, kv_heads = at.config.num_attention_heads, at.config.num_key_value_heads
    order = np.transpose(np.arange(heads).reshape(-1, kv_heads)).ravel()
    y = run(at, by_head[:, order], kv)
    axis = 1 if y.ndim == 4 else 2  # scores (B, H, S, T) or context (B, S, H * Dh)
    whole = y.shape
    y = y if axis == 1 else y.reshape(*y.shape[:2], heads, -1)
    return np.take(y, np.argsort(order), axis).reshape(whole)


def _seeing(ahead: Callable[[int], int]) -> Change:
    """Let a query also see so many positions (given T) after its own."""

    def change(run: Change, at: Place, q: Array, k: Array) -> Array:
        (batch, _, new, _), (kv_heads, total, size) = q.shape, k.shape[1:]
        products = q.reshape(batch, kv_heads, -1, new, size) @ np.swapaxes(k[:, :, None], -1, -2)  # (B, K, G, S, T)
        scores = at.numerics.round(at.numerics.round(products) * at.numerics.dtype.type(size**-0.5))
        seen = np.tri(new, total, total - new + ahead(total), np.bool_)
        if (window := at.config.window(at.layer)) is not None:
            seen &= ~np.tri(new, total, total - new - window, np.bool_)
        return np.where(seen, scores.reshape(*q.shape[:3], total), at.numerics.dtype.type(-np.inf))

    return change


def _slid_elsewhere(config: Config) -> Config:
    """Let those layers slide that do not, and the others not."""
    layers = range(config.num_hidden_layers)
    types = ("sliding_attention" if config.window(i) is None else "full_attention" for i in layers)
    return replace(config, layer_types=tuple(types))


def _wider(by: int) -> Change:
    return _reconfigured(lambda config: replace(config, sliding_window=max((config.sliding_window or 0) + by, 1)))


def _slides(config: Config) -> bool:
    return any(config.window(i) is not None for i in range(config.num_hidden_layers))


def _slides_in_part(config: Config) -> bool:
    return _slides(config) and any(config.window(i) is None for i in range(config.num_hidden_layers))


# --- YaRN -------------------------------------------------------------------------------------------------------------


def _has_yarn(config: Config) -> bool:
    return config.rope_scaling is not None


def _yarn(change: Callable[[Yarn, float], Yarn]) -> Change:
    """Rotate with other settings, made of those of the config and their attention factor."""

    def changed(config: Config) -> Config:
        yarn = config.rope_scaling
        return replace(config, rope_scaling=yarn and change(yarn, attention_factor(config)))

    return _reconfigured(changed)


# --- feed-forward -----------------------------------------------------------------------------------------------------


def _gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf, [x.dtype])(x * math.sqrt(0.5))) / 2


def _gelu_tanh(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _activated(by: Callable[[Array], Array]) -> Change:
    def change(run: Change, at: Place, gate: Array, up: Array) -> Array:
        return at.numerics.round(at.numerics.round(by(gate)) * up)

    return change


def _exchanged(run: Change, at: Place, x: Array, y: Array) -> Array:
    return run(at, y, x)


def _within_experts(activate: Callable[[Array, Array], Array]) -> Change:
    """Let every expert make activate(gate, up) of its two projections."""

    def change(run: Change, at: Place, x: Array, indices: Array, shares: Array) -> Array:
        n, y = at.numerics, np.zeros_like(x)
        for expert in np.unique(indices):

            def project(x: Array, name: str, expert: int = expert) -> Array:
                return linear(x, at.weights[f"{at.name}.{expert}.{name}_proj.weight"], None, n)

            here = indices == expert
            rows = here.any(-1)
            act = n.round(activate(project(x[rows], "gate"), project(x[rows], "up")))
            y[rows] = n.round(y[rows] + n.round(project(act, "down") * shares[here][:, None]))
        return y

    return change


# --- router -----------------------------------------------------------------------------------------------------------


def _is_sparse(config: Config) -> bool:
    return any(config.is_sparse(i) for i in range(config.num_hidden_layers))


def _logits_as_weights(run: Change, at: Place, logits: Array, indices: Array) -> Array:
    return np.take_along_axis(logits, indices, -1)


def _logits_normalised(run: Change, at: Place, logits: Array, indices: Array) -> Array:
    chosen = np.take_along_axis(logits, indices, -1)
    return at.numerics.round(chosen / chosen.sum(-1, keepdims=True))


NORMS, LAYER_NORMS, HEAD_NORMS, ROPE = "*norm", "[!s]*norm", "self_attn.[qk]_norm", "self_attn.[qk]_rope"
# Bugs of one name are forms of the same one. A bug that only some models can have says so with `applies`.
BUGS = (
    Bug(
        "norm: q/k norm missing",
        {HEAD_NORMS: _not_normalised},
        "every head of q and k is normalised, with q_norm.weight and k_norm.weight, in all code paths",
    ),
    Bug(
        "norm: q/k norm after RoPE",
        {HEAD_NORMS: _not_normalised, ROPE: _normalised_after},
        "the order is projection, norm, rotation",
    ),
    Bug(
        "norm: q/k norm after RoPE",  # as a port records it that calls the result of its norm q_norm
        {HEAD_NORMS: _rotated_before, ROPE: _not_rotated},
        "the order is projection, norm, rotation",
    ),
    Bug(
        "norm: q/k norm over all heads together",
        {HEAD_NORMS: _over_all_heads},
        "reshape to (..., heads, head_dim) before q_norm and k_norm: the mean is that of one head",
    ),
    Bug(
        "norm: q_norm and k_norm swapped",
        {
            "self_attn.q_norm": _with_weights_of("q_norm", "k_norm"),
            "self_attn.k_norm": _with_weights_of("k_norm", "q_norm"),
        },
        "the names under which the two weights are loaded",
    ),
    Bug(
        "norm: multiplied by 1 + weight",
        {NORMS: _placed(_one_plus_weight)},
        "Qwen3 multiplies by the weight itself; 1 + weight is Gemma's",
    ),
    Bug("norm: left out", {LAYER_NORMS: _not_normalised}, "the call of this norm, in all code paths"),
    Bug("norm: rms_norm_eps is 1e-5", {NORMS: _configured(rms_norm_eps=1e-5)}, "rms_norm_eps is read from config.json"),
    Bug(
        "rotary: rope_theta is 10,000",
        {ROPE: _configured(rope_theta=1e4)},
        "newer config.json files keep it in rope_parameters.rope_theta",
    ),
    Bug(
        "rotary: interleaved instead of half rotation",
        {ROPE: _interleaved},
        "lane i is paired with lane i + head_dim / 2, unless the rows of q_proj and k_proj are permuted",
    ),
    Bug("rotary: cos and sin in bfloat16", {ROPE: _rotated(tables=_short)}, "the tables are made and kept in float32"),
    Bug(
        "rotary: angles in bfloat16",
        {ROPE: _rotated(angles=_short)},
        "bfloat16 rounds position 257 to 256; positions and angles are float32",
    ),
    Bug(
        "rotary: inv_freq in bfloat16",
        {ROPE: _rotated(frequencies=_short)},
        "a cast of the whole model takes inv_freq along; it is float32",
    ),
    Bug(
        "rotary: sign of sin flipped",
        {ROPE: _moved(np.negative)},
        "a pair (a, b) becomes (a cos - b sin, b cos + a sin)",
    ),
    Bug("rotary: positions begin at 1", {ROPE: _moved(lambda p: p + 1)}, "positions of q and k begin at 0"),
    Bug(
        "rotary: positions start again in decode steps",
        {ROPE: _moved(lambda p: p - p[:, :1])},
        "a decode step's position is the length of the cache",
    ),
    Bug(
        "rotary: positions one too high in decode steps",
        {ROPE: _moved(lambda p: p + (p[:, :1] > 0))},
        "a decode step's position is the length of the cache before it",
    ),
    Bug(
        "rotary: positions one too low in decode steps",
        {ROPE: _moved(lambda p: p - (p[:, :1] > 0))},
        "a decode step's position is the length of the cache before it",
    ),
    Bug(
        "rotary: YaRN ignored",
        {ROPE: _configured(rope_scaling=None)},
        "rope_scaling, or rope_parameters with rope_type yarn: other frequencies, and a factor on cos and sin",
        _has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor dropped",
        {ROPE: _yarn(lambda yarn, factor: replace(yarn, attention_factor=1.0))},
        "cos and sin, of q and k both, are multiplied by 0.1 ln(factor) + 1",
        _has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor not read",
        {ROPE: _yarn(lambda yarn, _: replace(yarn, attention_factor=None, mscale=None, mscale_all_dim=None))},
        "attention_factor, or mscale and mscale_all_dim, are read from config.json where they are there",
        lambda c: c.rope_scaling is not None and attention_factor(c) != 0.1 * math.log(c.rope_scaling.factor) + 1,
    ),
    Bug(
        "rotary: YaRN's attention factor squared",
        {ROPE: _yarn(lambda yarn, factor: replace(yarn, attention_factor=factor**2))},
        "cos and sin are multiplied by the factor once; the scores are not multiplied again",
        _has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor squared",  # in the scale of the scores too
        {"self_attn.scores": _scaled(lambda c: attention_factor(c) ** 2)},
        "cos and sin are multiplied by the factor once; the scores are not multiplied again",
        _has_yarn,
    ),
    Bug(
        "attention: scale from hidden_size / heads",
        {"self_attn.scores": _scaled(lambda c: math.sqrt(c.head_dim * c.num_attention_heads / c.hidden_size))},
        "head_dim is read from config.json: the scale is head_dim ** -0.5",
    ),
    Bug(
        "attention: scale from hidden_size / heads",
        {"self_attn.scores": _scaled(lambda c: math.sqrt(c.head_dim / (c.hidden_size // c.num_attention_heads)))},
        "head_dim is read from config.json: the scale is head_dim ** -0.5",
        lambda c: c.hidden_size >= c.num_attention_heads and c.hidden_size % c.num_attention_heads > 0,
    ),
    Bug(
        "attention: scores not scaled",
        {"self_attn.scores": _scaled(lambda c: math.sqrt(c.head_dim))},
        "the scale is head_dim ** -0.5",
    ),
    Bug(
        "attention: KV heads tiled instead of repeated",
        {"self_attn.scores": _tiled, "self_attn.context": _tiled},
        "query head h reads KV head h // (H / K): repeat_interleave, not repeat",
        lambda c: 1 < c.num_key_value_heads < c.num_attention_heads,
    ),
    Bug(
        "attention: causal mask off by one",
        {"self_attn.scores": _seeing(lambda total: 1)},
        "a query sees its own position and those before it",
    ),
    Bug(
        "attention: causal mask missing",
        {"self_attn.scores": _seeing(lambda total: total)},
        "a query sees its own position and those before it",
    ),
    Bug(
        "attention: sliding window ignored",
        {"self_attn.scores": _configured(sliding_window=None, layer_types=())},
        "sliding_window, in the layers that layer_types or max_window_layers name",
        _slides,
    ),
    Bug(
        "attention: sliding window in the wrong layers",
        {"self_attn.scores": _reconfigured(_slid_elsewhere)},
        "layer_types says which layers slide; without it those from max_window_layers on",
        _slides_in_part,
    ),
    Bug(
        "attention: sliding window in the wrong layers",
        {"self_attn.scores": _configured(layer_types=(), max_window_layers=0)},
        "layer_types says which layers slide; without it those from max_window_layers on",
        _slides_in_part,
    ),
    Bug(
        "attention: sliding window one too long",
        {"self_attn.scores": _wider(1)},
        "a position sees sliding_window positions, itself the last of them",
        _slides,
    ),
    Bug(
        "attention: sliding window one too short",
        {"self_attn.scores": _wider(-1)},
        "a position sees sliding_window positions, itself the last of them",
        lambda c: _slides(c) and c.sliding_window != 1,
    ),
    Bug(
        "mlp: gate and up swapped",
        {
            "mlp.gate_proj": _with_weights_of("gate_proj", "up_proj"),
            "mlp.up_proj": _with_weights_of("up_proj", "gate_proj"),
            "mlp.experts": _within_experts(lambda gate, up: silu(up) * gate),
        },
        "silu is applied to gate_proj; see how a joined matrix is cut",
    ),
    Bug(
        "mlp: gate and up swapped",
        {"mlp.act": _exchanged, "mlp.experts": _within_experts(lambda gate, up: silu(up) * gate)},
        "silu is applied to gate_proj; see how a joined matrix is cut",
    ),
    Bug(
        "mlp: GELU instead of SiLU",
        {"mlp.act": _activated(_gelu), "mlp.experts": _within_experts(lambda gate, up: _gelu(gate) * up)},
        "hidden_act is silu: x / (1 + exp(-x))",
    ),
    Bug(
        "mlp: GELU instead of SiLU",
        {"mlp.act": _activated(_gelu_tanh), "mlp.experts": _within_experts(lambda gate, up: _gelu_tanh(gate) * up)},
        "hidden_act is silu: x / (1 + exp(-x))",
    ),
    Bug(
        "experts: weights not normalised",
        {"mlp.router_weights": _configured(norm_topk_prob=False)},
        "with norm_topk_prob the weights of the chosen experts are divided by their sum",
        lambda c: _is_sparse(c) and c.norm_topk_prob and c.num_experts_per_tok < c.num_experts,
    ),
    Bug(
        "experts: weights normalised",
        {"mlp.router_weights": _configured(norm_topk_prob=True)},
        "without norm_topk_prob the weights are those of the softmax over all experts",
        lambda c: _is_sparse(c) and not c.norm_topk_prob and c.num_experts_per_tok < c.num_experts,
    ),
    Bug(
        "experts: router logits as weights",
        {"mlp.router_weights": _logits_as_weights},
        "the weights are probabilities: a softmax over all experts, before the largest are chosen",
        _is_sparse,
    ),
    Bug(
        "experts: router logits as weights",
        {"mlp.router_weights": _logits_normalised},
        "the weights are probabilities: a softmax over all experts, before the largest are chosen",
        lambda c: _is_sparse(c) and c.norm_topk_prob,
    ),
    Bug(
        "head: tied to the embedding",
        {"lm_head": _configured(tie_word_embeddings=True)},
        "tie_word_embeddings is read from config.json; lm_head.weight is a matrix of its own",
        lambda c: not c.tie_word_embeddings,
    ),
    Bug(
        "linear: bias left out",
        {"self_attn.[qkv]_proj": _configured(attention_bias=False)},
        "with attention_bias the projections have a bias",
        lambda c: c.attention_bias,
    ),
)
