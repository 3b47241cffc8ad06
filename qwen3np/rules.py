"""Rules for settings: each annotation says which values are valid, and how an error describes them.

    class Sampling(TypedDict, total=False):
        top_p: Annotated[float, finite(lambda x: 0 < x <= 1, "above 0, at most 1")]

`rules` collects them from a dataclass or a TypedDict, and `broken` checks values against them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeAlias, cast, get_args, get_origin, get_type_hints

import numpy as np

REQUIRED: Any = object()  # the default of a setting that must be given
_LARGEST = 2**63 - 1  # NumPy's largest index


@dataclass(frozen=True)
class Rule:
    """The valid values of a setting: those for which `holds` is true; `supported` describes them in errors.

    `default` is for the settings of a TypedDict; a dataclass has its own defaults.
    """

    holds: Callable[[Any], bool]
    supported: str
    default: Any = REQUIRED


def whole(least: int, most: int = _LARGEST) -> Rule:
    """Return the rule for whole numbers from `least` to `most`."""
    last = "2^63 - 1" if most == _LARGEST else f"{most:,}"
    return Rule(lambda x: type(x) is int and least <= x <= most, f"whole numbers from {least} to {last}")


def finite(holds: Callable[[float], bool], words: str) -> Rule:
    """Return the rule for finite numbers that satisfy `holds`, described by `words`. A bool is not a number here."""
    most = sys.float_info.max  # an int may be larger
    return Rule(lambda x: type(x) in (int, float) and abs(x) <= most and holds(x), f"finite numbers {words}")


def one_of(*values: object) -> Rule:
    """Return the rule for these values."""
    return Rule(lambda x: x in values, " and ".join(json.dumps(value) for value in values))


def many(rule: Rule) -> Rule:
    """Return the rule for tuples of values that `rule` allows; `plain` turns lists into tuples."""

    def holds(x: Any) -> bool:
        return isinstance(x, tuple) and all(map(rule.holds, cast("tuple[Any, ...]", x)))

    return Rule(holds, f"a tuple or list of {rule.supported}")


Size: TypeAlias = Annotated[int, whole(1)]
Count: TypeAlias = Annotated[int, whole(0)]
Counts: TypeAlias = Annotated[tuple[int, ...], many(whole(0))]
Even: TypeAlias = Annotated[int, Rule(lambda x: type(x) is int and x > 0 and x % 2 == 0, "even numbers from 2")]
Positive: TypeAlias = Annotated[float, finite(lambda x: x > 0, "above 0")]
Switch: TypeAlias = Annotated[bool, Rule(lambda x: type(x) is bool, "true and false")]


@cache
def rules(kind: type) -> Mapping[str, Rule]:
    """Return the rule of each field of a dataclass or TypedDict. Each annotation holds one, optionally with None."""
    return {name: _rule(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _rule(hint: Any) -> Rule:
    if get_origin(hint) is Annotated:
        return next(extra for extra in hint.__metadata__ if isinstance(extra, Rule))
    rule = _rule(get_args(hint)[0])  # of Annotated[...] | None
    return Rule(lambda x: x is None or rule.holds(x), rule.supported, rule.default)


def broken(kind: type, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield each value that breaks its rule in `kind`: its name, the value, and what is supported."""
    for name, rule in rules(kind).items():
        if name in values and not rule.holds(values[name]):
            yield name, values[name], rule.supported


def plain(value: Any) -> Any:
    """Turn lists into tuples, and NumPy scalars into Python's, which do not change an array's dtype in arithmetic."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(part) for part in cast("list[Any]", value))
    return cast("Any", value).item() if isinstance(value, np.generic) else value
