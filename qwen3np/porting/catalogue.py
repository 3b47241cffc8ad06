"""Bugs that ports of Qwen3 have had: each a small change of one point, or of a few points that it affects together.

To add one, add to BUGS its name, what it does to which points, and where to look. changes.py has the building blocks.
Bugs with an unknown number, such as another theta, are in fits.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qwen3np.ops.plain import silu
from qwen3np.porting.changes import (
    Bug,
    activated,
    blind_to_itself,
    configured,
    exchanged,
    exchanged_tables,
    fewer_experts,
    gelu,
    gelu_tanh,
    has_yarn,
    interleaved,
    is_sparse,
    logits_as_weights,
    logits_normalised,
    lost,
    moved,
    normalised_after,
    not_normalised,
    not_rotated,
    one_plus_weight,
    outside_the_root,
    over_all_heads,
    placed,
    reconfigured,
    rotated,
    rotated_before,
    scaled,
    seeing,
    slid_elsewhere,
    slides,
    slides_in_part,
    tiled,
    to_bfloat16,
    wider,
    with_weights_of,
    with_yarn,
    within_experts,
)
from qwen3np.rope import attention_factor

NORMS, LAYER_NORMS, HEAD_NORMS, ROPE = "*norm", "[!s]*norm", "self_attn.[qk]_norm", "self_attn.[qk]_rope"
EPS_LOOK = "rms_norm_eps is read from config.json, and handed on to every norm"
# Bugs with the same name are variants of one bug. `applies` restricts a bug to models that can have it.
BUGS = (
    Bug(
        "norm: q/k norm missing",
        {HEAD_NORMS: not_normalised},
        "every head of q and k is normalised, with q_norm.weight and k_norm.weight, in all code paths",
    ),
    Bug(
        "norm: q/k norm after RoPE",
        {HEAD_NORMS: not_normalised, ROPE: normalised_after},
        "the order is projection, norm, rotation",
    ),
    Bug(
        "norm: q/k norm after RoPE",  # as a port records it that calls the result of its norm q_norm
        {HEAD_NORMS: rotated_before, ROPE: not_rotated},
        "the order is projection, norm, rotation",
    ),
    Bug(
        "norm: q/k norm over all heads together",
        {HEAD_NORMS: over_all_heads},
        "reshape to (..., heads, head_dim) before q_norm and k_norm: the mean is that of one head",
    ),
    Bug(
        "norm: q_norm and k_norm swapped",
        {
            "self_attn.q_norm": with_weights_of("q_norm", "k_norm"),
            "self_attn.k_norm": with_weights_of("k_norm", "q_norm"),
        },
        "the names under which the two weights are loaded",
    ),
    Bug(
        "norm: multiplied by 1 + weight",
        {NORMS: placed(one_plus_weight)},
        "Qwen3 multiplies by the weight itself; 1 + weight is Gemma's",
    ),
    Bug("norm: left out", {LAYER_NORMS: not_normalised}, "the call of this norm, in all code paths"),
    Bug("norm: rms_norm_eps is 1e-5", {NORMS: configured(rms_norm_eps=1e-5)}, EPS_LOOK),
    Bug("norm: rms_norm_eps is 1e-5", {HEAD_NORMS: configured(rms_norm_eps=1e-5)}, EPS_LOOK),
    Bug("norm: rms_norm_eps is 1e-5", {LAYER_NORMS: configured(rms_norm_eps=1e-5)}, EPS_LOOK),
    Bug(
        "norm: eps outside of the root", {NORMS: outside_the_root}, "x / sqrt(mean(x²) + eps): eps is added to the mean"
    ),
    Bug(
        "rotary: rope_theta is 10,000",
        {ROPE: configured(rope_theta=1e4)},
        "newer config.json files keep it in rope_parameters.rope_theta",
    ),
    Bug(
        "rotary: interleaved instead of half rotation",
        {ROPE: interleaved},
        "lane i is paired with lane i + head_dim / 2, unless the rows of q_proj and k_proj are permuted",
    ),
    Bug(
        "rotary: cos and sin in bfloat16",
        {ROPE: rotated(tables=to_bfloat16)},
        "the tables are made and kept in float32",
    ),
    Bug(
        "rotary: angles in bfloat16",
        {ROPE: rotated(angles=to_bfloat16)},
        "bfloat16 rounds position 257 to 256; positions and angles are float32",
    ),
    Bug(
        "rotary: inv_freq in bfloat16",
        {ROPE: rotated(frequencies=to_bfloat16)},
        "a cast of the whole model takes inv_freq along; it is float32",
    ),
    Bug(
        "rotary: sign of sin flipped",
        {ROPE: moved(np.negative)},
        "a pair (a, b) becomes (a cos - b sin, b cos + a sin)",
    ),
    Bug(
        "rotary: cos and sin exchanged",
        {ROPE: exchanged_tables},
        "a pair (a, b) becomes (a cos - b sin, b cos + a sin)",
    ),
    Bug("rotary: positions begin at 1", {ROPE: moved(lambda p: p + 1)}, "positions of q and k begin at 0"),
    Bug(
        "rotary: positions start again in decode steps",
        {ROPE: moved(lambda p: p - p[:, :1])},
        "a decode step's position is the length of the cache",
    ),
    Bug(
        "rotary: positions one too high in decode steps",
        {ROPE: moved(lambda p: p + (p[:, :1] > 0))},
        "a decode step's position is the length of the cache before it",
    ),
    Bug(
        "rotary: positions one too low in decode steps",
        {ROPE: moved(lambda p: p - (p[:, :1] > 0))},
        "a decode step's position is the length of the cache before it",
    ),
    Bug(
        "rotary: YaRN ignored",
        {ROPE: configured(rope_scaling=None)},
        "rope_scaling, or rope_parameters with rope_type yarn: other frequencies, and a factor on cos and sin",
        has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor dropped",
        {ROPE: with_yarn(lambda yarn, factor: replace(yarn, attention_factor=1.0))},
        "cos and sin, of q and k both, are multiplied by 0.1 ln(factor) + 1",
        has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor not read",
        {ROPE: with_yarn(lambda yarn, _: replace(yarn, attention_factor=None, mscale=None, mscale_all_dim=None))},
        "attention_factor, or mscale and mscale_all_dim, are read from config.json where they are there",
        lambda c: c.rope_scaling is not None and attention_factor(c) != 0.1 * math.log(c.rope_scaling.factor) + 1,
    ),
    Bug(
        "rotary: YaRN's attention factor squared",
        {ROPE: with_yarn(lambda yarn, factor: replace(yarn, attention_factor=factor**2))},
        "cos and sin are multiplied by the factor once; the scores are not multiplied again",
        has_yarn,
    ),
    Bug(
        "rotary: YaRN's attention factor squared",  # in the scale of the scores too
        {"self_attn.scores": scaled(lambda c: attention_factor(c) ** 2)},
        "cos and sin are multiplied by the factor once; the scores are not multiplied again",
        has_yarn,
    ),
    Bug(
        "attention: scale from hidden_size / heads",
        {"self_attn.scores": scaled(lambda c: math.sqrt(c.head_dim * c.num_attention_heads / c.hidden_size))},
        "head_dim is read from config.json: the scale is head_dim ** -0.5",
    ),
    Bug(
        "attention: scale from hidden_size / heads",
        {"self_attn.scores": scaled(lambda c: math.sqrt(c.head_dim / (c.hidden_size // c.num_attention_heads)))},
        "head_dim is read from config.json: the scale is head_dim ** -0.5",
        lambda c: c.hidden_size >= c.num_attention_heads and c.hidden_size % c.num_attention_heads > 0,
    ),
    Bug(
        "attention: scores not scaled",
        {"self_attn.scores": scaled(lambda c: math.sqrt(c.head_dim))},
        "the scale is head_dim ** -0.5",
    ),
    Bug(
        "attention: KV heads tiled instead of repeated",
        {"self_attn.scores": tiled, "self_attn.context": tiled},
        "query head h reads KV head h // (H / K): repeat_interleave, not repeat",
        lambda c: 1 < c.num_key_value_heads < c.num_attention_heads,
    ),
    Bug(
        "attention: causal mask off by one",
        {"self_attn.scores": seeing(lambda total: 1)},
        "a query sees its own position and those before it",
    ),
    Bug(
        "attention: causal mask missing",
        {"self_attn.scores": seeing(lambda total: total)},
        "a query sees its own position and those before it",
    ),
    Bug(
        "attention: a position does not see itself",
        {"self_attn.scores": blind_to_itself},
        "a query sees its own position and those before it",
    ),
    Bug(
        "attention: a decode step's own key and value are lost",
        {"self_attn.scores": lost, "self_attn.context": lost},
        "a decode step is written to the cache at its position, before it is read",
    ),
    Bug(
        "attention: sliding window ignored",
        {"self_attn.scores": configured(sliding_window=None, layer_types=())},
        "sliding_window, in the layers that layer_types or max_window_layers name",
        slides,
    ),
    Bug(
        "attention: sliding window in the wrong layers",
        {"self_attn.scores": reconfigured(slid_elsewhere)},
        "layer_types says which layers slide; without it those from max_window_layers on",
        slides_in_part,
    ),
    Bug(
        "attention: sliding window in the wrong layers",
        {"self_attn.scores": configured(layer_types=(), max_window_layers=0)},
        "layer_types says which layers slide; without it those from max_window_layers on",
        slides_in_part,
    ),
    Bug(
        "attention: sliding window one too long",
        {"self_attn.scores": wider(1)},
        "a position sees sliding_window positions, itself the last of them",
        slides,
    ),
    Bug(
        "attention: sliding window one too short",
        {"self_attn.scores": wider(-1)},
        "a position sees sliding_window positions, itself the last of them",
        lambda c: slides(c) and c.sliding_window != 1,
    ),
    Bug(
        "mlp: gate and up swapped",
        {
            "mlp.gate_proj": with_weights_of("gate_proj", "up_proj"),
            "mlp.up_proj": with_weights_of("up_proj", "gate_proj"),
            "mlp.experts": within_experts(lambda gate, up: silu(up) * gate),
        },
        "silu is applied to gate_proj; see how a joined matrix is cut",
    ),
    Bug(
        "mlp: gate and up swapped",
        {"mlp.act": exchanged, "mlp.experts": within_experts(lambda gate, up: silu(up) * gate)},
        "silu is applied to gate_proj; see how a joined matrix is cut",
    ),
    Bug(
        "mlp: GELU instead of SiLU",
        {"mlp.act": activated(gelu), "mlp.experts": within_experts(lambda gate, up: gelu(gate) * up)},
        "hidden_act is silu: x / (1 + exp(-x))",
    ),
    Bug(
        "mlp: GELU instead of SiLU",
        {"mlp.act": activated(gelu_tanh), "mlp.experts": within_experts(lambda gate, up: gelu_tanh(gate) * up)},
        "hidden_act is silu: x / (1 + exp(-x))",
    ),
    Bug(
        "experts: weights not normalised",
        {"mlp.router_weights": configured(norm_topk_prob=False)},
        "with norm_topk_prob the weights of the chosen experts are divided by their sum",
        lambda c: is_sparse(c) and c.norm_topk_prob and c.num_experts_per_tok < c.num_experts,
    ),
    Bug(
        "experts: weights normalised",
        {"mlp.router_weights": configured(norm_topk_prob=True)},
        "without norm_topk_prob the weights are those of the softmax over all experts",
        lambda c: is_sparse(c) and not c.norm_topk_prob and c.num_experts_per_tok < c.num_experts,
    ),
    Bug(
        "experts: one expert too few",
        {"mlp.experts": fewer_experts},
        "num_experts_per_tok of them are summed",
        lambda c: is_sparse(c) and c.num_experts_per_tok > 1,
    ),
    Bug(
        "experts: router logits as weights",
        {"mlp.router_weights": logits_as_weights},
        "the weights are probabilities: a softmax over all experts, before the largest are chosen",
        is_sparse,
    ),
    Bug(
        "experts: router logits as weights",
        {"mlp.router_weights": logits_normalised},
        "the weights are probabilities: a softmax over all experts, before the largest are chosen",
        lambda c: is_sparse(c) and c.norm_topk_prob,
    ),
    Bug(
        "head: tied to the embedding",
        {"lm_head": configured(tie_word_embeddings=True)},
        "tie_word_embeddings is read from config.json; lm_head.weight is a matrix of its own",
        lambda c: not c.tie_word_embeddings,
    ),
    Bug(
        "linear: bias left out",
        {"self_attn.[qkv]_proj": configured(attention_bias=False)},
        "with attention_bias the projections have a bias",
        lambda c: c.attention_bias,
    ),
)
