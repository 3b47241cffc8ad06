"""Qwen3 on one page: token ids in, logits out (Qwen3 technical report, 2025, https://arxiv.org/abs/2505.09388).

    x = embedding[ids]
    for each layer:
        x = x + attention(norm(x))
        x = x + mlp(norm(x))                a mixture of experts in sparse layers
    logits = norm(x) headᵀ

Every function is stateless: arrays, a dictionary of weights with Hugging Face's tensor names, and the config go in.

Shapes: B batch, S new positions, T attended positions, D hidden, H query heads, K key/value heads, G = H / K,
Dh head_dim, F intermediate, V vocabulary, E experts, k experts for each token.

`num` says where numbers are rounded: R(x) rounds to bfloat16 where transformers does, and is x itself in float32 and
float64, so it can be ignored on a first reading. `num.ops` are the few operations below this page: linear, head,
attend, combine, softmax, silu, mean_square, total and rowwise. ops/plain.py has each of them as its formula; the other
engines compute the same faster, or exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.numerics import FLOAT32, Array, Edit, Numerics, Trace
from qwen3np.rope import rotary_tables


@dataclass(slots=True)
class Scope:
    """The weights of one module, and whoever watches its points: scope["q_proj.weight"], scope / "self_attn"."""

    weights: Mapping[str, Array]
    trace: Trace | None = None
    edit: Edit | None = None
    prefix: str = ""

    @classmethod
    def of(cls, weights: Mapping[str, Array] | Scope) -> Scope:
        """Return the scope of a plain dictionary; a scope as it is."""
        return weights if isinstance(weights, Scope) else cls(weights)

    def __truediv__(self, name: str) -> Scope:
        """Return the scope of a module inside this one."""
        return Scope(self.weights, self.trace, self.edit, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Array:
        """Return a tensor of this module."""
        return self.weights[self.prefix + name]

    def out(self, name: str, x: Array) -> Array:
        """Pass x on as the point `name`: edit may replace it, trace sees what goes on."""
        if self.edit is not None and (edited := self.edit(self.prefix + name, x)) is not None:
            x = edited
        if self.trace is not None:
            self.trace(self.prefix + name, x)
        return x


def forward(
    weights: Mapping[str, Array],
    config: Config,
    ids: Array,
    cache: KVCache | None = None,
    num: Numerics = FLOAT32,
    *,
    last_only: bool = False,
    head: bool = True,
    trace: Trace | None = None,
    edit: Edit | None = None,
) -> Array:
    """Return the logits of the token after each position: ids (B, S) -> (B, S, V), or (B, 1, V) with last_only.

    Without the head: the hidden states after the final norm, (B, S, D) or (B, 1, D). With a cache, the ids of row b
    follow the cache.lengths[b] positions that it holds, and are added to them.
    """
    m = Scope(weights, trace, edit)
    start = np.zeros(len(ids), np.int64) if cache is None else cache.lengths[cache.rows]
    tables = rotary_tables(config, start[:, None] + np.arange(ids.shape[1]), num)

    x = m.out("model.embed_tokens", num.widen(m["model.embed_tokens.weight"][ids]))  # (B, S, D)
    for n in range(config.num_hidden_layers):
        x = m.out(f"model.layers.{n}", block(x, m / f"model.layers.{n}", n, config, tables, cache, num))
    x = m.out("model.norm", rms_norm(x[:, -1:] if last_only else x, m["model.norm.weight"], config.rms_norm_eps, num))
    if head:
        matrix = m["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        x = m.out("lm_head", num.ops.head(x, matrix, num))  # (B, S, V)
    if cache is not None:
        cache.advance(ids)
    return x


def block(
    x: Array,
    weights: Mapping[str, Array] | Scope,
    layer: int,
    config: Config,
    tables: tuple[Array, Array],
    cache: KVCache | None = None,
    num: Numerics = FLOAT32,
) -> Array:
    """One decoder layer: h = x + attention(norm(x)), then h + mlp(norm(h)). x (B, S, D) -> (B, S, D)."""
    m = Scope.of(weights)

    def norm(name: str, x: Array) -> Array:
        return m.out(name, rms_norm(x, m[f"{name}.weight"], config.rms_norm_eps, num))

    def add(x: Array, h: Array) -> Array:
        return num.ops.rowwise(lambda x, h: num.round(x + h), x, h)

    h = attention(norm("input_layernorm", x), m / "self_attn", layer, config, tables, cache, num)
    x = m.out("attn_residual", add(x, h))
    h = norm("post_attention_layernorm", x)
    h = mixture(h, m / "mlp", config, num) if config.is_sparse(layer) else swiglu(h, m / "mlp", num)
    return add(x, h)


def rms_norm(x: Array, weight: Array, eps: float, num: Numerics = FLOAT32) -> Array:
    """Return weight * x / sqrt(mean(x²) + eps), the mean over the last axis. x (..., N), weight (N,) -> (..., N).

    It brings each vector to a root mean square of 1 (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
    bfloat16 rounds twice (Qwen3RMSNorm in transformers, models/qwen3/modeling_qwen3.py).
    """
    R, weight = num.round, num.widen(weight)

    def norm(x: Array) -> Array:
        return R(R(x * (1 / np.sqrt(num.ops.mean_square(x) + eps))) * weight)

    return num.ops.rowwise(norm, x.reshape(-1, x.shape[-1])).reshape(x.shape)


def rotate(x: Array, tables: tuple[Array, Array], num: Numerics = FLOAT32) -> Array:
    """Turn each pair of lanes (a, b) = (i, i + Dh/2) by the angle of its position: (a cos - b sin, b cos + a sin).

    x (B, heads, S, Dh) -> the same shape; tables are the cosines and sines (B, 1, S, Dh/2) of rope.rotary_tables (Su et
    al., 2021, https://arxiv.org/abs/2104.09864).
    """
    R, half = num.round, x.shape[-1] // 2

    def turn(x: Array, cos: Array, sin: Array) -> Array:
        a, b = x[..., :half], x[..., half:]
        return R(np.concatenate([R(a * cos) - R(b * sin), R(b * cos) + R(a * sin)], axis=-1))

    return num.ops.rowwise(turn, x, *tables)


def attention(
    x: Array,
    weights: Mapping[str, Array] | Scope,
    layer: int,
    config: Config,
    tables: tuple[Array, Array],
    cache: KVCache | None = None,
    num: Numerics = FLOAT32,
) -> Array:
    """Return softmax(q kᵀ / sqrt(Dh)) v, causal, in heads. x (B, S, D) -> (B, S, D).

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; G query heads share a key/value head: Ainslie et al., 2023,
    https://arxiv.org/abs/2305.13245; norms on queries and keys: Qwen3 technical report.
    """
    m, bias = Scope.of(weights), config.attention_bias

    def heads(x: Array) -> Array:  # (B, S, heads * Dh) -> (B, S, heads, Dh)
        return x.reshape(*x.shape[:2], -1, config.head_dim)

    def norm(name: str, x: Array) -> Array:
        return m.out(name, rms_norm(heads(x), m[f"{name}.weight"], config.rms_norm_eps, num))

    q, k, v = num.ops.linear(x, m, ("q_proj", "k_proj", "v_proj"), num, bias)
    q, k, v = (x.swapaxes(1, 2) for x in (norm("q_norm", q), norm("k_norm", k), heads(v)))  # (B, heads, S, Dh)
    q, k = m.out("q_rope", rotate(q, tables, num)), m.out("k_rope", rotate(k, tables, num))
    keys, values = (k, v) if cache is None else cache.write(layer, k, v)  # of each sequence: (K, T, Dh)
    context = m.out("context", num.ops.attend(q, keys, values, config.window(layer), m, num))  # (B, S, H * Dh)
    return num.ops.linear(context, m, ("o_proj",), num, bias)[0]


def swiglu(x: Array, weights: Mapping[str, Array] | Scope, num: Numerics = FLOAT32) -> Array:
    """Return (silu(x gateᵀ) * (x upᵀ)) downᵀ. x (..., D) -> (..., D), through (..., F).

    silu of the one says how much of the other passes (Shazeer, 2020, https://arxiv.org/abs/2002.05202).
    """
    m, R = Scope.of(weights), num.round

    def act(gate: Array, up: Array) -> Array:
        return R(R(num.ops.silu(gate)) * up)

    gate, up = num.ops.linear(x, m, ("gate_proj", "up_proj"), num)
    return num.ops.linear(m.out("act", num.ops.rowwise(act, gate, up)), m, ("down_proj",), num)[0]


def mixture(x: Array, weights: Mapping[str, Array] | Scope, config: Config, num: Numerics = FLOAT32) -> Array:
    """Return the sum of each token's k most probable experts, weighted by their probabilities. x (B, S, D) -> the same.

    Shazeer et al., 2017, https://arxiv.org/abs/1701.06538; the softmax goes over all E experts before k are chosen:
    Qwen3 technical report.
    """
    m = Scope.of(weights)
    (logits,) = num.ops.linear(x, m, ("gate",), num)  # (B, S, E)
    probs = num.ops.softmax(logits) + 0 * num.ops.total(logits)  # an infinite logit makes NaN, not an expert unused
    chosen = m.out("router_indices", top_k(probs, config.num_experts_per_tok))  # (B, S, k)
    p = m.out("router_weights", router_weights(probs, chosen, config, num))
    quiet = replace(m / "experts", trace=None, edit=None)  # nothing inside an expert is a point

    def expert(n: int, rows: Array) -> Array:
        return swiglu(rows, quiet / str(n), num)

    return m.out("experts", num.ops.combine(x, chosen, p, expert, quiet, num))


def top_k(probs: Array, k: int) -> Array:
    """Return the k most probable experts, the largest first; of equal ones the lower numbers. (..., E) -> (..., k)."""
    return np.argsort(-probs, axis=-1, kind="stable")[..., :k]


def router_weights(probs: Array, chosen: Array, config: Config, num: Numerics = FLOAT32) -> Array:
    """Return the probabilities of the chosen experts, divided by their sum if norm_topk_prob. -> (..., k)."""
    p = np.take_along_axis(probs, chosen, axis=-1)
    return num.round(p / num.ops.total(p) if config.norm_topk_prob else p)
