"""AdamW, against torch's and its formula; the learning rate schedule; clipping."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from drawing import SEEDS, relative
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from qwen3np.ops.fast.threads import WORTH_SHARING
from qwen3np.training.optimizer import adamw, clip, cosine_schedule, zero_moments

SHAPES = {"embedding": (50, 8), "norm": (8,), "bias": (12,), "matrix": (12, 8)}
# The rounding of a few steps, relative to the weights. Measured: at most 1.0e-7 and 3.6e-16.
LIMIT = {"float32": 1.5e-7, "float64": 6e-16}


def draw(rng, dtype, shapes=SHAPES):
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def gradients_of(steps, dtype):
    """Draw gradients of different sizes, with zeros, for each step."""
    rng = np.random.default_rng(1)
    steps = [{name: g * 10.0 ** rng.integers(-4, 2) for name, g in draw(rng, dtype).items()} for _ in range(steps)]
    for gradients in steps:
        gradients["embedding"][::3] = 0  # ids that do not come in a batch
    return [{name: g.astype(dtype) for name, g in gradients.items()} for gradients in steps]


@pytest.mark.parametrize("dtype", LIMIT)
def test_adamw_is_its_formula(dtype):
    weights = draw(np.random.default_rng(0), dtype)
    expected = {name: w.astype(np.float64) for name, w in weights.items()}
    given, moments = dict(weights), zero_moments(weights)
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for t, gradients in enumerate(gradients_of(6, dtype), 1):
        lr = 0.01 * t
        adamw(weights, gradients, moments, t, lr, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
        for name, g in gradients.items():
            g = g.astype(np.float64)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.99 * v[name] + 0.01 * g**2
            decay = 0.3 if name in ("embedding", "matrix") else 0.0
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.99**t)) + 1e-6)
            expected[name] = expected[name] - lr * decay * expected[name] - lr * step
    for name, w in weights.items():
        assert w is given[name]  # in place
        assert w.dtype == moments[name][0].dtype == moments[name][1].dtype == dtype
        assert relative(w, expected[name]) <= LIMIT[dtype], name


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", LIMIT)
def test_adamw_is_that_of_torch(dtype):
    torch = pytest.importorskip("torch")
    weights = draw(np.random.default_rng(0), dtype)
    moments = zero_moments(weights)
    theirs = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}
    matrices, others = ([p for p in theirs.values() if (p.ndim == 2) == decays] for decays in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for t, gradients in enumerate(gradients_of(8, dtype), 1):
        adamw(weights, gradients, moments, t, 0.003 * t)
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * t
        for name, p in theirs.items():
            p.grad = torch.from_numpy(gradients[name])
        optimizer.step()
    for name, p in theirs.items():
        assert relative(weights[name], p.detach().numpy()) <= LIMIT[dtype], name


def test_threads_change_no_bit_of_adamw(monkeypatch):
    shapes = {"large": (WORTH_SHARING // 80, 8), "small": (7, 3), "norm": (8,), "other": (500, 8)}
    assert 10 * sum(math.prod(shape) for shape in shapes.values()) >= WORTH_SHARING  # else nothing is shared
    results = []
    for threads in "123":
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
        rng = np.random.default_rng(0)
        weights, gradients = draw(rng, np.float32, shapes), draw(rng, np.float32, shapes)
        adamw(weights, gradients, zero_moments(weights), 1, 0.01)
        results.append(weights)
    for other in results[1:]:
        for name, w in results[0].items():
            np.testing.assert_array_equal(w, other[name])


# --- the schedule


def test_the_schedule_at_known_points():
    rates = [cosine_schedule(step, 110, 10, 0.5) for step in range(110)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-15)  # a line, which begins above 0
    assert rates[10] == 0.5
    assert rates[60] == pytest.approx(0.25)  # half way down
    assert rates[35] == pytest.approx(0.25 + math.sqrt(0.03125))  # a quarter: cos(45°) = sqrt(1 / 2)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001 * 0.5


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_schedule_of_short_runs(steps, warmup):
    rates = [cosine_schedule(step, steps, warmup, 2.0) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[0] == (2.0 if warmup < 2 else 0.4)


# --- clipping


def norm_of(gradients):
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values()))


@given(SEEDS, st.floats(-6, 6), st.sampled_from(["float32", "float64"]))
def test_clipping(seed, exponent, dtype):
    gradients = draw(np.random.default_rng(seed), dtype)
    before = {name: g.copy() for name, g in gradients.items()}
    objects, norm, limit = dict(gradients), norm_of(before), norm_of(before) * 2.0**exponent
    assert clip(gradients, limit) == pytest.approx(norm, rel=1e-6)
    for name, g in gradients.items():
        assert g is objects[name]
        assert g.dtype == dtype
        if limit > norm * (1 + 1e-6):
            np.testing.assert_array_equal(g, before[name])
        else:  # one factor for all
            np.testing.assert_allclose(g, before[name] * min(1, limit / norm), rtol=1e-6)
    assert norm_of(gradients) <= limit * (1 + 1e-6)  # float32 rounds the factor


def test_clipping_leaves_zeros():
    gradients = {"w": np.zeros((3, 4), np.float32)}
    assert clip(gradients, 1.0) == 0
    assert not gradients["w"].any()


def test_threads_of_blas_change_no_bit_of_the_norm():
    g = np.random.default_rng(0).standard_normal(300_000)  # large enough for BLAS to share a sum
    norms = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            norms.append(clip({"w": g}, math.inf))
    assert norms[0] == norms[1] == norms[2]
