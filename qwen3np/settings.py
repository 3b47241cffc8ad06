"""The generation settings: one list of names, types, ranges, defaults and meanings.

generate, stream, steps and the methods of Model all take these settings; their signatures list them.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import Annotated, Any, Protocol, TypeAlias, TypedDict, TypeVar, cast, get_type_hints, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.numerics import ENGINES, NUMERICS, Array, Edit
from qwen3np.processors import FILTERS
from qwen3np.rules import REQUIRED, Rule, rules
from qwen3np.weights import Weights

F = TypeVar("F", bound=Callable[..., Any])
Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Batch: TypeAlias = Sequence[Sequence[int] | NDArray[np.integer[Any]]]
Progress: TypeAlias = Callable[[int], object]


def _number(holds: Callable[[Any], bool], supported: str, default: Any = None, kind: type = Real) -> Rule:
    def held(x: Any) -> bool:
        too_large = isinstance(x, int) and abs(x) > sys.float_info.max
        return isinstance(x, kind) and not isinstance(x, bool) and not too_large and holds(x)

    return Rule(held, supported, default)


def _is_seed(x: Any) -> bool:
    parts: list[Any] = list(x) if isinstance(x, Sequence) and not isinstance(x, str) else [x]
    return bool(parts) and all(map(_COUNT.holds, parts))


def _is_ids(x: Any) -> bool:
    return isinstance(x, Collection) and all(map(_COUNT.holds, x))


def _is_words(x: Any) -> bool:
    return isinstance(x, Sequence) and all(_is_ids(word) and len(word) > 0 for word in x)


def _is_biases(x: Any) -> bool:
    pairs: Any = x.items() if isinstance(x, Mapping) else x
    try:
        return all(_is_words([list(ids)]) and _FINITE.holds(bias) for ids, bias in pairs)
    except (TypeError, ValueError):
        return False


def _is_decay(x: Any) -> bool:
    pair: list[Any] = list(x) if isinstance(x, Sequence) else []
    return len(pair) == 2 and _COUNT.holds(pair[0]) and _POSITIVE.holds(pair[1])


_FINITE = _number(lambda x: -inf < x < inf, "a finite number")
_COUNT = _number(lambda n: n >= 0, "a whole number >= 0", kind=Integral)
_POSITIVE = _number(lambda r: 0 < r < inf, "a finite number > 0")
_FRACTION = _number(lambda p: 0 < p <= 1, "a number in (0, 1]")
_IDS = Rule(_is_ids, "a collection of ids", None)


@runtime_checkable
class Checkpoint(Protocol):
    """A model: weights and their config, as in Model."""

    @property
    def weights(self) -> Weights:
        """The tensors, by name."""
        ...

    @property
    def config(self) -> Config:
        """The sizes."""
        ...


class GenerationSettings(TypedDict, total=False):
    """The settings, in the order in which they are applied; None turns one off.

    Names and meanings follow transformers' generation_config.json, and the OpenAI API for the last two penalties.
    """

    max_new_tokens: Annotated[int, _number(lambda n: n >= 1, "a whole number >= 1", REQUIRED, Integral)]
    max_length: Annotated[int | None, _number(lambda n: n >= 1, "a whole number >= 1", kind=Integral)]
    # processors, see processors.py: "length" and "repetition" count the prompt, "new" and the two penalties do not
    sequence_bias: Annotated[
        Mapping[tuple[int, ...], float] | Sequence[Any] | None,
        Rule(_is_biases, "a list of [ids, bias], or a dict from tuples of ids to biases", None),
    ]
    encoder_repetition_penalty: Annotated[float | None, _POSITIVE]
    repetition_penalty: Annotated[float | None, _POSITIVE]  # Keskar et al. 2019, arXiv:1909.05858
    presence_penalty: Annotated[float | None, _FINITE]
    frequency_penalty: Annotated[float | None, _FINITE]
    no_repeat_ngram_size: Annotated[int | None, _COUNT]
    encoder_no_repeat_ngram_size: Annotated[int | None, _COUNT]
    bad_words_ids: Annotated[Sequence[Sequence[int]] | None, Rule(_is_words, "a list of lists of ids", None)]
    min_length: Annotated[int | None, _COUNT]
    min_new_tokens: Annotated[int | None, _COUNT]
    forced_bos_token_id: Annotated[int | None, _COUNT]  # only after a prompt of a single id
    forced_eos_token_id: Annotated[
        int | Sequence[int] | None, Rule(lambda x: _is_ids(x if isinstance(x, Collection) else [x]), "ids", None)
    ]
    remove_invalid_values: Annotated[bool | None, Rule(lambda x: isinstance(x, bool), "true or false", None)]
    exponential_decay_length_penalty: Annotated[
        Sequence[float] | None, Rule(_is_decay, "[new tokens to start after, factor > 0]", None)
    ]
    suppress_tokens: Annotated[Collection[int] | None, _IDS]
    begin_suppress_tokens: Annotated[Collection[int] | None, _IDS]
    logits_processors: Annotated[
        Sequence[Callable[[Array, Array], Array]],  # (ids so far (N,), logits (V,)) -> logits (V,)
        Rule(lambda fs: isinstance(fs, Sequence) and all(map(callable, fs)), "a sequence of callables", ()),
    ]
    temperature: Annotated[float, _number(lambda t: 0 <= t < inf, "a finite number >= 0 (0 is greedy)", 0.0)]
    # filters, off at temperature 0
    top_h: Annotated[float | None, _FRACTION]
    top_k: Annotated[int | None, _number(lambda k: k >= 0, "an integer >= 1 (None or 0 is off)", kind=Integral)]
    top_p: Annotated[float | None, _FRACTION]
    min_p: Annotated[float | None, _number(lambda p: 0 <= p <= 1, "a number in [0, 1]")]
    typical_p: Annotated[float | None, _FRACTION]
    epsilon_cutoff: Annotated[float | None, _number(lambda p: 0 <= p < 1, "a number in [0, 1)")]
    eta_cutoff: Annotated[float | None, _number(lambda p: 0 <= p < 1, "a number in [0, 1)")]
    # several numbers are one seed: row r of a batch draws from (seed, r), and row 0 from seed itself
    seed: Annotated[int | Sequence[int] | None, Rule(_is_seed, "a whole number >= 0, or several", None)]
    # what ends an answer: ids (None: the config's eos_token_id), and rules on the new ids, the text, the time
    stop_ids: Annotated[Collection[int] | None, _IDS]
    stop: Annotated[Callable[[list[int]], bool] | None, Rule(callable, "a callable (new ids) -> bool", None)]
    stop_strings: Annotated[
        str | Sequence[str] | None,
        Rule(
            lambda x: x != "" and (isinstance(x, str) or all(isinstance(s, str) and s for s in x)),
            "a text, or several, none of them empty",
            None,
        ),
    ]
    max_time: Annotated[float | None, _POSITIVE]  # seconds
    # how it is computed, as in forward; with a cache, only what follows its longest common prefix with the ids
    cache: Annotated[KVCache | None, Rule(lambda x: isinstance(x, KVCache), "a KVCache", None)]
    numerics: Annotated[str, Rule(lambda x: x in NUMERICS, f"one of {', '.join(NUMERICS)}", "float32")]
    engine: Annotated[str, Rule(lambda x: x in ENGINES, f"one of {', '.join(ENGINES)}", "fast")]
    edit: Annotated[Edit | None, Rule(callable, "a callable (name, array) -> array or None", None)]
    progress: Annotated[  # True: a bar after two seconds, in a notebook or a terminal
        Progress | bool | None,
        Rule(
            lambda x: callable(x) or isinstance(x, bool), "a callable (tokens of prompts and answers), or a bool", None
        ),
    ]
    # guesses at the next tokens, see drafts.py: the same ids, sooner. At most this many by looking up what followed the
    # last ids before; or by a smaller model of the same vocabulary
    prompt_lookup_num_tokens: Annotated[int | None, _COUNT]
    assistant_model: Annotated[Checkpoint | None, Rule(lambda x: isinstance(x, Checkpoint), "a Model", None)]
    # generate only: 1 for tokens and 0 for padding in ids (B, S), padded left or right; the answers to each prompt
    attention_mask: Annotated[ArrayLike | None, Rule(lambda x: True, "an array (B, S)", None)]
    num_return_sequences: Annotated[int, _number(lambda n: n >= 1, "a whole number >= 1", 1, Integral)]


# transformers' settings that select another algorithm: the values that leave it off, and its name.
_OTHER_ALGORITHMS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "beam search"),
    "num_beam_groups": ((1,), "group beam search"),
    "diversity_penalty": ((0,), "group beam search"),
    "constraints": ((), "constrained beam search"),
    "force_words_ids": ((), "constrained beam search"),
    "penalty_alpha": ((0,), "contrastive search"),
    "dola_layers": ((), "DoLa decoding"),
    "guidance_scale": ((1,), "classifier-free guidance"),
    "assistant_early_exit": ((), "assisted generation"),
    "use_mtp": ((False,), "assisted generation"),
    "watermarking_config": ((), "watermarking"),
    "token_healing": ((False,), "token healing"),
}
# Settings that a file cannot hold.
PROGRAM = (
    *("stop", "logits_processors", "cache", "numerics", "engine", "edit", "progress"),
    *("assistant_model", "attention_mask", "num_return_sequences"),
)
# What other libraries call them.
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "do_sample": "temperature (0 is greedy)",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "eos_token_id": "stop_ids",
    "stop_token_ids": "stop_ids",
    "stopping_criteria": "stop",
    "stop_words": "stop_strings",
    "stop_sequences": "stop_strings",
    "logit_bias": "sequence_bias",
    "n": "num_return_sequences",
    "typical": "typical_p",
    "random_seed": "seed",
    "generation_config": "one argument for each setting: **settings",
    "logits_processor": "logits_processors",
}


def checked(settings: Mapping[str, Any], needed: bool = True) -> dict[str, Any]:
    """Return these generation settings, with defaults for the others.

    Raises TypeError for a name that is not in the list, and ValueError for a value out of its range and for settings of
    transformers that ask for another algorithm; with `needed` also where max_new_tokens is missing.
    """
    known, settings = rules(GenerationSettings), dict(settings)
    if "sampling" in settings:
        warnings.warn("sampling=...: give these settings as arguments", DeprecationWarning, stacklevel=4)
        settings = {"stop_ids": (), **settings.pop("sampling"), **settings}
    for name, (neutral, algorithm) in _OTHER_ALGORITHMS.items():
        if (value := settings.pop(name, None)) is not None and value not in neutral:
            off = neutral[0] if neutral else None
            raise ValueError(
                f"{name}={value!r} is {algorithm}, which is not implemented; {name}={off} (--set {name}="
                f"{json.dumps(off)}) generates without it"
            )
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            hint = f"; here it is {_ELSEWHERE[name]}" if name in _ELSEWHERE else hint
            raise TypeError(f"{name!r} is not a generation setting{hint}")
    for name, value in settings.items():
        rule = known[name]
        if not ((value is None and rule.default is None) or rule.holds(value)):
            raise ValueError(f"{name} must be {rule.supported}, got {value!r}")
    if needed and "max_new_tokens" not in settings:
        raise TypeError("max_new_tokens is missing: the number of new tokens after which to end")
    return {name: rule.default for name, rule in known.items() if rule.default is not REQUIRED} | dict(settings)


def require_ids(chosen: dict[str, Any], config: Config) -> None:
    """Make the stop ids a set. Raises ValueError for ids in the settings that are outside the vocabulary."""
    if chosen["stop_strings"]:
        raise ValueError("stop_strings need a tokenizer: Model.generate has one; here stop= takes a callable")
    end, biases = chosen["forced_eos_token_id"], chosen["sequence_bias"] or ()
    given: dict[str, Any] = {
        "stop_ids": chosen["stop_ids"] or (),
        "bad_words_ids": [i for word in chosen["bad_words_ids"] or () for i in word],
        "sequence_bias": [i for ids, *_ in (biases.items() if isinstance(biases, dict) else biases) for i in ids],
        "forced_eos_token_id": end if isinstance(end, Collection) else () if end is None else [end],
    }
    for name, ids in given.items():
        if beyond := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise ValueError(f"{name}: the vocabulary has no id {beyond[0]}; its ids are 0 to {config.vocab_size - 1}")
    draft: Checkpoint | None = chosen["assistant_model"]
    if draft is not None and chosen["prompt_lookup_num_tokens"]:
        raise ValueError("assistant_model and prompt_lookup_num_tokens both make guesses: give one of them")
    if draft is not None and draft.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"assistant_model: its vocabulary has {draft.config.vocab_size} ids, and must have the {config.vocab_size} "
            "of this model"
        )
    chosen["stop_ids"] = frozenset(config.eos_token_id if chosen["stop_ids"] is None else chosen["stop_ids"])


def from_file(given: Mapping[str, Any]) -> GenerationSettings:
    """Return the settings in a generation_config.json, except eos_token_id, with those that select other algorithms.

    Filters count only with do_sample, as in transformers; without it decoding is greedy. max_new_tokens overrides
    max_length.
    """
    given = {name: value for name, value in given.items() if value is not None}
    ours = [name for name in GenerationSettings.__annotations__ if name not in (*PROGRAM, "stop_ids")]
    if given.get("do_sample"):
        given = {"temperature": 1.0, **given, "penalty_alpha": None}
    else:
        given = {**{name: value for name, value in given.items() if name not in FILTERS}, "temperature": 0.0}
    if "max_new_tokens" in given:
        given.pop("max_length", None)
    found = {name: given[name] for name in (*ours, *_OTHER_ALGORITHMS) if given.get(name) is not None}
    return cast("GenerationSettings", found)


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
    """Check these settings and return them: the deprecated qwen3np.SamplingParameters."""
    warnings.warn("SamplingParameters: give the settings as arguments, or as a dict", DeprecationWarning, stacklevel=2)
    checked(settings, needed=False)
    return settings
