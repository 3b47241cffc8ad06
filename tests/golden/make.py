"""Make the golden files: what transformers computes for two small checkpoints, at every recorded point.

    PYTHONPATH=tests python tests/golden/make.py

Each file holds, as tensors, the weights (weights.NAME, bfloat16 as 16-bit integers) and the points of a prefill and of
each decode step (float32.prefill.NAME, bfloat16.decode.0.NAME, ...; bfloat16 likewise), at the positions in ROWS; as
metadata, the config, the token ids and the versions that made it.
"""

import json

import numpy as np
import oracle
import torch
import transformers
from drawing import draw_ids, trained_like
from safetensors.numpy import save_file
from test_golden import FOLDER, PROMPT, STEPS, kept, parts

from qwen3np import Config
from qwen3np.numerics import BFLOAT16

SIZES = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "tied": Config(
        vocab_size=96,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        head_dim=12,
        rope_theta=1e6,
        tie_word_embeddings=True,
        **SIZES,
    ),
    "untied_bias": Config(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=8,
        head_dim=10,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        attention_bias=True,
        **SIZES,
    ),
}


def bits(x: np.ndarray) -> np.ndarray:
    """Return bfloat16 values as integers, which every version of safetensors stores."""
    return x.astype(BFLOAT16).view(np.uint16)


for seed, (name, config) in enumerate(CONFIGS.items()):
    weights = {key: w.astype(BFLOAT16) for key, w in trained_like(config, seed).items()}
    ids = draw_ids(np.random.default_rng(seed), config, 1, PROMPT + STEPS)
    tensors = {f"weights.{key}": bits(w) for key, w in weights.items()}
    for dtype, stored in (("float32", np.asarray), ("bfloat16", bits)):
        recorded: list[oracle.Points] = []
        oracle.prefill_and_decode(oracle.model_of(config, weights, dtype), ids, STEPS, recorded)
        for (part, start, rows), points in zip(parts(), recorded, strict=True):
            for point, x in points.items():
                if not point.endswith((".keys", ".values", ".product")):
                    tensors[f"{dtype}.{part}.{point}"] = stored(kept(point, x, start, rows))
    about = {
        "config": config.to_dict(),
        "ids": ids.tolist(),
        "made_by": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    # under one key, since safetensors writes several in random order
    save_file(tensors, FOLDER / f"{name}.safetensors", {"about": json.dumps(about)})
