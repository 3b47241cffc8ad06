"""A server in a thread of the test's process; importing this needs the extra `serve`, and the clients."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

import qwen3np
from qwen3np.serve import fields
from qwen3np.serve.app import application
from qwen3np.serve.scheduler import Scheduler
from qwen3np.serve.service import Service

http = httpx.Client(timeout=60)


def wait_until(holds):
    """Wait until holds() is true, or fail."""
    for _ in range(400):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("did not happen within 4 s")


def client(address, key="none"):
    """Return the official client of a server."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=httpx.Client(timeout=60))


@contextmanager
def serve(
    model=None, waiting=64, memory=10**9, timeout=60.0, numerics="float32", engine="fast", guesses=None, **options
):
    """Yield the address of a server in a thread of this process, and its service."""
    model = qwen3np.load() if model is None else model
    scheduler = Scheduler(model, waiting=waiting, memory=memory, numerics=numerics, engine=engine, guesses=guesses)
    service = Service(model, "tiny", scheduler, timeout)
    config = uvicorn.Config(application(service, **options), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()


def drawn_completion(rng, tokenizer):
    """Return a prompt of up to 200 ids, as text, with settings for /v1/completions and the same for Model.generate."""
    words = [*"The capital of France is seven plus five the day after Monday 7".split(), "雪"]  # noqa: SIM905
    prompt = tokenizer.encode(" ".join(rng.choice(words, 200)))[: rng.integers(1, 200)]
    prompt = tokenizer.decode(prompt)
    options = {"temperature": float(rng.choice([0, 0.7, 1.3])), "seed": int(rng.integers(1000)), "top_p": 0.9}
    options |= {"presence_penalty": 0.5, "top_k": int(rng.integers(1, 50))}
    return prompt, {"max_tokens": int(rng.integers(1, 12)), "n": int(rng.integers(1, 4))}, options


def drawn_schema(rng, depth=0):
    """Return a schema of the kinds that JSON-Schema-Test-Suite tests and llguidance supports."""
    kinds = ["integer", "multiple", "number", "string", "pattern", "format", "boolean", "null", "enum", "const"]
    kinds += [] if depth > 1 else ["array", "tuple", "object", "map", "anyOf", "allOf", "$ref"]
    kind, inner = rng.choice(kinds), depth + 1
    low, high = int(rng.integers(-20, 1)), int(rng.integers(1, 100))
    if kind == "$ref":
        return {"$defs": {"one": drawn_schema(rng, 2)}, "$ref": "#/$defs/one"} if depth == 0 else {"type": "null"}
    if kind == "map":
        return {"type": "object", "additionalProperties": drawn_schema(rng, 2), "maxProperties": 2}
    if kind == "object":
        names = [f"p{n}" for n in range(rng.integers(0, 4))]
        parts = {name: drawn_schema(rng, inner) for name in names}
        return {"type": "object", "properties": parts, "required": names[::2], "additionalProperties": False}
    return {
        "integer": lambda: {"type": "integer", "minimum": low, "exclusiveMaximum": high},
        "multiple": lambda: {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": high},
        "number": lambda: {"type": "number", "minimum": low, "maximum": high},
        "string": lambda: {"type": "string", "minLength": -low % 3, "maxLength": 3 + high % 5},
        "pattern": lambda: {"type": "string", "pattern": "^(ab|c[0-9]){1,3}$"},
        "format": lambda: {"type": "string", "format": str(rng.choice(["date", "time", "ipv4", "uuid"]))},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": "null"},
        "enum": lambda: {"enum": ["a", 1, None, "x y", [2]][: 1 + high % 5]},
        "const": lambda: {"const": {"a": [low, "é"]}},
        "array": lambda: {"type": "array", "items": drawn_schema(rng, inner), "minItems": 1, "maxItems": 2},
        "tuple": lambda: {"type": "array", "prefixItems": [drawn_schema(rng, inner), True], "items": False},
        "anyOf": lambda: {"anyOf": [drawn_schema(rng, inner), {"type": "null"}]},
        "allOf": lambda: {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]},
    }[str(kind)]()


ODD = [None, True, False, -1, 0, 1, 2.5, 1e300, 2**70, "", "x", "\0<|im_end|>", [], [1], ["x"], {}, {"type": "regex"}]
ODD += [{"type": "json_schema", "json_schema": {"schema": {"x-guidance": 5}}}, [{"role": "user"}], {"self": 1}]
ODD += [[{"role": ["user"], "content": "x"}], [{"role": "user", "content": [{"text": 5}]}], {"1": 3}, [[1, 2]]]
NAMES = {
    "/v1/completions": (fields.COMPLETION, {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (fields.CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    "/v1/embeddings": (fields.EMBEDDINGS, {"input": "x"}),
    "/v1/rerank": (fields.RERANK, {"query": "x", "documents": ["x"]}),
    "/tokenize": (fields.TOKENIZE, {}),
    "/detokenize": (fields.DETOKENIZE, {}),
}


def drawn_request(rng):
    """Return the path and the body of a request with odd values; some are not even JSON, many ask for a stream."""
    path = str(rng.choice(list(NAMES)))
    known, body = NAMES[path][0], dict(NAMES[path][1])
    if "stream" in known and rng.random() < 0.5:
        body["stream"] = True
    for name in rng.choice([*known, "unknown", "max_tokn"], rng.integers(0, 4)):
        body[str(name)] = ODD[rng.integers(len(ODD))]
    written = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        written[rng.integers(len(written))] = rng.integers(256)
    return path, bytes(written)


def check_reply(found):
    """Assert that a reply is neither an error of the server nor a stream with one or without its end."""
    assert found.status_code in (200, 400, 404, 429), found.text
    if found.headers["content-type"].startswith("text/event-stream"):
        *events, end = found.text.strip().split("\n\n")
        assert end == "data: [DONE]"
        assert all("server_error" not in json.loads(event.removeprefix("data: ")).get("error", {}) for event in events)
