"""Print the peak memory while a long prompt goes through a model, next to the sizes of its file and its cache.

    python benchmarks/long_prompt.py --model FOLDER [--length 32768]

Weights are mapped as bfloat16, the cache is float32. Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qwen3np import generate, load
from qwen3np.commands.bench import memory

EVERY = 4096  # tokens between two lines


def main() -> None:
    """Compute the prompt and print a line now and then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--length", type=int, default=32768)
    a = parser.parse_args()
    model = load(a.model, weights_dtype="bfloat16", progress=False)
    config, done, began = model.config, 0, time.perf_counter()
    file = sum(path.stat().st_size for path in a.model.glob("*.safetensors"))
    position_bytes = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    print(" tokens   seconds   peak, MB   file + cache, MB   above it, MB")

    def progress(new: int) -> None:
        nonlocal done
        done += new
        if done % EVERY == 0 or done == a.length:
            peak, expected = memory()["peak_bytes"] / 1e6, (file + position_bytes * done) / 1e6
            row = (
                f"{done:7,} {time.perf_counter() - began:9.1f} {peak:10,.0f} {expected:18,.0f} {peak - expected:14,.0f}"
            )
            print(row, flush=True)

    ids: list[int] = np.random.default_rng(0).integers(0, config.vocab_size, a.length).tolist()
    generate(model.weights, config, ids, max_new_tokens=1, progress=progress)


if __name__ == "__main__":
    main()
