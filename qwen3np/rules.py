"""Rules for settings: a field's annotation says which values it takes, and how an error puts that into words.

    class Sampling(TypedDict, total=False):
        top_p: Annotated[float, finite(lambda x: 0 < x <= 1, "above 0, at most 1")]

`rules` collects them from a dataclass or a TypedDict, and `broken` holds values against them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, TypeAlias, cast, get_args, get_origin, get_type_hints

import numpy as np

REQUIRED: Any = object()  # the default of a setting that has none
_LARGEST = 2**63 - 1  # what NumPy's indices can hold


@dataclass(frozen=True)
class Rule:
    """Which values a setting takes: those for which `holds` is true; `supported` describes them in an error.

    `default` serves settings that are collected in a TypedDict; a dataclass has its own place for defaults.
    """

    holds: Callable[[Any], bool]
    supported: str
    default: Any = REQUIRED


def whole(least: int, most: int = _LARGEST) -> Rule:
    """Return the rule for whole numbers from `least` to `most`."""
    last = "2^63 - 1" if most == _LARGEST else f"{most:,}"
    return Rule(lambda x: type(x) is int and least <= x <= most, f"whole numbers from {least} to {last}")


def finite(holds: Callable[[float], bool], words: str) -> Rule:
    """Return the rule for finite numbers (an int is one, a bool is not) for which `holds`, `words` says which."""
    return Rule(
        lambda x: type(x) in (int, float) and abs(x) <= sys.float_info.max and holds(x), f"finite numbers {words}"
    )


def many(rule: Rule) -> Rule:
    """Return the rule for tuples (`plain` makes lists into tuples) of values that `rule` allows."""
    return Rule(lambda x: type(x) is tuple and all(map(rule.holds, x)), f"a tuple or list of {rule.supported}")


Size: TypeAlias = Annotated[int, whole(1)]
Count: TypeAlias = Annotated[int, whole(0)]
Positive: TypeAlias = Annotated[float, finite(lambda x: x > 0, "above 0")]
Switch: TypeAlias = Annotated[bool, Rule(lambda x: type(x) is bool, "true and false")]
Counts: TypeAlias = Annotated[tuple[int, ...], many(whole(0))]


@cache
def rules(kind: type) -> dict[str, Rule]:
    """Return the rule of each field of a dataclass or TypedDict, from its `Annotated[...]`, with `| None` or not."""
    return {name: _rule(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _rule(hint: Any) -> Rule:
    if get_origin(hint) is Annotated:
        return next(extra for extra in hint.__metadata__ if isinstance(extra, Rule))
    annotated, _ = get_args(hint)  # and None
    rule = _rule(annotated)
    return replace(rule, holds=lambda x: x is None or rule.holds(x))


def broken(kind: type, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield each value that its rule in `kind` does not allow: its name, the value, and what is supported."""
    for name, rule in rules(kind).items():
        if name in values and not rule.holds(values[name]):
            yield name, values[name], rule.supported


def plain(value: Any) -> Any:
    """Return NumPy's scalars as Python's, whose arithmetic leaves the dtype of arrays alone, and lists as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(part) for part in cast("list[Any]", value))
    return value.item() if isinstance(value, np.generic) else value
