"""The generation settings: one list of their names, types, ranges, defaults and meanings.

generate, stream, steps and the methods of Model all take these; their signatures show them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Annotated, Any, TypeAlias, TypedDict, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from qwen3np.cache import KVCache
from qwen3np.numerics import ENGINES, NUMERICS, Array, Edit
from qwen3np.rules import REQUIRED, Rule, rules

F = TypeVar("F", bound=Callable[..., Any])
Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Batch: TypeAlias = Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]]
Progress: TypeAlias = Callable[[int], object]


def _number(holds: Callable[[Any], bool], supported: str, default: Any = None, kind: type = Real) -> Rule:
    return Rule(lambda x: isinstance(x, kind) and holds(x), supported, default)


def _is_seed(x: Any) -> bool:
    try:
        np.random.default_rng(x)
    except (ValueError, TypeError):
        return False
    return True


class GenerationSettings(TypedDict, total=False):
    """The settings in the order in which they act; None is off."""

    max_new_tokens: Annotated[int, _number(lambda n: n >= 1, "a whole number, at least 1", REQUIRED, Integral)]
    # logits: Keskar et al. 2019, arXiv:1909.05858 (prompt included); the next two count the new tokens only, as OpenAI
    repetition_penalty: Annotated[float | None, _number(lambda r: 0 < r < inf, "a finite number > 0")]
    presence_penalty: Annotated[float | None, _number(lambda p: -inf < p < inf, "a finite number")]
    frequency_penalty: Annotated[float | None, _number(lambda p: -inf < p < inf, "a finite number")]
    logits_processors: Annotated[
        Sequence[Callable[[Array, Array], Array]],  # (ids so far (N,), logits (V,)) -> logits (V,)
        Rule(lambda fs: isinstance(fs, Sequence) and all(map(callable, fs)), "a sequence of callables", ()),
    ]
    temperature: Annotated[float, _number(lambda t: 0 <= t < inf, "a finite number >= 0 (0 is greedy)", 0.0)]
    # Fan et al. 2018, arXiv:1805.04833; Holtzman et al. 2019, arXiv:1904.09751; Nguyen et al. 2024, arXiv:2407.01082
    top_k: Annotated[int | None, _number(lambda k: k >= 0, "an integer >= 1 (None or 0 is off)", kind=Integral)]
    top_p: Annotated[float | None, _number(lambda p: 0 < p <= 1, "a number in (0, 1]")]
    min_p: Annotated[float | None, _number(lambda p: 0 <= p <= 1, "a number in [0, 1]")]
    seed: Annotated[int | Sequence[int] | None, Rule(_is_seed, "a whole number from 0", None)]
    # ends: ids that end an answer (None: the config's eos_token_id), and a rule on the new ids
    stop_ids: Annotated[Collection[int] | None, Rule(lambda x: isinstance(x, Collection), "a collection of ids", None)]
    stop: Annotated[Callable[[list[int]], bool] | None, Rule(callable, "a callable (new ids) -> bool", None)]
    # how it is computed, as in forward; with a cache, only what follows its longest common prefix with the ids
    cache: Annotated[KVCache | None, Rule(lambda x: isinstance(x, KVCache), "a KVCache", None)]
    numerics: Annotated[str, Rule(lambda x: x in NUMERICS, f"one of {', '.join(NUMERICS)}", "float32")]
    engine: Annotated[str, Rule(lambda x: x in ENGINES, f"one of {', '.join(ENGINES)}", "fast")]
    edit: Annotated[Edit | None, Rule(callable, "a callable (name, array) -> array or None", None)]
    progress: Annotated[Progress | None, Rule(callable, "a callable (prompt positions computed)", None)]


# What other libraries call them.
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "do_sample": "temperature (0 is greedy)",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "eos_token_id": "stop_ids",
    "stop_token_ids": "stop_ids",
    "stopping_criteria": "stop",
    "logits_processor": "logits_processors",
}


def checked(settings: Mapping[str, Any], needed: bool = True) -> dict[str, Any]:
    """Return these generation settings, with defaults for the others.

    Raises TypeError for a name that is not in the list, and ValueError for a value out of its range; with `needed` also
    where max_new_tokens is missing.
    """
    known = rules(GenerationSettings)
    if "sampling" in settings:
        warnings.warn("sampling=...: give these settings as arguments", DeprecationWarning, stacklevel=4)
        settings = {"stop_ids": (), **settings["sampling"], **{k: v for k, v in settings.items() if k != "sampling"}}
    for name in settings:
        if name not in known:
            hint = f"; here it is {_ELSEWHERE[name]}" if name in _ELSEWHERE else f"; known: {', '.join(known)}"
            raise TypeError(f"{name!r} is not a generation setting{hint}")
    for name, value in settings.items():
        rule = known[name]
        if not (rule.holds(value) or (value is None and rule.default is None)):
            raise ValueError(f"{name} must be {rule.supported}, got {value!r}")
    if needed and "max_new_tokens" not in settings:
        raise TypeError("max_new_tokens is missing: the number of new tokens after which to end")
    return {name: rule.default for name, rule in known.items() if rule.default is not REQUIRED} | dict(settings)


def lists_settings(function: F) -> F:
    """Give a function with **settings a signature that names each of them, for help() and notebooks."""
    own, types = list(inspect.signature(function).parameters.values()), get_type_hints(GenerationSettings)
    first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [p for p in own if p.kind is p.KEYWORD_ONLY]
    listed = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if rule.default is REQUIRED else rule.default,
            annotation=types[name],
        )
        for name, rule in rules(GenerationSettings).items()
    ]
    function.__signature__ = inspect.Signature([*first, *listed, *rest])  # pyright: ignore[reportFunctionMemberAccess]
    return function


def sampling_parameters(**settings: Any) -> dict[str, Any]:
    """Return these settings, checked: what qwen3np.SamplingParameters stands for, for one more version."""
    warnings.warn("SamplingParameters: give the settings as arguments, or as a dict", DeprecationWarning, stacklevel=2)
    checked(settings, needed=False)
    return settings
