"""An answer of a chat in its parts, as it comes: reasoning, text and tool calls; and grammars that force calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3np.conversation import tool_calls
from qwen3np.grammar import json_rule
from qwen3np.serve.fields import BadRequest

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"'
# a call up to its arguments, as the models write it
_CALL = re.compile(rf'{_OPEN}\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"arguments"\s*:\s*(?=\{{)')


class Parts:
    """Splits the text of an answer into parts: {"reasoning_content": text}, {"content": text}; for a tool call
    {"call": name}, then {"arguments": text}.

    Text that may still turn out to be a marker, or white space around one, is held back.
    """

    def __init__(self, inside: bool, tools: bool) -> None:
        """inside: the prompt opened the reasoning; tools: tool calls are taken out of the text."""
        self._state = "reasoning" if inside else "start"
        self._tools, self._held, self._lead = tools, "", inside  # _lead: white space is dropped at this point
        self._arguments = ""  # of the current call, as far as they were given out

    def add(self, text: str, last: bool = False) -> list[dict[str, str]]:
        """Return what this piece of the answer makes certain."""
        self._held += text
        found: list[dict[str, str]] = []
        while self._advance(found, last):
            pass
        return found

    def _advance(self, found: list[dict[str, str]], last: bool) -> bool:
        """Move from one state to another, if the text held allows it; else give out what is certain."""
        if self._state == "start":
            stripped = self._held.lstrip()
            if stripped.startswith("<think>"):
                self._held, self._state, self._lead = stripped.removeprefix("<think>"), "reasoning", True
                return True
            if "<think>".startswith(stripped) and not last:
                return False
            self._state = "content"
            return True
        if self._lead:
            self._held = self._held.lstrip()
            self._lead = not self._held
        if self._state == "reasoning":
            before, marker, after = self._held.partition("</think>")
            if marker:
                self._give(found, "reasoning_content", before.rstrip())
                self._held, self._state, self._lead = after, "content", True
                return True
            self._give_certain(found, "reasoning_content", "</think>", last, " \n\t\r")
        elif self._state == "content":
            before, marker, after = self._held.partition(_OPEN)
            if marker and self._tools:
                self._give(found, "content", before.removesuffix("\n"))
                self._held, self._state = _OPEN + after, "call"
                return True
            self._give_certain(found, "content", _OPEN if self._tools else "", last, "\n" if self._tools else "")
        elif self._state == "call":
            before, marker, after = self._held.partition(_CLOSE)
            if begun := _CALL.match(before):
                found.append({"call": json.loads(begun[1])})
                self._held, self._state, self._arguments = self._held[begun.end() :], "arguments", ""
                return True
            if marker or last:  # the arguments come first, or the call is broken and stays text
                rest, calls = tool_calls(before + marker)
                self._give(found, "content", rest)
                for function in (call["function"] for call in calls):
                    arguments = json.dumps(function["arguments"], ensure_ascii=False)
                    found += [{"call": function["name"]}, {"arguments": arguments}]
                self._held, self._state = after, "content"
                return bool(marker)
        elif self._state == "arguments":
            before, marker, _ = self._held.partition(_CLOSE)
            end = _end_of_object(self._arguments + before)
            if end is not None or marker:
                self._give(found, "arguments", before if end is None else before[: end - len(self._arguments)])
                self._state = "close"
                return True
            self._arguments += self._give_certain(found, "arguments", _CLOSE, last, "")
        else:
            _, marker, after = self._held.partition(_CLOSE)
            if marker:
                self._held, self._state = after, "content"
            return bool(marker)
        return False

    def _give_certain(self, found: list[dict[str, str]], name: str, marker: str, last: bool, space: str) -> str:
        """Give out and return the held text, except an end with which a marker, or space before one, may start."""
        keep = 0
        if not last:
            keep = next((n for n in range(len(marker), 0, -1) if self._held.endswith(marker[:n])), 0)
            end = self._held[: len(self._held) - keep]
            spaces = len(end) - len(end.rstrip(space)) if space else 0
            keep += min(spaces, 1) if name == "content" else spaces
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._give(found, name, certain)
        return certain

    @staticmethod
    def _give(found: list[dict[str, str]], name: str, text: str) -> None:
        if text:
            found.append({name: text})


def _end_of_object(text: str) -> int | None:
    """Where the JSON object that text starts with ends; None if it does not end, or is broken."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def forced(tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool) -> str | None:
    """The Lark grammar of an answer that calls tools as tool_choice demands, or None if it demands nothing.

    Raises BadRequest for tools that are not functions.
    """
    functions = [_function(tool, "tools") for tool in tools]
    if choice in ("none", "auto"):
        return None
    if isinstance(choice, dict):
        name = _function(choice, "tool_choice").get("name")
        functions = [function for function in functions if function.get("name") == name]
        if not functions:
            raise BadRequest("tool_choice names no function of tools", parameter="tool_choice")
    if not functions:
        raise BadRequest("tool_choice needs tools", parameter="tools")
    rules = [f"start: call{' ' if not parallel or isinstance(choice, dict) else ' (NEWLINE call)*'}"]
    rules += [r'NEWLINE: "\n"', "call: " + " | ".join(f"call_{n}" for n in range(len(functions)))]
    for n, function in enumerate(functions):
        begin = f'{_OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        schema = function.get("parameters") or {"type": "object"}
        rules += [f'call_{n}: {json.dumps(begin, ensure_ascii=False)} arguments_{n} "}}\\n{_CLOSE}"']
        rules += [f"arguments_{n}: {json_rule(schema)}"]
    return "\n".join(rules)


def _function(tool: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The function of a tool or a tool choice. Raises BadRequest for others."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f'{field} must be {{"type": "function", "function": {{"name": ...}}}}', parameter=field)
    return function
