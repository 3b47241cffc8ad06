"""The dumps of other implementations: files, names and layouts, brought to those of a recording."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3np.config import Config
from qwen3np.files.limits import parse_json, readable
from qwen3np.guard import position_axis
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.porting.points import CHOICE, STEPS, split_layer
from qwen3np.porting.record import HEADS, METADATA, Recording, distance, read_safetensors

LAYER = "model.layers.{N}"
# What may have to be assumed of an array.
LAST, LANES, UNMASKED = "only the last position", "RoPE lanes interleaved", "before the mask"
# Hugging Face's modules whose inputs or outputs are points under another name. The outputs of modules that have modules
# within are not in the folders of model_addition_debugger_context (transformers, model_debugging_utils.py).
MODULES = {
    "lm_head_outputs": "lm_head",
    "outputs_logits": "lm_head",
    "logits": "lm_head",
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


def read_dump(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays of a safetensors file, an npz, an npy, or a folder of npy or safetensors, and what they say.

    That is the metadata of a recording ({} for others). In a folder an array has the name of its file, without the
    ending; folders within count as parts of the name. Raises ValueError for what is missing, torn or empty.
    """
    path = Path(path)
    about: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    if path.is_dir():
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
        hint = "a dump is a .safetensors, a .npz, or a folder of .npy files"
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
    """Return an array with its type: NumPy's files keep of bfloat16 that it has two bytes."""
    return x.view(BFLOAT16) if x.dtype == np.dtype("V2") else x


def read_map(path: str | Path) -> dict[str, str]:
    """Return a --map file: a JSON object {"name in the dump": "point"}, {N} in both for the number of a layer."""
    try:
        names = parse_json(readable(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a map of names: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", names).values()):
        raise ValueError(f'{path}: a map of names is a JSON object like {{"blk{{N}}.q": "{LAYER}.self_attn.q_proj"}}')
    for mine, point in cast("dict[str, str]", names).items():
        if mine.count("{N}") > 1 or ("{N}" in point) != ("{N}" in mine):
            raise ValueError(f"{path}: {mine!r} -> {point!r}: {{N}} stands once in both names, or in none")
        if split_layer(point.replace("{N}", "0"))[1] not in STEPS:
            raise ValueError(f"{path}: {mine!r} -> {point!r}: there is no such point")
    return cast("dict[str, str]", names)


def namer(config: Config, names: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return a function from a dump's name to a point's, or to itself where it is unknown; names come first."""
    table = {**(names or {}), **LLAMA_CPP, **MODULES}
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


def layouts(name: str, x: Array, shape: tuple[int, ...], config: Config) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Yield every reading of x as a point of this shape, with what had to be assumed; none if it fits in no way."""
    kind = split_layer(name)[1].rpartition(".")[2]
    flat = kind in ("q_proj", "k_proj", "v_proj", "context")
    axis = position_axis(name)
    if x.ndim and x.shape[-1] > shape[-1] and kind in ("scores", "probs"):  # a cache of fixed size
        yield from (
            (("only the positions so far", *how), y) for how, y in layouts(name, x[..., : shape[-1]], shape, config)
        )
        return
    if x.ndim and x.shape[-1] < shape[-1] and kind in ("scores", "probs"):
        if config.window(split_layer(name)[0] or 0) is not None:  # a cache of no more than that
            before = [(0, 0)] * (x.ndim - 1) + [(shape[-1] - x.shape[-1], 0)]
            x = np.pad(x, before, constant_values=0 if kind == "probs" else -np.inf)
            yield from ((("only the positions in the window", *how), y) for how, y in layouts(name, x, shape, config))
        return
    last = (*shape[:axis], 1, *shape[axis + 1 :])
    for target, note in ((shape, ()), (last, (LAST,))) if shape != last else ((shape, ()),):
        if x.size != int(np.prod(target)):
            continue
        seen: list[tuple[tuple[str, ...], Array]] = []
        if kind in HEADS or flat:
            split = (*target[:2], target[2] // config.head_dim, config.head_dim) if flat else target
            other = (split[0], split[2], split[1], *split[3:])
            if x.shape in (target, target[1:]) or (x.ndim == 2 and flat):
                seen.append(((), x.reshape(target)))
            elif x.shape in (split, split[1:]):
                seen.append((("heads apart",), x.reshape(target)))
            if x.shape in (other, other[1:]):
                seen.append((("heads and positions exchanged",), np.swapaxes(x.reshape(other), 1, 2).reshape(target)))
            if not flat and kind not in ("scores", "probs"):
                order = split if kind.endswith("norm") else other
                joined = (*order[:2], order[2] * order[3])
                if x.shape in (joined, joined[1:]):
                    y = x.reshape(order)
                    seen.append((("heads flattened",), y if order == split else np.swapaxes(y, 1, 2)))
        elif x.shape == target:
            seen.append(((), x))
        elif x.shape[-1] == target[-1] or (kind == "router_weights" and x.shape[-2:] == (target[-1], 1)):
            seen.append(((), x.reshape(target)))
        for how, y in seen:
            if x.shape[0] != target[0] or x.ndim < min(len(target), 3):
                how = ("no batch axis", *how)
            yield (*note, *how), y
            if kind in ("q_proj", "k_proj", "q_norm", "k_norm", "q_rope", "k_rope"):
                lanes = y.reshape(-1, config.head_dim // 2, 2)  # pairs side by side: half-split order undone
                yield (*note, *how, LANES), np.swapaxes(lanes, 1, 2).reshape(y.shape)


def recognise(
    name: str, x: Array, golden: Recording, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], Array, Array, Array] | None:
    """Return what had to be assumed of x; x in the reference's layout; the part that is compared; the reference's.

    Of the readings that fit the point's whole shape, or the shape of what the recording keeps of it, the one nearest to
    the reference; None where there is none. A less plain one must be nearer by far: noise alone decides between two
    wrong ones.
    """
    reference, axis = golden.points[name], position_axis(name)
    readings = [
        (how, y, y if LAST in how else golden.cut(name, y)) for how, y in layouts(name, x, shape, golden.config)
    ]
    if reference.shape != shape:
        readings += [(how, y, y) for how, y in layouts(name, x, reference.shape, golden.config)]
    best = None
    for how, y, part in readings:
        truth = np.take(reference, [-1], axis) if LAST in how else reference
        if part.shape != truth.shape:
            continue
        away = distance(part, truth, axis)[0]
        away = away if np.isfinite(away) else np.inf
        if best is None or away < 0.1 * best[0]:
            best = away, (how, y, part, truth)
    return None if best is None else best[1]
