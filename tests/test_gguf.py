"""GGUF files against the ggml project's own package (gguf), and files that llama.cpp's llama-quantize wrote."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3np import CheckpointError, Config, ConfigError, forward, init_weights, load, read_checkpoint
from qwen3np.config import Yarn
from qwen3np.files.gguf import Blocks, gguf_name, read_gguf
from qwen3np.files.gguf_writer import q8_0, write_gguf
from qwen3np.files.hub import BUILTIN

gguf = pytest.importorskip("gguf")
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
REAL = Path(os.environ.get("QWEN3NP_DATA", "/nowhere")).parent / "gguf"


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", TYPES)
def test_every_block_type_gives_the_numbers_of_the_package(kind):
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (13, 2 * size), dtype=np.uint8)
    w = Blocks((13, 2 * block), data, kind)
    with np.errstate(all="ignore"):
        truth = gguf.quants.dequantize(data, kind).reshape(13, 2 * block)
    np.testing.assert_array_equal(np.asarray(w), truth)
    np.testing.assert_array_equal(np.asarray(w[3:9][2:]), truth[5:9])
    np.testing.assert_array_equal(w[[5, 0, 5]], truth[[5, 0, 5]])
    assert w.nbytes == data.nbytes


@pytest.mark.skipif(not REAL.is_dir(), reason="no real GGUF files here")
@pytest.mark.parametrize("path", sorted(REAL.glob("*.gguf")), ids=lambda path: path.name)
def test_real_files(path):
    """llama-quantize's files: the numbers of gguf.quants, and the logits of a float32 forward over them."""
    config, weights, _ = read_gguf(path)
    plain, _ = read_checkpoint(REAL / path.name.split("-")[0])
    eos = json.loads((REAL / path.name.split("-")[0] / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(config.eos_token_id) == sorted(eos)
    for key, value in vars(plain).items():
        assert key in ("eos_token_id", "initializer_range") or getattr(config, key) == value, key
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    truth = {}
    for name, w in weights.items():
        place, expert = gguf_name(name)
        truth[name] = stored[place] if expert is None else stored[place][expert]
        np.testing.assert_array_equal(np.asarray(w, np.float32), truth[name])
    ids = json.loads((REAL / path.name.split("-")[0] / "ids.json").read_text())
    assert relative(forward(weights, config, ids), forward(truth, config, ids)) <= 3e-6


@pytest.fixture(params=["dense", "moe"])
def checkpoint(request):
    sparse = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    config = Config(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_position_embeddings=512,
        tie_word_embeddings=request.param == "dense",
        eos_token_id=(2024, 2022),
        rope_scaling=Yarn(4.0, 128, attention_factor=1.25, beta_fast=32.0, beta_slow=1.0),
        **(sparse if request.param == "moe" else {}),
    )
    return config, init_weights(config, 0, trained_like=True)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_what_the_package_reads_and_would_write(tmp_path, checkpoint, kind):
    config, weights = checkpoint
    tokenizer = json.loads((BUILTIN / "tokenizer.json").read_text())
    write_gguf(tmp_path / "x.gguf", config, weights, tokenizer, kind=kind, chat_template="{{ messages }}")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, w in weights.items():
        place, expert = gguf_name(name)
        found = tensors[place].data if expert is None else tensors[place].data[expert]
        as_stored = tensors[place].tensor_type
        assert as_stored.name == (kind if w.ndim == 2 and not name.endswith("mlp.gate.weight") else "F32")
        np.testing.assert_array_equal(found.view(np.uint8), gguf.quants.quantize(w, as_stored).view(np.uint8))
    again, mapped, metadata = read_gguf(tmp_path / "x.gguf")
    assert replace(again, rope_scaling=None) == replace(config, rope_scaling=None, initializer_range=0.02)
    assert again.rope_scaling.attention_factor == pytest.approx(1.25, rel=1e-6)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    if kind == "F32":
        for name, w in weights.items():
            np.testing.assert_array_equal(mapped[name], w)


def test_settings_that_gguf_cannot_say_are_refused(tmp_path, checkpoint):
    config, weights = checkpoint
    for changed, key in ((replace(config, sliding_window=8), "sliding_window"),) + (
        ((replace(config, norm_topk_prob=False), "norm_topk_prob"),) if config.num_experts else ()
    ):
        with pytest.raises(CheckpointError, match=key):
            write_gguf(tmp_path / "x.gguf", changed, weights)
    with pytest.raises(CheckpointError, match="too large for F16"):
        write_gguf(tmp_path / "x.gguf", config, weights | {"model.embed_tokens.weight": np.full((2048, 64), 1e6)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="kind='Q4_K' is unknown"):
        write_gguf(tmp_path / "x.gguf", config, weights, kind="Q4_K")


@pytest.mark.parametrize("scale", [0, 1e-30, 1.0, 3e4])
def test_q8_0_is_the_packages(scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((7, 96))).astype(np.float32)
    x[0, :32], x[1, :32] = 0, np.linspace(-127, 127, 32) * 0.5
    found = q8_0(x)
    np.testing.assert_array_equal(found.reshape(7, -1), gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0))


def test_a_gguf_file_is_a_model(tmp_path, checkpoint):
    """Loaded by its path, by its folder, and by its name in the folder: text, chat, stops and logits as before."""
    config, weights = checkpoint
    config = replace(config, rope_scaling=None)
    tokenizer = json.loads((BUILTIN / "tokenizer.json").read_text())
    template = json.loads((BUILTIN / "tokenizer_config.json").read_text())["chat_template"]
    write_gguf(tmp_path / "x.gguf", config, weights, tokenizer, kind="F32", chat_template=template)
    plain = load(progress=False).tokenizer
    messages = [{"role": "user", "content": "Wie heißt der Fluss? <|im_end|> 12.5 kg 🍎"}]
    for where, name in ((tmp_path / "x.gguf", None), (tmp_path, None), (tmp_path, "x.gguf")):
        model = load(where, gguf_file=name, weights_dtype="mapped", progress=False)
        assert model.config.vocab_size == 2048
        text = plain.apply_chat_template(messages)
        assert model.tokenizer.apply_chat_template(messages) == text
        assert model.tokenizer.encode(text) == plain.encode(text)
        assert model.tokenizer.decode(plain.encode(text)) == text
        assert model.tokenizer.special_tokens == plain.special_tokens
        assert set(model.generation_defaults()["stop_ids"]) == {2024, 2022}
        np.testing.assert_array_equal(model([1, 2, 3]), forward(weights, config, [1, 2, 3]))
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", progress=False)
    assert again.tokenizer.encode(text) == plain.encode(text)
    assert again.tokenizer.apply_chat_template(messages) == text
    np.testing.assert_array_equal(again([1, 2, 3]), model([1, 2, 3]))
    with pytest.raises(CheckpointError, match=r"no y\.gguf; there is x\.gguf"):
        load(tmp_path, gguf_file="y.gguf", progress=False)


def test_split_files(tmp_path, checkpoint):
    config, weights = checkpoint
    write_gguf(tmp_path / "x.gguf", config, weights)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    half = len(reader.tensors) // 2
    for n, tensors in enumerate((reader.tensors[:half], reader.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"s-0000{n}-of-00002.gguf", "qwen3moe" if config.num_experts else "qwen3")
        for field in reader.fields.values():
            if n == 1 and not field.name.startswith(("GGUF.", "general.")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    _, found, _ = read_gguf(tmp_path / "s-00001-of-00002.gguf")
    _, whole, _ = read_gguf(tmp_path / "x.gguf")
    for name, w in whole.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(w))
    (tmp_path / "s-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"s-00002-of-00002\.gguf: missing"):
        read_gguf(tmp_path / "s-00001-of-00002.gguf")


def test_damaged_files(tmp_path, checkpoint):
    config, weights = checkpoint
    write_gguf(tmp_path / "x.gguf", config, weights, kind="Q8_0")
    whole = (tmp_path / "x.gguf").read_bytes()
    place = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    kinds = {
        "truncated: the file has": whole[:-100],
        "damaged or cut off": whole[:200],
        "GGUF version 1": whole.replace(b"GGUF\x03", b"GGUF\x01", 1),
        "architecture is 'llama3'": whole.replace(b"\x05\0\0\0\0\0\0\0qwen3", b"\x06\0\0\0\0\0\0\0llama3", 1),
        r"token_embd\.weight: type 99 is unknown": whole[:place] + b"\x63" + whole[place + 1 :],
        r"output_norm\.weight: missing": whole.replace(b"output_norm.weight", b"output_form.weight", 1),
        "embedding_length|hidden_size": whole.replace(b".embedding_length", b".embeddimg_length", 1),
    }
    for message, content in kinds.items():
        if "llama3" in message and config.num_experts:
            continue
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises((CheckpointError, ConfigError), match=message) as error:
            read_gguf(tmp_path / "y.gguf")
        assert "y.gguf" in str(error.value)
        assert str(error.value).isprintable()
