"""Checkpoints in the layouts that Qwen and others publish, packed here, against float32 copies of their numbers."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from test_quantized import ORDER, packed

from qwen3np import CheckpointError, Config, forward, init_weights, load, read_checkpoint
from qwen3np.stored import Stored

BF16 = ml_dtypes.bfloat16


def pack_fp8(w, _, scale_type=BF16):
    blocks = w.reshape(w.shape[0] // 128, 128, w.shape[1] // 128, 128)
    scales = (np.abs(blocks).max((1, 3)) / 448).astype(scale_type)
    s = scales.astype(np.float32)[:, None, :, None]
    codes = np.clip(blocks / s, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    plain = (codes.astype(np.float32) * s).reshape(w.shape)
    return {"weight": codes.reshape(w.shape), "weight_scale_inv": scales}, plain


def pack_channels(w, _):
    scales = (np.abs(w).max(1, keepdims=True) / 448).astype(BF16)
    codes = (w / scales.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales.astype(np.float32)


def grouped(w, size):
    return np.ascontiguousarray(w.T).reshape(w.shape[1] // size, size, w.shape[0])


def pack_awq(w, _):
    g = grouped(w, 128)
    low, high = g.min(1), g.max(1)
    scales = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    s = scales.astype(np.float32)
    zeros = np.clip(np.round(-low / s), 0, 15)
    q = np.clip(np.round(g / s[:, None] + zeros[:, None]), 0, 15)
    inside = [8 * word + column for word in range(w.shape[0] // 8) for column in ORDER]
    flat = q.reshape(w.shape[1], -1).astype(np.int64)
    parts = {"qweight": packed(flat[:, inside], 4, 1), "qzeros": packed(zeros[:, inside].astype(np.int64), 4, 1)}
    plain = ((q - zeros[:, None]).astype(np.float32) * s[:, None]).reshape(w.shape[1], -1).T
    return parts | {"scales": scales}, plain


def pack_gptq(w, rng, bits=4, version=1, act_order=False):
    g, half = grouped(w, 128), 2 ** (bits - 1)
    scales = (np.abs(g).max(1) / (half - 1)).astype(np.float16)
    q = np.clip(np.round(g / scales.astype(np.float32)[:, None]), -half, half - 1)
    plain = (q.astype(np.float32) * scales.astype(np.float32)[:, None]).reshape(w.shape[1], -1)
    flat, index = (q + half).reshape(w.shape[1], -1).astype(np.int64), np.arange(w.shape[1]) // 128
    if act_order:  # the inputs stand in another order than their groups
        order = rng.permutation(len(index))
        flat, plain, index = flat[order], plain[order], index[order]
    zeros = np.full(scales.shape, half - (version == 1), np.int64)
    parts = {"qweight": packed(flat, bits, 0), "qzeros": packed(zeros, bits, 1), "scales": scales}
    return parts | {"g_idx": index.astype(np.int32)}, plain.T


def pack_mlx(w, _, bits=4):
    g = w.reshape(w.shape[0], -1, 64)
    low, high = g.min(2), g.max(2)
    scales, biases = ((high - low) / (2**bits - 1)).astype(BF16), low.astype(BF16)
    s, b = scales.astype(np.float32)[:, :, None], biases.astype(np.float32)[:, :, None]
    q = np.clip(np.round((g - b) / s), 0, 2**bits - 1)
    plain = (q.astype(np.float32) * s + b).reshape(w.shape)
    words = packed(q.reshape(w.shape).astype(np.int64), bits, 1).view(np.uint32)
    return {"weight": words, "scales": scales, "biases": biases}, plain


AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
GPTQ = {"group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
FORMATS = {  # what packs a matrix, and quantization_config as the official repositories have it
    "fp8": (pack_fp8, FP8),
    "fp8-float16-scales": (lambda w, rng: pack_fp8(w, rng, np.float16), FP8),
    "fp8-float32-scales": (lambda w, rng: pack_fp8(w, rng, np.float32), FP8),
    "compressed-tensors": (pack_channels, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "awq": (pack_awq, AWQ),
    "gptq4": (pack_gptq, GPTQ | {"bits": 4, "checkpoint_format": "gptq"}),
    "gptq8": (lambda w, rng: pack_gptq(w, rng, 8), GPTQ | {"bits": 8, "checkpoint_format": "gptq"}),
    "gptq-v2": (lambda w, rng: pack_gptq(w, rng, 4, 2), GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}),
    "gptq-act": (lambda w, rng: pack_gptq(w, rng, 8, 1, True), GPTQ | {"bits": 8, "desc_act": True}),
    "mlx4": (pack_mlx, {"group_size": 64, "bits": 4}),
    "mlx8": (lambda w, rng: pack_mlx(w, rng, 8), {"group_size": 64, "bits": 8}),
}


def draw(rng, sparse):
    """Draw a model whose matrices every format can pack."""
    heads = int(rng.choice([1, 2]))
    return Config(
        vocab_size=int(rng.choice([128, 200])),
        hidden_size=128 * int(rng.integers(1, 3)),
        intermediate_size=128 * int(rng.integers(1, 4)),
        num_hidden_layers=2,
        num_attention_heads=heads * int(rng.integers(1, 3)),
        num_key_value_heads=heads,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=bool(rng.random() < 0.5),
        **(
            {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
            if sparse
            else {}
        ),
    )


def save(folder, config, pack, settings, rng, change=lambda tensors: None):
    """Write a quantised checkpoint. Return the plain weights of its numbers."""
    stored, plain = {}, {}
    for name, w in init_weights(config, int(rng.integers(2**31)), trained_like=True).items():
        if name.endswith("_proj.weight") or (name == "model.embed_tokens.weight" and pack is pack_mlx):
            parts, plain[name] = pack(w, rng)
            stored |= {name.removesuffix("weight") + part: np.ascontiguousarray(x) for part, x in parts.items()}
        else:
            stored[name] = w.astype(BF16)
            plain[name] = stored[name].astype(np.float32)
    change(stored)
    folder.mkdir()
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    return {name: np.ascontiguousarray(w) for name, w in plain.items()}


@pytest.mark.parametrize("models", [range(3), pytest.param(range(3, 10), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_a_plain_float32_copy(tmp_path, name, sparse, models):
    pack, settings = FORMATS[name]
    for n in models:
        rng = np.random.default_rng(n)
        config = draw(rng, sparse)
        plain = save(tmp_path / str(n), config, pack, settings, rng)
        found, weights = read_checkpoint(tmp_path / str(n))
        assert found == config
        assert any(isinstance(w, Stored) for w in weights.values())
        for tensor, w in weights.items():
            np.testing.assert_array_equal(np.asarray(w, np.float32), plain[tensor])
        for length in (1, 5):
            ids = rng.integers(0, config.vocab_size, length)
            np.testing.assert_array_equal(forward(weights, config, ids), forward(plain, config, ids))
        if n == 0:
            copied = load(tmp_path / "0", weights_dtype="float32", progress=False)
            assert all(w.dtype == np.float32 and not isinstance(w, Stored) for w in copied.weights.values())
            np.testing.assert_array_equal(copied(ids), forward(plain, config, ids))


@pytest.mark.parametrize("name", ["fp8", "awq", "gptq4", "gptq8", "mlx4"])
def test_without_quantization_config_the_tensors_say_what_they_are(tmp_path, name):
    rng = np.random.default_rng(0)
    plain = save(tmp_path / "x", draw(rng, False), FORMATS[name][0], None, rng)
    for tensor, w in read_checkpoint(tmp_path / "x")[1].items():
        np.testing.assert_array_equal(np.asarray(w, np.float32), plain[tensor])


Q = "model.layers.0.self_attn.q_proj."
DAMAGED = [
    ("fp8", "weight_scale_inv", lambda x: x[:, :1].repeat(3, 1), "scales has shape"),
    ("fp8", "weight_scale_inv", lambda x: x.astype(np.int32), "scales of int32"),
    ("fp8", "weight", lambda x: x[:-1], "weight has shape"),
    ("awq", "qzeros", lambda x: x[:, :-1], "qzeros has shape"),
    ("awq", "scales", lambda x: np.concatenate([x, x, x]), "do not divide|qzeros has shape|group_size"),
    ("awq", "scales", None, "but no scales"),
    ("gptq4", "qzeros", lambda x: np.full_like(x, -1), "zeros out of range"),
    ("gptq4", "g_idx", lambda x: x + 7, "g_idx names groups"),
    ("gptq4", "g_idx", lambda x: x[1:], "g_idx of int32"),
    ("gptq4", "qweight", lambda x: x.astype(np.int64), "qweight of int64"),
    ("gptq4", "qweight", lambda x: x[:-3], "neither GPTQ with 4 or 8 bits nor AWQ|qweight has shape"),
    ("mlx4", "biases", None, "MLX needs scales and biases"),
    ("mlx4", "weight", lambda x: x[:, :-5], "MLX with .* bits|weight has shape"),
]


@pytest.mark.parametrize(("name", "part", "change", "message"), DAMAGED)
def test_parts_that_do_not_fit_are_named(tmp_path, name, part, change, message):
    def damage(stored):
        if change is None:
            del stored[Q + part]
        else:
            stored[Q + part] = np.ascontiguousarray(change(stored[Q + part]))

    rng = np.random.default_rng(1)
    save(tmp_path / "x", draw(rng, False), *FORMATS[name], rng, damage)
    with pytest.raises(CheckpointError, match=rf"{Q[:-1]}.*({message})") as error:
        read_checkpoint(tmp_path / "x")
    assert str(error.value).isprintable()


def test_a_config_that_says_otherwise_than_the_shapes(tmp_path):
    for n, (name, change) in enumerate([("awq", {"group_size": 64}), ("gptq8", {"bits": 4})]):
        rng = np.random.default_rng(0)
        save(tmp_path / str(n), draw(rng, False), FORMATS[name][0], FORMATS[name][1] | change, rng)
        with pytest.raises(CheckpointError, match="but quantization_config says"):
            read_checkpoint(tmp_path / str(n))


def test_bitsandbytes_is_named_with_what_to_use_instead(tmp_path):
    def nf4(stored):
        stored[Q + "weight.quant_state.bitsandbytes__nf4"] = np.zeros(8, np.uint8)

    rng = np.random.default_rng(0)
    save(tmp_path / "x", draw(rng, False), *FORMATS["fp8"], rng, nf4)
    with pytest.raises(CheckpointError, match="bitsandbytes nf4, which is not supported: use"):
        read_checkpoint(tmp_path / "x")
