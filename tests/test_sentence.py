"""sentence-transformers folders: pooling, prompts and ends against the hidden states of a plain float64 forward."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qwen3np import CheckpointError, embed, forward, load
from qwen3np.files.hub import BUILTIN

TEXTS = ["Berlin liegt an der Spree.", "is the river", "a " * 40]


def folder(path, pooling=None, texts=None, modules=("Transformer", "Pooling", "Normalize")):
    shutil.copytree(BUILTIN, path, ignore=shutil.ignore_patterns("README.md", "*.png", "*.csv"))
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": places.get(kind, "3")} for kind in modules]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    if texts:
        (path / "config_sentence_transformers.json").write_text(json.dumps(texts))
    return path


def states(model, ids):
    weights = {name: np.asarray(w, np.float64) for name, w in model.weights.items()}
    return forward(weights, model.config, ids, numerics="float64", engine="plain", head=False)[0]


POOLINGS = {
    "mean": ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda h: h.mean(0)),
    "cls": ({"pooling_mode_cls_token": True}, lambda h: h[0]),
    "last": ({"pooling_mode_lasttoken": True, "include_prompt": True}, lambda h: h[-1]),
    "new spelling": ({"pooling_mode": "mean"}, lambda h: h.mean(0)),
}


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("ends", [True, False])
def test_vectors_are_pooled_and_texts_end_as_the_folder_says(tmp_path, name, ends):
    settings, pool = POOLINGS[name]
    path = folder(tmp_path / "x", settings)
    end = load(progress=False).tokenizer.token_to_id("<|endoftext|>")
    if ends:  # as Qwen3-Embedding's tokenizer.json
        d = json.loads((path / "tokenizer.json").read_text())
        d["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
        }
        (path / "tokenizer.json").write_text(json.dumps(d))
    model = load(path, progress=False)
    for text, vector in zip(TEXTS, embed(model, TEXTS), strict=True):
        truth = pool(states(model, model.tokenizer.encode(text) + [end] * ends))
        np.testing.assert_allclose(vector, truth / np.linalg.norm(truth), atol=3e-6)


@pytest.mark.parametrize("included", [True, False])
def test_the_default_prompt_and_what_the_mean_leaves_out(tmp_path, included):
    texts = {"prompts": {"query": "is the ", "document": ""}, "default_prompt_name": "query"}
    path = folder(tmp_path / "x", {"pooling_mode_mean_tokens": True, "include_prompt": included}, texts)
    model = load(path, progress=False)
    prompt = len(model.tokenizer.encode("is the "))
    for text, vector in zip(TEXTS, embed(model, TEXTS), strict=True):
        truth = states(model, model.tokenizer.encode("is the " + text))[0 if included else prompt :].mean(0)
        np.testing.assert_allclose(vector, truth / np.linalg.norm(truth), atol=3e-6)


def test_prompts_by_name(tmp_path):
    prompts = {"query": "is the ", "document": ""}
    path = folder(tmp_path / "x", texts={"prompts": prompts, "default_prompt_name": "query"})
    model = load(path, progress=False)
    for name, prompt in prompts.items():
        for text, vector in zip(TEXTS, embed(model, TEXTS, prompt=name), strict=True):
            truth = states(model, model.tokenizer.encode(prompt + text)).mean(0)
            np.testing.assert_allclose(vector, truth / np.linalg.norm(truth), atol=3e-6)
    np.testing.assert_array_equal(model.embed("is the river", prompt="document"), model.embed("river", prompt="query"))
    for unfit in ({"prompt": "x"}, {"prompt": "query", "instruction": "find it"}):
        with pytest.raises(ValueError, match=r"prompt='.*' must be one of its prompts.*: document, query"):
            embed(model, TEXTS, **unfit)
    with pytest.raises(ValueError, match="this model has none"):
        embed(load(progress=False), TEXTS, prompt="query")


@pytest.mark.parametrize(
    ("settings", "modules", "message"),
    [
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "pooling by .*max_tokens.* is not supported"),
        (None, ("Transformer", "Pooling", "Dense"), "the module Dense is not supported"),
        (None, ("Transformer",), "has no Pooling"),
    ],
)
def test_other_folders_are_refused(tmp_path, settings, modules, message):
    with pytest.raises(CheckpointError, match=message):
        load(folder(tmp_path / "x", settings, modules=modules), progress=False)
