"""The tour: cells and exercises keep their promises, even when run twice, and a terminal shows them page by page."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qwen3np
from qwen3np.commands.tour import Book
from qwen3np.ops.plain import silu, softmax
from qwen3np.study.tour import (
    NOTEBOOK,
    Line,
    execute,
    exercises,
    is_picture,
    laid_out,
    pages,
    plain,
    plain_formula,
    prompted,
    read_lessons,
    run_lesson,
    source,
    styled,
)

LESSONS = read_lessons()
CELLS = [cell for cells in LESSONS for cell in cells]
LAST = len(LESSONS) - 1
TOUR = (sys.executable, "-m", "qwen3np", "tour")
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def texts(cells):
    return "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def codes(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def tries(cells):
    return [code for cell in cells for code in exercises(cell)]


def printed(cell):
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


def headings():
    return [source(cells[0]).splitlines()[0].removeprefix("## ") for cells in LESSONS[1:]]


def test_every_lesson_has_its_parts():
    listed = re.findall(r"^- (.*)$", texts(LESSONS[0]), re.MULTILINE)
    assert headings() == listed
    assert [int(heading.split(".")[0]) for heading in listed] == list(range(1, LAST + 1))
    assert f"in {LAST} lessons" in source(LESSONS[0][0]).splitlines()[0]
    for cells in LESSONS[1:]:
        text, code = texts(cells), "\n".join(source(cell) for cell in codes(cells))
        assert "$$" in text
        assert re.search(r"^show\(", code, re.MULTILINE)
        assert re.search(r"^ *assert ", code, re.MULTILINE)
        computed = "".join(printed(cell) for cell in codes(cells) if "assert " in source(cell))
        assert re.search(r"\(\d+,.*?\)", computed), "no shape is printed"
        assert text.count("**Try:**") == text.count("```python") == len(tries(cells)) == 1
        assert "assert " in tries(cells)[0], "the exercise does not check what it promises"
    assert NOTEBOOK.stat().st_size < 2**20


def test_lessons_are_not_called_steps():
    assert not re.search(r"steps? \d|step by step", "\n".join(map(source, CELLS)))


def test_formulas_read_well_in_a_terminal():
    assert plain_formula(r"y = \sqrt{\mathrm{mean}(x^2) + \varepsilon} \quad e^{-z} \, W_q^\top") == (
        "y = √(mean(x^2) + ε)    e^-z W_qᵀ"
    )
    assert plain_formula(r"\theta^{2i / Dh}, \; \sum_j \lfloor h \rfloor") == "θ^(2i / Dh), Σ_j ⌊ h ⌋"
    for formula in re.findall(r"\$\$(.*)\$\$", "\n".join(map(texts, LESSONS))):
        assert not set(plain_formula(formula)) & set("\\{}$\t")


def test_cells_and_exercises_hold_again_and_in_any_order(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, runs = {}, 0

    def outputs(code):
        exec(code, names)
        return capsys.readouterr().out

    for cell in CELLS:
        for code in exercises(cell):
            assert outputs(code) == outputs(code)
        if cell["cell_type"] == "code":
            runs += 1
            assert cell["execution_count"] == runs, "not from a fresh kernel: python -m qwen3np.study.tour"
            pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", ())]
            assert len(pictures) == is_picture(cell)
            for _ in range(2 if HAS_MATPLOTLIB or not is_picture(cell) else 0):
                assert outputs(source(cell)) == printed(cell), "outputs of other code: python -m qwen3np.study.tour"
    for cell in reversed(codes(CELLS)):  # now that all names are there, each cell can be run at any time
        if not is_picture(cell):
            assert outputs(source(cell)) == printed(cell)
    if HAS_MATPLOTLIB:
        import matplotlib.pyplot as plt

        plt.close("all")

    model = qwen3np.load(progress=False)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 33))
    assert names["my_forward"](ids).tobytes() == model.forward(ids, engine="plain").tobytes()
    fast = model.forward(ids)
    assert np.linalg.norm(names["my_forward"](ids) - fast) < 1e-6 * np.linalg.norm(fast)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright, in the extra test")
def test_cells_and_exercises_have_sound_types(tmp_path):
    blocks = []
    for cell in CELLS:
        if cell["cell_type"] == "code" and (HAS_MATPLOTLIB or not is_picture(cell)):
            blocks.append(source(cell))
        blocks += exercises(cell)
    (tmp_path / "tour.py").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    root = str(Path(qwen3np.__file__).parents[1])
    settings = {"typeCheckingMode": "standard", "extraPaths": [root]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, encoding="utf-8")
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        pytest.skip(f"pyright does not start here: {(done.stderr or done.stdout)[-200:]}")
    assert report["summary"]["filesAnalyzed"] == 1
    lines = "\n\n".join(blocks).splitlines()
    found = [(lines[found["range"]["start"]["line"]], found["message"]) for found in report["generalDiagnostics"]]
    assert found == []


def layer_norm(x, weight, eps, num=None):
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rotate_interleaved(x, tables, num=None):
    cos, sin = tables
    pairs = [x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin]
    return np.stack(pairs, -1).reshape(x.shape)


def attend_to_all(q, keys, values, window, m, num):
    k, v = (np.repeat(np.stack(y), q.shape[1] // len(y[0]), axis=1) for y in (keys, values))
    scores = m.out("scores", q @ np.swapaxes(k, 2, 3) / q.shape[-1] ** 0.5)
    return np.swapaxes(m.out("probs", softmax(scores)) @ v, 1, 2).reshape(len(q), q.shape[2], -1)


def silu_of_both(x, m, num=None):
    gate, up = (x @ m[f"{name}_proj.weight"].T for name in ("gate", "up"))
    return silu(gate * up) @ m["down_proj.weight"].T


def least_probable(probs, k):
    return np.argsort(probs, axis=-1)[..., :k]


@pytest.mark.parametrize(
    ("module", "wrong", "lesson"),
    [
        ("qwen3.rms_norm", layer_norm, 3),
        ("qwen3.rotate", rotate_interleaved, 4),
        ("ops.plain.attend", attend_to_all, 7),
        ("qwen3.swiglu", silu_of_both, 9),
        ("qwen3.top_k", least_probable, 10),
        ("qwen3.router_weights", lambda probs, chosen, config, num: np.take_along_axis(probs, chosen, -1), 10),
        ("numerics.Numerics.round", lambda self, x: x, 18),
    ],
)
def test_the_checks_notice_a_wrong_layer(module, wrong, lesson, monkeypatch):
    names = {}
    for cells in LESSONS[:lesson]:
        run_lesson(cells, names)
    monkeypatch.setattr(f"qwen3np.{module}", wrong)
    with pytest.raises(ValueError, match="a check of the tour failed: assert "):
        run_lesson(LESSONS[lesson], names)


def test_a_broken_promise_of_an_exercise_is_noticed():
    cell = {"cell_type": "markdown", "source": "**Try:**\n\n```python\nx = 1\nassert x == 2\n```", "metadata": {}}
    with pytest.raises(ValueError, match=r"^a check of the tour failed: assert x == 2$"):
        run_lesson([cell], {})


@pytest.fixture(scope="module")
def book():
    book = Book()
    book.parts(LAST)
    return book


@pytest.mark.parametrize(("columns", "rows"), [(80, 23), (100, 39), (41, 11)])
def test_pages_fit_the_terminal_and_lose_nothing(book, columns, rows):
    for n in range(LAST + 1):
        lines = laid_out(book.parts(n), columns)
        cut = pages(lines, rows)
        assert all(1 <= len(page) <= rows for page in cut)
        assert all(page[0].text and page[-1].text for page in cut)
        assert max(len(line.text) for page in cut for line in page) <= columns
        assert [line for page in cut for line in page if line.text] == [line for line in lines if line.text]
        shown = "".join(plain(line) for line in lines).replace(" ", "")
        for cell in LESSONS[n]:
            if cell["cell_type"] == "code" and not is_picture(cell):
                for text in (prompted(source(cell)), printed(cell)):
                    assert all("".join(line.split()) in shown for line in text.splitlines())
        assert cut[0][0] == Line("heading", source(LESSONS[n][0]).splitlines()[0])


def test_pages_are_cut_at_empty_lines():
    lines = [Line("text", text) for text in ("a", "b", "c", "", "d", "e")]
    assert [[line.text for line in page] for page in pages(lines, 5)] == [["a", "b", "c"], ["d", "e"]]
    lines.insert(1, Line("break", ""))
    assert [[line.text for line in page] for page in pages(lines, 9)] == [["a"], ["b", "c", "", "d", "e"]]
    assert [len(page) for page in pages([Line("code", "x")] * 7, 3)] == [3, 3, 1]


def test_what_was_sought_is_marked():
    assert styled(Line("text", "**Try:** the cache"), "CACHE") == "\x1b[1mTry:\x1b[0m the \x1b[7mcache\x1b[0m"
    assert styled(Line("code", "x ** y")) == "\x1b[36mx ** y\x1b[0m"
    assert plain(Line("code", "2 ** 3 ** 4")) == "2 ** 3 ** 4"


def tour(*flags, threads="3", **options):  # an odd number of threads changes no bit, and so no check
    environment = os.environ | {"QWEN3NP_NUM_THREADS": threads, "COLUMNS": "80"}
    return subprocess.run(
        [*TOUR, *flags], capture_output=True, check=False, encoding="utf-8", env=environment, **options
    )


def test_a_pipe_gets_everything():
    done = tour()
    assert (done.returncode, done.stderr) == (0, "")
    at = 0
    for cell in CELLS:
        if cell["cell_type"] == "code":
            shown = ["[The notebook has a picture here: "] if is_picture(cell) else printed(cell).splitlines()
        else:
            shown = [source(cell).splitlines()[0].replace("**", "")[:40]]
        for line in shown:  # each in its place
            if len(line) <= 80:
                at = done.stdout.index(line, at) + len(line)
    assert not re.search(r"\x1b|\$\$|```|\*\*Try", done.stdout)
    assert done.stdout.count("The result of the exercise:") == LAST
    assert max(map(len, done.stdout.splitlines())) <= 80
    prose = texts(LESSONS[4]).split("\n\n")[1]
    filled = done.stdout[done.stdout.index(prose[:40]) :].split("\n\n")[0]
    assert filled.split() == prose.split()

    one = tour("--lesson", "12", threads="1")
    assert one.stdout in done.stdout
    assert [heading for heading in headings() if f"## {heading}\n" in one.stdout] == [headings()[11]]
    wrong = tour("--lesson", "99")
    message = f"error: --lesson 99: the tour has the lessons 0 to {LAST}\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", message)


def test_step_is_the_old_name_of_lesson():
    old, new = tour("--step", "2"), tour("--lesson", "2")
    assert (old.returncode, old.stdout, new.stderr) == (0, new.stdout, "")
    assert old.stderr == "[--step is now called --lesson; the old name will be removed in the next version]\n"
    assert "--step" not in tour("--help").stdout


class Terminal:
    """The tour in a pseudo-terminal: what it shows, and its keys."""

    def __init__(self, *flags, columns=80, rows=24, stdin=None, term="xterm"):
        import pty

        self.screen, child = pty.openpty()
        self.resize(columns, rows)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.tour = subprocess.Popen(
            [*TOUR, *flags],
            stdin=child if stdin is None else stdin,
            stdout=child,
            stderr=child,
            env=environment | {"TERM": term},
        )
        self.child = child  # stays open, so that its settings can be read
        self.seen = ""

    def resize(self, columns, rows):
        import fcntl
        import termios

        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.columns, self.rows = columns, rows

    def press(self, keys):
        self.seen = ""
        os.write(self.screen, keys.encode())

    def until(self, end):
        while end not in self.seen:
            assert select.select([self.screen], [], [], 120)[0], self.seen
            self.seen += os.read(self.screen, 65536).decode(errors="replace")

    def page(self, where, status="Enter: next  b: back"):
        """Wait for a page, hold it against the size of the terminal, and return its lines."""
        end = f"[{where}]  {status}"
        self.until(end)
        page = self.seen[self.seen.rindex("\x1b[2J\x1b[H") :]
        assert end in page
        lines = re.sub(r"\x1b\[\d*[A-Za-z]", "", page).splitlines()
        assert len(lines) == self.rows
        assert max(map(len, lines)) <= self.columns
        return lines[:-1]

    def ends(self):
        """Read the rest, wait for the end, and return the status."""
        try:
            while self.tour.poll() is None:
                if select.select([self.screen], [], [], 0.1)[0]:
                    self.seen += os.read(self.screen, 65536).decode(errors="replace")
            return self.tour.returncode
        finally:
            os.close(self.child)
            os.close(self.screen)


needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@needs_pty
def test_keys_in_a_terminal(book):
    import termios

    def at(lesson, page, columns=80, rows=24):
        count = len(pages(laid_out(book.parts(lesson), min(columns, 100)), rows - 1))
        return f"lesson {lesson} of {LAST}, page {page if page > 0 else count + 1 + page} of {count}"

    terminal = Terminal()
    before = termios.tcgetattr(terminal.child)
    first = terminal.page(at(0, 1))
    assert first[0] == source(LESSONS[0][0]).splitlines()[0]
    assert "\x1b[1m# Qwen3" in terminal.seen
    terminal.press(" ")
    assert terminal.page(at(0, 2)) != first
    for key in ("b", "n", "\x1b[5~", "\n", "\x7f"):  # back, on, Page Up, Enter, backspace
        terminal.press(key)
        terminal.page(at(0, 2 if key in "n\n" else 1))
    assert terminal.page(at(0, 1)) == first
    terminal.press("b")
    terminal.page(at(0, 1), "this is the first page")
    terminal.press("5\x7f7\n")  # a slip, corrected
    terminal.page(at(7, 1))
    terminal.press("b")
    terminal.page(at(6, -1))
    terminal.press("n")
    assert terminal.page(at(7, 1))[0] == f"## {headings()[6]}"
    terminal.press("99\n")
    terminal.page(at(7, 1), f"no lesson 99: lessons are 0 to {LAST}")
    terminal.press("x")
    terminal.page(at(7, 1), "'x' does nothing: ? lists the keys")
    terminal.press("?")
    assert any("the previous page" in line for line in terminal.page(at(7, 1)))
    terminal.press("n")  # closes the list
    terminal.page(at(7, 1))
    terminal.press("/MIXTURE of\n")
    assert terminal.page(at(10, 1))[0] == "## 10. Mixture of experts"
    assert "\x1b[7mMixture of\x1b[0m" in terminal.seen
    terminal.press("/\n")  # again: it is in the list of lessons, too
    assert "- 10. Mixture of experts" in terminal.page(at(0, 2))
    terminal.press("/no such words\n")
    terminal.page(at(0, 2), "'no such words' is nowhere in the tour")
    terminal.press("/forgotten\x1b")  # Escape drops what was typed
    terminal.page(at(0, 2), "'no such words' is nowhere in the tour")
    terminal.press("7\n")
    terminal.page(at(7, 1))
    terminal.press("n" * 3)  # typed ahead
    terminal.page(at(7, 4))
    terminal.resize(120, 40)
    terminal.page(at(7, 2, 120, 40))
    terminal.press(f"{LAST}\n")
    terminal.page(at(LAST, 1, 120, 40))
    count = len(pages(laid_out(book.parts(LAST), 100), 39))
    terminal.press("b" + "n" * (count + 1))  # one too many
    terminal.page(at(LAST, -1, 120, 40), "this is the last page: q quits")
    terminal.press("q")
    assert terminal.tour.wait(60) == 0
    assert termios.tcgetattr(terminal.child) == before
    assert terminal.ends() == 0


@needs_pty
@pytest.mark.parametrize("way", ["Ctrl-D", "Ctrl-C"])
def test_other_ways_out(way):
    import termios

    terminal = Terminal("--lesson", "2", columns=40, rows=12)
    before = termios.tcgetattr(terminal.child)
    terminal.until("lesson 2 of")
    if way == "Ctrl-D":
        terminal.press("\x04")
    else:
        terminal.tour.send_signal(signal.SIGINT)  # which the shell's terminal would send
    assert terminal.tour.wait(60) == {"Ctrl-D": 0, "Ctrl-C": 130}[way]
    assert termios.tcgetattr(terminal.child) == before
    assert terminal.ends() == terminal.tour.returncode


@needs_pty
def test_keys_in_whole_lines():
    terminal = Terminal(stdin=subprocess.PIPE)
    for keys, lesson in (("", 0), ("3\n", 3), ("n\n", 3), ("\n", 3), ("b\n", 3), ("?\n", 3), ("wrong\n", 3)):
        terminal.seen = ""
        terminal.tour.stdin.write(keys.encode())
        terminal.tour.stdin.flush()
        terminal.until(f"[lesson {lesson} of {LAST}, page ")
        terminal.until("q: quit " if keys != "wrong\n" else "'wrong' does nothing: ? lists the keys")
    terminal.tour.stdin.close()  # the end of the input is the end of the tour
    assert terminal.ends() == 0


@needs_pty
def test_all_does_not_wait():
    terminal = Terminal("--all")
    terminal.until("\x1b[1m## 21. All together\x1b[0m")
    assert terminal.ends() == 0
    assert "Enter: next" not in terminal.seen


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
