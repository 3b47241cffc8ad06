"""Matrices quantised on the fly, against ggml's package and the nearest codes; caches that keep fewer digits."""

from __future__ import annotations

from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
from drawing import SMALL, trained_like

from qwen3np import Config
from qwen3np.audit.damage_kinds import GGUF, short_caches, what_if

DENSE = Config(**SMALL | {"intermediate_size": 64})
SPARSE = replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.mark.parametrize("kind", GGUF)
def test_what_if_is_what_ggml_makes(kind):
    weights = trained_like(SPARSE, 1)
    found, number = what_if(weights, kind), gguf.GGMLQuantizationType[kind.upper()]
    for name, w in weights.items():
        if w.ndim == 1 or name.endswith("mlp.gate.weight"):
            assert found[name] is w
        else:
            data = gguf.quants.quantize(w, number)
            np.testing.assert_array_equal(np.asarray(found[name]), gguf.quants.dequantize(data, number))
            assert found[name].nbytes == data.nbytes
            assert found[name].format == kind.upper()


@pytest.mark.parametrize("shape", [(64, 32), (200, 160), (256, 128)])
def test_fp8_and_int8_are_the_nearest_codes(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32) ** 3
    w[3] = 0
    for kind, block, codes in (
        ("fp8", 128, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)),
        ("int8", None, np.arange(-127.0, 128)),
    ):
        found = np.asarray(what_if({"w": w}, kind)["w"])
        codes = np.sort(codes[np.isfinite(codes)])
        for rows in range(0, len(w), block or 1):
            for columns in range(0, w.shape[1], block or w.shape[1]):
                here = slice(rows, rows + (block or 1)), slice(columns, columns + (block or w.shape[1]))
                scale = np.abs(w[here]).max() / codes[-1]
                exact = w[here].astype(np.float64) / (scale or 1)
                nearest = np.abs(exact[..., None] - codes).min(-1)
                np.testing.assert_allclose(np.abs(found[here] / (scale or 1) - exact), nearest, atol=2e-4)


def test_caches():
    config = replace(DENSE, head_dim=48)
    rng = np.random.default_rng(0)
    k, v = 100 * rng.standard_normal((2, 2, 7, 48)), rng.standard_normal((2, 7, 96))
    k, v = k.astype(np.float32), v.astype(np.float32)
    k[0, 0, 0, :2] = 500, -1e4
    for kind in ("float16", "q8_0", "fp8"):
        short = short_caches(config, kind)
        assert len(short) == 2 * config.num_hidden_layers
        keys = short["model.layers.1.self_attn.k_rope"](k)
        values = short["model.layers.1.self_attn.v_proj"](v)
        for got, x in ((keys, k), (values, v.reshape(2, 7, 2, 48))):
            if kind == "q8_0":  # a block and a half for each head
                for part in (slice(0, 32), slice(32, 48)):
                    most = np.abs(x[..., part]).max(-1, keepdims=True)
                    error = np.abs(got.reshape(x.shape)[..., part] - x[..., part])
                    assert (error <= most * (0.5 / 127 + 2**-11)).all()
                    assert error.max() > 0
            elif kind == "float16":
                np.testing.assert_array_equal(got, x.astype(np.float16).reshape(got.shape))
            else:
                wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
                np.testing.assert_array_equal(got, wanted.astype(np.float32).reshape(got.shape))


def test_rows_that_blocks_do_not_divide():
    config = replace(DENSE, intermediate_size=50)
    for kind in ("q4_0", "int8"):
        with pytest.raises(ValueError, match=r"model\.layers\.\d\.mlp\.(gate|up|down)_proj\.weight: "):
            what_if(trained_like(config, 0), kind)
