"""`qwen3np compare`: find the first wrong number of another implementation, or confirm that all are right."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qwen3np.commands import add_model, scaled
from qwen3np.errors import one_line
from qwen3np.loading import load
from qwen3np.numerics import Array
from qwen3np.porting import Comparison, PointReport, Recording, compare, read_dump, record
from qwen3np.porting.align import PRECISIONS
from qwen3np.porting.dumps import read_map
from qwen3np.porting.hashes import differing, read_hashes
from qwen3np.porting.points import split_layer
from qwen3np.porting.record import fingerprint

EXAMPLE = "qwen3np compare golden.safetensors mine.safetensors --model Qwen/Qwen3-0.6B"
HELP = "compare another implementation with a recording; exit status 0: rounding, 1: different, 2: unusable"
Report = TypeVar("Report")
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_dump(parser)
    add_model(
        parser,
        default="none; with it each formula is run on the port's own inputs, which shows the error it introduces",
    )


def add_dump(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recording and a dump."""
    parser.add_argument("golden", metavar="GOLDEN", help="a recording: qwen3np trace -o")
    parser.add_argument(
        "mine",
        metavar="MINE",
        help="a .safetensors, a .npz, a folder of .npy files or from transformers' model_addition_debugger_context; a "
        ".txt that llama-eval-callback printed; or a .json {point: SHA-256} from a port that is exact, too",
    )
    parser.add_argument(
        "--map", metavar="FILE", help='names as JSON: {"blk{N}.q": "model.layers.{N}.self_attn.q_proj"}'
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="what the port computes in (default: inferred from its numbers)"
    )
    required = "points that must be compared, patterns separated by commas: 'lm_head,decode.*'; status 2 without them"
    parser.add_argument("--require", metavar="P", help=required)
    other = "the weights that the port uses instead, such as dequantised ones: a folder, or a .safetensors file"
    parser.add_argument("--weights-from", metavar="W", help=other)
    parser.add_argument(
        "--brief", action="store_true", help="print no table, only what is wrong and how much was compared"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print the report and exit with its status."""
    if Path(arguments.mine).suffix == ".json":
        _compare_hashes(arguments)
        return
    found = reported(arguments, _compare, "points")
    text = table(found, sys.stdout.isatty() and not arguments.brief)
    if arguments.brief:
        text = text.splitlines()[-1]
    print(json.dumps(asdict(found)) if arguments.json else text)
    sys.exit(found.verdict == "different")


def reported(arguments: argparse.Namespace, make: Callable[[argparse.Namespace], Report], items: str) -> Report:
    """Return the result of `make`. If the files are unusable, exit with status 2; with --json, print an object."""
    try:
        return make(arguments)
    except (ValueError, OSError) as error:
        if not arguments.json:
            raise
        print(json.dumps({"verdict": "unusable", "first_point": None, "meaning": str(error), items: []}))
        sys.exit(2)


def read(arguments: argparse.Namespace) -> tuple[Recording, dict[str, Array], dict[str, Any], dict[str, Any]]:
    """Return the recording, the dump, what the dump says about itself, and the options from the flags."""
    try:
        golden = Recording.load(arguments.golden)
    except ValueError as error:
        if is_recording(arguments.mine):
            raise ValueError(f"{arguments.mine} is a recording, {arguments.golden} is not: give GOLDEN first") from None
        raise error
    dump, about = read_dump(arguments.mine)
    names = read_map(arguments.map) if arguments.map else None
    require = [pattern.strip() for pattern in (arguments.require or "").split(",") if pattern.strip()]
    return golden, dump, about, {"names": names, "precision": arguments.precision, "require": require}


def is_recording(path: str) -> bool:
    """Whether trace wrote this file."""
    try:
        Recording.load(path)
    except (ValueError, OSError):
        return False
    return True


def read_weights(arguments: argparse.Namespace, golden: Recording) -> tuple[Recording, Mapping[str, Array]]:
    """Return the recording and the weights of --model, or both as --weights-from makes them.

    Raises ValueError if the weights of --model are not the recorded ones.
    """
    if arguments.weights_from is not None:
        path = Path(arguments.weights_from)
        weights = read_dump(path)[0] if path.suffix == ".safetensors" else load(arguments.weights_from).weights
        prompt, fed = np.split(golden.ids, [golden.ids.shape[1] - golden.steps], 1)
        other = record(
            weights,
            golden.config,
            prompt,
            fed=fed if golden.steps else None,
            numerics=golden.numerics,
            tokens=golden.tokens,
            heads=golden.heads,
        )
        return replace(other, points={name: other.points[name] for name in golden.points}), weights
    model = load(arguments.model, revision=arguments.revision)
    named = arguments.model or "the built-in checkpoint"
    if scaled(model.config, arguments) != golden.config:
        raise ValueError(f"{named}: its config differs from {arguments.golden}; --model must name the recorded model")
    if golden.fingerprint not in (None, fingerprint(model.weights)):
        raise ValueError(
            f"{named}: its weights differ from {arguments.golden}; --weights-from takes a port's own, "
            "such as dequantised ones"
        )
    return golden, model.weights


def _compare(arguments: argparse.Namespace) -> Comparison:
    golden, dump, about, options = read(arguments)
    weights = None
    if arguments.model is not None or arguments.weights_from is not None:
        golden, weights = read_weights(arguments, golden)
    return compare(golden, dump, about, weights=weights, **options)


def _compare_hashes(arguments: argparse.Namespace) -> None:
    """Compare the hashes of points with a recording by the exact engine."""
    golden, mine = Recording.load(arguments.golden), read_hashes(Path(arguments.mine))
    if golden.engine != "exact":
        raise ValueError(f"{arguments.golden}: made by the {golden.engine} engine; hashes need one of --engine exact")
    different, missing, unknown = differing(golden.sha256, mine)
    compared = len(golden.points) - len(missing)
    if not compared:
        raise ValueError(f"{arguments.mine}: none of its {len(mine)} names is a point of {arguments.golden}")
    for name in different:
        print(f"{name}: other bits")
    first = f"the first point with other bits: {different[0]}" if different else "the same bits"
    left = f"; {len(unknown)} unknown names" if unknown else ""
    print(f"{first}; compared {compared} of {len(golden.points)} points{left}")
    sys.exit(bool(different))


def table(found: Comparison, colour: bool) -> str:
    """Return the report as text."""
    width = max(len(report.name) for report in found.points)
    head = f"{'point':<{width}}{'rel L2':>10}{'floor':>10}{'added':>10}{'max abs':>10}{'ulp':>10}  token head  verdict"
    lines = [head, *(_line(report, width, colour) for report in found.points)]
    for what, names in (
        ("not in the dump", found.missing),
        ("not known", found.unknown),
        ("in the map, but not in the dump", found.unmapped),
    ):
        if names:
            shown = ", ".join(map(one_line, names[:5])) + (", ..." if len(names) > 5 else "")
            lines.append(f"{len(names)} {what}: {shown}")
    own: dict[str, float] = {}
    for report in found.points:
        if report.adds and report.added is not None:
            kind = split_layer(report.name)[1]
            own[kind] = max(own.get(kind, 0.0), report.added)
    if own:
        kinds = ", ".join(f"{kind} ({x:.1e})" for kind, x in own.items())
        lines.append(f"points that add an error of their own: {kinds}")
    return "\n".join([*lines, found.meaning])


def _line(report: PointReport, width: int, colour: bool) -> str:
    figures = (report.rel_l2, report.floor, report.added, report.max_abs, report.ulp)
    numbers = "".join(f"{'-' if x is None else format(x, '.1e'):>10}" for x in figures)
    place = "".join(f"{'-' if x is None else x:>{w}}" for x, w in ((report.token, 7), (report.head, 5)))
    verdict = ": ".join([report.verdict, *([", ".join(report.notes)] if report.notes else [])])
    if colour:
        verdict = f"{RED if report.verdict == 'different' else GREEN}{verdict}{PLAIN}"
    return f"{report.name:<{width}}{numbers}{place}  {verdict}"
