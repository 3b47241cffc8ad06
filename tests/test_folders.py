"""Real-world folders: other names, buffers, heads, shards; and the error that says what a folder is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from drawing import SMALL, SMALL_IDS

from qwen3np import CheckpointError, ConfigError, forward, init_weights, load, read_checkpoint, save_checkpoint
from qwen3np.config import Config

DENSE, IDS = Config(**SMALL), SMALL_IDS
SPARSE = replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
WEIGHTS = {config: init_weights(config, 0, trained_like=True) for config in (DENSE, SPARSE)}


def write(folder, tensors, config=DENSE, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    tensors = {name: np.ascontiguousarray(w) for name, w in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(folder, config=DENSE):
    found, weights = read_checkpoint(folder)
    assert weights.keys() == WEIGHTS[config].keys()
    for name, w in WEIGHTS[config].items():
        np.testing.assert_array_equal(weights[name], w)
    np.testing.assert_array_equal(forward(weights, found, IDS), forward(WEIGHTS[config], config, IDS))
    return weights.remarks


PREFIXES = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "two": lambda name: f"module._orig_mod.{name}",
    "around layers": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "model.model.": lambda name: f"model.{name}",
    "language_model.": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("change", PREFIXES)
def test_prefixes_of_tools_are_taken_off_and_said(tmp_path, change):
    [remark] = assert_same(write(tmp_path / "x", {PREFIXES[change](name): w for name, w in WEIGHTS[DENSE].items()}))[:1]
    assert "is removed from the names" in remark


def test_tensors_that_change_nothing(tmp_path):
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.rotary_emb.original_inv_freq": np.ones(8, np.float32),
        "model.layers.1.self_attn.masked_bias": np.ones((), np.float32),
        "model.layers.1.self_attn.k_scale": np.ones(1, np.float32),
        "model.layers.1.mlp.up_proj.input_scale": np.ones(1, np.float32),
        "model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32),
        "v_head.summary.weight": np.ones((1, 32), np.float32),
    }
    assert assert_same(write(tmp_path / "x", WEIGHTS[DENSE] | more)) == ()
    wrong = {"model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: extra"):
        read_checkpoint(write(tmp_path / "x", WEIGHTS[DENSE] | wrong))


def test_float64_and_a_head_dim_that_is_left_out(tmp_path):
    wide = {name: w.astype(np.float64) if w.ndim == 1 else w for name, w in WEIGHTS[DENSE].items()}
    assert_same(write(tmp_path / "x", wide, head_dim=None))


def test_fused_experts_are_split(tmp_path):
    """As transformers 5 saves them with save_original_format=False."""
    fused = {}
    for name, w in WEIGHTS[SPARSE].items():
        _, found, _ = name.partition(".experts.")
        if not found:
            fused[name] = w
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([WEIGHTS[SPARSE][f"{prefix}.{n}.{part}_proj.weight"] for n in range(4)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    assert_same(write(tmp_path / "x", fused, SPARSE), SPARSE)
    fused["model.layers.0.mlp.experts.down_proj"] = fused["model.layers.0.mlp.experts.down_proj"][:, :, 1:]
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: shape \(4, 32, 23\), but the config requires"):
        read_checkpoint(write(tmp_path / "x", fused, SPARSE))


def test_a_tied_model_with_only_its_head_and_an_untied_one_without(tmp_path):
    tied = {name: w for name, w in WEIGHTS[DENSE].items() if name != "model.embed_tokens.weight"}
    config, weights = read_checkpoint(write(tmp_path / "x", tied, tie_word_embeddings=True))
    assert config.tie_word_embeddings
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], WEIGHTS[DENSE]["lm_head.weight"])
    headless = {name: w for name, w in WEIGHTS[DENSE].items() if name != "lm_head.weight"}
    config, weights = read_checkpoint(write(tmp_path / "y", headless))
    states = forward(weights, config, IDS, head=False)
    np.testing.assert_array_equal(states, forward(WEIGHTS[DENSE], DENSE, IDS, head=False))
    with pytest.raises(ValueError, match="makes embeddings, not text"):
        forward(weights, config, IDS)


def test_a_score_head_is_kept_and_saved(tmp_path):
    score = {"score.weight": np.ones((1, 32), np.float32)}
    without = {name: w for name, w in WEIGHTS[DENSE].items() if name != "lm_head.weight"}
    folder = write(tmp_path / "x", without | score, architectures=["Qwen3ForSequenceClassification"])
    model = load(folder, progress=False)
    np.testing.assert_array_equal(model.weights["score.weight"], score["score.weight"])
    model.save(tmp_path / "again")
    assert load(tmp_path / "again", progress=False).weights.keys() == model.weights.keys()
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["architectures"], saved["num_labels"]) == (["Qwen3ForSequenceClassification"], 1)


def shards(folder, count=3):
    names = list(WEIGHTS[DENSE])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DENSE.to_dict()))
    for n in range(count):
        part = {name: WEIGHTS[DENSE][name] for name in names[n::count]}
        safetensors.numpy.save_file(part, folder / f"model-{n + 1:05}-of-{count:05}.safetensors")
    return folder


def test_shards_without_an_index_are_loaded_when_they_are_whole(tmp_path):
    assert_same(shards(tmp_path / "x"))
    (tmp_path / "x" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing \(1 of 3 shards\)"):
        read_checkpoint(tmp_path / "x")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1503300328\n"


def folder_of(files):
    def make(folder):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return make


CONFIG = json.dumps(DENSE.to_dict()).encode()
KINDS = {
    "weights of git-lfs": (folder_of({"config.json": CONFIG, "model.safetensors": LFS}), "run `git lfs pull` in"),
    "config of git-lfs": (folder_of({"config.json": LFS, "model.safetensors": b""}), "git lfs pull|truncated"),
    "empty": (folder_of({"config.json": CONFIG, "model.safetensors": b""}), "truncated: 0 bytes.*download it again"),
    ".bin": (folder_of({"config.json": CONFIG, "pytorch_model.bin": b""}), r"pytorch_model\.bin.*save_pretrained"),
    ".pth": (folder_of({"config.json": CONFIG, "consolidated.00.pth": b""}), r"00\.pth.*save_pretrained"),
    "cache": (folder_of({"models--Qwen--Qwen3-0.6B/refs/main": b""}), "root of a Hub cache: give the name"),
    "other name": (folder_of({"config.json": CONFIG, "weights.safetensors": b""}), r"but weights\.safetensors: rename"),
    "inner folder": (folder_of({"a/config.json": CONFIG}), "not a checkpoint, but"),
    "another model": (
        folder_of({"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}),
        'model_type = "llama"|truncated',
    ),
    "no architecture": (folder_of({"x.gguf": b"GGUF\x03\0\0\0" + bytes(16)}), "architecture is None; supported: qwen3"),
    "no GGUF": (folder_of({"x.gguf": b"nothing"}), "not a GGUF file"),
    "several GGUF": (folder_of({"x.gguf": b"", "y.gguf": b""}), r"--gguf-file\): x\.gguf, y\.gguf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_folder_gets_a_line_with_cause_and_remedy(tmp_path, kind):
    make, message = KINDS[kind]
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        load(make(tmp_path), progress=False)
    assert str(error.value).isprintable()
    assert str(tmp_path) in str(error.value)


def test_the_root_of_a_cached_model(tmp_path):
    root = tmp_path / "models--Qwen--Qwen3-0.6B"
    (root / "snapshots" / "abc").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"folder for Qwen/Qwen3-0\.6B: give that name"):
        load(root, progress=False)


def test_a_file_given_as_the_model(tmp_path):
    folder = write(tmp_path / "x", WEIGHTS[DENSE])
    with pytest.raises(CheckpointError, match="a shard of a model: give the folder that holds it"):
        load(folder / "model.safetensors", progress=False)


def test_what_is_odd_is_said_once_on_stderr(tmp_path, capsys):
    folder = write(tmp_path / "x", WEIGHTS[DENSE], tie_word_embeddings=True)
    load(folder)
    assert "[config.json ties the head to the embedding, but the file has a different head" in capsys.readouterr().err
    load(folder, progress=False)
    assert not capsys.readouterr().err


def test_float_config_and_save_round_trip(tmp_path):
    save_checkpoint(tmp_path / "x", DENSE, WEIGHTS[DENSE])
    d = json.loads(Path(tmp_path / "x" / "config.json").read_text())
    text = json.dumps(d | {"hidden_size": 32.0, "use_cache": None}).replace(", ", ",\r\n")
    (tmp_path / "x" / "config.json").write_bytes(text.encode())
    assert read_checkpoint(tmp_path / "x")[0] == DENSE
