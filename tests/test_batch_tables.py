"""Requests and results in other formats; truth is pyarrow, NumPy and gzip."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest
from test_batch import MODEL, drawn, embedding, results, written
from test_batch import answer as really_answer

from qwen3np.batches import tables
from qwen3np.batches.answers import Answers
from qwen3np.batches.run import run

pa = pytest.importorskip("pyarrow", reason="tables need the extra `batch`")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The results of drawn requests, in order: formats need no others."""
    folder = tmp_path_factory.mktemp("real")
    really_answer(written(folder / "in.jsonl", drawn(41)), folder / "out.jsonl", Answers(MODEL, "tiny"), in_order=True)
    return (folder / "out.jsonl").read_bytes().splitlines(keepends=True)


@pytest.fixture
def answer(lines):
    """Answer drawn requests with these results."""
    known = {f"request {n}": line for n, line in enumerate(lines)}

    def answer(source, out, **options):
        return run(source, out, lambda: lambda work: ((r, known[r.key]) for packet in work for r in packet), **options)

    return answer


@pytest.fixture
def plain(tmp_path, lines):
    """Requests, and their results in order."""
    return written(tmp_path / "in.jsonl", drawn(40)), b"".join(lines[:40])


def test_results_in_the_order_of_the_requests(plain, tmp_path, answer):
    assert [json.loads(line)["custom_id"] for line in plain[1].splitlines()] == [f"request {n}" for n in range(40)]
    answer(plain[0], tmp_path / "out.jsonl")
    answer(plain[0], tmp_path / "ordered.jsonl", in_order=True)
    assert (tmp_path / "ordered.jsonl").read_bytes() == plain[1] != (tmp_path / "out.jsonl").read_bytes()


def test_compressed_results(plain, tmp_path, answer):
    source, lines = plain
    for name in ("a.jsonl.gz", "b.jsonl.gz", "a.jsonl.zst"):
        answer(source, tmp_path / name)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == lines
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert pa.input_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd").read() == lines
    assert not list(tmp_path.glob("*.growing*"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_hold_the_same_results(plain, tmp_path, answer, kind):
    source, lines = plain
    out = tmp_path / f"out.{kind}"
    answer(source, out)
    table = pq.read_table(out) if kind == "parquet" else pa.ipc.open_file(str(out)).read_all()
    assert table.num_rows == 40
    for row, line in zip(table.to_pylist(), lines.splitlines(), strict=True):
        result = json.loads(line)
        assert (row["id"], row["custom_id"]) == (result["id"], result["custom_id"])
        assert row["status_code"] == 200
        body, vector = json.loads(row["body"]), row["embedding"]
        if vector is not None:
            body["data"][0]["embedding"] = vector
        assert body == result["response"]["body"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("as_text", [True, False])
def test_requests_from_every_format(plain, tmp_path, answer, kind, as_text):
    rows = [json.loads(line) for line in plain[0].read_text().splitlines()]
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl.gz":
        source.write_bytes(gzip.compress(plain[0].read_bytes()))
    elif kind == "jsonl.zst":
        with pa.output_stream(str(source), compression="zstd") as file:
            file.write(plain[0].read_bytes())
    else:
        rows = [row for row in rows if row["url"] == "/v1/completions" or as_text]  # bodies of one kind are a struct
        table = pa.Table.from_pylist(
            [{**row, "body": json.dumps(row["body"]) if as_text else row["body"]} for row in rows]
        )
        if kind == "parquet":
            pq.write_table(table, source)
        else:
            with pa.ipc.new_file(str(source), table.schema) as file:
                file.write_table(table)
    answer(source, tmp_path / "out.jsonl")
    found = results(tmp_path / "out.jsonl")
    expected = {r["custom_id"]: r for r in map(json.loads, plain[1].splitlines())}
    assert found == {row["custom_id"]: expected[row["custom_id"]] for row in rows}


def test_vectors_alone(tmp_path):
    requests = [embedding(f"{n}", f"Paris {n}", dimensions=8) for n in range(9)]
    requests[0]["body"]["dimensions"] = requests[4]["body"]["dimensions"] = 0
    requests[5]["body"]["encoding_format"] = "base64"
    source, out = written(tmp_path / "in.jsonl", requests), tmp_path / "out.npy"
    answers = Answers(MODEL, "tiny")
    really_answer(source, out, answers)
    vectors = np.load(out)
    assert (vectors.dtype, vectors.shape) == (np.dtype("float32"), (9, 8))
    good = [n for n in range(9) if n not in (0, 4)]
    np.testing.assert_allclose(vectors[good], MODEL.embed([f"Paris {n}" for n in good], dimensions=8), atol=2e-6)
    assert np.isnan(vectors[[0, 4]]).all()
    assert set(results(tmp_path / "out.npy.failed.jsonl")) == {"0", "4"}
    several = written(tmp_path / "several.jsonl", [embedding("0", ["a", "b"])])
    with pytest.raises(ValueError, match=r"one vector for each request, unlike '0'"):
        really_answer(several, tmp_path / "several.npy", answers)


def test_results_in_several_files(plain, tmp_path, answer):
    for kind in ("jsonl", "parquet"):
        answer(plain[0], tmp_path / f"part.{kind}", per_file=15)
    names = [f"part-{n:05}" for n in range(3)]
    assert sorted(path.name for path in tmp_path.glob("part*")) == [
        f"{n}.{k}" for n in names for k in ("jsonl", "parquet")
    ]
    assert [pq.read_table(tmp_path / f"{name}.parquet").num_rows for name in names] == [15, 15, 10]
    assert set(results(tmp_path / "part-00002.jsonl")) == {f"request {n}" for n in range(30, 40)}
    (tmp_path / "part-00001.parquet").unlink()
    before = (tmp_path / "part-00000.parquet").stat().st_mtime_ns
    answer(plain[0], tmp_path / "part.parquet", per_file=15)
    assert pq.read_table(tmp_path / "part-00001.parquet").num_rows == 15
    assert (tmp_path / "part-00000.parquet").stat().st_mtime_ns == before


def test_a_complete_file_is_kept_and_another_is_not_taken_for_it(plain, tmp_path, answer):
    for kind in ("jsonl.gz", "parquet", "arrow"):
        out = tmp_path / f"out.{kind}"
        answer(plain[0], out)
        before = out.read_bytes()
        answer(plain[0], out)
        assert out.read_bytes() == before
        longer = written(tmp_path / "longer.jsonl", drawn(41))
        with pytest.raises(ValueError, match="has 40 results for 41 requests"):
            answer(longer, out)
        others = written(tmp_path / "others.jsonl", [*drawn(39), embedding("another", "text")])
        with pytest.raises(ValueError, match="result 40 is not that of request 'another'"):
            answer(others, out)
        out.write_bytes(b"[]\n")
        with pytest.raises(ValueError, match=rf"out.{kind}: holds no results of qwen3np batch"):
            answer(longer, out)


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.parquet", "out.arrow", "out.npy", "ordered.jsonl"])
def test_a_complete_file_with_results_of_wrong_lines_is_kept(tmp_path, name):
    source = written(tmp_path / "in.jsonl", [embedding("a", "Paris"), {"url": "nowhere"}, embedding("a", "Rome")])
    out, answers = tmp_path / name, Answers(MODEL, "tiny")
    assert really_answer(source, out, answers, in_order=True)["complete"] == 0
    before = out.read_bytes()
    assert really_answer(source, out, answers, in_order=True)["complete"] == 3
    answers.close()
    assert out.read_bytes() == before


def test_a_run_killed_before_the_conversion_goes_on(plain, tmp_path, answer):
    out, growing = tmp_path / "out.parquet", tmp_path / "out.parquet.growing.jsonl"
    growing.write_bytes(b"".join(plain[1].splitlines(keepends=True)[:30]) + b'{"id": "batch_req_ha')
    answer(plain[0], out)
    assert pq.read_table(out).num_rows == 40
    assert not growing.exists()


@pytest.mark.parametrize("name", ["a.txt", ".jsonl", "a.npy"])
def test_names_of_other_formats(tmp_path, name):
    with pytest.raises(ValueError, match="the name must end with one of"):
        list(tables.lines_of(tmp_path / name))


def test_damaged_files_are_errors_of_one_line(plain, tmp_path):
    whole = gzip.compress(plain[0].read_bytes())
    for name, data in (
        ("a.jsonl.gz", whole[: len(whole) // 2]),
        ("b.jsonl.gz", b"no gzip"),
        ("c.jsonl.zst", os.urandom(50)),
        ("d.parquet", b"PAR1"),
        ("e.arrow", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as caught:
            list(tables.lines_of(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        list(tables.lines_of(tmp_path / "absent.jsonl"))
