"""Every number, against transformers' own eager Qwen3. `pytest -m oracle -s` prints the figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drawing import attended, draw_any_config, draw_ids, linear, relative, round_bfloat16, trained_like
from threadpoolctl import threadpool_limits

from qwen3np import Config, KVCache, forward, read_checkpoint, save_checkpoint
from qwen3np.numerics import BFLOAT16, named
from qwen3np.ops.plain import silu, softmax
from qwen3np.qwen3 import Scope, rms_norm, rotate, router_weights, swiglu, top_k
from qwen3np.rope import attention_factor, inverse_frequencies, rotary_tables

pytestmark = pytest.mark.oracle
STEPS = 8
N = named("bfloat16")


@pytest.fixture(scope="module")
def oracle():
    module = pytest.importorskip("oracle", reason="needs the extra: pip install qwen3np[oracle]")
    with threadpool_limits(1):  # models this small only lose time to more
        yield module


def prefill_and_decode(weights, config, ids, numerics):
    """Return the logits (B, S, V) when the last STEPS of the S ids are fed one by one, through a KVCache."""
    cache = KVCache.allocate(config, len(ids), ids.shape[1])
    parts = np.split(ids, range(ids.shape[1] - STEPS, ids.shape[1]), axis=1)
    return np.concatenate([forward(weights, config, part, cache, numerics=numerics) for part in parts], axis=1)


@pytest.fixture(scope="module")
def drawn(oracle):
    """Figures of 100 drawn models, as arrays: see the tests that follow."""
    figures = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        weights = trained_like(config, seed)
        prompt = 504 if seed % 4 == 0 else int(rng.integers(65, 257))  # longer than each window
        ids = draw_ids(rng, config, 1, prompt + STEPS)
        ours = prefill_and_decode(weights, config, ids, "float32")
        theirs = oracle.prefill_and_decode(oracle.model_of(config, weights), ids, STEPS)
        truth = forward(weights, config, ids, numerics="float64")
        with oracle.Float64():
            their_truth = oracle.run(oracle.model_of(config, weights, "float64"), ids)
        figures.append(
            {
                "prefill": relative(ours[:, :prompt], theirs[:, :prompt]),
                "decode": relative(ours[:, prompt:], theirs[:, prompt:]),
                "step": max(relative(ours[:, i], theirs[:, i]) for i in range(prompt, prompt + STEPS)),
                "their steps": max(relative(theirs[:, i], truth[:, i]) for i in range(prompt, prompt + STEPS)),
                "yarn": config.rope_scaling is not None,
                "error ratio": relative(ours, truth) / relative(theirs, truth),
                "float64": relative(truth, their_truth),
            }
        )
    return {key: np.array([row[key] for row in figures]) for key in figures[0]}


def test_float32(drawn):
    prefill, decode, step, ratio = (drawn[key] for key in ("prefill", "decode", "step", "error ratio"))
    print(f"\n{len(prefill)} drawn models, float32 logits, relative L2 against transformers float32 eager")
    print(f"prefill           max {prefill.max():.2e}  median {np.median(prefill):.2e}")
    print(f"{STEPS} decode steps    max {decode.max():.2e}  median {np.median(decode):.2e}")
    for kind, of in (("without YaRN", ~drawn["yarn"]), ("with YaRN", drawn["yarn"])):
        theirs = drawn["their steps"][of].max()
        print(f"the worst of them {kind}: {step[of].max():.2e}; transformers itself from float64: {theirs:.2e}")
    print(f"error against float64, ours / theirs: max {ratio.max():.3f}  median {np.median(ratio):.3f}")
    assert prefill.max() <= 3e-6
    assert decode.max() <= 3e-6
    assert step[~drawn["yarn"]].max() <= 3e-6
    assert step.max() <= 6e-6  # measured 3.5e-6: YaRN makes attention sharper, so that what float32 loses counts more
    assert ratio.max() <= 1.5


def test_float64(drawn):
    """With its casts to float32 made casts to float64, transformers gives our float64 logits."""
    worst = drawn["float64"].max()
    print(f"\nfloat64 logits, relative L2 against transformers wholly in float64: max {worst:.2e}")
    assert worst <= 2e-14  # measured 3e-15 to 9e-15


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoints_go_both_ways(oracle, tmp_path, dtype):
    """Ours as transformers reads it, and its own as we read it: names, spellings of the config, experts one by one."""
    from transformers import AutoModel, AutoModelForCausalLM

    kinds = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        stored = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        weights = {name: w.astype(stored) for name, w in trained_like(config, seed).items()}
        ids = draw_ids(rng, config, 1, 80)
        logits = forward(weights, config, ids)
        ours, theirs, bare = (tmp_path / f"{name}{seed}" for name in ("ours", "theirs", "bare"))
        save_checkpoint(ours, config, weights)
        read = {"dtype": "float32", "attn_implementation": "eager"}
        read |= {"experts_implementation": "eager"} if config.num_experts else {}
        model = AutoModelForCausalLM.from_pretrained(ours, **read).eval()
        assert relative(oracle.run(model, ids), logits) <= 3e-6

        AutoModelForCausalLM.from_pretrained(ours).save_pretrained(theirs)
        again, found = read_checkpoint(theirs)
        assert {w.dtype for w in found.values()} == {stored}
        np.testing.assert_array_equal(forward(found, again, ids), logits)
        AutoModel.from_pretrained(ours).save_pretrained(bare)  # without the head, and without "model."
        if config.tie_word_embeddings:
            again, found = read_checkpoint(bare)
            np.testing.assert_array_equal(forward(found, again, ids), logits)
        kinds.add((config.num_experts > 0, config.sliding_window is not None, config.rope_scaling is not None))
    assert len(kinds) >= 5


def test_rotary_tables(oracle):
    """Inverse frequencies are transformers', but for a few an ulp away: torch's float32 power is not exact."""
    torch, modeling = oracle.torch, oracle.modeling_qwen3

    def rotary(config):
        return modeling.Qwen3RotaryEmbedding(oracle.Qwen3Config(**config.to_dict()))

    configs = [draw_any_config(np.random.default_rng(seed)) for seed in range(400)]
    away = np.abs(np.concatenate([ulps(inverse_frequencies(c), rotary(c).inv_freq.numpy()) for c in configs]))
    print(f"\ninverse frequencies of {len(configs)} drawn configs: {np.count_nonzero(away)} of {len(away)} differ")
    assert away.max() <= 1
    assert np.count_nonzero(away) <= 0.02 * len(away)  # measured 1 of 2,704; 1.1 % where heads are as large as 128
    for config in configs:
        assert attention_factor(config) == rotary(config).attention_scaling

    plain = replace(MODELS["tied"], max_position_embeddings=32_768)
    cases = {f"theta {theta:.0e}": replace(plain, rope_theta=theta) for theta in (1e6, 5e6, 1e7)}  # the released ones
    cases["theta 1e+06, YaRN 4"] = plain.extended(4)
    for name, config in cases.items():
        module, end = rotary(config), 262_144
        lanes = np.flatnonzero(inverse_frequencies(config) != module.inv_freq.numpy())
        assert len(lanes) <= 1
        print(f"{name}, head_dim 128: lanes {lanes} of 64; in the others, to position {end - 1:,}:")
        for dtype in ("float32", "bfloat16"):
            count, most = 0, 0.0
            for start in range(0, end, 16_384):
                positions = np.arange(start, start + 16_384)[None]
                theirs = module(torch.zeros(1, dtype=getattr(torch, dtype)), torch.from_numpy(positions))
                for ours, table in zip(rotary_tables(config, positions, named(dtype)), theirs, strict=True):
                    error = np.abs(np.delete(ours[0, 0] - oracle.array(table)[0, :, :64], lanes, axis=1))
                    count, most = count + np.count_nonzero(error), max(most, error.max())
            share = count / (2 * end * (64 - len(lanes)))
            print(f"  {dtype}: {share:.1e} of the entries differ, by {most:.1e} at most")
            # torch's float32 cosine and sine are an ulp off now and then; a bfloat16 tie then falls the other way
            ulp = 2 ** (-24 if dtype == "float32" else -8)
            assert most <= ulp * (2 if config.rope_scaling else 1)  # with YaRN entries are larger than 1
            assert share <= (0.1 if dtype == "float32" else 1e-5)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


MODELS = {
    # head_dim ** -0.5 is not a power of two, so that the rounding of the scaled scores shows
    "tied": Config(
        vocab_size=2000,
        hidden_size=192,
        intermediate_size=520,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    "untied_bias": Config(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=700,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=160,
        rope_theta=5e6,
        rms_norm_eps=1e-5,
        attention_bias=True,
    ),
}
# the rest of the family: a sparse layer and a dense one, YaRN, windows shorter than the prompt
MODELS["experts"] = replace(
    MODELS["tied"].extended(4),
    sliding_window=40,
    num_experts=16,
    num_experts_per_tok=6,
    moe_intermediate_size=96,
    norm_topk_prob=True,
    mlp_only_layers=(0,),
)
MODELS["windows"] = replace(
    MODELS["untied_bias"], sliding_window=33, layer_types=("sliding_attention", "full_attention")
)


def ulps(x, y):
    """Return how many float32 numbers lie between positive ones."""
    return x.view(np.int32).astype(np.int64) - y.view(np.int32)


def bfloat16_weights(config, seed):
    return {name: w.astype(BFLOAT16) for name, w in trained_like(config, seed).items()}


def steps(x):
    """Number bfloat16 values (and nothing finer) in their order, so that neighbours differ by 1."""
    rounded = x.astype(BFLOAT16)
    np.testing.assert_array_equal(rounded.astype(np.float32), x)
    bits = rounded.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def each_from_theirs(theirs, weights, config, ids, start, numerics=N):
    """Yield (kind, name, our value, theirs): each point by our function, from transformers' own inputs to it."""

    def project(name, x):
        y = linear(theirs[x], weights[f"{name}.weight"], weights.get(f"{name}.bias"), N)
        return "matrix product", name, y, theirs[name]

    def normalise(name, x):
        x = theirs[x].reshape(theirs[name].shape)
        y = rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps, N)
        return "norm", name, y, theirs[name]

    def elementwise(name, y):
        return "elementwise", name, y, theirs[name]

    x = "model.embed_tokens"
    yield elementwise(x, N.widen(weights[f"{x}.weight"][ids]))
    tables = rotary_tables(config, np.broadcast_to(start + np.arange(ids.shape[1]), ids.shape), N)
    for layer in range(config.num_hidden_layers):
        at, attn, mlp = (f"model.layers.{layer}{part}" for part in ("", ".self_attn.", ".mlp."))
        yield normalise(f"{at}.input_layernorm", x)
        yield from (project(f"{attn}{name}_proj", f"{at}.input_layernorm") for name in "qkv")
        for name in "qk":
            yield normalise(f"{attn}{name}_norm", f"{attn}{name}_proj")
            yield elementwise(f"{attn}{name}_rope", rotate(np.swapaxes(theirs[f"{attn}{name}_norm"], 1, 2), tables, N))

        q, k, v = (theirs[attn + name] for name in ("q_rope", "keys", "values"))
        visible, window = np.isfinite(theirs[f"{attn}scores"]), config.window(layer)
        _, scores, _ = each_attended(q, k, v, window)
        np.testing.assert_array_equal(np.isfinite(scores), visible)
        yield "scaled product", f"{attn}scores", scores[visible], theirs[f"{attn}scores"][visible]
        # With the identity as keys, the product inside attend is its queries: here transformers' product, unchanged.
        q = np.pad(theirs[f"{attn}product"], [(0, 0)] * 3 + [(0, config.head_dim - k.shape[2])])
        context, scores, probs = each_attended(q, np.broadcast_to(np.eye(*k.shape[2:]), k.shape), v, window)
        yield elementwise(f"{attn}scores", scores)
        yield "softmax", f"{attn}probs", probs[visible], theirs[f"{attn}probs"][visible]
        fed = np.swapaxes((probs == theirs[f"{attn}probs"]).all(-1), 1, 2)  # (B, S, H): where V met the same numbers
        context, truth = (y.reshape(*fed.shape, -1)[fed] for y in (context, theirs[f"{attn}context"]))
        yield "matrix product", f"{attn}context", context, truth

        yield project(f"{attn}o_proj", f"{attn}context")
        yield elementwise(f"{at}.attn_residual", N.round(theirs[x] + theirs[f"{attn}o_proj"]))
        yield normalise(f"{at}.post_attention_layernorm", f"{at}.attn_residual")
        if config.is_sparse(layer):
            yield from each_of_experts(theirs, weights, config, f"{at}.post_attention_layernorm", mlp, numerics)
        else:
            yield from (project(f"{mlp}{name}_proj", f"{at}.post_attention_layernorm") for name in ("gate", "up"))
            yield elementwise(f"{mlp}act", activation(theirs[f"{mlp}gate_proj"], theirs[f"{mlp}up_proj"]))
            yield project(f"{mlp}down_proj", f"{mlp}act")
        fed = theirs[f"{mlp}experts" if config.is_sparse(layer) else f"{mlp}down_proj"]
        yield elementwise(at, N.round(theirs[f"{at}.attn_residual"] + fed))
        x = at
    yield normalise("model.norm", x)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    yield "matrix product", "lm_head", linear(theirs["model.norm"], head, None, N), theirs["lm_head"]


def each_of_experts(theirs, weights, config, name, mlp, numerics):
    """The same for a sparse layer; name is that of its input."""
    x, logits, indices = theirs[name], theirs[f"{mlp}gate"], theirs[f"{mlp}router_indices"].astype(int)
    yield "matrix product", f"{mlp}gate", linear(x, weights[f"{mlp}gate.weight"], None, N), logits
    ours = top_k(softmax(logits), config.num_experts_per_tok)
    shares = router_weights(softmax(logits), ours, config, N)
    yield "softmax", f"{mlp}router_weights", shares, theirs[f"{mlp}router_weights"]
    # where two logits are equal in bfloat16 torch may choose either, or both in another order
    largest = -np.sort(-logits, axis=-1)[..., : config.num_experts_per_tok + 1]
    distinct = np.all(np.diff(largest) < 0, axis=-1)
    yield "elementwise", f"{mlp}router_indices", ours[distinct].astype(float), indices[distinct].astype(float)
    np.testing.assert_array_equal(np.take_along_axis(logits, ours, -1), np.take_along_axis(logits, indices, -1))
    y = experts(x, weights, f"{mlp}experts.", indices, theirs[f"{mlp}router_weights"], numerics)
    yield "experts", f"{mlp}experts", y, theirs[f"{mlp}experts"]


def experts(x, weights, prefix, indices, shares, num):
    """Return the sum of each token's experts, whose weights stand under this prefix."""
    m = Scope(weights, prefix=prefix)
    return num.ops.combine(x, indices, shares, lambda n, rows: swiglu(rows, m / str(n), num), m, num)


def each_attended(q, k, v, window):
    """Return contexts, scores and probabilities of a batch."""
    sequences = zip(q, k, v, strict=True)
    return [np.stack(y) for y in zip(*(attended(*sequence, N, window) for sequence in sequences), strict=True)]


def activation(gate, up):
    """Return silu(gate) * up by our swiglu, whose matrices take gate and up apart and change nothing."""
    size = gate.shape[-1]
    gate_proj, up_proj = np.split(np.eye(2 * size, dtype=np.float32), 2)
    matrices = {"gate_proj.weight": gate_proj, "up_proj.weight": up_proj, "down_proj.weight": np.eye(size)}
    return swiglu(np.concatenate((gate, up), -1), matrices, N)


@pytest.mark.parametrize(("name", "how"), [*((name, "eager") for name in MODELS), ("experts", "grouped_mm")])
def test_bfloat16_steps(oracle, name, how):
    """A prefill and decode steps, each step of the arithmetic fed transformers' own input to it."""
    numerics = named("bfloat16" if how == "eager" else "bfloat16-grouped")
    config, weights = MODELS[name], bfloat16_weights(MODELS[name], 0)
    ids = draw_ids(np.random.default_rng(0), config, 2, config.head_dim)
    points = []
    oracle.prefill_and_decode(oracle.model_of(config, weights, "bfloat16", how), ids, STEPS, points)

    # A sum that cancels keeps the float32 noise of its terms, which can be many steps of the small result.
    noise = 5e-7  # measured 1.2e-7
    limits = {  # the share of the elements that may differ; by how many steps, or by what part of the largest
        "elementwise": (0, 0, 0),
        "matrix product": (5e-4, 1, noise),  # another order of summation: measured 5e-5
        # the same: 3e-5; scaling moves the leading digits and can make two steps of one
        "scaled product": (5e-4, 2, noise),
        "norm": (5e-5, 2, noise),  # a float32 mean, likewise: 6e-6; the weight can make two steps of one
        "softmax": (1e-4, 1, noise),  # a float32 sum, likewise, and another exp: 1.2e-5 to 4.2e-5
        # three products with a rounding behind each, of which one that falls the other way moves the sum by up to half
        # a step of its largest term: measured 2e-5 to 1.4e-3, and 1.3e-3 of the largest, with each of oneDNN's kernels
        # (AVX2, AVX-512, AVX-512 with bfloat16, AMX); one rounding less would change a quarter of the elements
        "experts": (3e-3, 2, 2**-9),
    }
    figures = {kind: [] for kind in limits}
    start = 0
    for theirs in points:
        new = theirs["model.embed_tokens"].shape[1]
        part = ids[:, start : start + new]
        for kind, point, ours, truth in each_from_theirs(theirs, weights, config, part, start, numerics):
            away = np.abs(steps(ours) - steps(truth))
            _, most, limit = limits[kind]
            far = away > most
            beyond = np.abs(ours[far] - truth[far]).max(initial=0) / np.abs(truth[np.isfinite(truth)]).max()
            assert beyond <= limit, point
            figures[kind].append((away.size, np.count_nonzero(away), away[~far].max(initial=0), beyond))
        start += new
    print(f"\n{name}, {numerics.name}, prefill {len(ids)} x {ids.shape[1] - STEPS} and {STEPS} decode steps")
    for kind, (share, _, _) in limits.items():
        if not figures[kind]:
            continue
        sizes, counts, most, beyond = zip(*figures[kind], strict=True)
        size, count = sum(sizes), sum(counts)
        print(
            f"{kind:15}{size:>9} elements, {count:>4} differ: {count / size:.1e}, by at most {max(most):.0f} steps",
            end="",
        )
        print(f", or by {max(beyond):.0e} of the largest" if max(beyond) else "")
        assert count <= share * size


def test_bfloat16_silu_of_every_number(oracle):
    x = np.arange(2**16, dtype=np.uint16).view(BFLOAT16).astype(np.float32)
    x = x[np.isfinite(x)]
    theirs = oracle.torch.nn.functional.silu(oracle.torch.from_numpy(x).bfloat16())
    np.testing.assert_array_equal(N.round(silu(x)), oracle.array(theirs))


@pytest.mark.parametrize("size", [6, 64, 128, 1024, 2560])
def test_bfloat16_norm(oracle, size):
    """Exact where the squares add up exactly, in whatever order; elsewhere as near as another order allows."""
    rng = np.random.default_rng(size)
    weight = round_bfloat16(np.exp(0.4 * rng.standard_normal(size)))
    module = oracle.modeling_qwen3.Qwen3RMSNorm(size).bfloat16().requires_grad_(False)
    module.weight.copy_(oracle.torch.from_numpy(weight))
    shape = (1_000_000 // size, size)
    for x, share in ((rng.integers(-60, 61, shape), 0), (rng.standard_normal(shape), 1e-4)):
        x = round_bfloat16(x)
        theirs = oracle.array(module(oracle.torch.from_numpy(x).bfloat16()))
        away = np.abs(steps(rms_norm(x, weight, 1e-6, N)) - steps(theirs))
        print(f"\nnorm over {size}: {np.count_nonzero(away)} of {away.size} differ, by {away.max()} steps", end="")
        assert np.count_nonzero(away) <= share * away.size  # measured 3e-5: equal elements of a row flip together
        assert away.max() <= 2


def test_bfloat16_softmax(oracle):
    """Its float32 sums and its exp are not torch's to the last bit, so a tie now and then falls the other way."""
    rng = np.random.default_rng(0)
    for size in (16, 64, 512):
        x = round_bfloat16(2 * rng.standard_normal((1_000_000 // size, size)))
        tensor = oracle.torch.from_numpy(x).bfloat16()
        theirs = oracle.torch.nn.functional.softmax(tensor, dim=-1, dtype=oracle.torch.float32).bfloat16()
        away = np.abs(steps(N.round(softmax(x))) - steps(oracle.array(theirs)))
        print(f"\nsoftmax over {size}: {np.count_nonzero(away)} of {away.size} differ, by {away.max()} steps", end="")
        assert np.count_nonzero(away) <= 5e-5 * away.size  # measured 1.5e-5
        assert away.max() <= 1


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_bfloat16_experts(oracle, how):
    """Bit for bit where the products are exact in whatever order: what is left are the roundings of the sum."""
    config, rng = MODELS["experts"], np.random.default_rng(0)
    count, k, size, hidden = 16, 6, 40, 64
    weights = {}
    for n in range(count):  # small whole numbers; each output is one activation, scaled
        weights |= {f"{n}.{name}_proj.weight": rng.integers(-2, 3, (size, hidden)) * 1.0 for name in ("gate", "up")}
        weights[f"{n}.down_proj.weight"] = np.eye(size)[rng.integers(size, size=hidden)] * rng.choice([-1.5, 0.75, 1])
    weights = {name: w.astype(np.float32) for name, w in weights.items()}
    x = rng.integers(-2, 3, (1, 300, hidden)).astype(np.float32)
    probs = softmax(N.round(rng.standard_normal((1, 300, count), np.float32)))
    indices = top_k(probs, k)
    shares = router_weights(probs, indices, config, N)
    changes = {"hidden_size": hidden, "moe_intermediate_size": size, "num_experts_per_tok": k}
    theirs_config = oracle.Qwen3MoeConfig(**(config.to_dict() | changes))
    theirs_config._experts_implementation = how
    torch = oracle.torch
    module = oracle.modeling_qwen3_moe.Qwen3MoeExperts(theirs_config).bfloat16().requires_grad_(False)
    gate, up, down = (
        np.stack([weights[f"{n}.{name}_proj.weight"] for n in range(count)]) for name in ("gate", "up", "down")
    )
    module.gate_up_proj.copy_(torch.from_numpy(np.concatenate((gate, up), 1)))
    module.down_proj.copy_(torch.from_numpy(down))
    arguments = (
        torch.from_numpy(x[0]).bfloat16(),
        torch.from_numpy(indices[0]),
        torch.from_numpy(shares[0]).bfloat16(),
    )
    theirs = oracle.array(module(*arguments))
    for numerics in ("bfloat16", "bfloat16-grouped"):
        ours = experts(x, weights, "", indices, shares, named(numerics))[0]
        differ = np.mean(ours != theirs)
        print(f"\nexperts {how} against {numerics}: {differ:.1e} of {theirs.size} differ", end="")
        assert (differ == 0) == ((how == "grouped_mm") == (numerics == "bfloat16-grouped"))


def test_bfloat16_logits(oracle):
    """Whole models in bfloat16: much nearer to transformers' bfloat16 than that is to the truth, and as good."""
    figures = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        config = draw_any_config(rng)
        weights = bfloat16_weights(config, seed)
        ids = draw_ids(rng, config, 1, int(rng.integers(1, 257)) + STEPS)
        ours = prefill_and_decode(weights, config, ids, "bfloat16")
        theirs = oracle.prefill_and_decode(oracle.model_of(config, weights, "bfloat16"), ids, STEPS)
        truth = forward(weights, config, ids, numerics="float64")
        error = relative(theirs, truth)
        figures.append((relative(ours, theirs) / error, relative(ours, truth) / error, error))
    apart, error, theirs = np.array(figures).T
    print(f"\n{len(figures)} drawn models, bfloat16 logits, {np.count_nonzero(apart == 0)} bit for bit transformers'")
    print(f"transformers bfloat16 from float64, relative L2: median {np.median(theirs):.1e}; in units of that:")
    print(f"  ours from theirs:  median {np.median(apart):.3f}  max {apart.max():.3f}")
    print(f"  ours from float64: median {np.median(error):.3f}  max {error.max():.3f}")
    # Over some hundred positions one bit that fell the other way reaches many others, so the worst is not small.
    assert np.median(apart) <= 0.2  # measured 0.03 to 0.13
    assert apart.max() <= 0.8  # measured 0.6
    assert error.max() <= 1.05  # measured 1.01
