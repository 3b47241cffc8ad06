"""Measure `qwen3np batch` here, and simulate it on many machines.

    python benchmarks/scale.py one --requests 2500          what batch adds to a bare loop (QWEN3NP_NUM_THREADS=1)
    python benchmarks/scale.py processes --requests 20000   one process against --workers N: time, equal results
    python benchmarks/scale.py dask --requests 10000        what Dask adds to a request; start, latency, bytes
    python benchmarks/scale.py memory --model FOLDER        two workers on a mapped checkpoint: pages they share
    python benchmarks/scale.py simulate                     the measured points, then 10, 100 and 1,000 machines

SCALE.md has the results and what follows from them.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import qwen3np
from qwen3np.batches.answers import Answers, Recipe
from qwen3np.batches.requests import PACKET, Request, packets, requests_of
from qwen3np.batches.results import Results
from qwen3np.batches.run import here, run
from qwen3np.embeddings import embed

WORDS = "the sky is blue today and Grass grows in the garden where Anna sees a bird with nine apples of gold"


def requests(folder: Path, count: int, words: tuple[int, int] = (6, 20)) -> Path:
    """Write a file of embedding requests of random lengths; about 20 tokens of the built-in tokenizer by default."""
    rng, path = random.Random(0), folder / "requests.jsonl"
    with path.open("w") as file:
        for n in range(count):
            body = {"input": " ".join(rng.choices(WORDS.split(), k=rng.randrange(*words)))}
            file.write(
                json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/embeddings", "body": body}) + "\n"
            )
    return path


def one(folder: Path, count: int) -> None:
    """Compare batch with the loop that a user would write: sorted by length, in packets as large."""
    model = qwen3np.load(progress=False)
    source, answers = requests(folder, count), Answers(model, "m")

    def bare(out: Path, usage: bool) -> None:
        found = [json.loads(line) for line in source.open()]
        found.sort(key=lambda request: -len(request["body"]["input"]))
        with out.open("w") as file:
            for start in range(0, len(found), 180):
                packet = found[start : start + 180]
                texts = [request["body"]["input"] for request in packet]
                for request, vector in zip(packet, embed(model, texts), strict=True):
                    line = {"custom_id": request["custom_id"], "embedding": vector.tolist()}
                    if usage:
                        line["tokens"] = len(model.text.encode(request["body"]["input"]))
                    file.write(json.dumps(line) + "\n")

    seconds: dict[str, list[float]] = {"vectors alone": [], "vectors and tokens": [], "batch": []}
    for turn in range(3):
        for name, times in seconds.items():
            out, began = folder / f"{name}{turn}.jsonl", time.process_time()  # other programs do not count
            if name == "batch":
                run(source, out, lambda: here(answers))
            else:
                bare(out, name == "vectors and tokens")
            times.append(time.process_time() - began)
    for name, times in seconds.items():
        own = min(times)
        print(
            f"{name:20} {own:7.2f} s of a core, {1e6 * own / count:6.0f} us a request; "
            f"batch takes {min(seconds['batch']) / own:.3f} x"
        )


def command(source: Path, out: Path, *flags: str) -> float:
    """Run the command; return its seconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qwen3np", "batch", source, "-o", out, *flags], check=True, capture_output=True
    )
    return time.perf_counter() - began


def processes(folder: Path, count: int, workers: list[int], flags: list[str]) -> None:
    """Time the command in one process (0) and with workers, and hash its results."""
    source = requests(folder, count)
    for n in workers:
        out = folder / f"{n}.jsonl"
        seconds = command(source, out, *(["--workers", f"{n}"] if n else []), *flags)
        digest = hashlib.sha256(b"".join(sorted(out.read_bytes().splitlines(True)))).hexdigest()[:16]
        where = f"{n} workers" if n else "one process"
        print(f"{where:12} {seconds:7.2f} s, {count / seconds:6.0f} requests/s, results {digest}", flush=True)


def nothing(pickled: bytes) -> bytes:
    """What a worker does when a packet costs nothing."""
    packet: list[Request] = pickle.loads(pickled)
    return b" " * 25 * sum(request.size for request in packet)  # results have about 25 times the bytes of requests


def dask(folder: Path, count: int) -> None:
    """Time what Dask does when packets cost nothing: start, one packet's way, and `count` requests in packets."""
    from qwen3np.batches import spread

    lines = requests(folder, count).read_bytes().splitlines(True)
    began = time.perf_counter()
    cut = list(packets(requests_of(lines)))
    read = time.perf_counter()
    with Results(folder / "out.jsonl") as results:
        for request in chain.from_iterable(cut):
            results.write(request.key, b" " * 3675 + b"\n")
    parts = 1e6 * (read - began) / count, 1e6 * (time.perf_counter() - read) / count
    print(f"the client's part of a request: reading and cutting {parts[0]:.0f} us, writing {parts[1]:.0f} us")
    pieces = [pickle.dumps(packet) for packet in cut]
    began = time.perf_counter()
    with spread.cluster(2, None) as client:
        started = time.perf_counter() - began
        began = time.perf_counter()
        spread.Spread(client, Recipe(None, "m"))
        print(f"cluster of two: {started:.2f} s; the model on both: {time.perf_counter() - began:.2f} s")
        single: list[float] = []
        for _ in range(100):
            began = time.perf_counter()
            client.submit(nothing, pickle.dumps(cut[0][:1]), pure=False).result()
            single.append(time.perf_counter() - began)
        print(f"latency of a packet of one request: {1e3 * statistics.median(single):.2f} ms")
        times, moved = list[float](), 0
        for _ in range(3):
            began, moved = time.perf_counter(), 0
            for future in [client.submit(nothing, packet, pure=False) for packet in pieces]:
                moved += len(future.result())
            times.append(time.perf_counter() - began)
        best = min(times)
        print(
            f"{count:,} requests in {len(pieces)} packets: {best:.2f} s, {1e6 * best / count:.0f} us a request, "
            f"{1e3 * best / len(pieces):.1f} ms a packet; bytes of a request {sum(map(len, lines)) // count}, "
            f"of a result {moved // count}"
        )


def memory(folder: Path, model: str, count: int) -> None:
    """Watch the pages of two workers on a mapped checkpoint: in all, and shared with the other."""
    import psutil

    source = requests(folder, count)
    arguments = [source, "-o", folder / "out.jsonl", "--workers", "2", "--model", model, "--weights-dtype", "mapped"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qwen3np", "batch", *map(str, arguments)])
    most: dict[int, tuple[int, int, int]] = {}
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                about = child.memory_full_info()
                if "spawn_main" in " ".join(child.cmdline()):
                    most[child.pid] = max(most.get(child.pid, (0, 0, 0)), (about.rss, about.pss, about.uss))
            except psutil.Error:
                continue
        time.sleep(0.2)
    print(f"{count} requests in {time.perf_counter() - began:.1f} s")
    for rss, pss, uss in most.values():
        print(
            f"a worker: resident {rss / 1e9:.2f} GB, of its own {uss / 1e9:.2f} GB, its share of all {pss / 1e9:.2f} GB"
        )
    print(f"both: {sum(pss for _, pss, _ in most.values()) / 1e9:.2f} GB")


@dataclass(frozen=True)
class Job:
    """What a run needs. A packet is what one machine computes at a time; seconds are those of one packet."""

    packets: int
    compute: float  # on one machine
    scheduler: float
    client: float  # reading, cutting, writing
    moved: float  # bytes of requests and results
    weights: float = 0.0  # bytes that each machine loads from one store
    start: float = 3.0  # until a worker is there
    network: float = 1.25e9  # bytes/s of the client's machine and of the store
    varies: float = 0.1  # standard deviation of a machine's speed, relative
    slow: float = 0.02  # fraction of machines that are five times slower
    life: float = 30 * 86400.0  # seconds until a machine dies, on average
    together: bool = False  # workers and client share the cores of one machine


class Run(NamedTuple):
    """What came out: seconds, how busy the parts were in the steady middle, and seconds before and after it."""

    seconds: float
    machines: float
    scheduler: float
    client: float
    network: float
    load: float
    tail: float


def simulate(job: Job, machines: int, *, copies: bool = True, seed: int = 0) -> Run:
    """Run packets on machines: the scheduler hands them out, the client takes the results, one by one.

    Only the first 300 packets of each machine and the last one are simulated; those between take the same time.
    """
    rng = random.Random(seed)
    compute = job.compute + (job.client + job.scheduler) / machines * job.together
    speeds = [max(rng.gauss(1, job.varies), 0.3) * (0.2 if rng.random() < job.slow else 1) for _ in range(machines)]
    idle = [(job.start + job.weights * (n + 1) / job.network, n) for n in range(machines)]  # the store serves in turn
    load = sum(at for at, _ in idle) / machines
    heapq.heapify(idle)
    ends = [0.0] * machines
    scheduler = client = network = 0.0  # when each is free again
    packets, half = min(job.packets, 300 * machines), 0.0
    for n in range(packets):
        at, machine = heapq.heappop(idle)
        network = max(network, at) + job.moved / job.network
        client = max(client, network) + job.client
        behind = max(client - 2 * machines * job.client, 0)  # two packets a machine are under way
        scheduler = max(scheduler, min(at, scheduler + 1e9) - job.compute, behind) + job.scheduler
        begins, took = max(at, scheduler), compute / speeds[machine]
        while rng.random() > math.exp(-took / job.life):  # the machine died halfway, and another one starts
            begins += took / 2 + job.start + job.weights / job.network
        ends[machine] = begins + took
        heapq.heappush(idle, (ends[machine], machine))
        if n == packets // 2:
            half = at
    every = (idle[0][0] - half) / (packets - packets // 2)  # seconds from packet to packet
    done = sorted(ends)
    if copies:  # those that are idle first compute what is left again
        for at in sorted(ends):
            again = at + 1 + compute
            if again < done[-1]:
                done[-1] = again
                done.sort()
    whole = done[-1] + every * (job.packets - packets)
    busy = compute / every / sum(speeds)
    scheduler, client, network = (cost / every for cost in (job.scheduler, job.client, job.moved / job.network))
    return Run(whole, busy, scheduler, client, network, load, done[-1] - idle[0][0])


# Measured here, as SCALE.md says: seconds, and tokens/s of a machine.
REQUEST = 1.37e-3  # an embedding of 26 tokens with the built-in checkpoint, on one core
READING, PASSING = 2.7e-5, 3.7e-3  # the client's time for a request; the scheduler's and the network's for a packet
EMBEDDED, SCORED = 190.0, 85.0  # Qwen3-0.6B's size on two cores: the last state alone, and all log-probabilities
IN_PACKET = 217  # such requests in a packet


def simulated() -> None:
    """Print the measured points as simulated, then what more machines would do."""
    for workers in (1, 2):
        costs = {"compute": REQUEST * IN_PACKET, "scheduler": PASSING, "client": READING * IN_PACKET}
        job = Job(20_000 // IN_PACKET, **costs, moved=3800 * IN_PACKET, varies=0, slow=0, together=True)
        print(f"20,000 embeddings, {workers} workers: {simulate(job, workers).seconds:.1f} s")
    titles = (
        "machines",
        "days",
        "busy",
        "scheduler",
        "client",
        "network",
        "loading, s",
        "last packets, s",
        "without copies",
    )
    jobs = {
        "embed 10^9 documents of 300 tokens": (1e9 * 300, EMBEDDED, 27, 27 * 24_000),
        "score 10^12 tokens in texts of 1,000": (1e12, SCORED, 8, PACKET * 32),
    }
    for what, (tokens, rate, texts, moved) in jobs.items():
        for faster in (1, 16):
            print(f"\n{what}, machines {faster} times as fast as this one\n\n| {' | '.join(titles)} |\n{'|---' * 9}|")
            for machines in (10, 100, 1000):
                packets, compute = math.ceil(tokens / PACKET), PACKET / rate / faster
                job = Job(packets, compute, PASSING, texts * READING, moved, weights=1.2e9)
                run, alone = simulate(job, machines), simulate(job, machines, copies=False)
                parts = (run.machines, run.scheduler, run.client, run.network)
                row = [f"{machines:,}", f"{run.seconds / 86400:,.1f}", *(f"{part:.1%}" for part in parts)]
                row += [f"{run.load:,.0f}", f"{run.tail:,.0f}", f"{alone.tail:,.0f}"]
                print(f"| {' | '.join(row)} |")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("one", "processes", "dask", "memory", "simulate"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--model", help="a checkpoint folder (default: built-in)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), arguments.requests
        if arguments.what == "one":
            one(folder, count)
        elif arguments.what == "processes":
            processes(folder, count, arguments.workers, ["--model", arguments.model] if arguments.model else [])
        elif arguments.what == "dask":
            dask(folder, count)
        elif arguments.what == "memory":
            memory(folder, arguments.model, count)
        else:
            simulated()


if __name__ == "__main__":
    main()
