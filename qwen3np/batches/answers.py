"""Requests -> answers in this process, by the code of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import qwen3np
from qwen3np.batches.requests import GENERATING, Request
from qwen3np.embeddings import encoded, rerank, vectors
from qwen3np.errors import CheckpointError
from qwen3np.loading import load
from qwen3np.memory import available_memory
from qwen3np.model import Model
from qwen3np.porting import record
from qwen3np.porting.record import fingerprint
from qwen3np.rules import REQUIRED, Rule, whole
from qwen3np.scoring import score
from qwen3np.serve import fields as f
from qwen3np.serve.chats import chat
from qwen3np.serve.completions import complete
from qwen3np.serve.fields import BadRequest
from qwen3np.serve.scheduler import Scheduler
from qwen3np.serve.service import Service, failure
from qwen3np.serve.vectors import embeddings_body, ranking_body, texts
from qwen3np.weights import count_parameters

_PROMPT = Rule(lambda x: isinstance(x, (str, list)) and len(x) > 0, "a text or a list of ids", REQUIRED)
_SIZE = Rule(whole(1).holds, whole(1).supported, None)
SCORE = {"input": _PROMPT, "model": f.COMPLETION["model"], "window": _SIZE, "stride": _SIZE}
TRACE = {
    "prompt": _PROMPT,
    "model": f.COMPLETION["model"],
    "steps": Rule(whole(0).holds, whole(0).supported, 0),
    "points": Rule(lambda x: isinstance(x, str), "patterns, separated by commas", "*"),
}

REQUEST = "batch_req_"  # before the ids of results
BEGINNING = f'{{"id": "{REQUEST}'.encode()

Outcome = tuple[Request, "dict[str, Any] | Exception"]


@dataclass(frozen=True)
class Recipe:
    """How each process gets its answers: which model it loads, and how it computes."""

    model: str | None  # as in load
    name: str  # what requests call it
    numerics: str = "float32"
    engine: str = "fast"
    options: tuple[tuple[str, Any], ...] = ()  # of load
    rope_scaling: float | None = None

    def answers(self, share: float = 1.0) -> Answers:
        """Load the model. `share`: how much of this machine the process may use."""
        options: dict[str, Any] = {"progress": share == 1, **dict(self.options)}
        if share < 1 and options.get("weights_dtype", "auto") == "auto":  # its own copy only if all may have one
            options["weights_dtype"] = "mapped"
            size = 4 * count_parameters(load(self.model, **options).config)["unique"]
            options["weights_dtype"] = "float32" if size < available_memory() / 2 * share else "mapped"
        model = load(self.model, **options)
        if self.rope_scaling is not None:
            model = replace(model, config=model.config.extended(self.rope_scaling))
        return Answers(model, self.name, self.numerics, self.engine, share)


class Answers:
    """A loaded model that answers packets of requests."""

    def __init__(
        self, model: Model, name: str, numerics: str = "float32", engine: str = "fast", share: float = 1.0
    ) -> None:
        """`share`: how much of the free memory the caches may take, half of it being all."""
        memory = int((available_memory() or 2 * 10**9) / 2 * share)
        scheduler = Scheduler(model, waiting=sys.maxsize, memory=memory, numerics=numerics, engine=engine)
        self.service, self.options = Service(model, name, scheduler, inf), scheduler.options
        self.fingerprint = _fingerprint(model, numerics, engine)
        self._kinds: dict[str, tuple[Mapping[str, Rule], Callable[[list[Request], list[Any]], Iterator[Outcome]]]] = {
            "/v1/completions": (f.COMPLETION, partial(self._generated, complete)),
            "/v1/chat/completions": (f.CHAT, partial(self._generated, chat)),
            "/v1/embeddings": (f.EMBEDDINGS, self._embedded),
            "/v1/rerank": (f.RERANK, partial(self._alone, self._ranked)),
            "/score": (SCORE, partial(self._alone, self._scored)),
            "/trace": (TRACE, partial(self._alone, self._traced)),
        }

    def close(self) -> None:
        """End the thread that computes, and free its caches."""
        self.service.scheduler.close()

    def __call__(self, packet: Sequence[Request]) -> Iterator[tuple[Request, bytes]]:
        """Yield the line of each request's result as it comes. Raises CheckpointError, which no request causes."""
        url, good, found = packet[0].url, list[Request](), list[dict[str, Any]]()
        if not url:
            yield from ((request, wrong_line(request)) for request in packet)
            return
        rules, answer = self._kinds[url]
        for request in packet:
            try:
                fields, _ = self.service.fields(request.body, rules)
                if fields.get("stream"):
                    raise BadRequest("answers of a batch do not stream", parameter="stream")
                if "seed" in fields and fields["seed"] is None:
                    fields["seed"] = int(tag(request.key)[:16], 16)
                found.append(fields)
                good.append(request)
            except BadRequest as error:
                yield request, self._line(request, error)
        for request, outcome in answer(good, found) if good else ():
            yield request, self._line(request, outcome)

    def _generated(self, answer: Any, requests: list[Request], found: list[Any]) -> Iterator[Outcome]:
        """In a thread of its own, since the caller's may have an event loop already, as a notebook's has."""
        loop, outcomes = asyncio.new_event_loop(), SimpleQueue[Outcome]()

        async def one(request: Request, fields: Any) -> None:
            try:
                outcome = await answer(self.service, fields)
            except Exception as error:
                outcome = error
            outcomes.put((request, outcome))

        async def every() -> None:
            await asyncio.gather(*map(one, requests, found))

        work = loop.create_task(every())

        def run() -> None:
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(work)
            loop.run_until_complete(loop.shutdown_default_executor())

        thread = threading.Thread(target=run, name="batch", daemon=True)
        thread.start()
        try:
            for _ in requests:
                yield outcomes.get()
        finally:
            loop.call_soon_threadsafe(work.cancel)
            thread.join()
            loop.close()

    def _embedded(self, requests: list[Request], found: list[Any]) -> Iterator[Outcome]:
        """All texts with the same instruction and dimensions together; each request alone where that fails."""
        model, alike = self.service.model, dict[Any, list[int]]()
        for n, fields in enumerate(found):
            alike.setdefault((fields["instruction"], fields["dimensions"]), []).append(n)
        for (instruction, dimensions), members in alike.items():
            try:
                every = [text for n in members for text in texts(found[n])]
                sequences, skipped = encoded(model, every, instruction)
                rows = iter(zip(sequences, vectors(model, sequences, skipped, dimensions, **self.options), strict=True))
            except ValueError as error:
                if len(members) == 1:
                    yield requests[members[0]], error
                for n in members if len(members) > 1 else ():
                    yield from self._embedded([requests[n]], [found[n]])
                continue
            for n in members:
                mine = list(islice(rows, len(texts(found[n]))))
                yield requests[n], embeddings_body(self.service, found[n], mine)

    @staticmethod
    def _alone(answer: Callable[[Any], dict[str, Any]], requests: list[Request], found: list[Any]) -> Iterator[Outcome]:
        for request, fields in zip(requests, found, strict=True):
            try:
                yield request, answer(fields)
            except Exception as error:
                yield request, error

    def _ranked(self, fields: dict[str, Any]) -> dict[str, Any]:
        model, of = self.service.model, (fields["query"], fields["documents"], fields["instruction"])
        return ranking_body(self.service, fields, rerank(model, *of, **self.options))

    def _scored(self, fields: dict[str, Any]) -> dict[str, Any]:
        model, ids = self.service.model, self._ids(fields["input"])
        of = {"window": fields["window"], "stride": fields["stride"]}
        logprobs = score(model.weights, model.config, ids, **of, **self.options)
        body = {"object": "score", "model": self.service.name, "ids": ids, "logprobs": [None, *logprobs.tolist()]}
        return {**body, "log_likelihood": float(logprobs.sum())}

    def _traced(self, fields: dict[str, Any]) -> dict[str, Any]:
        model, of = self.service.model, {"steps": fields["steps"], "points": fields["points"]}
        recording = record(model.weights, model.config, self._ids(fields["prompt"]), **of, **self.options)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "trace.safetensors"
            recording.save(file)
            data = base64.b64encode(file.read_bytes()).decode()
        return {"object": "trace", "model": self.service.name, "ids": recording.ids[0].tolist(), "safetensors": data}

    def _ids(self, given: str | list[int]) -> list[int]:
        return self.service.tokenizer.encode(given) if isinstance(given, str) else given

    def _line(self, request: Request, outcome: dict[str, Any] | Exception) -> bytes:
        """Return a line of results, without what differs between runs: new ids, times, and reused prefixes."""
        name, status = tag(request.key), 200
        body: dict[str, Any]
        if isinstance(outcome, CheckpointError):
            raise outcome
        if isinstance(outcome, Exception):
            body, status = failure(outcome)
        else:
            body = {**outcome, "system_fingerprint": self.fingerprint}
            if request.url in GENERATING:
                body |= {"id": f"{body['id'].partition('-')[0]}-{name}", "created": 0}
                del body["usage"]["prompt_tokens_details"]
            for choice in body.get("choices", ()):
                for n, call in enumerate(choice.get("message", {}).get("tool_calls", ())):
                    call["id"] = f"call_{name}_{choice['index']}_{n}"
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        return _json({"id": f"{REQUEST}{name}", "custom_id": request.key, "response": response, "error": None})


def wrong_line(request: Request, code: str = "invalid_line") -> bytes:
    """The line of results of a line that is no request."""
    name, custom_id = tag(request.key), request.key if isinstance(request.key, str) else None
    error = {"code": code, "message": request.error, "param": None, "line": request.line}
    return _json({"id": f"{REQUEST}{name}", "custom_id": custom_id, "response": None, "error": error})


def key_of(result: Mapping[str, Any]) -> str | int:
    """The key of the request that a line of results belongs to. Raises KeyError and TypeError for other lines."""
    if result["response"] is None and result["custom_id"] is None:
        return result["error"]["line"]
    return result["custom_id"]


def is_failure(line: bytes) -> bool:
    """Whether a line of results is that of a request without an answer."""
    return b'"response": {"status_code": 200,' not in line[:8192]  # before it: a custom_id of up to 512 characters


def tag(key: str | int) -> str:
    """The ids of everything about a request, from its key."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:24]


def _json(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _fingerprint(model: Model, numerics: str, engine: str) -> str:
    """What answers depend on besides the request; for the exact engine that does not include the machine."""
    from threadpoolctl import threadpool_info

    seen: list[Any] = [qwen3np.__version__, numerics, engine, model.config.to_dict(), dict(model.generation_config)]
    seen += [fingerprint(model.weights), repr(model.pooling), hashlib.sha256()]
    for name, data in sorted(model.text.files().items()):
        seen[-1].update(name.encode() + data)
    seen[-1] = seen[-1].hexdigest()
    parts = [_digest(seen)]
    if engine != "exact":
        blas = [(one["internal_api"], one.get("version"), one.get("architecture")) for one in threadpool_info()]
        features: Any = np.show_config(mode="dicts")
        parts.append(_digest([np.__version__, sorted(map(str, blas)), features["SIMD Extensions"]]))
    return "-".join(["fp", *parts])


def _digest(seen: Any) -> str:
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:10]
