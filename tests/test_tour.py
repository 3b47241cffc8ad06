"""The tour: its cells hold what they promise, print what is committed, and walk the terminal."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qwen3np
from qwen3np.ops.plain import softmax
from qwen3np.study.tour import NOTEBOOK, execute, is_picture, plain_formula, read_steps, run_step, source

STEPS = read_steps()
TOUR = (sys.executable, "-m", "qwen3np", "tour")


def texts(cells):
    return "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def codes(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


def headings():
    return [source(cells[0]).splitlines()[0].removeprefix("## ") for cells in STEPS[1:]]


def test_every_step_has_its_parts():
    listed = re.findall(r"^- (.*)$", texts(STEPS[0]), re.MULTILINE)
    assert headings() == listed
    assert [int(heading.split(".")[0]) for heading in listed] == list(range(1, len(STEPS)))
    for cells in STEPS[1:]:
        text, code = texts(cells), "\n".join(source(cell) for cell in codes(cells))
        assert "$$" in text
        assert "**Try:**" in text
        assert re.search(r"^show\(", code, re.MULTILINE)
        assert re.search(r"^ *assert ", code, re.MULTILINE)
        computed = "".join(printed(cell) for cell in codes(cells) if "assert " in source(cell))
        assert re.search(r"\(\d+,.*?\)", computed), "no shape is printed"
    assert NOTEBOOK.stat().st_size < 2**20


def test_formulas_read_well_in_a_terminal():
    assert plain_formula(r"y = \sqrt{\mathrm{mean}(x^2) + \varepsilon} \quad e^{-z} \, W_q^\top") == (
        "y = √(mean(x^2) + ε)    e^-z W_qᵀ"
    )
    assert plain_formula(r"\theta^{2i / Dh}, \; \sum_j \lfloor h \rfloor") == "θ^(2i / Dh), Σ_j ⌊ h ⌋"
    for formula in re.findall(r"\$\$(.*)\$\$", "\n".join(map(texts, STEPS))):
        assert not set(plain_formula(formula)) & set("\\{}$\t")


def test_cells_print_what_is_committed_and_build_forward(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        plt = None
    names = {}
    for number, cell in enumerate(cell for cells in STEPS for cell in codes(cells)):
        assert cell["execution_count"] == number + 1, "not from a fresh kernel: python -m qwen3np.study.tour"
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", ())]
        assert len(pictures) == is_picture(cell)
        if is_picture(cell) and plt is None:
            continue
        exec(source(cell), names)
        assert capsys.readouterr().out == printed(cell), "outputs of other code: python -m qwen3np.study.tour"
    if plt is not None:
        plt.close("all")
    model = qwen3np.load(progress=False)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 33))
    assert names["my_forward"](ids).tobytes() == model.forward(ids).tobytes()


def layer_norm(x, weight, eps, numerics=None):
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rotate_interleaved(x, tables, numerics=None):
    cos, sin = tables
    pairs = [x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin]
    return np.stack(pairs, -1).reshape(x.shape)


def attend_to_all(q, k, v, numerics=None, steps=None):
    k, v = (np.repeat(y, len(q) // len(k), axis=0) for y in (k, v))
    return np.swapaxes(softmax(q @ np.swapaxes(k, 1, 2) / q.shape[-1] ** 0.5) @ v, 0, 1).reshape(q.shape[1], -1)


def ungated(x, weights, prefix, numerics, record):
    return x @ weights[f"{prefix}up_proj.weight"].T @ weights[f"{prefix}down_proj.weight"].T


@pytest.mark.parametrize(
    ("module", "wrong", "step"),
    [
        ("norm.rms_norm", layer_norm, 3),
        ("rope.rotate", rotate_interleaved, 4),
        ("attention.attend", attend_to_all, 7),
        ("mlp.swiglu", ungated, 9),
        ("numerics.Numerics.round", lambda self, x: x, 15),
    ],
)
def test_the_checks_notice_a_wrong_layer(module, wrong, step, monkeypatch, capsys):
    monkeypatch.setattr(f"qwen3np.{module}", wrong)
    names = {}
    for cells in STEPS[:step]:
        run_step(cells, names, 100)
    with pytest.raises(ValueError, match="a check of the tour does not hold: assert "):
        run_step(STEPS[step], names, 100)


def test_the_terminal_command():
    def tour(*flags, threads="3"):  # an odd number of threads changes no bit, and so no check
        environment = os.environ | {"QWEN3NP_NUM_THREADS": threads, "COLUMNS": "80"}
        return subprocess.run([*TOUR, *flags], capture_output=True, check=False, encoding="utf-8", env=environment)

    done = tour()
    assert (done.returncode, done.stderr) == (0, "")
    at = 0
    for cells in STEPS:
        for cell in cells:
            code = cell["cell_type"] == "code"
            line = (
                "[A picture, in " if code and is_picture(cell) else source(cell).splitlines()[0].replace("**", "")[:40]
            )
            for shown in (line, printed(cell) if code else ""):  # each in its place
                at = done.stdout.index(shown, at) + len(shown)
    assert not re.search(r"\x1b|\$\$|\*\*Try", done.stdout)
    prose = texts(STEPS[4]).split("\n\n")[1]
    filled = done.stdout[done.stdout.index(prose[:40]) :].split("\n\n")[0]
    assert filled.split() == prose.split()
    assert max(map(len, filled.splitlines())) <= 80

    one = tour("--step", "12", threads="1")
    assert one.stdout in done.stdout
    assert [heading for heading in headings() if f"## {heading}\n" in one.stdout] == [headings()[11]]
    wrong = tour("--step", "99")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (
        2,
        "",
        "error: --step 99: the tour has the steps 0 to 18\n",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("flags", "keys"), [((), (b"\n", b"\n", b"q\n")), (("--all",), ())])
def test_in_a_terminal_enter_goes_on_and_q_ends(flags, keys):
    import pty

    parent, child = pty.openpty()
    tour = subprocess.Popen([*TOUR, *flags], stdin=child, stdout=child, stderr=child)
    os.close(child)
    seen = b""

    def until(end, step):
        nonlocal seen
        while end not in seen:
            assert select.select([parent], [], [], 60)[0], seen
            seen += os.read(parent, 65536)
        assert b"\x1b[1m" + source(STEPS[step][0]).splitlines()[0].encode() + b"\x1b[0m" in seen

    for step, key in enumerate(keys):
        until(f"[{step} of 18; Enter: the next step, q: the end] ".encode(), step)
        os.write(parent, key)
        seen = b""
    if not keys:
        until(b"a small Qwen3 of your own", 18)
        assert b"Enter: the next step" not in seen
    assert tour.wait(60) == 0
    os.close(parent)


def test_the_notebook_from_a_fresh_kernel(tmp_path):
    for needed in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(needed, reason="needs the extra study")
    copy = Path(shutil.copy(NOTEBOOK, tmp_path / "tour.ipynb"))
    execute(copy)
    made, committed = (json.loads(path.read_text(encoding="utf-8")) for path in (copy, NOTEBOOK))
    for notebook in (made, committed):
        for cell in notebook["cells"]:
            for output in cell.get("outputs", ()):  # the bytes of a picture depend on the version of matplotlib
                output.get("data", {}).pop("image/png", None)
    assert made == committed
