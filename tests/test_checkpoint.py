"""Checkpoints: exchanged with the safetensors library, and broken ones diagnosed before any weight is read."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import re
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import fuzz
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from drawing import SEEDS, draw_any_config, draw_ids, trained_like
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3np import (
    CheckpointError,
    ConfigError,
    count_parameters,
    forward,
    init_weights,
    load,
    read_checkpoint,
    save_checkpoint,
)
from qwen3np.files.tensors import map_tensors
from qwen3np.numerics import BFLOAT16
from qwen3np.ops.fast.pages import release, will_need
from qwen3np.weights import LoadedWeights, weight_shapes

DTYPES = {"BF16": BFLOAT16, "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def assert_same_bits(weights, truth):
    assert weights.keys() == truth.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == truth[name].dtype, name
        assert tensor.shape == truth[name].shape, name
        assert tensor.tobytes() == truth[name].tobytes(), name


def write(path, header, data=b""):
    """Write a safetensors file by hand; header may be malformed bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(scope="module")
def config(config):
    """One layer: 14 tensors, few enough for an error to list a problem with each."""
    return replace(config, num_hidden_layers=1)


@pytest.fixture(scope="module")
def weights(config):
    return trained_like(config, 0)


@pytest.fixture
def folder(tmp_path, config, weights):
    """A good checkpoint, in bfloat16."""
    save_checkpoint(tmp_path / "good", config, weights, dtype=BFLOAT16)
    return tmp_path / "good"


def problems(folder):
    """Return the message of the CheckpointError that reading this folder raises, behind the folder's name."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(folder)
    assert str(error.value).startswith(str(folder))
    return str(error.value)[len(str(folder)) :]


def save_shards(folder, config, weights, count):
    """Write weights as transformers does when they are large: shards, and an index that says which tensor is where."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weight_map = {}
    for n in range(count):
        name = f"model-{n + 1:05}-of-{count:05}.safetensors"
        shard = dict(list(weights.items())[n::count])
        safetensors.numpy.save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_names_and_shapes_are_those_of_transformers(config):
    """Qwen3ForCausalLM(...).state_dict() of this config, written down."""
    shapes = {
        "model.embed_tokens.weight": (101, 40),
        "model.layers.0.self_attn.q_proj.weight": (96, 40),
        "model.layers.0.self_attn.q_proj.bias": (96,),
        "model.layers.0.self_attn.k_proj.weight": (32, 40),
        "model.layers.0.self_attn.k_proj.bias": (32,),
        "model.layers.0.self_attn.v_proj.weight": (32, 40),
        "model.layers.0.self_attn.v_proj.bias": (32,),
        "model.layers.0.self_attn.o_proj.weight": (40, 96),
        "model.layers.0.self_attn.o_proj.bias": (40,),
        "model.layers.0.self_attn.q_norm.weight": (16,),
        "model.layers.0.self_attn.k_norm.weight": (16,),
        "model.layers.0.mlp.gate_proj.weight": (56, 40),
        "model.layers.0.mlp.up_proj.weight": (56, 40),
        "model.layers.0.mlp.down_proj.weight": (40, 56),
        "model.layers.0.input_layernorm.weight": (40,),
        "model.layers.0.post_attention_layernorm.weight": (40,),
        "model.norm.weight": (40,),
        "lm_head.weight": (101, 40),
    }
    assert weight_shapes(replace(config, attention_bias=True)) == shapes
    plain = {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    assert weight_shapes(config) == plain
    del plain["lm_head.weight"]
    assert weight_shapes(replace(config, tie_word_embeddings=True)) == plain


@given(SEEDS, st.sampled_from(list(DTYPES.values())))
@settings(max_examples=10)
def test_saved_and_read_are_the_same_bits(tmp_path_factory, seed, dtype):
    config = draw_any_config(np.random.default_rng(seed))
    weights, folder = trained_like(config, seed), tmp_path_factory.mktemp("saved") / "new" / "folder"
    save_checkpoint(folder, config, weights, dtype=dtype)
    again, read = read_checkpoint(folder)
    assert again == config
    assert_same_bits(read, {name: w.astype(dtype) for name, w in weights.items()})
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # the tensors, which stand behind it, are aligned
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_without_a_dtype_each_tensor_keeps_its_own(tmp_path, config, weights):
    mixed = {name: w.astype(list(DTYPES.values())[n % 3]) for n, (name, w) in enumerate(weights.items())}
    save_checkpoint(tmp_path / "mixed", config, mixed)
    assert_same_bits(read_checkpoint(tmp_path / "mixed")[1], mixed)
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "mixed" / "model.safetensors"), mixed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [999, 1 << 22])
def test_the_safetensors_library_reads_what_is_saved(tmp_path, config, weights, dtype, piece, monkeypatch):
    monkeypatch.setattr("qwen3np.files.tensors._PIECE", piece)
    save_checkpoint(tmp_path / "saved", config, weights, dtype=DTYPES[dtype])
    file = tmp_path / "saved" / "model.safetensors"
    assert_same_bits(safetensors.numpy.load_file(file), {name: w.astype(DTYPES[dtype]) for name, w in weights.items()})
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {dtype}  # noqa: SIM118


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_safetensors_library_saved_is_read(tmp_path, config, weights, dtype):
    truth = {name: w.astype(DTYPES[dtype]) for name, w in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    safetensors.numpy.save_file(truth, tmp_path / "model.safetensors")
    assert_same_bits(read_checkpoint(tmp_path)[1], truth)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_reads_and_writes_the_same_files(tmp_path, config, weights, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    ours = {name: w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, w in weights.items()}
    save_checkpoint(tmp_path / "ours", config, ours)
    theirs = load_file(tmp_path / "ours" / "model.safetensors")
    for name, w in weights.items():
        assert torch.equal(theirs[name], torch.from_numpy(w.copy()).to(getattr(torch, dtype)))
    save_file(theirs, tmp_path / "theirs.safetensors")
    (tmp_path / "theirs.safetensors").replace(tmp_path / "ours" / "model.safetensors")
    assert_same_bits(read_checkpoint(tmp_path / "ours")[1], ours)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_are_one_checkpoint(tmp_path, config, weights, count):
    truth = {name: w.astype(BFLOAT16) for name, w in weights.items()}
    save_shards(tmp_path / "shards", config, truth, count)
    again, read = read_checkpoint(tmp_path / "shards")
    assert again == config
    assert_same_bits(read, truth)


def test_tensors_are_read_only_views_of_the_mapped_file(folder, config, weights):
    _, read = read_checkpoint(folder)
    maps = set()
    for tensor in read.values():
        assert not tensor.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
        base = tensor
        while isinstance(base, np.ndarray):
            base = base.base
        maps.add(base.obj if isinstance(base, memoryview) else base)
    (mapped,) = maps  # one map, and every tensor a part of it
    assert isinstance(mapped, mmap.mmap)
    ids = draw_ids(np.random.default_rng(0), config, 5)
    rounded = {name: w.astype(BFLOAT16) for name, w in weights.items()}
    np.testing.assert_array_equal(forward(read, config, ids), forward(rounded, config, ids))


def test_tensors_need_no_alignment(tmp_path, config, weights):
    """The header of another writer may have any length."""
    save_checkpoint(tmp_path / "good", config, weights)
    file = tmp_path / "good" / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for extra in (1, 2, 4):
        file.write_bytes(struct.pack("<Q", length + extra) + raw[8 : 8 + length] + b" " * extra + raw[8 + length :])
        _, read = read_checkpoint(tmp_path / "good")
        assert_same_bits(read, weights)
        for ids in ([3], [3, 1, 4]):
            np.testing.assert_array_equal(forward(read, config, ids), forward(weights, config, ids))


def test_names_without_model_get_it(tmp_path, config, weights):
    """As the embedding checkpoints are saved: without the head, so without the name of what holds it."""
    for n, (tied, head) in enumerate([(True, False), (True, True), (False, True)]):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(replace(config, tie_word_embeddings=tied).to_dict()))
        whole = weights | ({"lm_head.weight": weights["model.embed_tokens.weight"].copy()} if tied else {})
        stored = {name.removeprefix("model."): w for name, w in whole.items() if head or name != "lm_head.weight"}
        safetensors.numpy.save_file(stored, folder / "model.safetensors")
        truth = {name: w for name, w in weights.items() if not tied or name != "lm_head.weight"}
        assert_same_bits(read_checkpoint(folder)[1], truth)


def test_an_embedding_checkpoint_needs_no_head(tmp_path, config, weights):
    """Untied, and saved without its head: hidden states are there, logits are not."""
    (tmp_path / "config.json").write_text(json.dumps(replace(config, tie_word_embeddings=False).to_dict()))
    stored = {name.removeprefix("model."): w for name, w in weights.items() if name != "lm_head.weight"}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    read_config, read = read_checkpoint(tmp_path)
    np.testing.assert_array_equal(
        forward(read, read_config, [3, 1], head=False), forward(weights, config, [3, 1], head=False)
    )
    with pytest.raises(ValueError, match=r"there is no lm_head.weight: this checkpoint makes embeddings"):
        forward(read, read_config, [3, 1])


def test_names_of_which_only_some_lack_model_are_told(tmp_path, config, weights):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    stored = dict(weights)
    stored["norm.weight"] = stored.pop("model.norm.weight")
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    told = problems(tmp_path)
    assert "norm.weight: extra" in told
    assert "model.norm.weight: missing" in told


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stored_dtype_gives_the_logits_of_its_numbers(tmp_path, config, weights, dtype):
    """Stored in any of the dtypes, mapped or copied: the bits are those of the same numbers in float32."""
    save_checkpoint(tmp_path / "stored", config, weights, dtype=DTYPES[dtype])
    _, mapped = read_checkpoint(tmp_path / "stored")
    copied = {name: w.astype(DTYPES[dtype]).astype(np.float32) for name, w in weights.items()}
    for numerics in ("float32", "float64", "bfloat16"):
        for ids in ([3], [3, 1, 4], list(range(20))):
            logits = forward(copied, config, ids, numerics=numerics)
            np.testing.assert_array_equal(forward(mapped, config, ids, numerics=numerics), logits)


def test_a_stored_head_is_left_out_where_the_config_ties_it_unless_it_is_another(tmp_path, config, weights):
    tied = replace(config, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(tied.to_dict()))
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")  # with lm_head.weight
    found, read = read_checkpoint(tmp_path)  # as transformers 4.57 and PEFT save a trained head: it is another
    assert found == config
    assert_same_bits(read, weights)
    assert "a different head" in read.remarks[0]
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    safetensors.numpy.save_file(same, tmp_path / "model.safetensors")
    found, read = read_checkpoint(tmp_path)
    assert found == tied
    assert not read.remarks
    assert_same_bits(read, {name: w for name, w in weights.items() if name != "lm_head.weight"})


def test_everything_that_is_wrong_is_told_at_once(tmp_path, config, weights):
    wrong = dict(weights)
    for name in ("mlp.up_proj", "self_attn.q_norm"):
        del wrong[f"model.layers.0.{name}.weight"]
    wrong["model.layers.0.self_attn.q_proj.bias"] = np.ones(96, np.float32)
    wrong["model.layers.0.self_attn.k_norm.weight"] = np.ones(17, np.float32)
    wrong["model.layers.0.mlp.down_proj.weight"] = wrong["model.layers.0.mlp.down_proj.weight"].T.copy()
    wrong["model.norm.weight"] = np.ones(40, np.int8)
    folder = tmp_path / "wrong"
    weight_map = save_shards(folder, config, wrong, 2)
    weight_map["model.layers.0.self_attn.q_norm.weight"] = "cut.safetensors"
    header = {"model.layers.0.self_attn.q_norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
    write(folder / "cut.safetensors", header, bytes(63))
    cut = (folder / "cut.safetensors").stat().st_size + 1
    weight_map["model.layers.0.input_layernorm.weight"] = "model-00009-of-00002.safetensors"
    weight_map["model.layers.0.post_attention_layernorm.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    told = problems(folder)
    for part in (
        "model.layers.0.mlp.up_proj.weight: missing",
        "model.layers.0.self_attn.q_proj.bias: extra",
        "model.layers.0.self_attn.k_norm.weight: shape (17,), but the config requires (16,)",
        "model.layers.0.mlp.down_proj.weight: shape (56, 40), but the config requires (40, 56)",
        "model.norm.weight: dtype int8; supported: bfloat16, float16, float32",
        f"cut.safetensors: truncated: {cut - 1} bytes of {cut}; download it again",
        "model-00009-of-00002.safetensors: missing",
        "model.layers.0.post_attention_layernorm.weight: model.safetensors.index.json puts it into '../elsewhere",
    ):
        assert part in told
    assert "... and" not in told
    for name in ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"):
        assert f"{name}.weight: " not in told


def test_a_long_list_of_problems_is_cut_and_counted(folder, config):
    (folder / "config.json").write_text(json.dumps(replace(config, num_hidden_layers=4).to_dict()))
    told = problems(folder)
    assert told.count(": missing") == 20
    assert told.endswith(f"... and {3 * 11 - 20} more")


def test_a_file_that_is_cut_off_is_told_once(folder):
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(content[: start + 1])
    size = f"{start + 1} bytes of {len(content)}; download it again"
    assert problems(folder) == f": not a usable checkpoint: model.safetensors: truncated: {size}"


def test_a_long_list_begins_with_the_cause(folder, config):
    (folder / "config.json").write_text(json.dumps(replace(config, num_hidden_layers=28).to_dict()))
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: truncated" in problems(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path, config, weights):
    weight_map = save_shards(tmp_path / "twice", config, weights, 2)
    first, second = sorted(set(weight_map.values()))
    shard = safetensors.numpy.load_file(tmp_path / "twice" / first)
    safetensors.numpy.save_file(
        shard | {"lm_head.weight": weights["lm_head.weight"], "model.embed_tokens.weight": weights["lm_head.weight"]},
        tmp_path / "twice" / second,
    )
    assert "model.embed_tokens.weight: in more than one file" in problems(tmp_path / "twice")


def test_an_index_is_held_against_its_shards(tmp_path, config, weights):
    folder = tmp_path / "shards"
    weight_map = save_shards(folder, config, weights, 2)
    first, second = sorted(set(weight_map.values()))
    name = next(name for name, shard in weight_map.items() if shard == first)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {name: second}}))
    assert f"{name}: not in {second}, where {index.name} puts it" in problems(folder)
    (folder / second).unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"{second}: missing, though {index.name} names it" in problems(folder)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", "..", 7, None, []]
)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path, config, weights, shard):
    weight_map = save_shards(tmp_path / "shards", config, weights, 1)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "shards" / "sub").mkdir()
    safetensors.numpy.save_file(weights, tmp_path / "shards" / "sub" / "model.safetensors")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": shard}}))
    told = f"model.norm.weight: {index.name} puts it into {shard!r}, which is not the name of a file in the folder"
    assert told in problems(tmp_path / "shards")


@pytest.mark.parametrize("shard", ["no.safetensors", "x" * 300, "\0", "sub"])
def test_an_index_may_name_what_is_no_file(tmp_path, config, weights, shard):
    weight_map = save_shards(tmp_path / "shards", config, weights, 1)
    (tmp_path / "shards" / "sub").mkdir()
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": shard}}))
    shown = shard.replace("\0", r"\x00")
    assert f"{shown}: missing, though {index.name} names it" in problems(tmp_path / "shards")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="everything can be read here")
def test_a_file_that_must_not_be_read(folder):
    (folder / "model.safetensors").chmod(0)
    assert "model.safetensors: cannot be read: Permission denied" in problems(folder)


def test_names_and_types_do_not_break_a_line_or_fill_the_screen(folder):
    odd = "\x1b[2J\n\u2028"
    for header, shown in (
        ({odd: GOOD | {"dtype": "\u202e"}, "x" * 10**6: 7}, r"\u202e"),
        ({odd: GOOD, "x" * 10**6: GOOD | {"data_offsets": [160, 320]}}, r"\x1b[2J\n\u2028: extra"),
    ):
        write(folder / "model.safetensors", header, bytes(320))
        told = problems(folder)
        assert told.isprintable()
        assert len(told) < 5000
        assert shown in told


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_is_none(tmp_path, config, weights, content):
    save_shards(tmp_path / "shards", config, weights, 1)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path / "shards")


def test_what_is_no_checkpoint_folder(tmp_path, config):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a format that can run.*save_pretrained"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1), struct.pack("<Q", 2**64 - 1) + b"{}"])
def test_a_file_too_short_for_its_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert f"model.safetensors: truncated: {len(content)} bytes, too few for its header" in problems(folder)


ENCODED = [json.dumps({"__metadata__": {}}).encode(name) for name in ("utf-8-sig", "utf-16", "utf-32-le")]
CROWDED = json.dumps({str(n): 0 for n in range(200_001)}).encode()


@pytest.mark.parametrize("header", [b"", b"\xff\x00", b"{", b"[" * 100_000, b"[]", b"null", *ENCODED, CROWDED])
def test_a_header_that_is_none(folder, header):
    write(folder / "model.safetensors", header)
    told = problems(folder)
    assert told.startswith(": not a usable checkpoint: model.safetensors: damaged: ")
    assert told.endswith("; download it again")


GOOD = {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}
DAMAGED = "model.safetensors: damaged: "  # and why, in the words of the safetensors library
ENTRIES = [
    (7, DAMAGED),
    ({}, DAMAGED),
    (GOOD | {"shape": 40}, DAMAGED),
    (GOOD | {"shape": [-40]}, DAMAGED),
    (GOOD | {"shape": [40.0]}, DAMAGED),
    (GOOD | {"data_offsets": [0]}, DAMAGED),
    (GOOD | {"data_offsets": [-160, 0]}, DAMAGED),
    (GOOD | {"data_offsets": ["0", "160"]}, DAMAGED),
    (GOOD | {"dtype": "F8_E4M3", "shape": [160]}, "model.norm.weight: dtype float8_e4m3fn; supported"),
    (GOOD | {"dtype": "F4", "shape": [320]}, "model.norm.weight: dtype F4 in model.safetensors does not exist"),
    (GOOD | {"dtype": "F64", "shape": [20]}, "model.norm.weight: shape (20,), but the config"),
    (GOOD | {"dtype": None}, DAMAGED),
    (GOOD | {"dtype": ["F32"]}, DAMAGED),
    (GOOD | {"data_offsets": [0, 159]}, DAMAGED),
    (GOOD | {"data_offsets": [160, 0]}, DAMAGED),
    (GOOD | {"data_offsets": [80, 240]}, "model.safetensors: truncated: 249 bytes of 329; download it again"),
    (GOOD | {"shape": [2**62, 2**62]}, DAMAGED),
    (GOOD | {"shape": [40] + [1] * 64}, "model.norm.weight: impossible shape in model.safetensors"),
    (GOOD | {"shape": [0, 2**62, 2**62], "data_offsets": [160, 160]}, DAMAGED),
    (GOOD | {"shape": [0, 10**4000], "data_offsets": [160, 160]}, DAMAGED),
    (GOOD | {"data_offsets": [10**4299, 10**4299 + 160]}, DAMAGED),
    (GOOD | {"shape": [0], "data_offsets": [160, 160]}, DAMAGED),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES)
def test_an_entry_that_cannot_be(folder, entry, message):
    write(folder / "model.safetensors", {"model.norm.weight": entry}, bytes(160))
    told = problems(folder)
    assert message in told
    assert "model.norm.weight: missing" not in told


def test_half_a_surrogate_pair_is_no_text(folder):
    write(folder / "model.safetensors", {"__metadata__": {"both": "\U0001f600"}})
    assert DAMAGED not in problems(folder)
    write(folder / "model.safetensors", {"__metadata__": {"half": "\ud83d"}})
    assert DAMAGED in problems(folder)


@pytest.mark.parametrize("size", [1, 5])
def test_a_file_that_is_replaced_while_its_header_is_read(tmp_path, monkeypatch, size):
    file, other, read = tmp_path / "x.safetensors", tmp_path / "other", safetensors.safe_open
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, file)
    safetensors.numpy.save_file({"a": np.zeros(size, np.float32)}, other)

    def late(*arguments):
        os.replace(other, file)
        return read(*arguments)

    monkeypatch.setattr(safetensors, "safe_open", late)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: was replaced while its header was being read"):
        map_tensors(file)


@pytest.mark.parametrize("metadata", [{"format": 1}, ["pt"]])
def test_metadata_is_an_object_of_texts(folder, metadata):
    write(folder / "model.safetensors", {"__metadata__": metadata})
    assert DAMAGED in problems(folder)


def test_a_name_that_is_given_twice_means_what_it_means_to_the_safetensors_library(tmp_path):
    file = tmp_path / "twice.safetensors"
    entry = json.dumps(GOOD)
    write(file, f'{{"a": {entry.replace("F32", "I32")}, "a": {entry}}}'.encode(), np.arange(40, dtype="f4").tobytes())
    assert_same_bits(map_tensors(file), safetensors.numpy.load_file(file))
    write(file, f'{{"a": {entry}, "a": {entry.replace("0, 160", "160, 320")}}}'.encode(), bytes(320))
    with pytest.raises(CheckpointError, match=r"twice\.safetensors: damaged"):  # the bytes of the first have no name
        map_tensors(file)


@given(st.data())
@settings(max_examples=100)
def test_a_damaged_header_is_told_or_harmless(config, weights, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    save_checkpoint(folder, config, weights)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, header, header // 2]))])
    try:
        _, read = read_checkpoint(folder)
    except CheckpointError:
        return
    assert {name: tensor.shape for name, tensor in read.items()} == weight_shapes(config)


def test_saving_never_replaces_a_checkpoint(folder, config, weights):
    for removed in ("config.json", "model.safetensors"):  # half of a checkpoint is one too
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(CheckpointError, match="already holds a checkpoint"):
            save_checkpoint(folder, config, weights)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        (folder / removed).unlink()
    save_checkpoint(folder, config, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight: missing"),
        (
            {"model.norm.weight": np.ones(41, np.float32)},
            "model.norm.weight: shape (41,), but the config requires (40,)",
        ),
        ({"model.norm.weight": np.ones(40)}, "model.norm.weight: dtype float64; supported: bfloat16, float16, float32"),
        ({"model.norm.bias": np.ones(40, np.float32)}, "model.norm.bias: extra"),
    ],
)
def test_weights_that_do_not_fit_are_not_saved(tmp_path, config, weights, change, message):
    wrong = {name: w for name, w in (dict(weights) | change).items() if w is not None}
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "new", config, wrong)
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_of_a_save_that_fails(tmp_path, config, weights):
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the disk is full in the middle of the tensors
    try:
        with pytest.raises(ValueError, match=r"safetensors: cannot be written \(File too large\); free"):
            save_checkpoint(tmp_path / "new", config, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").iterdir())
    save_checkpoint(tmp_path / "new", config, weights)
    assert_same_bits(read_checkpoint(tmp_path / "new")[1], weights)


def test_a_save_that_was_stopped_between_its_files_can_be_done_again(tmp_path, config, weights, monkeypatch):
    new, move, moved = tmp_path / "new", os.replace, []

    def once(part, whole):
        if moved:
            raise KeyboardInterrupt
        moved.append(whole)
        move(part, whole)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(new, config, weights)
    assert list(new.iterdir()) == moved
    with pytest.raises(CheckpointError, match=r"already holds a checkpoint \(config.json\)"):
        save_checkpoint(new, replace(config, rope_theta=1e4), weights)
    save_checkpoint(new, config, weights)
    assert_same_bits(read_checkpoint(new)[1], weights)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def whole(request, tmp_path):
    """A checkpoint with all that there can be: either form of the tokenizer, templates, generation_config.json."""
    files, other, *_ = fuzz.originals()
    del other["model.safetensors"]
    folder = tmp_path / "whole"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name, content in (files if request.param == "tokenizer.json" else files | other).items():
        (folder / name).write_bytes(content)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "README.md").write_text("of another checkpoint")
    if request.param == "vocab.json":
        (folder / "tokenizer.json").unlink()
        (folder / "config.json").write_bytes(files["config.json"])
    return folder


def test_a_whole_model_is_saved(whole, tmp_path):
    model, new = load(whole, weights_dtype="bfloat16", progress=False), tmp_path / "new"
    parts = {"tokenizer": model.tokenizer, "generation_config": model.generation_config}
    save_checkpoint(new, model.config, model.weights, **parts)
    before, after = contents(whole), contents(new)
    kept = before.keys() - {"README.md", "config.json", "generation_config.json"}
    kept = {name for name in kept if ".safetensors" not in name}
    assert after.keys() == kept | {"config.json", "generation_config.json", "model.safetensors"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    again = load(new, weights_dtype="bfloat16", progress=False)
    assert (again.config, again.generation_config) == (model.config, model.generation_config)
    assert_same_bits(again.weights, model.weights)
    messages = [{"role": "user", "content": "2 + 2?"}]
    text = model.tokenizer.apply_chat_template(messages)
    assert again.tokenizer.apply_chat_template(messages) == text
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_a_save_with_other_files_in_its_way_changes_nothing(whole, tmp_path):
    model, new = load(whole, weights_dtype="bfloat16", progress=False), tmp_path / "new"
    new.mkdir()
    (new / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"already holds a checkpoint \(tokenizer_config\.json\)"):
        save_checkpoint(new, model.config, model.weights, tokenizer=model.tokenizer)
    assert contents(new) == {"tokenizer_config.json": b"{}"}
    (new / "tokenizer_config.json").write_bytes((whole / "tokenizer_config.json").read_bytes())  # of a killed save
    save_checkpoint(new, model.config, model.weights, tokenizer=model.tokenizer)
    assert (new / "model.safetensors").exists()


def test_a_tokenizer_whose_files_are_gone_is_not_saved_as_none(whole, tmp_path):
    model = load(whole, weights_dtype="bfloat16", progress=False)
    for name in ("tokenizer.json", "vocab.json"):
        (whole / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"whole: no tokenizer\.json, nor vocab\.json with merges\.txt"):
        save_checkpoint(tmp_path / "new", model.config, model.weights, tokenizer=model.tokenizer)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layers", [1, 94])
def test_loaded_weights_fit_a_notebook_cell(config, layers):
    large = replace(config, num_hidden_layers=layers, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=9)
    zero = np.zeros((), BFLOAT16)
    weights = LoadedWeights({name: np.broadcast_to(zero, shape) for name, shape in weight_shapes(large).items()})
    lines = repr(weights).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 12
    count = count_parameters(large)["unique"]
    assert lines[0] == f"{len(weights)} tensors, {count:,} parameters, bfloat16, {2 * count / 1e6:,.1f} MB"
    assert [line.split()[0] for line in lines[1:3]] == list(weights)[:2]
    assert [line.split()[0] for line in lines[-3:]] == ["...", *list(weights)[-2:]]
    assert lines[-1].split() == ["lm_head.weight", "(101,", "40)", "bfloat16"]
    pretty = pytest.importorskip("IPython.lib.pretty")
    assert pretty.pretty(weights) == repr(weights)


def test_loaded_weights_are_a_dictionary(folder, weights):
    read = read_checkpoint(folder)[1]
    assert list(read.files) == [(folder / "model.safetensors").absolute()]
    assert repr(read).splitlines()[0].endswith(", mapped")
    few = LoadedWeights({name: weights[name] for name in ("model.norm.weight", "lm_head.weight")})
    assert [line.split()[0] for line in repr(few).splitlines()] == ["2", "model.norm.weight", "lm_head.weight"]
    assert type(read | few) is dict  # edited weights are no longer those of the files
    assert_same_bits(pickle.loads(pickle.dumps(read)), read)


@given(SEEDS)
@settings(max_examples=10)
def test_new_weights_are_those_a_training_run_starts_with(seed):
    config = replace(draw_any_config(np.random.default_rng(seed)), initializer_range=0.05)
    weights = init_weights(config, seed)
    assert_same_bits(init_weights(config, seed), weights)
    assert {name: w.shape for name, w in weights.items()} == weight_shapes(config)
    for name, w in weights.items():
        assert w.dtype == np.float32
        if w.ndim == 2:
            assert abs(w.std() / 0.05 - 1) < 5 / np.sqrt(2 * w.size)
            assert abs(w.mean()) < 5 * 0.05 / np.sqrt(w.size)
            assert not np.array_equal(w, init_weights(config, seed + 1)[name])
        else:
            np.testing.assert_array_equal(w, 0 if name.endswith("bias") else 1)
    for name, w in init_weights(config, seed, trained_like=True).items():
        assert np.unique(w).size > w.size // 2, name  # nothing is constant
    assert len({w.flat[0] for w in weights.values() if w.ndim == 2}) == sum(w.ndim == 2 for w in weights.values())


def test_overlaps_and_holes_are_told(folder, config, weights):
    save_file = safetensors.numpy.save_file
    save_file(weights, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    shifted = json.loads(json.dumps(header))
    begin, end = shifted["model.norm.weight"]["data_offsets"]
    first = end - begin  # onto another tensor of the same size, or a part of a larger one
    shifted["model.norm.weight"]["data_offsets"] = [0, first] if begin else [first, 2 * first]
    write(folder / "model.safetensors", shifted, data)
    assert DAMAGED in problems(folder)
    write(folder / "model.safetensors", header, data + bytes(8))
    assert DAMAGED in problems(folder)
    write(folder / "model.safetensors", header, data)
    read_checkpoint(folder)


def test_a_weight_too_large_for_float16_is_not_saved(tmp_path, config, weights):
    large = {name: tensor * np.float32(1e6) for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match="too large for float16"):
        save_checkpoint(tmp_path / "new", config, large, dtype=np.float16)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_head_that_the_config_ties_is_not_saved(tmp_path, config):
    tied = replace(config, tie_word_embeddings=True)
    weights = trained_like(tied, 0)
    save_checkpoint(tmp_path / "new", tied, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert_same_bits(read_checkpoint(tmp_path / "new")[1], weights)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_release_gives_back_the_memory_of_a_mapped_tensor_but_not_its_numbers(tmp_path):
    large = np.random.default_rng(0).standard_normal((2, 1 << 20)).astype(np.float32)
    file = tmp_path / "large.safetensors"
    safetensors.numpy.save_file({"a": large[0], "b": large[1]}, file)
    tensors = map_tensors(file)

    def resident():  # bytes of the file that are in this process's memory
        mapping = Path("/proc/self/smaps").read_text().split(str(file))[1]
        return 1024 * int(re.search(r"Rss: +(\d+) kB", mapping)[1])

    for tensor, row in zip((tensors["a"], tensors["b"]), large, strict=True):
        np.testing.assert_array_equal(tensor, row)
    assert resident() >= large.nbytes
    release(tensors["a"])
    assert large[1].nbytes <= resident() <= large[1].nbytes + (1 << 18)
    np.testing.assert_array_equal(tensors["a"], large[0])
    release(large[0])  # what is not mapped stays
    np.testing.assert_array_equal(tensors["a"], large[0])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_will_need_reads_a_tensor_and_nothing_around_it(tmp_path):
    large = np.random.default_rng(0).standard_normal((4, 1 << 21)).astype(np.float32)  # 8 MB each
    file = tmp_path / "large.safetensors"
    safetensors.numpy.save_file(dict(zip("abcd", large, strict=True)), file)
    with file.open("rb") as opened:  # not one page of it stays in memory
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tensors = map_tensors(file)

    def in_memory(name):  # the share of its pages
        first = tensors[name].ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        pages = (ctypes.c_ubyte * (large[0].nbytes // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(large[0].nbytes), pages) == 0
        return np.mean(np.frombuffer(pages, np.uint8) & 1)

    if in_memory("b"):
        pytest.skip("this file system keeps its files in memory")
    will_need(tensors["b"])
    until = time.monotonic() + 20
    while in_memory("b") < 0.99 and time.monotonic() < until:
        time.sleep(0.01)
    assert in_memory("b") >= 0.99
    assert max(map(in_memory, "acd")) <= 0.05
    np.testing.assert_array_equal(tensors["b"], large[1])
    will_need(large[0])  # what is not mapped stays as it is
