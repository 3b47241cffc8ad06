"""`qwen3np tour`: the model step by step, in the terminal."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Any

from qwen3np.study.tour import read_steps, run_step

EXAMPLE = "qwen3np tour --step 4"
HELP = "walk through the model step by step, each with its code and a computation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--step", type=int, metavar="N", help="this step alone (0 is the introduction, with the list)")
    group.add_argument("--all", action="store_true", help="do not wait for Enter after each step")


def run(arguments: argparse.Namespace) -> None:
    """Print the steps, in a terminal one after another at the press of Enter."""
    steps = read_steps()
    last = len(steps) - 1
    if arguments.step is not None and not 0 <= arguments.step <= last:
        raise ValueError(f"--step {arguments.step}: the tour has the steps 0 to {last}")
    terminal = sys.stdout.isatty()
    waits = terminal and sys.stdin.isatty() and not arguments.all
    columns = min(shutil.get_terminal_size((100, 24)).columns, 100)
    names: dict[str, Any] = {}
    for n, cells in enumerate(steps if arguments.step is None else steps[: arguments.step + 1]):
        unseen = arguments.step is not None and n < arguments.step  # its names are needed all the same
        with redirect_stdout(io.StringIO()) if unseen else nullcontext():
            run_step(cells, names, columns, styled=terminal)
        if waits and arguments.step is None and n < last:
            print(f"[{n} of {last}; Enter: the next step, q: the end] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline() != "\n":
                return
