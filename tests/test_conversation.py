"""Conversations on a random model; what they should be is put together by hand, id by id."""

from __future__ import annotations

import pytest
from random_checkpoint import write_random_checkpoint

from qwen3np import Conversation, generate, load

OPTIONS = {"max_new_tokens": 9, "temperature": 1.0, "seed": 4}
STOP = 257  # <|im_end|>


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    write_random_checkpoint(folder)
    return load(folder, progress=False)


def user(model, text):
    return model.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def test_five_turns_compute_each_position_once(model, computed):
    conversation = Conversation(model)
    conversation.set_system("Be short.")
    answers = [list(conversation.reply(f"Question {turn}?", options=OPTIONS)) for turn in range(5)]
    positions = sum(computed)

    ids = model.tokenizer.encode("<|im_start|>system\nBe short.<|im_end|>\n")
    for turn, answer in enumerate(answers):
        ids += user(model, f"Question {turn}?")
        assert answer == generate(model.weights, model.config, ids, stop_ids=[STOP], **OPTIONS)[0]  # no cache
        ids += answer
        if turn < 4:
            ids += model.tokenizer.encode("\n" if answer[-1] == STOP else "<|im_end|>\n")
    assert positions == len(ids) - 1  # the last token was never an input
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 5]


def test_an_answer_that_is_cut_off_stays_as_far_as_it_came(model):
    conversation = Conversation(model)
    whole = list(conversation.reply("Hello", options=OPTIONS))
    cut = Conversation(model)
    reply = cut.reply("Hello", options=OPTIONS)
    assert [next(reply), next(reply)] == whole[:2]
    reply.close()
    assert cut.messages[-1] == {"role": "assistant", "content": model.tokenizer.decode(whole[:2])}
    ids = user(model, "Hello") + whole[:2] + model.tokenizer.encode("<|im_end|>\n") + user(model, "Go on")
    expected = generate(model.weights, model.config, ids, stop_ids=[STOP], **OPTIONS)[0]
    assert list(cut.reply("Go on", options=OPTIONS)) == expected


def test_what_is_refused_was_never_said(model):
    conversation = Conversation(model)
    with pytest.raises(ValueError, match="top_p"):
        list(conversation.reply("Hello", options={"top_p": 2.0}))
    assert conversation.messages == []
    list(conversation.reply("Hello", options=OPTIONS))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="the context of this model"):
        list(conversation.reply("x" * model.config.max_position_embeddings, options=OPTIONS))
    assert conversation.messages == before


def test_system_and_reset(model):
    conversation = Conversation(model)
    list(conversation.reply("Hello", options=OPTIONS))
    conversation.set_system("A")
    conversation.set_system("B")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "B"}]
    expected = Conversation(model, [{"role": "system", "content": "B"}])
    assert list(conversation.reply("Hi", options=OPTIONS)) == list(expected.reply("Hi", options=OPTIONS))
    conversation.set_system(None)
    assert conversation.messages[0]["role"] == "user"
