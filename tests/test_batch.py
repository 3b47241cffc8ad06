"""A file of requests answered in this process; truth is the server's own code, and the same requests alone."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as read_tensors

import qwen3np
from qwen3np.batches.answers import Answers, Recipe
from qwen3np.batches.requests import LONGEST, PACKET, left_of, packets, requests_of
from qwen3np.batches.results import Results
from qwen3np.batches.run import here, run
from qwen3np.cli import main
from qwen3np.embeddings import embed

MODEL = qwen3np.load(progress=False)
WORDS = ["The", "capital", "of", "France", "is", "Paris.", "Seven", "plus", "five", "day", "after", "Monday", "雪"]


def text(rng, most=12):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def embedding(name, said, **body):
    return {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": {"input": said, **body}}


def drawn(count, seed=0):
    """Draw requests of every kind that the built-in checkpoint answers."""
    rng = random.Random(seed)
    for n in range(count):
        url, body = (
            ("/v1/embeddings", {"input": text(rng)}),
            ("/v1/embeddings", {"input": [text(rng), text(rng)], "dimensions": 8, "instruction": "Find it"}),
            ("/v1/completions", {"prompt": text(rng), "max_tokens": 4, "temperature": 1.0, "n": 2, "logprobs": 1}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text(rng)}], "max_tokens": 4}),
            ("/score", {"input": text(rng) + " of"}),
        )[n % 5]
        yield {"custom_id": f"request {n}", "url": url, "body": body}


def written(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    return path


def results(path):
    """The results of a file, by custom_id or line; each line must be whole, and nothing there twice."""
    found = {}
    for line in path.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        result = json.loads(line)
        key = result["error"]["line"] if result["custom_id"] is None else result["custom_id"]
        assert key not in found
        found[key] = result
    return found


@pytest.fixture(scope="module")
def answers():
    return Answers(MODEL, "tiny")


def answer(source, out, answers, **options):
    return run(source, out, lambda: here(answers), **options)


def test_answers_are_those_of_the_functions(tmp_path, answers):
    rng = random.Random(1)
    said = [text(rng) for _ in range(40)]
    requests = [embedding(f"e{n}", one) for n, one in enumerate(said)]
    prompt = {"prompt": "The opposite of hot is", "max_tokens": 3, "temperature": 0, "logprobs": 0}
    requests += [
        {"custom_id": "complete", "url": "/v1/completions", "body": prompt},
        {"custom_id": "score", "url": "/score", "body": {"input": said[0] + " Paris"}},
        {"custom_id": "trace", "url": "/trace", "body": {"prompt": [5, 6, 7], "points": "lm_head"}},
        embedding("packed", said[0], encoding_format="base64", dimensions=8),
    ]
    source, out = written(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    assert answer(source, out, answers) == {"results": 44, "failures": 0}
    found = {name: result["response"]["body"] for name, result in results(out).items()}
    vectors = np.array([found[f"e{n}"]["data"][0]["embedding"] for n in range(40)])
    np.testing.assert_allclose(vectors, embed(MODEL, said), atol=2e-6)
    assert found["e3"]["usage"]["prompt_tokens"] == len(MODEL.text.encode(said[3])) + 1  # <|endoftext|>
    packed = np.frombuffer(base64.b64decode(found["packed"]["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(packed, embed(MODEL, said[:1], dimensions=8)[0], atol=2e-6)
    ids = MODEL.text.encode(prompt["prompt"])
    new, _ = MODEL.generate(ids, max_new_tokens=3)
    assert found["complete"]["choices"][0]["logprobs"]["token_ids"] == new
    assert found["score"]["logprobs"] == [None, *MODEL.score(said[0] + " Paris").tolist()]
    points = read_tensors(base64.b64decode(found["trace"]["safetensors"]))
    np.testing.assert_array_equal(points["lm_head"], MODEL([5, 6, 7]))


def test_results_are_a_function_of_the_requests(tmp_path, answers):
    source = written(tmp_path / "in.jsonl", drawn(60))
    answer(source, tmp_path / "one.jsonl", answers)
    answer(source, tmp_path / "two.jsonl", Answers(MODEL, "tiny"))
    found = results(tmp_path / "one.jsonl")
    assert found == results(tmp_path / "two.jsonl")
    assert set(found) == {f"request {n}" for n in range(60)}
    assert all(result["response"]["status_code"] == 200 for result in found.values())


def test_each_request_without_a_seed_has_its_own(tmp_path, answers):
    body = {"prompt": "The", "max_tokens": 4, "temperature": 1.5}
    requests = [{"custom_id": f"{n}", "url": "/v1/completions", "body": body} for n in range(8)]
    answer(written(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl", answers)
    found = results(tmp_path / "out.jsonl").values()
    assert len({result["response"]["body"]["choices"][0]["text"] for result in found}) > 4


def test_a_prefix_that_was_computed_before_changes_nothing(tmp_path, answers):
    prompt = {"prompt": "The capital of France is Paris. " * 30, "max_tokens": 2}
    source = written(tmp_path / "in.jsonl", [{"custom_id": "a", "url": "/v1/completions", "body": prompt}])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        answer(source, tmp_path / name / "out.jsonl", answers)
    assert answers.service.scheduler.counts["reused_tokens"] >= 128
    one, other = ((tmp_path / name / "out.jsonl").read_bytes() for name in ("one", "two"))
    assert one == other


def test_packets_share_tokens_not_lines():
    rng = random.Random(0)
    lines = [embedding(f"{n}", "word " * int(rng.expovariate(1 / 200))) for n in range(3000)]
    found = list(packets(requests_of(json.dumps(line).encode() for line in lines)))
    assert sorted(r.line for packet in found for r in packet) == list(range(1, 3001))
    costs = [sum(request.cost for request in packet) for packet in found]
    assert all(cost <= PACKET for cost in costs)
    assert min(costs[:-1]) > PACKET * 0.7
    longest = [packet[0].cost for packet in found]
    assert longest == sorted(longest, reverse=True)
    assert len(found[0]) * 5 < len(found[-2])


def test_vectors_are_computed_with_the_same_others_again():
    for requests, again in (([embedding(f"{n}", "x") for n in range(3)], 3), ([*drawn(5)][4:], 0)):
        (packet,) = packets(requests_of(json.dumps(request).encode() for request in requests))
        assert left_of(packet, {request.key for request in packet}) == []
        assert len(left_of(packet, {packet[0].key})) == again


@pytest.mark.parametrize(
    "end", [b"", b'{"id": "batch_req', b'{"id": "batch_req_x", "custom_id": "request 3", "response": null']
)
def test_a_run_goes_on_after_the_last_whole_line(tmp_path, answers, end):
    source, out = written(tmp_path / "in.jsonl", drawn(40)), tmp_path / "out.jsonl"
    answer(source, out, answers)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:13]) + end)
    computed = []
    run(source, out, lambda: lambda work: here(answers)(computed.append(p) or p for p in work))
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())  # vectors in every bit, too
    assert sum(map(len, computed)) < 40
    run(source, out, lambda: pytest.fail("nothing is left to do"))


def test_other_files_are_not_overwritten(tmp_path, answers):
    source = written(tmp_path / "in.jsonl", drawn(3))
    other = written(tmp_path / "other.jsonl", drawn(3))
    before = other.read_bytes()
    with pytest.raises(ValueError, match=r"other.jsonl: line 1 is not a result"):
        answer(source, other, answers)
    assert other.read_bytes() == before
    other.write_bytes(b"one line without an end")
    with pytest.raises(ValueError, match=r"other.jsonl: line 1 is not a result"):
        answer(source, other, answers)
    assert other.read_bytes() == b"one line without an end"
    with pytest.raises(ValueError, match="another file than the requests"):
        answer(source, source, answers)


def test_results_of_another_model_are_not_mixed_in(tmp_path, answers):
    source, out = written(tmp_path / "in.jsonl", drawn(10)), tmp_path / "out.jsonl"
    answer(source, out, answers)
    lines = out.read_bytes().splitlines(keepends=True)
    before = b"".join(lines[:5]).replace(answers.fingerprint.rpartition("-")[0].encode(), b"fp-0000")
    out.write_bytes(before)
    with pytest.raises(ValueError, match=r"out.jsonl: holds results of another model"):
        answer(source, out, answers)
    assert out.read_bytes() == before


def test_a_caller_with_an_event_loop(answers):
    async def caller():
        return list(qwen3np.batch(list(drawn(8)), MODEL))

    alone = {one["custom_id"]: one for one in qwen3np.batch(list(drawn(8)), MODEL)}
    assert {one["custom_id"]: one for one in asyncio.run(caller())} == alone


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_one_process_at_a_time_writes(tmp_path):
    with Results(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="another process is writing it"):
        Results(tmp_path / "out.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    class Full:
        """A file on a disk that has room for 100 more bytes."""

        def __init__(self, file):
            self.file, self.room = file, 100

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = self.file.write(data[: self.room])
            self.room -= count
            return count

        def __getattr__(self, name):
            return getattr(self.file, name)

    out = tmp_path / "out.jsonl"
    with Results(out) as found:
        found._file = Full(found._file)
        assert found.write("a", b'{"custom_id": "a"}\n')
        assert not found.write("a", b'{"custom_id": "a"}\n')
        with pytest.raises(ValueError, match=r"out.jsonl: cannot be written \(No space left on device\)"):
            found.write("b", b'{"custom_id": "b", "long": "' + b"x" * 200 + b'"}\n')
    assert out.read_bytes() == b'{"custom_id": "a"}\n'


def hostile(rng, n):
    """Draw a line that is no request, or one that cannot be answered."""
    good = embedding(f"hostile {n}", text(rng))
    line = json.dumps(good)
    wrong = [
        lambda: rng.randbytes(rng.randint(1, 200)).replace(b"\n", b"?").replace(b"\r", b"?") + b"{",
        lambda: line[: rng.randrange(1, len(line))].encode(),
        lambda: line.encode("utf-16")[: 2 * len(line)].replace(b"\n", b""),
        lambda: (line + line).encode(),
        lambda: b"[" * rng.choice([1, 100, 100_000]),
        lambda: b'{"custom_id": ' * 50_000,
        lambda: json.dumps([good]).encode(),
        lambda: rng.choice([b"null", b"0", b'""', b"NaN", b"1e999", b"9" * 5000, b"\x00", b"\xef\xbb\xbf{}", b"{}"]),
        lambda: json.dumps({**good, "custom_id": rng.choice([None, 1, "", [], {}, "x" * 513, "\ud800"])}).encode(),
        lambda: json.dumps({**good, "custom_id": "good 0"}).encode(),
        lambda: json.dumps({**good, "method": rng.choice(["GET", 1, "post", {}])}).encode(),
        lambda: json.dumps(
            {**good, "url": rng.choice(["/", "/v1/files", "file:///etc/passwd", 7, "\x1b[2J"])}
        ).encode(),
        lambda: json.dumps({**good, "body": rng.choice([None, [], "x", 3, {}])}).encode(),
        lambda: json.dumps({**good, "custom_idd": "other"}).encode(),
        lambda: json.dumps(embedding(f"hostile {n}", rng.choice([None, [], [[]], 5, {"a": 1}, [None]]))).encode(),
        lambda: json.dumps(embedding(f"hostile {n}", "word " * 3000)).encode(),
        lambda: json.dumps(embedding(f"hostile {n}", "x", dimensions=rng.choice([0, -1, 10**9, "8", 1e400]))).encode(),
        lambda: json.dumps(embedding(f"hostile {n}", "x", model="\x1b]0;title\x07")).encode(),
        lambda: json.dumps(
            {**good, "url": "/score", "body": {"input": [rng.choice([-1, 10**9, "a", None]), 2]}}
        ).encode(),
        lambda: json.dumps({**good, "url": "/trace", "body": {"prompt": "x", "points": "no such point"}}).encode(),
        lambda: json.dumps({**good, "url": "/v1/completions", "body": {"prompt": "x", "stream": True}}).encode(),
        lambda: json.dumps({**good, "url": "/v1/completions", "body": {"prompt": "x" * 20_000}}).encode(),
        lambda: json.dumps({**good, "url": "/v1/chat/completions", "body": {"messages": [{"role": 1}]}}).encode(),
    ]
    return rng.choice(wrong)()


def among(count, seed=0):
    """Return lines, good and hostile in random order, and the names of the good ones."""
    rng = random.Random(seed)
    lines = [json.dumps(embedding(f"good {n}", text(rng))).encode() for n in range(count)]
    bad = [hostile(rng, n) for n in range(count)]
    bad = [line for line in bad if line.strip()]
    # a repeated custom_id is wrong where it comes second
    mixed = [lines[0], *rng.sample(lines[1:] + bad, len(lines) - 1 + len(bad))]
    return mixed, {f"good {n}" for n in range(count)}, len(bad)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_lines_among_good_ones(tmp_path, count, capfd):
    lines, good, bad = among(count)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n" + b"[" * (LONGEST + 10) + b"\r\n\n \n")
    main(["batch", str(source), "-o", str(out)])
    found = results(out)
    assert len(found) == count + bad + 1
    for name, result in found.items():
        failed = result["response"] is None or result["response"]["status_code"] != 200
        assert failed == (name not in good), result
        if result["response"] is None:
            assert result["error"]["message"]
            assert result["error"]["line"] > 0
        elif failed:
            assert result["response"]["status_code"] in (400, 404), result
            assert result["response"]["body"]["error"]["message"]
    assert f"[{len(found):,} results, {bad + 1:,} failed: {out}]" in capfd.readouterr().err
    before = out.read_bytes()
    main(["batch", str(source), "-o", str(out)])
    assert out.read_bytes() == before


def test_a_damaged_checkpoint_stops_the_run(tmp_path):
    folder, source = tmp_path / "model", written(tmp_path / "in.jsonl", drawn(5))
    MODEL.save(folder)
    answers = Recipe(str(folder), "m", options=(("weights_dtype", "mapped"),)).answers()
    data = (folder / "model.safetensors").read_bytes()
    os.truncate(folder / "model.safetensors", len(data) - 5)
    with pytest.raises(qwen3np.CheckpointError, match="changed"):
        answer(source, tmp_path / "out.jsonl", answers)
    assert results(tmp_path / "out.jsonl") == {}


def test_fingerprints_tell_what_differs():
    def of(model=MODEL, **options):
        return Answers(model, "m", **options).fingerprint.split("-")

    fp, model, machine = of()
    assert fp == "fp"
    assert of() == [fp, model, machine]
    exact = of(engine="exact")
    assert exact[0] == fp
    assert len(exact) == 2  # no machine
    assert exact[1] != model
    assert of(numerics="bfloat16")[1] not in (model, exact[1])
    changed = {name: w.copy() for name, w in MODEL.weights.items()}
    changed["model.norm.weight"][0] += 1
    other = qwen3np.Model(MODEL.config, changed, MODEL.tokenizer, MODEL.generation_config)
    assert of(other)[1] != model


def test_the_function_yields_results():
    requests = [embedding("a", "Paris"), {"custom_id": "b", "url": "/v1/nothing", "body": {}}]
    found = {result["custom_id"]: result for result in qwen3np.batch(requests, MODEL)}
    vector = found["a"]["response"]["body"]["data"][0]["embedding"]
    np.testing.assert_allclose(vector, embed(MODEL, ["Paris"])[0], atol=2e-6)
    (wrong,) = (result for result in found.values() if result["response"] is None)
    assert "url must be one of" in wrong["error"]["message"]


def test_batch_needs_no_server():
    """The server's own dependencies stay out of it."""
    code = (
        "import sys, qwen3np.commands.batch; print([m for m in ('starlette', 'uvicorn', 'dask') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(qwen3np.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
