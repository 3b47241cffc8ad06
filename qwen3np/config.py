"""What config.json says, checked: the sizes of a Qwen3 model and the switches of its mathematics.

Key names are Hugging Face's own (transformers, models/qwen3/configuration_qwen3.py). Every key that changes the result
is either read here or refused by name, so a checkpoint that would need other mathematics never runs silently wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np


class ConfigError(ValueError):
    """A config.json that cannot be read, or that asks for something this package does not do."""


@dataclass(frozen=True)
class Config:
    """The architecture of one dense Qwen3 model. Fields carry the names of config.json.

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

    def __post_init__(self) -> None:
        """Check each value by itself, then those that must fit together."""
        for field in fields(self):  # NumPy's numbers become Python's, which leave the dtype of arrays alone
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
            check = _CHECKS[str(field.type)]
            check(field.name, getattr(self, field.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise _unsupported(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads ({self.num_attention_heads})",
            )
        if self.head_dim % 2:
            raise _unsupported("head_dim", self.head_dim, "even numbers: the rotation works on halves of a head")

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Config:
        """Read the contents of a config.json, in the older or the transformers 5 spelling.

        Raises ConfigError for a missing size, a value of the wrong type, and every setting that is not supported.
        """
        _refuse_other_mathematics(d)
        values = {field.name: d[field.name] for field in fields(cls) if d.get(field.name) is not None}
        values["rope_theta"] = _rope_theta(d)
        eos = values.get("eos_token_id", ())
        values["eos_token_id"] = tuple(cast("list[Any]", eos)) if isinstance(eos, (list, tuple)) else (eos,)
        if "num_key_value_heads" in d and "num_attention_heads" in values:
            # null means a key and value head for each query head
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        for key in _SIZES:
            if key not in values:
                raise ConfigError(f"config: {key} is missing; a Qwen3 config.json always gives it")
            _check_int(key, values[key])
        _refuse_sliding_layers(d, values["num_hidden_layers"])
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
        d: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
        }
        d |= {field.name: getattr(self, field.name) for field in fields(self)}
        d |= {"rope_scaling": None, "use_sliding_window": False, "sliding_window": None}
        ids = list(self.eos_token_id)
        d["eos_token_id"] = ids if len(ids) > 1 else ids[0] if ids else None
        return d


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError, which says what is wrong and where in the file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; a checkpoint folder needs one") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"holds a JSON {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError for bad ones, and for an object that has a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is given twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _unsupported(key: str, value: object, supported: str) -> ConfigError:
    return ConfigError(f"config: {key} = {json.dumps(value, default=str)} is not supported; supported: {supported}")


def _check_int(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(key, value, "whole numbers from 1")


def _check_float(key: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _unsupported(key, value, "finite numbers above 0")


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _unsupported(key, value, "true and false")


def _check_ids(key: str, value: tuple[Any, ...]) -> None:
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise _unsupported(key, token, "token ids: whole numbers from 0")


_CHECKS = {"int": _check_int, "float": _check_float, "bool": _check_bool, "tuple[int, ...]": _check_ids}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def _refuse_other_mathematics(d: Mapping[str, Any]) -> None:
    """Raise ConfigError for each switch that transformers obeys and this package does not have."""
    only = {  # key: (the one supported value, which is also its meaning when absent, in words)
        "model_type": ("qwen3", "qwen3 (dense text models)"),
        "hidden_act": ("silu", "silu"),
        "quantization_config": (None, "unquantised weights: bfloat16, float16 or float32"),
        "partial_rotary_factor": (1.0, "1.0: the whole head is rotated"),
        "is_causal": (True, "true: causal attention"),
    }
    for key, (value, supported) in only.items():
        if d.get(key) is not None and d[key] != value:
            raise _unsupported(key, d[key], supported)
    if d.get("model_type") is None and any(d.get(key) for key in ("num_experts", "num_local_experts")):
        raise ConfigError("config: num_experts is given without a model_type; supported: dense models")


def _refuse_sliding_layers(d: Mapping[str, Any], layers: int) -> None:
    """Raise ConfigError where some layer would see only a window of the positions before it."""
    types = d.get("layer_types")
    if types is not None:  # it decides alone
        if not isinstance(types, list) or cast("list[Any]", types).count("full_attention") != len(
            cast("list[Any]", types)
        ):
            raise _unsupported("layer_types", cast("object", types), '"full_attention" for every layer')
        if len(cast("list[Any]", types)) != layers:
            raise _unsupported(
                "layer_types", cast("object", types), f'"full_attention" for each of the {layers} layers'
            )
    elif d.get("use_sliding_window") and d.get("sliding_window") is not None:
        first = d.get("max_window_layers", 28)  # the class default of transformers
        if not isinstance(first, int) or first < layers:
            raise _unsupported("use_sliding_window", True, "false: every layer attends to all positions before it")


def _rope_theta(d: Mapping[str, Any]) -> float:
    """Return the base of the rotary frequencies, wherever this config.json keeps it."""
    thetas = [d["rope_theta"]] if d.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        rope = d.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise _unsupported(key, rope, "null or an object")
        rope = cast("dict[str, Any]", rope)
        for name, value in rope.items():
            if name in ("rope_type", "type"):
                if value != "default":
                    raise _unsupported(f"{key}.{name}", value, "default")
            elif name == "rope_theta":
                thetas.append(value)
            elif name != "partial_rotary_factor" or value not in (None, 1):
                raise _unsupported(f"{key}.{name}", value, "the default rotary type, which has no such setting")
    if not thetas:
        # transformers would fall back to 10,000, which is wrong for every released checkpoint
        raise ConfigError("config: rope_theta is missing (looked for rope_theta and rope_parameters.rope_theta)")
    if any(theta != thetas[0] for theta in thetas[1:]):
        raise ConfigError(f"config: rope_theta is given more than once, with different values: {thetas}")
    return thetas[0]
