"""KVCache: however a text is split and batched, the logits equal those of the whole text, alone and uncached."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
from drawing import SEEDS, draw_any_config, draw_ids, relative, trained_like
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3np import ContextOverflowError, KVCache, forward
from qwen3np.numerics import BFLOAT16, NUMERICS

# Relative L2: a product of another shape is summed in another order. 1.4e-15, 7.7e-7 and 1.4e-4 were measured; in
# bfloat16 the order can tip single roundings, and this leaves room for a few of them.
TOLERANCE = {"float64": 1e-14, "float32": 3e-6, "bfloat16": 1e-3, "bfloat16-grouped": 1e-3}


def snapshot(cache):
    return {
        field.name: getattr(cache, field.name).copy()
        for field in fields(cache)
        if field.name not in ("origin", "whole")
    }


def assert_unchanged(cache, before):
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(cache, name), array, name)


def decode(weights, config, ids, cache, numerics="float64"):
    """Feed ids (B, S) one position at a time; return the logits of all of them."""
    steps = [forward(weights, config, ids[:, s : s + 1], cache, numerics=numerics) for s in range(ids.shape[1])]
    return np.concatenate(steps, 1)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_cached_equals_uncached_over_every_split(weights, config, numerics):
    n = 7
    ids = draw_ids(np.random.default_rng(0), config, 1, n)
    whole = forward(weights, config, ids, numerics=numerics)
    cache = KVCache.allocate(config, 1, n, np.float64)
    for cuts in itertools.product([False, True], repeat=n - 1):
        cache.lengths[:] = 0
        parts = np.split(ids, 1 + np.flatnonzero(cuts), axis=1)
        logits = np.concatenate([forward(weights, config, part, cache, numerics=numerics) for part in parts], 1)
        assert relative(logits, whole) < TOLERANCE[numerics]
        np.testing.assert_array_equal(cache.lengths, n)
        np.testing.assert_array_equal(cache.ids, ids)


@given(SEEDS)
@settings(max_examples=15)
def test_cached_equals_uncached_for_drawn_configs(seed):
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights, ids = trained_like(config, seed), draw_ids(rng, config, int(rng.integers(1, 3)), 40)
    whole = forward(weights, config, ids, numerics="float64")
    cache = KVCache.allocate(config, len(ids), 45, np.float64)
    parts = np.split(ids, np.sort(rng.integers(1, 40, 3)), axis=1)
    logits = [forward(weights, config, p, cache, numerics="float64") for p in parts if p.size]
    assert relative(np.concatenate(logits, 1), whole) < TOLERANCE["float64"]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), SEEDS)
def test_a_padded_batch_equals_its_sequences_alone(weights, config, prompts, seed):
    rng = np.random.default_rng(seed)
    ids = draw_ids(rng, config, len(prompts), max(prompts))  # what stands behind a prompt is padding
    more = draw_ids(rng, config, len(prompts), 3)
    cache = KVCache.allocate(config, len(prompts), max(prompts) + 3, np.float64)
    logits = forward(weights, config, ids, cache, numerics="float64")
    cache.lengths[:] = prompts
    steps = decode(weights, config, more, cache)
    for b, length in enumerate(prompts):
        text = np.concatenate([ids[b, :length], more[b]])
        alone = forward(weights, config, text, numerics="float64")[0]
        assert relative(logits[b, :length], alone[:length]) < TOLERANCE["float64"]
        assert relative(steps[b], alone[length:]) < TOLERANCE["float64"]
        assert cache.lengths[b] == length + 3
        np.testing.assert_array_equal(cache.ids[b, : length + 3], text)


@given(st.permutations(range(3)), st.integers(1, 3), SEEDS)
def test_selected_sequences_go_on_alone(weights, config, order, count, seed):
    rng = np.random.default_rng(seed)
    ids, more = draw_ids(rng, config, 3, 6), draw_ids(rng, config, count, 2)
    cache = KVCache.allocate(config, 3, 8, np.float64)
    rows = order[:count]
    for b in range(3):  # prompts of 4, 5 and 6 ids, each into its own sequence
        forward(weights, config, ids[b : b + 1, : 4 + b], cache.select([b]), numerics="float64")
    steps = decode(weights, config, more, cache.select(rows))
    for i, b in enumerate(rows):
        text = np.concatenate([ids[b, : 4 + b], more[i]])
        assert relative(steps[i], forward(weights, config, text, numerics="float64")[0, 4 + b :]) < TOLERANCE["float64"]
        np.testing.assert_array_equal(cache.ids[b, : 6 + b], text)
    np.testing.assert_array_equal(cache.lengths, [4 + b + 2 * (b in rows) for b in range(3)])
    # a selection of a selection: the same sequences, counted from the first cache
    np.testing.assert_array_equal(cache.select(order).select([2, 0]).rows, [order[2], order[0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_what_lies_behind_the_lengths_is_never_read(weights, config, dtype):
    ids = draw_ids(np.random.default_rng(1), config, 2, 9)
    numerics = "bfloat16" if dtype == BFLOAT16 else "float32"

    def run(stale):
        cache = KVCache.allocate(config, 2, 9, dtype)
        cache.k[:], cache.v[:], cache.ids[:] = stale, stale, -1
        logits = [forward(weights, config, ids[:, :4], cache, numerics=numerics)]
        cache.lengths[:] = 4, 2
        for array in (cache.k, cache.v):
            array[:, 0, :, 4:], array[:, 1, :, 2:] = stale, stale
        logits += [forward(weights, config, ids[:, s : s + 1], cache, numerics=numerics) for s in (4, 5)]
        return np.concatenate(logits, 1)

    np.testing.assert_array_equal(run(np.nan), run(0))


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=10)
def test_reserve_makes_room_and_keeps_the_contents(weights, config, room, wanted):
    ids = draw_ids(np.random.default_rng(2), config, 2, room)
    cache = KVCache.allocate(config, 2, room, np.float64)
    forward(weights, config, ids, cache, numerics="float64")
    cache.lengths[:] = (room + 1) // 2, room  # the first is not the longest
    before = snapshot(cache)
    cache.reserve(wanted)
    assert cache.max_length == cache.ids.shape[1] == cache.v.shape[3] == max(room, wanted)
    for b, length in enumerate(before["lengths"]):
        np.testing.assert_array_equal(cache.k[:, b, :, :length], before["k"][:, b, :, :length])
        np.testing.assert_array_equal(cache.v[:, b, :, :length], before["v"][:, b, :, :length])
        np.testing.assert_array_equal(cache.ids[b, :length], before["ids"][b, :length])
    np.testing.assert_array_equal(cache.lengths, before["lengths"])
    if wanted > room:
        new = draw_ids(np.random.default_rng(3), config, 2, wanted - room)
        step = forward(weights, config, new, cache, numerics="float64")
        text = np.concatenate([ids, new], 1)[1]
        assert relative(step[1], forward(weights, config, text, numerics="float64")[0, room:]) < TOLERANCE["float64"]


@given(st.integers(0, 8), st.lists(st.integers(0, 2), max_size=3), SEEDS)
def test_keep_prefix_drops_what_differs(weights, config, common, others, seed):
    ids = np.random.default_rng(seed).integers(0, 3, (2, 8))
    wanted = [*ids[1, :common].tolist(), *others]
    cache = KVCache.allocate(config, 2, 8)
    forward(weights, config, ids, cache)
    cache.lengths[:] = 4, 6  # what lies behind is not held, even if it would match
    kept = cache.select([1]).keep_prefix(0, wanted)
    same = [held == new for held, new in zip(ids[1, :6], wanted, strict=False)]
    assert kept == len(list(itertools.takewhile(bool, same)))
    np.testing.assert_array_equal(cache.lengths, [4, kept])


@pytest.mark.parametrize("lengths", [(5, 8), (8, 0), (8, 8)])
def test_a_full_cache_is_refused_and_unchanged(weights, config, lengths):
    ids = draw_ids(np.random.default_rng(4), config, 2, 8)
    cache = KVCache.allocate(config, 2, 8)
    forward(weights, config, ids, cache)
    cache.lengths[:] = lengths
    before = snapshot(cache)
    full = lengths.index(8)
    with pytest.raises(ContextOverflowError, match=rf"sequence {full} holds 8 of 8 positions; 1 more do not fit"):
        forward(weights, config, ids[:, :1], cache)
    assert_unchanged(cache, before)
    other = cache.select([1 - full])
    if lengths != (8, 8):
        forward(weights, config, ids[:1, :1], other)  # the sequence that has room still goes on
        assert cache.lengths[1 - full] == lengths[1 - full] + 1


def test_a_cache_takes_as_many_positions_as_it_has(weights, config):
    cache = KVCache.allocate(config, 1, 8)
    forward(weights, config, np.zeros((1, 8), int), cache)
    assert cache.lengths[0] == 8
    with pytest.raises(ContextOverflowError, match="9 more do not fit"):
        forward(weights, config, np.zeros((1, 9), int), KVCache.allocate(config, 1, 8))


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_that_cannot_be_is_refused(weights, config, length):
    cache = KVCache.allocate(config, 1, 8)
    cache.lengths[0] = length
    with pytest.raises(ContextOverflowError):
        forward(weights, config, [1], cache)


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("numerics", NUMERICS)
def test_an_exception_on_the_way_leaves_the_cache_ready_for_another_try(weights, config, numerics):
    ids = draw_ids(np.random.default_rng(5), config, 2, 8)
    straight, cache = (KVCache.allocate(config, 2, 12, np.float64) for _ in range(2))
    for each in (straight, cache):
        forward(weights, config, ids, each, numerics=numerics)
        each.lengths[:] = 8, 3
    names = []
    truth = forward(weights, config, ids[:, :2], straight, numerics=numerics, trace=lambda name, _: names.append(name))
    for stop in names:

        def interrupt(name, _, stop=stop):
            if name == stop:
                raise InterruptedHereError

        before = {name: array for name, array in snapshot(cache).items() if name not in "kv"}
        with pytest.raises(InterruptedHereError):
            forward(weights, config, ids[:, ::3], cache, numerics=numerics, trace=interrupt)
        assert_unchanged(cache, before)
    np.testing.assert_array_equal(forward(weights, config, ids[:, :2], cache, numerics=numerics), truth)
    np.testing.assert_array_equal(cache.lengths, straight.lengths)


def test_a_bfloat16_cache_loses_nothing(weights, config):
    ids = draw_ids(np.random.default_rng(6), config, 2, 12)
    runs = {}
    for dtype in (BFLOAT16, np.float32, np.float64):
        cache = KVCache.allocate(config, 2, 12, dtype)
        prompt = forward(weights, config, ids[:, :8], cache, numerics="bfloat16")
        cache.lengths[:] = 8, 5
        steps = decode(weights, config, ids[:, 8:], cache, "bfloat16")
        runs[np.dtype(dtype)] = [prompt, steps, cache.k.astype(np.float64), cache.v.astype(np.float64)]
    for other in (np.float32, np.float64):
        for array, truth in zip(runs[np.dtype(other)], runs[BFLOAT16], strict=True):
            np.testing.assert_array_equal(array, truth)


ROUNDED = {"bfloat16", "bfloat16-grouped"}
ALLOWED = {"bfloat16": ROUNDED, "float32": ROUNDED | {"float32"}, "float64": set(NUMERICS)}


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", ALLOWED)
def test_a_cache_takes_the_precisions_it_can_hold(weights, config, dtype, numerics):
    cache = KVCache.allocate(config, 1, 8, BFLOAT16 if dtype == "bfloat16" else dtype)
    if numerics in ALLOWED[dtype]:
        forward(weights, config, [1, 2], cache, numerics=numerics)
        assert cache.lengths[0] == 2
    else:
        with pytest.raises(ValueError, match=f"dtype {dtype} cannot hold numerics '{numerics}'"):
            forward(weights, config, [1, 2], cache, numerics=numerics)
        assert not cache.lengths.any()
        assert not cache.k.any()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_key_value_heads": 3}, {"head_dim": 18}])
def test_a_cache_of_another_config_is_refused(weights, config, change):
    cache = KVCache.allocate(replace(config, **change), 1, 8)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"made for another config.*\(2, 2, 16\)"):
        forward(weights, config, [1, 2], cache)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_does_not_fit_is_refused(weights, config, batch):
    cache = KVCache.allocate(config, 2, 8)
    with pytest.raises(ValueError, match=f"holds 2 sequences, but input_ids has {batch}"):
        forward(weights, config, np.ones((batch, 2), int), cache)
    assert not cache.lengths.any()


def test_allocate(config):
    cache = KVCache.allocate(config, 3, 7, BFLOAT16)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 7, 16)
    assert cache.k.dtype == cache.v.dtype == BFLOAT16
    assert (cache.batch_size, cache.max_length) == (3, 7)
    assert KVCache.allocate(config).max_length == config.max_position_embeddings
    assert KVCache.allocate(config).k.dtype == np.float32
    for wrong in ({"batch_size": 0}, {"max_length": 0}, {"batch_size": -1}, {"dtype": np.float16}, {"dtype": int}):
        with pytest.raises(ValueError, match=r"^KVCache: "):
            KVCache.allocate(config, **wrong)


def test_a_selection_neither_grows_nor_holds_a_sequence_twice(config):
    cache = KVCache.allocate(config, 3, 4)
    with pytest.raises(ValueError, match="a selection cannot grow"):
        cache.select([0, 2]).reserve(5)
    for twice in ([1, 1], [0, -3]):
        with pytest.raises(ValueError, match="selected twice"):
            cache.select(twice)


def test_a_selection_of_all_cannot_grow_either(config, weights):
    cache = KVCache.allocate(config, 1, 8)
    forward(weights, config, [1, 2, 3], cache)
    with pytest.raises(ValueError, match="a selection cannot grow"):
        cache.select([0]).reserve(16)


def test_a_pickled_cache_goes_on(config, weights):
    cache = KVCache.allocate(config, 1, 8)
    forward(weights, config, [1, 2, 3], cache)
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(forward(weights, config, [4], copy), forward(weights, config, [4], cache))
