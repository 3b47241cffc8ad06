"""attend, the attention of one sequence: properties of softmax(q kᵀ) v, and a loop over single queries."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from drawing import SEEDS, attended, round_bfloat16
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.numerics import NUMERICS, named
from qwen3np.ops.fast.attention import attend_one

FLOAT64 = named("float64")
NAMES = st.sampled_from(list(NUMERICS))


@pytest.fixture(
    scope="module", params=[None, (6, 4, 24), (3, 1, 2)], ids=["whole rows", "blocks", "small blocks"], autouse=True
)
def blocks(request):
    """Every property holds however the scores are cut: (rows, keys, elements) of a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)
        for name, size in zip(("ROWS", "KEYS", "SCORES"), request.param or (), strict=False):
            patch.setattr(f"qwen3np.ops.fast.attention.BLOCK_{name}", size)
        yield


def draw(seed, name="float64"):
    """Return q (H, S, Dh), k and v (K, T, Dh), in the dtype of this precision, and the generator."""
    rng, numerics = np.random.default_rng(seed), named(name)
    kv_heads, group, new = (int(n) for n in rng.integers(1, (4, 5, 7)))
    total, head_dim = new + int(rng.integers(0, 6)), 2 * int(rng.integers(1, 9))
    sizes = (kv_heads * group, new, head_dim), (kv_heads, total, head_dim), (kv_heads, total, head_dim)
    q, k, v = (numerics.round(rng.standard_normal(size).astype(numerics.dtype)) for size in sizes)
    return q, k, v, rng


def by_heads(context, heads):
    """(S, H * Dh) -> (H, S, Dh)."""
    return np.swapaxes(context.reshape(len(context), heads, -1), 0, 1)


@given(SEEDS)
def test_matches_one_query_at_a_time(seed):
    q, k, v, _ = draw(seed)
    context, scores, probs = attended(q, k, v, FLOAT64)
    heads, new, dh = q.shape
    total, group = k.shape[1], heads // len(k)
    assert (context.dtype, scores.dtype, probs.dtype) == (np.float64,) * 3
    for h, s in np.ndindex(heads, new):
        visible = total - new + s + 1
        products = [math.fsum(q[h, s] * key) / math.sqrt(dh) for key in k[h // group, :visible]]
        exps = [math.exp(p - max(products)) for p in products]
        shares = [e / math.fsum(exps) for e in exps]
        out = [math.fsum(p * x for p, x in zip(shares, lane, strict=False)) for lane in v[h // group].T]
        np.testing.assert_allclose(scores[h, s, :visible], products, rtol=0, atol=1e-14)
        np.testing.assert_allclose(probs[h, s, :visible], shares, rtol=1e-13)
        np.testing.assert_allclose(context[s, h * dh : (h + 1) * dh], out, rtol=0, atol=1e-14)


def test_a_key_that_outweighs_all_others_may_be_in_any_block():
    v = np.arange(24.0).reshape(1, 12, 2)
    for place in range(12):
        k = np.zeros((1, 12, 2))
        k[0, place] = 2000  # e^2000 overflows
        np.testing.assert_array_equal(attend_one(np.ones((1, 1, 2)), k, v, FLOAT64), v[:, place])


@given(SEEDS, NAMES)
def test_no_later_key_or_value_moves_an_earlier_output(seed, name):
    q, k, v, rng = draw(seed, name)
    new, total = q.shape[1], k.shape[1]
    before = attended(q, k, v, named(name))
    s = int(rng.integers(0, new))
    later = slice(total - new + s + 1, None)  # what query s must not see
    k, v = k.copy(), v.copy()
    k[:, later], v[:, later] = 100 * rng.standard_normal(k[:, later].shape), 1e30
    after = attended(q, k, v, named(name))
    np.testing.assert_array_equal(after[0][: s + 1], before[0][: s + 1])
    for a, b in zip(after[1:], before[1:], strict=True):
        np.testing.assert_array_equal(a[:, : s + 1], b[:, : s + 1])


@given(SEEDS, NAMES)
def test_probabilities_sum_to_1_and_are_0_where_hidden(seed, name):
    q, k, v, _ = draw(seed, name)
    _, scores, probs = attended(q, k, v, named(name))
    _, new, total = probs.shape
    hidden = np.arange(total) > np.arange(total - new, total)[:, None]
    np.testing.assert_array_equal(scores == -np.inf, np.broadcast_to(hidden, probs.shape))
    assert not probs[:, hidden].any()
    assert probs.min() >= 0
    tolerance = {"float64": 1e-15, "float32": 3e-7}.get(name, 2**-8)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=tolerance)


@given(SEEDS, NAMES)
def test_a_window_hides_what_lies_before_it_and_nothing_else(seed, name):
    q, k, v, rng = draw(seed, name)
    numerics, new, total = named(name), q.shape[1], k.shape[1]
    window = int(rng.integers(1, total + 2))
    context, scores, probs = attended(q, k, v, numerics, window)
    at = np.arange(total - new, total)[:, None]
    hidden = (np.arange(total) > at) | (np.arange(total) <= at - window)
    np.testing.assert_array_equal(scores == -np.inf, np.broadcast_to(hidden, probs.shape))
    assert not probs[:, hidden].any()
    tolerance = {"float64": 1e-14, "float32": 3e-6}.get(name, 0.03)
    for s in range(new):  # the same query, and no other key than those of the window
        end = total - new + s + 1
        seen = slice(max(end - window, 0), end)
        alone, _, _ = attended(q[:, s : s + 1], k[:, seen], v[:, seen], numerics)
        np.testing.assert_allclose(context[s], alone[0], rtol=0, atol=tolerance)
    if window >= total:
        np.testing.assert_array_equal(context, attended(q, k, v, numerics)[0])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_keys_that_a_window_hides_are_not_touched(name):
    q, k, v, _ = draw(3, name)
    k, v = np.repeat(k, 50, axis=1), np.repeat(v, 50, axis=1)
    total, new, window = k.shape[1], q.shape[1], 4
    context = attended(q, k, v, named(name), window)[0]
    k[:, : total - new - window + 1], v[:, : total - new - window + 1] = np.nan, np.nan  # 0 * nan would be nan
    np.testing.assert_array_equal(attended(q, k, v, named(name), window)[0], context)


@given(SEEDS, st.floats(-1000, 1000))
def test_a_constant_added_to_the_scores_of_a_query_changes_nothing(seed, size):
    q, k, v, rng = draw(seed)
    # the same vector added to every key adds one number to all scores of a query
    vector = size * rng.standard_normal((len(k), 1, k.shape[-1])) / math.sqrt(k.shape[-1])
    context, _, probs = attended(q, k, v, FLOAT64)
    moved = attended(q, k + vector, v, FLOAT64)
    np.testing.assert_allclose(moved[2], probs, rtol=0, atol=1e-11)
    np.testing.assert_allclose(moved[0], context, rtol=0, atol=1e-11)


@given(SEEDS, NAMES)
def test_one_visible_key_returns_its_value(seed, name):
    q, k, v, _ = draw(seed, name)
    context, _, _ = attended(q[:, :1], k[:, :1], v[:, :1], named(name))
    values = np.repeat(v[:, 0], len(q) // len(v), axis=0)  # (H, Dh)
    np.testing.assert_array_equal(context, values.reshape(1, -1))


@given(SEEDS)
def test_output_lies_in_the_convex_hull_of_the_visible_values(seed):
    q, k, v, rng = draw(seed)
    context = by_heads(attended(q, k, v, FLOAT64)[0], len(q))
    directions = np.concatenate([np.eye(v.shape[-1]), rng.standard_normal((20, v.shape[-1]))])
    values, outputs = np.repeat(v @ directions.T, len(q) // len(v), axis=0), context @ directions.T
    for s in range(q.shape[1]):  # in no direction beyond the farthest value
        seen = values[:, : v.shape[1] - q.shape[1] + s + 1]
        assert np.all(outputs[:, s] <= seen.max(1) + 1e-13)
        assert np.all(outputs[:, s] >= seen.min(1) - 1e-13)


@given(SEEDS)
def test_grouped_heads_equal_repeated_keys_and_values(seed):
    q, k, v, _ = draw(seed)
    group = len(q) // len(k)
    repeated = attended(q, np.repeat(k, group, axis=0), np.repeat(v, group, axis=0), FLOAT64)
    for grouped, truth in zip(attended(q, k, v, FLOAT64), repeated, strict=True):
        np.testing.assert_allclose(grouped, truth, rtol=0, atol=1e-14)


@given(SEEDS, NAMES)
def test_a_permutation_of_the_groups_permutes_the_output(seed, name):
    q, k, v, rng = draw(seed, name)
    p = rng.permutation(len(k))
    moved = q.reshape(len(k), -1, *q.shape[1:])[p].reshape(q.shape)
    context, _, _ = attended(q, k, v, named(name))
    groups = by_heads(context, len(k))
    np.testing.assert_array_equal(by_heads(attended(moved, k[p], v[p], named(name))[0], len(k)), groups[p])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_positions(name, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "1")
    for size, value in (("ROWS", 64), ("KEYS", 64), ("SCORES", 1 << 12)):
        monkeypatch.setattr(f"qwen3np.ops.fast.attention.BLOCK_{size}", value)
    rng, peaks = np.random.default_rng(0), []
    q, keys = (named(name).round(rng.standard_normal(size, np.float32)) for size in ((4, 32, 8), (2, 8192, 8)))
    for total in (1024, 8192):
        tracemalloc.start()
        attend_one(q, keys[:, :total], keys[:, :total], named(name))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # all scores of the longer one are 4 MB, those of a block 16 KB; bfloat16 needs whole rows, but not many of them
    assert peaks[1] < 1 << 20
    assert name == "bfloat16" or peaks[1] < 2 * peaks[0]


@given(SEEDS, NAMES)
def test_neither_threads_nor_what_is_recorded_move_a_bit(seed, name):
    q, k, v, _ = draw(seed, name)
    with pytest.MonkeyPatch.context() as patch:
        contexts = [attended(q, k, v, named(name))[0]]
        for threads in "123":
            patch.setenv("QWEN3NP_NUM_THREADS", threads)
            contexts.append(attend_one(q, k, v, named(name)))
    for context in contexts[1:]:
        np.testing.assert_array_equal(context, contexts[0])


@given(SEEDS)
def test_queries_one_by_one_equal_queries_together(seed):
    q, k, v, _ = draw(seed)
    context, _, _ = attended(q, k, v, FLOAT64)
    earlier = k.shape[1] - q.shape[1]
    for s in range(q.shape[1]):
        end = earlier + s + 1
        alone, _, _ = attended(q[:, s : s + 1], k[:, :end], v[:, :end], FLOAT64)
        np.testing.assert_allclose(alone[0], context[s], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dh", [6, 16, 128])
def test_bfloat16_rounds_product_scaling_softmax_and_context(dh):
    rng, r, numerics = np.random.default_rng(dh), round_bfloat16, named("bfloat16")
    # small whole numbers: the sums are exact in any order, so that only the roundings are seen
    q, k = rng.integers(-3, 4, (4, 5, dh)).astype(np.float32), rng.integers(-3, 4, (2, 9, dh)).astype(np.float32)
    v = rng.integers(-3, 4, (2, 9, dh)).astype(np.float32)
    q[:, -1] += 11
    context, scores, probs = attended(q, k, v, numerics)
    hidden = np.arange(9) > np.arange(4, 9)[:, None]
    products = r(np.einsum("hsd,htd->hst", q, np.repeat(k, 2, 0)))
    truth = np.where(hidden, -np.inf, r((products * np.float64(dh**-0.5)).astype(np.float32)))
    np.testing.assert_array_equal(scores, truth)
    exps = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    truth = r((exps / exps.sum(-1, keepdims=True)).astype(np.float32))
    np.testing.assert_array_equal(probs, truth)
    truth = r(np.einsum("hst,htd->shd", probs.astype(np.float64), np.repeat(v, 2, 0)).astype(np.float32))
    np.testing.assert_array_equal(context, truth.reshape(5, -1))
