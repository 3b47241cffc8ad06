"""`qwen3np diagnose`: why another implementation's numbers are wrong."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from qwen3np.commands import add_model, named
from qwen3np.commands.compare import add_dump, read, read_weights, reported
from qwen3np.porting.compare import per_cent
from qwen3np.porting.diagnose import Diagnosis, diagnose

EXAMPLE = "qwen3np diagnose golden.safetensors mine.safetensors --model Qwen/Qwen3-0.6B"
HELP = "try known bugs at the first wrong number of another implementation; exit status as for compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_dump(parser)
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the report and exit with its status."""
    found = reported(arguments, _diagnose, "causes")
    text = found.meaning if arguments.brief else summary(found)
    if arguments.json:
        causes = [{**asdict(cause), "step": cause.point} for cause in found.causes]  # step: the old name of point
        text = json.dumps({**asdict(found), "causes": causes})
    print(text)
    sys.exit(found.verdict == "different")


def _diagnose(arguments: argparse.Namespace) -> Diagnosis:
    golden, dump, about, options = read(arguments)
    if arguments.weights_from is None:
        named(arguments)
    golden, weights = read_weights(arguments, golden)
    return diagnose(golden, dump, about, weights=weights, **options)


def summary(found: Diagnosis) -> str:
    """Return the report as text."""
    lines = list(found.known)
    if found.unexplained:
        names = ", ".join(found.unexplained[:5]) + (", ..." if len(found.unexplained) > 5 else "")
        lines.append(f"an error of another cause is added at {len(found.unexplained)} points: {names}")
    if found.causes:
        lines.append("explained of the squared error:")
        lines += [
            f"{per_cent(cause.explained):>12}  {cause.name} (at {cause.point})"
            for cause in found.causes
            if cause.explained > 0.01
        ]
    return "\n".join([*lines, found.meaning])
