"""The backward pass, against finite differences in float64, properties of its parts, and torch's autograd."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from drawing import SEEDS, attended, draw_config, draw_ids, linear, relative, trained_like
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from qwen3np import forward
from qwen3np.config import Yarn
from qwen3np.numerics import BFLOAT16, named
from qwen3np.ops.plain import silu
from qwen3np.qwen3 import rms_norm, rotate
from qwen3np.rope import rotary_tables
from qwen3np.training import gradients as backward
from qwen3np.training.gradients import loss_and_gradients
from qwen3np.weights import weight_shapes

FLOAT64 = named("float64")
STEP = 1e-3
LIMIT = 5e-9  # relative error of a gradient against finite differences: measured at most 3.1e-9, median 7e-11


def draw(seed, *, rows=3, length=7, layers=2):
    """Draw float32 weights, a config, ids, targets and a mask, whose row 1 counts nothing."""
    rng = np.random.default_rng(seed)
    config = replace(draw_config(rng), num_hidden_layers=layers)
    ids, targets = draw_ids(rng, config, rows, length), draw_ids(rng, config, rows, length)
    ids[:, length // 2] = ids[:, 0]  # an id that comes twice, so that its gradients must add up
    mask = rng.random(ids.shape) < 0.5
    mask[0, -1], mask[1] = True, False
    return trained_like(config, seed), config, ids, targets, mask


def mean_cross_entropy(weights, config, ids, targets, mask):
    """Return the loss in float64, written plainly."""
    logits = forward(weights, config, ids, numerics="float64")[mask]
    largest = logits.max(axis=1)
    log_sums = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
    return np.mean(log_sums - logits[np.arange(len(logits)), targets[mask]])


def error_of(gradient, f, x, rng):
    """Return an estimate of the relative L2 error of the gradient of f at x.

    Along a direction d of independent normal numbers the derivative is missed by <error, d>, which is as large as
    |error| (its expected square is |error|²). The derivative comes from central differences of fourth order.
    """
    direction = rng.standard_normal(x.shape)
    step = STEP / np.linalg.norm(direction)
    near, far = (f(x + n * step * direction) - f(x - n * step * direction) for n in (1, 2))
    assert gradient.shape == x.shape
    return abs((8 * near - far) / (12 * step) - np.vdot(gradient, direction)) / np.linalg.norm(gradient)


def agree(gradients, others, limit):
    """Whether every gradient is that of the other, to this relative L2 distance."""
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, others[name]) <= limit, name


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@given(SEEDS)
@settings(max_examples=3)
def test_every_gradient_is_the_derivative_of_the_loss(tied, bias, seed):
    rng = np.random.default_rng(seed)
    _, config, ids, targets, mask = draw(seed)
    config = replace(config, tie_word_embeddings=tied, attention_bias=bias)
    config = replace(config, rope_scaling=Yarn(4.0, 64) if tied else None, sliding_window=3 if bias else None)
    weights = {name: w.astype(np.float64) for name, w in trained_like(config, seed).items()}
    loss, gradients = loss_and_gradients(weights, config, ids, targets, mask, numerics="float64")
    assert isinstance(loss, float)
    assert loss == pytest.approx(mean_cross_entropy(weights, config, ids, targets, mask), rel=1e-14)
    assert gradients.keys() == weight_shapes(config).keys()
    errors = {}
    for name, w in weights.items():

        def moved(x, name=name):
            return mean_cross_entropy(weights | {name: x}, config, ids, targets, mask)

        assert gradients[name].dtype == np.float64
        errors[name] = error_of(gradients[name], moved, w, rng)
        assert errors[name] <= LIMIT, name
    print(f"\n{len(errors)} gradients, relative error at most {max(errors.values()):.1e}")


@given(SEEDS)
@settings(max_examples=5)
def test_float32_is_as_near_to_float64_as_float32_allows(seed):
    batch = draw(seed, length=60)
    loss, gradients = loss_and_gradients(*batch)
    truth, others = loss_and_gradients(*batch, numerics="float64")
    assert loss == pytest.approx(truth, rel=1e-6)
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}
    agree(gradients, others, 1e-5)  # measured 5e-6


@given(SEEDS)
@settings(max_examples=5)
def test_a_batch_is_the_mean_of_its_rows_by_what_they_count(seed):
    weights, config, ids, targets, mask = draw(seed, rows=10)
    mask[:5] = False  # five rows in a line, the first ones, that count nothing
    mask[5:, -1] = True
    loss, gradients = loss_and_gradients(weights, config, ids, targets, mask, numerics="float64")
    sums = dict.fromkeys(gradients, 0)
    total = 0.0
    for b in range(5, 10):
        part, of_row = loss_and_gradients(
            weights, config, ids[b : b + 1], targets[b : b + 1], mask[b : b + 1], numerics="float64"
        )
        share = np.count_nonzero(mask[b]) / np.count_nonzero(mask)
        total += share * part
        sums = {name: sums[name] + share * gradient for name, gradient in of_row.items()}
    assert loss == pytest.approx(total, rel=1e-14)
    agree(gradients, sums, 2e-14)  # measured 4e-15


@given(SEEDS)
@settings(max_examples=5)
def test_what_does_not_count_changes_nothing(seed):
    weights, config, ids, targets, mask = draw(seed)
    mask[:, -2:] = False
    mask[0, -3] = True
    loss, gradients = loss_and_gradients(weights, config, ids, targets, mask, numerics="float64")
    other_targets = np.where(mask, targets, (targets + 1) % config.vocab_size)
    ids[1] = ids[1, ::-1]  # the row that counts nothing
    ids[:, -2:] = (ids[:, -2:] + 1) % config.vocab_size  # nothing at or after these positions counts
    other, others = loss_and_gradients(weights, config, ids, other_targets, mask.astype(int), numerics="float64")
    assert other == loss
    agree(others, gradients, 1e-14)  # measured: the same bits


@given(SEEDS)
@settings(max_examples=5)
def test_embedding_and_head(seed):
    _, config, ids, targets, mask = draw(seed)
    config = replace(config, tie_word_embeddings=False)
    weights = trained_like(config, seed)
    _, gradients = loss_and_gradients(weights, config, ids, targets, mask, numerics="float64")
    head, embedding = gradients["lm_head.weight"], gradients["model.embed_tokens.weight"]
    assert np.abs(head.sum(axis=0)).max() <= 1e-14 * np.abs(head).sum(axis=0).max()  # softmax ignores a shift
    seen = [
        i for row, counts in zip(ids, mask, strict=True) if counts.any() for i in row[: np.flatnonzero(counts)[-1] + 1]
    ]
    np.testing.assert_array_equal(np.flatnonzero(embedding.any(axis=1)), np.unique(seen))
    tied = replace(config, tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _, gradients = loss_and_gradients(weights, config, ids, targets, mask, numerics="float64")
    del weights["lm_head.weight"]
    _, both = loss_and_gradients(weights, tied, ids, targets, mask, numerics="float64")
    gradients["model.embed_tokens.weight"] += gradients.pop("lm_head.weight")
    agree(both, gradients, 1e-15)  # measured 8e-17


def test_the_config_alone_says_which_weights_there_are(config):
    weights = trained_like(replace(config, attention_bias=True), 0)
    tied = replace(config, tie_word_embeddings=True)
    ids = draw_ids(np.random.default_rng(0), config, 2, 5)
    _, gradients = loss_and_gradients(weights, tied, ids, ids, np.ones_like(ids))
    assert gradients.keys() == weight_shapes(tied).keys()


@pytest.mark.parametrize("numerics", ["float32", "float64"])
def test_bits_depend_neither_on_threads_nor_on_how_weights_are_stored(config, weights, numerics, monkeypatch):
    monkeypatch.setattr("qwen3np.ops.fast.threads.WORTH_SHARING", 1)  # small as the model is, share everything
    rng = np.random.default_rng(1)
    ids, targets = draw_ids(rng, config, 10, 17), draw_ids(rng, config, 10, 17)
    mask = rng.random(ids.shape) < 0.7
    stored = {name: w.astype(BFLOAT16) for name, w in weights.items()}
    copied = {name: w.astype(np.float32) for name, w in stored.items()}
    runs = []
    for threads, w in ((1, copied), (2, copied), (3, copied), (2, stored)):
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", str(threads))
        runs.append(loss_and_gradients(w, config, ids, targets, mask, numerics=numerics))
    for loss, gradients in runs[1:]:
        assert loss == runs[0][0]
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, runs[0][1][name], name)


GOOD = np.arange(10).reshape(2, 5)
BAD = [  # config.vocab_size is 101
    ({"mask": np.zeros((2, 5), bool)}, "mask: .*no position"),
    ({"mask": np.ones((2, 4), bool)}, r"mask.*\(2, 4\).*shape"),
    ({"mask": np.ones((2, 1), bool)}, r"mask.*\(2, 1\).*shape"),
    ({"targets": GOOD[:, 1:]}, r"targets.*\(2, 4\).*shape"),
    ({"targets": GOOD[:1]}, r"targets.*\(1, 5\).*shape"),
    ({"targets": GOOD + 92}, r"^targets: .*101 at row 1, position 4.*0 to 100"),
    ({"targets": GOOD - 1}, r"^targets: .*-1 at row 0, position 0.*0 to 100"),
    ({"targets": GOOD / 2}, "^targets: .*float64.*integers"),
    ({"input_ids": GOOD + 92}, r"^input_ids: .*101 at row 1, position 4.*0 to 100"),
    ({"input_ids": GOOD[:, :0]}, "^input_ids: empty"),
    ({"numerics": "bfloat16"}, "numerics='bfloat16'.*float32.*float64"),
    ({"numerics": "float16"}, "numerics='float16'.*float32.*float64"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_input_is_refused(config, weights, changed, message):
    arguments = {"input_ids": GOOD, "targets": GOOD, "mask": np.ones(GOOD.shape, bool)}
    loss_and_gradients(weights, config, **arguments)
    with pytest.raises(ValueError, match=message):
        loss_and_gradients(weights, config, **(arguments | changed))


def test_experts_are_refused(config, weights):
    sparse = replace(config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    with pytest.raises(ValueError, match="num_experts = 4: gradients are computed for dense models only"):
        loss_and_gradients(weights, sparse, GOOD, GOOD, np.ones(GOOD.shape, bool))


# --- the steps --------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 4))
def test_linear_backward(seed, inputs):
    rng = np.random.default_rng(seed)
    x, w, dy = (rng.standard_normal(shape) for shape in ((2, 3, inputs), (5, inputs), (2, 3, 5)))
    dx, dw = backward.linear_backward(dy, x, w)
    assert error_of(dx, lambda x: np.vdot(dy, linear(x, w, None, FLOAT64)), x, rng) <= LIMIT
    assert error_of(dw, lambda w: np.vdot(dy, linear(x, w, None, FLOAT64)), w, rng) <= LIMIT


@given(SEEDS, st.integers(2, 40), st.sampled_from([1e-200, 1e-6, 0.1]))
def test_rms_norm_backward(seed, n, eps):
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 2, 3, n))
    weight = np.exp(rng.standard_normal(n))
    dx, dweight = backward.rms_norm_backward(dy, x, weight, eps)
    assert error_of(dx, lambda x: np.vdot(dy, rms_norm(x, weight, eps, FLOAT64)), x, rng) <= LIMIT
    assert error_of(dweight, lambda w: np.vdot(dy, rms_norm(x, w, eps, FLOAT64)), weight, rng) <= LIMIT
    if eps == 1e-200:  # a norm does not see how long x is
        across = np.sum(dx * x, axis=-1) / np.linalg.norm(dx, axis=-1) / np.linalg.norm(x, axis=-1)
        assert np.abs(across).max() <= 1e-12


@given(SEEDS)
def test_rotate_backward_turns_back(seed):
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    tables = rotary_tables(config, rng.integers(0, 1000, (2, 5)), FLOAT64)
    x, dy = rng.standard_normal((2, 2, 3, 5, config.head_dim))
    np.testing.assert_allclose(backward.rotate_backward(rotate(x, tables, FLOAT64), tables, FLOAT64), x, atol=1e-14)
    dx = backward.rotate_backward(dy, tables, FLOAT64)
    np.testing.assert_allclose(np.linalg.norm(dx, axis=-1), np.linalg.norm(dy, axis=-1), rtol=1e-14)
    assert np.vdot(dx, x) == pytest.approx(np.vdot(dy, rotate(x, tables, FLOAT64)), abs=1e-12)


@given(SEEDS, st.integers(1, 3), st.integers(1, 4))
def test_attend_backward(seed, kv_heads, groups):
    rng = np.random.default_rng(seed)
    rows, length, dh = 2, 6, 4
    q = rng.standard_normal((rows, kv_heads * groups, length, dh))
    k, v = rng.standard_normal((2, rows, kv_heads, length, dh))
    dcontext = rng.standard_normal((rows, length, kv_heads * groups * dh))

    def plain(q, k, v):
        context, _, probs = zip(*(attended(*row, FLOAT64) for row in zip(q, k, v, strict=True)), strict=True)
        return np.stack(context), np.stack(probs)

    def through(dcontext):
        context, probs = plain(q, k, v)
        return backward.attend_backward(dcontext, q, k, v, probs, context)

    dq, dk, dv = through(dcontext)
    assert error_of(dq, lambda q: np.vdot(dcontext, plain(q, k, v)[0]), q, rng) <= LIMIT
    assert error_of(dk, lambda k: np.vdot(dcontext, plain(q, k, v)[0]), k, rng) <= LIMIT
    assert error_of(dv, lambda v: np.vdot(dcontext, plain(q, k, v)[0]), v, rng) <= LIMIT
    # what is the same for all keys moves all scores of a query alike, which softmax ignores
    np.testing.assert_allclose(dk.sum(axis=2), 0, atol=1e-13)
    np.testing.assert_allclose(dq[:, :, 0], 0, atol=1e-14)  # one key alone has probability 1
    dcontext[:, 3:] = 0  # positions after the last that counts get nothing
    assert not any(d[:, :, 3:].any() for d in through(dcontext))


@given(SEEDS)
def test_swiglu_backward(seed):
    rng = np.random.default_rng(seed)
    gate, up, dact = 3 * rng.standard_normal((3, 2, 3, 5))
    dgate, dup = backward.swiglu_backward(dact, gate, up)
    assert error_of(dgate, lambda gate: np.vdot(dact, silu(gate) * up), gate, rng) <= LIMIT
    assert error_of(dup, lambda up: np.vdot(dact, silu(gate) * up), up, rng) <= LIMIT


@pytest.mark.filterwarnings("error")
def test_swiglu_backward_far_from_zero():
    gate = np.array([-1000, -100, 100, 1000], np.float32)
    dgate, dup = backward.swiglu_backward(np.ones_like(gate), gate, np.full_like(gate, 2))
    np.testing.assert_allclose(dgate, [0, 0, 2, 2], atol=1e-35)
    np.testing.assert_allclose(dup, [0, 0, 100, 1000], atol=1e-35)


@given(SEEDS, st.integers(2, 30))
def test_cross_entropy(seed, vocabulary):
    rng = np.random.default_rng(seed)
    logits, targets = 3 * rng.standard_normal((4, vocabulary)), rng.integers(0, vocabulary, 4)
    before = logits.copy()
    loss, dlogits = backward.cross_entropy(logits, targets)
    np.testing.assert_array_equal(logits, before)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[range(4), targets]).sum(), rel=1e-13)
    assert error_of(dlogits, lambda x: backward.cross_entropy(x, targets)[0], logits, rng) <= LIMIT
    np.testing.assert_allclose(dlogits.sum(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(np.abs(dlogits).sum(axis=1), 2 - 2 * p[range(4), targets], atol=1e-14)


@pytest.mark.filterwarnings("error")
def test_cross_entropy_of_large_logits():
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0]], np.float32)
    loss, dlogits = backward.cross_entropy(logits, np.array([0, 1]))
    assert loss == 2e4
    np.testing.assert_array_equal(dlogits, [[0, 0, 0], [1, -1, 0]])


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    module = pytest.importorskip("oracle", reason="needs the extra: pip install qwen3np[oracle]")
    with threadpool_limits(1):  # models this small only lose time to more
        yield module


def autograd(oracle, weights, config, ids, targets, mask, numerics):
    """Return the loss and the gradients that torch gives for transformers' model, wholly in this precision."""
    with oracle.Float64() if numerics == "float64" else nullcontext():
        model = oracle.model_of(config, weights, numerics)
        ids, targets, mask = map(oracle.torch.from_numpy, (ids, targets, mask))
        loss = oracle.torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[mask], targets[mask])
        loss.backward()
    return loss.item(), {name: oracle.array(p.grad) for name, p in model.named_parameters()}


@pytest.mark.oracle
def test_gradients_are_those_of_autograd(oracle):
    figures = []
    losses = []
    for seed in range(20):
        batch = draw(seed, length=int(np.random.default_rng(seed).integers(8, 129)), layers=1 + seed % 4)
        (loss, ours), (loss64, ours64) = (loss_and_gradients(*batch, numerics=n) for n in ("float32", "float64"))
        (their_loss, theirs), (their_loss64, theirs64) = (autograd(oracle, *batch, n) for n in ("float32", "float64"))
        losses.append((abs(loss / their_loss - 1), abs(loss64 / their_loss64 - 1)))
        assert ours.keys() == theirs.keys()
        figures += [
            (
                relative(ours[name], theirs[name]),
                relative(ours64[name], truth),
                relative(ours[name], truth),
                relative(theirs[name], truth),
            )
            for name, truth in theirs64.items()
        ]
    apart, truths, error, their_error = np.array(figures).T
    (loss, loss64), nearer = np.max(losses, axis=0), np.mean(error < their_error)
    print(f"\n20 drawn models, {len(apart)} gradients, relative L2")
    for name, x in (
        ("ours and torch's, float32", apart),
        ("ours and torch's, float64", truths),
        ("ours float32 from float64", error),
        ("torch's float32 from float64", their_error),
        ("error, ours / torch's", error / their_error),
    ):
        print(f"{name:30} max {x.max():.2e}  median {np.median(x):.2e}")
    print(f"ours is nearer to float64 in {nearer:.0%}; losses apart by {loss:.1e}, in float64 by {loss64:.1e}")
    assert loss <= 1e-6
    assert loss64 <= 1e-14
    assert apart.max() <= 1e-5  # measured 5e-6
    assert np.median(error / their_error) <= 1.1  # measured 0.99
    assert truths.max() <= 5e-14  # measured 1.3e-14
