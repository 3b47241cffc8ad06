"""Bugs of ports, planted in transformers: (plant, the first wrong point). plant(oracle, model, monkeypatch)."""

from __future__ import annotations

from qwen3np.config import Yarn


def recorded(oracle, model, ids, steps):
    """Return transformers' points, by the names of a recording."""
    passes = []
    oracle.prefill_and_decode(model, ids, steps, passes)
    own = (".keys", ".values", ".product")  # what the oracle records in addition
    prefixes = ["", *(f"decode.{i}." for i in range(steps))]
    return {
        p + k: x for p, points in zip(prefixes, passes, strict=True) for k, x in points.items() if not k.endswith(own)
    }


def scaled(factor):
    return lambda oracle, model, monkeypatch: [
        setattr(layer.self_attn, "scaling", layer.self_attn.scaling * factor) for layer in model.model.layers
    ]


def patched_rotation(make):
    """Replace transformers' apply_rotary_pos_emb(q, k, cos, sin) by what make gives of it."""

    def plant(oracle, model, monkeypatch):
        modeling = oracle.modeling_qwen3
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", make(modeling.apply_rotary_pos_emb, oracle.torch))

    return plant


def interleaved_rotation(original, torch):
    def rotation(q, k, cos, sin, **_):
        half = cos.shape[-1] // 2
        cos, sin = (x[..., :half].repeat_interleave(2, -1).unsqueeze(1) for x in (cos, sin))

        def turn(x):
            return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

        return turn(q), turn(k)

    return rotation


def rounded_tables(original, torch):
    return lambda q, k, cos, sin, **_: original(q, k, cos.bfloat16().to(cos.dtype), sin.bfloat16().to(sin.dtype))


def turned_back(original, torch):
    return lambda q, k, cos, sin, **_: original(q, k, cos, -sin)


def edit(of, change):
    """Change a module of every layer, or of the model."""

    def plant(oracle, model, monkeypatch):
        modules = dict(model.named_modules())
        for name in [n for n in modules if n == of or (n.endswith(f".{of}") and ".layers." in n)]:
            change(modules[name], oracle)

    return plant


def swapped(a, b):
    def change(module, oracle):
        one, other = getattr(module, a), getattr(module, b)
        setattr(module, a, other)
        setattr(module, b, one)

    return change


def set_eps(eps):
    return lambda module, oracle: setattr(module, "variance_epsilon", eps)


def no_norm(module, oracle):
    module.forward = lambda x: x


def plus_one(module, oracle):
    module.weight += 1


def norm_over_heads(module, oracle):
    """The statistics of all heads together."""

    def forward(x):
        mean = x.pow(2).mean((-1, -2), keepdim=True)
        return module.weight * x * oracle.torch.rsqrt(mean + module.variance_epsilon)

    module.forward = forward


def gelu(module, oracle):
    module.act_fn = oracle.torch.nn.GELU()


def theta(value):
    def plant(oracle, model, monkeypatch):
        size = model.config.head_dim
        exponents = oracle.torch.arange(0, size, 2).float() / size
        model.model.rotary_emb.inv_freq = 1 / value**exponents

    return plant


def rounded_frequencies(oracle, model, monkeypatch):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16().float()


def tiled(oracle, model, monkeypatch):
    def repeat(x, n):
        return x.repeat(1, n, 1, 1)

    monkeypatch.setattr(oracle.modeling_qwen3, "repeat_kv", repeat)


def norm_after_rotation(oracle, model, monkeypatch):
    waiting, original = [], oracle.modeling_qwen3.apply_rotary_pos_emb

    def hold(module):
        own = module.forward

        def forward(x):
            waiting.append(own)
            return x

        module.forward = forward

    for layer in model.model.layers:
        hold(layer.self_attn.q_norm)
        hold(layer.self_attn.k_norm)

    def rotation(q, k, cos, sin, **_):
        q, k = original(q, k, cos, sin)
        norms = waiting[-2:]
        return norms[0](q), norms[1](k)

    monkeypatch.setattr(oracle.modeling_qwen3, "apply_rotary_pos_emb", rotation)


def late_in_decode(oracle, model, monkeypatch):
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, position_ids + (position_ids.shape[1] == 1))


def wrong_head(oracle, model, monkeypatch):
    model.lm_head.weight = model.model.embed_tokens.weight


def far_mask(oracle, model, monkeypatch):
    """Every query also sees the next position."""
    original = oracle.modeling_qwen3.eager_attention_forward

    def attention(module, q, k, v, mask, *args, **kwargs):
        if mask is not None and mask.shape[-2] > 1:
            mask = oracle.torch.cat((mask[..., 1:, :], mask[..., -1:, :]), -2)
        return original(module, q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(oracle.modeling_qwen3, "eager_attention_forward", attention)


ATTENTION = "model.layers.0.self_attn."
BUGS = {
    "norm after rotation": (norm_after_rotation, f"{ATTENTION}q_norm"),
    "q/k norm missing": (edit("q_norm", no_norm), f"{ATTENTION}q_norm"),
    "q/k norm over all heads": (edit("q_norm", norm_over_heads), f"{ATTENTION}q_norm"),
    "q_norm and k_norm swapped": (edit("self_attn", swapped("q_norm", "k_norm")), f"{ATTENTION}q_norm"),
    "norm times 1 + weight": (edit("input_layernorm", plus_one), "model.layers.0.input_layernorm"),
    "eps 1e-5": (edit("input_layernorm", set_eps(1e-5)), "model.layers.0.input_layernorm"),
    "theta 10,000": (theta(1e4), f"{ATTENTION}q_rope"),
    "interleaved rotation": (patched_rotation(interleaved_rotation), f"{ATTENTION}q_rope"),
    "bfloat16 tables": (patched_rotation(rounded_tables), f"{ATTENTION}q_rope"),
    "bfloat16 frequencies": (rounded_frequencies, f"{ATTENTION}q_rope"),
    "sign of sin": (patched_rotation(turned_back), f"{ATTENTION}q_rope"),
    "scale of another head_dim": (scaled(2.4**0.5), f"{ATTENTION}scores"),
    "KV heads tiled": (tiled, f"{ATTENTION}scores"),
    "mask off by one": (far_mask, f"{ATTENTION}scores"),
    "position off in decode": (late_in_decode, f"decode.0.{ATTENTION}q_rope"),
    "gate and up swapped": (edit("mlp", swapped("gate_proj", "up_proj")), "model.layers.0.mlp.gate_proj"),
    "gelu": (edit("mlp", gelu), "model.layers.0.mlp.act"),
    "final norm missing": (edit("model.norm", no_norm), "model.norm"),
    "head tied": (wrong_head, "lm_head"),
}


# --- forms of the same bugs, as ports have them throughout ------------------------------------------------------------


def decode_positions(move):
    def plant(oracle, model, monkeypatch):
        rotary = model.model.rotary_emb
        own = rotary.forward

        def forward(x, position_ids):
            return own(x, move(position_ids) if position_ids.shape[1] == 1 else position_ids)

        rotary.forward = forward

    return plant


def both(*plants):
    def plant(oracle, model, monkeypatch):
        for one in plants:
            one(oracle, model, monkeypatch)

    return plant


def everywhere(change):
    """Change every norm."""
    names = ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm", "model.norm")
    return both(*(edit(name, change) for name in names))


def gelu_tanh(module, oracle):
    module.act_fn = oracle.torch.nn.GELU("tanh")


def short_angles(oracle, model, monkeypatch):
    rotary, torch = model.model.rotary_emb, oracle.torch

    def forward(x, position_ids):
        angles = position_ids[..., None].bfloat16() * rotary.inv_freq.bfloat16()
        angles = torch.cat((angles, angles), -1).float()
        return angles.cos(), angles.sin()

    rotary.forward = forward


def silu_of_up(module, oracle):
    module.forward = lambda x: module.down_proj(module.gate_proj(x) * module.act_fn(module.up_proj(x)))


def no_mask(oracle, model, monkeypatch):
    original = oracle.modeling_qwen3.eager_attention_forward
    monkeypatch.setattr(
        oracle.modeling_qwen3,
        "eager_attention_forward",
        lambda module, q, k, v, mask, *args, **kwargs: original(module, q, k, v, None, *args, **kwargs),
    )


FORMS = {
    "q/k norms missing": (both(edit("q_norm", no_norm), edit("k_norm", no_norm)), f"{ATTENTION}q_norm"),
    "q/k norms over all heads": (
        both(edit("q_norm", norm_over_heads), edit("k_norm", norm_over_heads)),
        f"{ATTENTION}q_norm",
    ),
    "norms times 1 + weight": (everywhere(plus_one), "model.layers.0.input_layernorm"),
    "eps 1e-5 everywhere": (everywhere(set_eps(1e-5)), "model.layers.0.input_layernorm"),
    "bfloat16 angles": (short_angles, f"{ATTENTION}q_rope"),
    "position reset in decode": (decode_positions(lambda p: 0 * p), f"decode.0.{ATTENTION}q_rope"),
    "position early in decode": (decode_positions(lambda p: p - 1), f"decode.0.{ATTENTION}q_rope"),
    "scores not scaled": (scaled(4), f"{ATTENTION}scores"),
    "no mask": (no_mask, f"{ATTENTION}probs"),
    "silu of up": (edit("mlp", silu_of_up), "model.layers.0.mlp.act"),
    "gelu tanh": (edit("mlp", gelu_tanh), "model.layers.0.mlp.act"),
    "norm left out": (edit("post_attention_layernorm", no_norm), "model.layers.0.post_attention_layernorm"),
}


# --- bugs that only some of the family can have -----------------------------------------------------------------------

# What is changed of the config in conftest.py: a sparse layer and a dense one, YaRN, windows in one of two layers.
FAMILY = {
    "moe": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": (1,),
    },
    "raw moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    "yarn": {"rope_scaling": Yarn(factor=4.0, original_max_position_embeddings=64)},
    "yarn with a factor": {"rope_scaling": Yarn(4.0, original_max_position_embeddings=64, attention_factor=0.9)},
    "windows": {"sliding_window": 6, "layer_types": ("full_attention", "sliding_attention")},
}


def routed(weigh):
    """Weigh the chosen experts by what is made of their logits."""

    def change(module, oracle):
        own = module.forward

        def forward(x):
            logits, _, indices = own(x)
            return logits, weigh(logits.gather(-1, indices)), indices

        module.forward = forward

    return edit("mlp.gate", change)


def normalised(value):
    return edit("mlp.gate", lambda module, oracle: setattr(module, "norm_topk_prob", value))


def least_experts(module, oracle):
    own, torch = module.forward, oracle.torch

    def forward(x):
        logits, weights, _ = own(x)
        return logits, weights, torch.topk(-logits, weights.shape[-1])[1]

    module.forward = forward


def exchanged_experts(module, oracle):
    gate, up = module.gate_up_proj.chunk(2, 1)
    module.gate_up_proj.copy_(oracle.torch.cat((up, gate), 1))


def ignored_yarn(oracle, model, monkeypatch):
    theta(model.config.rope_parameters["rope_theta"])(oracle, model, monkeypatch)
    model.model.rotary_emb.attention_scaling = 1.0


def yarn_factor(power):
    def plant(oracle, model, monkeypatch):
        model.model.rotary_emb.attention_scaling **= power

    return plant


def computed_factor(oracle, model, monkeypatch):
    model.model.rotary_emb.attention_scaling = 0.1 * oracle.np.log(4) + 1


def yarn_in_the_scale(oracle, model, monkeypatch):
    scaled(model.model.rotary_emb.attention_scaling**2)(oracle, model, monkeypatch)


def yarn_of_queries_alone(oracle, model, monkeypatch):
    factor = model.model.rotary_emb.attention_scaling

    def make(original, torch):
        def rotation(q, k, cos, sin, **_):
            return original(q, k, cos, sin)[0], original(q, k, cos / factor, sin / factor)[1]

        return rotation

    patched_rotation(make)(oracle, model, monkeypatch)


def sliding(*types):
    return lambda oracle, model, monkeypatch: setattr(model.config, "layer_types", list(types))


def window(by):
    def plant(oracle, model, monkeypatch):
        model.config.sliding_window += by

    return plant


MLP, FULL, SLIDES = "model.layers.0.mlp.", "full_attention", "sliding_attention"
NOT_NORMALISED, LOGITS = "experts: weights not normalised", "experts: router logits as weights"
NOT_READ = "rotary: YaRN's attention factor not read"
DROPPED, SQUARED = "rotary: YaRN's attention factor dropped", "rotary: YaRN's attention factor squared"
WRONG_LAYERS, SECOND = "attention: sliding window in the wrong layers", "model.layers.1.self_attn."
FAMILY_BUGS = {  # (which of FAMILY, plant, the first wrong point, the cause in the catalogue or None)
    "weights not normalised": ("moe", normalised(False), f"{MLP}router_weights", NOT_NORMALISED),
    "weights normalised": ("raw moe", normalised(True), f"{MLP}router_weights", "experts: weights normalised"),
    "logits as weights": ("moe", routed(lambda x: x), f"{MLP}router_weights", LOGITS),
    "logits as weights, raw": ("raw moe", routed(lambda x: x), f"{MLP}router_weights", LOGITS),
    "logits normalised": ("moe", routed(lambda x: x / x.sum(-1, keepdim=True)), f"{MLP}router_weights", LOGITS),
    "all experts alike": ("moe", routed(lambda x: x * 0 + 1 / 3), f"{MLP}router_weights", None),
    "least experts": ("moe", edit("mlp.gate", least_experts), f"{MLP}router_indices", None),
    "gelu in experts": ("raw moe", edit("mlp.experts", gelu), f"{MLP}experts", "mlp: GELU instead of SiLU"),
    "experts exchanged": (
        "raw moe",
        edit("mlp.experts", exchanged_experts),
        f"{MLP}experts",
        "mlp: gate and up swapped",
    ),
    "YaRN ignored": ("yarn", ignored_yarn, f"{ATTENTION}q_rope", "rotary: YaRN ignored"),
    "YaRN factor dropped": ("yarn", yarn_factor(0), f"{ATTENTION}q_rope", DROPPED),
    "YaRN factor squared": ("yarn", yarn_factor(2), f"{ATTENTION}q_rope", SQUARED),
    "YaRN factor not read": ("yarn with a factor", computed_factor, f"{ATTENTION}q_rope", NOT_READ),
    "YaRN factor in the scale": ("yarn", yarn_in_the_scale, f"{ATTENTION}scores", SQUARED),
    "YaRN factor of queries alone": ("yarn", yarn_of_queries_alone, f"{ATTENTION}k_rope", DROPPED),
    "window ignored": ("windows", sliding(FULL, FULL), f"{SECOND}scores", "attention: sliding window ignored"),
    "windows everywhere": ("windows", sliding(SLIDES, SLIDES), f"{ATTENTION}scores", WRONG_LAYERS),
    "windows exchanged": ("windows", sliding(SLIDES, FULL), f"{ATTENTION}scores", WRONG_LAYERS),
    "window too long": ("windows", window(1), f"{SECOND}scores", "attention: sliding window one too long"),
    "window too short": ("windows", window(-1), f"{SECOND}scores", "attention: sliding window one too short"),
}


# --- bugs of which no catalogue knows ---------------------------------------------------------------------------------


def wrapped(change):
    """change(module, own forward) -> forward."""

    def replace(module, oracle):
        module.forward = change(module, module.forward, oracle.torch)

    return replace


def values_normalised(module, own, torch):
    return lambda x: torch.nn.functional.normalize(own(x), dim=-1)


def heads_transposed(module, own, torch):
    return lambda x: own(x.unflatten(-1, (-1, 16)).transpose(2, 3).flatten(2))


def mean_subtracted(module, own, torch):
    return lambda x: own(x - x.mean(-1, keepdim=True))


def unbiased(module, own, torch):
    return lambda x: own(x) * (1 - 1 / x.shape[-1]) ** 0.5


def activation(f):
    return lambda module, oracle: setattr(module.act_fn, "forward", f)


def quarter_rotation(original, torch):
    def rotation(q, k, cos, sin, **_):
        size = cos.shape[-1] // 2
        part = torch.arange(size) % (size // 2)
        turned = original(q[..., :size], k[..., :size], cos[..., part], sin[..., part])
        return tuple(torch.cat((t, x[..., size:]), -1) for t, x in zip(turned, (q, k), strict=True))

    return rotation


def keys_alone(original, torch):
    return lambda q, k, cos, sin, **_: (q, original(q, k, cos, sin)[1])


def slow_positions(oracle, model, monkeypatch):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 2


def first_kv_head(oracle, model, monkeypatch):
    monkeypatch.setattr(oracle.modeling_qwen3, "repeat_kv", lambda x, n: x[:, :1].expand(-1, n * x.shape[1], -1, -1))


def small_dropped(oracle, model, monkeypatch):
    """Probabilities below 0.05 are treated as 0."""
    modeling = oracle.modeling_qwen3
    original = modeling.eager_attention_forward

    def attention(module, q, k, v, *args, **kwargs):
        probs = original(module, q, k, v, *args, **kwargs)[1]
        probs = probs * (probs >= 0.05)
        return (probs @ modeling.repeat_kv(v, module.num_key_value_groups)).transpose(1, 2).contiguous(), probs

    monkeypatch.setattr(modeling, "eager_attention_forward", attention)


def forgetful_decode(oracle, model, monkeypatch):
    """A decode step that reads the values of its cache one position late."""
    original = oracle.modeling_qwen3.eager_attention_forward

    def attention(module, q, k, v, *args, **kwargs):
        return original(module, q, k, v.roll(1, 2) if q.shape[2] == 1 else v, *args, **kwargs)

    monkeypatch.setattr(oracle.modeling_qwen3, "eager_attention_forward", attention)


FITTED = {  # (plant, the first wrong point, the cause with its number)
    "theta 500,000": (theta(5e5), f"{ATTENTION}q_rope", "rotary: rope_theta is 500,000"),
    "eps 1e-4": (
        edit("input_layernorm", set_eps(1e-4)),
        "model.layers.0.input_layernorm",
        "norm: rms_norm_eps is 1e-4",
    ),
}

UNKNOWN = {
    "values normalised": (edit("v_proj", wrapped(values_normalised)), f"{ATTENTION}v_proj"),
    "half of the lanes rotated": (patched_rotation(quarter_rotation), f"{ATTENTION}q_rope"),
    "only keys rotated": (patched_rotation(keys_alone), f"{ATTENTION}q_rope"),
    "positions halved": (slow_positions, f"{ATTENTION}q_rope"),
    "mean subtracted": (edit("input_layernorm", wrapped(mean_subtracted)), "model.layers.0.input_layernorm"),
    "unbiased mean": (edit("q_norm", wrapped(unbiased)), f"{ATTENTION}q_norm"),
    "first KV head for all": (first_kv_head, f"{ATTENTION}scores"),
    "small probabilities dropped": (small_dropped, f"{ATTENTION}probs"),
    "heads transposed": (edit("o_proj", wrapped(heads_transposed)), f"{ATTENTION}o_proj"),
    "quick gelu": (
        edit("mlp", activation(lambda x: x * (1.702 * x).sigmoid())),
        "model.layers.0.mlp.act",
    ),
    "squared relu": (edit("mlp", activation(lambda x: x.relu() ** 2)), "model.layers.0.mlp.act"),
    "embedding scaled": (
        edit("model.embed_tokens", wrapped(lambda module, own, torch: lambda x: own(x) * 40**0.5)),
        "model.embed_tokens",
    ),
    "logits capped": (
        edit("lm_head", wrapped(lambda module, own, torch: lambda x: 30 * (own(x) / 30).tanh())),
        "lm_head",
    ),
    "final norm twice": (
        edit("model.norm", wrapped(lambda module, own, torch: lambda x: own(own(x)))),
        "model.norm",
    ),
    "values late in decode": (forgetful_decode, f"decode.0.{ATTENTION}context"),
}

PAIRS = {
    ("interleaved rotation", "theta 10,000"),
    ("sign of sin", "bfloat16 tables"),
    ("KV heads tiled", "scale of another head_dim"),
    ("gate and up swapped", "theta 10,000"),
    ("final norm missing", "gelu"),
    ("eps 1e-5 everywhere", "head tied"),
    ("q/k norms missing", "interleaved rotation"),
    ("norms times 1 + weight", "gelu"),
}
