"""Output to a terminal: text from models and files without control characters, words wrapped at the edge."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import unicodedata
import warnings
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

from qwen3np.errors import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator


class Style(str):
    """One of our own escape sequences, such as "dim": only these reach the terminal."""


class Terminal:
    """A stdout that shows control characters instead of passing them on, no matter which code prints."""

    def __init__(self, stream: IO[str]) -> None:
        """Wrap this stream."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text with its control characters made visible; a Style passes unchanged."""
        self._stream.write(text if isinstance(text, Style) else visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of these."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the stream."""
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Generator[None]:
    """Replace stdout with a Terminal if it is one; pipes and files get every byte unchanged."""
    if not sys.stdout.isatty():
        yield
        return
    with redirect_stdout(Terminal(sys.stdout)):  # pyright: ignore[reportArgumentType]
        yield


def style(code: str) -> Style:
    """Return the escape sequence of a text style; empty if stdout is not a terminal."""
    return Style(f"\x1b[{code}m" if sys.stdout.isatty() and _has_styles() else "")


def _has_styles() -> bool:
    return os.environ.get("TERM") != "dumb"


def thinking_styled(pieces: Iterable[str], inside: bool, hide: bool) -> Iterator[str]:
    """Yield an answer for printing, with its reasoning dimmed or left out. inside: the prompt opened the reasoning."""
    thinking, blank = inside, False
    if thinking and not hide:
        yield style("2")
    for piece in pieces:
        rest = piece
        while rest:
            before, marker, rest = rest.partition("</think>" if thinking else "<think>")
            if not (thinking and hide):
                shown = before.lstrip("\n") if blank else before
                blank = blank and not shown
                if shown:
                    yield shown
            if marker:
                thinking = not thinking
                blank = hide  # drop the empty lines after it as well
                if not hide:
                    yield from (style("2"), marker) if thinking else (marker, style("0"))


def reasoning_apart(text: str, inside: bool) -> tuple[str | None, str]:
    """Split an answer into its reasoning, or None, and the rest. inside: the prompt opened the reasoning."""
    if not inside and not text.lstrip().startswith("<think>"):
        return None, text
    reasoning, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    return reasoning.strip(), answer.lstrip("\n")


class Page:
    """A conversation on a terminal: words wrapped at the right edge, all of it drawn again at another width.

    A word waits for its end, since only then is it known whether it fits. Without a terminal nothing changes.
    """

    def __init__(self) -> None:
        """Start with nothing shown."""
        self._shown: list[str] = []
        self._column, self._word = 0, ""
        self._asks = self._resized = False

    def write(self, piece: str, stream: IO[str] | None = None) -> None:
        """Show a piece of text on stdout, or on stderr, which is the same page where both are terminals."""
        out = stream or sys.stdout
        if not (sys.stdout.isatty() and out.isatty()):
            out.write(visible(piece) if out.isatty() else piece)
        else:
            self._shown.append(piece)
            if self._resized:
                self._draw()
            else:
                for part in self._wrapped(piece):
                    out.write(part)
        out.flush()

    def ask(self, prompt: str) -> str:
        """Return a line that is typed."""
        self._asks = True
        try:
            line = input(prompt)
        finally:
            self._asks, self._column = False, 0
        self._shown.append(f"{prompt}{line}\n")
        return line

    @contextmanager
    def redrawn(self) -> Generator[None]:
        """Draw the page again when the window has another size, where the system and the terminal can."""
        if not (hasattr(signal, "SIGWINCH") and sys.stdout.isatty() and _has_styles()):
            yield
            return

        def resized(number: int, frame: object) -> None:
            self._resized = True
            if self._asks:  # else within a write, perhaps: the next one draws
                self._draw()

        before = signal.signal(signal.SIGWINCH, resized)
        try:
            yield
        finally:
            signal.signal(signal.SIGWINCH, before)

    def _draw(self) -> None:
        """Clear the screen and show the newest lines that fit, less one for what is typed."""
        self._resized, self._column, self._word = False, 0, ""
        lines: list[list[str]] = [[]]
        for part in chain.from_iterable(map(self._wrapped, self._shown)):
            if isinstance(part, Style):
                lines[-1].append(part)
            else:
                first, *rest = part.split("\n")
                lines[-1].append(first)
                lines += [[line] for line in rest]
        top = max(len(lines) - shutil.get_terminal_size().lines + 1, 0)
        styles = [part for line in lines[:top] for part in line if isinstance(part, Style)]
        for part in (Style("\x1b[H\x1b[2J"), *styles[-1:], *lines[top]):
            sys.stdout.write(part)
        for line in lines[top + 1 :]:
            for part in ("\n", *line):
                sys.stdout.write(part)
        sys.stdout.flush()

    def _wrapped(self, piece: str) -> Iterator[str]:
        """Yield what of the text is ready, with its lines broken."""
        if isinstance(piece, Style):
            yield self._placed()
            yield piece
            return
        out = ""
        for character in visible(piece):
            if character == "\n":
                out += self._placed() + "\n"
                self._column = 0
            elif character == " " or _width(character) == 2:  # Chinese and Japanese break anywhere
                out += self._placed()
                self._word = character
                space = self._placed()
                if space == "\n ":
                    space, self._column = "\n", 0
                out += space
            else:
                self._word += character
        yield out

    def _placed(self) -> str:
        """Return the word that waited, on a new line where it would cross the edge."""
        word, self._word = self._word, ""
        width, edge = sum(map(_width, word)), shutil.get_terminal_size().columns
        before = "\n" if self._column and self._column + width > edge else ""
        self._column = (0 if before else self._column) + width
        if self._column > edge:  # longer than a line: the terminal cuts it
            self._column %= edge
        return before + word


def _width(character: str) -> int:
    """Return how many columns a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@contextmanager
def counted(
    progress: Callable[[int], object] | bool | None, total: int, what: str, unit: str = "tok"
) -> Generator[Callable[[int], object] | None]:
    """Yield what is to be called with each number that is done: progress itself or, for True, a bar.

    The bar appears after two seconds, in a notebook or on stderr if that is a terminal, and goes when all is done.
    """
    if progress is True and shows_bars():
        with bars()(total=total, desc=what, unit=unit, delay=2, leave=False) as bar:
            yield bar.update
    else:
        yield None if isinstance(progress, bool) else progress


def shows_bars() -> bool:
    """Whether a bar would be seen: in a notebook, whose streams are no terminals, or on stderr if that is one."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and bool(kernel.IPKernelApp.initialized())


def bars() -> Any:
    """Return tqdm: widgets in a notebook that has ipywidgets, text elsewhere."""
    if not _in_notebook():  # tqdm.auto would load asyncio, which takes as long as the built-in model
        from tqdm import tqdm
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where ipywidgets is missing
            from tqdm.auto import tqdm
    return tqdm
