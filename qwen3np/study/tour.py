"""The tour: the lessons of tour.ipynb, run and laid out in pages for a terminal, or executed and written back.

The notebook is the only source. `python -m qwen3np.study.tour` executes it in a fresh kernel (with nbclient, in the
extra `study`), and writes only what stays the same from run to run.
"""

from __future__ import annotations

import ast
import io
import json
import re
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from qwen3np.files.writing import written_aside

NOTEBOOK = Path(__file__).with_name("tour.ipynb")
Cell: TypeAlias = Mapping[str, Any]  # of the notebook format, https://nbformat.readthedocs.io

_FENCE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
_SYMBOLS = {  # of LaTeX; other commands are printed as their names
    **{"top": "ᵀ", "theta": "θ", "varphi": "φ", "varepsilon": "ε", "sum": "Σ", "prod": "Π", "le": "≤", "to": "→"},
    **{"leftarrow": "←", "lfloor": "⌊", "rfloor": "⌋", "times": "×", "mid": "|", "quad": "\t", "cdot": "·"},
    **{"in": "∈", "sim": "~", ",": "", ";": "", " ": " "},
}
_STYLES = {"heading": "\x1b[1m", "code": "\x1b[36m"}


class Part(NamedTuple):
    """A piece of a lesson: markdown text, code, its output, the result of an exercise, or the name of a picture."""

    kind: str  # "text", "code", "output", "result" or "picture"
    text: str


class Line(NamedTuple):
    """A line on the screen, without its styling; a "break" is where a new page starts."""

    kind: str  # "heading", "text", "code", "output" or "break"
    text: str


def read_lessons(notebook: Path = NOTEBOOK) -> list[list[Cell]]:
    """Return the cells of each lesson. A heading starts a lesson, and lesson 0 is the introduction."""
    lessons: list[list[Cell]] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and source(cell).startswith("#"):
            lessons.append([])
        lessons[-1].append(cell)
    return lessons


def source(cell: Cell) -> str:
    """Return the text of a cell."""
    return "".join(cell["source"])


def is_picture(cell: Cell) -> bool:
    """Whether a code cell draws a picture, which only the notebook can show."""
    return "picture" in cell["metadata"].get("tags", ())


def exercises(cell: Cell) -> list[str]:
    """Return the code blocks of a markdown cell, which are the exercises."""
    return _FENCE.findall(source(cell)) if cell["cell_type"] == "markdown" else []


def run_lesson(cells: Sequence[Cell], names: dict[str, Any]) -> list[Part]:
    """Run the code and the exercises of a lesson in this namespace, and return the parts to show.

    Raises ValueError if a check fails.
    """
    parts: list[Part] = []
    for cell in cells:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            parts.append(Part("text", text))
            for code in exercises(cell):
                parts.append(Part("result", _printed(code, names).rstrip() or "(no output: all checks passed)"))
        elif is_picture(cell):
            parts.append(Part("picture", text.splitlines()[0].removeprefix("# picture: ")))
        else:
            parts += [Part("code", text), Part("output", _printed(text, names).rstrip())]
    return parts


def _printed(code: str, names: dict[str, Any]) -> str:
    """Run code in this namespace and return what it prints. Raises ValueError with the check that fails."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            exec(compile(code, NOTEBOOK.name, "exec"), names)
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno or 1 for frame in frames if frame.filename == NOTEBOOK.name][-1]
        check = code.splitlines()[line - 1].strip()
        raise ValueError(f"a check of the tour failed: {check}") from None
    return printed.getvalue()


def laid_out(parts: Sequence[Part], columns: int) -> list[Line]:
    """Return the lines of a lesson, none longer than `columns`, with an empty one between parts."""
    lines: list[Line] = []
    for kind, text in parts:
        if kind == "text":
            lines += _markdown(text, columns)
        elif kind == "code":
            lines += _wrapped("code", prompted(text), columns)
        elif kind == "picture":
            lines += _filled(f"[The notebook has a picture here: {text}]", columns)
        else:
            if kind == "result":
                lines += [Line("break", ""), *_filled("The result of the exercise:", columns), Line("text", "")]
            lines += _wrapped("output", text, columns)
        lines.append(Line("text", ""))
    return [line for n, line in enumerate(lines) if line.text or line.kind in ("output", "break") or lines[n - 1].text]


def _markdown(text: str, columns: int) -> Iterator[Line]:
    """Yield the lines of markdown: paragraphs wrapped, formulas in plain characters, code with Python's prompts."""
    paragraphs: list[tuple[str, str]] = []
    for n, block in enumerate(_FENCE.split(text)):  # every other one is code
        paragraphs += [("code", block)] if n % 2 else [("text", p) for p in block.strip().split("\n\n") if p]
    for n, (kind, paragraph) in enumerate(paragraphs):
        if n:
            yield Line("text", "")
        if kind == "code":
            yield from _wrapped("code", prompted(paragraph), columns)
        elif paragraph.startswith("$$"):
            yield from _wrapped("text", f"    {plain_formula(paragraph.strip('$'))}", columns)
        elif paragraph.startswith("#"):
            yield from _wrapped("heading", paragraph, columns)
        else:
            for item in paragraph.split("\n") if paragraph.startswith("- ") else [paragraph]:
                yield from _filled(item, columns)


def _filled(text: str, columns: int) -> list[Line]:
    """Return the lines of a paragraph."""
    return [Line("text", line) for line in textwrap.wrap(text, columns, break_on_hyphens=False)]


def _wrapped(kind: str, text: str, columns: int) -> list[Line]:
    """Return lines unchanged, except that long ones are wrapped with an indent, and their comments moved below."""
    lines: list[Line] = []
    for line in text.splitlines():
        pieces = [line]
        if len(line) > columns:
            indent = " " * min(len(line) - len(line.lstrip()) + 8, columns // 2)
            code, mark, comment = line.partition("  # ")
            pieces = textwrap.wrap(code, columns, subsequent_indent=indent, break_on_hyphens=False)
            if mark:
                comment = f"{indent}# {comment}"
                pieces += textwrap.wrap(comment, columns, subsequent_indent=indent, break_on_hyphens=False)
        lines += [Line(kind, piece) for piece in pieces]
    return lines


def plain_formula(latex: str) -> str:
    r"""Return a formula in plain characters: \sqrt{x} as √(x), W_q^\top as W_qᵀ."""
    text = re.sub(r"\\mathrm\{([^{}]*)\}", r"\1", latex)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\\([a-zA-Z]+|.)", lambda command: _SYMBOLS.get(command[1], command[1]), text)
    text = re.sub(r"\{(-?\w*)\}", r"\1", text).replace("{", "(").replace("}", ")")
    return re.sub(r" *\t *", "    ", re.sub(r" +", " ", text)).replace("^ᵀ", "ᵀ")


def prompted(code: str) -> str:
    """Return code with Python's prompts: >>> where a statement or a comment starts, ... where one continues."""
    starts = {min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", ()))]) for s in ast.parse(code).body}
    lines = enumerate(code.splitlines(), 1)
    return "\n".join(line and (">>> " if n in starts or line[0] == "#" else "... ") + line for n, line in lines)


def pages(lines: Sequence[Line], rows: int) -> list[list[Line]]:
    """Split lines into pages of at most `rows`, at an empty line if there is one in the second half of the page."""
    cut: list[list[Line]] = []
    rest = list(lines)
    while rest:
        end = len(rest)
        if end > rows:
            empty = [n for n in range(max(1, rows // 2), rows + 1) if not rest[n].text]
            end = empty[-1] if empty else rows
        breaks = [n for n in range(1, end) if rest[n].kind == "break"]
        page, rest = rest[: breaks[0] if breaks else end], rest[breaks[0] if breaks else end :]
        while page and not page[-1].text:
            page.pop()
        while page and not page[0].text:
            page.pop(0)
        cut += [page] if page else []
    return cut


def styled(line: Line, sought: str = "") -> str:
    """Return a line with terminal codes: headings and **words** bold, code coloured, `sought` reversed."""
    on = _STYLES.get(line.kind, "")
    text = plain(line)
    if line.kind == "text":
        text = re.sub(r"\*\*(.+?)\*\*", "\x1b[1m\\1\x1b[0m", line.text)
    if sought:
        text = re.sub(f"(?i){re.escape(sought)}", lambda found: f"\x1b[7m{found[0]}\x1b[0m{on}", text)
    return f"{on}{text}\x1b[0m" if on else text


def plain(line: Line) -> str:
    """Return a line without markup."""
    return re.sub(r"\*\*(.+?)\*\*", r"\1", line.text) if line.kind == "text" else line.text


def execute(notebook: Path = NOTEBOOK) -> None:
    """Run the notebook in a fresh kernel and write it back with its outputs. Raises ValueError if a cell fails."""
    nbformat: Any = import_module("nbformat")
    nbclient: Any = import_module("nbclient")
    contents = nbformat.read(notebook, as_version=4)
    try:
        nbclient.NotebookClient(contents, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise ValueError(f"{notebook.name}: {error}") from None
    contents.metadata = {"kernelspec": contents.metadata.kernelspec, "language_info": {"name": "python"}}
    with written_aside(notebook) as part:
        part.write_text(nbformat.writes(contents).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    execute()
