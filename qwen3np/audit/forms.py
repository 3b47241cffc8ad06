"""The forms in which programs write log-probabilities: numbers, pairs, triples, objects, and objects around them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3np.numerics import Array

IMPOSSIBLE = -9000.0  # OpenAI-style servers write -9999 where a token is not among those they list
WRAPPERS = ("body", "request", "response", "result", "meta_info", "outputs", "choices")  # lists: a rollout for each


def answers(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield flat objects: what wrappers hold is merged into what is around them, for each element of a list."""
    rows = [{key: x for key, x in value.items() if key not in WRAPPERS}]
    for key in WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, dict):
            inner = [inner]
        if isinstance(inner, list) and inner and all(isinstance(x, dict) for x in inner):
            rows = [row | own for row in rows for one in inner for own in answers(one)]
    yield from rows


def by_text(top: Any) -> list[tuple[Any, float]]:
    """Return the pairs of an object whose keys are the texts of tokens, perhaps digits."""
    if not isinstance(top, dict | type(None)):
        raise ValueError(f"top_logprobs has {kind_of(top)} at a position, not an object")
    return [(text, number(x)) for text, x in (top or {}).items()]


def listed(entry: Any) -> list[tuple[Any, float]]:
    """Return the (token, log-probability) pairs that one position holds, in any of the forms."""
    if entry is None:
        return [(None, math.nan)]
    if isinstance(entry, int | float):
        return [(None, number(entry))]
    if isinstance(entry, dict):
        if "logprob" in entry or "prob" in entry:
            token = next((entry[k] for k in ("id", "bytes", "token") if entry.get(k) is not None), None)
            x = entry["logprob"] if "logprob" in entry else math.log(max(float(entry["prob"]), 5e-324))
            more = entry.get("top_logprobs") or entry.get("top_probs") or []
            return [(token, number(x)), *(pair for one in more for pair in listed(one))]
        pairs = [(k, x["logprob"] if isinstance(x, dict) else x) for k, x in entry.items()]
        return [(int(k) if k.isdecimal() and len(k) < 20 else k, number(x)) for k, x in pairs]  # vLLM: {id: {...}}
    if isinstance(entry, list):
        if len(entry) == 3 and isinstance(entry[1], int) and (entry[0] is None or isinstance(entry[0], float)):
            return [(entry[1], number(entry[0]))]  # SGLang: log-probability, id, text
        if len(entry) == 2 and isinstance(entry[0], int) and isinstance(entry[1], float):
            return [(entry[0], entry[1])]
        return [pair for one in entry for pair in listed(one)]
    raise ValueError(f"a log-probability is {kind_of(entry)}")


def experts_from(value: Any) -> Array | None:
    """Return recorded experts: lists (positions, layers, k), or SGLang's bytes of int32 in base64."""
    if value is None:
        return None
    found = np.frombuffer(base64.b64decode(value, validate=True), "<i4") if isinstance(value, str) else np.array(value)
    if found.dtype.kind not in "iu" or found.ndim not in (1, 3):
        raise ValueError("routed_experts: not whole numbers of shape (positions, layers, experts per token)")
    return found


def number(x: Any) -> float:
    """Return a log-probability: NaN for null, -inf for an impossible one. ValueError for anything but a number."""
    if x is None:
        return math.nan
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise ValueError(f"a log-probability is {kind_of(x)}")
    return -math.inf if x <= IMPOSSIBLE else float(x)


def of_the_answer(entries: Sequence[Any], count: int, whole: int, what: str) -> Sequence[Any]:
    """Return the entries of the answer: all, or those after the prompt."""
    if not entries or len(entries) == count:
        return entries
    if len(entries) in (whole, whole - 1):
        return entries[-count:]
    raise ValueError(f"{len(entries)} {what} for {count} ids of the answer")


def kind_of(x: Any) -> str:
    """Return what kind of JSON value this is, in words."""
    names: Iterable[tuple[type | tuple[type, ...], str]] = (
        (type(None), "nothing"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next(name for kind, name in names if isinstance(x, kind))
