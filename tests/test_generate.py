"""Generation against a loop without cache or batch: argmax of an uncached forward, one token at a time."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from drawing import draw_config, draw_ids, relative, trained_like
from hypothesis import given
from hypothesis import strategies as st

from qwen3np import (
    ContextOverflowError,
    KVCache,
    forward,
    generate,
    steps,
    stop_at,
    stream,
)
from qwen3np.ops.fast import threads

module = sys.modules["qwen3np.generate"]  # the package's attribute of this name is the function


def naive(weights, config, ids, count, stop_ids=()):
    """Greedy decoding that computes everything again for each token."""
    new = []
    while len(new) < count and not (new and new[-1] in stop_ids):
        new.append(int(np.argmax(forward(weights, config, [*ids, *new])[0, -1])))
    return new


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_greedy_is_the_naive_loop(seed, length, count):
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    weights = trained_like(config, seed)
    ids = draw_ids(rng, config, length).tolist()
    new, cache = generate(weights, config, ids, max_new_tokens=count)
    assert new == naive(weights, config, ids, count)
    assert list(stream(weights, config, ids, max_new_tokens=count)) == new
    assert cache.lengths.tolist() == [length + count - 1]


def test_stops_after_the_stop_id(weights, config):
    free = naive(weights, config, [1, 2, 3], 20)
    stop = free[7]
    expected = free[: free.index(stop) + 1]
    assert generate(weights, config, [1, 2, 3], max_new_tokens=20, stop_ids=[100, stop])[0] == expected


def test_ragged_batch_is_single_runs(weights, config, computed):
    rng = np.random.default_rng(5)
    prompts = [draw_ids(rng, config, n).tolist() for n in (3, 17, 1, 9, 30, 2, 11, 6)]
    # stop ids that end some sequences early and leave others alone
    free = [naive(weights, config, prompt, 12) for prompt in prompts]
    stop_ids = {free[0][2], free[3][5]}
    singles = [naive(weights, config, prompt, 12, stop_ids) for prompt in prompts]
    assert len({len(single) for single in singles}) > 1
    new, cache = generate(weights, config, prompts, max_new_tokens=12, stop_ids=stop_ids)
    assert new == singles
    # each prompt once, then each token but the last of each: a sequence that has ended costs nothing
    assert sum(computed) == sum(map(len, prompts)) + sum(len(single) - 1 for single in singles)
    assert cache.lengths.tolist() == [len(p) + len(s) - 1 for p, s in zip(prompts, singles, strict=True)]


def test_a_batch_of_arrays(weights, config):
    prompts = draw_ids(np.random.default_rng(0), config, 2, 5)
    assert generate(weights, config, prompts, max_new_tokens=3)[0] == [
        naive(weights, config, prompt, 3) for prompt in prompts
    ]


def test_five_turns_pay_for_each_token_once(weights, config, computed):
    rng = np.random.default_rng(1)
    ids, cache = [], None
    for _ in range(5):
        ids += draw_ids(rng, config, 7).tolist()
        expected = naive(weights, config, ids, 6)
        new, cache = generate(weights, config, ids, max_new_tokens=6, cache=cache)
        assert new == expected
        ids += new
    assert sum(computed) == len(ids) - 1  # the last token of all was never an input


def test_an_edit_is_paid_for_from_the_edit_on(weights, config, computed):
    ids = draw_ids(np.random.default_rng(2), config, 40).tolist()
    _, cache = generate(weights, config, ids, max_new_tokens=5)
    edited = [*ids[:25], (ids[25] + 1) % config.vocab_size, *ids[26:]]
    computed.clear()
    assert generate(weights, config, edited, max_new_tokens=5, cache=cache)[0] == naive(weights, config, edited, 5)
    assert computed == [15, 1, 1, 1, 1]


def test_the_same_prompt_again_computes_its_last_token(weights, config, computed):
    ids = [1, 2, 3, 4]
    first, cache = generate(weights, config, ids, max_new_tokens=3)
    computed.clear()
    assert generate(weights, config, ids, max_new_tokens=3, cache=cache)[0] == first
    assert computed == [1, 1, 1]


@pytest.mark.parametrize("pieces", [[8, 8, 8, 6], [8, 8, 8], [8, 8, 1]])
def test_long_prompts_go_in_pieces(weights, config, computed, monkeypatch, pieces):
    monkeypatch.setattr(module, "PREFILL_CHUNK", 8)
    ids = draw_ids(np.random.default_rng(3), config, sum(pieces)).tolist()
    seen = []
    new, _ = generate(weights, config, ids, max_new_tokens=2, progress=seen.append)
    assert computed[: len(pieces)] == pieces
    assert seen == [*pieces, 1, 1]  # and the new ones
    assert new == naive(weights, config, ids, 2)


@pytest.mark.parametrize("numerics", ["float32", "float64", "bfloat16"])
def test_precisions(weights, config, numerics):
    new, cache = generate(weights, config, [5, 6, 7], max_new_tokens=4, numerics=numerics)
    assert str(cache.k.dtype) == numerics
    for count, token in enumerate(new):
        logits = forward(weights, config, [5, 6, 7, *new[:count]], numerics=numerics)
        assert token == int(np.argmax(logits[0, -1]))
    # every step was computed in this precision: what the cache holds is what a forward alone would put there
    whole = KVCache.allocate(config, 1, 8, cache.k.dtype)
    forward(weights, config, [5, 6, 7, *new[:-1]], whole, numerics=numerics)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.05}[numerics]
    np.testing.assert_allclose(
        cache.k[..., :6, :].astype(np.float64), whole.k[..., :6, :].astype(np.float64), rtol=0, atol=tolerance
    )


def test_sampling_is_the_seed_s(weights, config, monkeypatch):
    settings = {"max_new_tokens": 25, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    runs = []
    monkeypatch.setattr(threads, "WORTH_SHARING", 0)  # small as this model is, all threads take part
    for number in ("1", "2"):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", number)
        runs.append(generate(weights, config, [1, 2, 3], seed=7, **settings)[0])
    assert runs[0] == runs[1]
    assert generate(weights, config, [1, 2, 3], seed=8, **settings)[0] != runs[0]
    assert generate(weights, config, [1, 2, 3], **settings)[0] != runs[0]
    # what else is in the batch does not matter, and each row has its own stream
    alone = [generate(weights, config, [1, 2, 3], seed=seed, **settings)[0] for seed in (7, (7, 1), (7, 2))]
    assert alone[0] == runs[0]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    assert generate(weights, config, [[1, 2, 3], [9, 9], [1, 2, 3]], seed=7, **settings)[0][::2] == alone[::2]
    assert generate(weights, config, [1, 2, 3], seed=7, num_return_sequences=3, **settings)[0] == alone
    assert generate(weights, config, [1, 2, 3], seed=[7, 1], num_return_sequences=2, **settings)[0][0] == alone[1]


def test_several_answers_compute_their_prompt_once(weights, config, computed):
    new, cache = generate(weights, config, [[1, 2, 3, 4], [5, 6]], num_return_sequences=2, max_new_tokens=2)
    assert computed == [4, 1, 2, 1, 4]
    assert new[0] == new[1] == generate(weights, config, [1, 2, 3, 4], max_new_tokens=2)[0]
    assert new[2] == new[3] == generate(weights, config, [5, 6], max_new_tokens=2)[0]
    assert cache.lengths.tolist() == [5, 5, 3, 3]
    with pytest.raises(ValueError, match="num_return_sequences must be a whole number >= 1, got 0"):
        generate(weights, config, [1], max_new_tokens=1, num_return_sequences=0)


def test_the_time_is_up(weights, config, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(sys.modules["qwen3np.generate"].time, "monotonic", lambda: next(clock))
    assert len(generate(weights, config, [1], max_new_tokens=50, max_time=3.5)[0]) == 4  # after 1, 2, 3, 4 seconds


def test_ids_that_the_vocabulary_does_not_have(weights, config):
    for name, value in {
        "stop_ids": [101],
        "bad_words_ids": [[1, 2], [3, 101]],
        "sequence_bias": {(101,): 1.0},
        "forced_eos_token_id": 101,
    }.items():
        with pytest.raises(ValueError, match=f"{name}: the vocabulary has no id 101; its ids are 0 to 100"):
            generate(weights, config, [1], max_new_tokens=1, **{name: value})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_a_ragged_one(weights, config, side):
    rows, longest = [[1, 2, 3, 4, 5], [6], [7, 8, 9]], 5
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = np.array([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = np.array(
        [
            [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, pads, strict=True)
        ]
    )
    expected = generate(weights, config, rows, max_new_tokens=4)[0]
    assert generate(weights, config, ids, attention_mask=mask, max_new_tokens=4)[0] == expected
    logits = forward(weights, config, ids, attention_mask=mask)
    last = forward(weights, config, ids, attention_mask=mask, last_only=True)
    for row, kept, found, end in zip(rows, mask == 1, logits, last, strict=True):
        alone = forward(weights, config, row)[0]
        np.testing.assert_allclose(found[kept], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(end[0], alone[-1], rtol=0, atol=1e-5)
        assert not found[~kept].any()


def test_masks_that_are_no_padding(weights, config):
    for mask, words in (
        ([[1, 0, 1]], "row 0 has a hole"),
        ([[0, 0, 0]], "row 0 has no token"),
        ([[1, 1]], r"shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask: {words}"):
            forward(weights, config, [[1, 2, 3]], attention_mask=mask)
    with pytest.raises(ValueError, match="cannot be combined with a cache"):
        forward(weights, config, [[1]], KVCache.allocate(config, 1, 4), attention_mask=[[1]])


def test_a_tensor_that_is_missing_or_transposed_is_named(weights, config):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"there is no {name}, which must be \(56, 40\)"):
        forward({key: w for key, w in weights.items() if key != name}, config, [1])
    with pytest.raises(ValueError, match=rf"{name} is \(40, 56\), and must be \(56, 40\)"):
        forward(weights | {name: weights[name].T}, config, [1])


def test_interrupt_leaves_a_usable_cache(weights, config, monkeypatch):
    ids = [4, 5, 6]
    expected = naive(weights, config, ids, 10)
    cache = KVCache.allocate(config, 1, 20)
    calls = 0

    def interrupted(weights, config, *args, trace=None, **kwargs):
        nonlocal calls
        calls += 1

        def strike(name, array):
            if calls == 4 and name == "model.layers.1.mlp.act":
                raise KeyboardInterrupt

        return forward(weights, config, *args, trace=strike, **kwargs)

    monkeypatch.setattr("qwen3np.guard.forward", interrupted)
    kept = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  what came before it is kept
        for token in stream(weights, config, ids, max_new_tokens=10, cache=cache):
            kept.append(token)
    assert kept == expected[: len(kept)]
    assert len(kept) >= 3
    assert (
        list(stream(weights, config, ids + kept, max_new_tokens=10 - len(kept), cache=cache)) == expected[len(kept) :]
    )


def test_a_cache_that_is_too_small_grows(weights, config):
    ids = [1, 2, 3]
    cache = KVCache.allocate(config, 1, 4)
    assert list(stream(weights, config, ids, max_new_tokens=12, cache=cache)) == naive(weights, config, ids, 12)
    assert cache.max_length >= 14
    cache, prompts = KVCache.allocate(config, 2, 15), [[1, 2], [3] * 9]
    singles = [naive(weights, config, prompt, 12) for prompt in prompts]
    assert generate(weights, config, prompts, max_new_tokens=12, cache=cache)[0] == singles
    assert cache.max_length == 30  # doubled, not just the 20 that it must hold


def test_the_end_of_the_context_is_the_end(weights, config):
    ids = draw_ids(np.random.default_rng(4), config, config.max_position_embeddings - 2).tolist()
    new, cache = generate(weights, config, ids, max_new_tokens=50)
    assert len(new) == 3  # two more fit, and one follows them
    assert cache.lengths.tolist() == [config.max_position_embeddings]


def test_bad_input(weights, config):
    long = [1] * (config.max_position_embeddings + 1)
    with pytest.raises(ContextOverflowError, match=r"prompt 0 has 257 tokens.* 256"):
        generate(weights, config, long, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number >= 1, got 0"):
        generate(weights, config, [1], max_new_tokens=0)
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="empty"):
            generate(weights, config, empty, max_new_tokens=1)
    with pytest.raises(ValueError, match="outside the vocabulary: 0 to 100"):
        generate(weights, config, [3, 101], max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p"):
        generate(weights, config, [1], max_new_tokens=1, top_p=1.5)
    with pytest.raises(ValueError, match="temperature"):
        stream(weights, config, [1], max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="one sequence"):
        stream(weights, config, [[1], [2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="stop_ids must be a collection of ids, got 5"):
        generate(weights, config, [1], max_new_tokens=1, stop_ids=5)
    with pytest.raises(ValueError, match="an empty batch"):
        steps(weights, config, [], KVCache.allocate(config, 1, 8), max_new_tokens=1, stop=bool)
    for nested in ([[[1, 2]]], [[[1], [2]]]):
        with pytest.raises(ValueError, match="must be a flat list of ids"):
            generate(weights, config, nested, max_new_tokens=1)
    with pytest.raises(ValueError, match="holds 2 sequences, but input_ids has 1"):
        generate(weights, config, [1], max_new_tokens=1, cache=KVCache.allocate(config, 2, 8))


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_in_any_pieces(text, stops, cuts):
    cuts = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    found = [text.find(stop) for stop in stops if stop in text]
    assert "".join(stop_at(pieces, stops)) == text[: min(found, default=len(text))]


def test_stop_strings_hold_back_only_what_could_be_one():
    assert list(stop_at(["ab", "x", "y\n", "\nz"], ["\n\n"])) == ["ab", "x", "y"]
    assert list(stop_at(["ab", "\n", "c", "\n"], ["\n\n"])) == ["ab", "\nc", "\n"]
    with pytest.raises(ValueError, match="empty"):
        list(stop_at(["a"], [""]))


@pytest.mark.oracle
def test_greedy_against_transformers():
    import torch
    from oracle import model_of

    rng = np.random.default_rng(11)
    for seed in range(5):
        config = draw_config(rng)
        weights = trained_like(config, seed)
        ids = draw_ids(rng, config, 20).tolist()
        model = model_of(config, weights, "float32")
        free = generate(weights, config, ids, max_new_tokens=24)[0]
        for stop_ids in ([], [free[9], free[15]]):
            with torch.no_grad():
                theirs = model.generate(
                    torch.tensor([ids]),
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=stop_ids or None,
                    pad_token_id=0,
                )
            ours = generate(weights, config, ids, max_new_tokens=24, stop_ids=stop_ids)[0]
            assert ours == theirs[0, len(ids) :].tolist()


def test_prefix_logits_are_those_of_a_plain_forward(weights, config):
    """What a kept prefix leads to, to float32 rounding (measured: 1e-6)."""
    ids = draw_ids(np.random.default_rng(6), config, 50).tolist()
    _, cache = generate(weights, config, ids[:30], max_new_tokens=10)
    cache.reserve(50)
    assert cache.keep_prefix(0, ids) == 30
    logits = forward(weights, config, ids[30:], cache)
    assert relative(logits, forward(weights, config, ids)[:, 30:]) < 3e-6


@pytest.mark.parametrize("other", [[4, 5, 6], [1, 2, 3, 4]])  # as long as what the stream left, and longer
def test_a_stream_whose_cache_was_used_meanwhile_ends_with_an_error(weights, config, other):
    cache = KVCache.allocate(config, 1, 20)
    begun = stream(weights, config, [1, 2, 3], max_new_tokens=9, cache=cache)
    next(begun)
    found, _ = generate(weights, config, other, max_new_tokens=1, cache=cache)
    assert found == generate(weights, config, other, max_new_tokens=1)[0]
    with pytest.raises(ValueError, match=r"^cache: another call used it meanwhile, so this generation cannot go on$"):
        next(begun)


def test_a_stream_whose_cache_went_another_way_ends_with_an_error(weights, config):
    cache = KVCache.allocate(config, 1, 20)
    begun = stream(weights, config, [1, 2, 3], max_new_tokens=9, cache=cache)
    next(begun)
    cache.lengths[:] = 0
    forward(weights, config, [7, 8, 9], cache)
    with pytest.raises(ValueError, match=r"^cache: another call used it meanwhile"):
        next(begun)


def test_a_selection_of_a_cache_that_moved_goes_on_alone(weights, config):
    cache = KVCache.allocate(config, 2, 20)
    begun = stream(weights, config, [1, 2, 3], max_new_tokens=9, cache=cache.select([0]))
    first = next(begun)
    cache.reserve(60)
    assert [first, *begun] == generate(weights, config, [1, 2, 3], max_new_tokens=9)[0]
    assert cache.lengths.tolist() == [3, 0]
    expected = generate(weights, config, [1, 2, 3, 4], max_new_tokens=3)[0]
    assert generate(weights, config, [1, 2, 3, 4], max_new_tokens=3, cache=cache.select([0]))[0] == expected


def test_streams_on_different_sequences_of_one_cache_take_turns(weights, config):
    cache = KVCache.allocate(config, 2, 20)
    prompts = [[1, 2, 3], [4, 5, 6]]
    streams = [
        stream(weights, config, prompt, max_new_tokens=5, cache=cache.select([row]))
        for row, prompt in enumerate(prompts)
    ]
    found = list(zip(*streams, strict=True))
    assert [list(ids) for ids in zip(*found, strict=True)] == generate(weights, config, prompts, max_new_tokens=5)[0]


def test_each_filter_is_passed_on(weights, config):
    """One step at a time, chosen by the filters from logits that a plain forward gives."""
    ids = [1, 2, 3, 3, 7, 7, 9]
    logits = forward(weights, config, ids)[0, -1].astype(np.float64)
    order = np.argsort(-logits)

    def drawn(**filters):
        return {
            generate(weights, config, ids, max_new_tokens=1, temperature=5.0, seed=seed, **filters)[0][0]
            for seed in range(40)
        }

    everything = drawn()
    assert len(everything) > 5
    assert drawn(top_k=2) == set(order[:2].tolist())
    p = np.exp((logits - logits.max()) / 5)
    likely = set(np.flatnonzero(p >= 0.8).tolist())
    assert drawn(min_p=0.8) <= likely
    p = np.sort(p / p.sum())[::-1]
    count = int(np.searchsorted(np.cumsum(p), 0.2)) + 1
    assert drawn(top_p=0.2) <= set(order[:count].tolist())


def test_stream_is_generate_and_no_option_is_lost(weights, config):
    ids = [1, 2, 3, 3, 7, 7, 9]
    options = {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.3, "repetition_penalty": 1.5, "seed": 1}
    options |= {"numerics": "bfloat16", "max_new_tokens": 40}
    options["stop_ids"] = list(dict.fromkeys(generate(weights, config, ids, **options)[0]))[-2:-1]  # comes late
    new, _ = generate(weights, config, ids, **options)
    pieces = []
    assert list(stream(weights, config, ids, progress=pieces.append, **options)) == new
    assert pieces == [len(ids), *[1] * len(new)]
    for name in options.keys() - {"max_new_tokens"}:
        others = {key: value for key, value in options.items() if key != name}
        assert generate(weights, config, ids, **others)[0] != new, name


def test_the_repetition_penalty_counts_the_prompt(weights, config):
    differ = 0
    for seed in range(5):
        ids = draw_ids(np.random.default_rng(seed), config, 80).tolist()  # most of the 101 ids
        logits = forward(weights, config, ids)[0, -1].astype(np.float64)
        penalised = logits.copy()
        penalised[ids] = np.where(logits < 0, logits * 1.7, logits / 1.7)[ids]
        new = generate(weights, config, ids, max_new_tokens=1, repetition_penalty=1.7)[0]
        assert new == [int(np.argmax(penalised))]
        differ += new != [int(np.argmax(logits))]
    assert differ


def test_hidden_states_and_attention_maps(builtin):
    ids = builtin.text.encode("The capital of France is")
    states, maps = builtin.hidden_states("The capital of France is"), builtin.attention_maps(ids)
    w, eps = builtin.weights, builtin.config.rms_norm_eps
    np.testing.assert_array_equal(states[0], np.float32(w["model.embed_tokens.weight"][ids]))
    x = states[-1] / np.sqrt((states[-1] ** 2).mean(-1, keepdims=True) + eps) * np.float32(w["model.norm.weight"])
    logits = x @ np.float32(w["model.embed_tokens.weight"]).T  # tied
    np.testing.assert_allclose(logits, builtin(ids)[0], rtol=0, atol=1e-3)
    assert maps.shape == (4, 4, len(ids), len(ids))
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=0, atol=1e-5)
    assert not np.triu(maps, 1).any()


def test_a_state_of_another_prompt_changes_the_answer(builtin):
    """Activation patching and steering, through generate."""
    france, spain = ("What is the capital of France? It is", "What is the capital of Spain? It is")
    there = builtin.hidden_states(spain)
    ids = builtin.text.encode(france)
    last = builtin.config.num_hidden_layers - 1

    def patch(name, x):
        if name == f"model.layers.{last}" and x.shape[1] == len(ids):
            return np.concatenate([x[:, :-1], there[None, -1, -1:]], axis=1)
        return None

    patched = builtin.generate(ids, max_new_tokens=1, edit=patch)[0]
    assert patched == builtin.generate(builtin.text.encode(spain), max_new_tokens=1)[0]
    embedding, scale = (np.float32(builtin.weights[f"model.{name}.weight"]) for name in ("embed_tokens", "norm"))
    direction = embedding[5]

    def steer(name, x):
        return x + 1e3 * direction if name == f"model.layers.{last}" else None

    loudest = (embedding @ (scale * direction)).argmax()  # what that direction says once nothing else is heard
    assert builtin.generate(ids, max_new_tokens=1, edit=steer)[0] == [loudest]
