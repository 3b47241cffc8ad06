"""How far rounding alone can take a correct program: floors from a model of summation, and from all ways to rotate.

A right program may sum in any order, one number after the other included, and may make its rotary angles in four ways.
Its numbers are then further off than ours, because our sums run in blocks. `noisy` is the reference with
errors as large as such programs have; what it makes of a point is that point's floor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from qwen3np.config import Config
from qwen3np.numerics import FLOAT32, FLOAT64, Array, Numerics, named
from qwen3np.porting.points import POINTS, Place, Point, Rerun
from qwen3np.qwen3 import rotate
from qwen3np.rope import attention_factor, inverse_frequencies

U = 2.0**-24  # half a unit in the last place of float32
MARGIN = 4.0  # how many floors are still rounding: another order of summation, or another place to round
# Minimum floors, a fraction of one rounding: some points are exact in the reference.
LEAST = {"float32": 2**-25, "float16": 2**-13, "bfloat16": 2**-10, "float64": 2**-55}
DIGITS = {"float32": 23, "float16": 10, "bfloat16": 7}  # binary, after the first
FEW = 1 << 18  # points with fewer numbers are also measured with drawn errors, because luck affects them
DRAWS = 2
# The farthest way to rotate is a bound and no noise: MARGIN on the whole of it would be too wide. With half of it real
# programs are at most 2 floors away (llama.cpp; MLX: 1.9), and MARGIN is twice the bound.
HALFWAY = 0.5


@dataclass(frozen=True)
class _Half(Numerics):
    """float32 arithmetic rounded to float16 where bfloat16 rounds."""

    def round(self, x: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(np.float16).astype(self.dtype)

    def widen(self, x: Array) -> Array:
        return self.round(x)


HALF = _Half("float16", np.dtype(np.float32), np.dtype(np.float16), rounds=True)


@dataclass(frozen=True)
class _Drawn(Numerics):
    """float32 arithmetic with a drawn error of up to half a unit in the last place wherever 16 bits round something.

    One program may be lucky where numbers nearly cancel: another one, just as right, is then many times further off.
    """

    short: Numerics = HALF
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def round(self, x: Array) -> Array:
        unit = np.spacing(np.abs(x)) * np.float32(2 ** (DIGITS["float32"] - DIGITS[self.short.name]))
        with np.errstate(invalid="ignore"):  # of -inf, which is exact
            off = x + unit * (self.rng.random(x.shape, np.float32) - np.float32(0.5))
        return np.where(self.short.round(x) == x, x, off)


def numerics_of(name: str) -> Numerics:
    """Return the numerics of this name, including float16. Raises ValueError for an unknown one."""
    return HALF if name == HALF.name else named(name)


def limit(floor: float, size: int) -> float:
    """Return the largest distance that counts as rounding, for a point of this size: few numbers may all be unlucky."""
    return MARGIN * floor * (1 + 2 / math.sqrt(max(size, 1)))


def root_mean(floors: list[float]) -> float:
    """Return the root mean square of floors that were drawn several times."""
    return math.hypot(*floors) / math.sqrt(len(floors))


# --- the ways to make rotary angles -----------------------------------------------------------------------------------


def rotary_angles(config: Config, positions: Array) -> Array:
    """Return the angles (4, B, S, Dh/2) of four right ways in float32: power, reciprocal power, exp2, recurrence.

    The first is transformers', the third MLX's, the last llama.cpp's: angle *= theta^(-2/Dh), lane by lane.
    """
    size, theta = config.head_dim, np.float32(config.rope_theta)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    at = positions[..., None].astype(np.float32)
    plain = replace(config, rope_scaling=None)
    step = np.power(theta, np.float32(-2 / size))
    lanes = np.full((*positions.shape, size // 2), step, np.float32)
    lanes[..., 0] = at[..., 0]
    frequencies = (
        inverse_frequencies(plain),
        np.power(theta, -exponents),
        np.exp2(-exponents * np.log2(theta)),
    )
    angles = np.stack([*(at * f for f in frequencies), np.multiply.accumulate(lanes, axis=-1, dtype=np.float32)])
    slowed = inverse_frequencies(config, FLOAT64) / inverse_frequencies(plain, FLOAT64)
    return angles * slowed.astype(np.float32)


def farthest_tables(config: Config, positions: Array) -> tuple[Array, Array]:
    """Return cos and sin (B, 1, S, Dh/2) of angles HALFWAY to the right way that is farthest from exact, lane by lane.

    A power may also be off by a unit in its last place, as MLX's is, but for theta^0.
    """
    angles = rotary_angles(config, positions).astype(np.float64)
    exact = positions[..., None].astype(np.float64) * inverse_frequencies(config, FLOAT64)
    worst = np.abs(angles - exact).argmax(0)
    off = np.take_along_axis(angles, worst[None], 0)[0] - exact
    least = 2 * U * exact * (np.arange(exact.shape[-1]) > 0)
    angle = (exact + HALFWAY * np.where(np.abs(off) < least, np.copysign(least, off), off))[:, None]
    scale = attention_factor(config)
    return (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)


# --- the reference with the errors of sums in the worst order ---------------------------------------------------------

Change = Callable[..., Array]  # (draws, run, place, *inputs) -> the point


class Draws:
    """Random numbers for the points by their names, and the norms of weights, which are asked for in every pass."""

    def __init__(self, seed: int) -> None:
        """Draw other numbers for another seed."""
        self.seed, self.norms = seed, dict[str, Array]()

    def normal(self, at: Place, shape: tuple[int, ...]) -> Array:
        """Return standard normal numbers, the same for the same point of the same pass."""
        key = zlib.crc32(f"{at.name} {int(at.positions[0, 0])}".encode())
        return np.random.default_rng([self.seed, key]).standard_normal(shape, np.float32)

    def row_norms(self, at: Place, name: str) -> Array:
        """Return the norm of each row of a weight."""
        if name not in self.norms:
            w = at.weights[name]
            rows = [np.square(w[i : i + 4096].astype(np.float32)).sum(-1) for i in range(0, len(w), 4096)]
            self.norms[name] = np.sqrt(np.concatenate(rows))
        return self.norms[name]


def _norm(x: Array) -> Array:
    """Return the norms over the last axis, which stays."""
    return np.sqrt(np.square(x).sum(-1, keepdims=True))


def _project(draws: Draws, run: Change, at: Place, x: Array) -> Array:
    """N sums in sequence of a random walk's steps are off by U/3 |x| |w|, whatever n is: |x| |w| has it in it."""
    y = run(at, x)
    name = "model.embed_tokens" if at.name == "lm_head" and at.config.tie_word_embeddings else at.name
    spread = _norm(x) * draws.row_norms(at, f"{name}.weight") * np.float32(U / 3)
    return y + spread * draws.normal(at, y.shape)


def _normalise(draws: Draws, run: Change, at: Place, x: Array) -> Array:
    """The sum of squares, one after the other: numbers of one sign drift, which is measured and not modelled."""
    y = run(at, x)
    rows = x.reshape(-1, y.shape[-1])
    squares = rows * rows
    exact = squares.sum(-1, dtype=np.float64)
    drift = np.abs(np.add.accumulate(squares, -1, dtype=np.float32)[:, -1] / np.maximum(exact, 1e-30) - 1)
    off = np.maximum(drift, U * math.sqrt(y.shape[-1]) / 3).reshape(*y.shape[:-1], 1) / 2
    return (y * (1 + off * np.sign(draws.normal(at, off.shape)))).astype(y.dtype)


def _rotate(draws: Draws, run: Change, at: Place, x: Array) -> Array:
    return rotate(np.swapaxes(x, 1, 2), farthest_tables(at.config, at.positions), at.numerics)


def _scores(draws: Draws, run: Change, at: Place, q: Array, k: Array) -> Array:
    y = run(at, q, k)
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(np.swapaxes(_norm(k), -1, -2), group, 1)
    return y + _norm(q) * keys * np.float32(U / 3 * q.shape[-1] ** -0.5) * draws.normal(at, y.shape)


def _probs(draws: Draws, run: Change, at: Place, scores: Array) -> Array:
    """Each exponential is off by the rounding of its argument, and a whole row by that of its sum."""
    y = run(at, scores)
    below = np.where(np.isfinite(scores), scores - scores.max(-1, keepdims=True), 0)
    row = math.sqrt(y.shape[-1]) / 3 * draws.normal(replace(at, name=f"{at.name} row"), (*y.shape[:-1], 1))
    return y * (1 + np.float32(U) * ((1 - below) * draws.normal(at, y.shape) + row))


def _context(draws: Draws, run: Change, at: Place, probs: Array, v: Array) -> Array:
    y = run(at, probs, v)
    kv_heads, head_dim = at.config.num_key_value_heads, at.config.head_dim
    lanes = np.sqrt(np.square(v).sum(1)).reshape(len(v), 1, kv_heads, 1, head_dim)
    rows = np.swapaxes(_norm(probs)[..., 0], 1, 2).reshape(*y.shape[:2], kv_heads, -1, 1)
    return y + (rows * lanes).reshape(y.shape) * np.float32(U / 3) * draws.normal(at, y.shape)


def _elementwise(draws: Draws, run: Change, at: Place, *x: Array) -> Array:
    y = run(at, *x)
    return y * (1 + np.float32(2 * U) * draws.normal(at, y.shape))


def _experts(draws: Draws, run: Change, at: Place, *x: Array) -> Array:
    y = run(at, *x)
    size = np.sqrt(np.square(y).mean(-1, keepdims=True) * (at.config.moe_intermediate_size or 1))
    return y + (np.abs(y) + size) * np.float32(U) * draws.normal(at, y.shape)


_CHANGES: dict[str, Change] = {
    "*_proj": _project,
    "mlp.gate": _project,
    "lm_head": _project,
    "*norm": _normalise,
    "*_rope": _rotate,
    "*.scores": _scores,
    "*.probs": _probs,
    "*.context": _context,
    "mlp.act": _elementwise,
    "mlp.router_weights": _elementwise,
    "mlp.experts": _experts,
}


def noisy(draws: Draws, points: Mapping[str, Point] = POINTS) -> dict[str, Point]:
    """Return a table of points with the errors of right float32 programs whose sums run in the worst order."""
    changed = dict(points)
    for kind, point in points.items():
        for pattern, change in _CHANGES.items():
            if fnmatchcase(kind, pattern):
                changed[kind] = replace(point, run=partial(change, draws, point.run))
    return changed


def noisy_runs(right: Rerun, size: int, port: str) -> list[Rerun]:
    """Return the rerun with drawn errors in a precision, several times where its points have few numbers."""
    if port == FLOAT32.name:
        seeds = range(DRAWS if size < FEW else 1)
        return [replace(right, table=noisy(Draws(seed), right.table), numerics=FLOAT32, computed={}) for seed in seeds]
    dtype, short = FLOAT32.dtype, numerics_of(port)
    drawn = [_Drawn(port, dtype, dtype, short=short, rng=np.random.default_rng(seed)) for seed in range(DRAWS)]
    return [replace(right, numerics=numerics, computed={}) for numerics in drawn if size < FEW]
