"""Config, against the official config.json files and the documented meaning of each key."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from drawing import SEEDS, draw_any_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3np import Config, ConfigError, count_parameters, init_weights
from qwen3np.config import Yarn
from qwen3np.files.hf_config import remarks
from qwen3np.weights import weight_shapes

OFFICIAL = {  # Qwen/Qwen3-0.6B
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(*keys, **changes):
    return {key: value for key, value in OFFICIAL.items() if key not in keys} | changes


def official(data):
    """Yield the name and the contents of every official config.json."""
    files = sorted(data.glob("checkpoints/*/config.json"))
    assert len(files) >= 14
    return [(file.parent.name, json.loads(file.read_text())) for file in files]


def test_every_official_config_is_read_as_it_stands(data):
    for name, d in official(data):
        config = Config.from_file(data / "checkpoints" / name)
        sparse = d["model_type"] == "qwen3_moe"
        assert sparse == (config.num_experts == 128) == config.is_sparse(0)
        for key, value in asdict(config).items():
            if key == "eos_token_id":
                assert value == (d[key],)
            elif key in d and key != "max_window_layers":  # which means nothing without windows
                assert (list(value) if isinstance(value, tuple) else value) == d[key], (name, key)
        assert [config.window(layer) for layer in range(config.num_hidden_layers)] == [None] * d["num_hidden_layers"]


def test_parameters_of_every_official_config(data):
    published = json.loads((data / "param_counts.json").read_text())
    active = {"Qwen3-30B-A3B": 3.3e9, "Qwen3-30B-A3B-Instruct-2507": 3.3e9, "Qwen3-235B-A22B": 22e9}  # of their cards
    for name, d in official(data):
        config = Config.from_dict(d)
        counts = count_parameters(config)
        assert counts["unique"] == published[name]["total_params"], name
        assert counts["non_embedding"] == published[name]["non_embedding"], name
        assert len(weight_shapes(config)) == published[name]["tensors"], name
        assert counts["active"] == pytest.approx(active.get(name, counts["unique"]), rel=0.02), name


def test_parameters_of_the_smallest_with_its_tied_head_counted_twice():
    counts = {"total": 751_632_384, "unique": 596_049_920, "non_embedding": 440_467_456, "active": 596_049_920}
    assert count_parameters(Config.from_dict(OFFICIAL)) == counts


@given(SEEDS)
def test_parameters_are_those_of_the_weights(seed):
    config = draw_any_config(np.random.default_rng(seed))
    counts, weights = count_parameters(config), init_weights(config, 0)
    embedding = weights["model.embed_tokens.weight"].size
    assert counts["unique"] == sum(w.size for w in weights.values())
    rest = {str(expert) for expert in range(config.num_experts_per_tok, config.num_experts)}
    idle = sum(w.size for name, w in weights.items() if ".experts." in name and name.split(".")[5] in rest)
    assert counts["active"] == counts["unique"] - idle
    assert counts["total"] == counts["unique"] + (embedding if config.tie_word_embeddings else 0)
    assert counts["non_embedding"] == counts["total"] - 2 * embedding


THETA = {"rope_theta": 1000000.0}
SAME = {
    "as transformers 5 writes it": without(
        "rope_theta", "rope_scaling", "torch_dtype", rope_parameters={"rope_type": "default", **THETA}, dtype="bfloat16"
    )
    | {"layer_types": ["full_attention"] * 28},
    "theta in both places": without(rope_parameters=THETA),
    "theta in rope_scaling": without("rope_theta", rope_scaling={"type": "default", **THETA}),
    "rope_scaling of the default type": without(rope_scaling={"rope_type": "default"}),
    "a window that is switched off": without(sliding_window=4096, max_window_layers=20),
    "a window that begins behind the last layer": without(sliding_window=4096, use_sliding_window=True),
    "a window without a size": without(use_sliding_window=True, max_window_layers=0),
    "full attention over a window": without(
        sliding_window=4096, use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 28
    ),
    "no model_type": without("model_type", "hidden_act"),
    "unknown keys": without(pad_token_id=3, note="x", partial_rotary_factor=1.0),
    "eos as a list": without(eos_token_id=[151645]),
}


@pytest.mark.parametrize("d", SAME.values(), ids=SAME.keys())
def test_other_spellings_of_the_same_config(d):
    assert Config.from_dict(d) == Config.from_dict(OFFICIAL)


def test_defaults_are_those_of_transformers():
    d = without("attention_bias", "tie_word_embeddings", "rms_norm_eps", "head_dim", "eos_token_id", hidden_size=2048)
    config = Config.from_dict(d)
    assert (config.attention_bias, config.tie_word_embeddings, config.rms_norm_eps) == (False, False, 1e-6)
    assert config.head_dim == 2048 // 16
    assert not Config.from_dict(without(**EXPERTS)).norm_topk_prob
    assert config.eos_token_id == ()
    assert Config.from_dict(without(num_key_value_heads=None)).num_key_value_heads == 16
    assert Config.from_dict(without(eos_token_id=[3, 0])).eos_token_id == (3, 0)
    assert Config.from_dict(without(head_dim=None)).head_dim == 1024 // 16


@given(SEEDS, st.lists(st.integers(0, 10**6), max_size=3))
def test_round_trip(seed, eos):
    config = draw_any_config(np.random.default_rng(seed))
    config = replace(config, eos_token_id=tuple(eos))
    if yarn := config.rope_scaling:  # what it makes of the context
        length = int(yarn.factor * yarn.original_max_position_embeddings)
        config = replace(config, max_position_embeddings=max(length, config.max_position_embeddings))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


YARN = {"rope_type": "yarn", "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 27}
EXPERT_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
EXPERTS = {"model_type": "qwen3_moe", **EXPERT_SIZES}

UNSUPPORTED = [  # what is changed, and what the message must say: key, value, what is supported
    ({"model_type": "llama"}, 'model_type = "llama"', "qwen3 and qwen3_moe"),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu"', "silu"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5", "1.0"),
    ({"is_causal": False}, "is_causal = false", "true"),
    ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types = [", "a sliding_window"),
    ({"layer_types": ["full_attention"] * 27 + ["chunked_attention"]}, "layer_types = [", "sliding_attention"),
    ({**SLIDING, "sliding_window": 0}, "sliding_window = 0", "whole numbers from 1"),
    ({**SLIDING, "max_window_layers": -1}, "max_window_layers = -1", "whole numbers from 0"),
    ({**SLIDING, "max_window_layers": "27"}, 'max_window_layers = "27"', "whole numbers from 0"),
    ({"use_sliding_window": "yes"}, 'use_sliding_window = "yes"', "true and false"),
    ({"layer_types": ["full_attention"] * 27}, "layer_types = [", "full_attention"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 'rope_scaling.type = "linear"', "default and yarn"),
    ({"rope_parameters": {"rope_type": "llama3", **THETA}}, 'rope_parameters.rope_type = "llama3"', "default and yarn"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor = 0.5", "numbers from 1"),
    ({"rope_scaling": {**YARN, "factor": "4"}}, 'rope_scaling.factor = "4"', "finite numbers"),
    ({"rope_scaling": {**YARN, "truncate": None}}, "rope_scaling.truncate = null", "true and false"),
    ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, "rope_scaling.long_factor = [1.0]", "beta_fast"),
    ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta = 1", "above 1"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor = 4.0", "default"),
    ({"rope_scaling": "yarn"}, 'rope_scaling = "yarn"', "null or an object"),
    (
        {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor = 0.5",
        "whole head",
    ),
    ({"rope_theta": 0}, "rope_theta = 0", "above 0"),
    ({"rope_theta": "1e6"}, 'rope_theta = "1e6"', "finite numbers"),
    ({"rope_theta": float("inf")}, "rope_theta = Infinity", "finite"),
    ({"rope_theta": float("nan")}, "rope_theta = NaN", "finite"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06", "above 0"),
    ({"head_dim": 127}, "head_dim = 127", "even"),
    ({"num_key_value_heads": 5}, "num_key_value_heads = 5", "divisor of num_attention_heads (16)"),
    ({"head_dim": None, "hidden_size": 1001}, "head_dim = null", "explicit"),
    ({"hidden_size": 1024.5}, "hidden_size = 1024.5", "whole numbers from 1"),
    ({"rope_scaling": {**YARN, "factor": 1e300}}, "rope_scaling.factor", "contexts below 2^63 positions"),
    ({"vocab_size": "151936"}, 'vocab_size = "151936"', "whole numbers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0", "from 1"),
    ({"num_attention_heads": True}, "num_attention_heads = true", "whole numbers"),
    ({"attention_bias": 1}, "attention_bias = 1", "true and false"),
    ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings = "yes"', "true and false"),
    ({"eos_token_id": [1, -2]}, "eos_token_id = [1, -2]", "whole numbers from 0"),
    ({**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok = 5", "1 to num_experts (4)"),
    ({**EXPERTS, "num_experts_per_tok": 0}, "num_experts_per_tok = 0", "whole numbers from 1"),
    ({**EXPERTS, "num_experts": -1}, "num_experts = -1", "whole numbers from 0"),
    ({**EXPERTS, "decoder_sparse_step": 0}, "decoder_sparse_step = 0", "whole numbers from 1"),
    ({**EXPERTS, "mlp_only_layers": 3}, "mlp_only_layers = 3", "list of whole numbers from 0"),
    ({**EXPERTS, "mlp_only_layers": [0] * 29}, "mlp_only_layers = [0, 0", "some of the 28 layers"),
    ({**EXPERTS, "num_experts": 4000}, "num_experts = 4000", "up to 100,000 in all layers"),
    ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001", "1,000"),
    ({"max_position_embeddings": 2**63}, "max_position_embeddings = 9223372036854775808", "to 2^63 - 1"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 10**400}}, "original_max_position", "to 2^63 - 1"),
    ({"model_type": "x" * 10**6}, "model_type", "qwen3"),
    ({**EXPERTS, "norm_topk_prob": 1}, "norm_topk_prob = 1", "true and false"),
]


@pytest.mark.parametrize(("change", "what", "supported"), UNSUPPORTED, ids=[case[1] for case in UNSUPPORTED])
def test_an_unsupported_value_is_refused_with_key_value_and_what_is_supported(change, what, supported):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(without(**change))
    assert len(str(error.value)) < 5000
    said, offered = str(error.value).split("; supported: ")
    assert what in said
    assert supported in offered


@pytest.mark.parametrize(
    ("d", "yarn"),
    [
        (without(rope_scaling=YARN), Yarn(4.0, 40960)),
        (without("rope_theta", rope_parameters={**YARN, **THETA}), Yarn(4.0, 40960)),
        (
            without(rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}),
            Yarn(4, 32768),
        ),
        (without(rope_scaling=YARN, rope_parameters={**YARN, **THETA}), Yarn(4.0, 40960)),
        (without(rope_scaling=YARN, original_max_position_embeddings=4096), Yarn(4.0, 4096)),
        (without(rope_scaling={**YARN, "attention_factor": 1.2, "mscale": None}), Yarn(4.0, 40960, 1.2)),
        (
            without(rope_scaling={**YARN, "truncate": False, "beta_slow": 2}),
            Yarn(4, 40960, beta_slow=2, truncate=False),
        ),
    ],
)
def test_spellings_of_yarn(d, yarn):
    length = max(int(yarn.factor * yarn.original_max_position_embeddings), 40960)
    wanted = replace(Config.from_dict(OFFICIAL), rope_scaling=yarn, max_position_embeddings=length)
    assert Config.from_dict(d) == wanted


def test_the_model_cards_recipe_makes_the_context_longer():
    """Qwen3's cards: add rope_scaling, and leave max_position_embeddings at 40,960. vLLM derives factor x original."""
    card = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert Config.from_dict(without(rope_scaling=card)).max_position_embeddings == 131_072
    longer = without(rope_scaling=card, max_position_embeddings=262_144)
    assert Config.from_dict(longer).max_position_embeddings == 262_144
    saved = without("rope_theta", rope_parameters={**THETA, "rope_type": "default"}, rope_scaling=card)
    assert Config.from_dict(saved).rope_scaling == Yarn(4.0, 32768)  # added to what transformers 5 had saved
    both = without(rope_scaling={**card, "factor": 2.0}, rope_parameters={**card, **THETA})
    with pytest.raises(ConfigError, match="rope_scaling is given more than once, with different values"):
        Config.from_dict(both)


def test_settings_that_change_nothing():
    left = {"bits": 4, "quant_method": "bitsandbytes"}  # the tensors say how they are stored
    for change in (
        {"hidden_act": "swish"},
        {"quantization_config": left},
        {"hidden_size": 1024.0, "max_position_embeddings": 40960.0},
        {"use_sliding_window": None, "rope_scaling": None, "tie_word_embeddings": True, "layer_types": None},
    ):
        assert Config.from_dict(without(**change)) == Config.from_dict(OFFICIAL)


def test_attn_factor_is_ignored_as_in_transformers_and_said():
    """DeepSeek-R1-0528-Qwen3-8B's config.json."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    d = without(rope_scaling={**yarn, "attn_factor": 0.8782488562869419})
    assert Config.from_dict(d) == Config.from_dict(without(rope_scaling=yarn))
    assert "attn_factor" in remarks(d)[0]
    assert remarks(without(rope_scaling=yarn)) == []


def test_yarn_needs_a_factor():
    with pytest.raises(
        ConfigError, match=r"rope_scaling.factor is missing: YaRN needs the ratio of the new context to the original"
    ):
        Config.from_dict(without(rope_scaling={"rope_type": "yarn"}))


@pytest.mark.parametrize(("positions", "extended"), [(32768, 131_072), (40960, 131_072), (262_144, 1_048_576)])
def test_extended(positions, extended):
    config = Config.from_dict(without(max_position_embeddings=positions)).extended(4)
    assert config.max_position_embeddings == extended
    assert config.rope_scaling == Yarn(4, extended // 4)
    assert config.extended(2).max_position_embeddings == extended // 2  # of the original, not of the extended


@pytest.mark.parametrize(
    ("change", "sliding"),
    [
        ({**SLIDING}, range(27, 28)),
        ({**SLIDING, "max_window_layers": 0}, range(28)),
        ({**SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 14}, range(0, 28, 2)),
        ({**SLIDING, **EXPERTS}, range(28)),  # whatever max_window_layers says
        ({**SLIDING, **EXPERTS, "layer_types": ["full_attention"] * 28}, range(28)),
        ({**SLIDING, "use_sliding_window": None}, ()),
    ],
)
def test_windows(change, sliding):
    config = Config.from_dict(without(**change))
    assert [config.window(layer) for layer in range(28)] == [64 if layer in sliding else None for layer in range(28)]
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_window_without_a_size_is_that_of_transformers():
    assert Config.from_dict(without("sliding_window", use_sliding_window=True, max_window_layers=0)).window(0) == 4096


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({}, range(28)),
        ({"decoder_sparse_step": 2}, range(1, 28, 2)),
        ({"mlp_only_layers": [0, 5, 99]}, {*range(28)} - {0, 5}),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, range(5, 28, 3)),
        ({"num_experts": 0}, ()),
        ({"model_type": "qwen3"}, ()),
        ({"model_type": None}, range(28)),
    ],
)
def test_sparse_layers(change, sparse):
    config = Config.from_dict(without(**(EXPERTS | change)))
    assert [layer for layer in range(28) if config.is_sparse(layer)] == sorted(sparse)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_both_spellings_of_the_number_of_experts():
    expected = Config.from_dict(without(**EXPERTS))
    other = {key: value for key, value in EXPERTS.items() if key != "num_experts"} | {"num_local_experts": 4}
    assert Config.from_dict(without(**other)) == Config.from_dict(without(**EXPERTS, num_local_experts=4)) == expected
    with pytest.raises(ConfigError, match=r"num_experts and num_local_experts .* different values: \[4, 8\]"):
        Config.from_dict(without(**EXPERTS, num_local_experts=8))
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            Config.from_dict(without(**(EXPERTS | {key: None})))


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads"])
def test_a_missing_size_is_named(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        Config.from_dict(without(key))


@pytest.mark.parametrize("change", [{}, {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": None}])
def test_a_missing_theta_is_an_error(change):
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        Config.from_dict(without("rope_theta", **change))


def test_two_thetas_are_an_error():
    with pytest.raises(ConfigError, match=r"different values: \[1000000, 10000.0\]"):
        Config.from_dict(without(rope_parameters={"rope_theta": 1e4}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_theta", "type", "x"]), inner),
    max_leaves=5,
)
KEYS = sorted(
    {
        *OFFICIAL,
        *EXPERTS,
        "mlp_only_layers",
        "layer_types",
        "rope_parameters",
        "num_experts",
        "is_causal",
        "quantization_config",
    }
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
@settings(max_examples=200)
@example({"layer_types": ["full_attention"], "num_hidden_layers": "1"})
@example({"layer_types": ["full_attention"], "num_hidden_layers": None})
@example({"use_sliding_window": True, "sliding_window": 4096, "num_hidden_layers": "1"})
@example({"layer_types": [], "num_hidden_layers": 10**30})
def test_whatever_the_values_are_it_is_a_config_or_a_config_error(changes):
    with contextlib.suppress(ConfigError):
        config = Config.from_dict(without(**changes))
        assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("value", [[], "{}", 3, None])
def test_what_is_no_object_is_no_config(value):
    with pytest.raises(ConfigError, match=rf"^config: must be an object .*, not a {type(value).__name__}"):
        Config.from_dict(value)


def test_from_file_reads_a_file_or_its_folder(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OFFICIAL))
    assert Config.from_file(file) == Config.from_file(str(tmp_path)) == Config.from_dict(OFFICIAL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'a': 1}", r"config\.json: not JSON: .*line 1 column 2"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "config"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "d": 2}}', "not JSON: 'd' is given twice"),
        (b"[1, 2]", "holds a JSON list, not an object"),
    ],
)
def test_a_file_that_is_no_json_object_is_told_with_its_name(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Config.from_file(tmp_path)


def test_a_folder_without_config_is_told_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path.name}.config\.json: no such file"):
        Config.from_file(tmp_path)


def test_a_config_that_cannot_be_read_is_told_with_its_name(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=rf"{tmp_path.name}.config\.json: cannot be read: "):
        Config.from_file(tmp_path)


def test_an_unsupported_value_is_told_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(without(hidden_act="gelu")))
    with pytest.raises(ConfigError, match=rf'{tmp_path.name}.*hidden_act = "gelu"'):
        Config.from_file(tmp_path)


def test_a_config_cannot_be_changed_or_made_wrong(config):
    with pytest.raises(AttributeError):
        config.hidden_size = 3
    sliding = {"layer_types": ("sliding_attention", "full_attention")}
    for change, message in (
        ({"head_dim": 15}, "head_dim = 15"),
        ({"eos_token_id": 3}, "eos_token_id = 3 is not supported; supported: a tuple"),
        ({"layer_types": "full_attention"}, "layer_types = .*supported: a tuple"),
        ({"rope_scaling": YARN}, r"rope_scaling = .*supported: None and Yarn"),
        (sliding, "sliding_window = null"),
        ({"layer_types": ("full_attention",)}, "layer_types = .*one for each of the 2 layers"),
        (EXPERT_SIZES | {"moe_intermediate_size": 0}, "moe_intermediate_size = 0"),
        (EXPERT_SIZES | sliding | {"sliding_window": 4}, "num_experts = 4 .*all layers slide, or none"),
        (EXPERT_SIZES | {"max_window_layers": 1}, "num_experts = 4 .*all layers slide, or none"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, **change)
    assert hash(replace(config, eos_token_id=[3])) == hash(replace(config, eos_token_id=(3,)))
