"""GGUF files against the ggml project's own package (gguf), and files that llama.cpp's llama-quantize wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qwen3np import forward, read_checkpoint
from qwen3np.files.gguf import Blocks, gguf_name, read_gguf

gguf = pytest.importorskip("gguf")
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
REAL = Path(os.environ.get("QWEN3NP_DATA", "/nowhere")).parent / "gguf"


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", TYPES)
def test_every_block_type_gives_the_numbers_of_the_package(kind):
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (13, 2 * size), dtype=np.uint8)
    w = Blocks((13, 2 * block), data, kind)
    with np.errstate(all="ignore"):
        truth = gguf.quants.dequantize(data, kind).reshape(13, 2 * block)
    np.testing.assert_array_equal(np.asarray(w), truth)
    np.testing.assert_array_equal(np.asarray(w[3:9][2:]), truth[5:9])
    np.testing.assert_array_equal(w[[5, 0, 5]], truth[[5, 0, 5]])
    assert w.nbytes == data.nbytes


@pytest.mark.skipif(not REAL.is_dir(), reason="no real GGUF files here")
@pytest.mark.parametrize("path", sorted(REAL.glob("*.gguf")), ids=lambda path: path.name)
def test_real_files(path):
    """llama-quantize's files: the numbers of gguf.quants, and the logits of a float32 forward over them."""
    config, weights, _ = read_gguf(path)
    plain, _ = read_checkpoint(REAL / path.name.split("-")[0])
    eos = json.loads((REAL / path.name.split("-")[0] / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(config.eos_token_id) == sorted(eos)
    for key, value in vars(plain).items():
        assert key in ("eos_token_id", "initializer_range") or getattr(config, key) == value, key
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    truth = {}
    for name, w in weights.items():
        place, expert = gguf_name(name)
        truth[name] = stored[place] if expert is None else stored[place][expert]
        np.testing.assert_array_equal(np.asarray(w, np.float32), truth[name])
    ids = json.loads((REAL / path.name.split("-")[0] / "ids.json").read_text())
    assert relative(forward(weights, config, ids), forward(truth, config, ids)) <= 3e-6
