"""Differences that are not bugs: other positions, heads in another order, padded batches, bad luck with 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
from drawing import SMALL, draw_ids, trained_like
from foreign import Foreign
from foreign_settings import activations, brain, cache, half, inputs, norms, quantised, tf32

from qwen3np.config import Config
from qwen3np.guard import position_axis
from qwen3np.numerics import BFLOAT16
from qwen3np.porting import compare, record
from qwen3np.porting.diagnose import diagnose

PROMPT, STEPS = 40, 2
Q_ROPE = "model.layers.0.self_attn.q_rope"


@pytest.fixture(scope="module")
def golden(config, short_weights):
    return record(short_weights, config, draw_ids(np.random.default_rng(0), config, 1, PROMPT), steps=STEPS)


# --- positions and heads ----------------------------------------------------------------------------------------------


def later(by):
    """Count positions from another one."""
    return lambda own, at, x, positions: own(x, positions + by)


def test_positions_from_another_one(config, short_weights, golden):
    def run(by, **replaced):
        return Foreign(config, short_weights, rope=later(by), **replaced).run(golden)

    for weights in (short_weights, None):
        found = compare(golden, run(1000), weights=weights)
        assert found.verdict == "rounding"
        assert found.meaning.startswith("positions shifted by 1000, for queries and keys alike")
    dump = Foreign(
        config, short_weights, rope=lambda own, at, x, p: own(x, p + 1000) if not at.prefix else own(x, p)
    ).run(golden)
    found = compare(golden, dump, weights=short_weights)
    assert (found.verdict, found.first_point) == ("different", Q_ROPE)
    dump = Foreign(
        config, short_weights, rope=lambda own, at, x, p: own(x, p + 1000) if not at.prefix else own(x, 2 * p)
    ).run(golden)
    assert compare(golden, dump, weights=short_weights).first_point == Q_ROPE  # decode steps have no shift
    ropes = {k: x for k, x in run(1000).items() if k.endswith("_rope") and "layers.0" in k}
    found = compare(golden, ropes, weights=short_weights)  # nothing shows that the scores are the same
    assert (found.verdict, found.meaning) == ("different", f"a bug at {Q_ROPE}: positions shifted by 1000")


def test_queries_alone_at_other_positions(config, short_weights, golden):
    """Without the keys only right numbers after it show that a shift is harmless."""

    def turned(kinds):
        return lambda own, at, x, positions: own(x, positions + 3 * (at.kind in kinds))

    for kinds, verdict, first in ((("q_rope", "k_rope"), "rounding", None), (("q_rope",), "different", Q_ROPE)):
        dump = Foreign(config, short_weights, rope=turned(kinds)).run(golden)
        dump = {k: x for k, x in dump.items() if not k.endswith(("k_rope", "scores", "probs"))}
        found = compare(golden, dump, weights=short_weights)
        assert (found.verdict, found.first_point) == (verdict, first)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("KV cache in float16", cache(half)),
        pytest.param("KV cache in bfloat16", cache(brain), marks=pytest.mark.slow),
        pytest.param("norms in float16", norms(half), marks=pytest.mark.slow),
        ("matrix products in TF32 or float16", inputs(tf32)),
    ],
)
def test_settings_at_other_positions(config, short_weights, golden, name, setting):
    """As with padding on the left: digits are rounded of other numbers."""
    dump = Foreign(config, short_weights, rope=later(24), **setting).run(golden)
    found = compare(golden, dump, weights=short_weights)
    assert (found.verdict, [s.name for s in found.settings]) == ("rounding", [name])
    assert found.settings[0].explained > 0.9999
    assert "; positions shifted by 24, for queries and keys alike" in found.meaning


def test_two_settings(config, short_weights, golden):
    """Numbers that fall to the other side of a digit of the first setting do not speak against the second."""
    dump = Foreign(config, short_weights, **activations(half), **cache(quantised(0, scale=np.float32))).run(golden)
    found = compare(golden, dump, weights=short_weights)
    names = ["activations in float16", "KV cache in 8 bits, one scale for each head"]
    assert (found.verdict, [s.name for s in found.settings]) == ("rounding", names)


@pytest.mark.parametrize("part", [pytest.param("layers", marks=pytest.mark.slow), "logits"])
@pytest.mark.parametrize(
    ("names", "settings", "short"),
    [
        (["matrix products in TF32 or float16", "KV cache in float16"], cache(half) | inputs(tf32), tf32),
        pytest.param(
            ["inputs quantised to 8 bits in groups of 64", "KV cache in float16"],
            cache(half) | inputs(quantised(64, scale=np.float32)),
            None,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["norms in float16", "KV cache in bfloat16"], cache(brain) | norms(half), None, marks=pytest.mark.slow
        ),
    ],
)
def test_two_settings_seen_from_afar(config, short_weights, golden, part, names, settings, short):
    """Without the points between them neither shows alone: next to the other one its numbers are rounded otherwise."""
    own = {k: w if short is None or w.ndim < 2 else short(w) for k, w in short_weights.items()}
    dump = Foreign(config, own, **settings).run(golden)
    dump = {k: x for k, x in dump.items() if k.endswith("lm_head") or (part == "layers" and k[-1].isdigit())}
    found = compare(golden, dump, weights=short_weights)
    assert (found.verdict, [s.name for s in found.settings]) == ("rounding", names)
    assert f"{' together with '.join(names)} explains " in found.meaning


@pytest.mark.parametrize("short", [half, pytest.param(brain, marks=pytest.mark.slow)], ids=["float16", "bfloat16"])
def test_one_layer_in_16_bits_seen_from_afar(config, short_weights, golden, short):
    def shortened(own, at, *x):
        y = own(*x)
        return short(y) if at.layer == 1 else y

    operations = ("norm", "linear", "rope", "scores", "probs", "context", "act", "add")
    dump = Foreign(config, short_weights, **dict.fromkeys(operations, shortened)).run(golden)
    dump = {k: x for k, x in dump.items() if k.endswith("lm_head")}
    found = compare(golden, dump, weights=short_weights)
    name = f"layers in {'float16' if short is half else 'bfloat16'} (in layer 1 alone)"
    assert (found.verdict, [s.name for s in found.settings]) == ("rounding", [name])


@pytest.mark.slow
def test_what_may_be_rounding_is_said_in_both(config, short_weights, golden):
    """Positions that no point shows, next to a short cache: nothing but the size of the error is known."""
    dump = Foreign(config, short_weights, rope=later(5), **cache(half)).run(golden)
    dump = {k: x for k, x in dump.items() if k.endswith("lm_head")}
    doubt = "; or rounding, if the port computes in 16 bits anywhere: see with --precision bfloat16"
    found, why = (f(golden, dump, weights=short_weights) for f in (compare, diagnose))
    assert (found.verdict, why.verdict) == ("different", "different")
    assert found.meaning.endswith(doubt)
    assert why.meaning.startswith("nothing in the catalogue explains the error at lm_head")
    assert why.meaning.endswith(doubt)


def coarse(own, at, x, positions):
    """Rotate with frequencies in bfloat16, from position 24 on."""
    turns = np.exp(1j * (positions[:, None] + 24) * brain(own.__self__.frequencies()).astype(np.float64))[:, None]
    half = x.shape[-1] // 2
    z = (x[..., :half].astype(np.float64) + 1j * x[..., half:]) * turns
    return np.moveaxis(np.concatenate((z.real, z.imag), -1), 2, 1)


@pytest.mark.parametrize(
    ("cause", "wrong"),
    [
        ("rotary: inv_freq in bfloat16", {"rope": coarse}),
        pytest.param(
            "norm: rms_norm_eps is 1e-4", {"norm": lambda own, at, x: own(x, eps=1e-4)}, marks=pytest.mark.slow
        ),
        pytest.param(
            "attention: scores not scaled",
            {"scores": lambda own, at, *x: own(*x) * np.sqrt(16)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bugs_at_other_positions(config, short_weights, golden, cause, wrong):
    """A bug is found next to the shift: in the rotation, before it, after it."""
    dump = Foreign(config, short_weights, **{"rope": later(24), **wrong}).run(golden)
    found = diagnose(golden, dump, weights=short_weights)
    assert [(c.name, c.sure) for c in found.causes[:1]] == [(cause, True)], found.meaning
    assert not found.unexplained


def test_heads_in_another_order(config, short_weights, golden):
    order = np.r_[48:96, 0:48]  # the heads of the two key heads exchanged
    moved = dict(short_weights)
    for i in range(2):
        at = f"model.layers.{i}.self_attn."
        moved[f"{at}q_proj.weight"] = moved[f"{at}q_proj.weight"][order]
        moved[f"{at}o_proj.weight"] = moved[f"{at}o_proj.weight"][:, order]
        for n in "kv":
            moved[f"{at}{n}_proj.weight"] = np.roll(moved[f"{at}{n}_proj.weight"], 16, 0)
    found = compare(golden, Foreign(config, moved).run(golden), weights=short_weights)
    assert found.verdict == "rounding"
    assert found.meaning.startswith("the same up to the order of the heads")
    alone = dict(short_weights)
    alone["model.layers.0.self_attn.q_proj.weight"] = moved["model.layers.0.self_attn.q_proj.weight"]
    found = compare(golden, Foreign(config, alone).run(golden), weights=short_weights)
    assert (found.verdict, found.first_point) == ("different", "model.layers.0.self_attn.q_proj")


# --- padded batches of equal prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_padded_batches(golden, short_weights, left):
    """Three times the same prompt, padded to 64 positions: every copy counts."""

    def padded(x, axis, value):
        return np.pad(
            x, [(0, 0) if i != axis else (24, 0) if left else (0, 24) for i in range(x.ndim)], constant_values=value
        )

    dump = {}
    for name, x in golden.points.items():
        x = np.concatenate([x] * 3)
        if not name.startswith("decode."):
            x = padded(x, position_axis(name), 7)
        if name.endswith(("scores", "probs")):
            x = padded(x, 3, -np.inf if name.endswith("scores") else 0)
        dump[name] = x
    assert (
        compare(golden, dump, weights=short_weights).meaning == "equal in every bit; all 123 recorded points compared"
    )
    for name in ("lm_head", "decode.1.model.layers.1", "model.layers.0.self_attn.scores"):
        for i in range(3):
            x = dump[name].copy()
            x[i, ..., -1 if left else 0, -1 if left else 0] += 1
            assert compare(golden, {name: x}).first_point == name
    last = {name: x[:, -1:] if left else x[:, 39:40] for name, x in dump.items() if name in ("lm_head", "model.norm")}
    found = compare(golden, last)
    assert (found.verdict, found.points[0].notes) == ("equal", ("only the last position", "3 equal sequences"))


# --- luck -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "seeds"), [(BFLOAT16, (199,)), (np.float16, (39, 55, 76, 156, 161))], ids=["bfloat16", "float16"]
)
def test_numbers_that_nearly_cancel(short, seeds):
    """The residual sum is 1/50 of its terms: in 16 bits one right program is far off, and another one lucky."""
    config = Config(
        **{**SMALL, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "head_dim": 4, "num_hidden_layers": 1}
    )
    for seed in seeds:
        weights = trained_like(config, seed)
        x, layer = weights["model.embed_tokens.weight"][3], "model.layers.0."
        normed = x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * weights[f"{layer}input_layernorm.weight"]
        context = np.repeat((weights[f"{layer}self_attn.v_proj.weight"] @ normed).reshape(2, 4), 2, 0).ravel()
        o = weights[f"{layer}self_attn.o_proj.weight"]
        o -= np.outer(0.98 * x + o @ context, context) / (context @ context)
        weights = {name: w.astype(BFLOAT16) for name, w in weights.items()}
        golden = record(weights, config, [[3]])
        found = compare(golden, Foreign(config, weights, short).run(golden))
        assert found.verdict == "rounding", (seed, found.meaning)
