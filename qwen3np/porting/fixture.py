"""A kit for the test suite of a port: tiny checkpoints that show the bugs, with their golden values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3np.checkpoint import init_weights, save_checkpoint
from qwen3np.config import Config
from qwen3np.numerics import BFLOAT16
from qwen3np.porting.compare import MARGIN
from qwen3np.porting.record import record

PROMPT, STEPS = 256, 3
# Nothing is equal by chance: Dh is not D / H, G is 3, no size is another's.
TIED = Config(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
CONFIGS = {"tied": TIED, "untied": replace(TIED, tie_word_embeddings=False)}
README = f"""# Golden values for a port of Qwen3

Each folder has a tiny checkpoint (`config.json`, `model.safetensors`, in bfloat16) with weights as after training, and
what Qwen3 makes of it:

- `golden.safetensors`: every number on the way, in float32, for a prompt of {PROMPT} tokens and {STEPS} decode steps
  (under `decode.0.`, `decode.1.`, ...), with the ids in its metadata. `golden.npz` has the same arrays, and `ids`.
- `tolerances.json`: per precision and point, the relative L2 distance that is still rounding:
  {MARGIN:g} times what the reference's own evaluation in that precision is away from its float64 one.

In a test: load the checkpoint, feed the first {PROMPT} of the ids at once and then one at a time, and assert at each
point |mine - golden| / |golden| <= tolerance, with norms over the whole array (for scores, where the golden value is
finite). Begin with `model.embed_tokens` and go on in the order of `tolerances.json`: the first point that fails is the
wrong step.

To be told more, write your arrays under the same names to a safetensors, an npz or .npy files:

    qwen3np compare tied/golden.safetensors mine.safetensors --model tied
"""


def write_fixture(folder: str | Path) -> None:
    """Write the kit into a new folder. Raises ValueError where it holds a checkpoint already."""
    folder = Path(folder)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        weights = {key: w.astype(BFLOAT16) for key, w in init_weights(config, seed, trained_like=True).items()}
        save_checkpoint(folder / name, config, weights)
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, PROMPT))
        golden = record(weights, config, ids, steps=STEPS)
        golden.save(folder / name / "golden.safetensors")
        cast("Any", np.savez_compressed)(folder / name / "golden.npz", ids=golden.ids, **golden.points)
        tolerances = {p: {k: MARGIN * max(f[0], 2**-25) for k, f in of.items()} for p, of in golden.floors.items()}
        (folder / name / "tolerances.json").write_text(json.dumps(tolerances, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
