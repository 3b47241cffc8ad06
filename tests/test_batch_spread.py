"""Packets on Dask's workers: real ones for results, and a scripted client for workers that die, hang or differ."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_batch import MODEL, answer, drawn, embedding, results, written

import qwen3np
from qwen3np.batches import spread
from qwen3np.batches.answers import Answers, Recipe
from qwen3np.batches.requests import packets, requests_of
from qwen3np.batches.run import run
from qwen3np.batches.spread import Spread
from qwen3np.cli import main

distributed = pytest.importorskip("distributed", reason="needs the extra `batch`")


@pytest.fixture(scope="module")
def client():
    """Two workers in threads of this process, which start at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN3NP_NUM_THREADS", "1")  # workers set it
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        with distributed.Client(processes=False, **options) as found:
            yield found
        while spread._held:
            spread._held.popitem()[1].close()


def test_workers_give_the_bytes_of_one_process(tmp_path, client):
    source = written(tmp_path / "in.jsonl", [*drawn(60), {"custom_id": "wrong"}])
    answer(source, tmp_path / "one.jsonl", Answers(MODEL, "tiny"))
    run(source, tmp_path / "two.jsonl", lambda: Spread(client, Recipe(None, "tiny")))
    assert results(tmp_path / "two.jsonl") == results(tmp_path / "one.jsonl")
    found = list(qwen3np.batch([embedding("a", "Paris")], client=client))
    np.testing.assert_allclose(found[0]["response"]["body"]["data"][0]["embedding"], MODEL.embed("Paris"), atol=2e-6)
    with pytest.raises(ValueError, match="give the name or folder of the model"):
        next(qwen3np.batch([embedding("a", "Paris")], MODEL, client=client))


def test_workers_that_die_while_they_load(monkeypatch):
    dying = Scripted(None)
    monkeypatch.setattr(dying, "nthreads", dict)
    with pytest.raises(ValueError, match="every worker died while it loaded the model"):
        Spread(dying, Recipe(None, "m"))


def test_a_checkpoint_that_workers_do_not_have(client):
    with pytest.raises(ValueError, match="there is no folder /no/such"):
        Spread(client, Recipe("/no/such/checkpoint", "m"))


class Scripted:
    """A client of workers a and b; `play(packet, where)` returns the lines, raises, or returns None: it hangs."""

    status = "running"

    def __init__(self, play):
        self.play, self.pool, self.hanging = play, ThreadPoolExecutor(1), []
        self.scheduler = self

    def wait_for_workers(self, count, timeout):
        pass

    def nthreads(self):
        return {"a": 1, "b": 1}

    def processing(self):
        return {"a": ("some key",) if self.hanging else (), "b": ()}

    def submit(self, function, recipe, model=None, packet=None, pure=True, workers=None):
        future = Done()
        if packet is None:
            future.result_ = "fp-model-machine" if workers == ["a"] else getattr(self, "other", "fp-model-other")
            return future
        try:
            future.result_ = self.play(pickle.loads(packet), workers)
        except Exception as error:
            future.error = error
        if future.result_ is None and future.error is None:
            self.hanging.append(future)
        return future


class Done:
    """A future that is done, unless it hangs."""

    def __init__(self):
        self.result_ = self.error = None
        self.cancelled = False

    @property
    def status(self):
        return "error" if self.error else "finished"

    def done(self):
        return True

    def result(self):
        return self.result_

    def exception(self):
        return self.error

    def cancel(self):
        self.cancelled = True

    def add_done_callback(self, tell):
        if self.result_ is not None or self.error is not None:
            tell(self)


def lines(packet):
    return b"".join(b"%s\n" % request.key.encode() for request in packet)


@pytest.fixture
def work():
    requests = [embedding(f"{n}", "word " * 500) for n in range(100)]
    return list(packets(requests_of(json.dumps(one).encode() for one in requests)))


def test_a_hanging_packet_is_done_by_another_worker(work, monkeypatch):
    monkeypatch.setattr(spread, "_LOOK", 0.01)
    copies = []

    def play(packet, workers):
        copies.extend(workers or ())
        return lines(packet) if packet[0].key != "0" or workers else None

    client = Scripted(play)
    found = [line.decode().strip() for _, line in Spread(client, Recipe(None, "m"))(work)]
    assert sorted(found, key=int) == [f"{n}" for n in range(100)]
    assert copies == ["b"]
    assert client.hanging[0].cancelled


def test_a_request_that_kills_workers_is_alone_with_its_error(work):
    class KilledWorker(Exception):
        pass

    def play(packet, workers):
        if any(request.key in ("7", "55") for request in packet):
            raise KilledWorker
        return lines(packet)

    found = {request.key: line for request, line in Spread(Scripted(play), Recipe(None, "m"))(work)}
    for key in ("7", "55"):
        result = json.loads(found.pop(key))
        assert (result["custom_id"], result["response"], result["error"]["code"]) == (key, None, "worker_died")
    assert found == {f"{n}": b"%d\n" % n for n in range(100) if n not in (7, 55)}


def test_other_errors_and_a_lost_scheduler_end_the_run(work, monkeypatch):
    def play(packet, workers):
        raise qwen3np.CheckpointError("the file has changed")

    with pytest.raises(qwen3np.CheckpointError, match="has changed"):
        list(Spread(Scripted(play), Recipe(None, "m"))(work))
    monkeypatch.setattr(spread, "_LOOK", 0.01)
    client = Scripted(lambda packet, workers: None)
    answering = Spread(client, Recipe(None, "m"))
    client.status = "closed"
    with pytest.raises(ValueError, match=r"the scheduler is gone; .* the same command goes on"):
        list(answering(work))


def test_workers_must_have_the_same_model():
    client = Scripted(None)
    assert Spread(client, Recipe(None, "m")).model == "fp-model"  # machines may differ, and results say so
    client.other = "fp-changed"
    with pytest.raises(ValueError, match=r"a has fp-model; b has fp-changed"):
        Spread(client, Recipe(None, "m"))


def test_no_more_packets_are_under_way_than_workers_need(work):
    taken = []

    def play(packet, workers):
        return lines(packet)

    answering = Spread(Scripted(play), Recipe(None, "m"))
    for n, _ in enumerate(answering(taken.append(p) or p for p in work)):
        assert len(taken) <= 5 + n


def test_a_scheduler_that_is_not_there(tmp_path, capsys, monkeypatch):
    source = written(tmp_path / "in.jsonl", drawn(3))
    monkeypatch.setattr(spread, "_PATIENCE", 0.3)
    with pytest.raises(SystemExit):
        main(["batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--scheduler", "tcp://127.0.0.1:1"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "no Dask scheduler answers there" in line


@pytest.mark.slow
def test_exact_results_have_the_same_bytes_for_any_workers(tmp_path):
    requests = [r for r in drawn(60) if r["url"] != "/v1/chat/completions"]
    source, found = written(tmp_path / "in.jsonl", requests), set()
    for workers in ([], *(["--workers", count] for count in ("1", "2", "5"))):
        out = tmp_path / "out.jsonl"
        command = [sys.executable, "-m", "qwen3np", "batch", source, "-o", out, "--engine", "exact", *workers]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        found.add(b"".join(sorted(out.read_bytes().splitlines(keepends=True))))
        out.unlink()
    assert len(found) == 1


@pytest.mark.slow
def test_four_kills():
    from batch_kills import KINDS, kills

    outcomes = []
    kills(4, 0, lambda kind, moment, seconds, outcome: outcomes.append((kind, outcome)), size=800)
    assert outcomes == [(kind, "clean") for kind in KINDS]
