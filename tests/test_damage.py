"""Damage, against plain forwards over dictionaries with exchanged entries, ggml's package, and llama.cpp's figures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from drawing import SMALL, draw_ids, trained_like

import qwen3np
from qwen3np import Config, Model, forward
from qwen3np.audit.damage_activations import activations
from qwen3np.audit.damage_kinds import what_if
from qwen3np.audit.damage_picture import draw
from qwen3np.cli import main

DENSE = Config(**SMALL | {"intermediate_size": 64, "head_dim": 32})
UNTIED_BIAS = replace(DENSE, attention_bias=True, num_hidden_layers=3)
TIED = replace(DENSE, tie_word_embeddings=True)
SPARSE = replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {"untied, biases": UNTIED_BIAS, "tied": TIED, "experts": SPARSE}
WINDOW = 16


def model(config, weights=None):
    return Model(config, weights or trained_like(config, 0), None, {})


def plain(weights):
    """Return the numbers that stored formats stand for."""
    return {name: np.asarray(w) for name, w in weights.items()}


def figures(config, reference, other, ids, edit=None):
    """Return KL, flips and both perplexities of the second halves of windows, in float64, by their definitions."""
    kl, flips, surprise = [], [], []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        one = ids[start : start + WINDOW]
        p, q = (
            np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True)))
            for z in (
                forward(reference, config, one, numerics="float64", engine="plain")[0],
                forward(other, config, one, numerics="float64", engine="plain", edit=edit)[0],
            )
        )
        for n in range(WINDOW // 2, WINDOW - 1):
            kl.append(np.sum(p[n] * np.log(p[n] / q[n])))
            flips.append(np.argmax(p[n]) != np.argmax(q[n]))
            surprise.append([-np.log(x[n, one[n + 1]]) for x in (p, q)])
    return np.array(kl), np.mean(flips), np.exp(np.mean(surprise, axis=0))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """A reference, what int8 makes of it, ids, and the damage, with a short cache."""
    config = CONFIGS[request.param]
    reference = model(config)
    quantised = what_if(reference.weights, "q4_0")
    ids = draw_ids(np.random.default_rng(1), config, 3 * WINDOW + 3).tolist()
    found = qwen3np.damage(reference, "q4_0", ids, window=WINDOW, progress=False)
    return reference, quantised, ids, found


def test_totals(case):
    reference, quantised, ids, found = case
    kl, flips, (before, after) = figures(reference.config, reference.weights, plain(quantised), ids)
    t = found.totals
    assert (found.windows, found.window, t.tokens) == (3, WINDOW, len(kl))
    wanted = [kl.mean(), kl.std() / np.sqrt(len(kl) - 1), np.median(kl), np.quantile(kl, 0.99), kl.max(), before, after]
    got = [t.kl, t.kl_error, t.kl_median, t.kl_99, t.kl_max, t.perplexity_reference, t.perplexity]
    np.testing.assert_allclose(got, wanted, rtol=2e-4)  # measured: 2e-5
    assert t.flips == flips


def mixed(base, other, tensors):
    """Return base with these tensors as in `other`."""
    return {name: other[name] if name in tensors else w for name, w in base.items()}


def test_every_matrix_belongs_to_one_part(case):
    reference, _, _, found = case
    names = [name for name in reference.weights if not re.search(r"norm\.weight$|mlp\.gate\.", name)]
    parts, layers, kinds = found.sources.parts, found.sources.layers, found.sources.kinds
    wanted = {}
    for name in names:
        module = re.sub(r"\.experts\.\d+\.", ".experts.*.", name.rpartition(".")[0])
        wanted.setdefault(module, set()).add(name)
    if reference.config.tie_word_embeddings:
        wanted["model.embed_tokens"].add("lm_head.weight")
    assert {part.name: set(part.tensors) for part in parts} == wanted
    for layer in layers:
        assert set(layer.tensors) == {name for name in reference.weights if name.startswith(f"{layer.name}.")}
    for kind in kinds:
        word = {"embedding": "embed_tokens", "head": "lm_head"}.get(kind.name, f"{kind.name}_proj")
        tensors = {name for name in names if f".{word}." in f".{name}"}
        assert set(kind.tensors) - {"lm_head.weight"} == tensors - {"lm_head.weight"}
    assert len(layers) == reference.config.num_hidden_layers
    assert len(kinds) == (8 if reference.config.tie_word_embeddings else 9)


def test_parts_layers_and_kinds_are_the_exhaustive_truth(case):
    reference, quantised, ids, found = case
    config, other, sources = reference.config, plain(quantised), found.sources
    kl = figures(config, reference.weights, other, ids)[0].mean()
    assert sources.kl == pytest.approx(kl, rel=2e-4)
    assert sources.tokens == 3 * 7
    for part in (*sources.parts, *sources.layers, *sources.kinds):
        alone, left_out = (
            figures(config, reference.weights, mixed(base, replacing, part.tensors), ids)[0].mean()
            for base, replacing in ((reference.weights, other), (other, reference.weights))
        )
        assert part.alone == pytest.approx(alone, rel=1e-3), part.name
        assert part.saved == pytest.approx(kl - left_out, rel=1e-3, abs=2e-4 * kl), part.name
        assert part.share == pytest.approx((part.alone + part.saved) / 2 / sources.kl), part.name
    for parts in (sources.parts, sources.layers, sources.kinds):
        alone = [part.alone for part in parts]
        assert alone == sorted(alone, reverse=True)


def test_mixes(case):
    reference, quantised, ids, found = case
    before, after = reference.weights, plain(quantised)
    parts = {part.name: part for part in found.sources.parts}
    nbytes = {name: w.nbytes for name, w in quantised.items()}
    assert (found.nbytes, found.reference_nbytes) == (sum(nbytes.values()), sum(w.nbytes for w in before.values()))
    assert found.bits == pytest.approx(8 * found.nbytes / sum(w.size for w in before.values()))
    for part in parts.values():
        tensors = [name for name in part.tensors if name in before]
        assert part.extra == sum(before[name].nbytes - nbytes[name] for name in tensors)
        error = [
            np.sum(np.square(x, dtype=float)) for name in tensors for x in (after[name] - before[name], before[name])
        ]
        assert part.weight_error == pytest.approx(np.sqrt(sum(error[::2]) / sum(error[1::2])), rel=1e-4)
    first, *mixes = found.sources.curve
    assert (first.kept, first.nbytes, first.kl) == ((), found.nbytes, found.sources.kl)
    worth = list(parts.values())
    for mix, budget in zip(mixes[-3:], (0.7, 0.8, 0.9), strict=True):
        tensors = {name for part in mix.kept for name in parts[part].tensors}
        used, limit = sum(parts[name].extra for name in mix.kept), budget * sum(part.extra for part in worth)
        assert used <= limit
        for part in worth:  # what is left out does not fit next to what is worth more
            better = [p.extra for p in worth if p.name in mix.kept and p.alone / p.extra > part.alone / part.extra]
            assert part.name in mix.kept or sum(better) + part.extra > limit
        assert max(worth, key=lambda part: part.alone / part.extra).name in mix.kept
        assert mix.nbytes == found.nbytes + used
        assert mix.bits / found.bits == pytest.approx(mix.nbytes / found.nbytes)
        assert mix.kl == pytest.approx(
            figures(reference.config, before, mixed(after, before, tensors), ids)[0].mean(), rel=1e-3
        )


def test_shares_add_up_while_the_damage_is_small():
    reference = model(TIED)
    ids = draw_ids(np.random.default_rng(2), TIED, 25 * WINDOW)
    found = qwen3np.damage(reference, "q8_0", ids, window=WINDOW, progress=False).sources
    assert sum(part.share for part in found.parts) == pytest.approx(1, abs=0.1)  # measured: 1.01


def test_parts_are_measured_on_windows_spread_evenly():
    config = replace(TIED, num_hidden_layers=1)
    reference, ids = model(config), draw_ids(np.random.default_rng(3), config, 3 * 300 + 9)
    found = qwen3np.damage(reference, "q8_0", ids, window=300, ranked=2, progress=False)
    assert (found.windows, found.ranked, found.sources.tokens) == (3, 2, 2 * 127)
    spread = np.concatenate([ids[:256], ids[600:856]])
    same = qwen3np.damage(reference, "q8_0", spread, window=256, ranked=9, progress=False)
    assert (same.windows, same.ranked) == (2, 2)
    assert same.sources.kl == pytest.approx(same.totals.kl)
    assert found.sources == same.sources
    counts = []
    none = qwen3np.damage(reference, "q8_0", ids, window=300, ranked=0, progress=counts.append)
    assert none.sources is None
    assert none.totals == found.totals
    assert sum(counts) == 2 * 3


# llama.cpp 0.5.0 printed these for tests/golden/facts.txt with the built-in checkpoint, converted to F32, and the file
# that its llama-quantize --pure made of that, converted to F32 again: otherwise it rounds activations to 8 bits, too.
# llama-perplexity -c 64 -ctk f32 -ctv f32 -fa off; the base's own perplexity is that of a run without --kl-divergence.
LLAMA = {
    "q4_0": {
        "kl": "0.009499",
        "kl_error": "0.001660",
        "kl_max": "0.254563",
        "kl_99": "0.108979",
        "kl_median": "0.002641",
        "perplexity": "9.571361",
        "perplexity_reference": "9.4217",
        "flips": 10 / 217,  # "Same top p: 95.392 %"
    },
    "q8_0": {
        "kl": "0.000048",
        "kl_error": "0.000010",
        "kl_max": "0.001326",
        "kl_99": "0.000759",
        "kl_median": "0.000012",
        "perplexity": "9.406221",
        "perplexity_reference": "9.4217",
        "flips": 0.0,
    },
}


@pytest.mark.parametrize("kind", LLAMA)
def test_llama_cpp_prints_the_same(builtin, kind):
    ids = builtin.text.encode((Path(__file__).parent / "golden" / "facts.txt").read_text(encoding="utf-8"))
    found = asdict(qwen3np.damage(builtin, kind, ids, window=64, ranked=0, progress=False).totals)
    assert found["tokens"] == 7 * 31
    for name, printed in LLAMA[kind].items():
        # it stores the base's log-probabilities in 16 bits, 2.4e-4 apart: single KLs are off by 3e-5
        slack = 3e-5 if name in ("kl_max", "kl_99", "kl_median") else 1e-6
        assert found[name] == pytest.approx(float(printed), abs=5e-5 if "perplexity" in name else slack), name


def test_damage_of_a_cache():
    reference, ids = model(UNTIED_BIAS), draw_ids(np.random.default_rng(4), UNTIED_BIAS, 3 * WINDOW)
    found = qwen3np.damage(reference, None, ids, kv="fp8", window=WINDOW, progress=False)

    def rounded(*points):
        def edit(name, x):
            if any(re.fullmatch(point, name) for point in points):
                return np.asarray(x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn), np.float64)
            return None

        return figures(UNTIED_BIAS, reference.weights, reference.weights, ids, edit)[0].mean()

    assert found.totals.kl == pytest.approx(rounded(r".*\.k_rope", r".*\.v_proj"), rel=1e-3)
    assert {kind.name: kind.alone for kind in found.sources.kinds} == pytest.approx(
        {"k cache": rounded(r".*\.k_rope"), "v cache": rounded(r".*\.v_proj")}, rel=1e-3
    )
    alone = {part.name: part.alone for part in found.sources.parts}
    assert len(alone) == 6
    assert alone["model.layers.1.self_attn.v_cache"] == pytest.approx(rounded(r".*\.1\..*v_proj"), rel=1e-3)
    assert found.bits == found.reference_bits
    assert len(found.sources.curve) == 1


def scaled_model(config, factor):
    """Return weights in which scales were moved as AWQ does: from norms into matrices, and from up into down."""
    weights = trained_like(config, 0)
    for n in range(config.num_hidden_layers):
        at = f"model.layers.{n}."
        for norm, names in {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            scales = factor ** np.random.default_rng(n).integers(-2, 3, config.hidden_size).astype(np.float32)
            weights[f"{at}{norm}.weight"] /= scales
            for name in names:
                weights[f"{at}{name}.weight"] *= scales
        scales = factor ** np.random.default_rng(9).integers(-2, 3, config.intermediate_size).astype(np.float32)
        weights[f"{at}mlp.up_proj.weight"] /= scales[:, None]
        weights[f"{at}mlp.down_proj.weight"] *= scales
    return weights


def test_tensors_that_share_moved_scales_stay_together():
    reference, ids = model(DENSE), draw_ids(np.random.default_rng(5), DENSE, 3 * WINDOW)
    moved = scaled_model(DENSE, 2.0)  # powers of two change no digit
    same = qwen3np.damage(reference, model(DENSE, moved), ids, window=WINDOW, progress=False)
    assert same.totals.kl < 1e-10
    assert all(abs(part.alone) < 1e-10 for part in same.sources.parts)
    # only some numbers of the matrices change much, but all norms do
    other = {name: np.asarray(w) for name, w in what_if(scaled_model(DENSE, 1.1), "q4_0").items()}
    found = qwen3np.damage(reference, model(DENSE, other), ids, window=WINDOW, progress=False).sources
    assert {part.name for part in found.parts} == {"model.embed_tokens", "lm_head"} | {
        f"model.layers.{n}.{half}" for n in range(2) for half in ("self_attn", "mlp")
    }
    assert {part.kind for part in found.parts} == {"embedding", "head", "attention", "mlp"}
    for part in found.parts:
        weights = mixed(reference.weights, other, part.tensors)
        assert part.alone == pytest.approx(figures(DENSE, reference.weights, weights, ids)[0].mean(), rel=1e-3)


def test_scales_moved_without_a_norm():
    reference, ids = model(DENSE), draw_ids(np.random.default_rng(5), DENSE, WINDOW)
    moved, at = dict(reference.weights), "model.layers.0.mlp."
    moved[f"{at}up_proj.weight"] = moved[f"{at}up_proj.weight"] / np.float32(4)
    moved[f"{at}down_proj.weight"] = moved[f"{at}down_proj.weight"] * np.float32(4)
    found = qwen3np.damage(reference, model(DENSE, moved), ids, window=WINDOW, progress=False)
    assert [part.name for part in found.sources.parts] == ["model.layers.0.mlp"]
    assert found.totals.kl < 1e-10


def test_a_head_that_only_one_of_them_ties():
    reference, ids = model(TIED), draw_ids(np.random.default_rng(6), TIED, 3 * WINDOW)
    untied = dict(reference.weights) | {"lm_head.weight": reference.weights["model.embed_tokens.weight"]}
    quantised = {name: np.asarray(w) for name, w in what_if(untied, "q4_0").items()}
    quantised["model.embed_tokens.weight"] = untied["model.embed_tokens.weight"]
    found = qwen3np.damage(reference, model(replace(TIED, tie_word_embeddings=False), quantised), ids, window=WINDOW)
    names = {part.name for part in found.sources.parts}
    assert "lm_head" in names
    assert "model.embed_tokens" not in names
    wanted = figures(replace(TIED, tie_word_embeddings=False), untied, quantised, ids)[0].mean()
    assert found.totals.kl == pytest.approx(wanted, rel=1e-3)


def without_head(config):
    return {name: w for name, w in trained_like(config, 0).items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "window 3 must be from 4 to"),
        ({"window": 10**6}, "window 1000000 must be from 4 to 32768"),
        ({"input_ids": [1, 2, 3]}, "the text has 3 tokens; at least 4"),
        ({"input_ids": [1, 2, 3, 99]}, "id 99 .* outside the vocabulary"),
        ({"model": "q4_k"}, "what_if='q4_k' is unknown; known: q4_0"),
        ({"kv": "int3"}, "kv='int3' is unknown; known: float16"),
        (
            {"model": model(replace(DENSE, rope_theta=1e5), trained_like(DENSE, 0))},
            "the models differ in rope_theta: one must",
        ),
        ({"model": model(DENSE, without_head(DENSE))}, "no lm_head.weight: a checkpoint makes embeddings"),
        ({"model": model(DENSE, trained_like(DENSE, 7))}, "embeddings of the two models are 1[0-9]+% apart"),
    ],
)
def test_errors(change, message):
    options = {"model": "q8_0", "input_ids": [*range(WINDOW)], "window": WINDOW} | change
    with pytest.raises(ValueError, match=message) as error:
        qwen3np.damage(model(DENSE), options.pop("model"), options.pop("input_ids"), **options)
    assert "\n" not in str(error.value)


def test_activations():
    config = SPARSE
    weights = trained_like(config, 0)
    weights["model.layers.1.self_attn.o_proj.weight"] *= 1e5
    one, ids = model(config, weights), draw_ids(np.random.default_rng(8), config, 2 * WINDOW).tolist()
    found = {largest.point: largest for largest in activations(one, ids, window=WINDOW)}
    seen = {}
    for start in (0, WINDOW):
        for name, x in one.trace(ids[start : start + WINDOW]).items():
            seen.setdefault(name, []).append(x[0])
    assert found.keys() == {name for name in seen if not name.endswith("router_indices")}
    for name, largest in found.items():
        both = [np.where(np.isinf(x), 0, np.abs(x)) for x in seen[name]]
        assert largest.largest == max(x.max() for x in both)
        assert (largest.float16, largest.fp8) == (largest.largest / 65504, largest.largest / 448)
        axis = 1 if name.endswith(("_rope", ".scores", ".probs")) else 0
        window, place = divmod(largest.token, WINDOW)
        assert both[window].take(place, axis).max() == largest.largest
    over = [name for name, largest in found.items() if largest.float16 > 1]
    assert over == ["model.layers.1.self_attn.o_proj", "model.layers.1.attn_residual", "model.layers.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "facts.txt"
    golden = Path(__file__).parent / "golden" / "facts.txt"
    path.write_text(golden.read_text(encoding="utf-8")[:300], encoding="utf-8")
    return path


def test_command(text, capsys, tmp_path):
    arguments = ["damage", "--what-if", "q8_0", "--kv", "q8_0", "--activations", "--file", str(text)]
    arguments += ["--window", "32", "--ranked", "1"]
    main(arguments)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert f"{found['totals']['kl']:.6f}" in out
    assert f"{found['totals']['perplexity']:.4f}" in out
    best = found["sources"]["parts"][0]
    name = best["name"].removeprefix("model.")
    assert re.search(rf"\n{name} +{best['alone']:.6f} +{best['saved']:.6f} +{best['share']:.1%}", out)
    assert len(found["sources"]["parts"]) == 1 + 4 * 9
    assert re.search(r"\nmlp\.down_proj +3 ", out)
    main([*arguments[:3], "--file", str(text), "--totals"])
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare the reference with: give --model"),
        (["--model", "x", "--what-if", "q8_0"], "both --model and --what-if"),
        (["--what-if", "q8_0", "--ranked", "0"], "--ranked 0 must be at least 1; --totals"),
        (["--what-if", "q8_0", "--totals", "-o", "x.svg"], "--out draws the parts"),
        (["--what-if", "q8_0", "-o", "x.docx"], "x.docx: "),
        (["--what-if", "q8_0", "--window", "1000"], "window 1000 must be from 4 to 256"),
        (["--what-if", "q2"], "invalid choice"),
    ],
)
def test_errors_of_the_command(text, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["damage", "--file", str(text), *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_picture(tmp_path, monkeypatch):
    ids = draw_ids(np.random.default_rng(0), SPARSE, 2 * WINDOW)
    found = qwen3np.damage(model(SPARSE), "q8_0", ids, window=WINDOW, progress=False)
    with monkeypatch.context() as without:
        without.setattr(sys.modules["qwen3np.audit.damage_picture"], "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs matplotlib: pip install"):
            draw(found, tmp_path / "x.svg")
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is in the extra `study`")
    draw(found, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(ValueError, match="no parts were measured"):
        draw(replace(found, sources=None), tmp_path / "y.svg")
