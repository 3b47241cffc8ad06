"""Print the tokens per second of training steps here and in torch: the same model, batch and number of threads.

    python benchmarks/training.py [--threads 2] [--counted 1.0] [--engines numpy sdpa eager compiled]

A step is forward, backward, clipping and AdamW in float32, on 16 rows of 256 tokens, with the sizes of the built-in
checkpoint. Each engine runs in its own process, interleaved, so that a machine that slows down slows all of them.
torch runs transformers' Qwen3ForCausalLM: with its fused attention (sdpa), its plain one (eager), and, if asked for,
with sdpa and torch.compile (compiled; it needs a C++ compiler). Needs the oracle extra. Linux: what else runs is read
from /proc. Measure on a quiet machine: threads that wait for each other, as torch's do, lose most to what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from statistics import median

import numpy as np
from machine import heading, others
from threadpoolctl import threadpool_info

from qwen3np import Config, init_weights
from qwen3np.training.gradients import loss_and_gradients
from qwen3np.training.loop import SIZES, Settings
from qwen3np.training.optimizer import adamw, clip, zero_moments

ROWS, LENGTH = Settings().batch_size, Settings().sequence_length
CONFIG = Config.from_dict({**SIZES, "rope_theta": 1e4, "tie_word_embeddings": True})
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
ENGINES = ("numpy", "sdpa", "eager", "compiled")


def batch(counted: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (B, S + 1) of random ids, and masks of what counts in the loss."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH + 1)
    return rng.integers(0, CONFIG.vocab_size, shape), rng.random(shape) < counted


def numpy_step(rows: np.ndarray, masks: np.ndarray) -> Callable[[], float]:
    """Return a function that makes one training step with this package and returns the loss."""
    weights, numbers = init_weights(CONFIG, 0), count(1)
    moments = zero_moments(weights)

    def step() -> float:
        loss, gradients = loss_and_gradients(weights, CONFIG, rows[:, :-1], rows[:, 1:], masks[:, 1:])
        clip(gradients, CLIP)
        n = next(numbers)
        adamw(weights, gradients, moments, n, LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        return loss

    return step


def torch_step(rows: np.ndarray, masks: np.ndarray, engine: str, threads: int) -> Callable[[], float]:
    """Return a function that makes one training step with torch and returns the loss."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(threads)
    attention = "eager" if engine == "eager" else "sdpa"
    model = Qwen3ForCausalLM._from_config(
        Qwen3Config(**CONFIG.to_dict()), dtype=torch.float32, attn_implementation=attention
    )
    state = {name: torch.from_numpy(w) for name, w in init_weights(CONFIG, 0).items()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    model.train()
    parameters = list(model.parameters())
    # separate groups with and without decay, as here
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    ids, targets, mask = (torch.from_numpy(x) for x in (rows[:, :-1], rows[:, 1:], masks[:, 1:]))
    everything = bool(mask.all())

    def loss_of() -> torch.Tensor:
        hidden = model.model(ids, use_cache=False).last_hidden_state
        if everything:
            return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[mask]), targets[mask])

    if engine == "compiled":
        loss_of = torch.compile(loss_of)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(engine: str, threads: int, counted: float, steps: int) -> None:
    """Make steps with one engine, the first two as warm-up, and print the seconds of the others as JSON."""
    rows, masks = batch(counted)
    step = numpy_step(rows, masks) if engine == "numpy" else torch_step(rows, masks, engine, threads)
    losses, seconds = [step(), step()], []
    shares: list[float] = []
    start, own = time.perf_counter(), time.process_time()
    with others(shares):
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - began)
    cores = (time.process_time() - own) / (time.perf_counter() - start)
    libraries = [f"{x['internal_api']} {x['version']} {x.get('architecture', '')}".strip() for x in threadpool_info()]
    if engine != "numpy":
        import torch

        blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
        libraries.append(f"torch with {blas}, its own kernels {torch.backends.cpu.get_cpu_capability()}")
    result = {"seconds": seconds, "cores": cores, "others": shares[0], "losses": [losses[0], losses[-1]]}
    print(json.dumps(result | {"libraries": libraries}))


def main() -> None:
    """Run the engines interleaved, each in its own process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--counted", type=float, default=1.0, help="share of the positions that count in the loss")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES[:3])
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine has its turn")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a turn")
    parser.add_argument("--measure", choices=ENGINES, help="measure one engine in this process, and print JSON")
    a = parser.parse_args()
    if a.measure:
        measure(a.measure, a.threads, a.counted, a.steps)
        return

    # Keep large buffers, which glibc would return after each use: torch would spend 6 % on page faults.
    tunables = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"
    environment = os.environ | {"QWEN3NP_NUM_THREADS": str(a.threads), "GLIBC_TUNABLES": tunables}
    command = [sys.executable, __file__, f"--threads={a.threads}", f"--counted={a.counted}", f"--steps={a.steps}"]
    turns: dict[str, list[dict]] = {engine: [] for engine in a.engines}
    for _ in range(a.rounds):
        for engine, results in turns.items():
            done = subprocess.run(
                [*command, f"--measure={engine}"], env=environment, stdout=subprocess.PIPE, check=True
            )
            results.append(json.loads(done.stdout))

    print(heading(a.threads, ("numpy", "torch", "transformers")))
    print(
        f"- {ROWS} rows of {LENGTH} tokens, {a.counted:.0%} of them in the loss; {a.rounds} turns of {a.steps} steps\n"
    )
    titles = ("ms/step", "fastest", "slowest", "tokens/s", "cores", "others")
    print(f"{'':9}{''.join(f'{title:>9}' for title in titles)}   first and last loss")
    times: dict[str, list[float]] = {}
    for engine, results in turns.items():
        times[engine] = [seconds for result in results for seconds in result["seconds"]]
        numbers = "".join(f"{1000 * f(times[engine]):9.0f}" for f in (median, min, max))
        rate = ROWS * LENGTH / median(times[engine])
        most = "".join(f"{max(result[key] for result in results):9.2f}" for key in ("cores", "others"))
        first, last = results[0]["losses"]
        print(f"{engine:9}{numbers}{rate:9.0f}{most}   {first:.6f} {last:.6f}")
    print("cores: how many it kept busy; others: how many were busy with something else (the most of any turn)\n")
    for engine, results in turns.items():
        print(f"{engine}: {', '.join(results[0]['libraries'])}")
    for engine in [name for name in times if name != "numpy" and "numpy" in times]:
        ratios = (f(times[engine]) / f(times["numpy"]) for f in (median, min))
        print("tokens per second, numpy / {}: {:.2f} (of the fastest steps: {:.2f})".format(engine, *ratios))


if __name__ == "__main__":
    main()
