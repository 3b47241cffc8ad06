"""Reasoning, tool calls and JSON schemas of chats; truth is the text split as a whole, and jsonschema."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qwen3np
from qwen3np.conversation import tool_calls
from qwen3np.files.hub import BUILTIN
from qwen3np.terminal import reasoning_apart
from qwen3np.tokenizer import Tokenizer

serving = pytest.importorskip("serving", reason="the server and its tests need the extra `test`")
openai = serving.openai
jsonschema = pytest.importorskip("jsonschema", reason="needs the extra `test`")

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined %}<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
    "{% endif %}"
)
NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": NUMBER}} for name in ("add", "negate")]
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 120}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of the built-in checkpoint with a template that knows tools and reasoning."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUILTIN / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    model = replace(qwen3np.load(), tokenizer=Tokenizer.from_folder(folder))
    with serving.serve(model) as (address, _), serving.client(address) as found:
        yield found


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "\n",
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "f", "arguments": {"a": {}, "b": "}\\""',
        "}",
        "<to",
        "x",
        " ",
        "<",
    ]
)


@example("x\n</think>\n\ny\n<tool_call>", True, True, [])
@given(
    st.lists(PIECES, max_size=9).map("".join), st.booleans(), st.booleans(), st.lists(st.integers(0, 60), max_size=9)
)
def test_an_answer_falls_into_the_same_parts_however_it_is_cut(text, inside, tools, cuts):
    from qwen3np.serve.calls import Parts

    def split(pieces):
        parts, found = Parts(inside, tools), []
        for n, piece in enumerate(pieces):
            for part in parts.add(piece, last=n == len(pieces) - 1):
                ((name, value),) = part.items()
                if found and found[-1][0] == name != "call":
                    found[-1][1] += value
                else:
                    found.append([name, value])
        return found

    cuts = sorted(cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces) == split([text]) == split([*text, ""])


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nwhy\n</think>\n\nYes.",
        "Yes.",
        'One\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        "<tool_call>\nno JSON\n</tool_call>",
        "<think>\nunfinished",
        "half <tool_call>{",
        '<tool_call>\n{"name": "f", "arguments": {"a": {"b": "}"}, "c": [1]}}\n</tool_call>',
        '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call>',
    ],
)
def test_parts_are_those_of_the_conversation(text):
    from qwen3np.serve.calls import Parts

    found = Parts(False, True).add(text, last=True)
    reasoning, rest = reasoning_apart(text, False)
    content, calls = tool_calls(rest)
    assert "".join(part.get("reasoning_content", "") for part in found) == (reasoning or "")
    assert "".join(part.get("content", "") for part in found) == content
    assert [part["call"] for part in found if "call" in part] == [call["function"]["name"] for call in calls]
    arguments = [json.loads(part["arguments"]) for part in found if "arguments" in part]
    assert arguments == [call["function"]["arguments"] for call in calls]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "negate"}}])
def test_a_demanded_tool_is_called_with_valid_arguments(client, choice):
    options = {**ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    (whole,) = client.chat.completions.create(**options).choices
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    assert call.function.name in (("add", "negate") if choice == "required" else ("negate",))
    jsonschema.validate(json.loads(call.function.arguments), NUMBER)
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    first, *more = [call for choice in deltas for call in choice.delta.tool_calls or []]
    assert (first.index, first.type, first.function.name) == (0, "function", call.function.name)
    assert all((one.index, one.id, one.function.name) == (0, None, None) for one in more)
    assert len(more) > 1  # they come in pieces
    assert "".join(one.function.arguments for one in [first, *more]) == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls"
    # the result goes back as clients send it, with the arguments as text
    back = [*ASK["messages"], whole.message.model_dump(exclude_none=True)]
    back.append({"role": "tool", "tool_call_id": call.id, "content": "42"})
    assert (
        client.chat.completions.create(**{**ASK, "messages": back, "max_tokens": 1}).choices[0].message.role
        == "assistant"
    )


def test_reasoning_is_apart_is_not_said(client):
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**{**ASK, "max_tokens": 4}, extra_body=extra).choices[0].message
    assert (message.content, bool(message.reasoning_content)) == ("", True)


def test_no_effort_is_no_reasoning(client):
    """The template of Qwen3's hybrid models says so with an empty reasoning."""

    def tokens(**extra):
        return client.chat.completions.create(**{**ASK, "max_tokens": 1}, **extra).usage.prompt_tokens

    off = tokens(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert tokens(reasoning_effort="none") == off > tokens(reasoning_effort="high") == tokens()


def test_tools_and_templates_hold_no_special_tokens(client):
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    with_token = client.chat.completions.create(**{**ASK, "max_tokens": 1}, tools=[tool]).usage.prompt_tokens
    tool["function"]["description"] = ""
    without = client.chat.completions.create(**{**ASK, "max_tokens": 1}, tools=[tool]).usage.prompt_tokens
    assert with_token > without + 1


def test_answers_validate_against_drawn_schemas(client):
    rng, finished = np.random.default_rng(0), 0
    for n in range(5):
        schema = serving.drawn_schema(rng)
        form = {"type": "json_schema", "json_schema": {"name": "drawn", "schema": schema}}
        (choice,) = client.chat.completions.create(**ASK, response_format=form, temperature=1.0, seed=n).choices
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)
            finished += 1
    assert finished >= 4


def test_an_answer_that_is_cut_says_so(client):
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 50}}}
    (choice,) = client.chat.completions.create(**{**ASK, "max_tokens": 5}, response_format=form).choices
    assert choice.finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):  # so the client does not parse it
        client.chat.completions.parse(**{**ASK, "max_tokens": 5}, response_format=form)


def test_a_format_applies_after_the_reasoning(client):
    """The id </think> has the highest score all the time; the grammar allows it only before it applies."""
    form = {"type": "regex", "pattern": "[0-9]{3}-[a-c]{2}"}
    extra = {"response_format": form, "chat_template_kwargs": {"enable_thinking": True}}
    end = qwen3np.load().text.token_to_id("</think>")
    options = {**ASK, "logit_bias": {str(end): 40}, "extra_body": extra, "temperature": 1.0}
    for seed in range(3):
        message = client.chat.completions.create(**options, seed=seed).choices[0].message
        assert re.fullmatch(form["pattern"], message.content)
