"""A folder <-> (config, weights): a Hugging Face checkpoint, checked before a weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike

from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import check_links, read_json
from qwen3np.files.tensors import map_tensors, write_tensors
from qwen3np.files.writing import written_aside
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.weights import LoadedWeights, Weights, identity, weight_shapes

if TYPE_CHECKING:
    from qwen3np.tokenizer import Tokenizer

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STORED = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))
_LISTED = 20  # problems that are listed one by one, so that an error stays readable


def read_checkpoint(folder: str | Path) -> tuple[Config, LoadedWeights]:
    """Read a checkpoint: its config, and its weights as read-only views of the mapped files.

    Only config.json and the headers of the safetensors files are read; a weight is read when it is used. A head that
    is stored although the config ties it to the embedding is left out, and names without `model.` (from a file that
    was saved without the head) get it.

    Parameters
    ----------
    folder
        Holds config.json and model.safetensors, or the shards that model.safetensors.index.json lists.

    Returns
    -------
    tuple[Config, LoadedWeights]
        The config, and the weights under Hugging Face's names, in the order of use.

    Raises
    ------
    ConfigError
        For a config.json that cannot be read or is not supported.
    CheckpointError
        For everything else, in one message: what is missing, extra, truncated, or has another shape or dtype than the
        config asks for.

    Examples
    --------
    >>> config, weights = read_checkpoint("Qwen3-0.6B")
    >>> weights["model.norm.weight"].shape
    (1024,)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    check_links(folder)
    config = Config.from_file(folder / "config.json")
    expected = weight_shapes(config)
    problems: list[str] = []
    found: dict[str, Array | None] = {}  # None: in a file that is listed as a problem
    identities: dict[Path, tuple[int, int, int]] = {}
    for path, listed in _files(folder, problems).items():
        tensors: Mapping[str, Array | None]
        try:
            identities[path.absolute()] = identity(path)
            tensors = map_tensors(path)
        except (CheckpointError, OSError) as error:
            cause = f"{path.name}: cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            problems.append(cause)
            tensors = dict.fromkeys(listed or expected)
        problems += [
            f"{name}: not in {path.name}, where {_INDEX} puts it" for name in listed or () if name not in tensors
        ]
        problems += [f"{name}: in more than one file" for name in found.keys() & tensors.keys()]
        found |= tensors

    if not any(name.startswith("model.") for name in found):
        found = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in found.items()}
        if "lm_head.weight" not in found:  # of a model that makes embeddings
            expected.pop("lm_head.weight", None)
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    problems += _misfits(found, expected)
    if problems:
        raise CheckpointError(f"{folder}: not a usable checkpoint: {_listed(list(dict.fromkeys(problems)))}")
    return config, LoadedWeights({name: cast("Array", found[name]) for name in expected}, identities)


def save_checkpoint(
    folder: str | Path,
    config: Config,
    weights: Weights,
    *,
    dtype: DTypeLike | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that this package and transformers load.

    Each file appears whole or not at all, model.safetensors last. A save that was killed can be repeated.

    Parameters
    ----------
    folder
        Where to write; it is made if need be.
    config, weights
        What goes into config.json and model.safetensors. A head that the config ties to the embedding is left out.
    dtype
        What the weights are rounded to: bfloat16, float16 or float32. None keeps the dtype of each.
    tokenizer
        Its files are written as well.
    generation_config
        The contents of a generation_config.json to write, such as `Model.generation_config`.

    Raises
    ------
    CheckpointError
        For weights that do not fit the config, another dtype, a weight too large for float16, and a folder that already
        holds a checkpoint.
    ValueError
        For a full disk.

    Examples
    --------
    >>> save_checkpoint("copy", config, weights, dtype="float16")
    """
    folder = Path(folder)
    files = {"config.json": _json(config.to_dict())}
    if generation_config:
        files["generation_config.json"] = _json(dict(generation_config))
    if tokenizer:
        files |= tokenizer.files()
    for name in (*files, _SINGLE, _INDEX):
        path = folder / name  # a save that was killed leaves files, but the same ones
        if path.exists() and not (path.is_file() and path.read_bytes() == files.get(name)):
            raise CheckpointError(f"{folder}: already holds a checkpoint ({name}); choose a new folder")
    shapes = weight_shapes(config)
    if config.tie_word_embeddings:  # as when reading
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    if problems := _misfits(weights, shapes, dtype):
        raise CheckpointError(f"{folder}: not saved: {_listed(problems)}")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with written_aside(folder / _SINGLE) as part:  # named last: where this file is, all are
            write_tensors(part, weights, shapes, dtype)
            for name, content in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                with written_aside(folder / name) as small:
                    small.write_bytes(content)
    except FloatingPointError:
        raise CheckpointError(f"{folder}: not saved: a weight is too large for {np.dtype(dtype)}") from None


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _misfits(
    found: Mapping[str, Array | None], expected: Mapping[str, tuple[int, ...]], dtype: DTypeLike | None = None
) -> list[str]:
    """Return what is wrong with tensors that are, or with `dtype` will be, stored. None fits everything."""
    problems = [f"{name}: extra: no such tensor in this model" for name in sorted(found.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name}: missing")
        elif (tensor := found[name]) is not None:
            stored = np.dtype(dtype or tensor.dtype)
            if stored not in _STORED:
                problems.append(f"{name}: dtype {stored}; supported: {', '.join(map(str, _STORED))} (unquantised)")
            elif tensor.shape != shape:
                problems.append(f"{name}: shape {tensor.shape}, but the config asks for {shape}")
    return problems


def _listed(problems: Sequence[str]) -> str:
    """Join problems into one line, the first of them if there are many."""
    rest = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "; ".join([*problems[:_LISTED], *rest])


def _files(folder: Path, problems: list[str]) -> dict[Path, list[str] | None]:
    """Return the safetensors files of a folder, each with the tensors that the index, if any, says it holds."""
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read")
    try:
        weight_map = read_json(folder / _INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{folder / _INDEX}: {error}") from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / _INDEX}: has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in cast("dict[str, Any]", weight_map).items():
        if isinstance(shard, str) and shard == Path(shard).name and shard not in ("", ".."):
            shards.setdefault(shard, []).append(name)
        else:
            problems.append(f"{name}: {_INDEX} puts it into {shard!r}, which is not the name of a file in the folder")
    files: dict[Path, list[str] | None] = {}
    for shard, listed in shards.items():
        if os.path.isfile(folder / shard):  # False for impossible names, too
            files[folder / shard] = listed
        else:
            problems.append(f"{shard}: missing, though {_INDEX} names it")
    return files
