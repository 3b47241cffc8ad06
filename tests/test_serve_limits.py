"""What a server takes, and when it stops: memory, time, queue, bodies, addresses, shutdown."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from drawing import trained_like

import qwen3np
from qwen3np.embeddings import rerank
from qwen3np.model import Model
from qwen3np.tokenizer import Tokenizer

serving = pytest.importorskip("serving", reason="the server and its tests need the extra `test`")
http, httpx, serve, wait_until = serving.http, serving.httpx, serving.serve, serving.wait_until

CAPITAL = "The capital of France is"
LONG = {"prompt": CAPITAL, "max_tokens": 250, "logit_bias": {"2022": -100, "2024": -100}}
PER_POSITION = 2 * 4 * 2 * 64 * 4  # bytes: keys and values, layers, KV heads, head_dim, float32


def test_a_client_that_leaves_ends_its_answer():
    with serve() as (address, service):
        scheduler = service.scheduler
        with http.stream("POST", f"{address}/v1/completions", json={**LONG, "stream": True, "n": 2}) as response:
            next(response.iter_lines())
        wait_until(lambda: scheduler.load["requests_running"] == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{address}/v1/completions", json={**LONG, "n": 16}, timeout=0.15)
        wait_until(lambda: scheduler.load["requests_running"] == 0)
        assert scheduler.counts["generated_tokens"] < 18 * 250


def test_a_full_queue_is_429():
    slow = threading.Event()
    with serve(waiting=1) as (address, service):
        service.scheduler.call(slow.wait)  # the thread is busy
        wait_until(lambda: service.scheduler.load["requests_waiting"] == 0)
        service.scheduler.call(lambda: None)
        try:
            found = http.post(f"{address}/v1/completions", json=LONG, timeout=4)
        finally:
            slow.set()
        assert (found.status_code, found.headers["Retry-After"]) == (429, "1")


def test_time_limits_end_what_runs_and_what_waits():
    with serve(timeout=0.2) as (address, service):
        found = http.post(f"{address}/v1/completions", json={**LONG, "n": 8})
        assert (found.status_code, found.json()["error"]["type"]) == (504, "timeout")
        with http.stream("POST", f"{address}/v1/completions", json={**LONG, "n": 8, "stream": True}) as response:
            *_, error, end = filter(None, response.iter_lines())
        assert ("timeout" in error, end) == (True, "data: [DONE]")
        begun, slow = threading.Event(), threading.Event()
        service.scheduler.call(lambda: (begun.set(), slow.wait(0.5)))
        begun.wait(4)
        found = http.post(f"{address}/v1/completions", json=LONG)
        assert (found.status_code, "too long" in found.json()["error"]["message"]) == (503, True)
        assert service.scheduler.load == {"requests_waiting": 0, "requests_running": 0, "prefix_bytes": 0}


def test_caches_stay_within_their_memory():
    """There is room for 400 positions: for a prompt of 129 and two kept prefixes of 128, or for one long answer."""
    prompts = [f"Seven plus five is twelve. Number {n}. " * 20 for n in range(3)]
    prompts = [qwen3np.load().text.encode(prompt)[:129] for prompt in prompts]
    with serve(memory=400 * PER_POSITION) as (address, service):

        def reused(prompt):
            body = {"prompt": prompt, "max_tokens": 1}
            usage = http.post(f"{address}/v1/completions", json=body).json()["usage"]
            assert service.scheduler.load["prefix_bytes"] <= 400 * PER_POSITION
            return usage["prompt_tokens_details"]["cached_tokens"]

        one, two, three = prompts
        assert [reused(prompt) for prompt in (one, one, two, one)] == [0, 128, 0, 128]
        assert reused(three) == 0
        assert [reused(one), reused(two)] == [128, 0]  # there was no room for a third one
        ran = []
        step = service.scheduler._step
        service.scheduler._step = lambda jobs: ran.append(len(jobs)) or step(jobs)
        found = http.post(f"{address}/v1/completions", json={**LONG, "max_tokens": 220, "n": 2}).json()
        assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 2
        assert max(ran) == 1  # the second one waited for the memory of the first
    with serve(memory=200 * PER_POSITION) as (address, _):
        found = http.post(f"{address}/v1/completions", json=LONG)
        assert (found.status_code, "cache" in found.json()["error"]["message"]) == (400, True)


def test_slow_bodies_are_given_up(monkeypatch):
    monkeypatch.setattr("qwen3np.serve.app._PATIENCE", 0.2)
    with serve() as (address, _):
        place = address.removeprefix("http://")
        with socket.create_connection((place.partition(":")[0], int(place.partition(":")[2]))) as connection:
            head = f"POST /tokenize HTTP/1.1\r\nHost: {place}\r\nContent-Type: application/json\r\n"
            connection.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt": '.encode())
            connection.settimeout(5)
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert http.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.slow)])
def test_the_command_finishes_running_answers_and_stops(host):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"no address {host}: {error}")
    command = [sys.executable, "-m", "qwen3np", "serve", "--port", "0", "--threads", "1", "--host", host]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        address = next(line for line in process.stderr if line.startswith("serving")).split()[-1]
        assert http.post(f"{address}/completions", json={"prompt": CAPITAL}).json()["choices"][0]["text"] == " Paris."
        assert http.get(f"{address}/%1b[31m").status_code == 404
        assert http.get(f"{address}/models", headers={"Host": "evil.example"}).status_code == 403
        with http.stream("POST", f"{address}/completions", json={**LONG, "stream": True}) as response:
            lines = filter(None, response.iter_lines())
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last, end = lines
        assert ('"finish_reason": "length"' in last, end) == (True, "data: [DONE]")
        log = process.stderr.read()
    assert "POST /v1/completions 200" in log
    assert "\x1b" not in log
    assert process.returncode in (0, -signal.SIGTERM)


def test_every_interface_needs_a_host_that_is_named_and_a_warning():
    """With --host 0.0.0.0, too, only addresses, localhost and named hosts may be asked for."""
    with serve(hosts=["0.0.0.0", "Box.lan"]) as (address, _):
        for host, status in {
            "box.lan": 200, "BOX.LAN:8000": 200, "10.0.0.7": 200, "[::1]:80": 200, "localhost": 200,
            "box.lan.evil.example": 403, "": 403, "[evil.example]": 403,
        }.items():  # fmt: skip
            assert http.get(f"{address}/v1/models", headers={"Host": host}).status_code == status, host


def test_a_reranker_ranks(config, yes_no):
    tokenizer = Tokenizer.from_folder(yes_no)
    config = replace(config, vocab_size=tokenizer.vocab_size, max_position_embeddings=1600)
    model = Model(config, trained_like(config, 1), tokenizer, {})
    documents = ["Paris is in France.", "Seven.", "Rome, and Paris, and so on."]
    scores = np.concatenate([rerank(model, "Where is Paris?", [document]) for document in documents])
    with serve(model) as (address, _):
        body = {"query": "Where is Paris?", "documents": documents}
        found = http.post(f"{address}/v1/rerank", json=body).json()["results"]
        assert [one["relevance_score"] for one in found] == sorted(scores.tolist(), reverse=True)
        assert [scores[one["index"]] for one in found] == [one["relevance_score"] for one in found]
        assert [one["document"]["text"] for one in found] == [documents[one["index"]] for one in found]
        (best,) = http.post(f"{address}/v1/rerank", json={**body, "top_n": 1, "return_documents": False}).json()[
            "results"
        ]
        assert best == {"index": found[0]["index"], "relevance_score": found[0]["relevance_score"]}


def test_the_builtin_checkpoint_has_no_yes_and_no():
    with serve() as (address, _):
        found = http.post(f"{address}/v1/rerank", json={"query": "blue?", "documents": ["x"]})
    assert (found.status_code, "no token" in found.json()["error"]["message"]) == (400, True)
