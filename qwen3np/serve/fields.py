"""What a request may say: its fields with their types, limits and defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from qwen3np.errors import one_line
from qwen3np.rules import REQUIRED, Rule, finite, whole

BODY = 4 << 20  # bytes
_TEXTS, _STOPS, _CHOICES, _TOP = 2048, 16, 16, 20  # the most of each that a request may have
ANSWERS, _NAMES = 256, 200  # and of answers and fields


class BadRequest(ValueError):
    """A request that cannot be served; `status` is its HTTP status."""

    def __init__(self, message: str, status: int = 400, parameter: str | None = None) -> None:
        """Keep the name of the field that is wrong."""
        super().__init__(one_line(message))
        self.status, self.parameter = status, parameter


def _is_id(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**31


def _is_prompts(x: Any) -> bool:
    if isinstance(x, str):
        return True
    if not (isinstance(x, list) and x):
        return False
    return all(map(_is_id, x)) or (
        len(x) <= _TEXTS and all(isinstance(p, str) or (isinstance(p, list) and p and all(map(_is_id, p))) for p in x)
    )


def _is_stop(x: Any) -> bool:
    strings: list[Any] = x if isinstance(x, list) else [x]
    return len(strings) <= _STOPS and all(isinstance(s, str) and 0 < len(s) <= 1000 for s in strings)


def _is_bias(x: Any) -> bool:
    return isinstance(x, dict) and len(x) <= 1024 and all(i.isdecimal() and _BIAS.holds(b) for i, b in x.items())


def _is_texts(x: Any) -> bool:
    return isinstance(x, str) or _is_list_of(str)(x)


def _is_list_of(kind: type) -> Any:
    return lambda x: isinstance(x, list) and 0 < len(x) <= _TEXTS and all(isinstance(one, kind) for one in x)


_BIAS = finite(lambda x: -100 <= x <= 100, "from -100 to 100")
_OBJECT = Rule(lambda x: isinstance(x, dict), "an object", None)
_TEXT = Rule(lambda x: isinstance(x, str), "a text", None)
_ANY = Rule(lambda x: True, "anything", None)


def _without(way_out: str) -> Rule:
    """A field that would change the answer, and that this server cannot follow."""
    return Rule(lambda x: not x, f"left out: {way_out}", None)


def _switch(default: bool) -> Rule:
    return Rule(lambda x: isinstance(x, bool), "true or false", default)


def _optional(rule: Rule, default: Any = None) -> Rule:
    return Rule(rule.holds, rule.supported, default)


def _needed(rule: Rule) -> Rule:
    return Rule(rule.holds, rule.supported, REQUIRED)


# The names that generation settings have here, and in the settings.
SETTINGS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")},
    **{"presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "logit_bias": "sequence_bias"},
}
_GENERATION = {
    "model": _TEXT,
    "max_tokens": _optional(whole(0)),
    "temperature": _optional(finite(lambda t: 0 <= t <= 2, "from 0 to 2")),
    "top_p": _optional(finite(lambda p: 0 < p <= 1, "above 0, at most 1")),
    "top_k": _optional(whole(0)),
    "min_p": _optional(finite(lambda p: 0 <= p <= 1, "from 0 to 1")),
    "repetition_penalty": _optional(finite(lambda r: 0.01 <= r <= 100, "from 0.01 to 100")),
    "presence_penalty": _optional(finite(lambda p: -2 <= p <= 2, "from -2 to 2")),
    "frequency_penalty": _optional(finite(lambda p: -2 <= p <= 2, "from -2 to 2")),
    "seed": Rule(lambda x: type(x) is int and -(2**63) <= x < 2**64, "a whole number of 64 bits", None),
    "logit_bias": Rule(_is_bias, "an object of ids and numbers from -100 to 100", None),
    "stop": Rule(_is_stop, f"a text, or up to {_STOPS}, none of them empty", None),
    "stop_token_ids": Rule(lambda x: isinstance(x, list) and len(x) <= 1024 and all(map(_is_id, x)), "ids", None),
    "n": _optional(whole(1, _CHOICES), 1),
    "stream": _switch(False),
    "stream_options": _OBJECT,
    "prompt_logprobs": _optional(whole(0, _TOP)),
    "response_format": _OBJECT,
    # of vLLM's interface
    **{f"guided_{kind}": _without("response_format does this") for kind in ("json", "regex", "choice", "grammar")},
    "structured_outputs": _without("response_format does this"),
    "use_beam_search": _without("answers are sampled, or greedy at temperature 0"),
}
COMPLETION = {
    "prompt": Rule(_is_prompts, f"a text, a list of ids, or up to {_TEXTS} of either", REQUIRED),
    **_GENERATION,
    "max_tokens": _optional(whole(0), 16),
    "logprobs": _optional(whole(0, _TOP)),
    "echo": _switch(False),
    "best_of": _optional(whole(1, 1)),
    "suffix": _without("a text can only be continued"),
}
CHAT = {
    "messages": _needed(Rule(_is_list_of(dict), "a list of messages")),
    **_GENERATION,
    "max_completion_tokens": _optional(whole(1)),
    "logprobs": _switch(False),
    "top_logprobs": _optional(whole(0, _TOP), 0),
    "tools": Rule(
        lambda x: isinstance(x, list) and len(x) <= 128 and all(isinstance(t, dict) for t in x), "tools", None
    ),
    "tool_choice": Rule(lambda x: x in ("none", "auto", "required") or isinstance(x, dict), "a tool choice", "auto"),
    "parallel_tool_calls": _switch(True),
    "chat_template_kwargs": _OBJECT,
    "add_generation_prompt": _switch(True),
    "continue_final_message": _switch(False),
    # "none" turns the reasoning off; the models know no other levels
    "reasoning_effort": Rule(
        lambda x: x in ("none", "minimal", "low", "medium", "high", "xhigh", "max"), "none, or minimal to max", None
    ),
    "functions": _without("tools are their successor"),
    "function_call": _without("tool_choice is its successor"),
    "audio": _without("answers are text"),
    "modalities": Rule(lambda x: x == ["text"], '["text"]: answers are text', None),
    "verbosity": Rule(lambda x: x == "medium", '"medium": the models know no other', None),
    "web_search_options": _without("nothing is searched"),
    "moderation": _without("nothing is moderated"),
}
EMBEDDINGS = {
    "input": Rule(_is_texts, f"a text, or up to {_TEXTS}", REQUIRED),
    "model": _TEXT,
    "encoding_format": Rule(lambda x: x in ("float", "base64"), '"float" or "base64"', "float"),
    "dimensions": _optional(whole(1)),
    "instruction": _TEXT,
    "user": _ANY,
}
RERANK = {
    "query": _needed(_TEXT),
    "documents": Rule(_is_list_of(str), f"a list of up to {_TEXTS} texts", REQUIRED),
    "model": _TEXT,
    "instruction": _TEXT,
    "top_n": _optional(whole(1)),
    "return_documents": _switch(True),
}
TOKENIZE = {
    "prompt": _TEXT,
    "messages": _optional(CHAT["messages"]),
    "model": _TEXT,
    "return_token_strs": _switch(False),
    **{name: CHAT[name] for name in ("tools", "chat_template_kwargs", "reasoning_effort", "add_generation_prompt")},
    "continue_final_message": _switch(False),
}
DETOKENIZE = {"tokens": Rule(lambda x: isinstance(x, list) and all(map(_is_id, x)), "ids", REQUIRED), "model": _TEXT}


def decoded(body: bytes) -> Any:
    """Return what a JSON body holds. Raises BadRequest."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        given: Any = json.loads(body.decode(), parse_constant=refuse)
        if b"\\u" in body:
            json.dumps(given, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return given


def checked(given: Any, rules: Mapping[str, Rule]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a decoded body, with defaults for those that are missing or null, and the names of others.

    Clients send fields that other servers know: these are ignored. Raises BadRequest, for a name that is almost right
    as well.
    """
    if not isinstance(given, dict):
        raise BadRequest("the body must be a JSON object")
    if len(given) > _NAMES:
        raise BadRequest(f"the body has more than {_NAMES} fields")
    for name, value in given.items():
        if name not in rules:
            if near := get_close_matches(name, rules, 1, 0.9):
                raise BadRequest(f"{name[:100]!r} is unknown; did you mean {near[0]}?", parameter=name[:100])
        elif value is not None and not rules[name].holds(value):
            raise BadRequest(f"{name} must be {rules[name].supported}", parameter=name)
    found = {name: rule.default if given.get(name) is None else given[name] for name, rule in rules.items()}
    for name, value in found.items():
        if value is REQUIRED:
            raise BadRequest(f"{name} is missing: it must be {rules[name].supported}", parameter=name)
    return found, [name for name in given if name not in rules]
