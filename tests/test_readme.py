"""The README's Python examples run as printed, and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from random_checkpoint import write_random_checkpoint

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples(tmp_path, capsys):
    write_random_checkpoint(tmp_path / "random-qwen3")
    names = {"folder": tmp_path / "random-qwen3"}
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^print\(.*\) +# (.*)$", example, re.MULTILINE):
            assert line + "\n" in printed
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
