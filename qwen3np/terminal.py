"""What reaches a terminal: text of models and files without its control characters, words wrapped at the edge."""

from __future__ import annotations

import shutil
import sys
import unicodedata
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

from qwen3np.errors import visible

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator


class Style(str):
    """An escape sequence of our own, such as "dim": the only ones that pass."""


class Terminal:
    """A stdout that shows control characters instead of obeying them, whoever prints."""

    def __init__(self, stream: IO[str]) -> None:
        """Stand in front of this stream."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text as `visible` shows it; a Style as it is."""
        self._stream.write(text if isinstance(text, Style) else visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of these."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Be the stream in all else."""
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Generator[None]:
    """Put a Terminal in the place of stdout, if that is a terminal: pipes and files get every byte as it is."""
    if not sys.stdout.isatty():
        yield
        return
    with redirect_stdout(Terminal(sys.stdout)):  # pyright: ignore[reportArgumentType]
        yield


def style(code: str) -> Style:
    """Return the escape sequence of a text style; nothing where stdout is no terminal."""
    return Style(f"\x1b[{code}m" if sys.stdout.isatty() else "")


def thinking_styled(pieces: Iterable[str], inside: bool, hide: bool) -> Iterator[str]:
    """Yield what is to be printed of an answer: the reasoning dimmed, or left out. inside: the prompt opened it."""
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
                blank = hide  # the empty lines after it go with it
                if not hide:
                    yield from (style("2"), marker) if thinking else (marker, style("0"))


def reasoning_apart(text: str, inside: bool) -> tuple[str | None, str]:
    """Return the reasoning of an answer (None: it has none), and the rest. inside: the prompt opened it."""
    if not inside and not text.lstrip().startswith("<think>"):
        return None, text
    reasoning, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    return reasoning.strip(), answer.lstrip("\n")


def wrapped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield text as it comes, with words that would cross the right edge on a new line; its width is asked each time.

    A word waits for its end, since only then is it known whether it fits. Where stdout is no terminal nothing changes.
    """
    if not sys.stdout.isatty():
        yield from pieces
        return
    column, word = 0, ""

    def placed(word: str) -> str:
        nonlocal column
        width = sum(map(_width, word))
        edge = shutil.get_terminal_size().columns
        before = "\n" if column and column + width > edge else ""
        column = (0 if before else column) + width
        if column > edge:  # longer than a line: the terminal cuts it
            column %= edge
        return before + word

    for piece in pieces:
        if isinstance(piece, Style):
            if word:
                yield placed(word)
                word = ""
            yield piece
            continue
        out = ""
        for character in visible(piece):
            if character == "\n":
                out, word, column = out + placed(word) + "\n", "", 0
            elif character == " " or _width(character) == 2:  # Chinese and Japanese break anywhere
                out, word = out + placed(word), ""
                space = placed(character)
                out += "\n" if space == "\n " else space
                column = 0 if space == "\n " else column
            else:
                word += character
        if out:
            yield out
    if word:
        yield placed(word)


def _width(character: str) -> int:
    """The columns of a character."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def bars() -> Any:
    """Return tqdm's bars for where this runs: widgets in a notebook that has ipywidgets, else text."""
    if "ipykernel" not in sys.modules:  # tqdm.auto would load asyncio, which takes as long as the built-in model
        from tqdm import tqdm
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where ipywidgets is missing
            from tqdm.auto import tqdm
    return tqdm
