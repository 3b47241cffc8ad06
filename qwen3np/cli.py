"""The command line: text goes to stdout, all else to stderr; `error: ...` and status 2 when it cannot be done."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from qwen3np import __version__
from qwen3np.errors import one_line
from qwen3np.ops.fast.threads import check_threads

# modules of qwen3np.commands
COMMANDS = (
    *("generate", "chat", "score", "embed", "rerank", "info"),
    *("trace", "compare", "diagnose", "fixture", "verify"),
    *("tour", "view", "train", "bench"),
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with status 2."""
        self.exit(2, f"error: {message}; {self.prog} --help explains\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Ends the process with status 2 after an error, 130 after Ctrl-C."""
    try:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # UTF-8 whatever the locale
                stream.reconfigure(encoding="utf-8", errors="replace")
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what is not finite is an error of its own
        arguments = _parsed(sys.argv[1:] if argv is None else argv)
        if getattr(arguments, "threads", None) is not None:
            check_threads(arguments.threads, "--threads")
            os.environ["QWEN3NP_NUM_THREADS"] = arguments.threads
        arguments.run(arguments)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {one_line(' '.join(str(error).split())) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments, after importing the command that they name; all commands where they name none."""
    parser = _Parser(prog="qwen3np", description="Qwen3 in NumPy.")
    parser.add_argument("--version", action="version", version=f"qwen3np {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in [name for name in COMMANDS if name in argv[:1]] or COMMANDS:
        command = import_module(f"qwen3np.commands.{name}")
        text, epilog = f"{command.HELP[0].upper()}{command.HELP[1:]}.", f"example: {command.EXAMPLE}"
        subparser = subparsers.add_parser(name, help=command.HELP, description=text, epilog=epilog)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser.parse_args(argv)
