"""audit --url: our own server, small servers on loopback that answer like others, and hostile ones."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import qwen3np
from qwen3np.audit import endpoint
from qwen3np.audit.endpoint import PROMPTS, ask
from qwen3np.audit.report import audited
from qwen3np.cli import main

IDS = [1132, 259, 410]


@contextmanager
def server(answer):
    """Serve answer(path, body) -> (status, bytes or pieces of them, headers); yields the address and all requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.path, json.loads(body) if body else None, dict(self.headers)))
            status, data, headers = answer(*seen[-1][:2])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for piece in [data] if isinstance(data, bytes) else data:
                    self.wfile.write(piece)
                    self.wfile.flush()
            except OSError:  # the client has enough
                pass

        do_GET = do_POST

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def asked(url, model, **options):
    return ask(url, "tiny", model.tokenizer, model.config.vocab_size, context=256, prompts=2, **options)


def reply(value, status=200):
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def echoed(path, body):
    ids = [*body["prompt"], *IDS]
    return reply({"choices": [{"logprobs": {"token_ids": ids, "token_logprobs": [None, *[-1.0] * (len(ids) - 1)]}}]})


def test_completions_with_echo_count_the_prompts(builtin):
    lines = []
    with server(echoed) as (url, seen):
        found = asked(url, builtin, key="secret", say=lines.append)
    ids = [builtin.tokenizer.encode(text) for text in PROMPTS[:2]]
    assert [[*r.prompt, *r.ids] for r in found] == [[*own, *IDS] for own in ids]
    assert [len(r.prompt) for r in found] == [1, 1]
    assert lines == [f"{url}: at most 6 requests of 32 new tokens; nothing but 2 built-in prompts is sent"]
    assert [path for path, _, _ in seen] == ["/v1/completions"] * 2
    assert seen[0][2]["Authorization"] == "Bearer secret"
    assert "qwen3np" not in json.dumps(seen[0][1])
    assert set(seen[0][1]) == {"model", "prompt", "max_tokens", "temperature", "seed", "logprobs", "echo"}


def test_without_echo_and_without_completions_others_are_asked(builtin):
    content = [{"token": builtin.tokenizer.decode([i]), "logprob": -1.0, "top_logprobs": []} for i in IDS]
    tokens = {"tokens": [t["token"] for t in content], "token_logprobs": [-1.0] * 3, "top_logprobs": [None] * 3}

    def no_echo(path, body):
        return (
            reply({"error": {"message": "no echo"}}, 400)
            if "echo" in body
            else reply({"choices": [{"logprobs": tokens}]})
        )

    def only_chat(path, body):
        return reply({"choices": [{"logprobs": {"content": content}}]}) if "chat" in path else reply({}, 404)

    with server(no_echo) as (url, seen):
        found = asked(url, builtin)
    assert [r.ids for r in found] == [IDS] * 2
    assert len(seen) == 3
    assert found[0].prompt == builtin.tokenizer.encode(PROMPTS[0])
    with server(only_chat) as (url, seen):
        found = asked(url, builtin)
    assert [r.ids for r in found] == [IDS] * 2
    assert len(seen) == 5
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert found[0].prompt == builtin.tokenizer.apply_chat_template(messages, tokenize=True)


def test_where_echo_is_refused_vllms_field_gives_the_prompts(builtin):
    def answer(path, body):
        if "prompt_logprobs" not in body:
            return reply({"error": {"message": "no echo"}}, 400)
        of_prompt = [
            None,
            *({str(i): {"logprob": -2.0, "rank": 1}, "7": {"logprob": -3.0}} for i in body["prompt"][1:]),
        ]
        logprobs = {"token_ids": IDS, "token_logprobs": [-1.0] * 3}
        return reply({"choices": [{"logprobs": logprobs, "prompt_logprobs": of_prompt}]})

    with server(answer) as (url, seen):
        found = asked(url, builtin)
    assert len(seen) == 3
    ids = builtin.tokenizer.encode(PROMPTS[0])
    assert [(r.prompt, r.ids) for r in found[:2]] == [(ids, IDS), (ids[:1], ids[1:])]
    assert (found[1].logprobs[:, 0] == -2.0).all()
    assert found[1].found[:, 1].tolist() == [7] * (len(ids) - 1)


def endless(path, body):
    return 200, (b"x" * (1 << 16) for _ in iter(int, 1)), {}


def slow(path, body):
    return 200, (time.sleep(0.05) or b"x" for _ in iter(int, 1)), {}


def elsewhere(path, body):
    return 302, b"", {"Location": "http://example.com/v1/completions"}


HOSTILE = {
    "an endless answer": (endless, "more than 16 MiB"),
    "an answer byte by byte": (slow, "no whole answer within 1 s"),
    "a redirect": (elsewhere, "redirects to http://example.com/v1/completions, which is not followed"),
    "an error": (lambda *_: reply({"error": {"message": "no\nroom\x1b[31m" * 100}}, 500), "status 500: no"),
    "an error without words": (lambda *_: (503, b"", {}), "status 503: no reason given"),
    "an error that is cut": (
        lambda *_: (500, b"3\r\nab", {"Transfer-Encoding": "chunked"}),
        "status 500: no reason given",
    ),
    "no JSON": (lambda *_: (200, b"<html>", {}), "Expecting value"),
    "a list": (lambda *_: reply([1]), "not a JSON object"),
    "deep": (lambda *_: (200, b"[" * 100_000, {}), "prompt 1: "),
    "no choices": (lambda *_: reply({}), "no log-probabilities"),
    "no log-probabilities": (lambda *_: reply({"choices": [{"text": "x", "logprobs": None}]}), "no log-probabilities"),
    "choices that are none": (lambda *_: reply({"choices": 5}), "prompt 1: "),
    "prompts of other types": (lambda *_: reply({"choices": [{"prompt_logprobs": {"a": 1}}]}), "prompt 1: "),
    "other types": (lambda *_: reply({"choices": [{"logprobs": {"content": 7}}]}), "not a list"),
    "other tokens": (
        lambda *_: reply({"choices": [{"logprobs": {"token_ids": [10**9], "token_logprobs": [-1]}}]}),
        "is not an id",
    ),
    "no HTTP": (lambda *_: (200, b"", {"Content-Length": "-5"}), "prompt 1: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers_are_one_line(builtin, monkeypatch, name):
    answer, expected = HOSTILE[name]
    monkeypatch.setattr(endpoint, "TIMEOUT", 1.0)
    start = time.monotonic()
    with server(answer) as (url, _), pytest.raises(ValueError, match=expected) as error:
        asked(url, builtin)
    text = str(error.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 800
    assert text.startswith("http://127.0.0.1")
    assert time.monotonic() - start < 5


def test_addresses_that_cannot_be_asked_are_one_line(builtin, capsys):
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/v1", "127.0.0.1:8000", "http://"):
        with pytest.raises(ValueError, match="must be http://HOST:PORT/v1"):
            asked(url, builtin)
    with pytest.raises(ValueError, match="refused"):
        asked("http://127.0.0.1:1/v1", builtin)
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--url", "http://127.0.0.1:1/v1"])
    assert ended.value.code == 2
    assert "error: http://127.0.0.1:1/v1/models: " in capsys.readouterr().err


def test_a_key_that_no_header_can_hold_is_not_printed(builtin):
    with pytest.raises(ValueError, match="the API key has a character") as error:
        asked("http://127.0.0.1:9/v1", builtin, key="secret\nkey")
    assert "secret" not in str(error.value)


def test_the_only_model_of_a_server_is_asked_for(builtin):
    def answer(path, body):
        return reply({"data": [{"id": "the one"}]}) if path.endswith("/models") else echoed(path, body)

    with server(answer) as (url, seen):
        ask(url, None, builtin.tokenizer, builtin.config.vocab_size, context=256, prompts=1)
    assert seen[1][1]["model"] == "the one"
    two = server(lambda *_: reply({"data": [{"id": "a"}, {"id": "b"}]}))
    with two as (url, _), pytest.raises(ValueError, match=r"--served-name NAME names it \(a, b\)"):
        ask(url, None, builtin.tokenizer, builtin.config.vocab_size)


def test_our_own_server_runs_its_model(builtin):
    serving = pytest.importorskip("serving", reason="needs the extra `serve`")
    with serving.serve(builtin) as (address, _):
        rollouts = asked(f"{address}/v1", builtin)
    found = audited(rollouts, builtin)
    assert found.verdict == "rounding"
    assert found.mean_abs < 1e-5
    assert found.others_mean_abs < 1e-5
    assert found.tokens > 20  # most of them in the prompts


@pytest.mark.slow
def test_a_server_with_another_model_is_different(builtin):
    serving = pytest.importorskip("serving", reason="needs the extra `serve`")
    weights = {**builtin.weights, "model.norm.weight": builtin.weights["model.norm.weight"] * np.float32(0.7)}
    other = qwen3np.Model(builtin.config, weights, builtin.tokenizer, {})
    with serving.serve(other) as (address, _):
        rollouts = asked(f"{address}/v1", builtin)
    found = audited(rollouts, builtin)
    assert found.verdict == "different"
    assert found.judgement.causes[0].name.startswith("processed by temperature 1.4")


@pytest.mark.slow
def test_five_hundred_changed_answers_are_read_or_refused_in_one_line(builtin):
    rng, refused = np.random.default_rng(0), list[str]()
    ids = [*builtin.tokenizer.encode(PROMPTS[0]), *IDS]
    logprobs = {"token_ids": ids, "token_logprobs": [None, *[-1.0] * (len(ids) - 1)], "top_logprobs": [None] * len(ids)}
    good = json.dumps({"choices": [{"logprobs": logprobs}]})
    odd = ["null", "-1", "1e999", '"x"', "[]", "{}", "true", "[[[]]]", "NaN", "1" * 400, '"\\ud800"']
    text = good

    def answer(path, body):
        return 200, text.encode(), {}

    with server(answer) as (url, _):
        for _ in range(500):
            at = int(rng.integers(len(good)))
            text = (
                good[:at]
                + (odd[rng.integers(len(odd))] if rng.integers(2) else "")
                + good[at + int(rng.integers(12)) :]
            )
            try:
                ask(url, "x", builtin.tokenizer, builtin.config.vocab_size, context=256, prompts=1)
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 250
    assert all("\n" not in text and len(text) < 800 for text in refused)
