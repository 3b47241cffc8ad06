"""Recordings: their contents, how they are restricted, and that files are read back unchanged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from drawing import draw_any_config, draw_ids, relative, trained_like
from safetensors import safe_open
from safetensors.numpy import save_file

from qwen3np import NonFiniteError, forward, save_checkpoint
from qwen3np.cli import main
from qwen3np.numerics import named
from qwen3np.porting import Recording, record
from qwen3np.porting.fixture import TIED
from qwen3np.porting.points import Rerun, point_names, point_shape, split_pass
from qwen3np.porting.record import distance

PROMPT, STEPS = 12, 2
PASSES = ("", "decode.0.", "decode.1.")
ALL = point_names(replace(TIED, num_hidden_layers=2))  # those of the model in conftest.py


@pytest.fixture(scope="module")
def ids(config):
    return draw_ids(np.random.default_rng(0), config, 2, PROMPT)


@pytest.fixture(scope="module")
def golden(config, weights, ids):
    return record(weights, config, ids, steps=STEPS)


def test_points_are_those_of_forward(config, weights, ids, golden):
    """The prefill bit for bit; the decode steps as the same positions of one forward over all ids."""
    points, whole = {}, {}
    forward(weights, config, ids, trace=points.__setitem__)
    forward(weights, config, golden.ids, trace=whole.__setitem__)
    assert list(golden.points) == [p + name for p in ("", "decode.0.", "decode.1.") for name in points]
    assert list(points) == point_names(config)
    for name, x in points.items():
        np.testing.assert_array_equal(golden.points[name], x)
    for i in range(STEPS):
        for name in ("model.embed_tokens", "model.layers.1", "lm_head"):
            assert relative(golden.points[f"decode.{i}.{name}"][:, 0], whole[name][:, PROMPT + i]) <= 2e-6
    greedy = whole["lm_head"][:, PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(golden.ids, np.concatenate((ids, greedy), 1))


def test_shapes(config, golden):
    for prefix, ids, positions in golden.passes:
        for name in point_names(config):
            shape = point_shape(name, config, *ids.shape, positions[0, -1] + 1)
            assert golden.points[prefix + name].shape == shape, name


@pytest.mark.parametrize("numerics", ["float32", "float64", "bfloat16"])
def test_steps_make_the_points(config, weights, ids, numerics):
    """Each step on the recorded inputs, and from the ids alone: the recorded point, but for the order of sums."""
    golden = record(weights, config, ids, steps=STEPS, numerics=numerics)
    limit = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2e-2}[numerics]
    for given in (golden.points, {}):
        rerun = Rerun(weights, config, named(numerics), golden.passes, given)
        for name, x in golden.points.items():
            assert distance(rerun.made(name), x, 1)[0] <= limit, name


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["float32", "float64", "bfloat16", "bfloat16-grouped"])
def test_steps_of_the_family(numerics):
    """On drawn models with experts, YaRN and windows: names, shapes, and each step on the recorded inputs."""
    limit = {"float32": 3e-6, "float64": 1e-14}.get(numerics, 3e-2)
    kinds = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        weights = trained_like(config, seed)
        golden = record(weights, config, draw_ids(rng, config, 2, PROMPT), steps=STEPS, numerics=numerics)
        kinds |= {bool(config.num_experts), config.sliding_window, config.rope_scaling is not None}
        names = []
        forward(weights, config, golden.ids[:, :PROMPT], trace=lambda name, x, names=names: names.append(name))
        assert point_names(config) == names
        rerun = Rerun(weights, config, named(numerics), golden.passes, golden.points)
        for prefix, ids, positions in golden.passes:
            for name in names:
                x = golden.points[prefix + name]
                assert x.shape == point_shape(name, config, *ids.shape, positions[0, -1] + 1), name
                y = rerun.made(prefix + name)
                assert distance(y, x, 1)[0] <= limit, (seed, prefix + name)
                np.testing.assert_array_equal(np.isneginf(y), np.isneginf(x))
    assert len(kinds) > 3


def test_distance_of_choices():
    """The share that is lacking, in whatever order; doubles lack one."""
    truth = np.array([[[1, 2], [3, 4], [5, 6], [0, 7]]])
    overall, by_token = distance(np.array([[[2, 1], [4, 9], [5, 5], [8, 9]]]), truth, 1)
    assert by_token.tolist() == [0, 0.5, 0.5, 1]
    assert overall == 0.5


@pytest.mark.slow
def test_steps_of_a_deep_model(config, ids):
    """Its logits come from the ids alone, and of finished layers no more is kept than later passes need."""
    deep = replace(config, num_hidden_layers=160)
    weights = trained_like(deep, 0)
    golden = record(weights, deep, ids, steps=1, points="lm_head")
    rerun = Rerun(weights, deep, named("float32"), golden.passes, {})
    assert distance(rerun.made("decode.0.lm_head"), golden.points["decode.0.lm_head"], 1)[0] <= 1e-5
    inner = {name.rpartition(".")[2] for name in rerun.computed if "layers.7." in name}
    assert inner == {"k_rope", "v_proj"}


def test_floors(config, weights, golden):
    """They are distances from the float64 evaluation, of sums in any order: nothing for what is gathered."""
    truth = {}
    forward(weights, config, golden.ids, numerics="float64", trace=truth.__setitem__)
    for name, (low, high) in {"float32": (1e-8, 4e-6), "float16": (1e-4, 4e-3), "bfloat16": (1e-3, 3e-2)}.items():
        floors = golden.floors[name]
        assert set(floors) == set(golden.points)
        assert all(low < overall < high for point, (overall, _) in floors.items() if "embed" not in point)
        assert all(worst >= 0.9 * overall for overall, worst in floors.values())
    measured = relative(golden.points["lm_head"], truth["lm_head"][:, :PROMPT])
    assert measured <= golden.floors["float32"]["lm_head"][0] < 4 * measured
    assert golden.floors["float32"]["model.embed_tokens"] == (0, 0)


def test_cuts(config, weights, ids, golden):
    cut = record(
        weights, config, ids, steps=STEPS, points="layers.1.*,lm_head", tokens=(0, 5), heads=(1, 4), layers=(1,)
    )
    layer = {name for name in point_names(config) if name.startswith("model.layers.1")} | {"lm_head"}
    assert {split_pass(name)[1] for name in cut.points} == layer
    x, whole = cut.points, golden.points
    at = "model.layers.1.self_attn."
    np.testing.assert_array_equal(x["lm_head"], whole["lm_head"][:, [0, 5]])
    np.testing.assert_array_equal(x[f"{at}probs"], whole[f"{at}probs"][:, [1, 4]][:, :, [0, 5]])
    np.testing.assert_array_equal(x[f"{at}k_rope"], whole[f"{at}k_rope"][:, [0, 1]][:, :, [0, 5]])  # G is 3
    np.testing.assert_array_equal(x[f"decode.1.{at}q_norm"], whole[f"decode.1.{at}q_norm"][:, :, [1, 4]])


def test_saved_and_loaded(golden, tmp_path):
    path = tmp_path / "golden.safetensors"
    golden.save(path)
    loaded = Recording.load(path)
    assert list(loaded.points) == list(golden.points)
    for name, x in golden.points.items():
        np.testing.assert_array_equal(loaded.points[name], x)
    assert (loaded.config, loaded.floors, loaded.numerics) == (golden.config, golden.floors, "float32")
    np.testing.assert_array_equal(loaded.ids, golden.ids)
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["qwen3np"])
    assert about["positions"] == [list(range(PROMPT)), [PROMPT], [PROMPT + 1]]
    assert [p.name for p in tmp_path.iterdir()] == ["golden.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ("decode.*", [f"decode.{i}.{name}" for i in range(STEPS) for name in ALL]),
        ("decode.1.layers.0.mlp.act", ["decode.1.model.layers.0.mlp.act"]),
        ("*.q_rope, lm_head", [p + name for p in PASSES for name in ALL if name.endswith(("q_rope", "lm_head"))]),
        ("model.layers.1", [f"{p}model.layers.1" for p in PASSES]),
    ],
)
def test_patterns(config, weights, ids, points, names):
    recording = record(weights, config, ids, steps=STEPS, points=points)
    assert list(recording.points) == names


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"points": "layers.9.*"}, "nothing matches"),
        ({"points": "lm_head,layers.0.qproj"}, "nothing matches 'layers.0.qproj'"),
        ({"points": "layers.0.*", "layers": [1]}, r"nothing in layers \[1\]"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"tokens": [PROMPT]}, "tokens 0 to 11"),
        ({"heads": []}, "none chosen"),
        ({"steps": -1}, "at least 0"),
    ],
)
def test_impossible_choices(config, weights, ids, choice, message):
    with pytest.raises(ValueError, match=message):
        record(weights, config, ids, **choice)


def test_no_place(golden, tmp_path, capsys):
    """Told before anything is computed: with a model that is not there, the place is what is wrong."""
    (tmp_path / "folder.safetensors").mkdir()
    for place, message in (
        ("nowhere/golden.safetensors", "there is no folder"),
        ("golden.npz", "with that ending"),
        ("folder.safetensors", "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            golden.save(tmp_path / place)
        with pytest.raises(SystemExit):
            main(["trace", "--ids", "1", "--model", "no model", "-o", str(tmp_path / place)])
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


def test_not_a_recording(golden, tmp_path):
    path = tmp_path / "golden.safetensors"
    golden.save(path)
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["qwen3np"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Recording.load(path)
    with pytest.raises(ValueError, match="no such file"):
        Recording.load(tmp_path / "other.safetensors")
    changes = [
        *({"config": []}, {"steps": 10**8}, {"steps": 1.0}, {"steps": float("inf")}, {"numerics": "x"}, {"floors": []}),
        *({"floors": {"float32": {"lm_head": "ab"}}}, {"tokens": [99]}, {"heads": [-1]}, {"heads": "ab"}, {"ids": []}),
    ]
    texts = ["{", "[" * 100_000, '{"config": {}}', *(json.dumps(about | change) for change in changes)]
    for text in texts:
        save_file({"lm_head": np.zeros(1)}, path, {"qwen3np": text})
        with pytest.raises(ValueError, match="of another version"):
            Recording.load(path)
    save_file({"lm_head": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a recording"):
        Recording.load(path)


def test_command(config, weights, tmp_path, capsys):
    save_checkpoint(tmp_path / "model", config, weights)
    flags = ["trace", "--model", str(tmp_path / "model"), "--ids", "1,5-7", "--points", "layers.0.*"]
    main(flags)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["point", "shape"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    points = {}
    forward(weights, config, [1, 5, 6, 7], trace=points.__setitem__)
    x = points["model.layers.0"]
    assert table["model.layers.0"][0] == "1x4x40"
    np.testing.assert_allclose(
        np.array(table["model.layers.0"][1:], float), [x.mean(), np.sqrt((x * x).mean()), x.min(), x.max(), 0], 1e-3
    )
    assert table["model.layers.0.self_attn.scores"][-1] == "36"  # 6 heads, 6 hidden of 4 x 4

    main([*flags, "--steps", "1", "-o", str(tmp_path / "golden.safetensors")])
    out, err = capsys.readouterr()
    loaded = Recording.load(tmp_path / "golden.safetensors")
    assert (out, err.splitlines()[-1]) == ("", f"[ids 1,5,6,7, then {loaded.ids[0, 4]}]")
    np.testing.assert_array_equal(loaded.points["model.layers.0"], x)


def test_table_of_broken_weights(config, weights, tmp_path, capsys):
    """What is not finite is counted, and may be all there is; no port is measured by it."""
    key = "model.layers.0.mlp.up_proj.weight"
    save_checkpoint(tmp_path / "model", config, weights | {key: np.full_like(weights[key], np.nan)})
    main(["trace", "--model", str(tmp_path / "model"), "--ids", "1,2", "--points", "layers.0.mlp.*"])
    rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()}
    assert rows["model.layers.0.mlp.gate_proj"][-1] == "0"
    assert rows["model.layers.0.mlp.up_proj"][1:] == ["nan", "nan", "nan", "nan", str(2 * config.intermediate_size)]
    broken = weights | {key: np.full_like(weights[key], np.nan)}
    message = r"^model.layers.0.mlp.up_proj is NaN or infinite at position 0 \(id 1\): .* the checkpoint is damaged$"
    for options in ({}, {"points": "layers.0.mlp.act"}, {"points": "model.embed_tokens", "steps": 1}):
        with pytest.raises(NonFiniteError, match=message):
            record(broken, config, [1, 2], **options)
    assert list(record(broken, config, [1, 2], points="model.embed_tokens").points) == ["model.embed_tokens"]


def test_fed(config, weights, ids):
    """Ids for the decode steps, and greedy ones after them, as the same positions of one forward over all."""
    fed = draw_ids(np.random.default_rng(1), config, 2, 2)
    golden = record(weights, config, ids, fed=fed, steps=3)
    np.testing.assert_array_equal(golden.ids[:, PROMPT:-1], fed)
    whole = {}
    forward(weights, config, golden.ids, trace=whole.__setitem__)
    np.testing.assert_array_equal(golden.ids[:, -1], whole["lm_head"][:, -2].argmax(-1))
    for i in range(3):
        assert relative(golden.points[f"decode.{i}.lm_head"][:, 0], whole["lm_head"][:, PROMPT + i]) <= 2e-6
    with pytest.raises(ValueError, match="1 sequences after a prompt of 2"):
        record(weights, config, ids, fed=[1])
    with pytest.raises(ValueError, match=r"fed: .* outside the vocabulary"):
        record(weights, config, ids, fed=fed + config.vocab_size)
