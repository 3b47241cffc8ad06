"""Output to a terminal: on a pseudo-terminal, and on random text."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest

from qwen3np import terminal
from qwen3np.errors import visible

HOSTILE = [
    *map(chr, range(32)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff\U000e0041",
    *("\x1b[2J", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1bP+q544e\x1b\\", "\x9b31m", "\x1b[6n", "\r", "\x08"),
    *("text", " ", "\n", "Ünï", "漢字", "🎉", "नमस्ते", "می\u200cخواهم"),
]


class Screen(io.StringIO):
    def isatty(self):
        return True


def drawn(rng):
    return "".join(rng.choice(HOSTILE, rng.integers(1, 40)))


def paged(pieces):
    """Show pieces of an answer on a page."""
    page = terminal.Page()
    for piece in (*pieces, "\n"):
        page.write(piece)
    return page


def forbidden(text):
    """The characters that are neither printable text nor newlines; the two joiners are parts of words."""
    return [c for c in text if not (c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs")]


ANSWERS = r"""
import io, os, sys
import numpy as np
from qwen3np import conversation, load
from qwen3np.cli import main
from qwen3np.commands import chat, generate
from qwen3np.generate import Step
from test_terminal import drawn

os.environ["TERM"] = "dumb"  # no styles of our own
model, rng = load(progress=False), np.random.default_rng(0)
encode, end = model.text.encode, model.text.token_to_id("<|im_end|>")
logits = np.zeros(1, np.float32)

def steps(weights, config, prompts, **options):
    for row in range(len(prompts)):
        for token in encode(drawn(rng)):
            yield Step(row, token, logits, False)
        yield Step(row, end, logits, True)

for command in (chat, generate):
    command.load_model = lambda arguments: (model, model.text)
generate.steps = conversation.steps = steps
for flags in ([], ["--chat"]):
    main(["generate", *flags, *["x"] * (int(sys.argv[1]) // 4)])
sys.stdin = io.TextIOWrapper(io.BytesIO(b"Hi\n/reset\n" * (int(sys.argv[1]) // 2)))
main(["chat", "--lines"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("count", [500, pytest.param(5_000, marks=pytest.mark.slow)])
def test_hostile_answers_reach_a_terminal_as_text(count):
    import pty
    import termios

    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # else the system makes \r\n of \n
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    path = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    environment, pieces = os.environ | {"PYTHONPATH": path}, []
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            [sys.executable, "-c", ANSWERS, str(count)], stdout=theirs, stderr=said, env=environment
        ) as child:
            os.close(theirs)
            with contextlib.suppress(OSError):  # Linux's way to say that nothing more comes
                while piece := os.read(ours, 2**16):
                    pieces.append(piece)
            os.close(ours)
        said.seek(0)
        errors = said.read()
    assert child.returncode == 0, errors[-2000:]
    text = b"".join(pieces).decode()
    answers = errors.count("tokens, first after") + count // 2
    outside = forbidden(text)
    print(f"{answers:,} answers, {len(text.encode()):,} bytes, {len(outside)} outside of printable text and newlines")
    assert (answers, outside) == (count, [])
    assert text.count("\\x1b[2J") > count / 5  # shown, not dropped


def test_pipes_get_every_byte(capsys):
    with terminal.guarded():
        sys.stdout.write("a\x1b[2Jb\r\n")
        paged(["a b\x1b"])
    assert capsys.readouterr().out == "a\x1b[2Jb\r\na b\x1b\n"


def test_what_is_shown_says_what_it_was():
    assert visible("a\x1b[2J\x07\x9b\u202eb\tc\r\n") == "a\\x1b[2J\\x07\\x9b\\u202eb    c\\r\n"
    assert visible("Ünï 漢字 🎉\u00a0नमस्ते می\u200cخواهم") == "Ünï 漢字 🎉\u00a0नमस्ते می\u200cخواهم"


@pytest.fixture
def wide(monkeypatch):
    def wide(columns, rows=24):
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("COLUMNS", str(columns))  # which shutil.get_terminal_size reads first
        monkeypatch.setenv("LINES", str(rows))
        return screen

    return wide


def test_words_are_wrapped_at_the_edge_however_they_come(wide):
    text = "one two three fourteen 漢字漢字漢字漢字 x\n\nsuperlongwordhere end"
    lines = ["one two", "three", "fourteen", "漢字漢字漢", "字漢字 x", "", "superlongwordhere", "end", ""]
    for size in (1, 2, 3, 100):
        screen = wide(10)
        paged(text[i : i + size] for i in range(0, len(text), size))
        assert [line.rstrip() for line in screen.getvalue().split("\n")] == lines
    screen = wide(80)
    paged([text])
    assert screen.getvalue() == f"{text}\n"


def test_styles_pass_and_take_no_room(wide):
    screen = wide(12)
    with terminal.guarded():
        paged([terminal.Style("\x1b[2m"), "dim \x1b[2m", terminal.Style("\x1b[0m"), "x"])
    assert screen.getvalue() == "\x1b[2mdim \\x1b[2m\x1b[0mx\n"


@pytest.mark.skipif(not hasattr(signal, "SIGWINCH"), reason="this system does not tell of new sizes")
def test_a_page_is_drawn_again_at_another_width(wide, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    before, clear = signal.getsignal(signal.SIGWINCH), "\x1b[H\x1b[2J"
    screen = wide(10)
    page = paged([terminal.Style("\x1b[2m"), "one two three", "\n", "four"])
    with page.redrawn():
        screen = wide(40)
        os.kill(os.getpid(), signal.SIGWINCH)
        assert screen.getvalue() == ""  # an answer may be in the middle of a write
        page.write(" five")
        assert screen.getvalue() == f"{clear}\x1b[2mone two three\nfour\n "

        def typed(prompt):
            os.kill(os.getpid(), signal.SIGWINCH)
            return "a long question"

        page.write("\n")
        screen = wide(9, 4)
        monkeypatch.setattr("builtins.input", typed)
        assert page.ask("> ") == "a long question"
        assert screen.getvalue() == f"{clear}\x1b[2mfour\n five\n"  # the style of what is above goes on
        screen = wide(9, 5)
        os.kill(os.getpid(), signal.SIGWINCH)
        page.write("x\n")
        assert screen.getvalue() == f"{clear}\x1b[2m> a long \nquestion\nx\n"
    assert signal.getsignal(signal.SIGWINCH) == before


def test_reasoning_apart():
    assert terminal.reasoning_apart("<think>\nHm.\n</think>\n\nBlue.", False) == ("Hm.", "Blue.")
    assert terminal.reasoning_apart("Hm.\n</think>\n\nBlue.", True) == ("Hm.", "Blue.")
    assert terminal.reasoning_apart("Blue.", False) == (None, "Blue.")
    assert terminal.reasoning_apart("<think>\nHm", False) == ("Hm", "")
