"""`qwen3np fixture`: golden values for the test suite of a port."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen3np.porting.fixture import CONFIGS, write_fixture

EXAMPLE = "qwen3np fixture -o golden"
HELP = "write tiny checkpoints with golden values, for the test suite of a port"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="a new folder")


def run(arguments: argparse.Namespace) -> None:
    """Write the kit."""
    write_fixture(arguments.output)
    first = Path(arguments.output) / "README.md"
    print(f"[{arguments.output}: {', '.join(CONFIGS)}; start with {first}]", file=sys.stderr)
