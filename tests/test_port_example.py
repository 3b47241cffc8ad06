"""The guide's port in C: its planted bug is found, without the bug it passes, and both print what the guide shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qwen3np.cli import main
from qwen3np.porting import Recording, read_dump

PORTING = Path(__file__).parents[1] / "qwen3np" / "porting"
SHOWN = re.findall(r"^    (\$ .*\n(?:    .*\n)*)", (PORTING / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def compiled_and_run(folder, kit, *flags):
    """Return the folder of points of the port, compiled with these flags."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here")
    strict = ["-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    program, mine = folder / "layer0", folder / "mine"
    command = [compiler, *strict, *flags, "-o", program, PORTING / "example" / "layer0.c", "-lm"]
    subprocess.run(command, check=True)
    mine.mkdir()
    subprocess.run([program, kit / "tied", mine], check=True)
    return mine


@pytest.mark.parametrize(
    ("flags", "status", "last"),
    [
        (["-DBUG"], 1, "a bug at model.layers.0.self_attn.q_rope"),
        ([], 0, "float32 rounding only; 20 of 164 recorded points compared, none of decode.0, decode.1, decode.2"),
    ],
)
def test_example(kit, tmp_path, capsys, flags, status, last):
    mine = compiled_and_run(tmp_path, kit, *flags)
    golden = str(kit / "tied" / "values" / "golden.safetensors")
    with pytest.raises(SystemExit) as end:
        main(["compare", golden, str(mine), "--model", str(kit / "tied")])
    assert end.value.code == status
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == last

    shown = next(text for text in SHOWN if "compare" in text and last in text).splitlines()
    words = [line.split() for line in printed]
    for line in shown[1:]:  # the guide's lines, but for the figures, which differ between compilers
        mark = line.split()
        assert mark[:1] in (["..."], *(w[:1] for w in words)), line
    assert shown[-1].strip() == last


def test_all_of_layer_0(kit, tmp_path):
    """The port has every point of the layer, in the recording's shapes."""
    mine, _ = read_dump(compiled_and_run(tmp_path, kit))
    golden = Recording.load(kit / "tied" / "values" / "golden.safetensors").points
    layer = [name for name in golden if name == "model.embed_tokens" or re.match(r"model\.layers\.0(\.|$)", name)]
    assert sorted(mine) == sorted(layer)
    assert all(mine[name].shape == golden[name].shape and mine[name].dtype == np.float32 for name in layer)
