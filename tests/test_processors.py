"""Logits processors, filters and stopping rules against those of transformers, on drawn cases."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qwen3np import processed_logits
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
FILTERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


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


def check(rng, names):
    ours, theirs = both(rng, names)
    if ours is None:
        assert not np.isfinite(theirs.max())  # transformers would give NaN to its draw
    else:
        assert np.array_equal(ours, theirs), names


@pytest.mark.oracle
@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_agrees_with_transformers(name):
    rng = np.random.default_rng(PROCESSORS.index(name))
    for _ in range(CASES):
        check(rng, [name])


@pytest.mark.oracle
def test_processors_together_act_in_the_order_of_transformers():
    rng = np.random.default_rng(99)
    for _ in range(CASES):
        names = [name for name in PROCESSORS if rng.random() < 0.3]
        if any(name.startswith("forced") for name in names):  # with suppress_tokens transformers may refuse them
            names = [name for name in names if name != "suppress_tokens"]
        check(rng, names)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_agrees_with_transformers(name):
    rng = np.random.default_rng(200 + FILTERS.index(name))
    for _ in range(CASES):
        check(rng, [name])


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


def test_penalties_of_new_tokens_by_hand():
    # the OpenAI API: logit - count * frequency_penalty - (count > 0) * presence_penalty, of the answer alone
    settings = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 1.0}
    assert processed_logits([1, 1, 1, 1], settings, [3, 0, 1, 0], new=3).tolist() == [0.0, 0.25, 1.0, 1.0]
    assert processed_logits([1, 1, 1, 1], settings, [3, 0], new=0).tolist() == [1, 1, 1, 1]
