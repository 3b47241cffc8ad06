"""The building blocks of bugs and settings: functions (run, at, *inputs) -> the wrong point.

`run` is the right formula, to be called with another place, or with other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import numpy as np

from qwen3np.config import Config, Yarn
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.porting.points import POINTS, Place, Point, project, split_layer, split_pass
from qwen3np.qwen3 import rms_norm, rotate
from qwen3np.rope import attention_factor, inverse_frequencies, rotary_tables

Change = Callable[..., Array]  # (run, place, *inputs) -> the point


def always(config: Config) -> bool:
    """Apply to every model."""
    return True


@dataclass(frozen=True)
class Bug:
    """Changes of points, by name or pattern.

    A pattern covers places where a port may have separate code.
    """

    name: str
    changes: Mapping[str, Change]
    look: str  # where to look, or what to do instead
    applies: Callable[[Config], bool] = always  # to models of this config
    decode: bool | None = None  # in decode steps alone, or in the prompt alone
    layers: frozenset[int] | None = None  # in these layers alone

    @property
    def points(self) -> list[str]:
        """The keys of POINTS that it changes, in their order."""
        return [point for point in POINTS if any(fnmatchcase(point, pattern) for pattern in self.changes)]

    @property
    def parts(self) -> list[Bug]:
        """The same bug in each single point that its pattern matches; empty without a pattern."""
        points = self.points if len(self.changes) == 1 else []
        return [self.at(point) for point in points if len(points) > 1]

    def at(self, *points: str) -> Bug:
        """Return the same bug in only these points."""
        change = {point: c for pattern, c in self.changes.items() for point in points if fnmatchcase(point, pattern)}
        return replace(self, changes=change)

    def changed(self, name: str) -> bool:
        """Whether the bug changes this point."""
        (prefix, _), (layer, kind) = split_pass(name), split_layer(name)
        return kind in self.points and self._here(bool(prefix), layer)

    def _here(self, is_decode: bool, layer: int | None) -> bool:
        return self.decode in (None, is_decode) and (self.layers is None or layer in self.layers)

    @property
    def scope(self) -> str:
        """Where the bug is, in words, if it is not everywhere."""
        words = list[str]()
        if self.layers is not None:
            numbers = ", ".join(map(str, sorted(self.layers)))
            words.append(f"in layer{'s' if len(self.layers) > 1 else ''} {numbers} alone")
        if self.decode is not None:
            words.append("in decode steps alone" if self.decode else "in the prompt alone")
        return ", ".join(words)

    def planted(self, points: Mapping[str, Point]) -> dict[str, Point]:
        """Return the table of points with this bug."""
        changed = dict(points)
        for pattern, change in self.changes.items():
            for point in self.points:
                if fnmatchcase(point, pattern):
                    changed[point] = replace(points[point], run=partial(self._run, change, points[point].run))
        return changed

    def _run(self, change: Change, run: Change, at: Place, *x: Array) -> Array:
        layer = split_layer(at.name)[0]
        return change(run, at, *x) if self._here(bool(at.positions[0, 0] > 0), layer) else run(at, *x)


# --- changes that several bugs are made of ----------------------------------------------------------------------------


def placed(move: Callable[[Place], Place]) -> Change:
    """Run the right formula at another place."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        return run(move(at), *x)

    return change


def configured(**values: Any) -> Change:
    """Run the right formula with other values in the config."""
    return placed(lambda at: replace(at, config=replace(at.config, **values)))


def reconfigured(change: Callable[[Config], Config]) -> Change:
    """Run the right formula with another config."""
    return placed(lambda at: replace(at, config=change(at.config)))


def with_weights_of(own: str, other: str) -> Change:
    """Run the right formula with the weights of another module."""
    return placed(lambda at: replace(at, name=at.name.replace(own, other)))


def moved(move: Callable[[Array], Array]) -> Change:
    """Run the right formula at other positions."""
    return placed(lambda at: replace(at, positions=move(at.positions)))


def scaled(factor: Callable[[Config], float]) -> Change:
    """Multiply the result of the right formula."""

    def change(run: Change, at: Place, *x: Array) -> Array:
        return at.numerics.round(run(at, *x) * at.numerics.dtype.type(factor(at.config)))

    return change


def unchanged(x: Array) -> Array:
    """Return x."""
    return x


def to_bfloat16(x: Array) -> Array:
    """Return x with the digits of bfloat16."""
    return x.astype(BFLOAT16).astype(x.dtype)


def rotated(
    frequencies: Callable[[Array], Array] = unchanged,
    angles: Callable[[Array], Array] = unchanged,
    tables: Callable[[Array], Array] = unchanged,
) -> Change:
    """Rotate by tables with an additional rounding."""

    def change(run: Change, at: Place, x: Array) -> Array:
        by = frequencies(inverse_frequencies(at.config, at.numerics))
        turned = angles(angles(at.positions[:, None, :, None].astype(by.dtype)) * angles(by))
        scale = attention_factor(at.config)
        cos, sin = (tables(at.numerics.round(f(turned) * scale)) for f in (np.cos, np.sin))
        return rotate(np.swapaxes(x, 1, 2), (cos, sin), at.numerics)

    return change


# --- norms ------------------------------------------------------------------------------------------------------------


def not_normalised(run: Change, at: Place, x: Array) -> Array:
    """Leave out the norm, but split heads as it does."""
    return x.reshape(*x.shape[:2], -1, at.config.head_dim) if "self_attn" in at.name else x


def one_plus_weight(at: Place) -> Place:
    """Return the place with 1 added to its weight."""
    return replace(at, weights={**at.weights, f"{at.name}.weight": at.numerics.widen(at.weight) + 1})


def over_all_heads(run: Change, at: Place, x: Array) -> Array:
    """Normalise q or k by the mean over all heads."""
    heads = not_normalised(run, at, x)
    weight = np.tile(at.weight, heads.shape[2])
    return rms_norm(x, weight, at.config.rms_norm_eps, at.numerics).reshape(heads.shape)


def normalised_after(run: Change, at: Place, x: Array) -> Array:
    """Normalise heads after they are rotated."""
    weight = at.weights[f"{at.name.replace('rope', 'norm')}.weight"]
    return rms_norm(run(at, x), weight, at.config.rms_norm_eps, at.numerics)


def rotated_before(run: Change, at: Place, x: Array) -> Array:
    """Rotate heads before they are normalised."""
    tables = rotary_tables(at.config, at.positions, at.numerics)
    turned = rotate(np.swapaxes(not_normalised(run, at, x), 1, 2), tables, at.numerics)
    return run(at, np.swapaxes(turned, 1, 2).reshape(x.shape))


# --- rotation ---------------------------------------------------------------------------------------------------------


def interleaved(run: Change, at: Place, x: Array) -> Array:
    """Rotate pairs of neighbouring lanes."""
    halves = np.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
    y = run(at, halves)
    return np.swapaxes(y.reshape(*y.shape[:-1], 2, -1), -1, -2).reshape(y.shape)


def not_rotated(run: Change, at: Place, x: Array) -> Array:
    """Leave the rotation out."""
    return np.swapaxes(x, 1, 2)


# --- attention --------------------------------------------------------------------------------------------------------


def tiled(run: Change, at: Place, by_head: Array, kv: Array) -> Array:
    """Let query head h meet the KV head h % K: on the place of a head that does, and back."""
    heads, kv_heads = at.config.num_attention_heads, at.config.num_key_value_heads
    order = np.transpose(np.arange(heads).reshape(-1, kv_heads)).ravel()
    y = run(at, by_head[:, order], kv)
    axis = 1 if y.ndim == 4 else 2  # scores (B, H, S, T) or context (B, S, H * Dh)
    whole = y.shape
    y = y if axis == 1 else y.reshape(*y.shape[:2], heads, -1)
    return np.take(y, np.argsort(order), axis).reshape(whole)


def seeing(ahead: Callable[[int], int]) -> Change:
    """Let a query also see a number of positions (a function of T) after its own."""

    def change(run: Change, at: Place, q: Array, k: Array) -> Array:
        (batch, _, new, _), (kv_heads, total, size) = q.shape, k.shape[1:]
        products = q.reshape(batch, kv_heads, -1, new, size) @ np.swapaxes(k[:, :, None], -1, -2)  # (B, K, G, S, T)
        scores = at.numerics.round(at.numerics.round(products) * at.numerics.dtype.type(size**-0.5))
        seen = np.tri(new, total, total - new + ahead(total), np.bool_)
        if (window := at.config.window(at.layer)) is not None:
            seen &= ~np.tri(new, total, total - new - window, np.bool_)
        return np.where(seen, scores.reshape(*q.shape[:3], total), at.numerics.dtype.type(-np.inf))

    return change


def slid_elsewhere(config: Config) -> Config:
    """Swap the layers with and without a window."""
    layers = range(config.num_hidden_layers)
    types = ("sliding_attention" if config.window(i) is None else "full_attention" for i in layers)
    return replace(config, layer_types=tuple(types))


def wider(by: int) -> Change:
    """Let the window be longer."""
    return reconfigured(lambda config: replace(config, sliding_window=max((config.sliding_window or 0) + by, 1)))


def slides(config: Config) -> bool:
    """Whether any layer has a window."""
    return any(config.window(i) is not None for i in range(config.num_hidden_layers))


def slides_in_part(config: Config) -> bool:
    """Whether some layers have a window and others have none."""
    return slides(config) and any(config.window(i) is None for i in range(config.num_hidden_layers))


# --- YaRN -------------------------------------------------------------------------------------------------------------


def has_yarn(config: Config) -> bool:
    """Whether the rotation is scaled by YaRN."""
    return config.rope_scaling is not None


def with_yarn(change: Callable[[Yarn, float], Yarn]) -> Change:
    """Rotate with other settings, derived from the config's and their attention factor."""

    def changed(config: Config) -> Config:
        yarn = config.rope_scaling
        return replace(config, rope_scaling=yarn and change(yarn, attention_factor(config)))

    return reconfigured(changed)


# --- feed-forward -----------------------------------------------------------------------------------------------------


@cache
def _erf_table() -> tuple[Array, Array]:
    x = np.linspace(0, 6, 8193)
    return x, np.array([math.erf(v) for v in x])


def erf(x: Array) -> Array:
    """Return the error function, by cubic interpolation of 8,193 exact values: off by less than 1e-14."""
    places, values = _erf_table()
    a = np.minimum(np.abs(x.astype(np.float64)), 5.999)
    i = (a * (8192 / 6)).astype(np.int64)
    h = places[1]
    t = (a - places[i]) / h
    slopes = (2 / math.sqrt(math.pi) * h) * np.exp(-np.square(np.stack([places[i], places[i + 1]])))
    y = values[i] * (1 + 2 * t) * (1 - t) ** 2 + values[i + 1] * t * t * (3 - 2 * t)
    y += slopes[0] * t * (1 - t) ** 2 - slopes[1] * t * t * (1 - t)
    return np.copysign(y, x).astype(x.dtype)


def gelu(x: Array) -> Array:
    """Return x Φ(x)."""
    return x * (1 + erf(x * math.sqrt(0.5))) / 2


def gelu_tanh(x: Array) -> Array:
    """Return the approximation of x Φ(x) by tanh."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def activated(by: Callable[[Array], Array]) -> Change:
    """Activate the gate by another function."""

    def change(run: Change, at: Place, gate: Array, up: Array) -> Array:
        return at.numerics.round(at.numerics.round(by(gate)) * up)

    return change


def exchanged(run: Change, at: Place, x: Array, y: Array) -> Array:
    """Swap the two inputs."""
    return run(at, y, x)


def within_experts(activate: Callable[[Array, Array], Array]) -> Change:
    """Let every expert compute activate(gate, up) from its two projections."""

    def change(run: Change, at: Place, x: Array, indices: Array, shares: Array) -> Array:
        n, y = at.numerics, np.zeros_like(x)
        for expert in np.unique(indices):

            def projected(x: Array, name: str, expert: int = expert) -> Array:
                return project(x, at.weights[f"{at.name}.{expert}.{name}_proj.weight"], None, n)

            here = indices == expert
            rows = here.any(-1)
            act = n.round(activate(projected(x[rows], "gate"), projected(x[rows], "up")))
            y[rows] = n.round(y[rows] + n.round(projected(act, "down") * shares[here][:, None]))
        return y

    return change


# --- router -----------------------------------------------------------------------------------------------------------


def is_sparse(config: Config) -> bool:
    """Whether any layer has experts."""
    return any(config.is_sparse(i) for i in range(config.num_hidden_layers))


def logits_as_weights(run: Change, at: Place, logits: Array, indices: Array) -> Array:
    """Weigh experts by the router's logits."""
    return np.take_along_axis(logits, indices, -1)


def logits_normalised(run: Change, at: Place, logits: Array, indices: Array) -> Array:
    """Weigh experts by the router's logits, divided by their sum."""
    chosen = np.take_along_axis(logits, indices, -1)
    return at.numerics.round(chosen / chosen.sum(-1, keepdims=True))


# --- changes of numbers alone -----------------------------------------------------------------------------------------


def outside_the_root(run: Change, at: Place, x: Array) -> Array:
    """Add eps to the root mean square instead of the mean square."""
    n = at.numerics
    rows = not_normalised(run, at, x)
    root = np.sqrt(np.square(rows).mean(-1, keepdims=True))
    return n.round(n.round(rows / (root + n.dtype.type(at.config.rms_norm_eps))) * n.widen(at.weight))


def exchanged_tables(run: Change, at: Place, x: Array) -> Array:
    """Swap cos and sin."""
    cos, sin = rotary_tables(at.config, at.positions, at.numerics)
    return rotate(np.swapaxes(x, 1, 2), (sin, cos), at.numerics)


def blind_to_itself(run: Change, at: Place, q: Array, k: Array) -> Array:
    """Hide a position from itself; the first one, which would see nothing, stays."""
    scores = run(at, q, k).copy()
    new, total = scores.shape[-2:]
    own = np.eye(new, total, total - new, dtype=np.bool_) & (np.arange(total) > 0)
    return np.where(own, at.numerics.dtype.type(-np.inf), scores)


def fewer_experts(run: Change, at: Place, x: Array, indices: Array, shares: Array) -> Array:
    """Leave out the chosen expert with the smallest weight."""
    return run(at, x, indices[..., :-1], shares[..., :-1])


def lost(run: Change, at: Place, x: Array, y: Array) -> Array:
    """Let the key or the value of a decode step be 0 for itself, as where it is written to another place."""
    if not at.positions[0, 0]:
        return run(at, x, y)
    y = y.copy()
    y[(slice(None),) * (y.ndim - 2) + (-1,)] = 0  # (B, K, T, Dh) or (B, T, K * Dh)
    return run(at, x, y)
