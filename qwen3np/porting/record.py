"""Recordings: every number on the way from ids to logits, with what somebody needs to compute them anew."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

import qwen3np
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.model import checked_ids, forward
from qwen3np.numerics import FLOAT64, Array, precision
from qwen3np.porting.steps import point_names, position_axis, split_layer, split_pass

METADATA = "qwen3np"  # the key in the header of a safetensors file
HEADS = {"q_norm": 2, "q_rope": 1, "k_norm": 2, "k_rope": 1, "scores": 1, "probs": 1}  # the axis of the heads


@dataclass(frozen=True, eq=False)
class Recording:
    """Points by name, those of a decode step under "decode.0.", "decode.1." and so on, in the order of forward.

    floors[precision][name] is how far the reference's own evaluation in "float32" or "bfloat16" lies from its float64
    one: (the relative L2 distance, that of the worst position). tokens and heads are what was kept of a point, or None
    for all.
    """

    points: dict[str, Array]
    config: Config
    ids: Array  # (B, S + steps): the prompt, and the ids that were fed one by one
    steps: int
    numerics: str
    floors: dict[str, dict[str, tuple[float, float]]]
    tokens: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @property
    def passes(self) -> list[tuple[str, Array, Array]]:
        """The forward passes: prefix of their names, ids (B, S), positions (B, S)."""
        prompt = self.ids.shape[1] - self.steps
        positions = np.tile(np.arange(self.ids.shape[1], dtype=np.int64), (len(self.ids), 1))
        cuts = range(prompt, self.ids.shape[1])
        names = ["", *(f"decode.{i}." for i in range(self.steps))]
        return list(zip(names, np.split(self.ids, cuts, 1), np.split(positions, cuts, 1), strict=True))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the points, and all else as JSON under "qwen3np" in its metadata."""
        from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]  # PathLike of anything

        about: dict[str, Any] = {
            "version": qwen3np.__version__,
            "config": self.config.to_dict(),
            "ids": self.ids.tolist(),
            "positions": [positions[0].tolist() for _, _, positions in self.passes],
            "steps": self.steps,
            "numerics": self.numerics,
            "floors": self.floors,
            "tokens": self.tokens,
            "heads": self.heads,
        }
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file(
                {k: np.ascontiguousarray(x) for k, x in self.points.items()}, partial, {METADATA: json.dumps(about)}
            )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read a file that save wrote. Raises ValueError for any other, and for one that is not whole."""
        found, metadata = read_safetensors(Path(path))
        if METADATA not in metadata:
            raise ValueError(f"{path}: not a recording: make one with qwen3np trace -o")
        try:
            about: dict[str, Any] = json.loads(metadata[METADATA])
            config = Config.from_dict(about["config"])
            cut = {key: None if about[key] is None else tuple(about[key]) for key in ("tokens", "heads")}
            floors = {p: {name: (a, b) for name, (a, b) in of.items()} for p, of in about["floors"].items()}
            ids, steps, numerics = np.array(about["ids"]), int(about["steps"]), str(about["numerics"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a recording of another version: {error!r} in its metadata") from None
        names = [p + name for p in ["", *(f"decode.{i}." for i in range(steps))] for name in point_names(config)]
        points = {name: found[name] for name in names if name in found}
        return cls(points, config, ids, steps, numerics, floors, **cut)

    def cut(self, name: str, x: Array) -> Array:
        """Return what this recording keeps of a whole point."""
        return cut(name, x, self.config, self.tokens, self.heads)


def record(
    weights: Mapping[str, Array],
    config: Config,
    ids: ArrayLike,
    *,
    steps: int = 0,
    fed: ArrayLike | None = None,
    numerics: str = "float32",
    points: str = "*",
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Recording:
    """Record the points of a prefill of ids, (S,) or (B, S), and of `steps` decode steps.

    Decode steps are fed the ids `fed`, of as many sequences, one by one; where there are fewer, greedy ones follow.
    points are patterns separated by commas ("layers.0.*,lm_head"; a layer's pattern includes the layer's own point).
    layers chooses layers; of what is large, tokens chooses positions of the prompt and heads query heads (and their key
    heads) where a point has an axis for them. It runs three times, in each precision, for the noise floors.

    Raises ValueError for ids outside the vocabulary, and choices that leave nothing.
    """
    prompt = checked_ids(ids, config)
    n = precision(numerics)
    if steps < 0:
        raise ValueError(f"steps={steps} must be at least 0")
    given = prompt
    if fed is not None:
        later = checked_ids(fed, config, "fed")
        if len(later) != len(prompt):
            raise ValueError(f"fed: ids of {len(later)} sequences after a prompt of {len(prompt)}")
        given, steps = np.concatenate((prompt, later), 1), max(steps, later.shape[1])
    for what, wanted, limit in (
        ("layer", layers, config.num_hidden_layers),
        ("token", tokens, prompt.shape[1]),
        ("head", heads, config.num_attention_heads),
    ):
        outside = [i for i in wanted or () if not 0 <= i < limit]
        if outside or (wanted is not None and not wanted):
            raise ValueError(f"{what}s: {outside or 'none'} chosen; there are {what}s 0 to {limit - 1}")

    patterns = [pattern.strip() for pattern in points.split(",")]

    def chosen(name: str) -> bool:
        layer = split_layer(name)[0]
        point = split_pass(name)[1]
        forms = (name, point, f"{point}.")  # the dot makes "layers.0.*" match the layer's output too
        matches = any(fnmatchcase(x, q) for p in patterns for q in (p, f"model.{p}") for x in forms)
        return matches and (layers is None or layer is None or layer in layers)

    if not any(chosen(name) for name in point_names(config)):
        raise ValueError(f"points: nothing matches {points!r}; names are like model.layers.0.self_attn.q_proj")
    kept = tuple(tokens) if tokens is not None else None, tuple(heads) if heads is not None else None

    def run(n: str, ids: Array, visit: Callable[[str, Array], object]) -> Array:
        """Feed ids, the part behind the prompt one by one; make up what is missing greedily; return all ids."""
        cache = KVCache.allocate(config, len(ids), prompt.shape[1] + steps, precision(n).storage)
        new, start = ids[:, : prompt.shape[1]], prompt.shape[1]
        for i in range(steps + 1):
            prefix = f"decode.{i - 1}." if i else ""

            def trace(name: str, x: Array, prefix: str = prefix) -> None:
                if chosen(prefix + name):
                    visit(prefix + name, cut(prefix + name, x, config, *kept))

            logits = forward(weights, config, new, cache, numerics=n, trace=trace)
            if i == steps:
                return ids
            if ids.shape[1] == start + i:
                ids = np.concatenate((ids, logits[:, -1:].argmax(-1)), 1)
            new = ids[:, start + i : start + i + 1]
        return ids

    recorded: dict[str, Array] = {}
    all_ids = run(n.name, given, recorded.__setitem__)
    truth = recorded
    if n is not FLOAT64:
        truth = dict[str, Array]()
        run("float64", all_ids, truth.__setitem__)
    floors: dict[str, dict[str, tuple[float, float]]] = {}
    for name in ("float32", "bfloat16"):
        floor: dict[str, tuple[float, float]] = {}

        def measure(point: str, x: Array, floor: dict[str, tuple[float, float]] = floor) -> None:
            overall, by_token = distance(x, truth[point], position_axis(point))
            floor[point] = overall, float(by_token.max())

        if name == n.name:
            for point, x in recorded.items():
                measure(point, x)
        else:
            run(name, all_ids, measure)
        floors[name] = floor
    return Recording(recorded, config, all_ids, steps, n.name, floors, *kept)


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and the metadata of a file. Raises ValueError where it is missing or not whole."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with cast("Any", safe_open)(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def cut(name: str, x: Array, config: Config, tokens: tuple[int, ...] | None, heads: tuple[int, ...] | None) -> Array:
    """Return these positions (of a prefill) and these query heads, or their key heads, of a whole point."""
    if tokens is not None and not split_pass(name)[0]:
        x = np.take(x, tokens, position_axis(name))
    kind = split_layer(name)[1].rpartition(".")[2]
    if heads is not None and kind in HEADS:
        group = config.num_attention_heads // config.num_key_value_heads
        x = np.take(x, sorted({h // group for h in heads}) if kind.startswith("k_") else heads, HEADS[kind])
    return x


def distance(x: Array, truth: Array, axis: int) -> tuple[float, Array]:
    """Return the relative L2 distance from the truth, over all and per index of `axis`; where the truth is -inf, none.

    An index whose own norm is small, as the only score of the first position may be, is measured by the median norm.
    """
    seen = np.isfinite(truth)
    y: Array = np.where(seen, truth, 0.0).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error: Array = np.square(np.where(seen, x, 0.0) - y)
    others = tuple(i for i in range(truth.ndim) if i != axis)
    errors: Array = np.sqrt(error.sum(others))
    norms: Array = np.sqrt(np.square(y).sum(others))
    tiny, usual = float(np.finfo(np.float64).tiny), float(np.median(norms))
    by_index = errors / np.maximum(norms, max(usual, tiny))
    return math.hypot(*errors) / max(math.hypot(*norms), tiny), by_index
