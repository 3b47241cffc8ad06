"""The list of generation settings: its errors, its signatures, and settings that no other file tests."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from drawing import draw_ids

import qwen3np
from qwen3np import Model, generate, processed_logits, steps, stream
from qwen3np.settings import GenerationSettings, checked

NAMES = list(GenerationSettings.__annotations__)


@pytest.mark.parametrize("function", [generate, stream, steps, Model.generate, Model.stream, Model.complete])
def test_signatures_name_every_setting(function):
    parameters = inspect.signature(function).parameters
    assert [name for name in parameters if name in NAMES] == NAMES
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert parameters["temperature"].default == 0.0
    assert parameters["max_new_tokens"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("name", "ours"),
    [("max_tokens", "max_new_tokens"), ("do_sample", "temperature"), ("eos_token_id", "stop_ids")],
)
def test_names_of_other_libraries_are_answered_with_ours(config, weights, name, ours):
    with pytest.raises(TypeError, match=f"'{name}' is not a generation setting; here it is {ours}"):
        generate(weights, config, [1], **{name: 1})


def test_unknown_and_missing_settings(config, weights):
    with pytest.raises(TypeError, match="'heat' is not a generation setting; known: max_new_tokens, "):
        generate(weights, config, [1], max_new_tokens=1, heat=2)
    with pytest.raises(TypeError, match="max_new_tokens is missing"):
        generate(weights, config, [1])
    for name, value in (
        ("stop", 5),
        ("logits_processors", [5]),
        ("seed", -1),
        ("seed", "a"),
        ("presence_penalty", "1"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            checked({"max_new_tokens": 1, name: value})


def test_without_stop_ids_it_stops_at_the_eos_of_the_config(config, weights):
    from dataclasses import replace

    free, _ = generate(weights, config, [1, 2, 3], max_new_tokens=12, stop_ids=())
    assert len(free) == 12
    ends = replace(config, eos_token_id=(free[4],))
    assert generate(weights, ends, [1, 2, 3], max_new_tokens=12)[0] == free[: free.index(free[4]) + 1]
    assert generate(weights, ends, [1, 2, 3], max_new_tokens=12, stop_ids=())[0] == free
    assert generate(weights, ends, [1, 2, 3], max_new_tokens=12, stop_ids=[free[0]])[0] == free[:1]


def test_stop_is_given_the_new_ids(config, weights):
    seen = []

    def after_three(new):
        seen.append(list(new))
        return len(new) == 3

    new, _ = generate(weights, config, [1, 2], max_new_tokens=9, stop=after_three, stop_ids=())
    assert seen == [new[:1], new[:2], new[:3]]
    assert len(new) == 3


def test_penalties_count_the_new_tokens_only():
    """As the OpenAI API defines it: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    logits, ids = np.arange(6, dtype=np.float32), [5, 5, 3, 1, 3]  # the last three were generated
    given = {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    expected = logits - np.float32(0.25) * np.array([0, 1, 0, 2, 0, 0]) - np.float32(0.5) * np.array([0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(processed_logits(logits, given, ids, new=3), expected.astype(np.float32))
    np.testing.assert_array_equal(processed_logits(logits, given, ids), logits)
    np.testing.assert_array_equal(
        processed_logits(logits, {"temperature": 1.0, "frequency_penalty": -1.0}, ids, new=1), logits + np.eye(6)[3]
    )


def test_penalties_work_through_generate(config, weights):
    assert len(set(generate(weights, config, [1, 2, 3], max_new_tokens=20, stop_ids=())[0])) < 20
    for name in ("presence_penalty", "frequency_penalty"):
        new, _ = generate(weights, config, [1, 2, 3], max_new_tokens=20, stop_ids=(), **{name: 1e4})
        assert len(set(new)) == 20, name


def test_processors_come_after_the_penalties_and_before_the_temperature():
    """As in transformers: the caller's processors follow the penalties and precede temperature and filters."""
    given = []

    def process(ids, scores):
        given.append((ids.tolist(), scores.copy()))
        return np.where(scores == scores.max(), -np.inf, scores)

    settings = {"temperature": 2.0, "top_k": 1, "repetition_penalty": 2.0, "logits_processors": [process]}
    processed = processed_logits([1.0, 2.0, 4.0, 8.0], settings, [3])
    assert given[0][0] == [3]
    np.testing.assert_array_equal(given[0][1], [1, 2, 4, 4])
    np.testing.assert_array_equal(processed, [-np.inf, 1.0, -np.inf, -np.inf])
    with pytest.raises(ValueError, match=r"logits_processors: .* gave \(2,\) for \(4,\) logits"):
        processed_logits([1.0, 2.0, 4.0, 8.0], {"logits_processors": [lambda ids, scores: scores[:2]]})


def test_processors_act_one_after_the_other():
    settings = {"temperature": 1.0, "logits_processors": [lambda ids, x: x + 1, lambda ids, x: 2 * x]}
    np.testing.assert_array_equal(processed_logits([1.0, 3.0], settings), [4, 8])


def test_a_processor_works_through_generate(config, weights):
    ids, forbidden = draw_ids(np.random.default_rng(0), config, 5).tolist(), []

    def never_twice(ids, scores):
        forbidden.append(len(ids))
        scores[ids] = -np.inf
        return scores

    new, _ = generate(weights, config, ids, max_new_tokens=20, logits_processors=[never_twice], stop_ids=())
    assert len({*ids, *new}) == len(set(ids)) + 20
    assert forbidden == list(range(5, 25))


def test_names_of_the_version_before_still_work(config, weights):
    with pytest.warns(DeprecationWarning, match="SamplingParameters"):
        greedy = qwen3np.SamplingParameters(temperature=0.0)
    with pytest.warns(DeprecationWarning, match="sampling="):
        found = steps(weights, config, [[1, 2]], None, max_new_tokens=2, sampling=greedy, stop=lambda new: False)
    assert [step.id for step in found] == generate(weights, config, [1, 2], max_new_tokens=2, stop_ids=())[0]
    with pytest.raises(AttributeError, match="no attribute 'Sampling'"):
        qwen3np.Sampling  # noqa: B018
