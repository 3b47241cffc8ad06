"""The door: routes, who may come in, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen3np.errors import one_line
from qwen3np.rules import Rule
from qwen3np.serve import fields as f
from qwen3np.serve.chats import chat, prompt_text
from qwen3np.serve.completions import complete
from qwen3np.serve.fields import BadRequest, decoded
from qwen3np.serve.page import describe, page
from qwen3np.serve.scheduler import Busy
from qwen3np.serve.service import Service, Stream, failure
from qwen3np.serve.vectors import embeddings, ranking

T = TypeVar("T")

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
        "/v1/embeddings": (embeddings, f.EMBEDDINGS),
        "/v1/rerank": (ranking, f.RERANK),
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
            fields, unknown = self.service.fields(decoded(body), rules)
            if unknown:
                print(one_line(f"[ignored: {', '.join(unknown)[:200]}]"), file=sys.stderr, flush=True)
            found = await _unless_gone(request, answer(self.service, fields))
            return _Events(found) if isinstance(found, Stream) else _reply(found)

        return await self._answered(request, read_and_answered)

    async def _answered(self, request: Request, answer: Any) -> Response:
        began, headers = time.monotonic(), dict[str, str]()
        try:
            self._admit(request)
            response: Response = await answer()
        except (_Gone, ClientDisconnect):
            response = Response(status_code=499)
        except Exception as error:
            body, status = failure(error)
            if isinstance(error, Busy):
                headers["Retry-After"] = "1"
            if status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            response = _reply(body, status, headers)
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


class _Gone(Exception):
    """The client closed the connection."""


def _reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response, in ASCII."""
    return Response(json.dumps(content), status, headers, "application/json")


class _Events(StreamingResponse):
    """Server-sent events. When the client is gone, its jobs are cancelled."""

    def __init__(self, stream: Stream) -> None:
        """Send each chunk as it comes, then [DONE]; an error is the last chunk."""
        self._answers = stream.answers

        async def lines() -> AsyncIterator[str]:
            try:
                async for chunk in stream.chunks:
                    yield f"data: {json.dumps(chunk)}\n\n"
            except Exception as error:
                yield f"data: {json.dumps(failure(error)[0])}\n\n"
            yield "data: [DONE]\n\n"

        super().__init__(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _unless_gone(request: Request, result: Awaitable[T]) -> T:
    """Await a result; if the client closes its connection before, cancel it and raise _Gone."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(result), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _Gone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


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
    return _reply(failure(BadRequest(words.get(error.status_code, error.detail)))[0], error.status_code)


async def _models(service: Service, request: Request) -> Response:
    model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "qwen3np"}
    model |= {"max_model_len": service.model.config.max_position_embeddings, **describe(service)}
    if "name" not in request.path_params:
        return _reply({"object": "list", "data": [model]})
    if request.path_params["name"] != service.name:
        raise BadRequest(f"this server has {service.name!r} only", 404, "model")
    return _reply(model)


async def _health(service: Service, request: Request) -> Response:
    return _reply({"status": "ok"})


async def _metrics(served: Counter[tuple[str, int]], service: Service, request: Request) -> Response:
    lines: list[str] = []
    for name, count in sorted(service.scheduler.counts.items()):
        lines += [f"# TYPE qwen3np_{name}_total counter", f"qwen3np_{name}_total {count}"]
    for name, value in service.scheduler.load.items():
        lines += [f"# TYPE qwen3np_{name} gauge", f"qwen3np_{name} {value}"]
    lines.append("# TYPE qwen3np_http_requests_total counter")
    lines += [f'qwen3np_http_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(served.items())]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _tokenize(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
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
    return body


async def _detokenize(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, fields["tokens"])}
