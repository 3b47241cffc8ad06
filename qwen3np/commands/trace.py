"""`qwen3np trace`: record every intermediate value from a prompt to its logits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3np.commands import add_computation, add_model, load_named, text
from qwen3np.numerics import Array
from qwen3np.porting import record
from qwen3np.porting.points import point_names
from qwen3np.porting.record import output_path, trace

EXAMPLE = 'qwen3np trace --model Qwen/Qwen3-0.6B "The capital of France is" --steps 2 -o golden.safetensors'
SHOWN = 32  # ids printed
HELP = "record every intermediate value from a prompt to its logits"

MOST = 1_000_000  # numbers in one range


def numbers(argument: str) -> list[int]:
    """Return "1,5-7" as [1, 5, 6, 7]."""
    found: list[int] = []
    for part in argument.split(","):
        first, _, last = part.strip().partition("-")
        if not 0 <= int(last or first) - int(first) < MOST:
            raise ValueError(f"{part}: a range goes from a lower to a higher number, at most {MOST:,} numbers")
        found += range(int(first), int(last or first) + 1)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", metavar="PROMPT", type=text, nargs="?", help="a text, used as it is")
    prompt.add_argument("--ids", metavar="IDS", type=numbers, help="token ids instead: 785,6722,315")
    output = "write a .safetensors file (replacing an existing one) instead of printing a table"
    parser.add_argument("-o", "--output", metavar="FILE", help=output)
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="then decode N tokens greedily (0)")
    feed = "ids for the decode steps; greedy ids follow: 785,6722"
    parser.add_argument("--feed", type=numbers, metavar="IDS", help=feed)
    points = "only points that match a pattern: 'layers.0.*,lm_head', 'decode.*', '*_rope' (all)"
    parser.add_argument("--points", default="*", metavar="P", help=points)
    parser.add_argument("--layers", type=numbers, metavar="N", help="only these layers: 0,4-6")
    parser.add_argument("--tokens", type=numbers, metavar="N", help="only these positions of the prompt: 0,4-6")
    heads = "only these query heads, for points with a heads axis: 0,4-6"
    parser.add_argument("--heads", type=numbers, metavar="N", help=heads)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Record and write a file, or print a table as the points are computed."""
    if arguments.output is not None:
        output_path(arguments.output)  # before all the work
    model = load_named(arguments)
    ids = arguments.ids
    if ids is None:
        ids = model.text.encode(arguments.prompt)
    names = ("steps", "numerics", "engine", "points", "layers", "tokens", "heads")
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in names} | {"fed": arguments.feed}
    if arguments.output is None:
        width = max(map(len, point_names(model.config))) + len("decode.0.") * (
            arguments.steps > 0 or arguments.feed is not None
        )
        lines = [line(width, "point", "shape", ("mean", "rms", "min", "max"), "not finite")]

        def show(name: str, x: Array) -> None:
            lines.append(line(width, name, *summary(x)))
            print("\n".join(lines))
            lines.clear()

        all_ids = trace(model.weights, model.config, ids, show, **chosen)
    else:
        recording = record(model.weights, model.config, ids, **chosen)
        recording.save(arguments.output)
        size, all_ids = sum(x.nbytes for x in recording.points.values()), recording.ids
        print(f"[{len(recording.points)} points, {size:,} bytes: {arguments.output}]", file=sys.stderr)
    prompt, decoded = (",".join(map(str, part[:SHOWN])) for part in np.split(all_ids[0], [len(ids)]))
    more = ",..." if len(ids) > SHOWN else ""
    print(f"[ids {prompt}{more}" + (f", then {decoded}]" if decoded else "]"), file=sys.stderr)


def line(width: int, name: str, shape: str, figures: Sequence[str], other: str) -> str:
    """Return a line of the table, names in a column of this width."""
    return f"{name:<{width}}  {shape:<14}{''.join(f'{f:>11}' for f in figures)}{other:>12}"


def summary(x: Array) -> tuple[str, list[str], str]:
    """Return an array's shape; its mean, root mean square, minimum and maximum; and how many are not finite."""
    finite = x[np.isfinite(x)].astype(np.float64)
    figures = [np.nan] * 4
    if finite.size:
        figures = [finite.mean(), np.sqrt(np.mean(finite**2)), finite.min(), finite.max()]
    return "x".join(map(str, x.shape)), [f"{f:.4g}" for f in figures], f"{x.size - finite.size:,}"
