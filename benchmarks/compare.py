"""Measure qwen3np beside transformers, and llama.cpp where it is given, and print Markdown tables with ratios.

    python benchmarks/compare.py --model FOLDER [--threads 2] [--quick] [--llama-bench PATH --gguf FILE ...]
    python benchmarks/compare.py --model FOLDER --like DIR --tokenizer DIR      # FOLDER is made, with random weights

Every engine has processes of its own; they take turns (A B C A B C ...), so that a machine that slows down slows all
of them. A figure is the median of its turns, a ratio the median of the ratios within a turn. Decoding is one step of
the model on a cache that holds so many positions of random numbers, without sampling; llama.cpp fills its cache itself.
Beside them a model of 15 million parameters generates with qwen3np and with the forward of naive.py. Needs the oracle
extra. Linux: memory and what else runs are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import naive
from machine import heading, others
from random_checkpoint import write_random_checkpoint
from threadpoolctl import threadpool_limits

from qwen3np import Config, init_weights, load, stream
from qwen3np.commands.bench import decode_seconds, memory, prefill_seconds, seconds

PREFILL, DECODE, MIDDLE, BATCH = (32, 512, 4096), (32, 512, 4096, 16384), 512, 8
ENGINES = ("qwen3np float32", "qwen3np bfloat16", "transformers float32", "transformers bfloat16")
SMALL = ("qwen3np 15M", "naive 15M")
PROMPT = "The capital of France is"
FIRST = "process start to first token (s)"
Turn = dict[str, float]  # the name of a measure, with its unit -> its value
Timer = Callable[..., list[float]]

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype, threads, prompt = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]), flush=True)
"""


def numpy_engine(folder: Path, dtype: str) -> tuple[Timer, Timer]:
    """Load the model; return functions that time a prompt of n tokens and a step at n positions of a batch."""
    model = load(folder, weights_dtype=dtype, progress=False)
    return partial(prefill_seconds, model), partial(decode_seconds, model)


def torch_engine(folder: Path, dtype: str) -> tuple[Timer, Timer]:
    """Return the same for transformers."""
    import torch
    from transformers import DynamicCache, Qwen3ForCausalLM

    kind = getattr(torch, dtype)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").eval()
    config = model.config

    def forward(ids: torch.Tensor, cache: DynamicCache) -> None:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill(length: int) -> list[float]:
        ids = torch.randint(config.vocab_size, (1, length))
        return seconds(lambda: forward(ids, DynamicCache(config=config)))

    def decode(position: int, batch: int = 1) -> list[float]:
        cache, shape = DynamicCache(config=config), (batch, config.num_key_value_heads, position, config.head_dim)
        with torch.inference_mode():
            k, v = torch.randn(shape, dtype=kind), torch.randn(shape, dtype=kind)
            for layer in range(config.num_hidden_layers):
                cache.update(k, v, layer)
        ids = torch.randint(config.vocab_size, (batch, 1))
        return seconds(lambda: forward(ids, cache))

    return prefill, decode


def measure(engine: str, folder: Path, threads: int, quick: bool) -> Turn:
    """Measure one engine in this process."""
    package, dtype = engine.split()
    if package == "transformers":
        import torch
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  # imported before loading is timed

        torch.set_num_threads(threads)
    began = time.perf_counter()
    prefill, decode = (torch_engine if package == "transformers" else numpy_engine)(folder, dtype)
    turn: Turn = {"load (s)": time.perf_counter() - began}
    # the shortest first: the peak of memory is read before anything longer than MIDDLE runs
    for size in sizes_of(folder, quick):
        if size in PREFILL:
            turn[f"prefill of {size:,} (tokens/s)"] = size / median(prefill(size))
        if size in DECODE:
            turn[f"decode at {size:,} (ms/token)"] = 1000 * median(decode(size))
        if size == MIDDLE:
            turn |= {f"memory, {size} tokens: {k.removesuffix('_bytes')} (MB)": v / 1e6 for k, v in memory().items()}
            together, alone = f"decode of {BATCH} at {size} (tokens/s)", f"decode at {size} (ms/token)"
            turn[together] = BATCH / median(decode(size, BATCH))
            turn[f"decode of {BATCH} at {size}, against one (x)"] = turn[together] * turn[alone] / 1000
        if size in PREFILL and size > MIDDLE:
            long, short = (f"prefill of {n:,} (tokens/s)" for n in (size, MIDDLE))
            turn[f"prefill of {size:,}, against {MIDDLE} (x)"] = turn[long] / turn[short]
    return turn


def sizes_of(folder: Path, quick: bool) -> list[int]:
    """Return the lengths to measure that leave room for one more token in the model's context."""
    longest = Config.from_file(folder).max_position_embeddings - 1
    return [size for size in sorted({*PREFILL, *DECODE}) if size <= (min(longest, MIDDLE) if quick else longest)]


def measure_small(engine: str, threads: int, steps: int = 256) -> Turn:
    """Measure greedy generation with the 15M-parameter model in this process, the prompt aside."""
    weights, ids = init_weights(naive.CONFIG, 0, trained_like=True), list(range(16))

    def rate() -> float:
        generate = naive.stream if engine.startswith("naive") else stream
        found = generate(weights, naive.CONFIG, ids, max_new_tokens=steps + 1)
        next(found)
        began = time.perf_counter()
        for _ in found:
            pass
        return steps / (time.perf_counter() - began)

    with threadpool_limits(threads):
        rate()  # for warmth
        return {"15M parameters, decode (tokens/s)": median(rate() for _ in range(3))}


def measure_llama(program: Path, gguf: Path, sizes: Sequence[int], threads: int) -> Turn:
    """Measure llama.cpp with its own benchmark."""

    def results(*flags: str) -> list[dict]:
        command = [program, "-m", gguf, "-t", str(threads), "-r", "3", "-o", "json", *flags]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    prompts, depths = (",".join(str(size) for size in sizes if size in kind) for kind in (PREFILL, DECODE))
    turn: Turn = {}
    for found in results("-p", prompts, "-n", "0"):
        turn[f"prefill of {found['n_prompt']:,} (tokens/s)"] = median(found["samples_ts"])
    for found in results("-p", "0", "-n", "8", "-d", depths):
        turn[f"decode at {found['n_depth']:,} (ms/token)"] = 1000 / median(found["samples_ts"])
    return turn


def first_token(engine: str, folder: Path, threads: int) -> float:
    """Return the seconds from the start of a process to the first byte of an answer of one token."""
    package, dtype = engine.split()
    if package == "qwen3np":
        flags = ["--weights-dtype", dtype, "--temperature", "0", "--max-new-tokens", "1", PROMPT]
        arguments = ["-m", "qwen3np", "generate", "--model", str(folder), *flags]
    else:
        arguments = ["-c", TRANSFORMERS, str(folder), dtype, str(threads), PROMPT]
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        elapsed = time.perf_counter() - began
        _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{engine}: {errors.decode()}")
    return elapsed


def value(x: float) -> str:
    """Return three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def tables(turns: dict[str, list[Turn]], pairs: Sequence[tuple[str, str]]) -> str:
    """Return the table of medians, and that of ratios, in which more than 1 speaks for the first of a pair."""
    found = list(dict.fromkeys(name for results in turns.values() for turn in results for name in turn))
    kinds = ("prefill", "decode", "15M", "load", "process", "memory")
    names = sorted(found, key=lambda name: next(i for i, kind in enumerate(kinds) if name.startswith(kind)))

    def medians(engine: str, name: str) -> str:
        values = [turn[name] for turn in turns[engine] if name in turn]
        return value(median(values)) if values else ""

    def ratios(pair: tuple[str, str], name: str) -> str:
        both = zip(*(turns[engine] for engine in pair), strict=True)
        both = [(a[name], b[name]) for a, b in both if name in a and name in b]
        quotients = [a / b if name.endswith("tokens/s)") else b / a for a, b in both]
        spread = f" ({min(quotients):.2f} to {max(quotients):.2f})" if len(quotients) > 1 else ""
        return f"{median(quotients):.2f}{spread}" if quotients else ""

    first = markdown(["", *turns], [[name, *(medians(engine, name) for engine in turns)] for name in names])
    absolute = [name for name in names if not name.endswith("(x)")]
    compared = [[name, *(ratios(pair, name) for pair in pairs)] for name in absolute]
    titles = [f"{a} / {b}" for a, b in pairs]
    second = markdown(["times as good", *titles], [row for row in compared if any(row[1:])])
    return f"{first}\n{second}" if pairs else first


def main() -> None:
    """Let the engines take turns, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="made if it does not exist")
    parser.add_argument("--like", type=Path, metavar="DIR", help="a folder with the config.json to make it from")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a folder with the tokenizer.json to copy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine has its turn")
    parser.add_argument("--quick", action="store_true", help=f"one round, nothing longer than {MIDDLE} tokens")
    parser.add_argument("--engines", nargs="+", choices=(*ENGINES, *SMALL), default=(*ENGINES, *SMALL))
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program of this name")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="the model for it")
    parser.add_argument("--measure", choices=(*ENGINES, *SMALL), help="measure one engine in this process, print JSON")
    a = parser.parse_args()
    if a.measure in SMALL:
        print(json.dumps(measure_small(a.measure, a.threads)))
        return
    if a.measure:
        print(json.dumps(measure(a.measure, a.model, a.threads, a.quick)))
        return
    if bool(a.llama_bench) != bool(a.gguf):
        parser.error("--llama-bench and --gguf belong together")
    if not a.model.exists():
        if not (a.like and a.tokenizer):
            parser.error(f"there is no folder {a.model}; with --like and --tokenizer it is made, with random weights")
        print(f"[making {a.model}]", file=sys.stderr)
        write_random_checkpoint(a.model, like=a.like, tokenizer=a.tokenizer)

    os.environ |= {"QWEN3NP_NUM_THREADS": str(a.threads), "OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, f"--model={a.model}", f"--threads={a.threads}", *["--quick"] * a.quick]
    llamas = {f"llama.cpp {path.stem}": path for path in a.gguf}

    def turn(engine: str) -> Turn:
        if engine in llamas:
            return measure_llama(a.llama_bench, llamas[engine], sizes_of(a.model, a.quick), a.threads)
        done = subprocess.run([*command, f"--measure={engine}"], stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        if engine in ENGINES and (a.model / "tokenizer.json").exists():
            result[FIRST] = median(first_token(engine, a.model, a.threads) for _ in range(2))
        return result

    turns: dict[str, list[Turn]] = {engine: [] for engine in (*a.engines, *llamas)}
    shares: dict[str, list[float]] = {engine: [] for engine in turns}
    rounds = 1 if a.quick else a.rounds
    for number in range(rounds):
        for engine, results in turns.items():
            print(f"[turn {number + 1} of {rounds}: {engine}]", file=sys.stderr)
            with others(shares[engine]):
                results.append(turn(engine))

    partners = [(f"qwen3np {'float32' if 'f32' in name.lower() else 'bfloat16'}", name) for name in llamas]
    pairs = [(ENGINES[0], ENGINES[2]), (ENGINES[1], ENGINES[3]), SMALL, *partners]
    print(heading(a.threads, ("numpy", "torch", "transformers")))
    if any(engine.startswith("transformers") for engine in turns):
        import torch

        print(f"- torch's own kernels: {torch.backends.cpu.get_cpu_capability()}")
    print(f"- {a.model.name}, turns of each engine: {rounds}\n")
    print(tables(turns, [pair for pair in pairs if all(engine in turns for engine in pair)]))
    worst = ", ".join(f"{engine} {max(values):.2f}" for engine, values in shares.items())
    print(f"Cores busy with something else, in the worst turn of each: {worst}")


if __name__ == "__main__":
    main()
