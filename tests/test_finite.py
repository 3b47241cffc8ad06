"""Non-finite numbers, files that change under a model, caches of other weights: reported, never used."""

import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

import qwen3np
from qwen3np import CheckpointError, Config, KVCache, NonFiniteError, forward, generate, init_weights, score
from qwen3np.ops.fast.threads import share

CONFIG = Config(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=1e6,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
IDS = list(range(10, 45))  # more than the check looks at in one piece


def broken(name, value, where=...):
    weights = init_weights(CONFIG, 0, trained_like=True)
    weights[name][where] = value
    return weights


@pytest.mark.parametrize(
    ("name", "where", "point", "position"),
    [
        ("model.layers.1.mlp.down_proj.weight", (3, 5), "model.layers.1.mlp.down_proj", 0),
        ("model.layers.2.self_attn.k_norm.weight", 4, "model.layers.2.self_attn.k_norm", 0),
        ("model.norm.weight", 4, "model.norm", 0),
        ("model.embed_tokens.weight", (7, 0), "lm_head", 0),  # the head is tied to it
        ("model.embed_tokens.weight", (IDS[0], 0), "model.embed_tokens", 0),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_point_and_token_are_named(name, where, point, position, value):
    weights = broken(name, value, where)
    message = rf"^{re.escape(point)} is NaN or infinite at position {position} \(id {IDS[position]}\): "
    message += rf"{re.escape(name)} holds 1 of {weights[name].size:,} that are not finite, so the checkpoint is damaged"
    with np.errstate(all="ignore"):
        with pytest.raises(NonFiniteError, match=message):
            generate(weights, CONFIG, IDS, max_new_tokens=3)
        with pytest.raises(NonFiniteError, match=message):
            score(weights, CONFIG, IDS)


@pytest.mark.parametrize("value", [np.inf, -np.inf])  # one of them makes the expert's logit -inf
@pytest.mark.parametrize("numerics", ["float32", "bfloat16", "float64"])
def test_an_expert_that_damage_hides_is_named(value, numerics):
    config = replace(CONFIG, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True)
    weights = init_weights(config, 0, trained_like=True)
    weights["model.layers.1.mlp.gate.weight"][3, 5] = value
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"^model.layers.1.mlp.gate is NaN or infinite"):
        generate(weights, config, IDS[:1], max_new_tokens=1, numerics=numerics)


def test_the_first_point_may_be_the_scores():
    weights = init_weights(CONFIG, 0, trained_like=True)
    for name in ("q_norm", "k_norm"):
        weights[f"model.layers.1.self_attn.{name}.weight"][:] = 1e22
    message = (
        r"^model.layers.1.self_attn.scores is NaN or infinite at position \d+ \(id \d+\): values overflow float32$"
    )
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=message):
        generate(weights, CONFIG, IDS, max_new_tokens=3)


def test_numbers_that_outgrow_the_precision_are_told_from_damaged_ones():
    weights = init_weights(CONFIG, 0, trained_like=True)
    weights["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e38)
    message = r"^model.layers.1.mlp.\w+ is NaN or infinite at position 0 \(id 10\): values overflow float32$"
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=message):
        generate(weights, CONFIG, IDS, max_new_tokens=3)
    generate(weights, CONFIG, IDS, max_new_tokens=3, numerics="float64")


@pytest.fixture
def folder(tmp_path):
    qwen3np.save_checkpoint(tmp_path / "model", CONFIG, init_weights(CONFIG, 0))
    return tmp_path / "model"


def test_a_file_that_changes_under_a_mapped_model_is_an_error(folder):
    model = qwen3np.load(folder, weights_dtype="bfloat16", progress=False)
    copy = qwen3np.load(folder, weights_dtype="float32", progress=False)
    file = folder / "model.safetensors"
    before = model.generate(IDS, max_new_tokens=3)[0]
    begun = model.stream(IDS, max_new_tokens=3)
    assert next(begun) == before[0]
    data = file.read_bytes()
    with file.open("r+b") as opened:  # one weight is another
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([data[-1] ^ 64]))
    for use in (
        lambda: model.generate(IDS, max_new_tokens=3),
        lambda: model.stream(IDS, max_new_tokens=3),
        lambda: score(model.weights, CONFIG, IDS),
        lambda: model.forward(IDS),
        lambda: next(begun),
    ):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(file))}: was changed after it was loaded; load"):
            use()
    assert copy.generate(IDS, max_new_tokens=3)[0] == before  # it has all in memory
    with file.open("r+b") as opened:
        opened.truncate(len(data) // 2)
    with pytest.raises(CheckpointError, match="was changed after"):
        model.generate(IDS, max_new_tokens=3)


def test_a_file_that_changes_is_found_from_another_folder_too(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = qwen3np.load(folder.name, weights_dtype="bfloat16", progress=False)
    monkeypatch.chdir("/")
    os.utime(folder / "model.safetensors", (0, 0))
    with pytest.raises(CheckpointError, match="was changed after"):
        model.generate(IDS, max_new_tokens=3)


def test_a_file_that_changes_while_it_is_copied_is_an_error(folder, monkeypatch):
    def change_at_the_end(*arguments):
        share(*arguments)
        os.utime(folder / "model.safetensors", (0, 0))

    monkeypatch.setattr(sys.modules["qwen3np.loading"], "share", change_at_the_end)
    with pytest.raises(CheckpointError, match="was changed after"):
        qwen3np.load(folder, weights_dtype="float32", progress=False)


def test_a_file_that_is_replaced_or_deleted_does_no_harm(folder, tmp_path):
    model = qwen3np.load(folder, weights_dtype="bfloat16", progress=False)
    before = model.generate(IDS, max_new_tokens=3)[0]
    qwen3np.save_checkpoint(tmp_path / "other", CONFIG, init_weights(CONFIG, 1))
    os.replace(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    assert model.generate(IDS, max_new_tokens=3)[0] == before
    (folder / "model.safetensors").unlink()
    assert model.generate(IDS, max_new_tokens=3)[0] == before


def test_a_cache_of_other_weights_is_refused():
    weights, other = init_weights(CONFIG, 0), init_weights(CONFIG, 1)
    expected, cache = generate(weights, CONFIG, IDS, max_new_tokens=3)
    longer = [*IDS, *expected]
    message = "^cache: what it holds was made with other weights; use a new one, or set its lengths to 0$"
    settings = "^cache: what it holds was made with another config, other numerics or another engine; use a new one"
    with pytest.raises(ValueError, match=message):
        generate(other, CONFIG, longer, max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match=message):
        forward(other, CONFIG, [1], cache.select([0]))
    copy = {name: w.copy() for name, w in weights.items()}
    assert (
        generate(copy, CONFIG, longer, max_new_tokens=3, cache=cache)[0]
        == generate(weights, CONFIG, longer, max_new_tokens=3)[0]
    )
    one = {**weights, "model.layers.1.mlp.up_proj.weight": weights["model.layers.1.mlp.up_proj.weight"] * 2}
    others = ({"rope_theta": 1e4}, {"rms_norm_eps": 1e-5}, {"sliding_window": 9}, {"num_experts_per_tok": 2})
    configs = [replace(CONFIG, **change) for change in others]
    with pytest.raises(ValueError, match=message):
        generate(one, CONFIG, longer, max_new_tokens=3, cache=cache)
    for config in (CONFIG.extended(4), *configs):
        with pytest.raises(ValueError, match=settings):
            generate(weights, config, longer, max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match=settings):  # it could hold this precision, but what it holds is of another
        forward(weights, CONFIG, [1], cache, numerics="bfloat16")
    forward(weights, replace(CONFIG, eos_token_id=(3,), max_position_embeddings=64), [1], cache)
    cache.lengths[:] = 0
    assert (
        generate(other, CONFIG, longer, max_new_tokens=3, cache=cache)[0]
        == generate(other, CONFIG, longer, max_new_tokens=3)[0]
    )
    cache = KVCache.allocate(CONFIG, 1, 64)
    forward(weights, CONFIG, [1], cache)
    with pytest.raises(ValueError, match=message):
        forward({**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"] * 2}, CONFIG, [1], cache)


@pytest.mark.parametrize(("name", "row", "position"), [("model.embed_tokens", IDS[30], 30), ("lm_head", 7, 0)])
def test_the_token_is_named(name, row, position):
    config = replace(CONFIG, tie_word_embeddings=False)
    weights = init_weights(config, 0)
    weights[f"{name}.weight"][row] = np.nan
    message = rf"^{name} is NaN or infinite at position {position} \(id {IDS[position]}\): {name}.weight holds 16 of"
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=message):
        generate(weights, config, IDS, max_new_tokens=3)


def test_the_expert_is_named():
    config = replace(CONFIG, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=8)
    weights = init_weights(config, 0)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name][3, 5] = np.nan
    message = rf"^model.layers.1.mlp.experts is NaN .* at position 0 \(id 10\): {name} holds 1 of 128 "
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=message):
        generate(weights, config, IDS, max_new_tokens=3)
