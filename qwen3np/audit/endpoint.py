"""Asks an OpenAI-compatible server for log-probabilities. It is treated as untrusted: sizes and times are bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from qwen3np.audit.rollouts import Fields, Rollout, read_rollouts
from qwen3np.errors import one_line
from qwen3np.files.limits import parse_json
from qwen3np.tokenizer import Tokenizer

TIMEOUT = 120.0  # seconds for one request
LARGEST = 1 << 24  # bytes of one answer
NEW, TOP = 32, 5  # tokens of an answer, and likeliest ones at each; OpenAI allows 5
REFUSED = (400, 404, 405, 422, 501)  # of a field or a path that the server does not have: something else is tried
PROMPTS = (
    "The capital of France is",
    "Monday, Tuesday, Wednesday,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time there was a miller who had",
    "12 + 7 = 19\n23 + 8 = 31\n41 + 9 =",
    "Dear Sir or Madam,\n\nI am writing to you about",
    "Wasser ist bei Raumtemperatur",
    "La Révolution française commença en",
    '{"name": "Ada", "born": 1815, "languages": [',
    "SELECT name, count(*) FROM orders WHERE",
    "床前明月光，",
    "Q: Which planet is the largest?\nA:",
    "It was the best of times, it was the worst of",
    "1. Preheat the oven to 180 °C.\n2.",
    "In 1969, the first human being",
    "x² + y² = r² describes",
)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        raise ValueError(f"it redirects to {newurl[:200]}, which is not followed; name that address if you trust it")


def ask(
    url: str,
    served: str | None,
    tokenizer: Tokenizer,
    vocabulary: int,
    *,
    key: str | None = None,
    prompts: int = len(PROMPTS),
    context: int = 1 << 20,
    say: Callable[[str], object] = lambda text: None,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Rollout]:
    """Return what a server answers to the first of PROMPTS, with its log-probabilities.

    Completions are asked for with the prompts' own log-probabilities, as OpenAI or as vLLM names them; without if the
    server refuses both; or else chat completions. say is called before anything is sent. Raises ValueError, in one
    line, for any other answer.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url {one_line(url)[:200]}: must be http://HOST:PORT/v1 or https://...")
    base, key = url.rstrip("/"), (key or "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("the API key has a character that a header cannot have")
    say(f"{base}: at most {prompts + 4} requests of {NEW} new tokens; nothing but {prompts} built-in prompts is sent")
    served = served or _only_model(base, key)
    way, found = 0, list[Rollout]()
    for n, text in enumerate(PROMPTS[:prompts]):
        ids = tokenizer.encode(text)[: max(context - NEW, 1)]
        while True:
            path, body = _ways(served, ids, text, n)[way]
            status, data = _asked(base + path, body, key)
            if status == 200 or found or path != "/completions" or status not in REFUSED:
                break
            way += 1
        where = f"{base}{path}, prompt {n + 1}"
        if status != 200:
            raise ValueError(f"{where}: status {status}: {_reason(data)}")
        prompt = {"prompt_ids": ids} if "prompt" in body else {"messages": body["messages"]}
        found += _read(data, prompt, where, tokenizer, vocabulary)
        progress(1)
    return found


def _only_model(base: str, key: str | None) -> str:
    """Return the name of the one model that a server has. Raises ValueError if there is another number."""
    status, data = _asked(f"{base}/models", None, key)
    try:
        names = [str(one["id"]) for one in parse_json(data.decode())["data"]] if status == 200 else []
    except (ValueError, TypeError, KeyError, RecursionError):
        names = []
    if len(names) != 1:
        known = one_line(", ".join(names))[:300] or f"status {status}"
        raise ValueError(f"{base}/models: which of its models? --served-name NAME names it ({known})")
    return names[0]


def _ways(served: str, ids: list[int], text: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the requests that may be understood, in the order in which they are tried."""
    common = {"model": served, "max_tokens": NEW, "temperature": 1.0, "seed": seed}
    completion = {**common, "prompt": ids, "logprobs": TOP}
    chat = {**common, "messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": TOP}
    more: list[dict[str, Any]] = [
        {"echo": True},
        {"prompt_logprobs": TOP},
        {},
    ]  # for the prompt's own: OpenAI's, vLLM's
    return [*(("/completions", completion | one) for one in more), ("/chat/completions", chat)]


def _read(data: bytes, prompt: dict[str, Any], where: str, tokenizer: Tokenizer, vocabulary: int) -> list[Rollout]:
    try:
        value = parse_json(data.decode())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        value = {name: value[name] for name in ("choices", "completion_probabilities") if name in value}
        rows = [value | prompt]
        for choice in value.get("choices") or []:
            ids = prompt.get("prompt_ids", [])
            if len(ids) > 1 and (of_prompt := choice.get("prompt_logprobs")):
                rows.append({"prompt_ids": ids[:1], "ids": ids[1:], "logprobs": of_prompt[1:]})
        return read_rollouts(rows, tokenizer, vocabulary, Fields(), echoed=True)
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(one_line(f"{where}: {error}")[:500]) from None


def _reason(data: bytes) -> str:
    """Return what a server says about an error, in a few words."""
    text = data[:2000].decode(errors="replace")
    try:
        error = json.loads(data)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return one_line(text.strip() or "no reason given")[:300]


def _asked(url: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, bytes]:
    """Return status and body of an answer. Raises ValueError for none, a redirect, or one that is too large or slow."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    result: list[tuple[int, bytes] | Exception] = []

    def send() -> None:
        try:
            request = Request(url, None if body is None else json.dumps(body).encode(), headers)
            with build_opener(_NoRedirects).open(request, timeout=TIMEOUT) as response:
                result.append((response.status, _bounded(response)))
        except HTTPError as error:
            with error:
                try:
                    body_of_error = error.read(LARGEST)
                except (OSError, HTTPException):  # it ends before it should
                    body_of_error = b""
                result.append((error.code, body_of_error))
        except (OSError, HTTPException, ValueError) as error:
            result.append(error)

    thread = Thread(target=send, daemon=True)  # so that an answer that comes byte by byte ends, too
    thread.start()
    thread.join(TIMEOUT)
    if not result:
        raise ValueError(f"{url}: no whole answer within {TIMEOUT:.0f} s")
    if isinstance(result[0], Exception):
        raise ValueError(one_line(f"{url}: {getattr(result[0], 'reason', None) or result[0]}")[:500]) from None
    return result[0]


def _bounded(response: HTTPResponse) -> bytes:
    """Return the body. Raises ValueError for one that is too large or does not end in time."""
    found, ends = bytearray(), time.monotonic() + TIMEOUT
    while piece := response.read1(1 << 16):
        found += piece
        if len(found) > LARGEST:
            raise ValueError(f"the answer has more than {LARGEST >> 20} MiB")
        if time.monotonic() > ends:
            raise ValueError(f"the answer did not end within {TIMEOUT:.0f} s")
    return bytes(found)
