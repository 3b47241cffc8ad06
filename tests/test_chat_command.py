"""What `qwen3np chat` shows and does, with scripted answers, because the built-in checkpoint does not reason."""

from __future__ import annotations

import argparse
import json
import os
import sys

import pytest

from qwen3np import Conversation, terminal
from qwen3np.commands import chat as module
from qwen3np.generate import Step


@pytest.fixture
def chat(builtin, monkeypatch):
    """Make a chat whose answers are these texts, one after the other."""

    def make(*answers, **flags):
        def steps(weights, config, batch, **options):
            made.prompts.append(builtin.text.decode(batch[0]))
            return (Step(0, i, None, False) for i in builtin.text.encode(script.pop(0) + "<|im_end|>"))

        script = list(answers)
        monkeypatch.setattr("qwen3np.conversation.steps", steps)
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


def test_more_commands(chat, capsys):
    made = chat("One.", "Two.", "Three.", "Four.")
    for line in ("Hello", "//slash", "/regen"):
        assert made.take(line)
    assert [m["content"] for m in made.conversation.messages] == ["Hello", "One.", "/slash", "Three."]
    assert made.prompts[1] == made.prompts[2]
    made.take("/history")
    assert capsys.readouterr().err.endswith("user: Hello\nassistant: One.\nuser: /slash\nassistant: Three.\n")
    made.take("/undo")
    assert "Taken back: /slash" in capsys.readouterr().err
    made.take("/drop")
    assert made.conversation.messages == []
    with pytest.raises(ValueError, match="no message to answer again"):
        made.take("/regen")
    made.take("/system Be brief.")
    made.take("/system")  # shows it, and leaves it
    assert capsys.readouterr().err.count("The system message is: Be brief.") == 2
    made.take("/set temperature 0.5")
    made.take("/set top_k=3")
    assert (made.options["temperature"], made.options["top_k"]) == (0.5, 3)
    assert "temperature 0.5\n" in capsys.readouterr().err
    for line, words in (
        ("/set temprature 1", "did you mean temperature"),
        ("/set top_p 3", "top_p must be"),
        ("/drop x", "how many turns"),
        ("/rest", r"did you mean /reset\? \(//rest is a message\)"),
    ):
        with pytest.raises(ValueError, match=words):
            made.take(line)
    made.take("/?")
    assert "//TEXT" in capsys.readouterr().err
    assert not any(made.take(line) for line in ("/exit", "/quit", "/bye"))


def test_a_full_context_says_what_can_be_done(builtin, capsys):
    context = builtin.config.max_position_embeddings
    arguments = argparse.Namespace(hide_thinking=False, think=None, stop=[])
    options = builtin.generation_defaults() | {"max_new_tokens": 1000, "temperature": 5.0, "seed": 4}
    made = module.Chat(Conversation(builtin), arguments, options)
    made.take("7" * (context - 30))
    made.take("Go on") if "context is full" not in (err := capsys.readouterr().err) else None
    err += capsys.readouterr().err
    assert "cut, since the context is full: /drop N forgets the N oldest turns, /reset all, --rope-scaling" in err
    with pytest.raises(ValueError, match=r"the context of this model is 256: /drop N forgets"):
        made.take("7" * context)


def test_history_between_runs(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", str(tmp_path))
    file = module.history_file()
    assert file == tmp_path / "qwen3np" / "history"
    with module.history(file):
        readline.add_history("Hello")
    readline.clear_history()
    with module.history(file):
        assert readline.get_history_item(1) == "Hello"
    assert sys.platform == "win32" or file.stat().st_mode & 0o077 == 0  # nobody else's
    readline.clear_history()
    with module.history(None):
        assert readline.get_current_history_length() == 0
        readline.add_history("secret")
    assert "secret" not in file.read_text()
    readline.clear_history()


def test_enable_thinking_reaches_the_template(chat, monkeypatch):
    made = chat("One.", think="off")
    seen = {}
    reply = made.conversation.reply
    monkeypatch.setattr(
        made.conversation, "reply", lambda text, **options: seen.update(options) or reply(text, **options)
    )
    made.take("Hello")
    assert seen["enable_thinking"] is False


def test_guesses_are_counted_in_the_line_of_costs(builtin, capsys):
    arguments = argparse.Namespace(hide_thinking=False, think=None, stop=[])
    options = builtin.generation_defaults() | {"max_new_tokens": 20}
    for guesses in (0, 7):
        made = module.Chat(Conversation(builtin), arguments, options | {"prompt_lookup_num_tokens": guesses or None})
        made.take("What is the capital of France?")
        out, err = capsys.readouterr()
        assert (out, " a pass]" in err.replace(";", "]")) == ("The capital of France is Paris.\n", guesses > 0)


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
    with pytest.raises(ValueError, match=r"bad.json: (not JSON|must hold a list of messages)"):
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
