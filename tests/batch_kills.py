"""Kills what takes part in a batch at random moments, lets it go on, and compares with an undisturbed run.

    python tests/batch_kills.py --kills 30 --seed 0

In rotation: the client (SIGKILL), a worker (SIGKILL), a worker that hangs (SIGSTOP), and the scheduler (SIGKILL). After
the death of a client or a scheduler the same command runs again. It is clean if the results then have every line of the
undisturbed run, whole, once, with the same bytes, and no process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

import qwen3np

COMMAND = [sys.executable, "-m", "qwen3np", "batch"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(qwen3np.__file__).resolve().parents[1])}
KINDS = ("client", "worker", "hanging worker", "scheduler")


def requests(count, seed=0):
    rng, words = (
        random.Random(seed),
        ["the", "sky", "is", "blue", "and", "Grass", "grows", "where", "Anna", "sees", "a", "bird"],
    )
    for n in range(count):
        said = " ".join(rng.choices(words, k=rng.randint(4, 30)))
        yield json.dumps({"custom_id": f"{n}", "url": "/v1/embeddings", "body": {"input": said}}) + "\n"


@contextmanager
def cluster(folder):
    """Yield the address and the process of a scheduler with two workers, each a process of its own."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    options = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    with ExitStack() as stack:
        scheduler = subprocess.Popen([*dask, "--no-dashboard", "--scheduler-file", str(file)], **options)
        stack.callback(end, scheduler)
        while not (file.exists() and file.read_text()):
            time.sleep(0.1)
        for _ in range(2):
            worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
            worker += ["--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
            stack.callback(end, subprocess.Popen(worker, **options))
        yield json.loads(file.read_text())["address"], scheduler


def end(process):
    """Kill a process and all that it started."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
        one.kill()
    process.wait()


def workers(client):
    """The worker processes of a client."""
    try:
        children = psutil.Process(client.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:  # it has just ended
        return []


def run(arguments, log):
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=ENVIRONMENT, stdout=log, stderr=log)


def wait_for_work(process, out):
    """Wait until the first results are there."""
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)


def killed(kind, source, out, moment, rng, log):
    """Run a batch in which something dies, until it is done; return how many runs that took."""
    folder = out.parent
    if kind == "scheduler":
        with cluster(folder) as (address, scheduler):
            process = run([source, "-o", out, "--scheduler", address], log)
            wait_for_work(process, out)
            time.sleep(moment)
            scheduler.kill()
            process.wait(120)
        with cluster(folder) as (address, _):
            assert run([source, "-o", out, "--scheduler", address], log).wait(120) == 0
        return 1 + (process.returncode != 0)
    process = run([source, "-o", out, "--workers", "2"], log)
    wait_for_work(process, out)
    time.sleep(moment)
    family = workers(process)
    if kind == "client":
        process.kill()
        process.wait()
        psutil.wait_procs(family, 20)
        left = [one for one in family if one.is_running()]
        assert not left, f"workers survive their client: {left}"
        assert run([source, "-o", out, "--workers", "2"], log).wait(120) == 0
        return 2
    if family:
        rng.choice(family).send_signal(signal.SIGKILL if kind == "worker" else signal.SIGSTOP)
    assert process.wait(180) == 0
    psutil.wait_procs(family, 20)
    assert not [one for one in family if one.is_running()], "workers survive their client"
    return 1


def kills(count, seed, report, size=3000):
    """Kill this many, and report each one's kind, moment, time and result."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "requests.jsonl"
        source.write_text("".join(requests(size)))
        began = time.monotonic()
        with (folder / "log").open("w") as log:
            process = run([source, "-o", folder / "whole.jsonl", "--workers", "2"], log)
            wait_for_work(process, folder / "whole.jsonl")
            began = time.monotonic()
            assert process.wait() == 0
        seconds = time.monotonic() - began
        whole = sorted((folder / "whole.jsonl").read_bytes().splitlines(keepends=True))
        assert len(whole) == size
        for n in range(count):
            kind, moment = KINDS[n % len(KINDS)], rng.uniform(0, seconds)
            out, began = folder / f"{n}.jsonl", time.monotonic()
            with (folder / "log").open("w+") as log:
                try:
                    killed(kind, source, out, moment, rng, log)
                    found = sorted(out.read_bytes().splitlines(keepends=True))
                    outcome = (
                        "clean" if found == whole else f"BAD: {len(found)} lines, {len(set(found) & set(whole))} right"
                    )
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    log.seek(0)
                    outcome = f"BAD: {error!r} {log.read()[-2000:]}"
            report(kind, moment, time.monotonic() - began, outcome)
            out.unlink(missing_ok=True)


def main():
    """Run what the command line asks for. Status 1 unless all were clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=3000, help="requests")
    arguments = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()

    def report(kind, moment, seconds, outcome):
        print(f"{kind:<15} killed after {moment:.2f} s of work, done after {seconds:.1f} s: {outcome}", flush=True)
        outcomes[kind, outcome] += 1

    kills(arguments.kills, arguments.seed, report, arguments.size)
    print(", ".join(f"{count} {kind} {outcome}" for (kind, outcome), count in sorted(outcomes.items())))
    sys.exit(any(outcome != "clean" for _, outcome in outcomes))


if __name__ == "__main__":
    main()
