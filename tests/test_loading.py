"""load: settings from generation_config.json, when a copy is made, and which arguments raise errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from qwen3np import CheckpointError, Config, count_parameters, forward, generate, load
from qwen3np import loading as module
from qwen3np.files.hub import BUILTIN


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(BUILTIN, tmp_path / "checkpoint")


def configure(folder, **generation_config):
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return load(folder, progress=False)


def test_defaults_are_those_of_generation_config(folder):
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    model = configure(folder, **sampling, do_sample=True, eos_token_id=[5, 7], max_new_tokens=11)
    assert model.generation_defaults() == {**sampling, "stop_ids": (5, 7), "max_new_tokens": 11}
    model = configure(folder, **sampling, do_sample=False, eos_token_id=9, repetition_penalty=1.1, pad_token_id=None)
    expected = {"temperature": 0.0, "stop_ids": (9,), "max_new_tokens": 2048, "repetition_penalty": 1.1}
    assert model.generation_defaults() == expected
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    expected = {"temperature": 0.0, "stop_ids": (config["eos_token_id"],), "max_new_tokens": 2048}
    assert load(folder, progress=False).generation_defaults() == expected


def test_generate_and_stream_take_them_and_arguments_override(folder):
    model = configure(folder, do_sample=True, temperature=5.0, top_k=50, max_new_tokens=9, eos_token_id=[])
    explicit = {"temperature": 5.0, "top_k": 50, "seed": 3}
    expected = generate(model.weights, model.config, [1, 2], max_new_tokens=9, **explicit)[0]
    assert model.generate([1, 2], seed=3)[0] == list(model.stream([1, 2], seed=3)) == expected
    greedy = generate(model.weights, model.config, [1, 2], max_new_tokens=4)[0]
    assert model.generate([1, 2], temperature=0, max_new_tokens=4)[0] == greedy != expected[:4]


@pytest.mark.parametrize(
    ("generation_config", "message"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens = '5' must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 must be a whole number"),
        ({"temperature": [1], "do_sample": True}, r"temperature = \[1\] must be a finite number"),
        ({"repetition_penalty": 10**400}, "repetition_penalty = 10{400} must be a finite number"),
        ({"suppress_tokens": [1, "a"]}, r"suppress_tokens = \[1, 'a'\] must be a collection of ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"sequence_bias": [[3]]}, "sequence_bias"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"do_sample": "no"}, "do_sample = 'no' is neither true nor false"),
        ({"eos_token_id": 3.5}, "eos_token_id = 3.5 is neither a token id nor a list of them"),
        ({"eos_token_id": "257"}, "eos_token_id = '257'"),
        ({"eos_token_id": [1, "a"]}, "eos_token_id"),
        ({"eos_token_id": {}}, "eos_token_id = {} is neither"),
    ],
)
def test_a_generation_config_that_cannot_be(folder, generation_config, message):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        configure(folder, **generation_config)


@pytest.mark.parametrize(
    ("name", "value", "off", "what"),
    [
        ("num_beams", 3, 1, "beam search"),
        ("penalty_alpha", 0.6, 0, "contrastive search"),
        ("guidance_scale", 1.5, 1, "classifier-free guidance"),
        ("dola_layers", "high", None, "DoLa decoding"),
        ("watermarking_config", {"seeding_scheme": "selfhash"}, None, "watermarking"),
    ],
)
def test_another_algorithm_is_refused_by_name_unless_an_argument_overrides_it(folder, name, value, off, what):
    model = configure(folder, **{name: value}, max_new_tokens=4)
    with pytest.raises(ValueError, match=rf"{name}=.* is {what}.*{name}={off}"):
        model.generate([1, 2])
    assert model.generate([1, 2], **{name: off})[0] == load(progress=False).generate([1, 2], max_new_tokens=4)[0]
    assert configure(folder, **{name: off}, max_new_tokens=4).generate([1, 2])  # as files that say so


def test_lengths_of_the_file(folder):
    model = configure(folder, max_length=7, eos_token_id=[])
    assert len(model.generate([1, 2, 3])[0]) == 4
    assert len(model.generate([1, 2, 3], max_new_tokens=9)[0]) == 9  # wins, as in transformers
    assert len(configure(folder, max_length=7, max_new_tokens=2, eos_token_id=[]).generate([1, 2, 3])[0]) == 2
    with pytest.raises(ValueError, match="max_length=7: prompt 1 is already that long"):
        model.generate([[1], list(range(7))])


def test_the_copy(folder, monkeypatch):
    parameters = count_parameters(Config.from_file(folder))["unique"]
    for free, dtype in ((8 * parameters, "float32"), (8 * parameters - 1, "bfloat16")):
        monkeypatch.setattr(module, "available_memory", lambda free=free: free)
        assert str(load(folder, progress=False).weights["model.norm.weight"].dtype) == dtype
    mapped, copied = (load(folder, weights_dtype=name, progress=False) for name in ("bfloat16", "float32"))
    assert str(mapped.weights["model.norm.weight"].dtype) == "bfloat16"
    assert np.array_equal(mapped.forward([1, 2, 3]), copied.forward([1, 2, 3]))
    assert np.array_equal(mapped.forward([1, 2, 3]), forward(mapped.weights, mapped.config, [1, 2, 3]))
    with pytest.raises(ValueError, match="weights_dtype='int8' is unknown"):
        load(folder, weights_dtype="int8")


@pytest.mark.parametrize("piece", [999, 1 << 22])
def test_the_copy_is_exact_whatever_the_pieces(folder, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    copied = load(folder, weights_dtype="float32", progress=False).weights
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert copied.keys() == set(file.keys())
        for name, tensor in copied.items():
            bits = file.get_tensor(name).view(np.uint16).astype(np.uint32) << 16  # a bfloat16 is half a float32
            assert np.array_equal(tensor.view(np.uint32), bits)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize(("weights_dtype", "mapped"), [("bfloat16", True), ("float32", False)])
def test_the_file_is_mapped_as_long_as_it_is_needed(folder, weights_dtype, mapped):
    model = load(folder, weights_dtype=weights_dtype, progress=False)
    assert (str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()) == mapped
    del model
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()


def test_auto_says_what_it_chose_where_it_matters(folder, monkeypatch, capsys):
    size = 4 * count_parameters(Config.from_file(folder))["unique"]

    def said(free, **options):
        monkeypatch.setattr(module, "available_memory", lambda: free)
        load(folder, **options)
        return capsys.readouterr().err

    mapped = "[weights mapped as they are: a float32 copy would take 0.0 GB"
    assert said(2 * size) == ""  # a small copy goes without saying
    assert said(2 * size - 1) == f"{mapped} of 0.0 GB of free memory]\n"
    assert said(0) == f"{mapped} and how much memory is free is unknown]\n"
    assert said(0, progress=False) == said(0, weights_dtype="bfloat16") == said(0, weights_dtype="float32") == ""
    monkeypatch.setattr(module, "SMALL", size)
    copy = "[a float32 copy of the weights: 0.0 GB of 20.1 GB of free memory]\n"
    assert said(20_100_000_000) == copy


def test_a_folder_without_tokenizer_works_on_ids(folder):
    (folder / "tokenizer.json").unlink()
    model = load(folder, progress=False)
    assert model.tokenizer is None
    assert len(model.generate([1, 2], max_new_tokens=2, stop_ids=())[0]) == 2
