"""Model: its methods do what a user expects, and what the functions of the same names do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen3np import embed, forward, load, score


def test_a_model_is_callable(builtin):
    ids = builtin.text.encode("The capital of France is")
    np.testing.assert_array_equal(builtin(ids), forward(builtin.weights, builtin.config, ids))
    np.testing.assert_array_equal(builtin(ids, last_only=True), builtin.forward(ids, last_only=True))


def test_complete_is_text_in_text_out(builtin):
    assert builtin.complete("The capital of France is") == " Paris."
    assert builtin.complete("The capital of France is", max_new_tokens=1) == builtin.text.decode(
        builtin.generate(builtin.text.encode("The capital of France is"), max_new_tokens=1)[0]
    )


def test_score_takes_text_texts_and_ids(builtin):
    texts = ["The capital of France is Paris.", "Seven plus five is twelve."]
    expected = [score(builtin.weights, builtin.config, builtin.text.encode(text)) for text in texts]
    np.testing.assert_array_equal(builtin.score(texts[0]), expected[0])
    np.testing.assert_array_equal(builtin.score(builtin.text.encode(texts[0])), expected[0])
    for found, truth in zip(builtin.score(texts), expected, strict=True):
        np.testing.assert_array_equal(found, truth)


def test_embed_of_one_text_is_one_vector(builtin):
    vectors = builtin.embed(["hot", "cold"])
    np.testing.assert_array_equal(vectors, embed(builtin, ["hot", "cold"]))
    np.testing.assert_allclose(builtin.embed("cold"), vectors[1], atol=1e-6)
    assert builtin.embed("cold").shape == (builtin.config.hidden_size,)


def test_trace_gives_points_by_name(builtin):
    ids = builtin.text.encode("The capital of France is")
    seen = {}
    forward(builtin.weights, builtin.config, ids, trace=seen.__setitem__)
    found = builtin.trace("The capital of France is")
    assert found.keys() == seen.keys()
    np.testing.assert_array_equal(found["lm_head"], seen["lm_head"])
    maps = builtin.trace(ids, points="*.probs,lm_head")
    assert len(maps) == builtin.config.num_hidden_layers + 1
    np.testing.assert_allclose(maps["model.layers.0.self_attn.probs"].sum(-1), 1, rtol=1e-6)


def test_a_saved_model_loads_as_it_was(builtin, tmp_path):
    builtin.save(tmp_path / "copy")
    again = load(tmp_path / "copy", progress=False)
    assert again.config == builtin.config
    assert dict(again.generation_config) == dict(builtin.generation_config)
    assert again.weights.keys() == builtin.weights.keys()
    for name, tensor in builtin.weights.items():
        np.testing.assert_array_equal(again.weights[name], tensor)
    assert again.complete("The capital of France is") == " Paris."
    chat = [{"role": "user", "content": "Hello"}]
    assert again.text.apply_chat_template(chat) == builtin.text.apply_chat_template(chat)


def test_reprs_fit_a_notebook_cell(builtin):
    cache = builtin.generate(builtin.text.encode("Hello"), max_new_tokens=2)[1]
    for thing in (builtin, builtin.config, cache, builtin.tokenizer, builtin.weights):
        assert len(repr(thing)) <= 1000, thing
    assert "M parameters" in repr(builtin)
    assert "lengths [" in repr(cache)


def test_without_a_tokenizer_text_is_refused_and_ids_work(builtin):
    mute = replace(builtin, tokenizer=None)
    for call in (
        lambda: mute.complete("Hello"),
        lambda: mute.score("Hello"),
        lambda: mute.text,
        lambda: mute.trace("H"),
    ):
        with pytest.raises(ValueError, match=r"^this checkpoint has no tokenizer\.json"):
            call()
    assert mute.generate([1, 2], max_new_tokens=1)[0]
    assert "no tokenizer" in repr(mute)
