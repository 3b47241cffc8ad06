"""One hash of the exact engine's logits, to be compared between machines, BLAS libraries, and versions.

    PYTHONPATH=tests python benchmarks/same_bits.py [--configs 100]

For each config drawn from the whole family and each numerics it computes a prompt in several ways (on one thread, token
by token, in chunks, a sequence alone, a prefix), counts those whose bits differ from the whole prompt's, and adds the
whole prompt's to the hash, which it prints after every tenth config. Weights are rounded to bfloat16, so that no last
bit of the functions that draw them matters.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from unittest.mock import patch

import ml_dtypes
import numpy as np
from drawing import draw_any_config, draw_ids, trained_like
from machine import heading

from qwen3np import KVCache, Model, forward
from qwen3np.ops.fast.threads import num_threads

NUMERICS, LENGTH = ("float32", "bfloat16", "bfloat16-grouped"), 21


def ways(model: Model, ids: np.ndarray, numerics: str, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the logits of ids (2, LENGTH), or of a part of them, computed in another way and cut from the whole."""

    def run(ids: np.ndarray, cache: KVCache | None = None) -> np.ndarray:
        return forward(model.weights, model.config, ids, cache, numerics=numerics, engine="exact")

    def in_chunks(sizes: Sequence[int]) -> np.ndarray:
        cache = KVCache.allocate(model.config, 2, LENGTH)
        edges = np.minimum(np.cumsum([0, *sizes, LENGTH]), LENGTH).tolist()
        return np.concatenate([run(ids[:, a:b], cache) for a, b in pairwise(edges) if a < b], axis=1)

    whole = run(ids)
    with patch.dict(os.environ, QWEN3NP_NUM_THREADS="1"):
        yield run(ids), whole
    for sizes in ([1] * LENGTH, [9, 9], [chunk]):
        yield in_chunks(sizes), whole
    yield run(ids[1:]), whole[1:]
    yield run(ids[:, :13]), whole[:, :13]


def main() -> None:
    """Print the machine, and counts and hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=100)
    configs = parser.parse_args().configs
    print(heading(num_threads()), flush=True)
    total, runs, unequal = hashlib.sha256(), 0, 0
    for seed in range(configs):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in trained_like(config, seed).items()}
        ids, chunk = draw_ids(rng, config, 2, LENGTH), int(rng.integers(1, LENGTH))
        for numerics in NUMERICS:
            for other, whole in ways(Model(config, weights, None, {}), ids, numerics, chunk):
                runs += 1
                unequal += other.tobytes() != whole.tobytes()
            total.update(whole.tobytes())
        if (seed + 1) % 10 == 0 or seed + 1 == configs:
            print(f"{seed + 1} configs: {unequal} of {runs} runs unequal; SHA-256 {total.hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
