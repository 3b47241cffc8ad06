"""Verdicts on log-probabilities made by other formulas: float64 forwards, other configs, quantisers of the test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import SMALL, draw_ids, trained_like

import qwen3np
from qwen3np import Config, Model, forward, processed_logits
from qwen3np.audit import causes, court, hypotheses
from qwen3np.audit.causes import UNKNOWN
from qwen3np.audit.court import Court, steadiness
from qwen3np.audit.measure import Variant, experts_of, recorded_experts, sampled
from qwen3np.audit.page import page
from qwen3np.audit.processed import Settings, fitted
from qwen3np.audit.report import divergences
from qwen3np.audit.rollouts import Rollout
from qwen3np.cli import main
from qwen3np.porting.catalogue import BUGS
from qwen3np.porting.points import POINTS
from qwen3np.porting.settings import SETTINGS

CONFIG = Config(**SMALL, max_position_embeddings=128)
MOE = replace(CONFIG, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=(1,))
PROMPT, NEW, TOP = 12, 16, 4


def drawn(config=CONFIG, seed=0):
    return Model(config, trained_like(config, seed), None, {})


def engine(model, *, config=None, weights=None, settings=None, rows=6, **options):
    """Return what an engine reports that runs this model in float64, or as options say, on random ids."""
    rng, found = np.random.default_rng(1), []
    options = {"numerics": "float64", **options}
    for n in range(rows):
        ids = draw_ids(rng, CONFIG, PROMPT + n + NEW).tolist()
        start = PROMPT + n
        logits = forward(weights or model.weights, config or model.config, ids, **options)[0, start - 1 : -1]
        if settings:
            logits = [processed_logits(x, settings, ids[: start + i], i) for i, x in enumerate(logits)]
        logits = np.asarray(logits, np.float64)
        logp = logits - np.logaddexp.reduce(logits, -1)[:, None]
        best = np.argsort(-logp, -1)[:, :TOP]
        columns = np.concatenate([np.array(ids[start:])[:, None], best], 1)
        x = np.take_along_axis(logp, columns, -1)
        if settings:  # an engine draws no id that its filters drop
            x[np.isneginf(x)] = np.nan
        found.append(Rollout(ids[:start], ids[start:], columns, x, f"rollout {n + 1}"))
    return found


def written(rollouts):
    """Return rollouts as the objects of JSON lines."""
    found = []
    for r in rollouts:
        top = [
            [list(p) for p in zip(i, x, strict=True)]
            for i, x in zip(r.found.tolist(), r.logprobs.tolist(), strict=True)
        ]
        found.append({"prompt_ids": r.prompt, "ids": r.ids, "logprobs": r.logprobs[:, 0].tolist(), "top": top})
    return found


def audited(rollouts, model, **options):
    return qwen3np.audit(written(rollouts), model, **options)


def test_float32_is_rounding_and_needs_no_cause():
    model = drawn()
    found = audited(engine(model), model)
    assert (found.verdict, found.judgement.sure, found.judgement.causes) == ("rounding", True, [])
    assert found.tokens == 6 * NEW
    assert found.mean_abs < 1e-5
    assert "float32" in found.judgement.meaning


def test_bfloat16_is_rounding_by_its_size_and_pattern():
    model = drawn()
    rollouts = engine(model, numerics="bfloat16", engine="plain", rows=3)
    found = audited(rollouts, model)
    assert found.verdict == "rounding"
    assert "bfloat16" in found.judgement.meaning
    assert found.judgement.sure
    assert found.judgement.tried > 60


@pytest.mark.slow
def test_rounding_is_different_where_the_engine_is_known_to_round_less():
    model = drawn()
    rollouts = engine(model, numerics="bfloat16", engine="plain", rows=3)
    assert audited(rollouts, model, computed_in="float32").verdict == "different"


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"rope_theta": 1e4}, "rotary: rope_theta is 10,000"),
        pytest.param({"rms_norm_eps": 1e-5}, "norm: rms_norm_eps is 1e-5", marks=pytest.mark.slow),
        pytest.param({"rope_theta": 3e4}, "rotary: rope_theta is 30,000", marks=pytest.mark.slow),
    ],
)
def test_another_config_is_a_named_bug(config, cause):
    model = drawn()
    found = audited(engine(model, config=replace(CONFIG, **config), rows=3), model)
    first = found.judgement.causes[0]
    assert found.verdict == "different"
    assert (first.name, first.sure) == (cause, True)
    assert first.explained > 0.999
    assert first.left < 1e-5


@pytest.mark.slow
def test_quantised_weights_are_named_with_their_format():
    model, weights = drawn(), {}
    for name, w in model.weights.items():
        scale = np.abs(w).max(-1, keepdims=True) / 127 if w.ndim == 2 else 1
        weights[name] = (np.rint(w / scale) * scale).astype(np.float32) if w.ndim == 2 else w
    found = audited(engine(model, weights=weights), model)
    assert found.verdict == "different"
    assert found.judgement.sure
    first = found.judgement.causes[0]
    assert first.kind == "quantised weights"
    assert first.explained > 0.9999
    # rows of 32 and 48 numbers are one group of 64, and one of 128
    groups = {f"weights in 8 bits in groups of {size}" for size in (64, 128)}
    assert {first.name, *first.alike} == {"weights in int8, a scale for each row", *groups}
    assert not first.sure


@pytest.mark.slow
def test_groups_with_zero_points_are_named():
    """Four bits from the least to the largest of each 128, as AWQ and GPTQ pack them."""
    model, weights = drawn(), {}
    for name, w in model.weights.items():
        if w.ndim == 2:
            low, high = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
            step = ((high - low) / 15).astype(np.float16).astype(np.float32)
            zero = np.round(-low / step)
            w = ((np.clip(np.round(w / step) + zero, 0, 15) - zero) * step).astype(np.float32)
        weights[name] = w
    first = audited(engine(model, weights=weights), model).judgement.causes[0]
    assert {f"weights in 4 bits in groups of {n} with zero points" for n in (64, 128)} == {first.name, *first.alike}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": 0.7}, "temperature 0.7"),
        pytest.param({"temperature": 1.35}, "temperature 1.35", marks=pytest.mark.slow),
        ({"temperature": 1.0, "top_k": 20}, "top_k 20"),
        pytest.param({"temperature": 0.8, "top_p": 0.9}, "temperature 0.8 and top_p 0.9", marks=pytest.mark.slow),
        pytest.param({"temperature": 1.0, "presence_penalty": 0.5}, "presence_penalty 0.5", marks=pytest.mark.slow),
    ],
)
def test_processed_log_probabilities_are_named_with_their_settings(settings, name):
    model = drawn()
    found = audited(engine(model, settings=settings), model)
    assert found.judgement.causes[0].name == f"processed by {name}"
    assert found.judgement.causes[0].sure


def test_ids_at_the_edge_of_a_filter_do_not_decide_its_fit():
    model, settings = drawn(), {"temperature": 0.7, "top_p": 0.9}
    rollouts = engine(model, settings=settings, numerics="bfloat16", engine="plain", rows=12)
    right = Variant(model.weights, CONFIG)
    found = fitted(map(right.logits, right.states(rollouts)), rollouts)
    assert found.changed == settings
    wide = [np.flatnonzero(np.isfinite(r.logprobs[:, -1])) for r in rollouts]
    assert any(map(len, wide))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.8},
        {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.2},
    ],
)
def test_views_are_what_sampling_makes_of_logits(settings):
    rng, prompt, ids = np.random.default_rng(2), [3, 9, 9, 4], [7, 3, 7, 1, 7]
    logits = rng.normal(0, 3, (4, 64)).astype(np.float32)
    rollout = Rollout(prompt, ids, np.zeros((5, 1)), np.zeros((5, 1)), "")
    made = Settings(**settings).view(logits, rollout, slice(1, 5))
    for i, x in enumerate(logits):
        y = processed_logits(x, settings, prompt + ids[: i + 1], i + 1).astype(np.float64)
        np.testing.assert_allclose(made[i], y - np.logaddexp.reduce(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda r: replace(r, logprobs=np.roll(r.logprobs, -1, 0)), "shifted: of the next token"),
        pytest.param(
            lambda r: replace(r, logprobs=r.logprobs / np.log(2)),
            "other units: logarithms to base 2",
            marks=pytest.mark.slow,
        ),
        (lambda r: replace(r, prompt=[5, *r.prompt]), "the prompt without its first token"),
    ],
)
def test_misplaced_log_probabilities_are_named(change, name):
    model = drawn()
    rollouts = [replace(r, found=r.found[:, :1], logprobs=r.logprobs[:, :1]) for r in engine(model)]
    first = audited(list(map(change, rollouts)), model).judgement.causes[0]
    assert (first.name, first.sure) == (name, True)


def test_another_checkpoint_is_named_if_it_is_given():
    model, other = drawn(), drawn(seed=7)
    rollouts = engine(other)
    first = audited(rollouts, model, others={"step 7": other}).judgement.causes[0]
    assert (first.name, first.sure) == ("another checkpoint: step 7", True)


@pytest.mark.slow
def test_an_unknown_checkpoint_is_different_and_no_cause_is_sure():
    model = drawn()
    found = audited(engine(model, weights=perturbed(model, 0.05)), model)
    assert found.verdict == "different"
    assert found.judgement.causes[0].name == UNKNOWN
    assert not any(cause.sure for cause in found.judgement.causes)


def perturbed(model, by):
    """Return the weights after a little training: each number is off by a fraction of itself."""
    rng = np.random.default_rng(3)
    return {name: w * rng.normal(1, by, w.shape).astype(np.float32) for name, w in model.weights.items()}


@pytest.mark.slow
def test_a_change_as_small_as_rounding_is_no_sure_verdict():
    model = drawn()
    found = audited(engine(model, weights=perturbed(model, 0.002)), model)
    assert 0 < found.mean_abs < 2 * found.judgement.floors["bfloat16"]
    assert (found.verdict, found.judgement.sure) == ("rounding", False)


def test_rounding_at_some_points_alone_is_rounding(monkeypatch):
    model, setting = drawn(), next(s for s in SETTINGS if s.name == "norms in bfloat16")
    rollouts = engine(model)
    table = setting.planted(POINTS)
    rows = np.split(Variant(model.weights, CONFIG, table).predicted(rollouts), len(rollouts))
    rollouts = [replace(r, logprobs=x) for r, x in zip(rollouts, rows, strict=True)]
    monkeypatch.setattr(
        Court, "families", lambda self, *_: iter([[*hypotheses.settings(self.right, self.rollouts, True)]])
    )
    j = audited(rollouts, model).judgement
    assert (j.verdict, j.causes[0].name, j.sure) == ("rounding", "norms in bfloat16", True)


def test_a_change_next_to_rounding_is_no_sure_verdict(monkeypatch):
    model = drawn()
    monkeypatch.setattr(Court, "search", lambda *arguments: None)  # no cause is needed here
    for by, sure in ((0, True), (0.0003, False), (0.002, False)):
        short = engine(model, weights=perturbed(model, by), numerics="bfloat16", engine="plain", rows=12)
        found = audited(short, model)
        assert found.mean_abs < 2 * found.judgement.floors["bfloat16"]
        assert (found.verdict, found.judgement.sure) == ("rounding", sure)
        assert ("would not show" in found.judgement.meaning) != sure


def test_evidence_of_one_rollout_alone_is_not_steady():
    rollouts = engine(drawn())
    before, left = np.full((2, 6 * NEW, 1), 0.02)
    left[:NEW] = 1e-4
    assert abs(steadiness(rollouts, before, left)) < 1.1
    left[:] = before * np.repeat([0.5, 0.6, 0.5, 0.7, 0.5, 0.6], NEW)[:, None]
    gains = -np.log([0.5, 0.6, 0.5, 0.7, 0.5, 0.6])
    expected = gains.mean() / (gains.std(ddof=1) / 6**0.5)
    assert steadiness(rollouts, before, left) == pytest.approx(expected)
    assert steadiness(rollouts[:2], before[: 2 * NEW], left[: 2 * NEW]) == 0


def test_ranks_and_not_a_few_outliers_make_a_pattern():
    court = Court.of(engine(drawn()), drawn().weights, CONFIG, None)
    rng = np.random.default_rng(4)
    x, y = (rng.normal(0, 0.01, court.theirs.shape) for _ in range(2))
    x[:3], y[:3] = 1.0, 1.0
    assert abs(court.likeness(x, y)) < 0.4
    assert court.likeness(x, x**3) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_a_bug_at_one_point_alone_is_named_with_it():
    model = drawn()
    weights = {**model.weights, "model.norm.weight": 1 + model.weights["model.norm.weight"]}
    first = audited(engine(model, weights=weights), model).judgement.causes[0]
    assert (first.name, first.sure) == ("norm: multiplied by 1 + weight, model.norm alone", True)


@pytest.mark.slow
def test_two_faults_are_named_together():
    model = drawn()
    rollouts = engine(model, config=replace(CONFIG, rope_theta=7e5), settings={"temperature": 0.7})
    first = audited(rollouts, model).judgement.causes[0]
    assert first.name == "processed by temperature 0.7, and rotary: rope_theta is 700,000"
    assert first.sure
    short = {"numerics": "bfloat16", "engine": "plain"}
    rollouts = engine(model, config=replace(CONFIG, rope_theta=7e5), settings={"temperature": 0.7}, **short)
    first = audited(rollouts, model).judgement.causes[0]
    assert first.name == "processed by temperature 0.7, and rotary: rope_theta is 700,000"
    assert first.sure


def test_settings_are_fitted_again_on_top_of_a_bug_that_hides_them(monkeypatch):
    model, short = drawn(), {"numerics": "bfloat16", "engine": "plain"}
    monkeypatch.setattr(Court, "families", lambda *arguments: iter([]))  # theta is fitted
    rollouts = engine(model, config=replace(CONFIG, rope_theta=1e4), settings={"temperature": 0.7}, **short)
    first = audited(rollouts, model).judgement.causes[0]
    assert first.name == "processed by temperature 0.7, and rotary: rope_theta is 10,000"
    assert first.sure


@pytest.mark.slow
def test_theta_is_found_where_other_experts_hide_the_slope():
    model = drawn(MOE)
    first = audited(engine(model, config=replace(MOE, rope_theta=2.5e5)), model).judgement.causes[0]
    assert first.name == "rotary: rope_theta is 250,000"


def test_other_ids_that_do_not_fit_are_left_out():
    model = drawn()
    rollouts = [replace(r, found=np.concatenate([r.found[:, :1], r.found[::-1, 1:]], 1)) for r in engine(model)]
    found = audited(rollouts, model)
    assert found.verdict == "rounding"
    assert "read wrongly" in found.judgement.notes[0]


def test_floors_are_of_the_numbers_that_are_compared():
    """Without masked tokens, and for the chosen tokens alone without the others: means of what rounding made of all."""
    model = drawn()
    whole = Court.of(engine(model), model.weights, model.config, None)
    masked = [replace(r, logprobs=np.where(np.arange(NEW)[:, None] % 2, np.nan, r.logprobs)) for r in engine(model)]
    seen = Court.of(masked, model.weights, model.config, None)
    for name, x in whole.runs.items():
        d = np.abs(x - whole.base)
        assert seen.floors[name] == pytest.approx(d[::2].mean(-1).mean(), rel=1e-6)
        assert seen.of_chosen().floors[name] == pytest.approx(d[::2, 0].mean(), rel=1e-6)


def test_what_cannot_be_audited_is_refused():
    model = drawn()
    rows = written(engine(model))
    small = Model(replace(CONFIG, vocab_size=32), trained_like(replace(CONFIG, vocab_size=32), 0), None, {})
    with pytest.raises(ValueError, match=r"base has 32 ids, and the rollouts have id \d+"):
        qwen3np.audit(rows, model, others={"base": small})
    with pytest.raises(ValueError, match="computed_in='fp16': must be one of float32"):
        qwen3np.audit(rows, model, computed_in="fp16")
    r = engine(drawn(MOE), rows=1)[0]
    experts = np.broadcast_to([0, 6], (len(r.prompt) + NEW, 2, 2))
    with pytest.raises(ValueError, match=r"rollout 1: routed_experts: \[0, 6\] at row 0"):
        experts_of(replace(r, experts=experts), MOE)


def test_divergences_estimate_kl_without_bias():
    q, p = np.array([4, 3, 2, 1]) / 10, np.array([0.3, 0.3, 0.3, 0.1])  # each token as often as q draws it
    d = np.repeat(np.log(q / p), [4, 3, 2, 1])
    kl = divergences(d)
    for k in ("k1", "k3"):
        np.testing.assert_allclose(kl[f"theirs||ours {k}"], (q * np.log(q / p)).sum(), rtol=1e-12)
        np.testing.assert_allclose(kl[f"ours||theirs {k}"], (p * np.log(p / q)).sum(), rtol=1e-12)


def test_numbers_are_those_of_the_differences(monkeypatch):
    model = drawn()
    off = 0.3 * (np.arange(NEW) == 3) + 0.2 * (np.arange(NEW) == 9)  # ratios of 0.74 and 0.82
    rollouts = [replace(r, logprobs=r.logprobs + off[:, None]) for r in engine(model, rows=2)]
    monkeypatch.setattr(Court, "search", lambda *arguments: None)  # no cause is needed here
    found = audited(rollouts, model)
    assert abs(found.mean_abs - 0.5 / NEW) < 1e-4
    assert abs(found.bias - 0.5 / NEW) < 1e-4
    assert abs(found.max_abs - 0.3) < 1e-4
    assert found.outside["[0.8, 1.2]"] == 2 / (2 * NEW)
    assert {w.position for w in found.worst[:2]} == {PROMPT + 3, PROMPT + 1 + 3}
    assert sum(g.tokens for g in found.positions) == sum(g.tokens for g in found.entropies) == 2 * NEW
    context = [*rollouts[0].prompt, *rollouts[0].ids[:3]][-12:]
    assert next(w for w in found.worst if w.where == "rollout 1").context == context


def test_a_changed_model_runs_as_the_engine_does():
    """In one batch, alone, and token by token: a right model gives the same, whatever else is in the batch."""
    model = drawn(MOE)
    rollouts = engine(model, rows=3)
    whole = Variant(model.weights, MOE).predicted(rollouts)
    np.testing.assert_allclose(whole, np.concatenate([r.logprobs for r in rollouts]), atol=2e-5)
    for options in ({"alone": True}, {"stepped": True}):
        np.testing.assert_allclose(Variant(model.weights, MOE, **options).predicted(rollouts), whole, atol=2e-5)
    from_one = [replace(r, prompt=r.prompt[-1:]) for r in rollouts]
    unmasked = next(b for b in BUGS if b.name.startswith("attention: causal mask")).planted(POINTS)
    steps = Variant(model.weights, MOE, unmasked, stepped=True).predicted(from_one)  # nothing is there to hide yet
    np.testing.assert_allclose(steps, Variant(model.weights, MOE).predicted(from_one), atol=2e-5)


def test_samples_are_spread_and_cut():
    model = drawn()
    rollouts = engine(model) * 40
    lengths = [len(r.prompt) + len(r.ids) for r in sampled(rollouts, CONFIG)]
    assert 900 < sum(lengths) <= 1024 + 2 * PROMPT + NEW
    huge = replace(CONFIG, hidden_size=4096, intermediate_size=8192, num_hidden_layers=30)
    few = sampled(rollouts, huge)
    assert 192 - 32 < sum(len(r.prompt) + len(r.ids) for r in few) <= 192 + PROMPT + NEW
    assert {len(r.prompt) for r in few} == {PROMPT}  # the shortest prompts
    assert all(len(r.logprobs) == len(r.found) == len(r.ids) for r in few)
    masked = replace(rollouts[0], logprobs=np.where(np.arange(NEW)[:, None] < NEW - 1, np.nan, rollouts[0].logprobs))
    unknown = replace(rollouts[0], logprobs=np.full_like(rollouts[0].logprobs, np.nan))
    [one] = sampled([unknown, masked, unknown], huge)
    assert np.isfinite(one.logprobs[-1]).all()
    [one] = sampled([replace(r, prompt=r.prompt * 20) for r in rollouts], huge)
    assert one.prompt == rollouts[0].prompt * 20


def test_a_large_model_has_its_floors_on_several_rollouts_and_its_causes_on_the_first(monkeypatch):
    model = drawn()
    for module in (causes, court, hypotheses):
        monkeypatch.setattr(module, "is_large", lambda config: True)
    first = engine(model, settings={"temperature": 0.7}, rows=1)[0]
    rollouts = [first, *engine(model, settings={"temperature": 0.8}, rows=3)[1:]]
    wide = [replace(r, found=r.found[:, : 3 + n], logprobs=r.logprobs[:, : 3 + n]) for n, r in enumerate(rollouts)]
    found = audited(wide, model)
    whole = Court.of(wide, model.weights, CONFIG, None)
    assert found.judgement.floors == pytest.approx(whole.of_chosen().floors)
    assert (found.judgement.sample, found.judgement.tried) == (3 * NEW, 1)  # and no other cause is tried
    assert found.judgement.causes[0].name == "processed by temperature 0.7"
    part = whole.first()
    assert part.theirs.shape == part.base.shape == part.runs["bfloat16"].shape == (NEW, 3)
    assert [r.where for r in part.rollouts] == [first.where]
    np.testing.assert_array_equal(part.theirs, wide[0].logprobs)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_the_engines_experts_are_replayed_and_their_share_is_told():
    model, rng = drawn(MOE), np.random.default_rng(5)
    found = []
    for r in engine(model, rows=5):
        ids = [*r.prompt, *r.ids]
        experts = recorded_experts(model.weights, MOE, r)
        swapped = rng.random(len(ids)) < 0.3  # in 30 % of the positions another expert is chosen
        experts[swapped, 0, 1] = 5 - experts[swapped, 0, 0]
        logits = forward(model.weights, MOE, ids, numerics="float64", routed_experts=experts)[0, len(r.prompt) - 1 : -1]
        logp = logits - np.logaddexp.reduce(logits, -1)[:, None]
        found.append(replace(r, logprobs=np.take_along_axis(logp, r.found, -1), experts=experts[:-1]))
    rows = written(found)
    rows = [row | {"routed_experts": r.experts.tolist()} for row, r in zip(rows, found, strict=True)]
    seen = qwen3np.audit(rows, model)
    assert seen.verdict == "rounding"
    assert seen.judgement.routing > 0.9999
    assert seen.mean_abs < 1e-5


def test_recorded_experts_are_put_at_their_positions():
    r = Rollout([1, 2, 3], [4, 5], np.zeros((2, 1)), np.zeros((2, 1)), "here")
    whole = np.arange(5 * 2 * 2).reshape(5, 2, 2) % 6
    for given, start in (
        (whole, 0),
        (whole[:4], 0),
        (whole[3:], 3),
        (whole[3:4], 3),
        (whole[:, :1], 0),
        (whole.ravel(), 0),
    ):
        found = experts_of(replace(r, experts=given), MOE)
        count = len(whole) if given.ndim == 1 else len(given)
        np.testing.assert_array_equal(found[start : start + count, 0], whole[start : start + count, 0])
        assert (found[:, 1] == -1).all()
        assert (np.delete(found, range(start, start + count), 0) == -1).all()
    for bad in (whole[:3], whole[:, :, :1], whole.ravel()[:7]):
        with pytest.raises(ValueError, match="here: routed_experts of shape"):
            experts_of(replace(r, experts=bad), MOE)
    with pytest.raises(ValueError, match="no experts"):
        experts_of(replace(r, experts=whole), CONFIG)


# --- the command and the page -----------------------------------------------------------------------------------------


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["audit", *map(str, arguments)])
    return ended.value.code


@pytest.fixture(scope="module")
def file(builtin, tmp_path_factory):
    ids = builtin.tokenizer.encode("Paris is the capital of France. Monday comes before Tuesday.")
    rows = []
    for n in (3, 5):
        logits = builtin.forward(ids, numerics="float64")[0, n - 1 : -1]
        logp = logits - np.logaddexp.reduce(logits, -1)[:, None]
        rows.append({"prompt_ids": ids[:n], "ids": ids[n:], "logprobs": logp[np.arange(len(logp)), ids[n:]].tolist()})
    path = tmp_path_factory.mktemp("audit") / "<b>rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_says_it_all_in_80_columns(file, capsys):
    assert run(file) == 0
    out = capsys.readouterr().out
    assert out.startswith("rounding: ")
    assert max(map(len, out.splitlines())) <= 80
    assert "Paris" in out
    assert "logprobs from logprobs" in out


def test_exit_status_and_json(file, tmp_path, capsys):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["logprobs"] = [-x for x in row["logprobs"]]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    assert run(other, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "different"
    assert found["tokens"] == sum(len(row["ids"]) for row in rows)
    assert {"mean_abs", "max_abs", "floors", "kl", "outside"} <= found.keys()
    assert found["causes"][0]["name"] == "other units: its sign is flipped"
    assert found["causes"][0]["sure"] is True
    other.write_text("{}")
    assert run(other) == 2
    error = capsys.readouterr().err
    assert "line 1: no log-probabilities" in error
    assert error.splitlines()[-1].startswith("error: ")
    assert run() == run(other, "--url", "http://127.0.0.1:1/v1") == run(other, "--field", "x") == 2
    assert run(file, "--out", tmp_path) == 2


def test_json_says_what_is_unusable(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"prompt_ids": [1], "ids": [2]}\n')
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(path), "--json"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["verdict"], found["causes"]) == ("unusable", [])
    assert "no log-probabilities" in found["reason"]
    assert "no log-probabilities" in printed.err


def test_the_page_holds_the_verdict_and_escapes_all_text(builtin, file, tmp_path):
    out = tmp_path / "report.html"
    assert run(file, "--out", out) == 0
    text = out.read_text(encoding="utf-8")
    assert "<h2>Rounding</h2>" in text
    assert "<b>" not in text
    assert "&lt;b&gt;rollouts.jsonl" in text
    assert "http" not in text.replace("http-equiv", "")  # nothing comes from elsewhere
    found = qwen3np.audit(file, builtin)
    hostile = replace(found, fields={"ids": "</script><script>alert(1)</script>"})
    assert "<script>alert" not in page(hostile, builtin, "<img src=x>")


@pytest.mark.slow
def test_the_guides_example_is_real(tmp_path, monkeypatch, capsys):
    guide = (Path(qwen3np.__file__).parent / "audit" / "README.md").read_text(encoding="utf-8")
    code = guide.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert run("rollouts.jsonl") == 1
    said = guide.partition("$ qwen3np audit rollouts.jsonl\n")[2].splitlines()[:2]
    assert capsys.readouterr().out.splitlines()[:2] == [line.strip() for line in said]


def test_rollouts_beyond_the_context_are_refused(builtin):
    ids = [5] * 300
    with pytest.raises(ValueError, match="300 positions"):
        qwen3np.audit([{"prompt_ids": ids[:1], "ids": ids[1:], "logprobs": [-1.0] * 299}], builtin)
    with pytest.raises(ValueError, match="no rollout has a finite"):
        qwen3np.audit([{"prompt_ids": [1], "ids": [2], "logprobs": [None]}], builtin)
