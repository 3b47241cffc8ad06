"""An audit as a page: HTML that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen3np.audit.report import TIGHT, WIDE, Audit, Worst
from qwen3np.model import Model
from qwen3np.study.view import visible

BINS, WIDTH, HEIGHT, TOP = 60, 720, 220, 84  # of the picture; TOP has room for the names of the floors
MOST = 20_000  # differences that the page holds
GROUPS = {"position": "position in the sequence", "entropy": "entropy of the reference, nats"}


def page(found: Audit, model: Model, name: str) -> str:
    """Return the page. All text in it is escaped, whatever the rollouts say."""
    import jinja2

    folder, study = Path(__file__).parent, Path(__file__).parent.parent / "study"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        found=found,
        judgement=found.judgement,
        name=name,
        worst=[(w, *_texts(w, model)) for w in found.worst],
        groups=[(GROUPS["position"], found.positions, 0), (GROUPS["entropy"], found.entropies, 1)],
        picture=_picture(found),
        data={"differences": [float(f"{d:.4g}") for d in found.differences[:MOST]], "tight": TIGHT, "wide": WIDE},
        style=(study / "view.css").read_text(encoding="utf-8") + (folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )


def _texts(worst: Worst, model: Model) -> tuple[str, str]:
    """Return what comes before a token, and the token, in visible form."""

    def text(i: int) -> str:
        shown = "" if model.tokenizer is None else visible(model.tokenizer.token_bytes(i))
        return shown or f"#{i}"

    return (" " if model.tokenizer is None else "").join(map(text, worst.context)), text(worst.id)


def _picture(found: Audit) -> dict[str, Any]:
    """Return the histogram of the differences' magnitudes, on a logarithmic scale, with the floors as lines."""
    d = np.maximum(np.abs(found.differences), 1e-9)
    floors = {name: x for name, x in found.judgement.floors.items() if x > 0}
    low = np.floor(np.log10(min(*floors.values(), np.quantile(d, 0.05)))) - 0.3
    high = np.ceil(np.log10(max(*floors.values(), d.max()))) + 0.1
    counts, edges = np.histogram(np.clip(np.log10(d), low, high), BINS, (low, high))

    def across(x: float) -> float:
        return round(float((x - low) / (high - low) * WIDTH), 1)

    bars = [
        {"x": across(a) + 0.5, "height": round(float(n / counts.max() * HEIGHT), 1)}
        for a, n in zip(edges[:-1], counts, strict=True)
    ]
    lines = [
        {"name": name, "x": across(np.log10(x)), "y": 16 + 16 * i}
        for i, (name, x) in enumerate(sorted(floors.items(), key=lambda f: f[1]))
    ]
    ticks = [{"x": across(n), "text": f"{10.0**n:g}"} for n in range(int(np.ceil(low)), int(high) + 1)]
    size = {"width": WIDTH, "top": TOP, "bottom": TOP + HEIGHT, "bar": round(WIDTH / BINS - 1, 1)}
    return {**size, "bars": bars, "floors": lines, "ticks": ticks}
