"""Conversations on the built-in checkpoint; what they should be is put together by hand, id by id."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3np import Conversation, generate

# An answer that does not end by itself, and that its own text, encoded anew, does not give back.
NOISE = {"max_new_tokens": 30, "temperature": 5.0, "seed": 4}


@pytest.fixture(scope="module")
def model(builtin):
    return builtin


@pytest.fixture(scope="module")
def stop(model):
    return model.tokenizer.token_to_id("<|im_end|>")


def user(model, text):
    return model.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def test_five_turns_compute_each_position_once(model, stop, computed):
    turns = [("Hello", {}), ("What?", NOISE), ("And?", NOISE | {"seed": 5}), ("What is two plus two?", {}), ("Bye", {})]
    conversation = Conversation(model)
    conversation.set_system("Be short.")
    answers = [list(conversation.reply(text, options={"stop_ids": [stop]} | options)) for text, options in turns]
    positions = sum(computed)

    ids = model.tokenizer.encode("<|im_start|>system\nBe short.<|im_end|>\n")
    for turn, ((text, options), answer) in enumerate(zip(turns, answers, strict=True)):
        ids += user(model, text)
        expected, _ = generate(model.weights, model.config, ids, stop_ids=[stop], **({"max_new_tokens": 50} | options))
        assert answer == expected  # without a cache
        ids += answer
        if turn < 4:
            ids += model.tokenizer.encode("\n" if answer[-1] == stop else "<|im_end|>\n")
    assert positions == len(ids) - 1  # the last token was never an input
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 5]
    assert answers[0][-1] == stop != answers[1][-1]
    assert any(model.tokenizer.encode(model.tokenizer.decode(noise)) != noise for noise in answers[1:3])


def test_an_answer_that_is_cut_off_stays_as_far_as_it_came(model, stop):
    conversation = Conversation(model)
    whole = list(conversation.reply("Hello", options=NOISE))
    cut = Conversation(model)
    reply = cut.reply("Hello", options=NOISE)
    assert [next(reply), next(reply)] == whole[:2]
    reply.close()
    assert cut.messages[-1] == {"role": "assistant", "content": model.tokenizer.decode(whole[:2])}
    ids = user(model, "Hello") + whole[:2] + model.tokenizer.encode("<|im_end|>\n") + user(model, "Go on")
    expected = generate(model.weights, model.config, ids, stop_ids=[stop], **NOISE)[0]
    assert list(cut.reply("Go on", options=NOISE)) == expected


def test_what_is_refused_was_never_said(model):
    conversation = Conversation(model)
    with pytest.raises(ValueError, match="top_p"):
        list(conversation.reply("Hello", options={"top_p": 2.0}))
    assert conversation.messages == []
    list(conversation.reply("Hello"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="the context of this model"):
        list(conversation.reply("7" * model.config.max_position_embeddings))
    assert conversation.messages == before
    with pytest.raises(ValueError, match="this checkpoint has no tokenizer"):
        list(Conversation(replace(model, tokenizer=None)).reply("Hello"))


def test_options_reach_the_template(model):
    conversation = Conversation(model, [{"role": "user", "content": "Hi"}])
    assert conversation.prompt_ids() == user(model, "Hi")
    told = model.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert conversation.prompt_ids(add_generation_prompt=False) == told


def test_system_and_reset(model):
    conversation = Conversation(model)
    list(conversation.reply("Hello", options=NOISE))
    conversation.set_system("A")
    conversation.set_system("B")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "B"}]
    expected = Conversation(model, [{"role": "system", "content": "B"}])
    assert list(conversation.reply("Hi", options=NOISE)) == list(expected.reply("Hi", options=NOISE))
    conversation.set_system(None)
    assert conversation.messages[0]["role"] == "user"
