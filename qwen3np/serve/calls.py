"""An answer of a chat in its parts, as it comes: reasoning, text and tool calls; and grammars that force calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3np.conversation import tool_calls
from qwen3np.grammar import json_rule
from qwen3np.serve.fields import BadRequest

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Parts:
    """Splits the text of an answer: `add` returns deltas {"reasoning_content"}, {"content"} or {"call"}.

    Text that may still turn out to be a marker, or white space around one, is held back.
    """

    def __init__(self, inside: bool, tools: bool) -> None:
        """inside: the prompt opened the reasoning; tools: tool calls are taken out of the text."""
        self._state = "reasoning" if inside else "start"
        self._tools, self._held, self._lead = tools, "", inside  # _lead: white space is dropped at this point

    def add(self, text: str, last: bool = False) -> list[dict[str, Any]]:
        """Return what this piece of the answer makes certain."""
        self._held += text
        found: list[dict[str, Any]] = []
        while self._advance(found, last):
            pass
        return found

    def _advance(self, found: list[dict[str, Any]], last: bool) -> bool:
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
        else:
            before, marker, after = self._held.partition(_CLOSE)
            if marker or last:
                rest, calls = tool_calls(before + marker)
                self._give(found, "content", rest)  # a broken call stays text
                found += [{"call": call["function"]} for call in calls]
                self._held, self._state = after, "content"
                return bool(marker)
        return False

    def _give_certain(self, found: list[dict[str, Any]], name: str, marker: str, last: bool, space: str) -> None:
        """Give out the held text, except an end with which a marker, or space before one, may start."""
        keep = 0
        if not last:
            keep = next((n for n in range(len(marker), 0, -1) if self._held.endswith(marker[:n])), 0)
            end = self._held[: len(self._held) - keep]
            spaces = len(end) - len(end.rstrip(space)) if space else 0
            keep += min(spaces, 1) if name == "content" else spaces
        self._give(found, name, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    @staticmethod
    def _give(found: list[dict[str, Any]], name: str, text: str) -> None:
        if text:
            found.append({name: text})


def forced(tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool) -> str | None:
    """The Lark grammar of an answer that calls tools as tool_choice demands, or None if it demands nothing."""
    if choice in ("none", "auto"):
        return None
    functions = [_function(tool) for tool in tools]
    if isinstance(choice, dict):
        name = _function(choice).get("name")
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


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or tool choice. Raises BadRequest for others."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest('tools must be {"type": "function", "function": {"name": ...}}', parameter="tools")
    return function


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise BadRequest unless all of them are functions."""
    for tool in tools:
        _function(tool)
