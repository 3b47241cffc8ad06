"""What the exact engine costs next to the fast one, and what it gains.

    PYTHONPATH=tests python benchmarks/exact.py [--layers 28] [--configs 25] [--repeat 5]

Times of the built-in model and of random weights with the sizes of Qwen3-0.6B, the engines interleaved in a single run,
each ratio the median of the ratios; the share of elements that each stage leaves open; the distance from float64 over
configs drawn from the whole family; the peak of memory, each engine in a separate process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from drawing import draw_any_config, draw_ids, relative, trained_like
from machine import heading
from random_checkpoint import SIZES

from qwen3np import Model, forward, init_weights, load
from qwen3np.commands.bench import filled_cache, memory
from qwen3np.numerics import BFLOAT16
from qwen3np.ops.exact import elementary, rounding, sums
from qwen3np.ops.fast.threads import num_threads

ENGINES, PROMPTS, POSITIONS = ("fast", "exact"), (64, 512), 512


def large(layers: int, mapped: bool) -> Model:
    """Return random weights with the sizes of Qwen3-0.6B: float32, or matrices in bfloat16 as in a mapped file."""
    config = replace(SIZES["0.6B"], num_hidden_layers=layers)
    weights = init_weights(config, 0, trained_like=True)
    if mapped:
        weights = {name: w.astype(BFLOAT16) if w.ndim == 2 else w for name, w in weights.items()}
    return replace(load(), config=config, weights=weights)


def works(model: Model, numerics: str) -> dict[str, Callable[[str], float]]:
    """Return functions of an engine's name that take the time of a prompt, and of a step on a cache."""
    positions = min(POSITIONS, model.config.max_position_embeddings - 1)
    rng, cache = np.random.default_rng(0), filled_cache(model.config, positions, numerics=numerics)

    def timed(ids: np.ndarray, cache: Any = None) -> Callable[[str], float]:
        def run(engine: str) -> float:
            if cache is not None:
                cache.lengths[:] = positions
            began = time.perf_counter()
            forward(model.weights, model.config, ids, cache, numerics=numerics, engine=engine, last_only=True)
            return time.perf_counter() - began

        return run

    ids = rng.integers(0, model.config.vocab_size, (1, max(PROMPTS)))
    found = {f"prefill of {n}": timed(ids[:, :n]) for n in PROMPTS}
    return found | {f"decode at {positions}": timed(ids[:, :1], cache)}


def print_times(name: str, model: Model, numerics: str, repeat: int) -> None:
    """Print a line for each kind of work: milliseconds of both engines, and their ratio."""
    for work, run in works(model, numerics).items():
        times = np.array([[run(engine) for engine in ENGINES] for _ in range(repeat + 1)][1:])
        fast, exact = 1000 * np.median(times, axis=0)
        ratio = np.median(times[:, 1] / times[:, 0])
        print(f"| {name}, {numerics} | {work} | {fast:,.1f} | {exact:,.1f} | {ratio:.2f} |", flush=True)


@contextmanager
def counted(stages: Counter[str]) -> Generator[None]:
    """Count the elements of each stage: all, those that float64 leaves open, and those that two terms leave open."""
    nearest, pairs = rounding.nearest, rounding.nearest_pairs

    def count(s: np.ndarray, bound: np.ndarray, finish: Callable[..., np.ndarray], *more: Any) -> np.ndarray:
        stages["all"] += s.size

        def counting(at: tuple[np.ndarray, ...]) -> np.ndarray:
            stages["two terms"] += len(at[0])
            return finish(at)

        return nearest(s, bound, counting, *more)

    def count_pairs(*pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, still_open = pairs(*pair)
        stages["whole numbers"] += int(still_open.sum())
        return y, still_open

    with (
        patch.object(sums, "nearest", count),
        patch.object(elementary, "nearest", count),
        patch.object(rounding, "nearest_pairs", count_pairs),
        patch.object(elementary, "nearest_pairs", count_pairs),
        patch.dict(os.environ, QWEN3NP_NUM_THREADS="1"),  # several would lose counts
    ):
        yield


def print_stages(name: str, model: Model, numerics: str) -> None:
    """Print how many elements each stage gets, in a prompt of 64 tokens."""
    stages: Counter[str] = Counter()
    with counted(stages):
        works(model, numerics)["prefill of 64"]("exact")
    two, whole = stages["two terms"] / stages["all"], stages["whole numbers"] / stages["all"]
    print(f"| {name}, {numerics} | {stages['all']:,} | {two:.1e} | {whole:.1e} |", flush=True)


def distances(configs: int) -> list[float]:
    """Return, for configs of the whole family, the exact engine's distance from float64 relative to the fast one's."""
    ratios: list[float] = []
    for seed in range(configs):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        weights, ids = trained_like(config, seed), draw_ids(rng, config, 2, 33)
        truth = forward(weights, config, ids, numerics="float64")
        fast, exact = (relative(forward(weights, config, ids, engine=engine), truth) for engine in ENGINES)
        ratios.append(exact / fast)
    return ratios


def peak(engine: str, layers: int) -> float:
    """Return the peak of memory (MB) of a process that runs each kind of work with this engine."""
    command = [sys.executable, __file__, "--peak", engine, "--layers", str(layers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="of the large model (28)")
    parser.add_argument("--configs", type=int, default=25)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peak", choices=ENGINES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak:
        for run in works(large(a.layers, mapped=False), "float32").values():
            run(a.peak)
        print(memory()["peak_bytes"] / 1e6)
        return
    print(heading(num_threads()))
    print("\n| model, numerics | work | fast (ms) | exact (ms) | ratio |\n|---|---|---|---|---|")
    models = {"built-in": load(), f"0.6B, {a.layers} layers": large(a.layers, mapped=False)}
    models[f"0.6B in bfloat16, {a.layers} layers"] = large(a.layers, mapped=True)
    runs = [(name, model, numerics) for name, model in models.items() for numerics in ("float32", "bfloat16")]
    for name, model, numerics in runs:
        print_times(name, model, numerics, a.repeat * (10 if name == "built-in" else 1))
    print("\n| model, numerics | elements | open after float64 | after two terms |\n|---|---|---|---|")
    for run in runs:
        print_stages(*run)
    ratios = distances(a.configs)
    print(f"\nfloat32, distance from float64, exact / fast: median {median(ratios):.2f}, worst {max(ratios):.2f}")
    del models, runs
    sizes = {engine: peak(engine, a.layers) for engine in ENGINES}
    print(f"peak of memory: {', '.join(f'{engine} {size:,.0f} MB' for engine, size in sizes.items())}")


if __name__ == "__main__":
    main()
