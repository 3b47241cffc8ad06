"""config.json <-> Config: both spellings of every key, and a named error for every setting that is not supported.

Every key that transformers uses (models/qwen3/configuration_qwen3.py, models/qwen3_moe/configuration_qwen3_moe.py) is
either read here or rejected by name, so that a checkpoint that needs other mathematics never runs silently wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

from qwen3np.config import Config, Yarn
from qwen3np.errors import ConfigError
from qwen3np.files.limits import read_json
from qwen3np.rules import broken, plain

_SLIDING = "sliding_attention"
_MOST_EXPERTS = 100_000  # in all layers together; the largest released model has 12,032, and each has three tensors
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_FLOATS = ("rope_theta", "rms_norm_eps", "initializer_range", "factor", "attention_factor", "mscale", "mscale_all_dim")
_OF_WINDOWS = ("sliding_window", "max_window_layers", "layer_types")
_OF_ROPE = ("rope_theta", "rope_scaling")
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_OF_EXPERTS = (*_EXPERT_SIZES, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


def from_dict(d: Mapping[str, Any]) -> Config:
    """Read the contents of a config.json, in the older or the transformers 5 spelling.

    Parameters
    ----------
    d
        A parsed config.json. Keys that change nothing in the forward pass are ignored.

    Returns
    -------
    Config
        The architecture. A missing head_dim is hidden_size / num_attention_heads; other missing keys have transformers'
        defaults, except that the sizes and rope_theta are required.

    Raises
    ------
    ConfigError
        For a missing size or rope_theta, a value of the wrong type or out of range, two spellings of a key with
        different values, and any setting that would need mathematics that the package does not have.

    Examples
    --------
    >>> sizes = {"vocab_size": 2048, "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 4}
    >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000}
    >>> qwen3np.Config.from_dict({**sizes, **heads}).head_dim
    40
    """
    if not isinstance(d, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # a file may hold anything
        raise ConfigError(f"config: must be an object with the model's settings, not a {type(d).__name__}")
    _refuse_other_mathematics(d)
    sparse = _is_sparse(d)
    left_out = (*_OF_WINDOWS, *_OF_ROPE, *(() if sparse else _OF_EXPERTS))
    names = [field.name for field in fields(Config) if field.name not in left_out]
    values = {name: _as_meant(name, plain(d[name])) for name in names if d.get(name) is not None} | _rope(d)
    eos = values.get("eos_token_id", ())
    values["eos_token_id"] = eos if isinstance(eos, tuple) else (eos,)
    if "num_key_value_heads" in d and "num_attention_heads" in values:  # null: one for each query head
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if sparse:
        values["num_experts"] = _same(d, "num_experts", "num_local_experts")
    for key in (*_SIZES, *(_EXPERT_SIZES if sparse else ())):
        if values.get(key) is None:
            raise ConfigError(f"config: {key} is missing; a Qwen3 config.json always has it")
    _require(values)
    if values.get("num_experts") == 0:  # then the other keys about experts are meaningless
        values = {key: value for key, value in values.items() if key not in _OF_EXPERTS}
    values |= _windows(d, values["num_hidden_layers"], sparse)
    if "head_dim" not in values:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        if width % heads:
            supported = f"an explicit number: hidden_size ({width}) is not a multiple of num_attention_heads ({heads})"
            raise _unsupported("head_dim", None, supported)
        values["head_dim"] = width // heads
    config = Config(**values)
    if yarn := config.rope_scaling:  # the model cards add rope_scaling but leave the length unchanged
        length = yarn.factor * yarn.original_max_position_embeddings
        if length >= 2**63:
            raise _unsupported("rope_scaling.factor", yarn.factor, "contexts below 2^63 positions")
        config = replace(config, max_position_embeddings=max(int(length), config.max_position_embeddings))
    return config


def from_file(path: str | Path) -> Config:
    """Read a config.json.

    Parameters
    ----------
    path
        The file, or the folder that holds it.

    Returns
    -------
    Config
        As `from_dict` returns for the contents of the file.

    Raises
    ------
    ConfigError
        As `from_dict`, and for a file that is missing, cannot be read, or is not a JSON object; it names the file.

    Examples
    --------
    >>> qwen3np.load().save("copy")
    >>> qwen3np.Config.from_file("copy").hidden_size
    160
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        settings = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return from_settings(settings, path)


def from_settings(settings: Mapping[str, Any], path: Path) -> Config:
    """Like from_dict, but errors name the file that holds the settings."""
    try:
        return from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None


def remarks(settings: Mapping[str, Any]) -> list[str]:
    """Return remarks about settings whose meaning here may surprise a user."""
    ropes = [settings[key] for key in ("rope_parameters", "rope_scaling") if isinstance(settings.get(key), dict)]
    if any(rope.get("attn_factor") is not None for rope in ropes):
        return ["attn_factor in config.json is ignored, as in transformers (vLLM multiplies by it)"]
    return []


def to_dict(config: Config) -> dict[str, Any]:
    """Return the contents of a config.json that this package and transformers (4.51 or newer) read."""
    sparse = config.num_experts > 0
    left_out = (() if config.sliding_window else _OF_WINDOWS) + (() if sparse else _OF_EXPERTS)
    d: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if sparse else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if sparse else "qwen3",
        "hidden_act": "silu",
    }
    for name, value in vars(config).items():
        if name not in left_out:
            d[name] = list(cast("Any", value)) if isinstance(value, tuple) else value
    d |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if config.sliding_window and not config.layer_types:
        d["layer_types"] = None
    if config.rope_scaling:
        yarn = {key: value for key, value in asdict(config.rope_scaling).items() if value is not None}
        d["rope_scaling"] = {"rope_type": "yarn", **yarn}
    ids = config.eos_token_id
    d["eos_token_id"] = list(ids) if len(ids) > 1 else ids[0] if ids else None
    return d


def extended(config: Config, factor: float) -> Config:
    """Return a config with YaRN, for a context `factor` times as long. Raises ConfigError for a factor below 1."""
    if config.rope_scaling:
        original = config.rope_scaling.original_max_position_embeddings
    else:  # the released chat models state 40,960: the 32,768 they were trained on, and room for a prompt
        original = 32768 if config.max_position_embeddings == 40960 else config.max_position_embeddings
    config = replace(config, rope_scaling=Yarn(factor, original))  # checks the factor
    return replace(config, max_position_embeddings=int(factor * original))


def check(config: Config) -> None:
    """Turn a new Config's values into plain ones; raise ConfigError unless all are supported and consistent."""
    for settings, prefix in ((config, ""), (config.rope_scaling, "rope_scaling.")):
        if isinstance(settings, (Config, Yarn)):
            for name, value in vars(settings).items():
                object.__setattr__(settings, name, plain(value))  # both classes are frozen
            for name, value, supported in broken(type(settings), vars(settings)):
                raise _unsupported(prefix + name, value, supported)
    for fits, key, supported in _fits(config):
        if not fits:
            raise _unsupported(key, getattr(config, key), supported)


def _fits(c: Config) -> Iterator[tuple[bool, str, str]]:
    """Yield each condition between values of a config, the key to blame if it fails, and what is supported."""
    heads, layers, experts = c.num_attention_heads, c.num_hidden_layers, c.num_experts
    slides = _SLIDING in c.layer_types
    yield heads % c.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
    yield c.rope_scaling is None or c.rope_theta > 1, "rope_theta", "finite numbers above 1, with YaRN"
    yield not slides or c.sliding_window is not None, "sliding_window", f'a number, where layer_types has "{_SLIDING}"'
    yield len(c.layer_types) in (0, layers), "layer_types", f"one for each of the {layers} layers"
    yield len(c.mlp_only_layers) <= layers, "mlp_only_layers", f"some of the {layers} layers"
    yield layers * experts <= _MOST_EXPERTS, "num_experts", f"up to {_MOST_EXPERTS:,} in all layers together"
    if experts:
        used = 1 <= c.num_experts_per_tok <= experts
        yield used, "num_experts_per_tok", f"whole numbers from 1 to num_experts ({experts})"
        yield c.moe_intermediate_size > 0, "moe_intermediate_size", "whole numbers from 1, with experts"
        # transformers' class with experts has one mask for all layers
        yield not (c.layer_types or c.max_window_layers), "num_experts", "experts where all layers slide, or none"


def _as_meant(name: str, value: Any) -> Any:
    """Convert a whole float to int, for settings that are ints."""
    whole = isinstance(value, float) and value.is_integer() and name not in _FLOATS
    return int(value) if whole else value


def _require(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unsupported value of a Config."""
    for key, value, supported in broken(Config, values):
        raise _unsupported(key, value, supported)


def _unsupported(key: str, value: object, supported: str) -> ConfigError:
    return ConfigError(f"config: {key} = {json.dumps(value, default=str)} is not supported; supported: {supported}")


def _same(d: Mapping[str, Any], *keys: str) -> Any:
    """Return the value of these keys, which are spellings of the same setting; None if none is given."""
    given = [d[key] for key in keys if d.get(key) is not None]
    if any(value != given[0] for value in given[1:]):
        raise ConfigError(f"config: {' and '.join(keys)} mean the same, but have different values: {given}")
    return given[0] if given else None


def _is_sparse(d: Mapping[str, Any]) -> bool:
    """Whether this config.json is for the class with experts."""
    if d.get("model_type") is None:
        return any(d.get(key) for key in ("num_experts", "num_local_experts"))
    return d["model_type"] == "qwen3_moe"


def _refuse_other_mathematics(d: Mapping[str, Any]) -> None:
    """Raise ConfigError for a switch that transformers has and this package does not."""
    only: dict[str, tuple[tuple[Any, ...], str]] = {  # key: (the values supported besides null, in words)
        "model_type": (("qwen3", "qwen3_moe"), "qwen3 and qwen3_moe (text models)"),
        "hidden_act": (("silu", "swish"), "silu, which is also called swish"),
        "partial_rotary_factor": ((1.0,), "1.0: the whole head is rotated"),
        "is_causal": ((True,), "true: causal attention"),
    }
    for key, (values, supported) in only.items():
        if d.get(key) is not None and d[key] not in values:
            raise _unsupported(key, d[key], supported)


def _windows(d: Mapping[str, Any], layers: int, sparse: bool) -> dict[str, Any]:
    """Return sliding_window, max_window_layers and layer_types, or none of them where no layer slides."""
    if d.get("use_sliding_window") is not None and type(d["use_sliding_window"]) is not bool:
        raise _unsupported("use_sliding_window", d["use_sliding_window"], "true and false")
    # the class defaults of transformers, here and below
    window = d.get("sliding_window", 4096) if d.get("use_sliding_window") else None
    if sparse:  # that class ignores the others
        return {"sliding_window": window}
    if d.get("layer_types") is not None:  # it takes precedence over the rest
        kinds = plain(d["layer_types"])
        _require({"layer_types": kinds})
        if len(kinds) != layers:
            raise _unsupported(
                "layer_types", kinds, f'"full_attention" or "{_SLIDING}" for each of the {layers} layers'
            )
        if _SLIDING in kinds and window is None:
            raise _unsupported("layer_types", kinds, f'"{_SLIDING}" with use_sliding_window and a sliding_window')
        return {"sliding_window": window, "layer_types": kinds} if _SLIDING in kinds else {}
    first = d.get("max_window_layers", 28)
    if window is None or (isinstance(first, int) and first >= layers):
        return {}
    return {"sliding_window": window, "max_window_layers": first}


def _rope(d: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling, from wherever this config.json keeps them."""
    thetas = [d["rope_theta"]] if d.get("rope_theta") is not None else []
    scalings: list[Yarn | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = d.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise _unsupported(key, rope, "null or an object")
        # transformers reads a null as an absent setting, except for truncate
        given = cast("dict[str, Any]", rope).items()
        settings = {name: value for name, value in given if value is not None or name == "truncate"}
        if "rope_theta" in settings:
            thetas.append(settings.pop("rope_theta"))
        if (part := settings.pop("partial_rotary_factor", 1)) != 1:
            raise _unsupported(f"{key}.partial_rotary_factor", part, "1: the whole head is rotated")
        kind = "default"
        for name in ("type", "rope_type"):  # the second takes precedence
            if (kind := settings.pop(name, kind)) not in ("default", "yarn"):
                raise _unsupported(f"{key}.{name}", kind, "default and yarn")
        scalings.append(_yarn(key, settings, d) if kind == "yarn" else None)
        if kind == "default" and settings:
            name, value = next(iter(settings.items()))
            raise _unsupported(f"{key}.{name}", value, "yarn, or the default rotary type without such a setting")
    if len(scalings) == 2 and None in scalings:  # a card's YaRN, added to what transformers 5 had saved
        scalings = [scaling for scaling in scalings if scaling]
    if not thetas:  # transformers would fall back to 10,000, which is wrong for every released checkpoint
        raise ConfigError("config: rope_theta is missing (looked for rope_theta and rope_parameters.rope_theta)")
    for name, values in (("rope_theta", thetas), ("rope_scaling", scalings)):
        if any(value != values[0] for value in values[1:]):
            raise ConfigError(f"config: {name} is given more than once, with different values: {values}")
    return {"rope_theta": thetas[0], "rope_scaling": scalings[0] if scalings else None}


def _yarn(key: str, settings: dict[str, Any], d: Mapping[str, Any]) -> Yarn:
    """Return the YaRN settings in rope_parameters or rope_scaling, whichever `key` names."""
    names = [field.name for field in fields(Yarn)]
    settings = {name: _as_meant(name, value) for name, value in settings.items() if name != "attn_factor"}
    for name, value in settings.items():
        if name not in names:
            raise _unsupported(f"{key}.{name}", value, f"the settings {', '.join(names)}")
    if "factor" not in settings:
        raise ConfigError(f"config: {key}.factor is missing: YaRN needs the ratio of the new context to the original")
    length = "original_max_position_embeddings"  # the top level takes precedence, as in transformers
    lengths = [d.get(length), settings.get(length), d.get("max_position_embeddings"), 32768]
    known: dict[str, Any] = {**settings, length: next(n for n in lengths if n is not None)}
    return Yarn(**known)
