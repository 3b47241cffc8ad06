"""The tour: the cells of tour.ipynb, walked in the terminal, or executed anew and written back with their outputs.

The notebook is the one text of both. `python -m qwen3np.study.tour` executes it from a fresh kernel (with nbclient, in
the extra `study`), and writes only what stays the same from run to run.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from qwen3np.files.writing import written_aside

NOTEBOOK = Path(__file__).with_name("tour.ipynb")
Cell: TypeAlias = Mapping[str, Any]  # of the notebook format, https://nbformat.readthedocs.io

_SYMBOLS = {  # of LaTeX; a command that is not here is written as its name
    **{"top": "ᵀ", "theta": "θ", "varphi": "φ", "varepsilon": "ε", "sum": "Σ", "prod": "Π", "le": "≤", "to": "→"},
    **{"leftarrow": "←", "lfloor": "⌊", "rfloor": "⌋", "times": "×", "mid": "|", "quad": "\t", "cdot": "·"},
    **{",": "", ";": "", " ": " "},
}


def read_steps(notebook: Path = NOTEBOOK) -> list[list[Cell]]:
    """Return the cells of each step; a heading begins a step, and step 0 is the introduction."""
    steps: list[list[Cell]] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and source(cell).startswith("#"):
            steps.append([])
        steps[-1].append(cell)
    return steps


def source(cell: Cell) -> str:
    """Return the text of a cell."""
    return "".join(cell["source"])


def is_picture(cell: Cell) -> bool:
    """Whether a code cell draws, which the terminal leaves to the notebook."""
    return "picture" in cell["metadata"].get("tags", ())


def run_step(cells: Sequence[Cell], names: dict[str, Any], columns: int, styled: bool = False) -> None:
    """Print a step: its text, its code, and what the code prints when it is run here, among these names.

    styled: with bold headings and coloured code, for a terminal. Raises ValueError where a check of the code fails.
    """
    for cell in cells:
        code = source(cell)
        if cell["cell_type"] == "markdown":
            print(plain_text(code, columns, styled))
        elif is_picture(cell):
            what = code.splitlines()[0].removeprefix("# picture: ")
            print(filled(f"[A picture, in {NOTEBOOK}: {what}]", columns))
        else:
            print(f"\x1b[36m{prompted(code)}\x1b[0m" if styled else prompted(code), end="\n\n")
            try:
                exec(compile(code, NOTEBOOK.name, "exec"), names)
            except AssertionError as error:
                lines = [
                    at.lineno or 1 for at in traceback.extract_tb(error.__traceback__) if at.filename == NOTEBOOK.name
                ]
                check = code.splitlines()[lines[-1] - 1].strip()
                raise ValueError(f"a check of the tour does not hold: {check}") from None
        print()


def plain_text(markdown: str, columns: int, styled: bool = False) -> str:
    """Return markdown for a terminal: paragraphs filled, formulas in plain characters, headings and **words** bold."""
    on, off = ("\x1b[1m", "\x1b[0m") if styled else ("", "")
    paragraphs: list[str] = []
    for paragraph in markdown.split("\n\n"):
        if paragraph.startswith("$$"):
            text = f"    {plain_formula(paragraph.strip('$'))}"
        elif paragraph.startswith("#"):
            text = f"{on}{paragraph}{off}"
        else:
            lines = paragraph.split("\n") if paragraph.startswith("- ") else [paragraph]
            text = "\n".join(filled(line, columns) for line in lines)
            text = re.sub(r"\*\*(.+?)\*\*", rf"{on}\1{off}", text)
        paragraphs.append(text)
    return "\n\n".join(paragraphs)


def filled(text: str, columns: int) -> str:
    """Return text in lines of at most so many columns, where addresses and names allow it."""
    return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)


def plain_formula(latex: str) -> str:
    r"""Return a formula as one would type it: \sqrt{x} as √(x), W_q^\top as W_qᵀ."""
    text = re.sub(r"\\mathrm\{([^{}]*)\}", r"\1", latex)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\\([a-zA-Z]+|.)", lambda command: _SYMBOLS.get(command[1], command[1]), text)
    text = re.sub(r"\{(-?\w*)\}", r"\1", text).replace("{", "(").replace("}", ")")
    return re.sub(r" *\t *", "    ", re.sub(r" +", " ", text)).replace("^ᵀ", "ᵀ")


def prompted(code: str) -> str:
    """Return code with Python's prompts: >>> where a statement or a comment begins, ... where one goes on."""
    starts = {statement.lineno for statement in ast.parse(code).body}
    lines = enumerate(code.splitlines(), 1)
    return "\n".join(line and (">>> " if n in starts or line[0] == "#" else "... ") + line for n, line in lines)


def execute(notebook: Path = NOTEBOOK) -> None:
    """Run the notebook from a fresh kernel and write it back with its outputs. Raises ValueError where a cell fails."""
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
