"""The README's first command and the Python examples of all guides run as printed, with the output shown."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3np.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ["README.md", "qwen3np/commands/README.md", "qwen3np/study/README.md"]


def examples_of(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    return text, re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_first_command(capsys):
    found = re.search(r"&& \.venv/bin/qwen3np (.*)\n```\n\n    (.*)\n    (.*)\n\n", README)
    main(shlex.split(found[1]))
    out, err = capsys.readouterr()
    assert (err.splitlines()[0], out) == (found[2], found[3] + "\n")


@pytest.mark.parametrize("guide", GUIDES)
def test_examples(guide, capsys):
    names = {}
    text, examples = examples_of(guide)
    assert examples
    for example in examples:
        exec(example, names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^ *print\(.*\) +# (.*)$", example, re.MULTILINE):
            assert line in [said.strip() for said in printed.splitlines()]
        _, _, below = text.partition(example)
        shown = [line.split() for line in printed.splitlines()]
        for line in re.findall(r"\A```\n+((?:    .*\n)*)", below)[0].splitlines():
            assert line.strip() == "..." or line.split() in shown, line


def test_examples_have_types(tmp_path):
    """As a user's editor sees them: pyright's own defaults, with the package as it is installed."""
    pytest.importorskip("pyright", reason="needs the extra: pip install qwen3np[test]")
    for n, guide in enumerate(GUIDES):
        (tmp_path / f"guide{n}.py").write_text("\n".join(examples_of(guide)[1]), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(GUIDES)
    assert [(problem["file"], problem["message"]) for problem in found["generalDiagnostics"]] == []


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("guide", [*GUIDES, "qwen3np/porting/README.md", "qwen3np/audit/README.md"])
def test_links_lead_to_files(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / guide).parent / target).exists(), target


def test_lines_are_counted_right():
    """The numbers of lines that the README and the study guide name are those of the files."""
    for guide, pattern in (
        (GUIDES[0], r"`(?:qwen3np/)?([\w/]+\.py)`\]\([^)]*\), (\d+) lines"),
        (GUIDES[2], r"\| `([\w/]+\.py)` \| (\d+) \|"),
    ):
        found = re.findall(pattern, (ROOT / guide).read_text(encoding="utf-8"))
        assert found
        for name, count in found:
            assert len((ROOT / "qwen3np" / name).read_text(encoding="utf-8").splitlines()) == int(count), name
