"""Print the best NumPy can do here with the matrices of a model, and what fraction of it the model reaches.

    python benchmarks/roofline.py --model FOLDER [--threads 2]     # random weights if FOLDER does not exist

Decoding is bound by memory: each matrix goes once through sgemv, and so do the keys and values of the cache; np.sum,
slower than sgemv on some processors, reads the same bytes for comparison. A prompt is bound by arithmetic: each matrix
goes once through sgemm, and so do the blocks of attention that a query may see. The limits are these products alone:
matrices on BLAS's own threads, blocks of attention one after the other on each core. Then the same for each part of a
layer, run separately over all layers, with the weights of each. Limits and model take turns; a figure is the median of
the rounds, a fraction the median of those within a round. Weights are float32.
Linux: what else runs is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from machine import heading, others
from random_checkpoint import add_checkpoint, make_if_missing
from tables import markdown, value

from qwen3np import Config, KVCache, Model, load
from qwen3np.commands.bench import decode_seconds, filled_cache, prefill_seconds, seconds
from qwen3np.numerics import named
from qwen3np.ops.fast import silu
from qwen3np.ops.fast.attention import attend
from qwen3np.ops.fast.products import products as projections
from qwen3np.ops.fast.threads import blas_threads, num_threads, rowwise, share, threads_for
from qwen3np.qwen3 import Scope, rms_norm, rotate
from qwen3np.rope import rotary_tables

MIDDLE, LONG, DEEP = 512, 4096, 16384  # positions
QUERIES, KEYS, BLOCKS = 256, 1024, 256  # rows of a block of attention and of what it sees; blocks that are timed
PIECE = 1 << 22  # numbers that one call sums
RNG = np.random.default_rng(0)
Run = Callable[[], object]
Times = Mapping[str, np.ndarray]  # seconds: a median for each round


def normal(*shape: int) -> np.ndarray:
    """Return random numbers."""
    return RNG.standard_normal(shape, np.float32)


FLOAT32 = named("float32")


def products(matrices: Sequence[np.ndarray], rows: int) -> Run:
    """Return a function that multiplies rows by each matrix (sgemv for one row, else sgemm), on BLAS's own threads."""
    shape = () if rows == 1 else (rows,)
    xs, ys = ({size: normal(*shape, size) for size in {w.shape[axis] for w in matrices}} for axis in (1, 0))

    def run() -> None:
        with blas_threads(num_threads()):
            for w in matrices:
                np.matmul(xs[w.shape[1]], w.T, out=ys[w.shape[0]])

    return run


def sums(matrices: Sequence[np.ndarray]) -> Run:
    """Return a function that reads each matrix with np.sum, on our threads."""
    pieces = [piece for w in matrices for piece in np.array_split(w.reshape(-1), -(-w.size // PIECE))]
    return lambda: share(pieces, 1 << 40, np.sum)


def cache_products(cache: KVCache) -> Run:
    """Return a function that multiplies all keys and values of a cache once, layer by layer, on BLAS's own threads."""
    head_dim = cache.k.shape[-1]
    keys, values = (x[:, 0].reshape(len(x), -1, head_dim) for x in (cache.k, cache.v))
    q, p = normal(head_dim), normal(keys.shape[1])

    def run() -> None:
        with blas_threads(num_threads()):
            for k, v in zip(keys, values, strict=True):
                np.matmul(k, q)
                np.matmul(p, v)

    return run


def block_products(head_dim: int) -> Run:
    """Return a function that computes the two products of BLOCKS blocks of attention on our threads."""
    q, k, v = normal(QUERIES, head_dim), normal(KEYS, head_dim), normal(KEYS, head_dim)

    def blocks(count: int) -> None:
        scores, context = np.empty((QUERIES, KEYS), np.float32), np.empty((QUERIES, head_dim), np.float32)
        for _ in range(count):
            np.matmul(q, k.T, out=scores)
            np.matmul(scores, v, out=context)

    return lambda: share([BLOCKS // 16] * 16, 1 << 40, blocks)


def block_work(config: Config) -> int:
    """Return the multiply-adds of block_products."""
    return 2 * BLOCKS * QUERIES * KEYS * config.head_dim


def attention_work(config: Config, length: int) -> int:
    """Return the multiply-adds of attention in all layers for a prompt: visible scores, and their values."""
    return config.num_hidden_layers * config.num_attention_heads * length * (length + 1) * config.head_dim


def matrices(model: Model) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the matrices of all layers, and that of the head, which is the embedding where they are tied."""
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    layers = [w for name, w in model.weights.items() if w.ndim == 2 and name.startswith("model.layers.")]
    return layers, model.weights[head]


def parts(model: Model, rows: int, position: int) -> tuple[dict[str, Run], dict[str, Run]]:
    """Return what runs each part in all layers, as the model does, for `rows` new positions after `position`, and for
    some of them the matrix products in it: those alone, in BLAS.
    """
    config, weights = model.config, model.weights
    layers, eps = range(config.num_hidden_layers), config.rms_norm_eps
    x, gate = normal(1, rows, config.hidden_size), normal(1, rows, config.intermediate_size)
    context = normal(1, rows, config.num_attention_heads * config.head_dim)
    q, k = (normal(1, rows, n, config.head_dim) for n in (config.num_attention_heads, config.num_key_value_heads))
    q_heads, k_heads = np.swapaxes(q, 1, 2), np.swapaxes(k, 1, 2)
    angles = rotary_tables(config, position + np.arange(rows)[None])
    cache = filled_cache(config, position + rows - 1)
    cache.lengths[:] = position
    ids = np.zeros((1, rows), np.int64)
    head = matrices(model)[1]
    # what forward holds BLAS to around its layers
    held = threads_for(config.hidden_size * config.intermediate_size) if rows == 1 else 1  # at few positions
    runs: dict[str, Run] = {}
    limits: dict[str, Run] = {}

    def weight(layer: int, name: str) -> np.ndarray:
        return weights[f"model.layers.{layer}.{name}.weight"]

    def each(title: str, *calls: Callable[[int], object]) -> None:
        def run() -> None:
            with blas_threads(held):
                for layer in layers:
                    for call in calls:
                        call(layer)

        runs[title] = run

    def project(title: str, y: np.ndarray, *names: str) -> None:
        each(title, lambda layer: projections(y, [(weight(layer, name), None) for name in names], FLOAT32))
        limits[title] = products([weight(layer, name) for layer in layers for name in names], rows)

    def norm(y: np.ndarray, name: str) -> Callable[[int], object]:
        return lambda layer: rms_norm(y, weight(layer, name), eps, FLOAT32)

    def whole() -> None:
        model.forward(ids, cache, last_only=True)
        cache.lengths[:] = position

    def last() -> None:
        with blas_threads(held):
            projections(rms_norm(x[:, -1:], weights["model.norm.weight"], eps, FLOAT32), [(head, None)], FLOAT32)

    each("two norms", norm(x, "input_layernorm"), norm(x, "post_attention_layernorm"))
    project("q, k, v", x, *(f"self_attn.{name}_proj" for name in "qkv"))
    each("norms of q and k", norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm"))
    each("rotation", lambda _: rotate(q_heads, angles, FLOAT32), lambda _: rotate(k_heads, angles, FLOAT32))
    each("attention", lambda layer: attend(q_heads, *cache.write(layer, k_heads, k_heads), None, Scope({}), FLOAT32))
    project("o", context, "self_attn.o_proj")
    project("gate, up", x, "mlp.gate_proj", "mlp.up_proj")
    each("activation", lambda _: rowwise(lambda gate, up: silu(gate) * up, gate, gate))
    project("down", gate, "mlp.down_proj")
    each("residuals", *[lambda _: rowwise(np.add, x, x)] * 2)
    runs |= {"last norm, head": last, "forward": whole}
    limits["last norm, head"] = products([head], 1)
    if rows == 1:
        limits["attention"] = cache_products(cache)
    return runs, limits


def take_turns(timers: Mapping[str, Callable[[], list[float]]], rounds: int) -> Times:
    """Return the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        print(f"[round {number + 1} of {rounds}]", file=sys.stderr)
        for name, timer in timers.items():
            times[name].append(float(np.median(timer())))
    return {name: np.array(found) for name, found in times.items()}


def middle(x: np.ndarray, digits: str = "") -> str:
    """Return the median in print."""
    return format(np.median(x), digits) if digits else value(float(np.median(x)))


def part_table(model: Model, rows: int, position: int, rounds: int) -> str:
    """Measure the parts of a forward and return their table."""
    config = model.config
    runs, limits = parts(model, rows, position)
    timers = {name: partial(seconds, run, 2, 8) for name, run in runs.items()}
    timers |= {f"limit of {name}": partial(seconds, run, 2, 8) for name, run in limits.items()}
    timers["blocks"] = partial(seconds, block_products(config.head_dim), 1, 8)
    found = dict(take_turns(timers, rounds))
    if rows > 1:
        found["limit of attention"] = found["blocks"] * (attention_work(config, rows) / block_work(config))
    whole = found.pop("forward")
    inner = [name for name in runs if name not in ("last norm, head", "forward")]
    found["all else"] = whole - sum(found[name] for name in (*inner, "last norm, head"))
    table: list[list[str]] = []
    for name in (*inner, "last norm, head", "all else"):
        count = config.num_hidden_layers if name in inner else 1
        limit = found.get(f"limit of {name}")
        best = ["", ""] if limit is None else [middle(1000 * limit / count), middle(limit / found[name], ".2f")]
        title = name if name in inner else f"{name} (once)"
        table.append([title, middle(1000 * found[name] / count), *best, middle(found[name] / whole, ".1%")])
    limit = sum(x for name, x in found.items() if name.startswith("limit of "))
    table.append(["forward (once)", middle(1000 * whole), middle(1000 * limit), middle(limit / whole, ".2f"), "100%"])
    title = f"{rows} new position{'s' * (rows > 1)} after {position:,}"
    return markdown([title, "ms a layer", "its products alone, ms", "fraction of it", "share of all layers"], table)


def limit_table(model: Model, rounds: int) -> str:
    """Measure the model against its limits and return the table, with what follows from it."""
    config = model.config
    layers, head = matrices(model)
    one_layer = layers[: len(layers) // config.num_hidden_layers]

    def timer(run: Run) -> Callable[[], list[float]]:
        return partial(seconds, run, 3, 12)

    found = take_turns(
        {
            "sgemv": timer(products([*layers, head], 1)),
            "sum": timer(sums([*layers, head])),
            "decode": partial(decode_seconds, model, MIDDLE),
            "cache": lambda: seconds(cache_products(filled_cache(config, DEEP)), 3, 12),
            "deep": partial(decode_seconds, model, DEEP),
            "head": timer(products([head], 1)),
            "blocks": timer(block_products(config.head_dim)),
            "sgemm": timer(products(layers, MIDDLE)),
            "prefill": partial(prefill_seconds, model, MIDDLE),
            "long sgemm": timer(products(one_layer, LONG)),
            "long": partial(prefill_seconds, model, LONG),
        },
        rounds,
    )
    count = sum(w.size for w in layers)
    weight_bytes, position_bytes = 4 * (count + head.size), 8 * config.num_key_value_heads * config.head_dim
    position_bytes *= config.num_hidden_layers
    read, cache_read = weight_bytes / found["sgemv"], position_bytes * (DEEP + 1) / found["cache"]  # bytes per second
    both = found["sgemv"] + position_bytes * MIDDLE / read
    added, more = found["deep"] - found["decode"], position_bytes * (DEEP - MIDDLE)
    block_rate = block_work(config) / found["blocks"]
    table: list[list[str]] = []

    def row(title: str, rate: str, limit: np.ndarray, model: np.ndarray) -> None:
        table.append([title, rate, middle(1000 * limit), middle(1000 * model), middle(limit / model, ".2f")])

    def gflops(work: np.ndarray) -> str:
        return f"{middle(2e-9 * work, '.0f')} GFLOP/s"

    rate = f"{middle(read / 1e9, '.1f')} GB/s"
    row(f"decoding at {MIDDLE}: {weight_bytes / 1e6:,.0f} MB of weights, sgemv", rate, found["sgemv"], found["decode"])
    row(f"and {position_bytes * MIDDLE / 1e6:,.0f} MB of cache, at the same rate", rate, both, found["decode"])
    summed = weight_bytes / found["sum"]
    all_summed = found["sum"] + position_bytes * MIDDLE / summed
    row("the same bytes, np.sum", f"{middle(summed / 1e9, '.1f')} GB/s", all_summed, found["decode"])
    rate = f"{middle(cache_read / 1e9, '.1f')} GB/s"
    row(f"what {DEEP:,} positions add to it: {more / 1e6:,.0f} MB of cache, sgemv", rate, more / cache_read, added)
    bounds: dict[int, np.ndarray] = {}
    for length, name, sgemm in (
        (MIDDLE, "prefill", found["sgemm"]),
        (LONG, "long", found["long sgemm"] * config.num_hidden_layers),
    ):
        flat = sgemm + found["head"]
        bounds[length] = flat + attention_work(config, length) / block_rate
        row(f"prompt of {length:,}: matrices, sgemm", gflops(length * count / sgemm), flat, found[name])
        row("and attention, sgemm of its blocks", gflops(block_rate), bounds[length], found[name])
    best = LONG / bounds[LONG] / (MIDDLE / bounds[MIDDLE])
    ratio = LONG / found["long"] / (MIDDLE / found["prefill"])
    text = f"Tokens per second of a prompt of {LONG:,} against one of {MIDDLE}: {middle(ratio, '.2f')}"
    text = f"{text}; these products alone allow {middle(best, '.2f')}.\n"
    return f"{markdown(['limit', 'rate', 'limit, ms', 'model, ms', 'fraction reached'], table)}\n{text}"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="made if it does not exist")
    add_checkpoint(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    make_if_missing(a.model, a)
    os.environ["QWEN3NP_NUM_THREADS"] = str(a.threads)
    model = load(a.model, weights_dtype="float32", progress=False)
    if model.config.max_position_embeddings <= DEEP:
        parser.error(f"{a.model}: its context of {model.config.max_position_embeddings:,} is too short for {DEEP:,}")
    shares: list[float] = []
    with others(shares):
        found = [limit_table(model, a.rounds)]
        found += [part_table(model, *size, a.rounds) for size in ((1, MIDDLE), (MIDDLE, 0))]
    print(f"{heading(a.threads)}\n- {a.model.name}; {shares[0]:.2f} cores busy with something else\n")
    print("\n".join(found))


if __name__ == "__main__":
    main()
