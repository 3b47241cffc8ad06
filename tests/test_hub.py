"""hub.py, through the real huggingface_hub in a separate process, against a hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, commit_of

import qwen3np
from qwen3np.files.checkpoint import CheckpointError
from qwen3np.files.hub import resolve

MB = 1_000_000
WEIGHTS = random.Random(0).randbytes(2 * MB)
CHECKPOINT = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"chat_template": ""}',
    "chat_template.jinja": b"{{ messages }}",
    "modules.json": b"[]",
}
OTHERS = {
    "README.md": b"# a model",
    "consolidated.safetensors": WEIGHTS,
    "model.fp16.safetensors": WEIGHTS,
    "onnx/model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "model-Q8_0.gguf": WEIGHTS,
}
VOCABULARY = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}

# Only the pauses between the library's retries are taken out. Anything but a CheckpointError ends the process.
CLIENT = """
import faulthandler, json, os, sys, time
from qwen3np.files.hub import CheckpointError, resolve
faulthandler.dump_traceback_later(60, exit=True)
time.sleep = lambda seconds: None
for line in sys.stdin:
    name, revision, options, environment = json.loads(line)
    os.environ.update(environment)
    try:
        answer = ["folder", str(resolve(name, revision=revision, **options))]
    except CheckpointError as error:
        answer = ["error", str(error)]
    print(json.dumps(answer), flush=True)
"""


@contextmanager
def client(hub, home, stderr=None, **environment):
    """A new process: yields a function that has it resolve a name and returns a Path or the text of the error."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "TQDM_")) and "proxy" not in key.lower()
    }
    place = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(qwen3np.__file__).parents[1]),
    }
    log = home / "stderr"
    with (
        log.open("wb") as no_terminal,
        subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=clean | place | environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr or no_terminal,
            text=True,
        ) as process,
    ):

        def fetch(name, revision=None, progress=True, weights=True, gguf_file=None, adapter=False, **environment):
            options = {"progress": progress, "weights": weights, "gguf_file": gguf_file, "adapter": adapter}
            print(json.dumps([name, revision, options, environment]), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, log.read_text()
            kind, text = json.loads(line)
            assert "\n" not in text
            return Path(text) if kind == "folder" else text

        yield fetch
    assert "%|" not in log.read_text()  # no bars if stderr is not a terminal


def contents(folder):
    assert isinstance(folder, Path), folder
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sizes(files):
    return {path: len(content) for path, content in files.items()}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def test_a_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert resolve("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")
    assert resolve("~/Qwen") == tmp_path / "Qwen"


@pytest.mark.parametrize(
    "name", ["./model", "/nowhere/model", "~/nothing", "a/b/c", "a\\b", "C:model", "..", Path("owner/name")]
)
def test_what_looks_like_a_path_is_never_looked_up(name, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    if name == "..":
        assert resolve(name) == Path("..")
    else:
        with pytest.raises(CheckpointError, match=r"no folder .* or a Hub id such as Qwen/Qwen3-0\.6B"):
            resolve(name)


def test_the_built_in_checkpoint_has_no_revision():
    with pytest.raises(CheckpointError, match="revision v1: the built-in checkpoint has none"):
        resolve(None, revision="v1")


def test_a_file_is_not_a_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a shard of a model: give the folder"):
        resolve(file)


def test_a_download_has_the_needed_files_and_a_second_one_transfers_nothing(hub, tmp_path):
    name = "Qwen/Tiny"
    hub.repos[name] = {"main": CHECKPOINT | OTHERS | VOCABULARY}
    with client(hub, tmp_path) as fetch:
        folder = fetch(name)
    assert contents(folder) == CHECKPOINT
    assert hub.sent == sizes(CHECKPOINT)

    before = hub.requests
    with client(hub, tmp_path, HF_HUB_OFFLINE="1") as fetch:
        assert fetch(name) == folder
    assert hub.requests == before

    with client(hub, tmp_path, HF_HUB_ETAG_TIMEOUT="1") as fetch:
        assert fetch(name) == folder
        hub.status = 503
        assert fetch(name) == folder
        hub.status, hub.silent = None, True
        assert fetch(name) == folder
        hub.close()
        assert fetch(name) == folder
    assert hub.sent == sizes(CHECKPOINT)


def test_a_gguf_file_an_adapter_and_pooling_are_fetched_alone(hub, tmp_path):
    parts = {f"Q8/x-0000{n}-of-00002.gguf": WEIGHTS[n:] for n in (1, 2)}
    lora = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    hub.repos["Qwen/GGUF"] = {"main": {"x-Q8_0.gguf": WEIGHTS, "x-Q4_K.gguf": WEIGHTS, "README.md": b""} | parts}
    hub.repos["me/lora"] = {"main": lora | {"tokenizer.json": b"", "optimizer.pt": b""}}
    hub.repos["me/st"] = {"main": {**CHECKPOINT, "1_Pooling/config.json": b"{}", "1_Pooling/more.json": b"{}"}}
    with client(hub, tmp_path) as fetch:
        assert set(contents(fetch("Qwen/GGUF", gguf_file="x-Q8_0.gguf"))) == {"x-Q8_0.gguf"}
        assert contents(fetch("Qwen/GGUF", gguf_file="Q8/x-00001-of-00002.gguf")).keys() >= parts.keys()
        assert contents(fetch("me/lora", adapter=True)) == lora
        assert contents(fetch("me/st")) == CHECKPOINT | {"1_Pooling/config.json": b"{}"}
        assert "choose one of its GGUF files with gguf_file (--gguf-file): " in fetch("Qwen/GGUF")
        assert "has no y.gguf: choose one" in fetch("Qwen/GGUF", gguf_file="y.gguf")
        assert "has no adapter_config.json" in fetch("me/st", adapter=True)


def test_shards_and_the_older_tokenizer_files(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS[i:] for i in (1, 2)}
    index = {"model.safetensors.index.json": b'{"weight_map": {}}'}
    needed = {"config.json": b"{}"} | shards | index | VOCABULARY
    hub.repos["Qwen/Shards"] = {"main": needed | OTHERS}
    with client(hub, tmp_path) as fetch:
        folder = fetch("Qwen/Shards")
        assert contents(folder) == needed
        hub.close()
        assert fetch("Qwen/Shards") == folder


def test_all_but_the_weights(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS for i in (1, 2)}
    small = {name: content for name, content in CHECKPOINT.items() if content is not WEIGHTS}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(shards))}).encode()}
    hub.repos = {"Qwen/Tiny": {"main": CHECKPOINT}, "Qwen/Shards": {"main": small | shards | index}}
    with client(hub, tmp_path) as fetch:
        folders = {name: fetch(name, weights=False) for name in hub.repos}
        assert contents(folders["Qwen/Tiny"]) == small
        assert contents(folders["Qwen/Shards"]) == small | index
        assert contents(fetch("Qwen/Tiny")) == CHECKPOINT  # what is there already is not in the way
        hub.close()
        assert {name: fetch(name, weights=False) for name in folders} == folders
        (folders["Qwen/Shards"] / next(iter(shards))).write_bytes(WEIGHTS)  # as after a download that broke off
        shutil.rmtree(tmp_path / "hub/models--Qwen--Shards/trees", ignore_errors=True)
        assert "Qwen/Shards is not complete in the cache" in fetch("Qwen/Shards")


def test_revisions(hub, tmp_path):
    name = "Qwen/Tiny"
    old = {"config.json": CHECKPOINT["config.json"], "model.safetensors": WEIGHTS[::-1]} | VOCABULARY
    hub.repos[name] = {"main": CHECKPOINT, "refs/pr/1": old}
    commit = commit_of(name, "refs/pr/1")
    with client(hub, tmp_path) as fetch:
        main, pull = fetch(name), fetch(name, "refs/pr/1")
        assert contents(main) == CHECKPOINT
        assert contents(pull) == old
        assert fetch(name, commit) == pull
        assert f"{name} has no revision v9" in fetch(name, "v9")
        assert hub.sent["config.json"] == len(CHECKPOINT["config.json"])  # the same in both: transferred once
        hub.close()
        assert [fetch(name, revision) for revision in (None, "refs/pr/1", commit)] == [main, pull, pull]


def test_what_is_not_there(hub, tmp_path):
    hub.repos["Qwen/Bin"] = {"main": {"config.json": b"{}", "pytorch_model.bin": WEIGHTS}}
    hub.repos["Qwen/GGUF"] = {"main": {"README.md": b"", "model-Q8_0.gguf": WEIGHTS}}
    with client(hub, tmp_path) as fetch:
        for name in ("Qwen/Qwen4", "Qwen3"):
            text = fetch(name)
            assert f"neither a folder {name} nor a model {name} on {hub.url}" in text
            assert "check the spelling" in text
            assert "hf auth login" in text
        assert "did you mean Qwen/Qwen3-0.6B?" in fetch("Qwen/Qwen-3-0.6b")
        assert fetch("qwen3-0.6b-base") == (
            "there is no folder qwen3-0.6b-base; did you mean Qwen/Qwen3-0.6B-Base, on the Hub?"
        )
        assert f"Qwen/Bin on {hub.url} has no model.safetensors" in fetch("Qwen/Bin")
        assert f"Qwen/GGUF on {hub.url} has no config.json" in fetch("Qwen/GGUF")
        for name in ("Qwen/Qwen3 0.6B", ""):
            assert f"{name!r} is neither a folder nor a Hub id" in fetch(name)
    assert not hub.sent


def test_a_gated_repository(hub, tmp_path):
    name = "google/Gated"
    hub.repos[name] = {"main": CHECKPOINT}
    hub.tokens[name] = "hf_right"
    with client(hub, tmp_path) as fetch:
        for status, token in ((401, {}), (403, {"HF_TOKEN": "hf_wrong"})):
            text = fetch(name, **token)
            assert f"denies access to {name} ({status}): accept its licence on {hub.url}/{name}" in text
            assert "set HF_TOKEN or run `hf auth login`" in text
        assert not hub.sent
        assert contents(fetch(name, HF_TOKEN="hf_right")) == CHECKPOINT


@pytest.mark.skipif(int(version("huggingface_hub").split(".")[0]) < 1, reason="older clients leave it to the next run")
def test_an_interrupted_download_goes_on_where_it_broke_off(hub, tmp_path):
    weights = random.Random(1).randbytes(24 * MB)
    hub.repos["Qwen/Tiny"] = {"main": CHECKPOINT | {"model.safetensors": weights}}
    hub.cuts["model.safetensors"] = [12 * MB, 23 * MB]
    with client(hub, tmp_path) as fetch:
        folder = fetch("Qwen/Tiny")
    assert not hub.cuts["model.safetensors"]  # both did break off
    assert contents(folder)["model.safetensors"] == weights
    # The client writes in pieces of 10 MiB and asks again for a piece it did not get whole.
    again = (12 * MB - 10 * 2**20) + (23 * MB - 20 * 2**20)
    assert hub.sent["model.safetensors"] == 24 * MB + again


def test_a_server_that_always_dies_half_way(hub, tmp_path):
    name = "Qwen/Tiny"
    hub.repos[name] = {"main": CHECKPOINT}
    hub.cuts["model.safetensors"] = [MB] * 100
    small = sizes(CHECKPOINT) | {"model.safetensors": 0}
    with client(hub, tmp_path) as fetch:
        text = fetch(name)
    broken = "peer closed connection|Connection broken"  # by the client's version
    assert re.search(rf"downloading it from {hub.url} failed \(.*({broken})", text)
    assert "run it again (completed files are kept), or give a folder" in text
    assert hub.sent | {"model.safetensors": 0} == small

    # The half is never mistaken for the whole, not even in a cache without the list of what belongs to it.
    for _ in range(2):
        with client(hub, tmp_path, HF_HUB_OFFLINE="1") as fetch:
            text = fetch(name)
        assert f"{name} is not complete in the cache" in text
        assert "HF_HUB_OFFLINE is set: run once without it" in text
        shutil.rmtree(tmp_path / "hub/models--Qwen--Tiny/trees", ignore_errors=True)

    hub.cuts.clear()
    with client(hub, tmp_path) as fetch:
        assert contents(fetch(name)) == CHECKPOINT
    assert hub.sent | {"model.safetensors": 0} == small  # no other file was sent twice


def test_no_hub_and_nothing_cached(hub, tmp_path):
    with client(hub, tmp_path) as fetch:
        hub.status = 503
        text = fetch("Qwen/Tiny")
        assert re.search(r"failed \(.*\b503\b", text)
        assert "check the connection and run it again" in text
        hub.close()
        text = fetch("Qwen/Tiny")
        assert "Qwen/Tiny is not complete in the cache" in text
        assert f"downloading it from {hub.url} failed" in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_disk_that_takes_no_more(hub, tmp_path):
    import resource

    hub.repos["Qwen/Tiny"] = {"main": CHECKPOINT}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, limits[1]))  # inherited by the process
    try:
        with client(hub, tmp_path) as fetch:
            text = fetch("Qwen/Tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write Qwen/Tiny into the cache" in text
    assert "set HF_HOME to a folder on another disk" in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_progress_bars_on_a_terminal_unless_switched_off(hub, tmp_path):
    import fcntl
    import pty
    import termios

    def read_all(terminal, pieces):
        with suppress(OSError):  # how Linux ends a terminal
            while piece := os.read(terminal, 65536):
                pieces.append(piece)

    hub.repos["Qwen/Tiny"] = {"main": CHECKPOINT}
    shown = {}
    for progress in (True, False):
        home = tmp_path / str(progress)
        home.mkdir()
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        pieces = []
        thread = threading.Thread(target=read_all, args=(reader, pieces))
        thread.start()
        with client(hub, home, stderr=writer) as fetch:
            fetch("Qwen/Tiny", progress=progress)
        os.close(writer)
        thread.join()
        os.close(reader)
        shown[progress] = b"".join(pieces)
    assert b"100%" in shown[True]
    assert shown[False] == b""
