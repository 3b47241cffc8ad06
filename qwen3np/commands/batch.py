"""`qwen3np batch`: answer a file of requests, here or on a cluster."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from qwen3np.batches import BUILTIN_NAME
from qwen3np.batches.answers import Recipe
from qwen3np.batches.run import Answering, here
from qwen3np.batches.run import run as run_batch
from qwen3np.batches.spread import Spread, cluster
from qwen3np.batches.tables import READ, WRITTEN
from qwen3np.commands import add_computation, add_model, named

EXAMPLE = "qwen3np batch requests.jsonl -o results.jsonl --model Qwen/Qwen3-Embedding-0.6B --workers 2"
HELP = "answer a file of requests in OpenAI's batch format; go on where an earlier run ended"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("requests", metavar="REQUESTS", type=Path, help=f"the requests: {', '.join(READ)}")
    results = f"the results: {', '.join(WRITTEN)}; what is there already is not done again"
    parser.add_argument("-o", "--output", metavar="RESULTS", type=Path, required=True, help=results)
    order = "results in the order of the requests (default for .jsonl: as they come)"
    parser.add_argument("--in-order", action="store_true", help=order)
    per_file = "results in several files, NAME-00000 and so on, of N each"
    parser.add_argument("--per-file", type=int, metavar="N", help=per_file)
    where = parser.add_argument_group("where (default: in this process)").add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="N processes here, which share the cores")
    where.add_argument("--scheduler", metavar="ADDRESS", help="the workers of a Dask cluster, such as tcp://host:8786")
    parser.add_argument("--name", metavar="NAME", help="the name of the model in requests (default: --model)")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answer all requests, and report how many failed."""
    for flag in ("workers", "per_file"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)} must be at least 1")
    recipe = Recipe(
        named(arguments),
        arguments.name or arguments.model or BUILTIN_NAME,
        arguments.numerics,
        arguments.engine,
        tuple((flag, getattr(arguments, flag)) for flag in ("revision", "gguf_file", "adapter", "weights_dtype")),
        arguments.rope_scaling,
    )
    with ExitStack() as stack:

        def answering() -> Answering:
            if arguments.workers is None and arguments.scheduler is None:
                return here(recipe.answers())
            return Spread(stack.enter_context(cluster(arguments.workers, arguments.scheduler)), recipe)

        try:
            counts = run_batch(
                arguments.requests,
                arguments.output,
                answering,
                in_order=arguments.in_order,
                per_file=arguments.per_file,
            )
        except KeyboardInterrupt:
            print("\n[stopped; the same command goes on from here]", file=sys.stderr)
            raise
    failed = f"{counts['failures']:,} failed" if counts["failures"] else "none failed"
    if counts["complete"]:
        failed = f"{counts['complete']:,} of them in files that were complete"
    print(f"[{counts['results']:,} results, {failed}: {arguments.output}]", file=sys.stderr)
