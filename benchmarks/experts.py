"""Decode with a mixture of experts larger than memory, from disk, and print what is touched and read.

    python benchmarks/experts.py --model FOLDER --like DIR [--layers 48] [--tokens 16]

DIR has the config.json of the model, such as that of Qwen3-30B-A3B (61 GB); FOLDER is made with as many of its layers,
random, if it is not there. The file's pages are dropped from the system's cache first. Linux: reads /proc.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from machine import heading

from qwen3np import Config, KVCache, load, save_checkpoint
from qwen3np.commands.bench import memory
from qwen3np.ops.fast.threads import num_threads
from qwen3np.weights import weight_shapes


class Drawn(Mapping[str, np.ndarray]):
    """Random trained-like weights, created on demand: parts of one array, at random places."""

    def __init__(self, config: Config) -> None:
        """Draw the array that all weights are parts of."""
        self.shapes = weight_shapes(config)
        self.numbers = np.random.default_rng(0).standard_normal(1 << 26, np.float32)
        self.scaled: dict[int, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor in bfloat16, the same each time."""
        shape = self.shapes[name]
        rng = np.random.default_rng(list(name.encode()))
        if len(shape) == 1:
            return np.exp(0.4 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
        if shape[1] not in self.scaled:
            self.scaled[shape[1]] = (self.numbers / np.float32(shape[1] ** 0.5)).astype(ml_dtypes.bfloat16)
        size, source = shape[0] * shape[1], self.scaled[shape[1]]
        start = int(rng.integers(max(source.size - size, 1)))
        return np.resize(source[start : start + size], shape)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the file."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self.shapes)


def read_bytes() -> int:
    """Return what this process has read from disks."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def main() -> None:
    """Create the checkpoint if necessary, decode, and print a line for each token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=16)
    a = parser.parse_args()
    if not (a.model / "config.json").exists():
        config = Config.from_file(a.like)
        config = replace(config, num_hidden_layers=a.layers or config.num_hidden_layers)
        print(f"[making {a.model}]", file=sys.stderr)
        save_checkpoint(a.model, config, Drawn(config))
    file = a.model / "model.safetensors"
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    print(heading(num_threads()))
    began = time.perf_counter()
    model = load(a.model, weights_dtype="bfloat16", progress=False)
    config = model.config
    print(f"- {config.num_hidden_layers} layers of {config.num_experts} experts, {file.stat().st_size / 1e9:.1f} GB")
    print(f"- loaded in {time.perf_counter() - began:.3f} s\n")
    always = sum(w.nbytes for name, w in model.weights.items() if ".experts." not in name and "embed" not in name)
    expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size
    hit: set[tuple[str, int]] = set()

    def trace(name: str, x: np.ndarray) -> None:
        if name.endswith("router_indices"):
            hit.update((name, int(e)) for e in x.ravel())

    print("token     seconds    read, MB  new experts  touched so far, MB  of the file in memory, MB  other memory, MB")
    cache = KVCache.allocate(config, 1, a.tokens)
    rng = np.random.default_rng(0)
    ids = [int(rng.integers(config.vocab_size)) for _ in range(a.tokens)]
    for n, token in enumerate(ids):
        began, before, known = time.perf_counter(), read_bytes(), len(hit)
        model.forward([[token]], cache, last_only=True, trace=trace)
        seconds, now = time.perf_counter() - began, memory()
        row = (
            f"{n:5} {seconds:11.2f} {(read_bytes() - before) / 1e6:11,.0f} {len(hit) - known:12,}"
            f"{(always + len(hit) * expert) / 1e6:20,.0f} {now['file_bytes'] / 1e6:26,.0f}"
            f" {now['anonymous_bytes'] / 1e6:17,.0f}"
        )
        print(row, flush=True)


if __name__ == "__main__":
    main()
