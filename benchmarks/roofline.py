"""Print what NumPy can do at best here with the matrices of a model, and how near to it the model comes.

    python benchmarks/roofline.py --model FOLDER [--threads 2]
    python benchmarks/roofline.py --like DIR        # random weights in the sizes of DIR/config.json

The limits: reading memory; each matrix once through sgemv (one row) and sgemm (many rows) on BLAS's own threads; the
same from bfloat16, widened in blocks that stay in the cache, by threads that never wait for each other. Then the model,
and each part of a layer run by itself over all layers, with the weights of each. Limits and model take turns. Linux.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np
from compare import markdown, value
from machine import heading, others
from threadpoolctl import ThreadpoolController

from qwen3np import Config, KVCache, Model, Weights, init_weights, load, read_checkpoint
from qwen3np.attention import attend
from qwen3np.commands.bench import decode_seconds, filled_cache, prefill_seconds, seconds
from qwen3np.linear import linear
from qwen3np.norm import rms_norm
from qwen3np.numerics import silu
from qwen3np.rope import rotary_tables, rotate
from qwen3np.threads import blas_threads

ROWS, POSITIONS, MIDDLE = (32, 512, 4096), (32, 512, 16384), 512
BLOCK = 1 << 18  # elements that are widened at a time: 1 MiB of float32
READ = 1 << 28  # elements of the array that is only read: 1 GiB
BLAS = ThreadpoolController()
RNG = np.random.default_rng(0)
Run = Callable[[], object]
HEAD = {True: "model.embed_tokens.weight", False: "lm_head.weight"}


def normal(*shape: int) -> np.ndarray:
    """Return random numbers."""
    return RNG.standard_normal(shape, np.float32)


def read(threads: int) -> Run:
    """Return a function that reads READ elements, in threads."""
    parts = np.array_split(np.ones(READ, np.float32), threads)

    def run() -> list[float]:
        with BLAS.limit(limits=1), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda part: np.dot(part, part), parts))

    return run


def products(matrices: Iterable[np.ndarray], rows: int, threads: int) -> Run:
    """Return a function that multiplies rows by each matrix, on BLAS's own threads."""
    matrices = list(matrices)
    shape = () if rows == 1 else (rows,)
    xs, ys = ({size: normal(*shape, size) for size in {w.shape[axis] for w in matrices}} for axis in (1, 0))

    def run() -> None:
        with BLAS.limit(limits=threads):
            for w in matrices:
                np.matmul(xs[w.shape[1]], w.T, out=ys[w.shape[0]])

    return run


def widened(matrices: Iterable[np.ndarray], threads: int) -> Run:
    """Return a function that multiplies one row by each bfloat16 matrix; a thread has the same share of all of them."""
    matrices = list(matrices)
    xs, ys = ({size: normal(size) for size in {w.shape[axis] for w in matrices}} for axis in (1, 0))

    def share(thread: int) -> None:
        buffer = np.empty(BLOCK, np.float32)
        for w in matrices:
            rows, inputs = w.shape
            step, size = max(BLOCK // inputs, 1), -(-rows // threads)
            stop = min(rows, (thread + 1) * size)
            for a in range(thread * size, stop, step):
                b = min(a + step, stop)
                block = buffer[: (b - a) * inputs].reshape(b - a, inputs)
                block[:] = w[a:b]
                np.matmul(block, xs[inputs], out=ys[rows][a:b])

    def run() -> None:
        with BLAS.limit(limits=1), ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))

    return run


def parts(model: Model, rows: int, position: int, threads: int) -> tuple[dict[str, Run], dict[str, Run]]:
    """Return what runs each part in all layers, for `rows` new positions after `position`, and what its matrix products
    cost at least: the same matrices in BLAS.
    """
    config, weights = model.config, model.weights
    layers, eps = range(config.num_hidden_layers), config.rms_norm_eps
    x, gate = normal(1, rows, config.hidden_size), normal(1, rows, config.intermediate_size)
    context = normal(1, rows, config.num_attention_heads * config.head_dim)
    q, k = (normal(1, rows, n, config.head_dim) for n in (config.num_attention_heads, config.num_key_value_heads))
    q_heads, k_heads = np.swapaxes(q, 1, 2), np.swapaxes(k, 1, 2)
    angles = rotary_tables(config, position + np.arange(rows)[None])
    cache = filled_cache(config, position + rows)
    cache.lengths[:] = position
    ids = np.zeros((1, rows), np.int64)
    limits: dict[str, Run] = {}

    def weight(layer: int, name: str) -> np.ndarray:
        return weights[f"model.layers.{layer}.{name}.weight"]

    def project(title: str, y: np.ndarray, *names: str) -> dict[str, Run]:
        limits[title] = products([weight(layer, name) for layer in layers for name in names], rows, threads)
        return each(title, *(lambda layer, name=name: linear(y, weight(layer, name)) for name in names))

    def each(title: str, *calls: Callable[[int], object]) -> dict[str, Run]:
        def run() -> None:
            with blas_threads():
                for layer in layers:
                    for call in calls:
                        call(layer)

        return {title: run}

    def norm(y: np.ndarray, name: str) -> Callable[[int], object]:
        return lambda layer: rms_norm(y, weight(layer, name), eps)

    def whole() -> None:
        cache.lengths[:] = position
        model.forward(ids, cache, last_only=True)

    head = weights[HEAD[config.tie_word_embeddings]]
    limits["head, last position"] = products([head], 1, threads)
    runs = {
        **each("two norms", norm(x, "input_layernorm"), norm(x, "post_attention_layernorm")),
        **project("q, k, v", x, *(f"self_attn.{name}_proj" for name in "qkv")),
        **each("norms of q and k", norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")),
        **each("rotation", lambda _: rotate(q_heads, angles), lambda _: rotate(k_heads, angles)),
        **each("attention", lambda layer: attend(q_heads[0], *cache.write(layer, 0, k_heads[0], k_heads[0]))),
        **project("o", context, "self_attn.o_proj"),
        **project("gate, up", x, "mlp.gate_proj", "mlp.up_proj"),
        **each("activation", lambda _: silu(gate) * gate),
        **project("down", gate, "mlp.down_proj"),
        **each("residuals", *[lambda _: x + x] * 2),
        "head, last position": lambda: linear(rms_norm(x[:, -1:], weights["model.norm.weight"], eps), head),
        "whole forward": whole,
    }
    return runs, limits


def take_turns(timers: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        print(f"[round {number + 1} of {rounds}]", file=sys.stderr)
        for name, timer in timers.items():
            times[name] += timer()
    return {name: median(found) for name, found in times.items()}


def part_table(model: Model, rows: int, position: int, threads: int, rounds: int) -> str:
    """Measure and return the parts of a forward."""
    runs, limits = parts(model, rows, position, threads)
    timers = {name: (lambda run=run: seconds(run, 2, 8)) for name, run in runs.items()}
    timers |= {f"limit of {name}": (lambda run=run: seconds(run, 2, 8)) for name, run in limits.items()}
    found = take_turns(timers, rounds)
    whole = found["whole forward"]
    found["all else"] = whole - sum(found[name] for name in runs if name != "whole forward")
    table: list[list[str]] = []
    for name in [*(name for name in runs if name != "whole forward"), "all else", "whole forward"]:
        limit = found.get(f"limit of {name}")
        best = [value(1000 * limit), f"{limit / found[name]:.2f}"] if limit else ["", ""]
        table.append([name, value(1000 * found[name]), f"{found[name] / whole:.1%}", *best])
    title = f"{rows} new position{'s' * (rows > 1)} after {position:,}, in all layers"
    return markdown([title, "ms", "share", "BLAS alone, ms", "fraction of it"], table)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, stored in bfloat16")
    which.add_argument("--like", type=Path, metavar="DIR", help="a folder with a config.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=16384, help="leave out what is longer")
    a = parser.parse_args()
    os.environ["QWEN3NP_NUM_THREADS"] = str(a.threads)

    if a.model:
        model, stored = load(a.model, weights_dtype="float32", progress=False), read_checkpoint(a.model)[1]
    else:
        config = Config.from_file(a.like)
        model = Model(config, init_weights(config, 0), None, {})
        stored = {name: w.astype(ml_dtypes.bfloat16) for name, w in model.weights.items()}
    config, narrow = model.config, Model(model.config, stored, None, {})
    head = HEAD[config.tie_word_embeddings]

    def matrices(weights: Weights) -> list[np.ndarray]:  # the head is the last, also where it is the embedding
        inner = [w for name, w in weights.items() if w.ndim == 2 and name.startswith("model.layers.")]
        return [*inner, weights[head]]

    def timer(run: Run) -> Callable[[], list[float]]:
        return lambda: seconds(run, 3, 12)

    longest = min(a.longest, config.max_position_embeddings - 1)
    prompts, positions = ([size for size in sizes if size <= longest] for sizes in (ROWS, POSITIONS))
    wide, last = matrices(model.weights)[:-1], matrices(model.weights)[-1:]
    timers = {
        "read": timer(read(a.threads)),
        "sgemv": timer(products([*wide, *last], 1, a.threads)),
        "widened": timer(widened(matrices(stored), a.threads)),
        "head": timer(products(last, 1, a.threads)),
    }
    for n in prompts:
        timers[f"sgemm {n}"] = timer(products(wide, n, a.threads))
        timers[f"prefill {n}"] = lambda n=n: prefill_seconds(model, n)
    for n in positions:
        timers[f"decode {n}"] = lambda n=n: decode_seconds(model, n)
        timers[f"narrow {n}"] = lambda n=n: decode_seconds(narrow, n)
    shares: list[float] = []
    with others(shares):
        found = take_turns(timers, a.rounds)
        tables = [
            part_table(model, *size, a.threads, a.rounds) for size in ((1, MIDDLE), (MIDDLE, 0)) if sum(size) <= longest
        ]

    count = sum(w.size for w in [*wide, *last])
    rate = 4 * READ / found["read"]
    rows = [["reading memory", "", f"{rate / 1e9:.1f} GB/s", ""]]
    for title, limit, name, size in (("float32", "sgemv", "decode", 4), ("bfloat16", "widened", "narrow", 2)):
        rows.append(
            [
                f"{limit}, {len(wide) + 1} matrices, {title}",
                value(1000 * found[limit]),
                f"{size * count / found[limit] / 1e9:.1f} GB/s",
                "",
            ]
        )
        for n in positions:
            seconds_ = found[f"{name} {n}"]
            rows.append(
                [
                    f"decode at {n:,}, {title}",
                    value(1000 * seconds_),
                    f"{1 / seconds_:.1f} tokens/s",
                    f"{found[limit] / seconds_:.2f}",
                ]
            )
    for n in prompts:
        best, here = found[f"sgemm {n}"] + found["head"], found[f"prefill {n}"]
        rows.append([f"sgemm of {n:,} rows", value(1000 * best), f"{n / best:,.0f} tokens/s", ""])
        rows.append(
            [f"prefill of {n:,}, float32", value(1000 * here), f"{n / here:,.0f} tokens/s", f"{best / here:.2f}"]
        )
    print(heading(a.threads))
    print(f"- {(a.model or a.like).name}; {shares[0]:.2f} cores busy with something else\n")
    print(markdown(["", "ms", "rate", "fraction of the limit"], rows))
    if positions[-1] > MIDDLE:
        added = found[f"decode {positions[-1]}"] - found[f"decode {MIDDLE}"]
        more = KVCache.allocate(config, 1, positions[-1] - MIDDLE)
        size = more.k.nbytes + more.v.nbytes
        print(
            f"{positions[-1]:,} positions add {1000 * added:.1f} ms to decoding at {MIDDLE}; reading the "
            f"{size / 1e6:,.0f} MB of cache takes {1000 * size / rate:.1f} ms: {added * rate / size:.2f} x\n"
        )
    print("\n".join(tables))


if __name__ == "__main__":
    main()
