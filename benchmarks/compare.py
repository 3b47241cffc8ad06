"""Measure qwen3np next to transformers, llama.cpp and vLLM (each if given), and print Markdown tables with ratios.

    python benchmarks/compare.py --model FOLDER [--threads 2] [--quick]     # random weights if FOLDER does not exist
    python benchmarks/compare.py --model FOLDER --llama-bench PATH --gguf FILE ... --vllm PATH

Every engine runs in its own processes (engine.py says what each measures), interleaved (A B C A B C ...), so that a
machine that slows down slows all of them. A figure is the median of its turns, a ratio the median of the ratios within
a turn. llama.cpp and vLLM fill their caches themselves. A model of 15 million parameters generates with the fast and
with the plain engine. Needs the oracle extra. Linux: memory and what else runs are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from engine import DECODE, ENGINES, MIDDLE, PREFILL, SMALL, Found, sizes
from machine import heading, others
from random_checkpoint import add_checkpoint, make_if_missing
from tables import markdown, value

from qwen3np import Config

PROMPT = "The capital of France is"
FIRST = "process start to first token (s)"
VLLM_NEW = 8  # tokens after the first one
PAIRS = ((ENGINES[0], ENGINES[2]), (ENGINES[1], ENGINES[3]), SMALL)

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


def measure_llama(program: Path, gguf: Path, lengths: Sequence[int], threads: int) -> Found:
    """Measure llama.cpp with its own benchmark."""

    def results(*flags: str) -> list[dict]:
        command = [program, "-m", gguf, "-t", str(threads), "-r", "3", "-o", "json", *flags]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    prompts, depths = (",".join(str(size) for size in lengths if size in kind) for kind in (PREFILL, DECODE))
    measured: Found = {}
    for found in results("-p", prompts, "-n", "0"):
        measured[f"prefill of {found['n_prompt']:,} (tokens/s)"] = median(found["samples_ts"])
    for found in results("-p", "0", "-n", "8", "-d", depths):
        measured[f"decode at {found['n_depth']:,} (ms/token)"] = 1000 / median(found["samples_ts"])
    return measured


def measure_vllm(program: Path, folder: Path, dtype: str, lengths: Sequence[int], threads: int) -> Found:
    """Measure vLLM with its own benchmark, a process for each prompt and number of new tokens."""
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}  # by default, all cores

    def seconds(prompt: int, new: int) -> float:
        with TemporaryDirectory() as scratch:
            results = Path(scratch) / "latency.json"
            numbers = {"input-len": prompt, "output-len": new, "max-model-len": prompt + new, "batch-size": 1}
            numbers |= {"num-iters-warmup": 1, "num-iters": 3}
            flags = [f"--{name}={number}" for name, number in numbers.items()]
            flags += [f"--model={folder}", f"--dtype={dtype}", f"--output-json={results}", "--disable-detokenize"]
            subprocess.run([program, "bench", "latency", *flags], env=environment, stdout=sys.stderr, check=True)
            return median(json.loads(results.read_text(encoding="utf-8"))["latencies"])

    measured: Found = {}
    for length in lengths:
        first = seconds(length, 1)
        if length in PREFILL:
            measured[f"prefill of {length:,} (tokens/s)"] = length / first
        if length in DECODE:
            measured[f"decode at {length:,} (ms/token)"] = 1000 * (seconds(length, 1 + VLLM_NEW) - first) / VLLM_NEW
    return measured


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


def tables(turns: dict[str, list[Found]], pairs: Sequence[tuple[str, str]]) -> str:
    """Return the table of medians, and that of ratios, in which a value above 1 favours the first of a pair."""
    found = list(dict.fromkeys(name for results in turns.values() for turn in results for name in turn))
    kinds = ("prefill", "decode", "15M", "load", "process", "peak")
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
    add_checkpoint(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine has its turn")
    parser.add_argument("--quick", action="store_true", help=f"nothing longer than {MIDDLE} tokens")
    parser.add_argument("--engines", nargs="+", choices=(*ENGINES, *SMALL), default=(*ENGINES, *SMALL))
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program of this name")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="the model for it")
    parser.add_argument("--vllm", type=Path, metavar="PATH", help="vLLM's program of this name, built for CPUs")
    a = parser.parse_args()
    if bool(a.llama_bench) != bool(a.gguf):
        parser.error("--llama-bench and --gguf belong together")
    make_if_missing(a.model, a)
    os.environ |= {"QWEN3NP_NUM_THREADS": str(a.threads), "OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"}
    flags = [f"--model={a.model}", f"--threads={a.threads}", *["--quick"] * a.quick]
    llamas = {f"llama.cpp {path.stem}": path for path in a.gguf}
    vllms = {f"vLLM {dtype}": dtype for dtype in ("float32", "bfloat16") if a.vllm}

    def turn(engine: str) -> Found:
        lengths = sizes(Config.from_file(a.model), a.quick)
        if engine in llamas:
            return measure_llama(a.llama_bench, llamas[engine], lengths, a.threads)
        if engine in vllms:
            return measure_vllm(a.vllm, a.model, vllms[engine], lengths, a.threads)
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), engine, *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if engine in ENGINES and (a.model / "tokenizer.json").exists():
            found[FIRST] = median(first_token(engine, a.model, a.threads) for _ in range(2))
        return found

    turns: dict[str, list[Found]] = {engine: [] for engine in (*a.engines, *llamas, *vllms)}
    shares: dict[str, list[float]] = {engine: [] for engine in turns}
    for number in range(a.rounds):
        for engine, results in turns.items():
            print(f"[turn {number + 1} of {a.rounds}: {engine}]", file=sys.stderr)
            with others(shares[engine]):
                results.append(turn(engine))

    partners = [(f"qwen3np {'float32' if 'f32' in name.lower() else 'bfloat16'}", name) for name in llamas]
    partners += [(f"qwen3np {dtype}", name) for name, dtype in vllms.items()]
    print(heading(a.threads, ("numpy", "torch", "transformers")))
    if any(engine.startswith("transformers") for engine in turns):
        import torch

        print(f"- torch's own kernels: {torch.backends.cpu.get_cpu_capability()}")
    print(f"- {a.model.name}, turns of each engine: {a.rounds}\n")
    print(tables(turns, [pair for pair in (*PAIRS, *partners) if all(engine in turns for engine in pair)]))
    worst = ", ".join(f"{engine} {max(values):.2f}" for engine, values in shares.items())
    print(f"Cores busy with something else, in the worst turn of each: {worst}")


if __name__ == "__main__":
    main()
