"""`qwen3np compare`: the first number of another implementation that is wrong, or that all of them are right."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from qwen3np.commands import add_model, scaled
from qwen3np.errors import one_line
from qwen3np.loading import load
from qwen3np.numerics import Array
from qwen3np.porting import Comparison, PointReport, Recording, compare, read_dump
from qwen3np.porting.dumps import read_map

EXAMPLE = "qwen3np compare golden.safetensors mine.safetensors --model Qwen/Qwen3-0.6B"
HELP = "compare the numbers of another implementation with a recording; status 0: rounding, 1: different, 2: unusable"
Report = TypeVar("Report")
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_dump(parser)
    add_model(parser, default="none; with it each step is run on the port's own inputs, for the error that it adds")


def add_dump(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recording and a dump."""
    parser.add_argument("golden", metavar="GOLDEN", help="a recording: qwen3np trace -o")
    parser.add_argument(
        "mine",
        metavar="MINE",
        help="a .safetensors, a .npz, a folder of .npy, or of transformers' model_addition_debugger_context",
    )
    parser.add_argument(
        "--map", metavar="FILE", help='names as JSON: {"blk{N}.q": "model.layers.{N}.self_attn.q_proj"}'
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="what the port computes in (default: as its numbers look)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print the report and end with its status."""
    found = reported(arguments, _compare, "points")
    print(json.dumps(asdict(found)) if arguments.json else table(found, sys.stdout.isatty()))
    sys.exit(found.verdict == "different")


def reported(arguments: argparse.Namespace, make: Callable[[argparse.Namespace], Report], items: str) -> Report:
    """Return what make gives; where it can make nothing of the files, end with status 2, with --json as an object."""
    try:
        return make(arguments)
    except (ValueError, OSError) as error:
        if not arguments.json:
            raise
        print(json.dumps({"verdict": "unusable", "first_point": None, "meaning": str(error), items: []}))
        sys.exit(2)


def read(arguments: argparse.Namespace) -> tuple[Recording, dict[str, Array], dict[str, Any], dict[str, Any]]:
    """Return the recording, the dump, what the dump says of itself, and the options that the flags give."""
    golden, (dump, about) = Recording.load(arguments.golden), read_dump(arguments.mine)
    names = read_map(arguments.map) if arguments.map else None
    return golden, dump, about, {"names": names, "precision": arguments.precision}


def read_weights(arguments: argparse.Namespace, golden: Recording) -> Mapping[str, Array]:
    """Return the weights of --model. Raises ValueError where they are not of the recording's model."""
    model = load(arguments.model, revision=arguments.revision)
    if scaled(model.config, arguments) != golden.config:
        raise ValueError(
            f"{arguments.model or 'the built-in checkpoint'}: its config is not that of {arguments.golden}; "
            "--model names the one that was recorded"
        )
    return model.weights


def _compare(arguments: argparse.Namespace) -> Comparison:
    golden, dump, about, options = read(arguments)
    weights = None if arguments.model is None else read_weights(arguments, golden)
    return compare(golden, dump, about, weights=weights, **options)


def table(found: Comparison, colour: bool) -> str:
    """Return the report for people."""
    width = max(len(report.name) for report in found.points)
    head = f"{'point':<{width}}{'rel L2':>10}{'floor':>10}{'added':>10}{'max abs':>10}{'ulp':>10}  token head  verdict"
    lines = [head, *(_line(report, width, colour) for report in found.points)]
    for what, names in (("not in the dump", found.missing), ("not known", found.unknown)):
        if names:
            shown = ", ".join(map(one_line, names[:5])) + (", ..." if len(names) > 5 else "")
            lines.append(f"{len(names)} {what}: {shown}")
    return "\n".join([*lines, found.meaning])


def _line(report: PointReport, width: int, colour: bool) -> str:
    figures = (report.rel_l2, report.floor, report.added, report.max_abs, report.ulp)
    numbers = "".join(f"{'-' if x is None else format(x, '.1e'):>10}" for x in figures)
    place = "".join(f"{'-' if x is None else x:>{w}}" for x, w in ((report.token, 7), (report.head, 5)))
    verdict = ": ".join([report.verdict, *([", ".join(report.notes)] if report.notes else [])])
    if colour:
        verdict = f"{RED if report.verdict == 'different' else GREEN}{verdict}{PLAIN}"
    return f"{report.name:<{width}}{numbers}{place}  {verdict}"
