"""`qwen3np embed` and `qwen3np rerank`, on random weights: they print and write what the functions return."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from drawing import trained_like

from qwen3np import embed, load, rerank, save_checkpoint
from qwen3np.cli import main
from qwen3np.embeddings import DEFAULT_INSTRUCTION
from qwen3np.tokenizer import Tokenizer

TEXTS = ["Beijing is a capital.", "", "Gravity — a force. 🎉"]
LINES = "".join(f"{text}\n" for text in TEXTS)
FILLED = [text for text in TEXTS if text]  # blank lines are left out


@pytest.fixture(scope="module")
def folder(config, yes_no, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "checkpoint"
    config = dataclasses.replace(config, vocab_size=Tokenizer.from_folder(yes_no).vocab_size)
    save_checkpoint(folder, config, trained_like(config, 1))
    shutil.copy(yes_no / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, progress=False)


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run a command on the checkpoint, with these bytes on stdin, and return its stdout."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        main([*map(str, arguments), "--model", str(folder)])
        return capsys.readouterr().out

    return run


def test_embed_prints_json_lines(run, model, tmp_path):
    (tmp_path / "texts").write_text(LINES.replace("\n", "\r\n"), encoding="utf-8", newline="")
    out = run("embed", *TEXTS)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    np.testing.assert_array_equal(np.float32([row["embedding"] for row in rows]), embed(model, TEXTS))
    out = run("embed", *FILLED)
    assert run("embed", "--lines", stdin=LINES.encode()) == out
    assert run("embed", "--lines", stdin=LINES.removesuffix("\n").encode()) == out
    assert run("embed", "--lines", "--file", tmp_path / "texts") == out
    assert json.loads(run("embed", stdin=LINES.encode()))["text"] == LINES.removesuffix("\n")  # one text
    assert run("embed", "--lines", stdin=LINES.replace("\n", "\n\n").encode()) == out


def test_embed_writes_files(run, model, tmp_path):
    expected = embed(model, TEXTS)
    assert run("embed", *TEXTS, "--out", tmp_path / "x.npy") == ""
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    assert run("embed", *TEXTS, "--out", tmp_path / "x.npz") == ""
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["embeddings"], expected)
        assert found["texts"].tolist() == TEXTS
    assert run("embed", *TEXTS, "--out", tmp_path / "x.jsonl") == ""
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == run("embed", *TEXTS)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(SystemExit):  # not a name to write to, which comes out at the end
        run("embed", *TEXTS, "--out", tmp_path / "folder.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.npz", "x.jsonl", "folder.npy"}


def test_embed_options(run, model, tmp_path):
    for flags, options in (
        (["--query"], {"instruction": DEFAULT_INSTRUCTION}),
        (["--instruction", "Find it", "--dimensions", "7"], {"instruction": "Find it", "dimensions": 7}),
        (["--numerics", "bfloat16"], {"numerics": "bfloat16"}),
    ):
        run("embed", *TEXTS, *flags, "--out", tmp_path / "x.npy")
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), embed(model, TEXTS, **options))


def test_rerank(run, model, tmp_path):
    scores = rerank(model, "What?", TEXTS)
    order = sorted(range(3), key=lambda n: -scores[n])
    assert order != [0, 1, 2]
    assert run("rerank", "What?", *TEXTS) == "".join(f"{scores[n]:.6f}  {TEXTS[n]}\n" for n in order)
    out = run("rerank", "What?", "--json", "--lines", stdin=LINES.encode())
    scores = rerank(model, "What?", FILLED)
    order = sorted(range(2), key=lambda n: -scores[n])
    rows = [{"index": n, "score": scores[n], "document": FILLED[n]} for n in order]
    assert [json.loads(line) for line in out.splitlines()] == rows
    (tmp_path / "documents").write_text(LINES, encoding="utf-8")
    out = run("rerank", "What?", "--json", "--lines", "--file", tmp_path / "documents", "--instruction", "Find it")
    found = {row["document"]: row["score"] for row in map(json.loads, out.splitlines())}
    assert [found[text] for text in FILLED] == rerank(model, "What?", FILLED, "Find it").tolist()
    assert run("rerank", "What?", "two\nlines").endswith("  two lines\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("embed",), b"", "stdin is empty"),
        (("rerank", "q"), b"", "stdin is empty"),
        (("embed", "--lines"), b"\n \n", "stdin: no line with a text"),
    ],
)
def test_no_texts(run, capsys, arguments, stdin, words):
    with pytest.raises(SystemExit) as end:
        run(*arguments, stdin=stdin)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_warning_for_chat_models(run, folder, tmp_path, capsys, config, yes_no):
    assert "looks like" not in (run("embed", "x"), capsys.readouterr().err)[1]
    config = dataclasses.replace(config, vocab_size=Tokenizer.from_folder(yes_no).vocab_size + 5)
    save_checkpoint(tmp_path / "padded", config, trained_like(config, 1))
    shutil.copy(yes_no / "tokenizer.json", tmp_path / "padded")
    main(["embed", "x", "--model", str(tmp_path / "padded")])
    assert "looks like a model for generating text" in capsys.readouterr().err
