"""The recipe of the built-in checkpoint: `python -m qwen3np.training.recipe FOLDER` trains it from scratch.

It writes the checkpoint and a plot of the loss (which needs matplotlib, in the extra `recipe`) to a new folder, and
prints how it differs from the one in the package.
"""

from __future__ import annotations

import argparse
import csv
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qwen3np.files.checkpoint import read_checkpoint
from qwen3np.files.hub import BUILTIN
from qwen3np.numerics import FLOAT32
from qwen3np.training.corpus import make_corpus
from qwen3np.training.loop import SIZES, Settings, train

SETTINGS = Settings(steps=2400)
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training_log.csv")


def draw_losses(log: Path, picture: Path) -> None:
    """Draw the losses of a training_log.csv."""
    plt: Any = import_module("matplotlib.pyplot")
    with log.open(encoding="utf-8") as file:
        lines = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, label in (("loss", "training"), ("held_out_loss", "held-out")):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label)
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(0, 3))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=100)


def differences(folder: Path, other: Path) -> list[str]:
    """Compare two checkpoints: a line for each file, and how many weights differ and by how much."""
    lines: list[str] = []
    for name in FILES:
        here, there = folder / name, other / name
        same = there.exists() and here.read_bytes() == there.read_bytes()
        lines.append(f"{name}: {'equal' if same else 'differs' if there.exists() else f'not in {other}'}")
    (_, ours), (_, theirs) = read_checkpoint(folder), read_checkpoint(other)
    if {name: w.shape for name, w in ours.items()} != {name: w.shape for name, w in theirs.items()}:
        return [*lines, "model.safetensors: other sizes"]
    ours, theirs = ({name: FLOAT32.widen(w) for name, w in weights.items()} for weights in (ours, theirs))
    changed = sum(int(np.sum(w != theirs[name])) for name, w in ours.items())
    apart = sum(float(np.sum((w - theirs[name]) ** 2)) for name, w in ours.items())
    distance = math.sqrt(apart / sum(float(np.sum(w**2)) for w in theirs.values()))
    total = sum(w.size for w in ours.values())
    return [*lines, f"model.safetensors: {changed:,} of {total:,} weights differ, relative L2 distance {distance:.1e}"]


def main() -> None:
    """Train, draw, and compare."""
    parser = argparse.ArgumentParser(prog="python -m qwen3np.training.recipe", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        import_module("matplotlib")  # if it is missing, fail before the long work
        corpus = make_corpus()
        train(corpus.training, folder, SIZES, SETTINGS, held_out=corpus.held_out, resume=arguments.resume)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    draw_losses(folder / "training_log.csv", folder / "loss.png")
    print("\n".join(differences(folder, BUILTIN)))


if __name__ == "__main__":
    main()
