"""`qwen3np bench`: how fast a checkpoint runs on this machine, and in how much memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.commands import add_computation, add_model, load_named, table
from qwen3np.config import Config
from qwen3np.generate import new_cache, stream
from qwen3np.guard import forward
from qwen3np.model import Model
from qwen3np.ops.fast.threads import num_threads

EXAMPLE = "qwen3np bench --model Qwen/Qwen3-0.6B --weights-dtype bfloat16"
HELP = "measure prefill, decoding, loading and memory on this machine"
PROMPT, POSITIONS = 512, (32, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print medians of a few repetitions, and the machine."""
    name, numerics, engine = arguments.model, arguments.numerics, arguments.engine
    began = time.perf_counter()
    model = load_named(arguments)
    loaded = time.perf_counter() - began
    context = model.config.max_position_embeddings
    prompt, positions = min(PROMPT, context), sorted({min(position, context - 1) for position in POSITIONS})
    print(f"[measuring a prompt of {prompt} tokens]", file=sys.stderr)
    prefill = prompt / median(prefill_seconds(model, prompt, numerics, engine))
    decode: dict[int, float] = {}
    for position in positions:
        print(f"[measuring decoding at {position} positions]", file=sys.stderr)
        decode[position] = 1000 * median(decode_seconds(model, position, numerics=numerics, engine=engine))
    stored, used = str(model.weights["model.embed_tokens.weight"].dtype), memory()
    if arguments.json:
        result = {
            "model": name,
            "weights_dtype": stored,
            "numerics": numerics,
            "engine": engine,
            "load_seconds": loaded,
            "prefill_tokens_per_second": {prompt: prefill},
            "decode_ms_per_token": decode,
            "memory": used,
            "machine": machine(),
        }
        print(json.dumps(result))
        return
    rows = [
        ("weights", f"{stored}, {sum(tensor.nbytes for tensor in model.weights.values()) / 1e6:,.0f} MB"),
        ("load", f"{loaded:.3f} s"),
        (f"prefill of {prompt}", f"{prefill:,.1f} tokens/s"),
        *((f"decode at {n}", f"{ms:,.2f} ms/token, {1000 / ms:,.1f} tokens/s") for n, ms in decode.items()),
        *((f"memory, {part.removesuffix('_bytes')}", f"{size / 1e6:,.0f} MB") for part, size in used.items()),
        ("machine", machine()),
    ]
    print(table(rows))


def seconds(run: Callable[[], object], budget: float = 5.0, most: int = 20) -> list[float]:
    """Return how long each call of run took: up to `most` calls, none after `budget` seconds.

    The first call warms up, and is left out unless it is the only one.
    """
    times: list[float] = []
    while not times or (len(times) < most and sum(times) < budget):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times[1:] or times


def prefill_seconds(model: Model, length: int, numerics: str = "float32", engine: str = "fast") -> list[float]:
    """Return the times from a prompt of random ids to the first token."""
    ids: list[int] = np.random.default_rng(0).integers(0, model.config.vocab_size, length).tolist()
    return seconds(
        lambda: next(stream(model.weights, model.config, ids, max_new_tokens=1, numerics=numerics, engine=engine))
    )


def decode_seconds(
    model: Model, position: int, batch: int = 1, numerics: str = "float32", engine: str = "fast"
) -> list[float]:
    """Return the times of one step of a batch whose cache holds `position` positions."""
    cache = filled_cache(model.config, position, batch, numerics)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, 1))

    def step() -> None:
        cache.lengths[:] = position
        forward(model.weights, model.config, ids, cache, numerics=numerics, engine=engine, last_only=True)

    return seconds(step)


def filled_cache(config: Config, position: int, batch: int = 1, numerics: str = "float32") -> KVCache:
    """Return a cache like generate's, with room for one more position; random numbers take as long as real ones."""
    cache = new_cache(config, [range(position)] * batch, 1, numerics)
    rng, shape = np.random.default_rng(0), (config.num_key_value_heads, position, config.head_dim)
    for array in (cache.k, cache.v):
        array[..., :position, :] = rng.standard_normal(shape, np.float32)
    cache.lengths[:] = position
    return cache


def memory() -> dict[str, int]:
    """Return this process's peak memory and, if the system reports it, its current use by kind."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before exec
        names = {"VmHWM": "peak_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}
        found = re.findall(rf"^({'|'.join(names)}):\s+(\d+) kB", status.read_text("utf-8", "replace"), re.MULTILINE)
        return {names[name]: 1024 * int(size) for name, size in found}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def machine() -> str:
    """Return processor, cores, threads, BLAS and versions in one line."""
    from qwen3np import __version__

    return (
        f"{processor()}, {os.cpu_count()} cores, {num_threads()} threads; {blas()}; NumPy {np.__version__}, "
        f"Python {platform.python_version()}, qwen3np {__version__}"
    )


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.exists() else []
    unnamed = platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), unnamed)


def blas() -> str:
    """Return name, version and kernels of NumPy's BLAS, and the variables that change it."""
    from threadpoolctl import threadpool_info

    libraries = cast("list[dict[str, Any]]", threadpool_info())
    found = [info for info in libraries if info["user_api"] == "blas"]
    parts = [f"{info['internal_api']} {info['version']} {info.get('architecture', '')}".strip() for info in found]
    variables = [f"{name}={setting}" for name, setting in sorted(os.environ.items()) if name.startswith("OPENBLAS_")]
    return ", ".join([*parts, *variables]) or "an unknown BLAS"
