"""Hashes of points: the same for every way to compute them exactly, and compared by the command."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from qwen3np.cli import main
from qwen3np.porting import Recording, record
from qwen3np.porting.hashes import read_hashes
from qwen3np.verify import sha256


@pytest.fixture(scope="module")
def recording(builtin):
    return record(builtin.weights, builtin.config, [281, 297, 272, 1132, 259], steps=1, engine="exact")


def test_a_hash_is_that_of_the_numbers():
    x = np.array([[1.5, -0.0], [0.0, -2.0]], np.float32)
    bytes_in_order = np.array([1.5, 0, 0, -2], "<f4").tobytes()
    assert sha256(x) == hashlib.sha256(bytes_in_order).hexdigest() == sha256(np.asfortranarray(x))
    assert sha256(np.arange(3)) == hashlib.sha256(np.arange(3, dtype="<i8").tobytes()).hexdigest()


def test_an_exact_recording_keeps_its_hashes(recording, tmp_path):
    recording.save(tmp_path / "golden.safetensors")
    again = Recording.load(tmp_path / "golden.safetensors")
    assert again.engine == "exact"
    assert again.sha256 == recording.sha256


def test_a_point_that_was_changed_is_noticed(recording, tmp_path):
    path = tmp_path / "golden.safetensors"
    recording.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has changed since it was recorded"):
        Recording.load(path)


def test_one_sequence_alone_and_in_a_batch_have_the_same_hashes(builtin, recording):
    ids = [[9, 8, 7, 6, 5], [281, 297, 272, 1132, 259]]
    points = {}
    builtin(ids, engine="exact", trace=points.__setitem__)
    for name, x in points.items():
        assert sha256(x[1:]) == recording.sha256[name], name


def test_the_command_compares_hashes(recording, tmp_path, capsys):
    recording.save(tmp_path / "golden.safetensors")

    def compared(hashes):
        (tmp_path / "mine.json").write_text(json.dumps(hashes))
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(tmp_path / "golden.safetensors"), str(tmp_path / "mine.json")])
        return ended.value.code, capsys.readouterr()

    total = len(recording.points)
    status, said = compared(recording.sha256)
    assert (status, said.out) == (0, f"the same bits; compared {total} of {total} points\n")
    status, said = compared({**recording.sha256, "model.layers.1.mlp.act": "0" * 64, "decode.0.lm_head": "1" * 64})
    assert status == 1
    assert "the first point with other bits: model.layers.1.mlp.act; compared" in said.out
    status, said = compared({"lm_head": recording.sha256["lm_head"], "head": "0" * 64})
    assert (status, said.out) == (0, f"the same bits; compared 1 of {total} points; 1 unknown names\n")
    for wrong in ({"head": "0" * 64}, {"lm_head": "abc"}, {"lm_head": 5}):
        assert compared(wrong)[0] == 2


def test_hashes_of_a_fast_recording_mean_nothing(builtin, tmp_path, capsys):
    golden = record(builtin.weights, builtin.config, [281, 297], points="lm_head")
    golden.save(tmp_path / "golden.safetensors")
    (tmp_path / "mine.json").write_text(json.dumps(golden.sha256))
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "golden.safetensors"), str(tmp_path / "mine.json")])
    assert ended.value.code == 2
    assert "made by the fast engine" in capsys.readouterr().err


def test_what_is_no_list_of_hashes_is_refused(tmp_path):
    for text in ("[]", "{", '{"a": "zz"}'):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match=r"mine\.json"):
            read_hashes(tmp_path / "mine.json")
