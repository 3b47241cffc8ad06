"""`qwen3np trace`: record every number on the way from a prompt to its logits."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from qwen3np.commands import add_computation, add_model, named, text
from qwen3np.loading import load
from qwen3np.porting import Recording, record

EXAMPLE = 'qwen3np trace --model Qwen/Qwen3-0.6B "The capital of France is" --steps 2 -o golden.safetensors'
HELP = "record every number on the way from a prompt to its logits"


def numbers(argument: str) -> list[int]:
    """Return "1,5-7" as [1, 5, 6, 7]."""
    found: list[int] = []
    for part in argument.split(","):
        first, _, last = part.strip().partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", metavar="PROMPT", type=text, nargs="?", help="a text, taken as it is")
    prompt.add_argument("--ids", metavar="IDS", type=numbers, help="token ids instead: 785,6722,315")
    parser.add_argument("-o", "--output", metavar="FILE", help="write a safetensors file instead of printing a table")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="then decode N tokens greedily (0)")
    parser.add_argument("--feed", type=numbers, metavar="IDS", help="ids for the decode steps, before greedy ones")
    parser.add_argument("--points", default="*", metavar="P", help="patterns: 'layers.0.*,lm_head' (all)")
    parser.add_argument("--layers", type=numbers, metavar="N", help="only these layers: 0,4-6")
    parser.add_argument("--tokens", type=numbers, metavar="N", help="only these positions of the prompt")
    parser.add_argument("--heads", type=numbers, metavar="N", help="only these query heads, where heads are apart")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Record, and write a file or print the table."""
    model = load(named(arguments), revision=arguments.revision, weights_dtype=arguments.weights_dtype)
    ids = arguments.ids
    if ids is None:
        if model.tokenizer is None:
            raise ValueError(f"{arguments.model}: has no tokenizer; give --ids")
        ids = model.tokenizer.encode(arguments.prompt)
    chosen = {name: getattr(arguments, name) for name in ("steps", "numerics", "points", "layers", "tokens", "heads")}
    recording = record(model.weights, model.config, ids, fed=arguments.feed, **chosen)
    if arguments.output is None:
        print(summary(recording))
        return
    recording.save(arguments.output)
    size = sum(x.nbytes for x in recording.points.values())
    print(f"[{len(recording.points)} points, {size:,} bytes: {arguments.output}]", file=sys.stderr)


def summary(recording: Recording) -> str:
    """Return a table of the points: shape, mean, root mean square, smallest, largest and how many are not finite."""
    width = max(map(len, recording.points))
    head = f"{'point':<{width}}  {'shape':<18}{'mean':>12}{'rms':>12}{'min':>12}{'max':>12}  not finite"
    lines = [head]
    for name, x in recording.points.items():
        finite = x[np.isfinite(x)].astype(np.float64)
        figures = finite.mean(), np.sqrt(np.mean(finite**2)), finite.min(), finite.max()
        shape, other = "x".join(map(str, x.shape)), x.size - finite.size
        lines.append(f"{name:<{width}}  {shape:<18}" + "".join(f"{f:>12.4g}" for f in figures) + f"{other:>12,}")
    return "\n".join(lines)
