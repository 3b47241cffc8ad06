"""Guesses at the next tokens: the same ids and logits as without them, whatever they are, in fewer passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drawing import draw_any_config, draw_ids, trained_like
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3np import KVCache, drafts, forward, generate, steps
from qwen3np.model import Model


def by_row(found, rows):
    """Return ids and logits of each row."""
    answers = [[] for _ in range(rows)]
    for step in found:
        answers[step.row].append((step.id, step.logits, step.done))
    return answers


def same(a, b):
    return len(a) == len(b) and all(
        x == y and done == ended and np.array_equal(p, q) for (x, p, done), (y, q, ended) in zip(a, b, strict=True)
    )


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "float64"]), st.sampled_from([0.0, 1.3]))
def test_every_bit_is_as_without_guesses(seed, numerics, temperature):
    """Guesses that follow the answer for a while: right ones, wrong ones, none, and ids that the model never chose.

    In a batch, the sequence that goes on when the others have ended is guessed at.
    """
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights = trained_like(config, seed)
    rows = int(rng.choice([1, 1, 3]))
    prompts = [draw_ids(rng, config, n).tolist() for n in rng.integers(1, 30, rows)]
    options = {"max_new_tokens": 16, "temperature": temperature, "seed": seed, "numerics": numerics}
    first = by_row(steps(weights, config, prompts, **options), rows)[0]
    options["stop_ids"] = [first[5][0]] if rows > 1 else ()
    expected = by_row(steps(weights, config, prompts, **options), rows)
    whole = [prompt + [id for id, _, _ in row] for prompt, row in zip(prompts, expected, strict=True)]

    def guess(ids, most, choose):
        (text,) = (text for text in whole if text[: len(ids)] == ids.tolist() and len(text) >= len(ids))
        following = text[len(ids) :][:most]
        return [int(rng.integers(config.vocab_size)) if rng.random() < 0.3 else i for i in following]

    cache = KVCache.allocate(config, rows, 64, numerics)
    new = [0] * rows

    def watched():
        for step in steps(weights, config, prompts, cache, prompt_lookup_num_tokens=7, **options):
            new[step.row] += 1
            assert cache.lengths[step.row] == len(prompts[step.row]) + new[step.row] - 1
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "look_up", guess)
        found = by_row(watched(), rows)
    assert all(map(same, found, expected))


@given(st.integers(0, 2**32 - 1))
def test_eight_positions_have_the_bits_of_one(seed):
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights, ids = trained_like(config, seed), draw_ids(rng, config, 40).tolist()
    start, count = int(rng.integers(0, 33)), int(rng.integers(1, 9))
    caches = [KVCache.allocate(config, 1, 64) for _ in range(2)]
    for cache in caches:
        if start:
            forward(weights, config, ids[:start], cache)
    together = forward(weights, config, ids[start : start + count], caches[0])[0]
    for position, row in enumerate(together, start):
        assert np.array_equal(forward(weights, config, ids[position : position + 1], caches[1])[0, 0], row)
    assert np.array_equal(caches[0].k, caches[1].k)
    assert np.array_equal(caches[0].v, caches[1].v)


def test_a_text_that_repeats_itself_takes_fewer_passes(builtin):
    ids = builtin.text.encode("one two three four five six seven eight nine ten. " * 4)

    def force(so_far, logits):
        forced = np.full_like(logits, -np.inf)
        forced[ids[(len(so_far)) % (len(ids) // 4)]] = 0
        return forced

    options = {"max_new_tokens": 60, "stop_ids": (), "logits_processors": [force]}
    found = list(steps(builtin.weights, builtin.config, [ids], prompt_lookup_num_tokens=7, **options))
    passes = sum(not step.guessed for step in found)
    assert passes <= 15  # the estimate rises from 0.7; 8 tokens a pass are the most


@example([0, 1, 2, 0, 1, 0, 0, 2, 0, 2, 1, 0, 1, 2, 0], 1)  # four ids say 1, the last two alone 2
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 7))
def test_look_up(ids, most):
    """By Python's slices: what followed the last four, three or two ids, the longest stretch of at most `most`."""
    found = drafts.look_up(np.array(ids, np.int64), most, None)
    after = []
    for n in (2, 3, 4):
        before = [ids[i : i + most] for i in range(n, len(ids)) if ids[i - n : i] == ids[-n:]]
        after = before or after
    whole = [one for one in after if len(one) == most]
    assert found == (whole[-1] if whole else after[0] if after else [])


def test_as_many_guesses_as_pay_off():
    """With a further row at a tenth of a pass: the most ids for the time, counted out for each number of guesses."""
    ids = np.arange(1000)

    def tries(truth, passes):
        made, found = drafts.Drafts(lambda ids, most, choose: [truth(len(ids) + i) for i in range(most)], 7), []
        place = 1
        for _ in range(passes):
            guesses = made.next(ids[:place], 100, None)
            right = next((n for n, g in enumerate(guesses) if g != place + n), len(guesses))
            found.append(len(guesses))
            place += right + 1
        return found

    always, never = tries(lambda i: i, 20), tries(lambda i: -1, 200)
    assert always[-1] == 7
    assert always == sorted(always)
    assert sum(never) <= 20
    assert max(never[100:]) <= 1


def test_a_wrong_guess_says_nothing_of_those_after_it():
    """Even where more ids have followed without guesses, as in the server while other answers run."""
    made = drafts.Drafts(lambda ids, most, choose: [5, 6, 7][:most], 7)
    assert made.next(np.array([1]), 100, None) == [5, 6, 7]
    made.next(np.array([1, 5, 9, 7, 8]), 100, None)
    right = 0.7 + drafts.WEIGHT * (1 - 0.7)
    assert made.right == pytest.approx(right + drafts.WEIGHT * (0 - right))


def test_a_smaller_model_guesses(builtin):
    """A model that agrees always, as it is the same; at a price of nothing, so that it pays off."""
    ids, options = builtin.text.encode("The capital of France is"), {"max_new_tokens": 40, "stop_ids": ()}
    twin = Model(replace(builtin.config, max_position_embeddings=30), builtin.weights, None, {})
    for more in ({}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.1}):
        expected = list(steps(builtin.weights, builtin.config, [ids], **options, **more))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drafts, "count_parameters", lambda config: {"active": 1 + (config is builtin.config) * 1e9})
            found = list(steps(builtin.weights, builtin.config, [ids], assistant_model=twin, **options, **more))
        assert same(*([(s.id, s.logits, s.done) for s in some] for some in (found, expected)))
        early = found[: 30 - len(ids)]  # later there is no room in the context of the smaller one
        assert sum(step.guessed for step in early) > len(early) / 2
        assert not any(step.guessed for step in found[32 - len(ids) :])  # the one after the last guess is free, too


def test_what_guesses_must_not_disturb(builtin):
    """Edits see what was asked for alone, and a processor sees each id once."""
    ids, seen, calls = [7, 8, 9] * 4, [], []
    options = {"max_new_tokens": 12, "stop_ids": (), "prompt_lookup_num_tokens": 7}

    def edit(name, x):
        seen.extend([x.shape[1]] * (name == "model.embed_tokens"))

    generate(builtin.weights, builtin.config, ids, edit=edit, **options)
    assert seen == [len(ids), *[1] * 11]
    count = lambda so_far, logits: (calls.append(len(so_far)), logits)[1]  # noqa: E731
    options["prompt_lookup_num_tokens"] = None
    generate(builtin.weights, builtin.config, ids, logits_processors=[count], assistant_model=builtin, **options)
    assert calls == list(range(len(ids), len(ids) + 12))


def test_a_cache_that_another_call_changes_between_two_guessed_tokens(builtin):
    ids = [5, 6, 7, 8] * 5
    cache = KVCache.allocate(builtin.config, 1, 100)
    force = lambda so_far, logits: np.where(np.arange(len(logits)) == ids[len(so_far) % 4], 0, -np.inf)  # noqa: E731
    options = {"max_new_tokens": 40, "prompt_lookup_num_tokens": 7, "stop_ids": (), "logits_processors": [force]}
    found = steps(builtin.weights, builtin.config, [ids], cache, **options)
    while not next(found).guessed:
        pass
    forward(builtin.weights, builtin.config, [[1]], cache)
    with pytest.raises(ValueError, match="another call used it meanwhile"):
        list(found)


def test_settings(builtin):
    small = replace(builtin.config, vocab_size=100)
    other = Model(small, {}, None, {})
    with pytest.raises(ValueError, match=r"assistant_model: its vocabulary has 100 ids, and must have the 2048"):
        generate(builtin.weights, builtin.config, [1], max_new_tokens=1, assistant_model=other)
    with pytest.raises(ValueError, match="assistant_model and prompt_lookup_num_tokens both make guesses"):
        generate(
            builtin.weights, builtin.config, [1], max_new_tokens=1, assistant_model=builtin, prompt_lookup_num_tokens=7
        )
    with pytest.raises(ValueError, match="assistant_model must be a Model"):
        generate(builtin.weights, builtin.config, [1], max_new_tokens=1, assistant_model="Qwen/Qwen3-0.6B")
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be a whole number"):
        generate(builtin.weights, builtin.config, [1], max_new_tokens=1, prompt_lookup_num_tokens=-1)
