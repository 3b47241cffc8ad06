"""Folders with spaces and non-Latin letters: everything that reads or writes files works in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from test_hub import CHECKPOINT, client, contents
from test_training import SETTINGS, command, trained

from qwen3np import load, read_checkpoint, save_checkpoint
from qwen3np.cli import main
from qwen3np.files.hub import BUILTIN
from qwen3np.files.writing import written_aside
from qwen3np.porting import Recording

NAME = "Ärger mit %20 & 'Leerzeichen' – 雪 🎉"
PROMPT = "The capital of France is"


@pytest.fixture
def place(tmp_path):
    place = tmp_path / NAME
    place.mkdir()
    return place


@pytest.fixture
def model(place):
    return shutil.copytree(BUILTIN, place / "ein Modell")


def test_save_and_load(place, builtin):
    save_checkpoint(place / "neu é", builtin.config, builtin.weights)
    _, read = read_checkpoint(place / "neu é")
    assert all(np.array_equal(read[name], w) for name, w in builtin.weights.items())


def test_a_template_of_its_own_is_rendered_in_another_process(model):
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} ü\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    text = load(model, progress=False).tokenizer.apply_chat_template([{"role": "user", "content": "Grüße 雪"}])
    assert text == "<user> Grüße 雪 ü\n"


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_link_is_written_through_and_a_pipe_left_alone(place):
    (place / "there").mkdir()
    (place / "link").symlink_to("there/file")
    with written_aside(place / "link") as part:
        part.write_text("new")
    assert (place / "link").is_symlink()
    assert [file.read_text() for file in (place / "there").iterdir()] == ["new"]
    os.mkfifo(place / "pipe")
    with pytest.raises(ValueError, match="pipe: is not a regular file"), written_aside(place / "pipe"):
        pass
    assert (place / "pipe").is_fifo()


def test_the_command_line(place, model):
    def run(*arguments):
        command = [sys.executable, "-m", "qwen3np", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("generate", "--model", model, PROMPT) == " Paris.\n"
    assert run("generate", "--model", Path("ein Modell"), PROMPT) == " Paris.\n"
    assert str(model) in run("info", "--model", model)


def test_what_is_written(place, model):
    main(["trace", "--model", str(model), PROMPT, "-o", str(place / "Spur – 1.safetensors")])
    recording = Recording.load(place / "Spur – 1.safetensors")
    expected = load(model, progress=False).forward(recording.ids)
    np.testing.assert_array_equal(recording.points["lm_head"], expected)
    main(["view", "--model", str(model), PROMPT, "-o", str(place / "Blick ü.html")])
    assert "<html" in (place / "Blick ü.html").read_text(encoding="utf-8")
    names = {path.name for path in place.iterdir()}
    assert names == {"ein Modell", "Spur – 1.safetensors", "Blick ü.html"}


def test_training(place):
    corpus = place / "Texte é.txt"
    corpus.write_text("Ada has 1 apple.\n<|endoftext|>\nBo has 2 apples.\n" * 3, encoding="utf-8")
    main(command(corpus, place / "ein Lauf"))
    assert load(place / "ein Lauf", progress=False).tokenizer is not None
    assert trained(place / "noch einer", SETTINGS)


def test_a_download(place):
    with LoopbackHub() as hub:
        hub.repos["Qwen/Tiny"] = {"main": CHECKPOINT}
        with client(hub, place) as fetch:
            folder = fetch("Qwen/Tiny")
            assert contents(folder) == CHECKPOINT
            assert place in folder.parents
