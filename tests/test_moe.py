"""The router and the experts: properties of their sum, and that only chosen experts' weights are needed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import SEEDS, draw_ids, relative, round_bfloat16, trained_like
from hypothesis import given
from hypothesis import strategies as st

from qwen3np import forward, load, read_checkpoint, save_checkpoint
from qwen3np import loading as loading_module
from qwen3np.numerics import BFLOAT16, named
from qwen3np.qwen3 import Scope, router_weights, swiglu, top_k

FLOAT64 = named("float64")


@pytest.fixture(scope="module")
def sparse(config):
    """Each of 7 experts small, 3 of them for each token."""
    return replace(config, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=12)


def draw(sparse, seed, tokens, name="float64"):
    """Return x (1, S, D), the matrices of one layer, and the routing: indices and weights (1, S, k)."""
    rng, numerics = np.random.default_rng(seed), named(name)
    x = numerics.round(rng.standard_normal((1, tokens, sparse.hidden_size)).astype(numerics.dtype))
    weights = trained_like(replace(sparse, num_hidden_layers=1), seed)
    _, indices, shares = route(x, weights["model.layers.0.mlp.gate.weight"], sparse, numerics)
    return x, weights, indices, shares


def route(x, gate, config, num):
    """Return the router's logits, the chosen experts and their weights, as the model makes them."""
    logits = num.ops.head(x, gate, num)
    probs = num.ops.softmax(logits)
    indices = top_k(probs, config.num_experts_per_tok)
    return logits, indices, router_weights(probs, indices, config, num)


def expert_scope(weights, n):
    return Scope(weights, prefix="model.layers.0.mlp.experts.") / str(n)


def mixed(x, weights, indices, shares, name="float64", engine="fast"):
    num, m = named(name, engine), Scope(weights, prefix="model.layers.0.mlp.experts.")
    return num.ops.combine(x, indices, shares, lambda n, rows: swiglu(rows, m / str(n), num), m, num)


@given(SEEDS, st.integers(1, 40), st.booleans())
def test_the_router_takes_the_largest_of_a_softmax_over_all(sparse, seed, tokens, normalised):
    config = replace(sparse, norm_topk_prob=normalised)
    x, weights, _, _ = draw(sparse, seed, tokens)
    gate = weights["model.layers.0.mlp.gate.weight"]
    logits, indices, shares = route(x, gate, config, FLOAT64)
    np.testing.assert_allclose(logits, np.einsum("bsd,ed->bse", x, gate.astype(np.float64)), rtol=0, atol=1e-13)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    largest = -np.sort(-p, axis=-1)[..., :3]
    if normalised:
        largest /= largest.sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, largest, rtol=1e-13)
    chosen = np.take_along_axis(p, indices, axis=-1)
    np.testing.assert_allclose(chosen, -np.sort(-p, axis=-1)[..., :3], rtol=1e-13)


@pytest.mark.parametrize("normalised", [True, False])
def test_bfloat16_rounds_the_weights_at_the_end(sparse, normalised):
    x, weights, _, _ = draw(sparse, 0, 50, "bfloat16")
    config, gate = replace(sparse, norm_topk_prob=normalised), weights["model.layers.0.mlp.gate.weight"]
    logits, indices, shares = route(x, gate, config, named("bfloat16"))
    np.testing.assert_array_equal(logits, round_bfloat16(logits))
    np.testing.assert_array_equal(shares, round_bfloat16(shares))
    p = np.exp(logits.astype(np.float64))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), indices, axis=-1)
    truth = p / p.sum(-1, keepdims=True) if normalised else p
    np.testing.assert_allclose(shares, truth, rtol=2**-8 + 1e-6)  # one rounding, and not one before the division


def test_of_equal_experts_the_lower_ones_are_taken(sparse):
    logits = np.array([[[1, 3, 2, 3, 2, 2, 0]]], np.float32)
    _, indices, _ = route(logits, np.eye(7, dtype=np.float32), sparse, named("bfloat16"))
    assert indices.tolist() == [[[1, 3, 2]]]


@given(SEEDS, st.integers(1, 40))
def test_all_experts_alike_are_one_mlp(sparse, seed, tokens):
    """Weights that sum to 1 over equal experts change nothing."""
    config = replace(sparse, norm_topk_prob=True)
    x, weights, _, _ = draw(sparse, seed, tokens)
    same = {name: weights[re.sub(r"experts\.\d+", "experts.0", name)] for name in weights}
    _, indices, shares = route(x, weights["model.layers.0.mlp.gate.weight"], config, FLOAT64)
    alone = swiglu(x, expert_scope(weights, 0), FLOAT64)
    np.testing.assert_allclose(mixed(x, same, indices, shares), alone, rtol=0, atol=1e-13)


@given(SEEDS, st.integers(1, 40))
def test_a_permutation_of_the_experts_changes_nothing(sparse, seed, tokens):
    x, weights, indices, shares = draw(sparse, seed, tokens)
    p = np.random.default_rng(seed).permutation(7)
    moved = {
        re.sub(r"experts\.(\d+)", lambda found: f"experts.{p[int(found[1])]}", name): w for name, w in weights.items()
    }
    np.testing.assert_allclose(
        mixed(x, moved, p[indices], shares), mixed(x, weights, indices, shares), rtol=0, atol=1e-13
    )


@given(SEEDS, st.integers(2, 40))
def test_tokens_alone_equal_tokens_together(sparse, seed, tokens):
    x, weights, indices, shares = draw(sparse, seed, tokens)
    together = mixed(x, weights, indices, shares)
    for s in range(tokens):
        at = slice(s, s + 1)
        alone = mixed(x[:, at], weights, indices[:, at], shares[:, at])
        np.testing.assert_allclose(alone, together[:, at], rtol=0, atol=1e-13)


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-grouped"])
def test_where_bfloat16_rounds_the_sum(sparse, name, engine):
    """From each expert's rounded output alone: rounding after each in ascending order, or once, the largest first.

    The plain engine adds in ascending order there too.
    """
    x, weights, indices, shares = draw(sparse, 0, 50, name)
    r, numerics = round_bfloat16, named(name, engine)
    truth = np.zeros_like(x)
    for s in range(50):
        chosen = list(zip(indices[0, s].tolist(), shares[0, s], strict=True))
        for expert, share in chosen if (name, engine) == ("bfloat16-grouped", "fast") else sorted(chosen):
            same = indices[0] == expert  # all tokens of an expert at once, as its matrix product had them
            together = swiglu(x[0, same.any(-1)], expert_scope(weights, expert), numerics)[np.count_nonzero(same[:s])]
            truth[0, s] += r(together * share)
            if name == "bfloat16":
                truth[0, s] = r(truth[0, s])
    truth = r(truth)
    np.testing.assert_array_equal(mixed(x, weights, indices, shares, name, engine), truth)
    other = "bfloat16" if name == "bfloat16-grouped" else "bfloat16-grouped"
    assert np.any(mixed(x, weights, indices, shares, other, engine) != truth)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "bfloat16-grouped"])
def test_bits_do_not_depend_on_storage_and_threads(sparse, name, monkeypatch):
    monkeypatch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)
    for tokens in (1, 3, 40):
        x, weights, indices, shares = draw(sparse, 1, tokens, name)
        stored = {key: w.astype(BFLOAT16) for key, w in weights.items()}
        found = []
        for threads in "123":
            monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
            for kind in (stored, {key: w.astype(np.float32) for key, w in stored.items()}):
                found.append(mixed(x, kind, indices, shares, name))
        for y in found[1:]:
            np.testing.assert_array_equal(y, found[0])


def test_only_the_experts_hit_are_asked_for(sparse):
    x, weights, indices, shares = draw(sparse, 2, 2)
    hit = {str(expert) for expert in indices.ravel()}
    assert len(hit) < 7
    few = {name: w for name, w in weights.items() if ".experts." not in name or name.split(".")[5] in hit}
    np.testing.assert_array_equal(mixed(x, few, indices, shares), mixed(x, weights, indices, shares))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_only_the_experts_hit_are_read_from_a_mapped_file(config, tmp_path):
    large = replace(config, num_experts=16, num_experts_per_tok=1, moe_intermediate_size=4096)
    save_checkpoint(tmp_path / "large", large, trained_like(large, 0), dtype=BFLOAT16)
    config, weights = read_checkpoint(tmp_path / "large")
    expert = 2 * 3 * 4096 * config.hidden_size  # 983,040 bytes

    def resident():
        mapping = Path("/proc/self/smaps").read_text().split(str(tmp_path / "large"))[1]
        return 1024 * int(re.search(r"Rss: +(\d+) kB", mapping)[1])

    before = resident()
    forward(weights, config, [1])
    # one expert a layer; the system maps what is in its memory around each page that is touched, 64 KB at a time
    assert 2 * expert <= resident() - before <= 3 * expert


def test_a_checkpoint_too_large_to_copy_is_mapped(sparse, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "sparse", sparse, trained_like(sparse, 0), dtype=BFLOAT16)
    size = 4 * sum(w.size for w in read_checkpoint(tmp_path / "sparse")[1].values())
    for free, dtype in ((2 * size, np.float32), (2 * size - 1, BFLOAT16)):
        monkeypatch.setattr(loading_module, "available_memory", lambda free=free: free)
        assert {w.dtype for w in load(tmp_path / "sparse", progress=False).weights.values()} == {np.dtype(dtype)}


def test_every_switch_of_the_experts_changes_the_logits(sparse):
    ids = draw_ids(np.random.default_rng(3), sparse, 20)
    weights = trained_like(sparse, 3)
    logits = forward(weights, sparse, ids)
    for change in ({"norm_topk_prob": True}, {"num_experts_per_tok": 2}):
        assert relative(forward(weights, replace(sparse, **change), ids), logits) > 1e-3
    for change in ({"mlp_only_layers": (0,)}, {"decoder_sparse_step": 2}):
        with pytest.raises(ValueError, match=r"there is no .*layers\.0\.mlp\.gate_proj"):
            forward(weights, replace(sparse, **change), ids)
