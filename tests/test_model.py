"""forward, against a second forward that shares no code with it and is written only to be right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from drawing import SEEDS, draw_any_config, draw_ids, relative, round_bfloat16, trained_like
from hypothesis import given, settings
from threadpoolctl import threadpool_limits

from qwen3np import KVCache, forward
from qwen3np.numerics import BFLOAT16, NUMERICS


def naive(weights, config, ids):
    """Return every recorded point of one sequence, without the batch axis, in float64."""
    c, dh, points = config, config.head_dim, {}
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    speeds, size = [c.rope_theta ** (-2 * i / dh) for i in range(dh // 2)], 1.0
    if c.rope_scaling:
        speeds, size = slowed(speeds, c.rope_scaling, c.rope_theta, dh)
    turns = size * np.exp(1j * np.outer(np.arange(len(ids)), speeds))[:, None]  # (S, 1, Dh/2)

    def norm(x, name):
        return x / np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + c.rms_norm_eps) * w[name + ".weight"]

    def project(x, name):
        return np.einsum("si,oi->so", x, w[name + ".weight"]) + w.get(name + ".bias", 0.0)

    def rotated(x):  # (S, heads, Dh) -> (heads, S, Dh)
        pairs = (x[..., : dh // 2] + 1j * x[..., dh // 2 :]) * turns
        return np.concatenate([pairs.real, pairs.imag], -1).transpose(1, 0, 2)

    x = points["model.embed_tokens"] = w["model.embed_tokens.weight"][ids]
    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}"
        p = {}
        h = p["input_layernorm"] = norm(x, f"{layer}.input_layernorm")
        for name in ("q", "k", "v"):
            p[f"self_attn.{name}_proj"] = project(h, f"{layer}.self_attn.{name}_proj")
        q, k, v = (p[f"self_attn.{name}_proj"].reshape(len(ids), -1, dh) for name in "qkv")
        p["self_attn.q_norm"], p["self_attn.k_norm"] = q, k = (
            norm(q, f"{layer}.self_attn.q_norm"),
            norm(k, f"{layer}.self_attn.k_norm"),
        )
        p["self_attn.q_rope"], p["self_attn.k_rope"] = q, k = rotated(q), rotated(k)
        scores = np.full((len(q), len(ids), len(ids)), -np.inf)
        probs, context = np.zeros_like(scores), np.zeros((len(ids), len(q), dh))
        for head, s in np.ndindex(len(q), len(ids)):
            group, seen = head // (len(q) // len(k)), slice(max(s + 1 - (c.window(n) or s + 1), 0), s + 1)
            scores[head, s, seen] = k[group, seen] @ q[head, s] / dh**0.5
            probs[head, s] = np.exp(scores[head, s]) / np.exp(scores[head, s]).sum()
            context[s, head] = probs[head, s] @ v[:, group]
        p["self_attn.scores"], p["self_attn.probs"] = scores, probs
        p["self_attn.context"] = context.reshape(len(ids), -1)
        p["self_attn.o_proj"] = project(p["self_attn.context"], f"{layer}.self_attn.o_proj")
        x = p["attn_residual"] = x + p["self_attn.o_proj"]
        h = p["post_attention_layernorm"] = norm(x, f"{layer}.post_attention_layernorm")
        if f"{layer}.mlp.gate.weight" in w:
            logits = p["mlp.gate"] = project(h, f"{layer}.mlp.gate")
            chosen = p["mlp.router_indices"] = np.empty((len(ids), c.num_experts_per_tok), int)
            shares, y = np.empty(chosen.shape), np.zeros(h.shape)
            for s, row in enumerate(logits):
                chosen[s] = sorted(range(len(row)), key=lambda e, row=row: -row[e])[: c.num_experts_per_tok]
                shares[s] = np.exp(row[chosen[s]]) / (np.exp(row[chosen[s]] if c.norm_topk_prob else row)).sum()
                for e, share in zip(chosen[s], shares[s], strict=True):
                    gate, up = (
                        project(h[s : s + 1], f"{layer}.mlp.experts.{e}.{name}_proj") for name in ("gate", "up")
                    )
                    y[s] += share * project(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.experts.{e}.down_proj")[0]
            p["mlp.router_weights"], p["mlp.experts"] = shares, y
        else:
            gate = p["mlp.gate_proj"] = project(h, f"{layer}.mlp.gate_proj")
            up = p["mlp.up_proj"] = project(h, f"{layer}.mlp.up_proj")
            p["mlp.act"] = gate / (1 + np.exp(-gate)) * up
            y = p["mlp.down_proj"] = project(p["mlp.act"], f"{layer}.mlp.down_proj")
        x = x + y
        points |= {f"{layer}.{name}": array for name, array in p.items()}
        points[layer] = x
    x = points["model.norm"] = norm(x, "model.norm")
    points["lm_head"] = project(x, "model.embed_tokens" if c.tie_word_embeddings else "lm_head")
    return points


def slowed(speeds, yarn, theta, dh):
    """Return what YaRN makes of the speeds of the lanes, and the factor of queries and keys."""
    low, high = (
        dh * np.log(yarn.original_max_position_embeddings / (2 * np.pi * turns)) / (2 * np.log(theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dh - 1)
    high += 0.001 * (low == high)
    shares = [min(max((i - low) / (high - low), 0), 1) for i in range(dh // 2)]
    size = 0.1 * np.log(yarn.factor) + 1
    if yarn.mscale is not None:
        size = (0.1 * yarn.mscale * np.log(yarn.factor) + 1) / (0.1 * yarn.mscale_all_dim * np.log(yarn.factor) + 1)
    speeds = [share * speed / yarn.factor + (1 - share) * speed for share, speed in zip(shares, speeds, strict=True)]
    return speeds, yarn.attention_factor or size


def traced(*args, **kwargs):
    """Return the logits and the recorded points, in order."""
    points = []
    logits = forward(*args, **kwargs, trace=lambda name, array: points.append((name, array)))
    assert len(dict(points)) == len(points)
    return logits, dict(points)


@given(SEEDS)
def test_float64_equals_an_independent_forward_at_every_point(seed):
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights, ids = trained_like(config, seed), draw_ids(rng, config, int(rng.integers(1, 40)))
    logits, points = traced(weights, config, ids, numerics="float64")
    truth = naive(weights, config, ids)
    assert list(points) == list(truth)  # the order too
    for name, array in truth.items():
        assert points[name].dtype == (np.int64 if name.endswith("indices") else np.float64)
        assert points[name].shape == (1, *array.shape)
        hidden = np.isneginf(array)
        np.testing.assert_array_equal(np.isneginf(points[name][0]), hidden)
        assert relative(points[name][0][~hidden], array[~hidden]) < 5e-14, name  # measured: 1e-14
    np.testing.assert_array_equal(logits, points["lm_head"])


@given(SEEDS)
@settings(max_examples=10)
def test_float32_is_as_near_to_float64_as_float32_allows(seed):
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights, ids = trained_like(config, seed), draw_ids(rng, config, 120)
    logits = forward(weights, config, ids)
    assert logits.dtype == np.float32
    assert relative(logits, forward(weights, config, ids, numerics="float64")) < 6e-6  # measured: 2.3e-6


@pytest.mark.parametrize("numerics", NUMERICS)
def test_no_later_token_moves_an_earlier_row(weights, config, numerics):
    ids = draw_ids(np.random.default_rng(0), config, 2, 17)
    before, points = traced(weights, config, ids, numerics=numerics)
    for s in (0, 1, 8, 15):
        changed = ids.copy()
        changed[:, s + 1 :] = (changed[:, s + 1 :] + 1) % config.vocab_size
        after, others = traced(weights, config, changed, numerics=numerics)
        np.testing.assert_array_equal(after[:, : s + 1], before[:, : s + 1])
        for name, array in points.items():
            axis = 2 if name.endswith(("rope", "scores", "probs")) else 1
            rows = (slice(None),) * axis + (slice(s + 1),)
            np.testing.assert_array_equal(others[name][rows], array[rows], name)


def test_bfloat16_rounds_every_step(config):
    """The steps between matrix products, from the recorded input of each, with integer rounding."""
    config, r = replace(config, attention_bias=True), round_bfloat16
    weights = {name: w.astype(BFLOAT16) for name, w in trained_like(config, 1).items()}
    w32 = {name: w.astype(np.float32) for name, w in weights.items()}
    ids = draw_ids(np.random.default_rng(1), config, 2, 50)
    logits, points = traced(weights, config, ids, numerics="bfloat16")
    assert logits.dtype == np.float32
    for name, array in points.items():
        np.testing.assert_array_equal(array, r(array), name)

    def norm(x, name):
        mean = np.mean(x.astype(np.float64) ** 2, -1, keepdims=True)
        return r(w32[name + ".weight"] * r((x / np.sqrt(mean + config.rms_norm_eps)).astype(np.float32)))

    x = points["model.embed_tokens"]
    np.testing.assert_array_equal(x, w32["model.embed_tokens.weight"][ids])
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        p = {name.removeprefix(layer + "."): array for name, array in points.items() if name.startswith(layer)}
        gate, up = p["mlp.gate_proj"], p["mlp.up_proj"]
        pairs = [
            (p["input_layernorm"], norm(x, f"{layer}.input_layernorm")),
            (p["attn_residual"], r(x + p["self_attn.o_proj"])),
            (p["post_attention_layernorm"], norm(p["attn_residual"], f"{layer}.post_attention_layernorm")),
            (p["mlp.act"], r(r((gate / (1 + np.exp(-gate.astype(np.float64)))).astype(np.float32)) * up)),
            (points[layer], r(p["attn_residual"] + p["mlp.down_proj"])),
        ]
        for head in ("q", "k"):
            split = p[f"self_attn.{head}_proj"].reshape(2, 50, -1, config.head_dim)
            pairs.append((p[f"self_attn.{head}_norm"], norm(split, f"{layer}.self_attn.{head}_norm")))
        for array, truth in pairs:
            # an ulp of the float32 exp or mean tips a tie now and then; each rounding left out changes 15 % or more
            assert np.mean(array != truth) < 1e-3
        x = points[layer]
    assert np.mean(points["model.norm"] != norm(x, "model.norm")) < 1e-3


@pytest.mark.parametrize("numerics", NUMERICS)
def test_recorded_arrays_are_right_for_ragged_sequences_and_stay_as_they_are(weights, config, numerics):
    cache = KVCache.allocate(config, 2, 12, np.float64)
    ids = draw_ids(np.random.default_rng(2), config, 2, 5)
    forward(weights, config, ids, cache, numerics=numerics)
    cache.lengths[:] = 5, 2
    kept, copies = {}, {}

    def record(name, array):
        kept[name], copies[name] = array, array.copy()

    forward(weights, config, ids[:, :3], cache, numerics=numerics, trace=record)
    heads, kv_heads, dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = {
        "q_norm": (2, 3, heads, dh),
        "k_norm": (2, 3, kv_heads, dh),
        "v_proj": (2, 3, kv_heads * dh),
        "q_rope": (2, heads, 3, dh),
        "k_rope": (2, kv_heads, 3, dh),
        "scores": (2, heads, 3, 8),
        "probs": (2, heads, 3, 8),
        "context": (2, 3, heads * dh),
    }
    for name, shape in shapes.items():
        assert kept[f"model.layers.1.self_attn.{name}"].shape == shape
    hidden = np.arange(8) > np.array([[5, 6, 7], [2, 3, 4]])[..., None]  # (B, S, T)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        np.testing.assert_array_equal(np.isneginf(kept[prefix + "scores"]), np.repeat(hidden[:, None], heads, 1))
        assert not kept[prefix + "probs"][np.repeat(hidden[:, None], heads, 1)].any()
    cache.lengths[:] = 0
    forward(weights, config, ids[::-1], cache, numerics=numerics)  # writes over what the cache held
    for name, array in kept.items():
        np.testing.assert_array_equal(array, copies[name], name)


def test_tracing_changes_no_bit(either):
    weights, config = either
    ids = draw_ids(np.random.default_rng(3), config, 2, 9)
    np.testing.assert_array_equal(traced(weights, config, ids)[0], forward(weights, config, ids))


@pytest.fixture(params=["dense", "experts"])
def either(request, config, weights):
    """The model of the other tests; and one with experts, in one of its two layers, YaRN and windows."""
    if request.param == "dense":
        return weights, config
    config = replace(
        config.extended(4),
        sliding_window=5,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        mlp_only_layers=(0,),
        attention_bias=True,
    )
    return trained_like(config, 1), config


@pytest.mark.parametrize("numerics", NUMERICS)
def test_bits_do_not_depend_on_how_the_weights_are_stored(either, numerics):
    weights, config = either
    mapped = {name: w.astype(BFLOAT16) for name, w in weights.items()}
    # what bfloat16 is given in float32, it rounds
    copied = weights if "bfloat16" in numerics else {name: w.astype(np.float32) for name, w in mapped.items()}
    for length in (1, 2, 17):
        ids = draw_ids(np.random.default_rng(4), config, length)
        one, two = (forward(w, config, ids, numerics=numerics) for w in (mapped, copied))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_bits_do_not_depend_on_the_number_of_threads(either, numerics, monkeypatch):
    weights, config = either
    monkeypatch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)  # small as the model is, share every product
    monkeypatch.setattr("qwen3np.ops.fast.threads.IN_CACHE", 64)
    ids = draw_ids(np.random.default_rng(8), config, 2, 17)
    runs = []
    for threads in (1, 2, 3):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", str(threads))
        cache = KVCache.allocate(config, 2, 20, np.float64)
        runs.append(traced(weights, config, ids, cache, numerics=numerics)[1])
        runs[-1]["decoded"] = forward(weights, config, ids[:, :1], cache, numerics=numerics)
    for run in runs[1:]:
        for name, array in runs[0].items():
            np.testing.assert_array_equal(run[name], array, name)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_blocks_of_rows_move_no_bit(either, numerics, monkeypatch):
    weights, config = either
    ids = draw_ids(np.random.default_rng(9), config, 2, 17)
    whole = traced(weights, config, ids, numerics=numerics)[1]
    monkeypatch.setattr("qwen3np.ops.fast.threads.IN_CACHE", 64)
    for name, array in traced(weights, config, ids, numerics=numerics)[1].items():
        np.testing.assert_array_equal(array, whole[name], name)


def test_bits_do_not_depend_on_what_other_threads_compute(weights, config, monkeypatch):
    monkeypatch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "2")
    rng = np.random.default_rng(10)
    prompts, newest = draw_ids(rng, config, 40, 33), draw_ids(rng, config, 40)

    def run(row):  # a prompt, then one token
        cache = KVCache.allocate(config, 1, 40)
        return forward(weights, config, prompts[row], cache), forward(weights, config, newest[row : row + 1], cache)

    alone = [run(row) for row in range(len(prompts))]
    with threadpool_limits(2), ThreadPoolExecutor(4) as users:
        for one, two in zip(alone, users.map(run, range(len(prompts))), strict=True):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])


def test_a_tied_head_is_the_embedding_even_if_another_one_is_given(weights, config):
    ids = draw_ids(np.random.default_rng(5), config, 9)
    tied = replace(config, tie_word_embeddings=True)
    np.testing.assert_array_equal(
        forward(weights, tied, ids),
        forward(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, config, ids),
    )
    assert not np.array_equal(forward(weights, tied, ids), forward(weights, config, ids))


def test_last_only_is_the_last_row(weights, config):
    ids = draw_ids(np.random.default_rng(6), config, 2, 9)
    logits = forward(weights, config, ids)
    last = forward(weights, config, ids, last_only=True)
    assert last.shape == (2, 1, config.vocab_size)
    assert relative(last, logits[:, -1:]) < 1e-6


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.uint8, np.int64])
def test_one_sequence_is_a_batch_of_one(weights, config, kind):
    ids = np.arange(7)
    logits = forward(weights, config, kind(ids.tolist()) if kind in (list, tuple) else ids.astype(kind))
    assert logits.shape == (1, 7, config.vocab_size)
    np.testing.assert_array_equal(logits, forward(weights, config, ids[None]))


def test_a_batch_equals_its_sequences_alone(either):
    weights, config = either
    ids = draw_ids(np.random.default_rng(7), config, 3, 9)
    together = forward(weights, config, ids, numerics="float64")
    for row, logits in zip(ids, together, strict=True):
        assert relative(forward(weights, config, row, numerics="float64")[0], logits) < 2e-14


BAD = [
    ([], "empty"),
    ([[]], "empty"),
    (np.zeros((3, 0), int), "empty"),
    ([101], "id 101 at row 0, position 0"),
    ([5, 101, 7, 999], r"id 101 at row 0, position 1 .*0 to 100 \(2 such ids\)"),
    ([[5, 6], [7, -1]], r"id -1 at row 1, position 1 .*0 to 100$"),
    ([2**63], r"9223372036854775808.*0 to 100"),
    ([1.0, 2.0], "float64.* 0 to 100$"),
    ([True, False], "bool"),
    (["1", "2"], "integers"),
    ([None], "integers"),
    ([[1, 2], [3]], "different lengths.*pad"),
    (5, r"shape \(\)"),
    (np.zeros((1, 1, 1), int), r"shape \(1, 1, 1\)"),
]


@pytest.mark.parametrize(("ids", "message"), BAD)
def test_bad_input_is_refused_and_changes_nothing(weights, config, ids, message):
    cache = KVCache.allocate(config, 1, 8)
    points = []
    with pytest.raises(ValueError, match=f"^input_ids: .*{message}"):
        forward(weights, config, ids, cache, trace=lambda *point: points.append(point))
    assert not points
    assert not cache.lengths.any()
    assert not cache.k.any()


def test_unknown_numerics(weights, config):
    with pytest.raises(ValueError, match="numerics='float16' is unknown; known: float32, float64, bfloat16"):
        forward(weights, config, [1], numerics="float16")


def test_a_recorder_that_is_empty_at_first_records(weights, config):
    class Points(dict):
        __call__ = dict.__setitem__

    points = Points()
    forward(weights, config, [1, 2, 3], trace=points)
    assert "lm_head" in points


def test_the_config_alone_says_whether_there_are_biases(weights, config):
    biased = replace(config, attention_bias=True)
    with pytest.raises(ValueError, match=r"there is no .*q_proj\.bias"):
        forward(weights, biased, [1, 2, 3])
    with_bias = trained_like(biased, 0)
    without = {name: tensor for name, tensor in with_bias.items() if not name.endswith("bias")}
    np.testing.assert_array_equal(forward(with_bias, config, [1, 2]), forward(without, config, [1, 2]))


def test_numbers_of_numpy_in_a_config_change_nothing(weights, config):
    same = replace(config, rms_norm_eps=np.float64(config.rms_norm_eps), head_dim=np.int64(config.head_dim))
    assert same == config
    np.testing.assert_array_equal(forward(weights, same, [1, 2]), forward(weights, config, [1, 2]))
