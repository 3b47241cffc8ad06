"""What `qwen3np chat` shows and does, with answers that are scripted: the built-in checkpoint does not reason."""

from __future__ import annotations

import argparse
import json
import os

import pytest

from qwen3np import Conversation, terminal
from qwen3np.commands import chat as module


@pytest.fixture
def chat(builtin, monkeypatch):
    """Make a chat whose answers are these texts, one after the other."""

    def make(*answers, **flags):
        def stream(self, ids, **options):
            made.prompts.append(self.tokenizer.decode(ids))
            return iter(self.tokenizer.encode(script.pop(0) + "<|im_end|>"))

        script = list(answers)
        monkeypatch.setattr(type(builtin), "stream", stream)
        arguments = argparse.Namespace(**({"hide_thinking": False, "think": None, "stop": []} | flags))
        options = builtin.generation_defaults() | {"max_new_tokens": 100}
        made = module.Chat(Conversation(builtin), arguments, options)
        made.prompts = []
        return made

    return make


ANSWER = "<think>\nHm.\n</think>\n\nBlue — really."


def test_reasoning_is_dimmed_on_a_terminal_and_plain_elsewhere(chat, capsys, monkeypatch):
    chat(ANSWER).take("Why?")
    assert capsys.readouterr().out == ANSWER + "\n"
    monkeypatch.setattr(module, "style", lambda code: f"<{code}>")
    monkeypatch.setattr(terminal, "style", lambda code: f"<{code}>")
    chat(ANSWER).take("Why?")
    assert capsys.readouterr().out == "<2><think>\nHm.\n</think><0>\n\nBlue — really.<0>\n"


def test_reasoning_is_hidden(chat, capsys):
    chat(ANSWER, hide_thinking=True).take("Why?")
    assert capsys.readouterr().out.strip() == "Blue — really."
    # an unfinished character before the marker does not hide it
    made = chat("x", hide_thinking=True)
    assert "".join(made.shown(iter(["<think>", "\ufffd</think>", "seen"]))) == "seen"


def test_reasoning_that_was_cut_off_is_not_the_answer(chat):
    made = chat("<think>\nLet me", "Yes.")
    made.take("Why?")
    answer = made.conversation.messages[-1]
    assert (answer["content"], answer["reasoning_content"]) == ("", "Let me")


def test_commands(chat, capsys, tmp_path):
    made = chat("One.", "Two.", "Three.", "Four.")
    for line in (
        "/system Be brief.",
        "Hello",
        "/reset",
        "Again",
        f"/save {tmp_path}/c.json",
        "/system none",
        "Bye",
        "/think on",
    ):
        made.take(line)
    start, end = "<|im_start|>", "<|im_end|>\n"
    system, ask = f"{start}system\nBe brief.{end}", f"{start}assistant\n"
    assert made.prompts == [
        f"{system}{start}user\nHello{end}{ask}",
        f"{system}{start}user\nAgain{end}{ask}",  # the first turn is forgotten
        f"{start}user\nAgain{end}{ask}Two.{end}{start}user\nBye{end}{ask}",
    ]
    assert made.thinking is True
    saved = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [message["content"] for message in saved] == ["Be brief.", "Again", "Two."]
    made.take(f"/load {tmp_path}/c.json")
    assert made.conversation.messages == saved
    assert "Loaded 3 messages." in capsys.readouterr().err


def test_enable_thinking_reaches_the_template(chat, monkeypatch):
    made = chat("One.", think="off")
    seen = {}
    reply = made.conversation.reply
    monkeypatch.setattr(
        made.conversation, "reply", lambda text, **options: seen.update(options) or reply(text, **options)
    )
    made.take("Hello")
    assert seen["enable_thinking"] is False


def test_the_line_of_costs(chat, capsys):
    made = chat("12345")
    made.options["max_new_tokens"] = 6
    made.take("Hello")
    assert "[6 tokens, first after" in (err := capsys.readouterr().err)
    assert "cut" not in err
    made = chat("12345", stop=["34"])
    made.take("Hello")
    assert capsys.readouterr().out == "12\n"


@pytest.mark.parametrize("content", ['{"messages": ""}', '{"messages": {}}', "[" * 200_000, "{}", '{"messages": [1]}'])
def test_what_is_no_saved_conversation(chat, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad.json: (not JSON|needs a list of messages)"):
        chat().take(f"/load {tmp_path}/bad.json")


def test_a_saved_conversation_with_an_unknown_role(chat, tmp_path):
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "wizard", "content": "x"}]}')
    made = chat()
    with pytest.raises(ValueError, match="wizard"):
        made.take(f"/load {tmp_path}/bad.json")
    assert made.conversation.messages == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_saved_conversation(chat, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"not a regular file: .*pipe"):
        chat().take(f"/load {tmp_path}/pipe")


@pytest.mark.parametrize("line", ["/save ~no.such.user/c.json", "/load ~no.such.user/c.json"])
def test_a_home_that_there_is_not(chat, line):
    with pytest.raises((ValueError, OSError), match=r"~no\.such\.user/c\.json"):
        chat().take(line)


@pytest.mark.parametrize("line", ["/think", "/think perhaps", "/save", "/nothing", "/load"])
def test_commands_that_are_none(chat, line):
    with pytest.raises(ValueError, match=r"needs|is not a command"):
        chat().take(line)
