"""The README's first command and its Python examples run as printed, and print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwen3np.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_command(capsys):
    found = re.search(r"&& \.venv/bin/qwen3np (.*)\n```\n\n    (.*)\n    (.*)\n\n", README)
    main(shlex.split(found[1]))
    out, err = capsys.readouterr()
    assert (err.splitlines()[0], out) == (found[2], found[3] + "\n")


def test_examples(capsys):
    names = {}
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(example, names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^ *print\(.*\) +# (.*)$", example, re.MULTILINE):
            assert line in [said.strip() for said in printed.splitlines()]
        _, _, below = README.partition(example)
        shown = [[number(word) for word in line.split()] for line in printed.splitlines()]
        for line in re.findall(r"\A```\n+((?:    .*\n)*)", below)[0].splitlines():
            assert line.strip() == "..." or words(line) in shown, line


def number(word):
    """Return a rounding error (1.3e-06) as a number."""
    return float(word) if re.fullmatch(r"\d\.\de-\d\d", word) else word


def words(line):
    """Split a line. Rounding errors differ a little between the kernels of a BLAS: within half of them is the same."""
    numbers = [number(word) for word in line.split()]
    return [pytest.approx(n, rel=0.5) if isinstance(n, float) else n for n in numbers]
