"""`qwen3np tour`: the lessons, page by page in a terminal, or all at once."""

from __future__ import annotations

import argparse
import codecs
import os
import re
import select
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qwen3np.study.tour import Line, Part, laid_out, pages, plain, read_lessons, run_lesson, styled

EXAMPLE = "qwen3np tour --lesson 4"
GUARDED = False  # it prints the package's own text, and draws its pages with control characters
HELP = "learn how the model works: lessons with code that runs"

Key: TypeAlias = Callable[[os.terminal_size], str]

_WIDEST = 100  # columns: longer lines are hard to read
_KEYS = """\
Enter, space, n   the next page
b                 the previous page
a number, Enter   that lesson (0 is the introduction, with a list)
/words, Enter     the next page with these words (/ and Enter: search again)
?                 this list
q                 quit

In terminals that read whole lines, press Enter after space and letters, too."""
_NAMED = {  # aliases: arrows, Page Up, Page Down, backspace, Ctrl-D
    **{" ": "n", "\n": "n", "\r": "n", "\x1b[B": "n", "\x1b[C": "n", "\x1b[6~": "n"},
    **{"\x1b[A": "b", "\x1b[D": "b", "\x1b[5~": "b", "\x7f": "b", "\x08": "b", "\x04": "q"},
}
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO.|.", re.DOTALL)  # a key, which may be an escape sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_mutually_exclusive_group()
    text = "start at this lesson (0 is the introduction, with a list); in a pipe, print only this lesson"
    group.add_argument("--lesson", type=int, metavar="N", help=text)
    group.add_argument("--step", type=int, help=argparse.SUPPRESS)  # the old name of --lesson
    group.add_argument("--all", action="store_true", help="print all lessons without waiting")


def run(arguments: argparse.Namespace) -> None:
    """Show the lessons page by page in a terminal; elsewhere print all, or only the requested one."""
    renamed = "" if arguments.step is None else "--step is now called --lesson"
    if renamed:
        print(f"[{renamed}; the old name will be removed in the next version]", file=sys.stderr)
    wanted: int | None = arguments.lesson if arguments.step is None else arguments.step
    book = Book()
    if wanted is not None and not 0 <= wanted <= book.last:
        raise ValueError(f"--lesson {wanted}: the tour has the lessons 0 to {book.last}")
    terminal = sys.stdout.isatty()
    if terminal and not arguments.all:
        with keyboard() as key:
            Reader(book, key, wanted or 0, note=renamed).read()
        return
    columns = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    for n in range(book.last + 1) if wanted is None else [wanted]:
        for line in laid_out(book.parts(n), columns):
            if line.kind != "break":
                print(styled(line) if terminal else plain(line))


class Book:
    """The lessons; each is run when it is first opened, after all earlier ones."""

    def __init__(self) -> None:
        """Read the notebook without running anything."""
        self.lessons = read_lessons()
        self.last = len(self.lessons) - 1
        self._names: dict[str, Any] = {}
        self._run: list[list[Part]] = []

    @property
    def done(self) -> int:
        """The last lesson that was run; -1 before the first."""
        return len(self._run) - 1

    def parts(self, lesson: int) -> list[Part]:
        """Return the parts of a lesson to show. Raises ValueError if a check fails."""
        while self.done < lesson:
            self._run.append(run_lesson(self.lessons[self.done + 1], self._names))
        return self._run[lesson]


@dataclass
class Reader:
    """Reads the book in a terminal: the current page, and the note in the last line."""

    book: Book
    key: Key | None  # waits for a key, "" once the window has another size than this; None: lines are read
    lesson: int
    page: int = 0
    note: str = ""
    sought: str = ""
    helping: bool = False
    size: os.terminal_size = field(default_factory=shutil.get_terminal_size)  # of the window when it was drawn
    _laid: dict[tuple[int, int, int], list[list[Line]]] = field(default_factory=dict[Any, Any])

    def read(self) -> None:
        """Show pages and obey keys until q."""
        while True:
            count = len(self.pages(self.lesson))
            self.draw()
            typed = self.typed()
            if len(now := self.pages(self.lesson)) != count:  # the size has changed: stay at about the same place
                self.page = self.page * len(now) // count
            if typed is None:
                continue
            self.note, helped, self.helping = "", self.helping, False
            if typed == "q":
                print()
                return
            if typed == "?":
                self.helping = not helped
            elif typed in ("", "n", "b"):
                if not helped:
                    self.turn(-1 if typed == "b" else 1)
            elif typed.startswith("/"):
                self.search(" ".join(typed[1:].split()))
            elif typed.isdecimal():
                if int(typed) <= self.book.last:
                    self.lesson, self.page = int(typed), 0
                else:
                    self.note = f"no lesson {typed}: lessons are 0 to {self.book.last}"
            else:
                self.note = f"{typed!r} does nothing: ? lists the keys"

    def pages(self, lesson: int) -> list[list[Line]]:
        """Return the pages of a lesson, laid out for this terminal."""
        columns, rows = shutil.get_terminal_size()
        size = (lesson, min(columns, _WIDEST), max(rows - 1, 2))
        if size not in self._laid:
            if lesson > self.book.done:
                print("\r[running the code]", flush=True)
            self._laid[size] = pages(laid_out(self.book.parts(lesson), size[1]), size[2])
        return self._laid[size]

    def turn(self, by: int) -> None:
        """Go one page forward or back."""
        self.page += by
        if self.page == len(self.pages(self.lesson)):
            if self.lesson == self.book.last:
                self.page, self.note = self.page - 1, "this is the last page: q quits, 0 is the list of lessons"
            else:
                self.lesson, self.page = self.lesson + 1, 0
        elif self.page < 0:
            if self.lesson == 0:
                self.page, self.note = 0, "this is the first page"
            else:
                self.lesson -= 1
                self.page = len(self.pages(self.lesson)) - 1

    def search(self, words: str) -> None:
        """Go to the next page with these words, ignoring case; without words, repeat the last search."""
        self.sought = words or self.sought
        if not self.sought:
            self.note = "type what to search for after the /"
            return
        places = [(n, page) for n in range(self.book.last + 1) for page in range(len(self.pages(n)))]
        here = places.index((self.lesson, self.page)) + 1
        for n, page in places[here:] + places[:here]:
            text = " ".join(" ".join(plain(line) for line in self.pages(n)[page]).split())
            if self.sought.lower() in text.lower():
                self.lesson, self.page = n, page
                return
        self.note = f"{self.sought!r} is nowhere in the tour"

    def draw(self) -> None:
        """Draw the page, with its position and the keys in the last line."""
        columns, rows = self.size = shutil.get_terminal_size()
        shown = self.pages(self.lesson)
        self.page = min(self.page, len(shown) - 1)
        body = [Line("text", line) for line in _KEYS.splitlines()] if self.helping else shown[self.page]
        styles = os.environ.get("TERM") != "dumb"
        where = f"[lesson {self.lesson} of {self.book.last}, page {self.page + 1} of {len(shown)}]"
        status = f"{where}  {self.note or 'Enter: next  b: back  ?: help  q: quit'} "[: columns - 1]
        lines = [styled(line, self.sought) if styles else plain(line) for line in body[: rows - 1]]
        clear = "\x1b[2J\x1b[H" if styles else "\n"
        print(clear + "\n".join(lines) + "\n" * (rows - len(lines)) + status, end="", flush=True)

    def typed(self) -> str | None:
        """Return what was typed: a letter, a number, or / and words; None if the screen only needs redrawing."""
        if self.key is None:
            line = sys.stdin.readline()
            return line.strip() if line else "q"
        typed = self.key(self.size)
        if not typed.isdecimal() and typed != "/":
            return _NAMED.get(typed, typed) or None
        while True:  # the rest of the line
            print(f"\r\x1b[K{typed}", end="", flush=True)
            key = self.key(self.size)
            if key in ("\n", "\r"):
                return typed
            if key in ("\x7f", "\x08"):
                typed = typed[:-1]
            elif key.isprintable():
                typed += key
            if not typed or key in ("", "\x1b", "\x04"):
                return None


@contextmanager
def keyboard() -> Generator[Key | None]:
    """Yield a function that waits for one key, and returns "" once the terminal has another size than it is given.

    Yield None if input comes in whole lines: stdin is not a terminal, or the system has no termios.
    """
    try:
        import termios
        import tty
    except ImportError:
        yield None
        return
    if not sys.stdin.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    terminal = sys.stdin.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending: list[str] = []

    def key(size: os.terminal_size) -> str:
        while not pending:
            if not select.select([terminal], [], [], 0.2)[0]:
                if shutil.get_terminal_size() != size:
                    return ""
                continue
            read = os.read(terminal, 1024)
            pending.extend(_KEY.findall(decoder.decode(read)) if read else ["\x04"])
        return pending.pop(0)

    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)
        yield key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
