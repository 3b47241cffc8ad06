"""What all endpoints share: the model with its scheduler, requests as jobs, and the shape of replies."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from qwen3np.errors import CheckpointError, NonFiniteError, one_line
from qwen3np.grammar import Grammars, Processor
from qwen3np.model import Model
from qwen3np.rules import Rule
from qwen3np.serve.answers import Answers
from qwen3np.serve.fields import SETTINGS, BadRequest, checked
from qwen3np.serve.scheduler import Busy, Job, Prompt, Scheduler, Token
from qwen3np.tokenizer import said_in


class Stream(NamedTuple):
    """An answer in chunks, as its tokens come."""

    answers: Answers
    chunks: AsyncIterator[dict[str, Any]]


class Saying(Protocol):
    """One answer, as an endpoint writes it: the parts of its choice that each event adds."""

    def start(self) -> Sequence[dict[str, Any]]:
        """Return the choices of a stream's first chunks."""
        ...

    def add(self, event: Prompt | Token) -> Sequence[dict[str, Any]]:
        """Return the choices of the chunks that say what this event makes certain."""
        ...

    def whole(self) -> dict[str, Any]:
        """Return the choice of the whole answer, after its last event."""
        ...


class Service:
    """A model under a name, its scheduler, and the limits of its requests."""

    def __init__(self, model: Model, name: str, scheduler: Scheduler, timeout: float) -> None:
        """`timeout`: seconds after which a request ends, waiting included."""
        self.model, self.name, self.scheduler, self.timeout = model, name, scheduler, timeout
        self.tokenizer, self.started = model.text, int(time.time())
        self.ends = frozenset(model.generation_defaults().get("stop_ids") or ())
        self.grammars = Grammars(model.text, model.config.vocab_size, self.ends | model.text.turn_ends)

    def fields(self, given: Any, rules: Mapping[str, Rule]) -> tuple[dict[str, Any], list[str]]:
        """Return what `checked` returns for a request to this model. Raises BadRequest."""
        found, unknown = checked(given, rules)
        if found.get("model") not in (None, self.name):
            raise BadRequest(f"model: this server has {self.name!r} only", 404, "model")
        return found, unknown

    def settings(
        self, fields: Mapping[str, Any], most: int | None, ends: Collection[int] = (), grammar: Processor | None = None
    ) -> dict[str, Any]:
        """Return the generation settings of one answer: what the request says, over the checkpoint's defaults."""
        given = {ours: fields[theirs] for theirs, ours in SETTINGS.items() if fields[theirs] is not None}
        if "sequence_bias" in given:
            given["sequence_bias"] = [[[int(i)], bias] for i, bias in given["sequence_bias"].items()]
        if "seed" in given:
            given["seed"] %= 2**64
        if most:
            given["max_new_tokens"] = most
        settings: dict[str, Any] = dict(self.model.generation_settings(given))
        settings["stop_ids"] = {*self.ends, *ends, *(fields["stop_token_ids"] or ())}
        if stops := strings(fields["stop"]):
            settings["stop"] = said_in(self.tokenizer, stops)
        if grammar is not None:
            settings["logits_processors"] = [grammar]
            settings["stop_ids"] |= self.tokenizer.turn_ends  # each of which a grammar may end with
        return settings | ({"max_new_tokens": 0} if most == 0 else {})

    def grammar(self, wanted: Mapping[str, Any] | None, after: int | None = None) -> Processor | None:
        """Return the processor for a response_format: json_object, json_schema, regex or grammar; None for text."""
        form, kind = wanted or {}, (wanted or {"type": "text"}).get("type")
        schema = form.get("json_schema")
        if kind == "json_object":
            return self.grammars.json_schema({"type": "object"}, after)
        if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), (dict, bool)):
            return self.grammars.json_schema(schema["schema"], after)
        if kind == "regex" and isinstance(form.get("pattern"), str):
            return self.grammars.regex(form["pattern"], after)
        if kind == "grammar" and isinstance(form.get("grammar"), str):
            return self.grammars.lark(form["grammar"], after)
        if kind != "text":
            raise BadRequest(
                'response_format must have a type: text, json_object, json_schema ({"schema": ...}), regex ("pattern") '
                'or grammar ("grammar")',
                parameter="response_format",
            )
        return None

    def answers(self, requests: Sequence[dict[str, Any]], streamed: bool) -> Answers:
        """Queue a job for each of these arguments of Scheduler.job."""
        until = time.monotonic() + self.timeout
        return Answers(self.scheduler, [{**request, "until": until} for request in requests], streamed)

    async def computed(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run calls in the scheduler's thread, between the tokens of answers, and return their results."""
        loop, futures = asyncio.get_running_loop(), [asyncio.get_running_loop().create_future() for _ in calls]

        def task(future: asyncio.Future[Any], call: Any) -> Any:
            def settle(result: Any, error: Exception | None) -> None:
                if not future.done():
                    future.set_exception(error) if error else future.set_result(result)

            def run() -> None:
                result, raised = None, None
                try:
                    if not future.cancelled():
                        result = call()
                except Exception as error:
                    raised = error
                loop.call_soon_threadsafe(settle, result, raised)

            return run

        self.scheduler.call(*(task(future, call) for future, call in zip(futures, calls, strict=True)))
        try:
            return list(await asyncio.wait_for(asyncio.gather(*futures), self.timeout))
        except asyncio.TimeoutError:  # before Python 3.11 another class than TimeoutError
            raise TimeoutError("the time limit of this server was reached") from None


def strings(stop: str | list[str] | None) -> list[str]:
    """The stop strings of a request."""
    return [stop] if isinstance(stop, str) else stop or []


def usage(answers: Answers, choices: int) -> dict[str, Any]:
    """The tokens of a request; a prompt with several answers counts once."""
    prompts = answers.jobs[::choices]
    prompt, new = sum(len(job.ids) for job in prompts), sum(len(job.new) for job in answers.jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in prompts)},
    }


def failure(error: Exception) -> tuple[dict[str, Any], int]:
    """Return the body and the status of an error, in OpenAI's form; the log has what is no request's fault."""
    status, kind = 400, "invalid_request_error"
    if isinstance(error, BadRequest):
        status = error.status
    elif isinstance(error, Busy):
        status, kind = 429, "rate_limit_error"
        if "waiting" not in str(error):
            status, kind = 503, "service_unavailable"
    elif isinstance(error, TimeoutError):
        status, kind = 504, "timeout"
    elif not isinstance(error, ValueError) or isinstance(error, (CheckpointError, NonFiniteError)):
        status, kind = 500, "server_error"
    message = one_line(error)
    if status == 500:
        trace, message = "".join(traceback.format_exception(error)), "an internal error; the server's log has it"
        print(one_line(trace.replace("\n", " | ")), file=sys.stderr, flush=True)
    body = {"message": message, "type": kind, "param": getattr(error, "parameter", None), "code": None}
    return {"error": body}, status


async def answered(
    service: Service,
    fields: Mapping[str, Any],
    jobs: Sequence[dict[str, Any]],
    kinds: tuple[str, str, str],
    say: Callable[[int, Job], Saying],
) -> dict[str, Any] | Stream:
    """Queue jobs and return their answers, whole or as a stream.

    kinds: the `object` of the reply and of a chunk, and the start of the id. say: makes the Saying of each job.
    """
    answers = service.answers(jobs, fields["stream"])
    whole, piece, prefix = kinds
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    sayings = [say(index, job) for index, job in enumerate(answers.jobs)]
    if fields["stream"]:
        return Stream(answers, _chunks({**head, "object": piece}, fields, answers, sayings))

    async for index, event in answers.events():
        sayings[index].add(event)
    choices = [saying.whole() for saying in sayings]
    return {**head, "object": whole, "choices": choices, "usage": usage(answers, fields["n"])}


async def _chunks(
    head: Mapping[str, Any], fields: Mapping[str, Any], answers: Answers, sayings: Sequence[Saying]
) -> AsyncIterator[dict[str, Any]]:
    for choice in (choice for saying in sayings for choice in saying.start()):
        yield {**head, "choices": [choice]}
    async for index, event in answers.events():
        for choice in sayings[index].add(event):
            yield {**head, "choices": [choice]}
    if (fields["stream_options"] or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": usage(answers, fields["n"])}
