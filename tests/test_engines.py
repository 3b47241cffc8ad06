"""The page and the engines below it: they agree, can be watched and edited, and imports run one way."""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import SEEDS, draw_any_config, draw_ids, relative, round_bfloat16, trained_like
from hypothesis import given, settings

import qwen3np
from qwen3np import KVCache, forward, qwen3
from qwen3np.numerics import ENGINES, FLOAT32, FLOAT64, NUMERICS, named
from qwen3np.porting.points import point_names
from qwen3np.qwen3 import Scope
from qwen3np.rope import rotary_tables

PACKAGE = Path(qwen3np.__file__).parent
# Relative L2 between two orders of summation, over 300 drawn configs: measured 2.1e-15 and 1.3e-6; in bfloat16 single
# roundings tip, measured 1.5e-4 over whole logits.
TOLERANCE = {"float64": 3e-15, "float32": 3e-6, "bfloat16": 5e-3, "bfloat16-grouped": 5e-3}


@given(SEEDS)
@settings(max_examples=40)
def test_plain_and_fast_agree(seed):
    rng = np.random.default_rng(seed)
    config = draw_any_config(rng)
    weights, ids = trained_like(config, seed), draw_ids(rng, config, 2, 33)
    for numerics in NUMERICS:
        fast, plain = (forward(weights, config, ids, numerics=numerics, engine=name) for name in ("fast", "plain"))
        assert relative(plain, fast) < TOLERANCE[numerics]


def test_plain_reads_a_cache_of_ragged_sequences(config, weights):
    ids = draw_ids(np.random.default_rng(0), config, 2, 9)
    cache = KVCache.allocate(config, 2, 12, np.float64)
    options = {"numerics": "float64", "engine": "plain"}
    forward(weights, config, ids[:, :6], cache, **options)
    cache.lengths[:] = 6, 4
    logits = forward(weights, config, ids[:, 6:], cache, **options)
    for b, length in enumerate((6, 4)):
        text = np.concatenate([ids[b, :length], ids[b, 6:]])
        assert relative(logits[b], forward(weights, config, text, numerics="float64")[0, length:]) < 1e-14


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_every_engine_records_the_same_points(config, weights, engine):
    names, shapes = [], {}

    def look(name, x):
        names.append(name)
        shapes[name] = x.shape

    forward(weights, config, [[1, 2, 3], [4, 5, 6]], engine=engine, trace=look)
    assert names == point_names(config)
    assert shapes["model.layers.1.self_attn.scores"] == shapes["model.layers.1.self_attn.probs"] == (2, 6, 3, 3)
    assert shapes["model.layers.0.self_attn.q_rope"] == (2, 6, 3, 16)


def test_functions_take_plain_arrays_and_a_plain_dictionary(config):
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, 5, 40)), rng.standard_normal(40)
    expected = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(qwen3.rms_norm(x, weight, 1e-6, FLOAT64), expected, rtol=1e-14)
    assert qwen3.rms_norm(x.astype(np.float32), weight.astype(np.float32), 1e-6).dtype == np.float32

    shapes = {"gate_proj": (56, 40), "up_proj": (56, 40), "down_proj": (40, 56)}
    matrices = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    gate, up, down = matrices.values()
    g, u = x @ gate.T, x @ up.T
    np.testing.assert_allclose(qwen3.swiglu(x, matrices, FLOAT64), (g / (1 + np.exp(-g)) * u) @ down.T, rtol=1e-11)
    assert qwen3.swiglu(x.astype(np.float32), matrices).dtype == np.float32

    q = rng.standard_normal((1, 2, 5, 16))
    turned = qwen3.rotate(q, rotary_tables(config, np.arange(5)[None], FLOAT64), FLOAT64)
    angles = np.arange(5)[:, None] * config.rope_theta ** -(np.arange(0, 16, 2) / 16)
    expected = (q[..., :8] + 1j * q[..., 8:]) * np.exp(1j * angles)  # lanes as complex numbers
    np.testing.assert_allclose(turned[..., :8] + 1j * turned[..., 8:], expected, rtol=1e-12)
    assert qwen3.rotate(q.astype(np.float32), rotary_tables(config, np.arange(5)[None])).dtype == np.float32


@pytest.mark.parametrize("engine", ENGINES)
def test_softmax_and_silu_leave_their_argument_and_never_overflow(engine):
    ops = named("float32", engine).ops
    x = (20 * np.random.default_rng(0).standard_normal((3, 4, 50))).astype(np.float32)
    x[1, :, 7], x[2] = -np.inf, x[2] + 500
    far = np.array([-1e30, -1000, -3, 0, 3, 1000, 2**99], np.float32)
    copies = x.copy(), far.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probs, y = ops.softmax(x), ops.silu(far)
    exps = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    # x - max rounds in float32, which exp makes a relative error: at most 87 * 2**-24 before it underflows
    np.testing.assert_allclose(probs, exps / exps.sum(-1, keepdims=True), rtol=1e-5, atol=1e-37)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(y, far / (1 + np.exp(-far.astype(np.float64))), rtol=5e-7)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(far, copies[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_bfloat16_rounds_a_product_once_with_its_bias(engine, rows):
    """Small whole numbers, whose sums are exact in any order: the one rounding is all that can be seen."""
    rng, num, points = np.random.default_rng(rows), named("bfloat16", engine), {}
    x, a, b, bias = (rng.integers(-16, 17, n).astype(np.float32) for n in ((1, rows, 30), (70, 30), (9, 30), (70,)))
    wide = np.float32(1 + 2**-12)  # as weights stored in float32 are: bfloat16 does not have these numbers
    weights = {"of.a.weight": a * wide, "of.a.bias": bias * wide, "of.b.weight": b * wide, "of.b.bias": bias[:9]}
    m = Scope(weights, points.__setitem__, prefix="of.")
    found = num.ops.linear(x, m, ("a", "b"), num, True)
    truth = [round_bfloat16(x @ a.T + bias), round_bfloat16(x @ b.T + bias[:9])]
    for y, expected in zip([*found, points["of.a"], points["of.b"]], truth * 2, strict=True):
        np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(num.ops.linear(x, m, ("b",), num)[0], round_bfloat16(x @ b.T))
    np.testing.assert_array_equal(num.ops.head(x, a * wide, num), round_bfloat16(x @ a.T))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window", [None, 4])
def test_bfloat16_rounds_in_the_attention_of_ragged_sequences(engine, window):
    """From the exact products on, each step in float64 from the rounded one before."""
    rng, r, points, lengths = np.random.default_rng(2), round_bfloat16, {}, (9, 6)
    q = (rng.integers(-30, 31, (2, 4, 3, 6)) / 32).astype(np.float32)
    keys, values = ([(rng.integers(-30, 31, (2, n, 6)) / 8).astype(np.float32) for n in lengths] for _ in range(2))
    num, m = named("bfloat16", engine), Scope({}, points.__setitem__)
    context = num.ops.attend(q, keys, values, window, m, num)
    np.testing.assert_array_equal(num.ops.attend(q, keys, values, window, Scope({}), num), context)
    assert context.shape == (2, 3, 24)
    assert points["scores"].shape == points["probs"].shape == (2, 4, 3, 9)
    for b, n in enumerate(lengths):
        k, v = np.repeat(keys[b], 2, axis=0), np.repeat(values[b], 2, axis=0)
        at, past = np.arange(n - 3, n)[:, None], np.arange(9)
        hidden = (past > at) | (past <= at - (window or 9))
        scores, probs = points["scores"][b], points["probs"][b].astype(np.float64)
        truth = r(r(q[b] @ k.transpose(0, 2, 1)) * np.float32(6**-0.5))
        np.testing.assert_array_equal(scores, np.where(hidden, -np.inf, np.pad(truth, ((0, 0), (0, 0), (0, 9 - n)))))
        exps = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
        mixed = (probs[..., :n] @ v).transpose(1, 0, 2).reshape(3, 24)
        for x, exact in ((probs, exps / exps.sum(-1, keepdims=True)), (context[b], mixed)):
            assert np.mean(x != r(exact)) < 0.02  # a float32 ulp before it tips a rounding now and then


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_an_edit_that_returns_nothing_changes_no_bit(config, weights, engine, numerics):
    options = {"numerics": numerics, "engine": engine}
    logits = forward(weights, config, [3, 1, 4, 1, 5], **options)
    edited = forward(weights, config, [3, 1, 4, 1, 5], edit=lambda name, x: None, **options)
    np.testing.assert_array_equal(edited, logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_goes_on(config, weights, engine):
    """A point replaced by that of another prompt is what the trace shows and what goes on."""
    ids, other, seen = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3], {}
    truth = forward(weights, config, other, engine=engine, trace=seen.__setitem__)
    for name in ("model.embed_tokens", "model.layers.1", "model.norm"):  # all that follows depends on it alone
        edited = forward(
            weights, config, ids, engine=engine, edit=lambda at, x, name=name: seen[at] if at == name else None
        )
        np.testing.assert_array_equal(edited, truth)
    for point in ("scores", "probs"):  # context = probs v, with this prompt's values
        name, watched = f"model.layers.1.self_attn.{point}", {}
        edit = lambda at, x, name=name: seen[at] if at == name else None  # noqa: E731
        forward(weights, config, ids, engine=engine, edit=edit, trace=watched.__setitem__)
        np.testing.assert_array_equal(watched[name], seen[name])
        probs = seen["model.layers.1.self_attn.probs"].astype(np.float64)
        v = watched["model.layers.1.self_attn.v_proj"].reshape(1, 5, 2, 16).transpose(0, 2, 1, 3)
        context = (probs @ np.repeat(v, 3, axis=1)).transpose(0, 2, 1, 3).reshape(1, 5, -1)
        np.testing.assert_allclose(watched["model.layers.1.self_attn.context"], context, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_an_edit_of_any_point_moves_the_logits(config, engine, numerics):
    """Also one that changes the array it is given; and what bfloat16 computes from it is rounded as ever."""
    config = replace(config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=(0,))
    weights, ids, options = trained_like(config, 0), [[3, 1, 4], [1, 5, 9]], {"numerics": numerics, "engine": engine}
    before = {}
    logits = forward(weights, config, ids, trace=before.__setitem__, **options)

    def moved(x):
        return (x + 1) % config.num_experts if x.dtype.kind == "i" else np.roll(x, 1, axis=-1)

    for name in point_names(config):

        def edit(at, x, name=name):
            if at != name:
                return None
            if numerics == "float32":
                return moved(x)
            x[...] = moved(x)
            return x

        after = {}
        edited = forward(weights, config, ids, edit=edit, trace=after.__setitem__, **options)
        assert not np.array_equal(edited, logits), name
        np.testing.assert_array_equal(after[name], moved(before[name]))
        assert list(after) == list(before)
        for at, x in after.items():
            if numerics == "bfloat16" and x.dtype == np.float32:
                np.testing.assert_array_equal(x, np.where(np.isfinite(x), round_bfloat16(x), x), at)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_in_float64_goes_on_in_the_dtype_of_the_point(config, weights, engine):
    logits = forward(weights, config, [3, 1, 4], engine=engine)
    edited = forward(weights, config, [3, 1, 4], engine=engine, edit=lambda name, x: x.astype(np.float64))
    assert edited.dtype == np.float32
    np.testing.assert_array_equal(edited, logits)


def test_an_edit_of_another_shape_or_kind_is_refused(config, weights):
    for wrong in (lambda x: x[..., :1], lambda x: x.astype(complex)):
        with pytest.raises(ValueError, match=r"^edit: model.norm must stay float32 \(1, 2, 40\), but became "):
            forward(
                weights, config, [1, 2], edit=lambda name, x, wrong=wrong: wrong(x) if name == "model.norm" else None
            )


def test_an_edit_works_through_generate(config, weights):
    def likeliest_is_7(name, x):
        return np.where(np.arange(x.shape[-1]) == 7, x + 100, x) if name == "lm_head" else None

    new, _ = qwen3np.generate(weights, config, [1, 2], max_new_tokens=3, edit=likeliest_is_7, stop_ids=())
    assert new == [7, 7, 7]


def test_generate_computes_on_the_engine_that_is_asked_for(config, weights):
    new, cache = qwen3np.generate(weights, config, [1, 2], max_new_tokens=3, engine="plain")
    cache.reserve(8)
    with pytest.raises(ValueError, match="another engine"):
        forward(weights, config, new[-1:], cache)
    forward(weights, config, new[-1:], cache, engine="plain")


def test_unknown_names_are_refused(config, weights):
    with pytest.raises(ValueError, match="engine='slow' is unknown; known: fast, plain, exact"):
        forward(weights, config, [1], engine="slow")
    with pytest.raises(ValueError, match="numerics='float16' is unknown; known: float32, float64, bfloat16"):
        forward(weights, config, [1], numerics="float16")
    with pytest.raises(ValueError, match=r"float64.* has no exact engine"):
        forward(weights, config, [1], numerics="float64", engine="exact")


def test_a_cache_of_another_engine_is_refused(config, weights):
    cache = KVCache.allocate(config, 1, 8)
    forward(weights, config, [1, 2], cache)
    with pytest.raises(ValueError, match="another engine"):
        forward(weights, config, [3], cache, engine="plain")


def test_numerics_of_one_name_are_one_object():
    assert named("float32") is named("float32")
    assert FLOAT32.ops.__name__ == "qwen3np.ops.plain"
    assert named("bfloat16", "fast").ops.__name__ == "qwen3np.ops.fast"


# What reads top to bottom: a file imports only what stands above it. "." ends a package's name: all of its files.
ORDER = [
    *("errors", "terminal", "memory", "numerics", "stored", "rules", "config", "cache", "rope", "qwen3"),
    *("ops", "weights", "padding", "routing", "guard", "processors", "settings", "sampling", "drafts", "generate"),
    "scoring",
    *(
        "files.",
        "chat",
        "tokenizer",
        "gguf_tokenizer",
        "grammar",
        "files.checkpoint",
        "model",
        "loading",
        "embeddings",
        "conversation",
    ),
    *("harness", "verify", "published.", "porting.", "training.", "study.", "audit.", "serve.", "batches."),
    *("commands.", "cli", "__main__"),
]
# Imports inside a function that point down the list, each for a reason given there.
DOWNWARDS = {("config", "files.hf_config"), ("model", "embeddings")}


def modules():
    """Yield the name of each file of the package, and the files of the package that it imports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qwen3np":
                for alias in node.names:  # `from qwen3np.ops import plain` is the file ops/plain.py
                    inner = ".".join([*node.module.split(".")[1:], alias.name])
                    whole = ".".join(node.module.split(".")[1:])
                    is_file = (PACKAGE / (inner.replace(".", "/") + ".py")).exists()
                    found.add(inner if is_file else whole)
        yield name, found - {""}


def place(name):
    fitting = [entry for entry in ORDER if f"{name}.".startswith(f"{entry.rstrip('.')}.")]
    assert fitting, f"{name}.py has no place in the order of imports"
    return ORDER.index(max(fitting, key=len))


def test_imports_run_one_way():
    for name, imported in modules():
        if name not in ("", "__init__"):
            for other in imported - {o for n, o in DOWNWARDS if n == name}:
                assert place(other) <= place(name), f"{name} imports {other}"


def test_no_two_files_import_each_other():
    graph = {name: imported for name, imported in modules() if name not in ("", "__init__")}
    graph = {name: {o for o in others if (name, o) not in DOWNWARDS} for name, others in graph.items()}
    done = set()

    def visit(name, path):
        assert name not in path, f"a circle of imports: {' -> '.join([*path, name])}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_page_knows_no_engine_guard_or_file():
    assert dict(modules())["qwen3"] == {"cache", "config", "numerics", "rope"}
    assert dict(modules())["ops.plain"] == {"numerics", "ops.elementary", "qwen3"}


def test_what_a_student_reads_stays_short():
    most = {"qwen3": 250, "ops/plain": 80, "config": 90, "cache": 100, "rope": 90, "numerics": 90}
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in most}
    assert {name: n for name, n in lines.items() if n > most[name]} == {}
    assert sum(lines.values()) <= 700
