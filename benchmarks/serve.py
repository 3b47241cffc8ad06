"""What the server holds, and how fast it is: `PYTHONPATH=tests python benchmarks/serve.py PART [...] [--help]`.

start       process start to the first answer; answers of 10 tokens per second, one client after another
drawn       drawn requests of the openai client against generate and score: ids, log-probabilities
together    the same requests alone, and 32 at once: every bit of the log-probabilities
stress      64 clients at once, some of which leave or send junk: wrong and lost answers, memory
schemas     answers to drawn JSON schemas: finished, valid
fuzz        odd requests, streaming ones too: errors of the server, tracebacks
decode      tokens per second in all, for 1 and for 8 clients; --model FOLDER is made at the real size if missing
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import httpx
import jsonschema
import numpy as np
import serving
from random_checkpoint import add_checkpoint, make_if_missing

import qwen3np

PATH, JSON = "/v1/completions", {"Content-Type": "application/json"}
ENDS = {"2022": -100, "2024": -100}  # of the built-in checkpoint: banned, answers have their full length


@contextmanager
def server(*flags):
    """Yield a server's address, process and log; it runs in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen3np", "serve", "--port", "0", *flags], stderr=subprocess.PIPE, text=True
    )
    log: list[str] = []
    for line in process.stderr:
        if line.startswith("serving"):
            break
    thread = threading.Thread(target=lambda: log.extend(process.stderr))
    thread.start()
    try:
        yield line.split()[-1].removesuffix("/v1"), process, log
    finally:
        process.terminate()
        process.wait()
        thread.join()
    bad = [line for line in log if "Traceback" in line or re.search(r" 500 ", line)]
    print(f"  log: {len(log)} lines, {len(bad)} with a traceback or status 500; exit status {process.returncode}")


def body(n, tokens=10):
    """Return one of many requests."""
    prompt = f"The capital of France is {'and so on ' * (n % 6 * 8)}"
    return {"prompt": prompt, "max_tokens": tokens, "seed": n, "temperature": 0.8, "logit_bias": ENDS, "logprobs": 3}


def start(a):
    """Print times of a start, and requests per second."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        with server() as (address, *_), httpx.Client() as http:
            http.post(address + PATH, json={"prompt": "The capital of France is"})
            times.append(time.perf_counter() - began)
            if len(times) == 5:
                began = time.perf_counter()
                for _ in range(100):
                    http.post(address + PATH, json=body(0))
                rate = 100 / (time.perf_counter() - began)
    print(f"start to the first answer: median {median(times):.2f} s of {[round(t, 2) for t in times]}")
    print(f"answers of 10 tokens, one client: {rate:.1f} per second")


def drawn(a):
    """Compare drawn requests with generate and score."""
    model, rng, count, far = qwen3np.load(progress=False), np.random.default_rng(a.seed), Counter(), 0.0
    with server() as (address, *_), serving.client(address) as client:
        for _ in range(a.count or 200):
            prompt, asked, options = serving.drawn_completion(rng, model.text)
            others = {**options, "extra_body": {"top_k": options["top_k"]}}
            del others["top_k"]
            found = client.completions.create(model="qwen3np-builtin", prompt=prompt, logprobs=2, **asked, **others)
            ids = model.text.encode(prompt)
            truth, _ = model.generate([ids] * asked["n"], max_new_tokens=asked["max_tokens"], progress=False, **options)
            count["requests"] += 1
            count["of more than 128 tokens"] += len(ids) > 128
            for choice, new in zip(found.choices, truth, strict=True):
                count["answers"] += 1
                count["other ids"] += choice.logprobs.model_extra["token_ids"] != new
                gap = choice.logprobs.token_logprobs - model.score(ids + new, progress=False)[-len(new) :]
                far = max(far, float(abs(gap).max()))
    print(f"drawn: {dict(count)}; log-probabilities off by at most {far:.1e}")


def together(a):
    """Compare answers of requests alone with those of 32 at once."""
    with server() as (address, *_), httpx.Client(timeout=120) as http:
        bodies = [body(n, 30) for n in range(32)]
        alone = [http.post(address + PATH, json=one).json()["choices"] for one in bodies]
        with ThreadPoolExecutor(32) as pool:
            beside = list(pool.map(lambda one: httpx.post(address + PATH, json=one, timeout=120).json(), bodies))
    same = sum(one["choices"] == other for one, other in zip(beside, alone, strict=True))
    print(f"together: {same} of 32 answers have every bit that they have alone")


def stress(a):
    """Let 64 clients ask at once, and count what goes wrong."""
    count, lock, rss = Counter(), threading.Lock(), []
    with server() as (address, process, _), httpx.Client(timeout=120) as http:
        truth = [http.post(address + PATH, json=body(n)).json()["choices"] for n in range(48)]
        end = time.time() + a.seconds

        def ask(client, draw):
            x, n = draw.random(), draw.randrange(48)
            if x < 0.7:
                found = client.post(address + PATH, json=body(n))
                if found.status_code == 429:
                    return "told to come back"
                return "right" if found.status_code == 200 and found.json()["choices"] == truth[n] else "WRONG"
            if x < 0.8:
                with client.stream("POST", address + PATH, json={**body(n, 100), "stream": True}) as stream:
                    list(zip(range(3), stream.iter_lines(), strict=False))
                return "left early"
            if x < 0.9:
                found = client.post(address + PATH, content=draw.randbytes(50), headers=JSON)
                return "junk refused" if found.status_code == 400 else "WRONG"
            if x < 0.93:
                try:
                    found = client.post(address + PATH, content=b" " * (5 << 20), headers=JSON)
                    return "too large" if found.status_code == 413 else "WRONG"
                except httpx.TransportError:
                    return "too large"
            with suppress(httpx.ReadTimeout):
                client.post(address + PATH, json=body(n, 150), timeout=0.2)
            return "left early"

        def work(k):
            draw = random.Random(1000 * a.seed + k)
            with httpx.Client(timeout=120) as client:
                while time.time() < end:
                    try:
                        said = ask(client, draw)
                    except httpx.TransportError as error:
                        said = f"LOST {error!r}"
                    with lock:
                        count[said] += 1

        threads = [threading.Thread(target=work, args=(k,)) for k in range(64)]
        for thread in threads:
            thread.start()
        while time.time() < end:
            time.sleep(a.seconds / 10)
            status = Path(f"/proc/{process.pid}/status").read_text()
            rss.append(round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1))
        for thread in threads:
            thread.join()
    print(f"stress, {a.seconds:.0f} s: {dict(count)}; resident MB {rss}")


def schemas(a):
    """Count answers to drawn schemas that finish, and that are valid."""
    rng, count = np.random.default_rng(a.seed), Counter()
    with server() as (address, *_), httpx.Client(timeout=120) as http:

        def ask(n, schema):
            form = {"type": "json_schema", "json_schema": {"name": "drawn", "schema": schema}}
            asked = {"prompt": "JSON:", "max_tokens": 150, "temperature": 1.0, "seed": n, "response_format": form}
            found = http.post(address + PATH, json=asked)
            if found.status_code != 200:
                return f"status {found.status_code}: {found.json()['error']['message'][:80]}"
            (choice,) = found.json()["choices"]
            if choice["finish_reason"] == "length":
                return "cut at 150 tokens"
            try:
                jsonschema.validate(json.loads(choice["text"]), schema)
            except (ValueError, jsonschema.ValidationError):
                return f"INVALID {schema} {choice['text']}"
            return "finished, valid"

        asked = [(n, serving.drawn_schema(rng)) for n in range(a.count or 1000)]
        with ThreadPoolExecutor(8) as pool:
            count.update(pool.map(lambda one: ask(*one), asked))
    print(f"schemas: {dict(count)}")


def fuzz(a):
    """Count the statuses of odd requests."""
    rng, count = np.random.default_rng(a.seed), Counter()
    with server() as (address, *_), httpx.Client(timeout=120) as http:

        def ask(request):
            path, content = request
            found = http.post(address + path, content=content, headers=JSON)
            try:
                serving.check_reply(found)
            except AssertionError as error:
                print(path, content, error)
                return "WRONG"
            streamed = " streamed" if "event-stream" in found.headers["content-type"] else ""
            return f"{found.status_code}{streamed}"

        asked = [serving.drawn_request(rng) for _ in range(a.count or 20_000)]
        with ThreadPoolExecutor(8) as pool:
            count.update(pool.map(ask, asked))
    print(f"fuzz: {sum(count.values())} requests: {dict(sorted(count.items()))}")


def decode(a):
    """Print tokens per second of 1 client and of 8."""
    make_if_missing(a.model, a)
    with server("--model", str(a.model), "--weights-dtype", a.weights_dtype) as (address, *_):

        def ask(n):
            asked = {"prompt": [n + 1, n + 2, n + 3], "max_tokens": 24, "temperature": 1.0, "seed": n}
            found = httpx.post(address + PATH, json=asked, timeout=600).json()
            return found["usage"]["completion_tokens"]

        ask(0)
        rates = {1: [], 8: []}
        for _ in range(3):
            for clients in rates:
                began = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    tokens = sum(pool.map(ask, range(clients)))
                rates[clients].append(tokens / (time.perf_counter() - began))
    one, eight = median(rates[1]), median(rates[8])
    print(f"decode: 1 client {one:.1f} tokens/s, 8 clients {eight:.1f} tokens/s in all: {eight / one:.2f} x")


PARTS = {part.__name__: part for part in (start, drawn, together, stress, schemas, fuzz, decode)}


def main() -> None:
    """Run the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--count", type=int, help="requests (default: 200 drawn, 1,000 schemas, 20,000 fuzzed)")
    parser.add_argument("--seconds", type=float, default=600, help="of the stress (600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path("random-0.6B"), help="the folder for decode")
    parser.add_argument("--weights-dtype", default="auto", help="float32, mapped or auto, for decode")
    add_checkpoint(parser)
    a = parser.parse_args()
    for part in a.parts:
        PARTS[part](a)


if __name__ == "__main__":
    main()
