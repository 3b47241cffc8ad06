"""A picture of the damage: by kind, by layer and kind, and the curve of KL against size."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwen3np.audit.damage import Damage
from qwen3np.audit.damage_parts import KINDS, Sources
from qwen3np.files.writing import written_aside

SUFFIXES = (".svg", ".png", ".pdf")


def require_drawable(path: Path) -> None:
    """Raise ValueError if no picture can be drawn to this path: to be called before the long work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError('a picture needs matplotlib: pip install "qwen3np[study]"')


def draw(damage: Damage, path: Path) -> None:
    """Draw a damage with sources. Raises ValueError as require_drawable, and if no parts were measured."""
    require_drawable(path)
    sources = damage.sources
    if sources is None:
        raise ValueError("damage: no parts were measured, so there is nothing to draw")
    figure_class: Any = import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(13, 4.5), layout="constrained")
    kinds, places, curve = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))

    names, alone = zip(*[(part.name, part.alone) for part in reversed(sources.kinds)], strict=True)
    kinds.barh(names, alone)
    kinds.set(title="by kind", xlabel="KL if quantised alone (nats)")

    columns, grid = _grid(sources)
    image = places.imshow(grid, aspect="auto", cmap="Reds", vmin=0)
    places.set(title="by layer and kind", ylabel="layer", xticks=range(len(columns)), xticklabels=columns)
    places.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=places, label="KL if quantised alone (nats)")

    curve.plot([mix.bits for mix in sources.curve], [mix.kl for mix in sources.curve], marker="o", markersize=4)
    curve.set(title="mixes of both models", xlabel="bits per weight", ylabel="mean KL (nats)", ylim=(0, None))
    for axes in (kinds, curve):
        axes.grid(alpha=0.3)
    with written_aside(path) as part:
        figure.savefig(part, format=path.suffix.lower().removeprefix("."))


def _grid(sources: Sources) -> tuple[list[str], Any]:
    """Return the kinds inside layers, and their KL alone (layers, kinds), NaN where there is no such part."""
    inside = [part for part in sources.parts if part.layer is not None]
    columns = [kind for kind in KINDS if kind in {part.kind for part in inside}]
    grid = np.full((1 + max((part.layer or 0 for part in inside), default=0), len(columns)), np.nan)
    for part in inside:
        grid[part.layer, columns.index(part.kind)] = part.alone
    return columns, grid
