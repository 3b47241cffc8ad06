"""The door: routes, who may come in, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from qwen3np.embeddings import embed, rerank
from qwen3np.errors import one_line
from qwen3np.rules import Rule
from qwen3np.serve import fields as f
from qwen3np.serve.chats import chat, prompt_text
from qwen3np.serve.completions import complete
from qwen3np.serve.fields import BadRequest, parsed
from qwen3np.serve.page import describe, page
from qwen3np.serve.scheduler import Busy
from qwen3np.serve.service import Gone, Service, failure, reply, unless_gone

_OPEN = ("/health", "/")  # need no key
_PATIENCE = 60  # seconds in which a body must arrive


def application(service: Service, *, key: str | None = None, hosts: Collection[str] = ()) -> Starlette:
    """Return the ASGI application. `key`: requests must bear it; `hosts`: names that the Host header may have."""
    door = _Door(service, key, hosts)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(service.scheduler.close)

    posts: dict[str, tuple[Any, Mapping[str, Rule]]] = {
        "/v1/completions": (complete, f.COMPLETION),
        "/v1/chat/completions": (chat, f.CHAT),
        "/v1/embeddings": (_embeddings, f.EMBEDDINGS),
        "/v1/rerank": (_rerank, f.RERANK),
        "/tokenize": (_tokenize, f.TOKENIZE),
        "/detokenize": (_detokenize, f.DETOKENIZE),
    }
    gets: dict[str, Any] = {"/": page, "/v1/models": _models, "/v1/models/{name:path}": _models, "/health": _health}
    routes = [
        Route(path, partial(door.post, answer, rules), methods=["POST"]) for path, (answer, rules) in posts.items()
    ]
    routes += [Route(path, partial(door.get, answer), methods=["GET"]) for path, answer in gets.items()]
    routes.append(Route("/metrics", partial(door.get, partial(_metrics, door.served)), methods=["GET"]))
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return app


class _Door:
    """Checks who asks, reads bodies, and turns errors into replies and lines of the log."""

    def __init__(self, service: Service, key: str | None, hosts: Collection[str]) -> None:
        self.service, self.key, self.hosts = service, key, {"localhost", *(host.lower() for host in hosts)}
        self.served: Counter[tuple[str, int]] = Counter()

    async def get(self, answer: Any, request: Request) -> Response:
        return await self._answered(request, lambda: answer(self.service, request))

    async def post(self, answer: Any, rules: Mapping[str, Rule], request: Request) -> Response:
        async def read_and_answered() -> Response:
            # other content types can be sent by any web page, without asking this server first
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise BadRequest("the Content-Type must be application/json", 415)
            try:
                body = await asyncio.wait_for(_body(request), _PATIENCE)
            except asyncio.TimeoutError:
                raise BadRequest(f"the body took more than {_PATIENCE} s", 408) from None
            found, unknown = parsed(body, rules)
            if unknown:
                print(one_line(f"[ignored: {', '.join(unknown)[:200]}]"), file=sys.stderr, flush=True)
            if found.get("model") not in (None, self.service.name):
                raise BadRequest(f"model: this server has {self.service.name!r} only", 404, "model")
            return await answer(self.service, request, found)

        return await self._answered(request, read_and_answered)

    async def _answered(self, request: Request, answer: Any) -> Response:
        began, headers = time.monotonic(), dict[str, str]()
        try:
            self._admit(request)
            response: Response = await answer()
        except (Gone, ClientDisconnect):
            response = Response(status_code=499)
        except Exception as error:
            body, status = failure(error)
            if status == 500:
                print(one_line(traceback.format_exc().replace("\n", " | ")), file=sys.stderr, flush=True)
            if isinstance(error, Busy):
                headers["Retry-After"] = "1"
            if status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            response = reply(body, status, headers)
        path = request.scope["route"].path
        self.served[path, response.status_code] += 1
        line = f"{request.method} {path} {response.status_code} {time.monotonic() - began:.3f} s"
        print(line, file=sys.stderr, flush=True)
        return response

    def _admit(self, request: Request) -> None:
        """Raise BadRequest for a Host that is another name, as DNS rebinding has it, and without the key."""
        host = request.headers.get("host", "").lower()
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name not in self.hosts and not _is_address(name):
            raise BadRequest("the Host header is not this server's; --allow-host NAME allows it", 403)
        given = request.headers.get("authorization", "").encode()
        wanted = None if self.key is None or request.url.path in _OPEN else b"Bearer " + self.key.encode()
        if wanted is not None and not hmac.compare_digest(given, wanted):
            raise BadRequest("the API key is missing or wrong", 401)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _body(request: Request) -> bytes:
    """The body, up to the limit. Raises BadRequest."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > f.BODY:
            raise BadRequest(f"the body has more than {f.BODY:,} bytes", 413)
    return bytes(body)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing at this address", 405: "this address does not take this method"}
    return reply(failure(BadRequest(words.get(error.status_code, error.detail)))[0], error.status_code)


async def _models(service: Service, request: Request) -> Response:
    model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "qwen3np"}
    model |= {"max_model_len": service.model.config.max_position_embeddings, **describe(service)}
    if "name" not in request.path_params:
        return reply({"object": "list", "data": [model]})
    if request.path_params["name"] != service.name:
        raise BadRequest(f"this server has {service.name!r} only", 404, "model")
    return reply(model)


async def _health(service: Service, request: Request) -> Response:
    return reply({"status": "ok"})


async def _metrics(served: Counter[tuple[str, int]], service: Service, request: Request) -> Response:
    lines: list[str] = []
    for name, count in sorted(service.scheduler.counts.items()):
        lines += [f"# TYPE qwen3np_{name}_total counter", f"qwen3np_{name}_total {count}"]
    for name, value in service.scheduler.load.items():
        lines += [f"# TYPE qwen3np_{name} gauge", f"qwen3np_{name} {value}"]
    lines.append("# TYPE qwen3np_http_requests_total counter")
    lines += [f'qwen3np_http_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(served.items())]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _embeddings(service: Service, request: Request, fields: Mapping[str, Any]) -> Response:
    texts = [fields["input"]] if isinstance(fields["input"], str) else fields["input"]
    options, of = service.scheduler.options, (fields["instruction"], fields["dimensions"])
    vectors = await unless_gone(
        request, service.computed([partial(embed, service.model, [t], *of, **options) for t in texts])
    )
    data: list[Any] = []
    for n, (vector,) in enumerate(vectors):
        packed = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        value = vector.tolist() if fields["encoding_format"] == "float" else packed
        data.append({"object": "embedding", "index": n, "embedding": value})
    count = await asyncio.to_thread(lambda: sum(map(len, service.tokenizer.encode(texts))))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return reply({"object": "list", "data": data, "model": service.name, "usage": usage})


async def _rerank(service: Service, request: Request, fields: Mapping[str, Any]) -> Response:
    query, documents, options = fields["query"], fields["documents"], service.scheduler.options
    calls = [partial(rerank, service.model, query, [one], fields["instruction"], **options) for one in documents]
    scores = np.concatenate(await unless_gone(request, service.computed(calls)))
    results: list[Any] = []
    for n in np.argsort(-scores, kind="stable")[: fields["top_n"]].tolist():
        result = {"index": n, "relevance_score": float(scores[n])}
        results.append({**result, "document": {"text": documents[n]}} if fields["return_documents"] else result)
    return reply({"model": service.name, "results": results})


async def _tokenize(service: Service, request: Request, fields: Mapping[str, Any]) -> Response:
    tokenizer = service.tokenizer
    if (fields["prompt"] is None) == (fields["messages"] is None):
        raise BadRequest("give prompt or messages")

    def tokenized() -> list[int]:
        if fields["messages"] is None:
            return tokenizer.encode(fields["prompt"])
        return tokenizer.encode_escaped(prompt_text(tokenizer, fields))

    ids = await asyncio.to_thread(tokenized)
    body: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.model.config.max_position_embeddings,
    }
    if fields["return_token_strs"]:
        body["token_strs"] = [tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
    return reply(body)


async def _detokenize(service: Service, request: Request, fields: Mapping[str, Any]) -> Response:
    return reply({"prompt": await asyncio.to_thread(service.tokenizer.decode, fields["tokens"])})
