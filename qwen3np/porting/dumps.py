"""The dumps of other implementations: reading their files and names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3np.config import Config
from qwen3np.files.limits import parse_json, readable
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.porting.excerpts import read_excerpts
from qwen3np.porting.points import CHOICE, POINTS, split_layer
from qwen3np.porting.record import METADATA, read_safetensors

LAYER = "model.layers.{N}"
# Hugging Face's modules whose inputs or outputs are points under another name. The outputs of modules that have modules
# within are not in the folders of model_addition_debugger_context (transformers, model_debugging_utils.py).
MODULES = {
    "lm_head_outputs": "lm_head",
    "outputs_logits": "lm_head",
    "logits": "lm_head",
    "logprobs": "lm_head",
    "log_probs": "lm_head",
    "top_logprobs": "lm_head.top_logprobs",
    "top_ids": "lm_head.top_ids",
    "model.norm_inputs": "last",
    "model.layers.{N}.input_layernorm_inputs": "before {N}",
    "model.layers.{N}.self_attn": f"{LAYER}.self_attn.o_proj",
    "model.layers.{N}.self_attn.o_proj_inputs": f"{LAYER}.self_attn.context",
    "model.layers.{N}.post_attention_layernorm_inputs": f"{LAYER}.attn_residual",
    "model.layers.{N}.mlp": "mlp {N}",
    "model.layers.{N}.mlp.gate.0": f"{LAYER}.mlp.gate",  # a router gives three
    "model.layers.{N}.mlp.gate.1": f"{LAYER}.mlp.router_weights",
    "model.layers.{N}.mlp.gate.2": f"{LAYER}.{CHOICE}",
    "model.layers.{N}.mlp.gate_outputs_0": f"{LAYER}.mlp.gate",
    "model.layers.{N}.mlp.gate_outputs_1": f"{LAYER}.mlp.router_weights",
    "model.layers.{N}.mlp.gate_outputs_2": f"{LAYER}.{CHOICE}",
    "model.layers.{N}.mlp.down_proj_inputs": f"{LAYER}.mlp.act",
}
# What llama.cpp's graph callback calls them (src/models/qwen3.cpp, qwen3moe.cpp, src/llama-graph.cpp).
LLAMA_CPP = {
    "inp_embd": "model.embed_tokens",
    "embd": "model.embed_tokens",
    "attn_norm-{N}": f"{LAYER}.input_layernorm",
    "Qcur_normed-{N}": f"{LAYER}.self_attn.q_norm",
    "Kcur_normed-{N}": f"{LAYER}.self_attn.k_norm",
    "Qcur-{N}": f"{LAYER}.self_attn.q_rope",
    "Kcur-{N}": f"{LAYER}.self_attn.k_rope",
    "Vcur-{N}": f"{LAYER}.self_attn.v_proj",
    "kq_soft_max-{N}": f"{LAYER}.self_attn.probs",
    "kq_soft_max_ext-{N}": f"{LAYER}.self_attn.probs",
    "kqv_out-{N}": f"{LAYER}.self_attn.context",
    "attn_out-{N}": f"{LAYER}.self_attn.o_proj",
    "ffn_inp-{N}": f"{LAYER}.attn_residual",
    "ffn_norm-{N}": f"{LAYER}.post_attention_layernorm",
    "ffn_gate-{N}": f"{LAYER}.mlp.gate_proj",
    "ffn_up-{N}": f"{LAYER}.mlp.up_proj",
    "ffn_swiglu-{N}": f"{LAYER}.mlp.act",
    "ffn_gate_par-{N}": f"{LAYER}.mlp.act",
    "ffn_out-{N}": f"{LAYER}.mlp.down_proj",
    "ffn_moe_logits-{N}": f"{LAYER}.mlp.gate",
    "ffn_moe_topk-{N}": f"{LAYER}.{CHOICE}",
    "ffn_moe_weights-{N}": "raw weights {N}",
    "ffn_moe_weights_norm-{N}": f"{LAYER}.mlp.router_weights",
    "ffn_moe_out-{N}": f"{LAYER}.mlp.experts",
    "l_out-{N}": LAYER,
    "result_norm": "model.norm",
    "result_output": "lm_head",
}


def read_dump(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a safetensors file, an npz, an npy, or a folder of npy or safetensors, and what they say.

    A .txt or .log is what llama-eval-callback printed; an Excerpt stands for each of its arrays.

    That is the metadata of a recording ({} for others). In a folder an array has the name of its file, without the
    ending; folders within count as parts of the name. Raises ValueError for what is missing, torn or empty.
    """
    path = Path(path)
    about: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    if path.suffix in (".txt", ".log") and path.is_file():
        arrays |= read_excerpts(path)
    elif path.is_dir():
        for file in sorted(chain(path.rglob("*.npy"), path.rglob("*.safetensors"))):
            stem = ".".join(file.relative_to(path).with_suffix("").parts)
            found, _ = _read_file(file)
            arrays |= {stem if name in ("", "data") else f"{stem}.{name}": x for name, x in found.items()}
    elif path.is_file():
        found, about = _read_file(path)
        arrays = {name or path.stem: x for name, x in found.items()}
    else:
        raise ValueError(f"{path}: no such file or folder")
    if not arrays:
        hint = "a dump is a .safetensors, a .npz, a folder of .npy files, or a .txt that llama-eval-callback printed"
        if path.is_dir() and any(path.glob("*_debug_tree*.json")):
            hint = "give model_addition_debugger_context use_repr=False, and it writes the numbers too"
        raise ValueError(f"{path}: no arrays in it; {hint}")
    return arrays, about


def _read_file(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    if path.suffix not in (".npy", ".npz"):
        arrays, metadata = read_safetensors(path)
        try:
            return arrays, dict(json.loads(metadata.get(METADATA, "{}")))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its metadata {METADATA!r} is not a JSON object: {error}") from None
    try:
        found = cast("Any", np.load)(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": _named_type(cast("Array", found))}, {}
        with found:  # members of other kinds are bytes
            return {name: _named_type(cast("Array", x)) for name, x in found.items() if not isinstance(x, bytes)}, {}
    except MemoryError:
        raise
    except Exception as error:  # what NumPy, zip and zlib have for the many ways a file can be torn
        raise ValueError(f"{path}: cannot be read, perhaps half written: {error}") from None


def _named_type(x: Array) -> Array:
    """Return an array with its real type: NumPy files store bfloat16 as two raw bytes."""
    return x.view(BFLOAT16) if x.dtype == np.dtype("V2") else x


def read_map(path: str | Path) -> dict[str, str]:
    """Return a --map file: a JSON object {"name in the dump": "point"}, {N} in both for the layer number."""
    try:
        names = parse_json(readable(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a map of names: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", names).values()):
        raise ValueError(f'{path}: a map of names is a JSON object like {{"blk{{N}}.q": "{LAYER}.self_attn.q_proj"}}')
    for mine, point in cast("dict[str, str]", names).items():
        if mine.count("{N}") > 1 or ("{N}" in point) != ("{N}" in mine):
            raise ValueError(f"{path}: {mine!r} -> {point!r}: {{N}} must be in both names once, or in neither")
        if split_layer(_whole(point).replace("{N}", "0"))[1] not in POINTS:
            raise ValueError(f"{path}: {mine!r} -> {point!r}: there is no such point")
    return cast("dict[str, str]", names)


def _whole(point: str) -> str:
    """Return the full name of a point that may lack its "model."."""
    return re.sub(r"^(decode\.(?:\d+|\{N\})\.)?(?=(embed_tokens|layers|norm)($|\.))", r"\1model.", point)


def namer(config: Config, names: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a function from a name in a dump to a point, or to itself if unknown; `names` takes precedence."""
    table = {**{mine: _whole(point) for mine, point in (names or {}).items()}, **LLAMA_CPP, **MODULES}
    patterns = {re.compile(re.escape(mine).replace(r"\{N\}", r"(?P<N>\d+)")): point for mine, point in table.items()}

    def translate(name: str) -> str | None:
        for pattern, point in patterns.items():
            if found := pattern.fullmatch(name):
                layer = int(found.groupdict().get("N", 0))
                if point in ("last", "before {N}"):
                    layer = config.num_hidden_layers if point == "last" else layer
                    return f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
                if point == "mlp {N}":
                    return f"model.layers.{layer}.mlp." + ("experts" if config.is_sparse(layer) else "down_proj")
                if point == "raw weights {N}":  # before they are divided by their sum
                    return None if config.norm_topk_prob else f"model.layers.{layer}.mlp.router_weights"
                return point.replace("{N}", str(layer))
        return None

    def point_of(name: str) -> str:
        found = re.fullmatch(r"(?s)(decode\.\d+\.)?(.*)", name)
        assert found
        prefix, own = found[1] or "", found[2]
        if plain := translate(own):
            return prefix + plain
        own = re.sub(r"^[A-Z]\w*?(\.|_(?=outputs|inputs))", "", own)  # the model's class
        own = re.sub(r"^(?=(embed_tokens|layers|norm)($|[._]))", "model.", own)
        own = re.sub(r"(_inputs)(_args_0|_kwargs_hidden_states)$", r"\1", own)
        own = re.sub(r"[._]output(s)?$", "", own)
        return prefix + (translate(own) or own)

    return point_of
