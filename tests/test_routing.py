"""forward with the experts that somebody recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drawing import SMALL, SMALL_IDS, trained_like

from qwen3np import Config, KVCache, forward

CONFIG = replace(
    Config(**SMALL),
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    mlp_only_layers=(1,),
    num_hidden_layers=3,
)
WEIGHTS, IDS = trained_like(CONFIG, 0), np.array([SMALL_IDS, SMALL_IDS[::-1]])


def recorded(**options):
    """Return logits, the experts (B, S, L, k), and all points."""
    points = {}
    logits = forward(WEIGHTS, CONFIG, IDS, trace=points.__setitem__, **options)
    experts = np.full((2, 8, 3, 2), 77)  # what a dense layer is given does not matter
    for layer in (0, 2):
        experts[:, :, layer] = points[f"model.layers.{layer}.mlp.router_indices"]
    return logits, experts, points


def test_its_own_experts_change_nothing():
    logits, experts, _ = recorded()
    for given in (experts, 0 * experts - 1):
        np.testing.assert_allclose(forward(WEIGHTS, CONFIG, IDS, routed_experts=given), logits, atol=2e-5)
    one = forward(WEIGHTS, CONFIG, IDS[0], routed_experts=experts[0])
    np.testing.assert_allclose(one, logits[:1], atol=2e-5)


def test_given_experts_are_used_with_the_routers_weights():
    _, experts, _ = recorded()
    others = (experts + 1) % 5
    others[0, :4, 0] = -1  # the router's choice stays
    _, seen, points = recorded(routed_experts=others)
    expected = np.where(others < 0, experts, others)
    np.testing.assert_array_equal(seen[:, :, [0, 2]], expected[:, :, [0, 2]])
    logits = points["model.layers.2.mlp.gate"].astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.take_along_axis(probs, seen[:, :, 2], -1)
    np.testing.assert_allclose(points["model.layers.2.mlp.router_weights"], weights, rtol=1e-5)


def test_pieces_with_a_cache_take_their_own_experts():
    _, experts, _ = recorded()
    others = (experts + 2) % 5
    whole = forward(WEIGHTS, CONFIG, IDS, routed_experts=others)
    cache = KVCache.allocate(CONFIG, 2, 8)
    pieces = [forward(WEIGHTS, CONFIG, IDS[:, a:b], cache, routed_experts=others[:, a:b]) for a, b in ((0, 5), (5, 8))]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=2e-5)


def test_an_edit_sees_the_given_experts():
    _, experts, _ = recorded()
    seen = {}

    def edit(name, x):
        seen[name] = x
        return x[..., ::-1] if name.endswith("layers.0.mlp.router_indices") else None

    _, after, _ = recorded(routed_experts=(experts + 1) % 5, edit=edit)
    np.testing.assert_array_equal(seen["model.layers.0.mlp.router_indices"], (experts[:, :, 0] + 1) % 5)
    np.testing.assert_array_equal(after[:, :, 0], (experts[:, :, 0, ::-1] + 1) % 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :7], r"expected integers \(B, S, L, k\) = \(2, 8, 3, 2\)"),
        (lambda x: x.astype(float), "float64"),
        (lambda x: np.where(np.arange(8)[:, None, None] == 3, 4, x), r"\[4, 4\] at row 0, position 3, layer 0"),
        (lambda x: np.where(np.arange(3)[:, None] == 2, x + 5, x), "at row 0, position 0, layer 2"),
        (lambda x: np.where(np.arange(2) == 1, -1, x), "different experts from 0 to 4, or all -1"),
    ],
)
def test_impossible_experts_are_refused(change, message):
    _, experts, _ = recorded()
    with pytest.raises(ValueError, match=f"routed_experts: .*{message}"):
        forward(WEIGHTS, CONFIG, IDS, routed_experts=change(experts))
    dense = replace(Config(**SMALL), num_hidden_layers=3)
    with pytest.raises(ValueError, match="routed_experts: "):
        forward(trained_like(dense, 0), dense, IDS, routed_experts=experts)
    with pytest.raises(ValueError, match="attention_mask"):
        forward(WEIGHTS, CONFIG, IDS, routed_experts=experts, attention_mask=np.ones((2, 8)))
