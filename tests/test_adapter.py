"""LoRA adapters against the formula of the paper in float64, and against PEFT itself where it is installed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from drawing import SMALL, SMALL_IDS

from qwen3np import CheckpointError, forward, init_weights, load, save_checkpoint
from qwen3np.config import Config
from qwen3np.files.adapter import LowRank
from qwen3np.stored import Stored

CONFIG, IDS = Config(**SMALL, tie_word_embeddings=True), SMALL_IDS
NAMES = {"self_attn.q_proj": (64, 32), "self_attn.v_proj": (32, 32), "mlp.down_proj": (32, 48)}


@pytest.fixture
def base(tmp_path):
    weights = init_weights(CONFIG, 0, trained_like=True)
    save_checkpoint(tmp_path / "base", CONFIG, weights)
    return tmp_path / "base", weights


def adapter(folder, settings, more=None, seed=0, rank=4):
    """Write an adapter of some projections. Return A and B of each weight."""
    rng, tensors, pairs = np.random.default_rng(seed), dict(more or {}), {}
    for layer in range(2):
        for name, (out, inputs) in NAMES.items():
            a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), (out, rank)))
            module = f"model.layers.{layer}.{name}"
            pairs[f"{module}.weight"] = a, b
            tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    folder.mkdir(exist_ok=True)
    basic = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": rank, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(basic | settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return pairs


def merged(weights, pairs, scale):
    """Return float64 weights with W + scale B A."""
    plain = {name: w.astype(np.float64) for name, w in weights.items()}
    for name, (a, b) in pairs.items():
        plain[name] = plain[name] + scale(name) * (b.astype(np.float64) @ a.astype(np.float64))
    return plain


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, lambda _: 8 / 4),
        ({"use_rslora": True}, lambda _: 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 1.5}},
         lambda name: (2 if "q_proj" in name else 1.5 if "1.mlp.down" in name else 8) / 4),
    ],
    ids=["plain", "rank-stabilised", "alpha of a module"],
)  # fmt: skip
def test_logits_are_those_of_the_merged_weights(base, tmp_path, settings, scale):
    folder, weights = base
    pairs = adapter(tmp_path / "lora", settings)
    truth = forward(merged(weights, pairs, scale), CONFIG, IDS, numerics="float64")
    for stored in ("mapped", "float32"):
        model = load(folder, adapter=tmp_path / "lora", weights_dtype=stored, progress=False)
        assert isinstance(model.weights["model.layers.0.self_attn.q_proj.weight"], Stored) == (stored == "mapped")
        assert np.linalg.norm(model(IDS) - truth) <= 3e-6 * np.linalg.norm(truth)
    assert np.linalg.norm(load(folder, progress=False)(IDS) - truth) > 0.1 * np.linalg.norm(truth)


def test_embedding_and_head_adapted_or_replaced(base, tmp_path):
    folder, weights = base
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, 64)).astype(np.float32), rng.standard_normal((32, 4)).astype(np.float32)
    head = rng.standard_normal((64, 32)).astype(np.float32)
    place = "base_model.model."
    more = {f"{place}model.embed_tokens.lora_embedding_A": a, f"{place}model.embed_tokens.lora_embedding_B": b}
    pairs = adapter(tmp_path / "lora", {}, more | {f"{place}lm_head.weight": head})
    plain = merged(weights, pairs, lambda _: 2)
    plain["model.embed_tokens.weight"] = plain["model.embed_tokens.weight"] + 2 * (b.astype(np.float64) @ a).T
    plain["lm_head.weight"] = head
    model = load(folder, adapter=tmp_path / "lora", weights_dtype="mapped", progress=False)
    assert not model.config.tie_word_embeddings
    truth = forward(plain, model.config, IDS, numerics="float64")
    assert np.linalg.norm(model(IDS) - truth) <= 3e-6 * np.linalg.norm(truth)


def test_a_row_has_the_same_bits_alone_and_among_others():
    rng = np.random.default_rng(0)
    base, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 256), (128, 256), (70, 128)))
    w = LowRank(base.shape, base, a, b, 0.5)
    whole = np.asarray(w)
    for step in (1, 3, 64, 69):
        for start in range(0, 70, step):
            np.testing.assert_array_equal(np.asarray(w[start : start + step]), whole[start : start + step])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported; supported: LORA"),
        ({"use_dora": True}, r"use_dora is not supported: merge the adapter with PEFT"),
        ({"lora_alpha": "8"}, "must hold numbers below 1e30"),
        ({"lora_alpha": 10**400}, "must hold numbers below 1e30"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "must hold numbers below 1e30"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "may take forever"),
    ],
)
def test_other_adapters_are_refused(base, tmp_path, settings, message):
    adapter(tmp_path / "lora", settings)
    with pytest.raises(CheckpointError, match=message):
        load(base[0], adapter=tmp_path / "lora", progress=False)


def test_an_adapter_of_another_model_or_half_of_one(base, tmp_path):
    place = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    for n, (more, message) in enumerate(
        [
            ({f"{place}A.weight": np.zeros((4, 63), np.float32), f"{place}B.weight": np.zeros((32, 4), np.float32)},
             r"made for \(32, 63\), but the base model has \(32, 64\); give the model it was trained on"),
            ({f"{place}A.weight": np.zeros((4, 64), np.float32)}, "an incomplete pair: only lora_A"),
            ({f"{place}A.weight": np.zeros((4, 64), np.float32), f"{place}B.weight": np.zeros((32, 5), np.float32)},
             "not of one rank"),
            ({f"{place.replace('1', '7')}A.weight": np.zeros((4, 64), np.float32),
              f"{place.replace('1', '7')}B.weight": np.zeros((32, 4), np.float32)}, "base model has no such tensor"),
        ]
    ):  # fmt: skip
        adapter(tmp_path / str(n), {}, more)
        with pytest.raises(CheckpointError, match=message):
            load(base[0], adapter=tmp_path / str(n), progress=False)
    with pytest.raises(CheckpointError, match=r"a LoRA adapter of Qwen/Qwen3-0\.6B, not a model: load"):
        load(tmp_path / "0", progress=False)
    with pytest.raises(CheckpointError, match="not an adapter"):
        load(base[0], adapter=base[0], progress=False)


@pytest.mark.oracle
@pytest.mark.parametrize("rslora", [False, True])
def test_peft(base, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "o_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.o_proj": 3},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        truth = model(torch.tensor([IDS])).logits.numpy()
    found = load(base[0], adapter=tmp_path / "peft", progress=False)(IDS)
    assert np.linalg.norm(found - truth) <= 3e-6 * np.linalg.norm(truth)
