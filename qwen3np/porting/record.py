"""Recordings: every intermediate value from ids to logits, with everything needed to compute them again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

import qwen3np
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.files.writing import written_aside
from qwen3np.guard import checked_ids, forward, position_axis, require_finite, require_finite_point
from qwen3np.numerics import FLOAT64, Array, named
from qwen3np.porting.floors import HALF, noisy_runs
from qwen3np.porting.points import CHOICE, Rerun, point_names, split_layer, split_pass
from qwen3np.verify import sha256

METADATA = "qwen3np"  # the key in the header of a safetensors file
HEADS = {"q_norm": 2, "q_rope": 1, "k_norm": 2, "k_rope": 1, "scores": 1, "probs": 1}  # the axis of the heads


@dataclass(frozen=True, eq=False)
class Recording:
    """Points by name, in the order of forward; those of decode steps start with "decode.0.", "decode.1." and so on.

    floors[precision][name] is the distance between the reference in that precision and in float64: (relative L2 over
    all positions, at the worst position); with experts the larger of "bfloat16" and "bfloat16-grouped". tokens and
    heads are the positions and heads that were kept, or None for all.
    """

    points: dict[str, Array]
    config: Config
    ids: Array  # (B, S + steps): the prompt, and the ids that were fed one by one
    steps: int
    numerics: str
    floors: dict[str, dict[str, tuple[float, float]]]
    tokens: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    fingerprint: str | None = None  # of the weights; None in recordings made before it was kept
    engine: str = "fast"

    @property
    def passes(self) -> list[tuple[str, Array, Array]]:
        """The forward passes: prefix of their names, ids (B, S), positions (B, S)."""
        return passes_of(self.ids, self.steps)

    @property
    def sha256(self) -> dict[str, str]:
        """The hash of each point; with engine "exact" it is the same wherever the recording is made."""
        return {name: sha256(x) for name, x in self.points.items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the points, and everything else as JSON under "qwen3np" in its metadata.

        An existing file is replaced. Raises ValueError if it cannot be written.
        """
        from safetensors import SafetensorError
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
            "fingerprint": self.fingerprint,
            "engine": self.engine,
            "sha256": self.sha256,
        }
        path = output_path(path)
        points = {name: np.ascontiguousarray(x) for name, x in self.points.items()}
        try:
            with written_aside(path) as part:
                part.touch()
                mode = part.stat().st_mode  # of new files here; safetensors makes its own unreadable for others
                save_file(points, part, {METADATA: json.dumps(about)})
                part.chmod(mode)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: cannot be written ({error}); free some space there, or choose another place"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read a file that save wrote. Raises ValueError for any other file, and for an incomplete one."""
        path = Path(path)
        if path.is_dir() or path.suffix in (".npz", ".npy"):
            raise ValueError(f"{path}: not a recording but bare arrays; give the .safetensors that qwen3np trace wrote")
        found, metadata = read_safetensors(path)
        if METADATA not in metadata:
            raise ValueError(f"{path}: not a recording: make one with qwen3np trace -o")
        try:
            about: dict[str, Any] = json.loads(metadata[METADATA])
            config = Config.from_dict(about["config"])
            floors = {
                p: {name: (float(a), float(b)) for name, (a, b) in of.items()} for p, of in about["floors"].items()
            }
            ids, steps, numerics = checked_ids(about["ids"], config), about["steps"], named(about["numerics"]).name
            if type(steps) is not int or steps not in range(ids.shape[1]):
                raise ValueError(f"steps={steps}")
            cut = {key: None if about[key] is None else tuple(about[key]) for key in ("tokens", "heads")}
            limits = {"tokens": ids.shape[1] - steps, "heads": config.num_attention_heads}
            if any(i not in range(limits[key]) for key, kept in cut.items() for i in kept or ()):
                raise ValueError(f"no such tokens or heads: {cut}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: a recording of another version: {error!r} in its metadata") from None
        names = [p + name for p in ["", *(f"decode.{i}." for i in range(steps))] for name in point_names(config)]
        points = {name: found[name] for name in names if name in found}
        expected: dict[str, str] = about.get("sha256", {})  # recordings of earlier versions have none
        if damaged := [name for name, x in points.items() if sha256(x) != expected.get(name, sha256(x))]:
            raise ValueError(f"{path}: {damaged[0]} has changed since it was recorded; record it again")
        made_by = about.get("fingerprint"), about.get("engine", "fast")
        return cls(points, config, ids, steps, numerics, floors, **cut, fingerprint=made_by[0], engine=made_by[1])

    def cut(self, name: str, x: Array) -> Array:
        """Return what this recording keeps of a whole point."""
        return cut(name, x, self.config, self.tokens, self.heads)


def fingerprint(weights: Mapping[str, Array]) -> str:
    """Return a hash of the tensors' names, shapes and up to 1,024 numbers each, whatever their dtype."""
    seen = hashlib.sha256()
    for name in sorted(weights):
        w = weights[name]
        # evenly spaced rows and columns, so that a mapped file is not read completely
        rows = w[:: -(-len(w) // 32)] if w.ndim > 1 else w
        sample = rows.reshape(len(rows), -1) if w.ndim > 1 else rows
        sample = sample[..., :: -(-sample.shape[-1] // 32)] if w.ndim > 1 else sample[:: -(-len(w) // 1024)]
        seen.update(f"{name} {w.shape}".encode())
        seen.update(np.ascontiguousarray(sample, np.float32).tobytes())
    return seen.hexdigest()


def passes_of(ids: Array, steps: int) -> list[tuple[str, Array, Array]]:
    """Return the passes over ids (B, S + steps): prefix of their names, ids (B, S), positions (B, S)."""
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1))
    cuts = range(ids.shape[1] - steps, ids.shape[1])
    names = ["", *(f"decode.{i}." for i in range(steps))]
    return list(zip(names, np.split(ids, cuts, 1), np.split(positions, cuts, 1), strict=True))


def record(
    weights: Mapping[str, Array],
    config: Config,
    ids: ArrayLike,
    *,
    steps: int = 0,
    fed: ArrayLike | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    points: str = "*",
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Recording:
    """Record the points of a prefill and of decode steps. The model runs once in each precision, for the noise floors.

    Parameters
    ----------
    weights, config
        The model.
    ids
        The prompt, (S,) or (B, S).
    steps
        How many decode steps follow the prefill.
    fed
        The ids to decode, one per step and sequence; greedy ids follow if there are fewer than `steps`.
    numerics, engine
        As in forward.
    points
        Patterns, separated by commas: "layers.0.*,lm_head". A layer's pattern includes the layer's own point.
    layers
        Only these layers; None: all, here and below.
    tokens, heads
        Only these positions of the prompt and these query heads (and their key heads), of points that have such an
        axis.

    Returns
    -------
    Recording
        The points, with everything that is needed to compute them again.

    Raises
    ------
    ValueError
        For ids outside the vocabulary, and choices that leave nothing to record. NonFiniteError for a point that holds
        NaN or infinity: nothing can be compared with it.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> from qwen3np.porting import record
    >>> record(model.weights, model.config, [281, 297], points="*.0.*_norm,lm_head").points["lm_head"].shape
    (1, 2, 2048)
    """
    chosen: dict[str, Any] = {"points": points, "layers": layers, "tokens": tokens, "heads": heads, "steps": steps}
    recorded: dict[str, Array] = {}
    all_ids = trace(weights, config, ids, recorded.__setitem__, fed=fed, numerics=numerics, engine=engine, **chosen)
    for name, x in recorded.items():
        require_finite_point(name, x, weights, config, all_ids, numerics)
    prompt, later = np.split(all_ids, [np.shape(ids)[-1]], 1)
    steps = later.shape[1]
    if steps:
        chosen["fed"] = later
    truth = recorded
    if numerics != FLOAT64.name:
        truth = dict[str, Array]()
        trace(weights, config, prompt, truth.__setitem__, numerics=FLOAT64.name, **chosen)
    kept = tuple(tokens) if tokens is not None else None, tuple(heads) if heads is not None else None
    floors: dict[str, dict[str, tuple[float, float]]] = {"float32": {}, "float16": {}, "bfloat16": {}}

    def measured(floor: dict[str, tuple[float, float]]) -> Callable[[str, Array], None]:
        def measure(point: str, x: Array) -> None:
            overall, by_token = distance(x, truth[point], position_axis(point))
            before = floor.get(point, (0.0, 0.0))
            worst = float(by_token.max())
            if not math.isfinite(worst):  # float16 overflows, and then says nothing
                overall = worst = 1.0
            floor[point] = max(overall, before[0]), max(worst, before[1])

        return measure

    for name in ("float32", "bfloat16", *(["bfloat16-grouped"] if config.num_experts else [])):
        measure = measured(floors[name.removesuffix("-grouped")])
        if name == numerics and engine == "fast":
            for point, x in recorded.items():
                measure(point, x)
        else:
            trace(weights, config, prompt, measure, numerics=name, **chosen)
    right = Rerun(weights, config, HALF, passes_of(all_ids, steps), {})
    experts = {name: x for name, x in recorded.items() if name.endswith(CHOICE) and tokens is None}
    alike, size = replace(right, given=experts), prompt.size * config.hidden_size
    runs = [("float16", right), *((name, run) for name in floors for run in noisy_runs(alike, size, name))]
    last = list(recorded)[-1]
    for of, run in runs:
        measure = measured(floors[of])
        with np.errstate(all="ignore"):
            for point in (prefix + name for prefix, _, _ in run.passes for name in point_names(config)):
                x = run.value(point)
                if point in recorded:
                    measure(point, cut(point, x, config, *kept))
                if point == last:
                    break
    return Recording(recorded, config, all_ids, steps, numerics, floors, *kept, fingerprint(weights), engine)


def trace(
    weights: Mapping[str, Array],
    config: Config,
    ids: ArrayLike,
    visit: Callable[[str, Array], object],
    *,
    steps: int = 0,
    fed: ArrayLike | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    points: str = "*",
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Array:
    """Call visit with the name and array of each chosen point as it is computed; return all ids, (B, S + steps).

    Arguments and errors as in record, except that points may hold NaN or infinity unless a greedy id depends on them.
    """
    prompt = checked_ids(ids, config)
    n = named(numerics, engine)
    if steps < 0:
        raise ValueError(f"steps={steps} must be at least 0")
    later = prompt[:, :0] if fed is None else checked_ids(fed, config, "fed")
    if len(later) != len(prompt):
        raise ValueError(f"fed: ids of {len(later)} sequences after a prompt of {len(prompt)}")
    steps = max(steps, later.shape[1])
    for what, wanted, limit in (
        ("layer", layers, config.num_hidden_layers),
        ("token", tokens, prompt.shape[1]),
        ("head", heads, config.num_attention_heads),
    ):
        outside = [i for i in wanted or () if not 0 <= i < limit]
        if outside or (wanted is not None and not wanted):
            raise ValueError(f"{what}s: {outside or 'none'} chosen; there are {what}s 0 to {limit - 1}")
    prefixes = ["", *(f"decode.{i}." for i in range(steps))]
    chosen = _chosen(points, layers, [p + name for p in prefixes for name in point_names(config)])
    kept = tuple(tokens) if tokens is not None else None, tuple(heads) if heads is not None else None

    cache = KVCache.allocate(config, len(prompt), prompt.shape[1] + steps, n.storage)
    new, seen = prompt, [prompt]
    for i, prefix in enumerate(prefixes):

        def choose(name: str, x: Array, prefix: str = prefix) -> None:
            if prefix + name in chosen:
                visit(prefix + name, cut(prefix + name, x, config, *kept))

        logits = forward(weights, config, new, cache, numerics=numerics, engine=engine, trace=choose)
        if i < steps:
            if i < later.shape[1]:
                new = later[:, i : i + 1]
            else:
                for row, so_far in zip(logits[:, -1], np.concatenate(seen, 1).tolist(), strict=True):
                    require_finite(row, weights, config, so_far, numerics)
                new = logits[:, -1:].argmax(-1)
            seen.append(new)
    return np.concatenate(seen, 1)


def _chosen(points: str, layers: Sequence[int] | None, names: Sequence[str]) -> set[str]:
    """Return the names that match the patterns, in these layers. Raises ValueError for a pattern without a match."""
    chosen: set[str] = set()
    for pattern in (p.strip() for p in points.split(",")):
        found: set[str] = set()
        for name in names:
            prefix, point = split_pass(name)
            plain = point.removeprefix("model.")
            # the dot makes "layers.0.*" match the layer's output too
            forms = [form + dot for form in (name, prefix + plain, point, plain) for dot in ("", ".")]
            if any(fnmatchcase(form, pattern) for form in forms):
                found.add(name)
        if not found:
            raise ValueError(f"points: nothing matches {pattern!r}; names are like model.layers.0.self_attn.q_proj")
        chosen |= found
    kept = {name for name in chosen if layers is None or split_layer(name)[0] in (None, *layers)}
    if not kept:
        raise ValueError(f"points: {points!r} has nothing in layers {list(layers or ())}")
    return kept


def output_path(path: str | Path) -> Path:
    """Return the path of a new recording. Raises ValueError if it cannot be a file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a recording is a safetensors file: give it a name with that ending")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    return path


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and the metadata of a file. Raises ValueError if it is missing or incomplete."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with cast("Any", safe_open)(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:  # an 8-bit type, say, or 100 dimensions
        raise ValueError(f"{path}: holds numbers of a type or a shape that NumPy does not have: {error}") from None


def cut(name: str, x: Array, config: Config, tokens: tuple[int, ...] | None, heads: tuple[int, ...] | None) -> Array:
    """Restrict a whole point to these positions (of a prefill) and these query heads, or their key heads."""
    if tokens is not None and not split_pass(name)[0]:
        x = np.take(x, tokens, position_axis(name))
    kind = split_layer(name)[1].rpartition(".")[2]
    if heads is not None and kind in HEADS:
        group = config.num_attention_heads // config.num_key_value_heads
        x = np.take(x, sorted({h // group for h in heads}) if kind.startswith("k_") else heads, HEADS[kind])
    return x


def distance(x: Array, truth: Array, axis: int, scale: Array | None = None) -> tuple[float, Array]:
    """Return the relative L2 distance from the truth, overall and per index of `axis`, where the truth is not -inf.

    For an index with a small norm, such as the single score of the first position, it is relative to the median norm.
    scale replaces the truth as the numbers that the distance is relative to. Integers are choices: their distance is
    the fraction of the truth's that x lacks, in any order.
    """
    if truth.dtype.kind in "iu":
        lacking = (truth[..., :, None] != x[..., None, :]).all(-1)
        return float(lacking.mean()), lacking.mean(tuple(i for i in range(truth.ndim) if i != axis))
    seen = np.isfinite(truth)
    # float64 first: NumPy 1.26 cannot combine bfloat16 with a Python number
    y: Array = np.where(seen, truth.astype(np.float64), 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        error: Array = np.square(np.where(seen, x.astype(np.float64), 0.0) - y)
    others = tuple(i for i in range(truth.ndim) if i != axis)
    errors: Array = np.sqrt(error.sum(others))
    size: Array = y if scale is None else np.where(seen, scale.astype(np.float64), 0.0)
    norms: Array = np.sqrt(np.square(size).sum(others))
    tiny, usual = float(np.finfo(np.float64).tiny), float(np.median(norms))
    by_index = errors / np.maximum(norms, max(usual, tiny))
    return math.hypot(*errors) / max(math.hypot(*norms), tiny), by_index
