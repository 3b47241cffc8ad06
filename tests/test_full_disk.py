"""A disk that fills up halfway: one clear error, and everything as it was before."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from drawing import trained_like
from test_training import DOCUMENTS, SETTINGS, SIZES, trained

from qwen3np import Conversation, read_checkpoint, save_checkpoint
from qwen3np.cli import main
from qwen3np.commands.chat import Chat
from qwen3np.files.writing import written_aside
from qwen3np.tokenizer import Tokenizer
from qwen3np.training import loop
from qwen3np.training.loop import train

ROOM = 64 * 1024  # bytes that are left, so that what fails has begun


class Limited:
    """A folder with files that can become no larger than ROOM."""

    def __init__(self, folder):
        self.folder = folder

    @contextmanager
    def full(self):
        resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Mounted(Limited):
    """A folder on a separate disk with only ROOM bytes left."""

    @contextmanager
    def full(self):
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - ROOM))
        try:
            yield
        finally:
            filler.unlink()


@pytest.fixture(params=["limited", "mounted"])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limited":
        yield Limited(folder)
        return
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounts a disk, which only root may on Linux")
    try:
        yield Mounted(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command; return the error it ends with."""

    def refused(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        assert stopped.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        return [line for line in error.splitlines() if not line.startswith("[")]

    return refused


def told(lines, file):
    (line,) = lines
    assert line.startswith(f"error: {file}: cannot be written (")
    assert any(reason in line for reason in ("No space left on device", "File too large", "requested and"))
    assert line.endswith("free some space there, or choose another place")


LONG = "One two three four five six seven eight nine ten. " * 8


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["trace", LONG, "-o"], "trace.safetensors"),
        (["view", LONG, "-o"], "view.html"),
        (["embed", "--lines", "--out"], "texts.npy"),
        (["embed", "--lines", "--out"], "texts.npz"),
        (["embed", "--lines", "--out"], "texts.jsonl"),
    ],
)
def test_what_a_command_writes(disk, command, name, refused, embedding):
    file = disk.folder / name
    file.write_text("what was there before")
    model = ["--model", embedding] if command[0] == "embed" else []
    with disk.full():
        left = {path.name for path in disk.folder.iterdir()}
        told(refused(*command, file, *model, stdin=b"a\n" * 2000), file)
        assert {path.name for path in disk.folder.iterdir()} == left
    assert file.read_text() == "what was there before"


@pytest.fixture(scope="module")
def embedding(builtin, yes_no, tmp_path_factory):
    """A checkpoint whose vectors are quickly made."""
    folder = tmp_path_factory.mktemp("embedding") / "model"
    config = replace(builtin.config, vocab_size=Tokenizer.from_folder(yes_no).vocab_size, num_hidden_layers=1)
    save_checkpoint(folder, config, trained_like(config, 0))
    shutil.copy(yes_no / "tokenizer.json", folder)
    return folder


def test_a_disk_that_takes_no_change(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounts a disk, which only root may on Linux")
    try:
        message = r"x: cannot be written \(Read-only file system\); free some space there, or"
        with pytest.raises(ValueError, match=message), written_aside(folder / "x") as part:
            part.touch()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_checkpoint(disk, builtin):
    folder = disk.folder / "new"
    with disk.full():
        with pytest.raises(ValueError, match=r"model.safetensors: cannot be written \("):
            save_checkpoint(folder, builtin.config, builtin.weights)
        assert list(folder.iterdir()) == []
    save_checkpoint(folder, builtin.config, builtin.weights)
    assert read_checkpoint(folder)[0] == builtin.config


def test_a_conversation(disk, builtin):
    file = disk.folder / "talk.json"
    conversation = Conversation(builtin, [{"role": "user", "content": "Hello"}])
    chat = Chat(conversation, Namespace(stop=[], hide_thinking=False, think=None), {})
    chat.command("save", str(file))
    before = file.read_bytes()
    conversation.messages[0]["content"] = "Hello" * ROOM
    with disk.full():
        with pytest.raises(ValueError, match=r"talk.json: cannot be written \("):
            chat.command("save", str(file))
        assert file.read_bytes() == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole") / "model")


def test_training_that_cannot_begin_leaves_nothing(disk):
    with disk.full(), pytest.raises(ValueError, match=r": cannot be written \("):
        train(DOCUMENTS, disk.folder / "model", SIZES | {"hidden_size": 128}, SETTINGS, progress=False)
    assert list(disk.folder.iterdir()) == []


@pytest.mark.parametrize("at", [2, 5, 8])
def test_training_goes_on_from_the_state_before(disk, at, whole, monkeypatch):
    folder, real, steps = disk.folder / "model", loop.loss_and_gradients, []

    def until_it_is_full(*arguments):
        steps.append(None)
        if len(steps) == at:
            filled.enter_context(disk.full())
        return real(*arguments)

    with ExitStack() as filled:
        monkeypatch.setattr(loop, "loss_and_gradients", until_it_is_full)
        with pytest.raises(ValueError, match=r": cannot be written \("):
            trained(folder)
    monkeypatch.undo()
    assert trained(folder, resume=True) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="the later one is refused: an open file cannot be taken away")
def test_of_two_calls_that_write_one_file_the_later_one_does(tmp_path):
    file = tmp_path / "x [1]"

    def both():
        with written_aside(file) as first, first.open("w") as opened:
            with written_aside(file) as second:
                second.write_text("whole")
                print("half", file=opened, flush=True)
            assert file.read_text() == "whole"

    with pytest.raises(ValueError, match=r"x \[1\]: another call started writing it in the meantime"):
        both()
    assert (file.read_text(), list(tmp_path.iterdir())) == ("whole", [file])


def test_what_a_killed_call_left_goes_and_who_may_read_the_file_stays(tmp_path):
    file, left, other = tmp_path / "x", tmp_path / "x.0123abcd.part", tmp_path / "x.part"
    for each in (file, left, other):
        each.write_text("before")
    file.chmod(0o600)
    mode = file.stat().st_mode
    with written_aside(file) as part:
        part.write_text("after")
        assert part.stat().st_mode == mode
    assert sorted(tmp_path.iterdir()) == [file, other]
    assert (file.read_text(), file.stat().st_mode) == ("after", mode)


def test_the_kit_of_a_port(disk, refused):
    with disk.full():
        left = list(disk.folder.iterdir())
        (line,) = refused("fixture", "-o", disk.folder / "kit")
        assert "No space left on device" in line or "File too large" in line
        assert list(disk.folder.iterdir()) == left


@pytest.mark.parametrize("name", ["results.jsonl", "results.npy"])
def test_a_batch_goes_on_when_there_is_space_again(disk, name, refused, tmp_path):
    source, out = tmp_path / "requests.jsonl", disk.folder / name
    growing = out if name == "results.jsonl" else disk.folder / f"{name}.growing.jsonl"
    body = {"url": "/v1/embeddings", "body": {"input": "The sky is blue."}}
    source.write_text("".join(json.dumps({"custom_id": f"{n}", **body}) + "\n" for n in range(40)))
    with disk.full():
        told(refused("batch", source, "-o", out), growing)
    lines = growing.read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) < 40
    assert all(line.endswith(b"}\n") for line in lines)
    main(["batch", str(source), "-o", str(out)])
    if name == "results.jsonl":
        found = out.read_bytes().splitlines(keepends=True)
        assert found[: len(lines)] == lines
        assert {json.loads(line)["custom_id"] for line in found} == {f"{n}" for n in range(40)}
        assert len(found) == 40
    else:
        assert len(np.load(out)) == 40
