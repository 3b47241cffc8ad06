"""verify: the same hash however it is computed, and published rows against right and wrong logits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from threadpoolctl import threadpool_info

from qwen3np import NonFiniteError, load
from qwen3np.cli import main
from qwen3np.verify import compared, exact_hash, hashed_ids, published_hash, published_rows, sha256, verify

KERNELS = ("Prescott", "Nehalem", "Sandybridge", "Haswell", "SkylakeX")


def test_the_published_hash(builtin):
    found = verify(builtin, published_hash())
    assert found.sha256 == published_hash()
    assert found.passed
    assert 1e-8 < found.fast_distance < 3e-6
    assert not verify(builtin, "0" * 64).passed


@pytest.mark.parametrize("weights_dtype", ["mapped", "float32"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_storage_and_threads_do_not_matter(weights_dtype, threads, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
    model = load(weights_dtype=weights_dtype, progress=False)
    assert exact_hash(model, hashed_ids(model)) == published_hash()


@pytest.mark.skipif(
    not any(library["internal_api"] == "openblas" for library in threadpool_info()), reason="needs OpenBLAS"
)
def test_other_kernels_of_openblas_give_the_same_hash(monkeypatch):
    for kernel in KERNELS:
        monkeypatch.setenv("OPENBLAS_CORETYPE", kernel)
        command = [sys.executable, "-m", "qwen3np", "verify", "--json"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode < 0:  # this processor lacks the instructions
            continue
        assert json.loads(done.stdout)["sha256"] == published_hash(), kernel


def test_the_hash_is_of_the_bytes_in_order():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert sha256(x) == sha256(np.asfortranarray(x)) == sha256(x.astype(">f4"))
    assert sha256(x) != sha256(x[::-1])


def test_published_rows_are_told_from_wrong_ones():
    rows = published_rows("Qwen/Qwen3-0.6B-Base")
    assert published_rows("/models/Qwen3-0.6B-Base/") == rows
    for other in ("Qwen/Qwen3-0.6B", None, "Qwen3-0.6B-Base/finetuned", "Qwen3-0.6B-Base/model-Q4_0.gguf"):
        assert published_rows(other) is None
    assert len(rows["ids"]) == 18
    norms = np.array(rows["norms"])
    assert norms.shape == (28, 18)
    logits = np.full((18, 151936), -20.0)
    for position, top in enumerate(rows["top"]):
        for token, logit in top:
            logits[position, token] = logit
    assert compared(logits, norms, rows).passed
    assert compared(logits + 5e-4, norms * (1 + 5e-5), rows).passed
    assert not compared(logits * 1.001, norms, rows).passed
    assert not compared(logits, norms * 1.001, rows).passed
    other = logits.copy()
    other[3, 7] = 99  # another greedy token
    report = compared(other, norms, rows)
    assert (report.same_greedy, report.passed) == (17, False)


def test_the_command_says_so_and_ends_with_its_status(capsys, builtin, tmp_path):
    main(["verify"])
    assert "published     the same bits" in capsys.readouterr().out
    weights = {name: tensor.copy() for name, tensor in builtin.weights.items()}
    weights["model.norm.weight"] = np.nextafter(weights["model.norm.weight"], np.float32(np.inf))
    replace(builtin, weights=weights).save(tmp_path / "other")
    main(["verify", "--model", str(tmp_path / "other"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] != published_hash()
    assert found["published"] is None
    main(["verify", "--model", str(tmp_path / "other")])
    assert "compare it with the hash on another machine" in capsys.readouterr().out


def test_a_difference_is_exit_status_1(capsys, monkeypatch):
    monkeypatch.setattr("qwen3np.commands.verify.published_hash", lambda: "0" * 64)
    with pytest.raises(SystemExit) as ended:
        main(["verify"])
    assert ended.value.code == 1
    assert f"DIFFERENT: it should be {'0' * 64}" in capsys.readouterr().out


def test_damaged_weights_are_named(builtin):
    weights = {name: tensor.copy() for name, tensor in builtin.weights.items()}
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"^model\.layers\.2\.mlp\.up_proj is NaN"):
        verify(replace(builtin, weights=weights))


@pytest.mark.parametrize("change", ["--adapter", "--rope-scaling"])
def test_a_changed_model_is_not_held_against_the_published_hash(change, capsys, builtin, tmp_path):
    weight = "model.layers.0.self_attn.q_proj.weight"
    a, b = np.ones((1, 160), np.float32), np.full((256, 1), 1e-3, np.float32)
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "base_model_name_or_path": "built-in", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    main(["verify", change, str(tmp_path) if change == "--adapter" else "yarn:4", "--json"])  # ends with status 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] != published_hash()
    assert found["published"] is None
    assert found["numpy"] == np.__version__
