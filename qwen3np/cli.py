"""The command line: text goes to stdout, the rest to stderr; errors print `error: ...` and exit with status 2."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from qwen3np import __version__
from qwen3np.errors import one_line
from qwen3np.ops.fast.threads import check_threads
from qwen3np.terminal import guarded

# modules of qwen3np.commands
COMMANDS = (
    *("generate", "chat", "serve", "batch", "score", "embed", "rerank", "info", "convert"),
    *("trace", "compare", "diagnose", "fixture", "audit", "verify", "damage"),
    *("tour", "view", "train", "bench"),
)


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help explains\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Report unknown flags with the nearest known one, and point to the help of their command."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = get_close_matches(unknown[0].partition("=")[0], flags, 1)
            what = "argument" if not unknown[0].startswith("-") else "flag"
            self.error(f"unknown {what}: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return known, unknown


class _Completion(argparse.Action):
    """Print a shell's completion script. It is static (made by shtab), so that pressing Tab does not start Python."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("completion needs the package shtab: pip install qwen3np[completion]")
        print(shtab.complete(parser, values))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Ends the process with status 2 after an error, 130 after Ctrl-C."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see qwen3np/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # UTF-8 whatever the locale
                stream.reconfigure(encoding="utf-8", errors="replace")
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: we raise NonFiniteError ourselves
        with guarded():
            arguments = _parsed(sys.argv[1:] if argv is None else argv)
        with guarded() if getattr(arguments, "guarded", True) else nullcontext():
            if getattr(arguments, "threads", None) is not None:
                check_threads(arguments.threads, "--threads")
                os.environ["QWEN3NP_NUM_THREADS"] = arguments.threads
            arguments.run(arguments)
    except BrokenPipeError:  # the reader of the pipe closed it
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if isinstance(error, TypeError) and "generation setting" not in str(error):
            raise  # a bug, not an argument
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {one_line(' '.join(text.split())) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments, importing only the command that they name, or all commands if they name none."""
    parser = _Parser(prog="qwen3np", description="Qwen3 in NumPy.")
    parser.add_argument("--version", action="version", version=f"qwen3np {__version__}")
    shells, what = ("bash", "zsh", "tcsh"), "print the completion script of a shell"
    parser.add_argument("--print-completion", action=_Completion, choices=shells, metavar="SHELL", help=what)
    subparsers = parser.add_subparsers(metavar="COMMAND")
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        parser.error(f"unknown command {argv[0]!r}; {hint}")
    for name in [name for name in COMMANDS if name in argv[:1]] or COMMANDS:
        command = import_module(f"qwen3np.commands.{name}")
        text, epilog = f"{command.HELP[0].upper()}{command.HELP[1:]}.", f"example: {command.EXAMPLE}"
        subparser = subparsers.add_parser(name, help=command.HELP, description=text, epilog=epilog)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, guarded=getattr(command, "GUARDED", True))
    if not argv:
        parser.print_help()
        parser.exit()
    return parser.parse_args(argv)
