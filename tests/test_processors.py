"""Logits processors, filters and stopping rules against those of transformers, on drawn cases.

`python -m pytest -m oracle tests/test_processors.py -rP` prints how many of them were equal.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

import qwen3np
from qwen3np import Config, init_weights, processed_logits
from qwen3np.tokenizer import said_in

CASES = 1000


def drawn(rng, name, size, length):
    """A value for a setting, in a vocabulary of this size and a text of this length."""

    def ids(most=4):
        return rng.integers(0, size, rng.integers(1, most)).tolist()

    return {
        "sequence_bias": lambda: [
            [list(k), v] for k, v in {tuple(ids()): float(rng.normal()) for _ in range(5)}.items()
        ],
        "encoder_repetition_penalty": lambda: float(rng.uniform(0.5, 2)),
        "repetition_penalty": lambda: float(rng.uniform(0.5, 2)),
        "no_repeat_ngram_size": lambda: int(rng.integers(1, 5)),
        "encoder_no_repeat_ngram_size": lambda: int(rng.integers(1, 5)),
        "bad_words_ids": lambda: [ids() for _ in range(5)],
        "min_length": lambda: int(rng.integers(0, 2 * length)),
        "min_new_tokens": lambda: int(rng.integers(0, length)),
        "forced_bos_token_id": lambda: int(rng.integers(size)),
        "forced_eos_token_id": lambda: ids() if rng.random() < 0.5 else ids()[0],
        "remove_invalid_values": lambda: True,
        "exponential_decay_length_penalty": lambda: (int(rng.integers(0, length)), float(rng.uniform(0.9, 1.5))),
        "suppress_tokens": lambda: ids(),
        "begin_suppress_tokens": lambda: ids(),
        "temperature": lambda: float(rng.uniform(0.1, 3)),
        "top_k": lambda: int(rng.integers(1, size + 1)),
        "top_p": lambda: float(rng.uniform(0.05, 0.99)),
        "min_p": lambda: float(rng.uniform(0.01, 0.9)),
        "top_h": lambda: float(rng.uniform(0.05, 1)),
        "typical_p": lambda: float(rng.uniform(0.05, 0.99)),
        "epsilon_cutoff": lambda: float(10 ** rng.uniform(-4, -0.5)),
        "eta_cutoff": lambda: float(10 ** rng.uniform(-4, -0.5)),
    }[name]()


PROCESSORS = (
    *("sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    "begin_suppress_tokens",
)
FILTERS = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def both(rng, names):
    """Our processed logits and those of transformers, for a drawn case with these settings."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    mixin = GenerationMixin()
    mixin.config = SimpleNamespace(is_encoder_decoder=False)
    size, prompt, new = int(rng.integers(2, 40)), int(rng.integers(1, 12)), int(rng.integers(0, 12))
    logits = rng.normal(0, 3, size).astype(np.float32)
    if "remove_invalid_values" in names:
        logits[rng.random(size) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
    ids = rng.integers(0, min(size, 6), prompt + new)
    ends = np.unique(rng.integers(0, size, rng.integers(1, 3))).tolist()
    values = {name: drawn(rng, name, size, prompt + new) for name in names}
    most = int(rng.integers(new + 1, new + 3))
    config = GenerationConfig(do_sample=True, eos_token_id=ends, **values)
    config._eos_token_tensor, config.max_length = torch.tensor(ends), prompt + most
    scores, context = torch.tensor(logits)[None], torch.tensor(ids)[None]
    for processor in mixin._get_logits_processor(config, prompt, context[:, :prompt]):
        scores = processor(context, scores)
    settings = {"temperature": 1.0, "stop_ids": ends, "max_new_tokens": most, **values}
    try:
        return processed_logits(logits, settings, ids, new), scores[0].numpy()
    except ValueError as error:
        if not any(reason in str(error) for reason in ("no id is left", "no finite maximum", "leave the range")):
            raise
        return None, scores[0].numpy()


def check(rng, draw, title):
    """Compare drawn cases, each with the settings that draw() names."""
    equal = 0
    for _ in range(CASES):
        names = draw()
        ours, theirs = both(rng, names)
        if ours is None:
            assert not np.isfinite(theirs.max())  # transformers would give NaN to its draw
        else:
            assert np.array_equal(ours, theirs), names
        equal += 1
    print(f"{title}: {equal:,} of {CASES:,} drawn cases equal")


@pytest.mark.oracle
@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_agrees_with_transformers(name):
    check(np.random.default_rng(PROCESSORS.index(name)), lambda: [name], name)


@pytest.mark.oracle
def test_processors_together_act_in_the_order_of_transformers():
    rng = np.random.default_rng(99)

    def draw():
        names = [name for name in PROCESSORS if rng.random() < 0.3]
        if any(name.startswith("forced") for name in names):  # with suppress_tokens transformers may refuse them
            names = [name for name in names if name != "suppress_tokens"]
        return names

    check(rng, draw, "several processors")


@pytest.mark.oracle
@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_agrees_with_transformers(name):
    check(np.random.default_rng(200 + FILTERS.index(name)), lambda: [name], name)


@pytest.mark.oracle
def test_stop_strings_agree_with_transformers(builtin):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer
    from transformers.generation.stopping_criteria import StopStringCriteria

    theirs = AutoTokenizer.from_pretrained(builtin.tokenizer.folder)
    rng, words = np.random.default_rng(4), ["the", " cat", "sat", ".\n", "one", " two", "Ünï"]
    ended = 0
    for _ in range(CASES):
        new = builtin.tokenizer.encode("".join(rng.choice(words, 6)))
        text = builtin.tokenizer.decode(new)
        at = int(rng.integers(len(text)))
        strings = [text[at : at + int(rng.integers(1, 6))] or "x", "zebra"]
        rule, criterion = said_in(builtin.tokenizer, strings), StopStringCriteria(theirs, strings)
        for n in range(1, len(new) + 1):  # both end at the same token
            stops = bool(criterion(torch.tensor([new[:n]]), None)[0])
            assert rule(new[:n]) == stops, (text, strings, n)
            if stops:
                ended += 1
                break
    assert ended > CASES / 2
    print(f"stop_strings: {CASES:,} of {CASES:,} drawn answers end at the same token ({ended:,} at a string)")


RULES = ("eos_token_id", "max_new_tokens", "max_length", "max_time")


@pytest.mark.oracle
@pytest.mark.parametrize("rules", [*((rule,) for rule in RULES), RULES], ids=" and ".join)
def test_each_stopping_rule_ends_an_answer_where_transformers_does(rules, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, StoppingCriteriaList
    from transformers.generation import stopping_criteria
    from transformers.generation.utils import GenerationMixin

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config = Config.from_dict({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e4})
    weights, most = init_weights(config, 0), 8
    rng, clock, mixin = np.random.default_rng(RULES.index(rules[-1])), 0.0, GenerationMixin()
    mixin.config = SimpleNamespace()
    for module in (import_module("qwen3np.generate"), stopping_criteria):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock, monotonic=lambda: clock))
    early = 0
    for _ in range(CASES):
        prompt = rng.integers(0, 12, rng.integers(1, 5)).tolist()
        times = np.cumsum(rng.exponential(1, most))  # when each token is there

        def takes_time(ids, logits, prompt=prompt, times=times):
            nonlocal clock
            clock = times[len(ids) - len(prompt)]
            return logits

        drawn = {
            "eos_token_id": rng.choice(12, rng.integers(1, 3), replace=False).tolist(),
            "max_new_tokens": int(rng.integers(1, most)),
            "max_length": len(prompt) + int(rng.integers(1, most)),
            "max_time": float(rng.uniform(0.1, most)),
        }
        given = {rule: drawn[rule] for rule in rules}
        free = {"max_new_tokens": most, "stop_ids": (), "seed": int(rng.integers(1000)), "temperature": 1.0}
        free["logits_processors"] = [takes_time]
        answer, _ = qwen3np.generate(weights, config, prompt, **free)

        theirs = GenerationConfig(max_length=given.get("max_length"), max_time=given.get("max_time"))
        theirs._eos_token_tensor = torch.tensor(given["eos_token_id"]) if "eos_token_id" in given else None
        if "max_new_tokens" in given:  # as GenerationMixin makes of it; the smaller one of both, ours would take, too
            theirs.max_length = min(len(prompt) + given["max_new_tokens"], theirs.max_length or 99)
        clock = 0.0
        criteria, count = mixin._get_stopping_criteria(theirs, StoppingCriteriaList()), most
        for n in range(1, most):
            clock = times[n - 1]
            if bool(criteria(torch.tensor([prompt + answer[:n]]), None)[0]):
                count, early = n, early + 1
                break
        clock = 0.0
        ours = {"stop_ids" if name == "eos_token_id" else name: value for name, value in given.items()}
        assert qwen3np.generate(weights, config, prompt, **{**free, **ours})[0] == answer[:count], given
    assert early > CASES / 2
    print(f"{' and '.join(rules)}: {CASES:,} of {CASES:,} drawn answers end at the same token ({early:,} early)")


def test_penalties_of_new_tokens_by_hand():
    # the OpenAI API: logit - count * frequency_penalty - (count > 0) * presence_penalty, of the answer alone
    settings = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 1.0}
    assert processed_logits([1, 1, 1, 1], settings, [3, 0, 1, 0], new=3).tolist() == [0.0, 0.25, 1.0, 1.0]
    assert processed_logits([1, 1, 1, 1], settings, [3, 0], new=0).tolist() == [1, 1, 1, 1]
