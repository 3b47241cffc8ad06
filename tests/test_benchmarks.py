"""The benchmarks measure what they claim: the same model on both sides, and a full cache."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import damage
import formats
import numpy as np
import pytest
import verdicts
from compare import measure_vllm, tables
from engine import measure, sizes
from random_checkpoint import SIZES, write_random_checkpoint
from roofline import attention_work, part_table

from qwen3np import Config, Model, init_weights, load, save_checkpoint
from qwen3np.audit.damage_kinds import what_if
from qwen3np.cli import main
from qwen3np.commands.bench import filled_cache, seconds
from qwen3np.stored import kind


def test_filled_cache(config):
    cache = filled_cache(config, 7, 3)
    assert cache.lengths.tolist() == [7, 7, 7]
    assert cache.max_length == 8
    for array in (cache.k, cache.v):
        assert np.all(array[..., :7, :] != 0)
        assert not np.array_equal(array[:, :, 0], array[:, :, 1])


def test_vllm_is_asked_for_a_prompt_with_and_without_more_tokens(tmp_path):
    """With a stand-in of vLLM, which has no build here: 10 ms a token of the prompt, 50 ms for each further one."""
    program = tmp_path / "vllm"
    program.write_text(f"""#!{sys.executable}
import json, os, sys
assert sys.argv[1:3] == ["bench", "latency"] and os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-2"
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[3:])
assert (flags["model"], flags["dtype"], flags["batch-size"]) == ("folder", "bfloat16", "1")
prompt, new = int(flags["input-len"]), int(flags["output-len"])
assert prompt + new <= int(flags["max-model-len"])
seconds = 0.01 * prompt + 0.05 * (new - 1)
json.dump({{"avg_latency": 9, "latencies": [seconds, 9, seconds]}}, open(flags["output-json"], "w"))
""")
    program.chmod(0o755)
    found = measure_vllm(program, Path("folder"), "bfloat16", [32, 512, 16384], threads=3)
    assert found == pytest.approx(
        {
            "prefill of 32 (tokens/s)": 100,
            "decode at 32 (ms/token)": 50,
            "prefill of 512 (tokens/s)": 100,
            "decode at 512 (ms/token)": 50,
            "decode at 16,384 (ms/token)": 50,
        }
    )


def test_seconds_leaves_out_the_first_call():
    calls: list[None] = []
    assert len(seconds(lambda: calls.append(None), most=4)) == 3
    assert len(calls) == 4
    assert len(seconds(lambda: calls.append(None), budget=0)) == 1


def test_the_formats_are_of_one_model(tmp_path):
    """But for Q4_K, whose numbers are drawn."""
    config = replace(SIZES["0.6B"], vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    weights = init_weights(config, 0, trained_like=True)
    save_checkpoint(tmp_path / formats.PLACES["bfloat16"], config, weights, dtype="bfloat16")
    formats.make(tmp_path)
    models = {
        name: load(tmp_path / place, progress=False, weights_dtype="mapped") for name, place in formats.PLACES.items()
    }
    kinds = {name: kind(model.weights["model.layers.0.mlp.up_proj.weight"]) for name, model in models.items()}
    assert kinds == {name: name for name in formats.PLACES}
    truth = models["bfloat16"]([1, 2, 3])
    for name, most in {"FP8": 0.1, "Q8_0": 0.03}.items():
        error = np.linalg.norm(models[name]([1, 2, 3]) - truth) / np.linalg.norm(truth)
        assert 1e-4 < error < most
    assert np.isfinite(models["Q4_K"]([1, 2, 3])).all()


def test_the_sizes_are_the_official_ones(data):
    for size, config in SIZES.items():
        assert config == Config.from_file(data / "checkpoints" / f"Qwen3-{size}")


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """A checkpoint whose vocabulary is larger than the tokenizer it gets, and whose stop id is another's."""
    like = tmp_path_factory.mktemp("like")
    sizes = replace(config, vocab_size=9000, max_position_embeddings=600, eos_token_id=(8999,))
    (like / "config.json").write_text(json.dumps(sizes.to_dict()))
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(folder, like=like)
    return folder


def test_a_random_checkpoint_generates(folder, capsys):
    main(["generate", "--model", str(folder), "--max-new-tokens", "9", "One"])
    out, err = capsys.readouterr()
    model = load(folder, progress=False)
    new = model.generate(model.tokenizer.encode("One"), max_new_tokens=9)[0]
    assert max(new) >= model.tokenizer.vocab_size  # ids that no text belongs to
    assert out == model.tokenizer.decode(new) + "\n"
    assert "answer 9 tokens" in err


def test_measures_of_an_engine(folder, config):
    found = measure("qwen3np bfloat16", folder, 2, quick=True)
    lengths = {int(length) for name in found for length in re.findall(r"(?:prefill of|decode at) (\d+)", name)}
    assert lengths == {32, 512}
    file, cache = (folder / "model.safetensors").stat().st_size, 2 * 4 * 2 * 2 * 513 * 16  # k and v, bytes, L, K, Dh
    peak, ratio = (
        found[f"peak memory, 512 tokens{end}"] for end in (" (MB)", ", against file + float32 cache + 100 MB (x)")
    )
    assert ratio == pytest.approx(1e6 * peak / (file + cache + 1e8))


def test_sizes_leave_room(config):
    assert sizes(config, quick=False) == [32]
    assert sizes(replace(config, max_position_embeddings=40960), quick=True) == [32, 512]
    assert sizes(replace(config, max_position_embeddings=40960), quick=False) == [32, 512, 4096, 16384]


def test_ratios_speak_for_the_first():
    rates, times, odd = "prefill of 32 (tokens/s)", "decode at 32 (ms/token)", "decode of 8, against one (x)"
    turns = {
        "a": [{rates: 10.0, times: 2.0, odd: 1.0}, {rates: 40.0, times: 3.0}, {rates: 30.0, times: 1.0}],
        "b": [{rates: 10.0, times: 2.0}, {rates: 10.0, times: 6.0}, {rates: 10.0, times: 4.0}],
    }
    medians, ratios = tables(turns, [("a", "b")]).split("\n\n")
    assert f"| {rates} | 30 | 10 |" in medians
    assert f"| {odd} | 1 |  |" in medians
    assert ratios.splitlines()[2:] == [f"| {rates} | 3.00 (1.00 to 4.00) |", f"| {times} | 2.00 (1.00 to 4.00) |"]


def test_attention_work(config):
    # q k and p v: a multiply-add for each lane of each pair of a query and what it may see
    pairs = np.tril(np.ones((7, 7), int)).sum()
    assert attention_work(config, 7) == 2 * config.num_hidden_layers * 6 * pairs * config.head_dim


@pytest.mark.parametrize(("rows", "position"), [(1, 9), (9, 0)])
def test_the_parts_make_up_the_forward(config, weights, rows, position):
    lines = part_table(Model(config, weights, None, {}), rows, position, rounds=1).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # share: of the forward; time: of one of the two layers, or once
    assert sum(float(row[-1].rstrip("%")) for row in cells[:-1]) == pytest.approx(100, abs=1)
    times = [float(row[1]) * (1 if "(once)" in row[0] else 2) for row in cells[:-1]]
    rounding = 0.006 * sum(map(abs, times))  # three digits each
    assert sum(times) == pytest.approx(float(cells[-1][1]), abs=rounding)
    assert sum(row[2] != "" for row in cells) == 7  # q k v, attention, o, gate up, down, head, forward


@pytest.mark.slow
def test_counts_of_verdicts(capsys):
    """Two models, a wide port of two layers, and a bug: each count runs as its command says."""
    some = Namespace(first=0, last=2, numerics=None, part="all", layers=1)
    for count, said in (
        (verdicts.right, "right ports: 0 alarms of 2"),
        (verdicts.views, "log-probabilities of right ports: 0 alarms of 16"),
        (verdicts.bugs, "float32, all: first point right in 2 of 2; 0 called sure"),
    ):
        count(some)
        assert said in capsys.readouterr().out


def test_damage_stores_what_llama_cpp_stores(builtin):
    ids = builtin.text.encode((Path(__file__).parent / "golden" / "facts.txt").read_text(encoding="utf-8"))
    quantised = replace(builtin, weights=what_if(builtin.weights, "q4_0"))
    kl = damage.as_llama_stores(builtin, quantised, ids, 64)
    found = [kl.mean(), np.median(kl), np.quantile(kl, 0.99), kl.max()]
    printed = [0.009499, 0.002641, 0.108979, 0.254563]  # by llama.cpp: see LLAMA in test_damage.py
    np.testing.assert_allclose(found, printed, rtol=0, atol=5e-6)


def test_damage_finds_the_truth_when_it_measures_everything(config, weights):
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 32).tolist()
    report = damage.truth(Model(config, weights, None, {}), "fp8", ids, 16, 2)
    assert report.count("| 5 of 5, in this order | 1.000 |") == 6
    assert report.count("| 2 of 2, in this order | 1.000 |") == 3  # layers
