"""`qwen3np verify`: whether this machine computes the same bits as others."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version

from qwen3np.commands import add_model, add_threads, load_named, table
from qwen3np.commands.bench import blas, processor
from qwen3np.ops.fast.threads import num_threads
from qwen3np.verify import COUNT, published_hash, published_rows, verify

EXAMPLE = "qwen3np verify"
HELP = "check that this machine computes the same bits as others (exact engine)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print machine, versions, hash and verdict. Exit with status 1 if a published value differs."""
    arguments.weights_dtype = "auto"
    model = load_named(arguments)
    changes = (arguments.rope_scaling, arguments.adapter, arguments.gguf_file, arguments.revision)
    changed = any(change is not None for change in changes)  # then it is not the model that was published
    published = published_hash() if arguments.model is None and not changed else None
    found = verify(model, published, None if changed else published_rows(arguments.model))
    machine = f"{processor()}, {platform.machine()}, {platform.system()}"
    versions = {
        "numpy": version("numpy"),
        "blas": blas(),
        "threads": num_threads(),
        "python": platform.python_version(),
    }
    if arguments.json:
        print(json.dumps({"machine": machine, **versions, **asdict(found), "passed": found.passed}))
    else:
        rows = [
            ("machine", machine),
            ("NumPy", "{numpy}, {blas}, {threads} threads; Python {python}".format(**versions)),
            ("exact logits", f"SHA-256 {found.sha256} (float32, {COUNT} positions)"),
            ("published", _against_published(found.sha256, found.published)),
        ]
        if found.rows:
            rows.append(
                (
                    "published rows",
                    f"{found.rows.same_greedy} of {found.rows.positions} greedy ids equal; logits within "
                    f"{found.rows.largest_logit_difference:.1e}, norms within {found.rows.largest_norm_difference:.1e}"
                    f": {'equal to rounding' if found.rows.passed else 'DIFFERENT'}",
                )
            )
        distance = f"{found.fast_distance:.1e} from it (relative L2), {found.fast_equal:.1%} of the logits equal"
        print(table([*rows, ("fast engine", distance)]))
    if not found.passed:
        sys.exit(1)


def _against_published(ours: str, published: str | None) -> str:
    if published is None:
        return "no hash is published for this model; compare it with the hash on another machine"
    return "the same bits" if ours == published else f"DIFFERENT: it should be {published}"
