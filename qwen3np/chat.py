"""Messages -> text: a checkpoint's own Jinja chat template, rendered as transformers renders it.

A template is trusted no more than the checkpoint it came with. Templates that Qwen published, and the one of
checkpoints trained here, are recognised by hash and rendered in this process (0.1 ms). Any other runs in a separate
process with limits on time and memory (0.1 s): checks inside the interpreter are leaky, and none of them stops
`10**(10**10)` or `'a' * 10**12`; killing the process does.
"""

# This file is also the program of that process: at import it needs the standard library alone.
from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from jinja2.parser import Parser

_KNOWN = {  # sha256 of the template's text
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",  # Qwen3
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",  # Qwen3 Base, Embedding, Reranker
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326",  # Instruct-2507
    "40c21f34cf67d8c760ef72f8ad3ae5afad514299d4b06e91dd9a8d705af7b541",  # Instruct-2507, its first revision
    "3802169b2a02b81e6adb7ab4f64f91ff02db753c8c3a64a01c35192d3a61d8d7",  # Thinking-2507
    "a75e50070fd015aa156b623c6bc721bf408efccd8e896534f336ee92f0d0d8e1",  # qwen3np.training's
}
_SECONDS = 5  # of CPU time, if the system can limit it, so that a busy machine makes no difference
_PATIENCE = 60 if find_spec("resource") else _SECONDS  # of wall-clock time
_MEBIBYTES = 512
_CHARACTERS = 2**24  # of rendered text: a few times the longest context of the family

_MARK = "CONTINUE\ufdd1HERE "  # where to continue the final message; messages cannot contain the noncharacter
_PROBE = "A\ufdd1B"

_ROLES = ("system", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    /,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> str:
    """The text of a conversation: `template` rendered as transformers' `apply_chat_template` renders it.

    messages: dicts with "role" (system, user, assistant or tool; developer means system, unless the template knows it)
    and "content", a string or a list of text parts, {"type": "text", "text": ...}; an assistant's may be None, and may
    be missing next to its "reasoning_content" or "tool_calls". Templates that do not read lists get the parts as one
    text, a line each, as in vLLM and llama.cpp.
    tools: their JSON schemas. enable_thinking: None leaves the choice to the template. continue_final_message: end
    inside the last message, without a generation prompt. kwargs: more variables for the template. All of it is data
    that JSON can hold.

    Raises ValueError, naming the place, for other messages and for errors in the template; also for a template that
    takes more than 5 s or 512 MiB (the latter only if the system can limit a process's memory).
    """
    if not messages:
        raise ValueError("the conversation is empty: a chat template needs at least one message")
    if not all(isinstance(tool, Mapping) for tool in tools or ()):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("tools must be a list of JSON schemas (dicts)")
    checked = [_checked(message, f"messages[{i}]", template) for i, message in enumerate(messages)]
    variables = {
        "documents": None,
        **kwargs,
        "messages": _marked(checked) if continue_final_message else checked,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt and not continue_final_message,
    }
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    try:
        job = json.dumps({"template": template, "variables": variables, "path": [str(p) for p in sys.path]})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages, tools and template variables must be JSON data: {error}") from error
    if hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest() in _KNOWN:
        text = _render(template, json.loads(job)["variables"])
    else:
        text = _render_apart(job)
    return _cut(text, _text_of(checked[-1])) if continue_final_message else text


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, or the last part of a list."""
    content = message.get("content", "")
    return content if isinstance(content, str) else content[-1]["text"]


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark at the end of the last one's text."""
    last = dict(messages[-1])
    if isinstance(last.get("content"), list):
        last["content"] = [*last["content"][:-1], {**last["content"][-1], "text": _text_of(last) + _MARK}]
    else:
        last["content"] = _text_of(last) + _MARK
    return [*messages[:-1], last]


def _cut(text: str, final: str) -> str:
    """The rendered text up to the mark. If the template strips the space after it, strip before it as well."""
    before, mark, after = text.rpartition(_MARK.strip())
    if not mark or final.strip() not in text.replace(mark, ""):
        raise ValueError("continue_final_message: the chat template does not repeat the last message's content")
    return before if after.startswith(" ") else before.rstrip()


def _checked(message: Mapping[str, Any], where: str, template: str) -> dict[str, Any]:
    """The message as transformers hands it to templates: without None, its reasoning under the standard name."""
    if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{where} is not a dict with role and content")
    given, message = message, {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role == "developer" and role not in template:  # the newer name of OpenAI's API
        role = message["role"] = "system"
    if role not in (*_ROLES, "developer"):
        raise ValueError(f"{where} has the role {role!r}, which is none of {', '.join(_ROLES)}")
    optional = role == "assistant" and (message.get("tool_calls") or any(name in message for name in _REASONING))
    if role == "assistant" and "content" in given and not optional:
        message.setdefault("content", "")  # None, as clients of OpenAI's API have it
    content = message.get("content", "" if optional else None)
    if isinstance(content, (list, tuple)) and content:
        for n, part in enumerate(cast("list[Any]", content)):
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(f'{where} ({role}): content[{n}] must be a text part, {{"type": "text", "text": ...}}')
    elif not isinstance(content, str):
        way_out = "; json.dumps makes a string of an object" if isinstance(content, Mapping) else ""
        raise ValueError(f"{where} ({role}) needs content, a string or a list of text parts{way_out}")
    for name in _REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _render(template: str, variables: dict[str, Any]) -> str:
    """The rendered text. Any error becomes a ValueError with the line of the template."""
    from jinja2 import TemplateSyntaxError

    try:
        compiled = _compiled(template)
        if any(isinstance(message.get("content"), list) for message in variables["messages"]):
            variables = {**variables, "messages": _as_read(compiled, variables["messages"])}
        return compiled.render(variables)
    except MemoryError:
        raise
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
        if isinstance(error, TemplateSyntaxError):
            lines = [error.lineno]
        where = f"chat template, line {lines[-1]}" if lines else "chat template"
        # The message may be the template's own: one line of it, and no terminal codes.
        message = "".join(c if c.isprintable() else " " for c in str(error)[:500])
        raise ValueError(f"{where}: {type(error).__name__}: {message}") from error


def _as_read(template: Template, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages unchanged if the template reads lists of text parts, else with the parts joined by newlines."""
    question = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
    with suppress(Exception):  # then it does not read lists
        text = template.render(messages=[question], tools=None, documents=None, add_generation_prompt=False)
        if _PROBE in text and "'type'" not in text and '"type"' not in text:
            return messages

    def joined(content: Any) -> Any:
        return "\n".join(part["text"] for part in content) if isinstance(content, list) else content

    return [{**message, "content": joined(message.get("content", ""))} for message in messages]


@cache
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@cache
def _environment() -> Environment:
    """Jinja's sandbox with what transformers adds to it (utils/chat_template_utils.py there)."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; rendering passes over it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PublicNamespace(Namespace):
        """A namespace that holds no underscored names, which would lead the sandbox astray."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}: it starts with an underscore")
            super().__setitem__(name, value)

    class Dict:
        """The type dict, of which templates may use these two."""

        __call__ = staticmethod(dict[str, Any])
        fromkeys = staticmethod(dict[str, Any].fromkeys)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    cast("dict[str, Any]", environment.globals).update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=PublicNamespace
    )
    return environment


def _render_apart(job: str) -> str:
    """`_render` in a separate process, with limits."""
    # It imports what this process would (the job has sys.path), but runs none of the user's start-up code.
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(
            command, input=job, capture_output=True, encoding="utf-8", errors="replace", timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template takes more than {_PATIENCE} s") from None
    except OSError as error:
        raise ValueError(f"the chat template cannot be rendered: its process does not start: {error}") from None
    if sys.platform != "win32" and done.returncode == -signal.SIGXCPU:
        raise ValueError(f"the chat template takes more than {_SECONDS} s")
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"its process ended with status {done.returncode}"
        raise ValueError(f"the chat template cannot be rendered: {reason}")
    result = json.loads(done.stdout)
    if "error" in result:
        raise ValueError(result["error"])
    return result["text"]


def _main() -> None:
    """The other process: a job from stdin, {"text"} or {"error"} to stdout."""
    with suppress(ImportError):  # Windows: time is limited from outside, memory is not
        import resource

        limits = {
            resource.RLIMIT_CPU: _SECONDS,
            resource.RLIMIT_AS: _MEBIBYTES * 2**20,
            resource.RLIMIT_CORE: 0,
        }
        for name, value in limits.items():
            with suppress(ValueError, OSError):  # already stricter, or not enforced by this system
                resource.setrlimit(name, (value, value + 1 if name == resource.RLIMIT_CPU else value))
    try:
        job = json.load(sys.stdin)
        sys.path[:] = job["path"]
        text = _render(job["template"], job["variables"])
        if len(text) > _CHARACTERS:
            raise ValueError(f"the chat template wrote more than {_CHARACTERS:,} characters")
        result = json.dumps({"text": text})
    except MemoryError:
        result = json.dumps({"error": f"the chat template takes more than {_MEBIBYTES} MiB"})
    except ValueError as error:
        result = json.dumps({"error": str(error)})
    sys.stdout.write(result)


if __name__ == "__main__":
    _main()
