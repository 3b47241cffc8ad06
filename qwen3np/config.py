"""What config.json says, checked: the sizes of a Qwen3 model and the switches of its mathematics.

Key names are Hugging Face's own (transformers, models/qwen3/configuration_qwen3.py, models/qwen3_moe/
configuration_qwen3_moe.py). Every key that changes the result is either read here or refused by name, so a checkpoint
that would need other mathematics never runs silently wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from qwen3np.errors import ConfigError
from qwen3np.files.limits import read_json

Count: TypeAlias = int  # from 0; what is an int here is from 1


@dataclass(frozen=True)
class Yarn:
    """The settings of YaRN, under the names that rope_scaling has for them; what they do stands in rope.py."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        """Check each value by itself."""
        _check_fields(self, "rope_scaling.")
        if self.factor < 1:
            raise _unsupported("rope_scaling.factor", self.factor, "numbers from 1")


@dataclass(frozen=True)
class Config:
    """The architecture of one Qwen3 model. Fields carry the names of config.json.

    Raises ConfigError when a value is of the wrong type or out of range, with the key, the value and what is supported.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # Dh
    rope_theta: float
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = ()
    rope_scaling: Yarn | None = None
    sliding_window: int | None = None  # None: no layer slides; see `window`
    max_window_layers: Count = 0
    layer_types: tuple[str, ...] = ()  # empty: max_window_layers decides
    num_experts: Count = 0  # E; 0: no layer is sparse; see `is_sparse`
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check each value by itself, then those that must fit together."""
        _check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise _unsupported(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads ({self.num_attention_heads})",
            )
        if self.head_dim % 2:
            raise _unsupported("head_dim", self.head_dim, "even numbers: the rotation works on halves of a head")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise _unsupported("num_hidden_layers", self.num_hidden_layers, f"up to {_MOST_LAYERS:,}")
        if self.num_hidden_layers * self.num_experts > _MOST_EXPERTS:
            raise _unsupported("num_experts", self.num_experts, f"up to {_MOST_EXPERTS:,} in all layers together")
        if len(self.mlp_only_layers) > self.num_hidden_layers:
            most = f"some of the {self.num_hidden_layers} layers"
            raise _unsupported("mlp_only_layers", self.mlp_only_layers, most)
        if self.rope_scaling and self.rope_theta <= 1:
            raise _unsupported("rope_theta", self.rope_theta, "numbers above 1, with YaRN")
        if _SLIDING in self.layer_types and self.sliding_window is None:
            raise _unsupported("sliding_window", None, f'a number, where layer_types has "{_SLIDING}"')
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise _unsupported("layer_types", self.layer_types, f"one for each of the {self.num_hidden_layers} layers")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise _unsupported(
                "num_experts_per_tok", self.num_experts_per_tok, f"1 to num_experts ({self.num_experts})"
            )
        if self.num_experts:
            _check_int("moe_intermediate_size", self.moe_intermediate_size)
            if self.layer_types or self.max_window_layers:  # the class with experts has one mask for all layers
                raise _unsupported("num_experts", self.num_experts, "experts where all layers slide, or none")

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has a router and experts instead of one MLP."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def window(self, layer: int) -> int | None:
        """Return how many positions, itself the last of them, a position sees in this layer; None: all before it."""
        slides = self.layer_types[layer] == _SLIDING if self.layer_types else layer >= self.max_window_layers
        return self.sliding_window if slides else None

    def extended(self, factor: float) -> Config:
        """Return this config with YaRN, for a context `factor` times as long. Raises ConfigError for one below 1."""
        if self.rope_scaling:
            original = self.rope_scaling.original_max_position_embeddings
        else:  # 40,960 is what the released chat models say: 32,768 positions of training, and room for a prompt
            original = 32768 if self.max_position_embeddings == 40960 else self.max_position_embeddings
        yarn = Yarn(factor, original)
        return replace(self, rope_scaling=yarn, max_position_embeddings=int(factor * original))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Config:
        """Read the contents of a config.json, in the older or the transformers 5 spelling.

        Raises ConfigError for a missing size, a value of the wrong type, and every setting that is not supported.
        """
        if not isinstance(d, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # a stranger's file may say so
            raise ConfigError(f"config: a {type(d).__name__} where an object with its settings is needed")
        _refuse_other_mathematics(d)
        sparse = _is_sparse(d)
        values = {field.name: d[field.name] for field in fields(cls) if d.get(field.name) is not None}
        values |= _rope(d)
        eos = values.get("eos_token_id", ())
        values["eos_token_id"] = tuple(cast("list[Any]", eos)) if isinstance(eos, (list, tuple)) else (eos,)
        if "num_key_value_heads" in d and "num_attention_heads" in values:
            # null means a key and value head for each query head
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if sparse:
            values["num_experts"] = _same(d, "num_experts", "num_local_experts")
            values["mlp_only_layers"] = _as_tuple("mlp_only_layers", values.get("mlp_only_layers", []))
        for key in (*_SIZES, *(_EXPERT_SIZES if sparse else ())):
            if values.get(key) is None:
                raise ConfigError(f"config: {key} is missing; a Qwen3 config.json always gives it")
            _check_count(key, values[key]) if key == "num_experts" else _check_int(key, values[key])
        if not values.get("num_experts") or not sparse:  # the other keys of experts mean nothing then
            values = {key: value for key, value in values.items() if key not in _OF_EXPERTS}
        values |= _windows(d, values["num_hidden_layers"], sparse)
        if "head_dim" not in values:
            if values["hidden_size"] % values["num_attention_heads"]:
                raise _unsupported(
                    "head_dim",
                    None,
                    f"an explicit value: hidden_size ({values['hidden_size']}) is no multiple of "
                    f"num_attention_heads ({values['num_attention_heads']})",
                )
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Read a config.json, or the one in a folder. Raises ConfigError, which names the file."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json that this package and transformers (4.51 or newer) read back."""
        sparse = self.num_experts > 0
        d: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM" if sparse else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if sparse else "qwen3",
            "hidden_act": "silu",
        }
        left_out = (() if self.sliding_window else _OF_WINDOWS) + (() if sparse else _OF_EXPERTS)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        d |= {key: list(cast("Any", value)) if isinstance(value, tuple) else value for key, value in values.items()}
        d |= {"use_sliding_window": self.sliding_window is not None, "sliding_window": self.sliding_window}
        if self.sliding_window and not self.layer_types:
            d["layer_types"] = None
        if self.rope_scaling:
            settings = {key: value for key, value in asdict(self.rope_scaling).items() if value is not None}
            d["rope_scaling"] = {"rope_type": "yarn", **settings}
        ids = list(self.eos_token_id)
        d["eos_token_id"] = ids if len(ids) > 1 else ids[0] if ids else None
        return d


def _unsupported(key: str, value: object, supported: str) -> ConfigError:
    return ConfigError(f"config: {key} = {json.dumps(value, default=str)} is not supported; supported: {supported}")


def _check_fields(settings: Config | Yarn, prefix: str = "") -> None:
    """Raise ConfigError for a value of the wrong type; NumPy's numbers become Python's, which leave dtypes alone."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, list):
            object.__setattr__(settings, field.name, tuple(cast("list[Any]", value)))
        if isinstance(value, np.generic):
            object.__setattr__(settings, field.name, value.item())
        kind = str(field.type)
        if value is not None or not kind.endswith(" | None"):
            _CHECKS[kind.removesuffix(" | None")](prefix + field.name, getattr(settings, field.name))


def _check_int(key: str, value: object) -> None:
    if type(value) is not int or not 1 <= value < 2**63:
        raise _unsupported(key, value, "whole numbers from 1 to 2^63 - 1")


def _check_count(key: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _unsupported(key, value, "whole numbers from 0 to 2^63 - 1")


def _check_float(key: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _unsupported(key, value, "finite numbers above 0")


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _unsupported(key, value, "true and false")


def _check_counts(key: str, value: tuple[Any, ...]) -> None:
    _check_tuple(key, value)
    for count in value:
        _check_count(key, count)


def _check_tuple(key: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise _unsupported(key, value, "a tuple")


def _check_layer_types(key: str, value: tuple[Any, ...]) -> None:
    _check_tuple(key, value)
    if any(kind not in (_SLIDING, "full_attention") for kind in value):
        raise _unsupported(key, value, '"full_attention" and "sliding_attention"')


def _check_yarn(key: str, value: object) -> None:
    if not isinstance(value, Yarn):
        raise _unsupported(key, value, "None and Yarn(...)")


_CHECKS = {
    "int": _check_int,
    "Count": _check_count,
    "float": _check_float,
    "bool": _check_bool,
    "tuple[int, ...]": _check_counts,
    "tuple[str, ...]": _check_layer_types,
    "Yarn": _check_yarn,
}
_SLIDING = "sliding_attention"
_MOST_LAYERS, _MOST_EXPERTS = 1000, 100_000  # the largest released models have 94 and 12,032; each tensor gets a name

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_OF_WINDOWS = ("sliding_window", "max_window_layers", "layer_types")
_OF_EXPERTS = (*_EXPERT_SIZES, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


def _as_tuple(key: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _unsupported(key, value, "a list")
    return tuple(cast("list[Any]", value))


def _same(d: Mapping[str, Any], *keys: str) -> Any:
    """Return the value that these keys, spellings of one, have; None if none of them is given."""
    given = [d[key] for key in keys if d.get(key) is not None]
    if any(value != given[0] for value in given[1:]):
        raise ConfigError(f"config: {' and '.join(keys)} mean the same, but have different values: {given}")
    return given[0] if given else None


def _is_sparse(d: Mapping[str, Any]) -> bool:
    """Whether this config.json is of the class with experts."""
    if d.get("model_type") is None:
        return any(d.get(key) for key in ("num_experts", "num_local_experts"))
    return d["model_type"] == "qwen3_moe"


def _refuse_other_mathematics(d: Mapping[str, Any]) -> None:
    """Raise ConfigError for each switch that transformers obeys and this package does not have."""
    only: dict[str, tuple[tuple[Any, ...], str]] = {  # key: (what is supported beside null, in words)
        "model_type": (("qwen3", "qwen3_moe"), "qwen3 and qwen3_moe (text models)"),
        "hidden_act": (("silu",), "silu"),
        "quantization_config": ((), "unquantised weights: bfloat16, float16 or float32"),
        "partial_rotary_factor": ((1.0,), "1.0: the whole head is rotated"),
        "is_causal": ((True,), "true: causal attention"),
    }
    for key, (values, supported) in only.items():
        if d.get(key) is not None and d[key] not in values:
            raise _unsupported(key, d[key], supported)


def _windows(d: Mapping[str, Any], layers: int, sparse: bool) -> dict[str, Any]:
    """Return sliding_window, max_window_layers and layer_types; all of them empty where no layer slides."""
    none: dict[str, Any] = {"sliding_window": None, "max_window_layers": 0, "layer_types": ()}
    if d.get("use_sliding_window") is not None:
        _check_bool("use_sliding_window", d["use_sliding_window"])
    # the class defaults of transformers, here and below
    window = d.get("sliding_window", 4096) if d.get("use_sliding_window") else None
    if sparse:  # it ignores the others
        return none | {"sliding_window": window}
    if d.get("layer_types") is not None:  # it decides alone
        types = _as_tuple("layer_types", d["layer_types"])
        _check_layer_types("layer_types", types)
        if len(types) != layers:
            raise _unsupported(
                "layer_types", types, f'"full_attention" or "{_SLIDING}" for each of the {layers} layers'
            )
        if _SLIDING not in types:
            return none
        if window is None:
            raise _unsupported("layer_types", types, f'"{_SLIDING}" with use_sliding_window and a sliding_window')
        return none | {"sliding_window": window, "layer_types": types}
    first = d.get("max_window_layers", 28)
    if window is None or (isinstance(first, int) and first >= layers):
        return none
    return none | {"sliding_window": window, "max_window_layers": first}


def _rope(d: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling, wherever this config.json keeps them."""
    thetas = [d["rope_theta"]] if d.get("rope_theta") is not None else []
    scalings: list[Yarn | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = d.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise _unsupported(key, rope, "null or an object")
        # transformers takes a null as if the setting were absent, but for truncate
        rope = {
            name: value
            for name, value in cast("dict[str, Any]", rope).items()
            if value is not None or name == "truncate"
        }
        if "rope_theta" in rope:
            thetas.append(rope.pop("rope_theta"))
        if rope.get("partial_rotary_factor", 1) != 1:
            raise _unsupported(
                f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "1: the whole head is rotated"
            )
        rope.pop("partial_rotary_factor", None)
        kind = "default"
        for name in ("type", "rope_type"):  # the second wins
            if name in rope:
                kind = rope.pop(name)
                if kind not in ("default", "yarn"):
                    raise _unsupported(f"{key}.{name}", kind, "default and yarn")
        scalings.append(_yarn(key, rope, d) if kind == "yarn" else None)
        if kind == "default" and rope:
            name, value = next(iter(rope.items()))
            raise _unsupported(f"{key}.{name}", value, "the default rotary type, which has no such setting, and yarn")
    if not thetas:
        # transformers would fall back to 10,000, which is wrong for every released checkpoint
        raise ConfigError("config: rope_theta is missing (looked for rope_theta and rope_parameters.rope_theta)")
    for name, values in (("rope_theta", thetas), ("rope_scaling", scalings)):
        if any(value != values[0] for value in values[1:]):
            raise ConfigError(f"config: {name} is given more than once, with different values: {values}")
    return {"rope_theta": thetas[0], "rope_scaling": scalings[0] if scalings else None}


def _yarn(key: str, settings: dict[str, Any], d: Mapping[str, Any]) -> Yarn:
    """Return the settings of YaRN in rope_parameters or rope_scaling, whichever key is."""
    names = [field.name for field in fields(Yarn)]
    for name, value in settings.items():
        if name not in names:
            raise _unsupported(f"{key}.{name}", value, f"the settings {', '.join(names)}")
    if "factor" not in settings:
        raise ConfigError(f"config: {key}.factor is missing: YaRN needs it, how many times as long the context becomes")
    length = "original_max_position_embeddings"  # at the top it wins, as in transformers
    lengths = [d.get(length), settings.get(length), d.get("max_position_embeddings"), 32768]
    known: dict[str, Any] = {**settings, length: next(n for n in lengths if n is not None)}
    return Yarn(**known)
