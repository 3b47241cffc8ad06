"""Measure one engine in this process, and print a JSON object; compare.py starts this repeatedly.

    python benchmarks/engine.py "qwen3np bfloat16" --model FOLDER [--threads 2] [--quick]

The first run of each kind is for warmth; a prompt of thousands of tokens runs once, after the shorter ones have warmed
up. Decoding is one step of the model on a cache that holds that many positions of random numbers, without sampling.
Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from threadpoolctl import threadpool_limits

from qwen3np import Config, KVCache, init_weights, load, stream
from qwen3np.commands.bench import decode_seconds, memory, prefill_seconds, seconds

PREFILL, DECODE, MIDDLE, BATCH = (32, 512, 4096), (32, 512, 4096, 16384), 512, 8
ENGINES = ("qwen3np float32", "qwen3np bfloat16", "transformers float32", "transformers bfloat16")
SMALL = ("qwen3np 15M", "plain 15M")  # these create their own model, with the sizes of stories15M in llama2.c
SMALL_CONFIG = Config(
    vocab_size=32000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=48,
    rope_theta=1e4,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
Found = dict[str, float]  # the name of a measure, with its unit -> its value
Timer = Callable[..., list[float]]


def numpy_engine(folder: Path, dtype: str) -> tuple[Timer, Timer]:
    """Load the model; return functions that time a prompt of n tokens and a step at n positions of a batch."""
    model = load(folder, weights_dtype=dtype, progress=False)
    return partial(prefill_seconds, model), partial(decode_seconds, model)


def torch_engine(folder: Path, dtype: str) -> tuple[Timer, Timer]:
    """Return the same for transformers.

    Each with the faster of its caches: one that grows for a prompt; for decoding one that is preallocated, and only as
    long as the steps here need.
    """
    import torch
    from transformers import Cache, DynamicCache, Qwen3ForCausalLM, StaticCache

    kind = getattr(torch, dtype)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").eval()
    config = model.config

    def forward(ids: torch.Tensor, cache: Cache) -> None:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill(length: int) -> list[float]:
        ids = torch.randint(config.vocab_size, (1, length))
        return seconds(lambda: forward(ids, DynamicCache(config=config)))

    def decode(position: int, batch: int = 1) -> list[float]:
        steps = 16
        cache, shape = StaticCache(config, position + steps), (batch, config.num_key_value_heads, position)
        with torch.inference_mode():
            k, v = (torch.randn(*shape, config.head_dim, dtype=kind) for _ in range(2))
            for layer in range(config.num_hidden_layers):
                cache.update(k, v, layer)
        ids = torch.randint(config.vocab_size, (batch, 1))
        return seconds(lambda: forward(ids, cache), most=steps)

    return prefill, decode


def sizes(config: Config, quick: bool) -> list[int]:
    """Return the lengths to measure that leave room for some more tokens in the model's context."""
    longest = min(config.max_position_embeddings - 32, MIDDLE if quick else max(DECODE))
    return [size for size in sorted({*PREFILL, *DECODE}) if size <= longest]


def measure(engine: str, folder: Path, threads: int, quick: bool) -> Found:
    """Measure a checkpoint. The shortest comes first: the peak of memory is read before anything longer runs."""
    package, dtype = engine.split()
    if package == "transformers":
        import torch
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  # imported before loading is timed

        torch.set_num_threads(threads)
    config, file = Config.from_file(folder), sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    began = time.perf_counter()
    prefill, decode = (torch_engine if package == "transformers" else numpy_engine)(folder, dtype)
    found: Found = {"load (s)": time.perf_counter() - began}
    for size in sizes(config, quick):
        prompt, step = f"prefill of {size:,} (tokens/s)", f"decode at {size:,} (ms/token)"
        if size in PREFILL:
            found[prompt] = size / median(prefill(size))
        if size in PREFILL and size > MIDDLE:
            found[f"prefill of {size:,}, against {MIDDLE} (x)"] = (
                found[prompt] / found[f"prefill of {MIDDLE} (tokens/s)"]
            )
        if size in DECODE:
            found[step] = 1000 * median(decode(size))
        if size == MIDDLE:
            peak, cache = memory()["peak_bytes"], KVCache.allocate(config, 1, size + 1)
            needed = file + cache.k.nbytes + cache.v.nbytes + 100e6
            found[f"peak memory, {size} tokens (MB)"] = peak / 1e6
            found[f"peak memory, {size} tokens, against file + float32 cache + 100 MB (x)"] = peak / needed
            found[f"decode of {BATCH} at {size} (tokens/s)"] = together = BATCH / median(decode(size, BATCH))
            found[f"decode of {BATCH} at {size}, against one (x)"] = together * found[step] / 1000
    return found


def measure_small(engine: str, threads: int, steps: int = 256) -> Found:
    """Measure greedy generation with a model of 15 million parameters, the prompt aside."""
    weights, ids = init_weights(SMALL_CONFIG, 0, trained_like=True), list(range(16))

    def rate() -> float:
        ops = "plain" if engine.startswith("plain") else "fast"
        found = stream(weights, SMALL_CONFIG, ids, max_new_tokens=steps + 1, engine=ops)
        next(found)
        began = time.perf_counter()
        for _ in found:
            pass
        return steps / (time.perf_counter() - began)

    def matrices() -> None:
        for w in weights.values():
            if w.ndim == 2:
                np.matmul(w, w[0])

    with threadpool_limits(threads):
        rate()  # warm-up
        found = {"15M parameters, decode (tokens/s)": median(rate() for _ in range(3))}
        if engine.startswith("plain"):
            found["15M parameters, its matrices alone (tokens/s)"] = 1 / median(seconds(matrices, most=100))
    return found


def main() -> None:
    """Measure the engine that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=(*ENGINES, *SMALL))
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"nothing longer than {MIDDLE} tokens")
    a = parser.parse_args()
    os.environ["QWEN3NP_NUM_THREADS"] = str(a.threads)
    if a.engine in SMALL:
        found = measure_small(a.engine, a.threads)
    elif a.model:
        found = measure(a.engine, a.model, a.threads, a.quick)
    else:
        parser.error(f"{a.engine} needs a --model")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
