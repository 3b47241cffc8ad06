"""A folder <-> (config, weights): a Hugging Face checkpoint, checked before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike

from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files import hf_config
from qwen3np.files.folders import INDEX, SINGLE, require_checkpoint, weight_files
from qwen3np.files.limits import check_links, read_json
from qwen3np.files.names import known_names, split_experts, without_zeros
from qwen3np.files.packing import packed
from qwen3np.files.tensors import map_tensors, write_tensors
from qwen3np.files.writing import written_aside
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.stored import Stored
from qwen3np.weights import LoadedWeights, Weights, identity, weight_shapes

if TYPE_CHECKING:
    from qwen3np.tokenizer import Tokenizer

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"  # (labels, D): the head of Qwen3ForSequenceClassification, which scores texts
_PIECE = 1 << 22  # numbers compared at a time
_STORED = (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32))
_LISTED = 20  # problems that an error lists; more would be unreadable


def read_checkpoint(folder: str | Path) -> tuple[Config, LoadedWeights]:
    """Read a checkpoint: its config, and its weights as read-only views of the mapped files.

    Only config.json and the headers of the safetensors files are read; a weight is read when it is used. A stored head
    is left out if the config ties it to the embedding and both are equal. Names without `model.` (in files saved
    without the head) get this prefix.

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
        For everything else, in one message: tensors that are missing, extra, truncated, or of another shape or dtype
        than the config requires.

    Examples
    --------
    >>> qwen3np.load().save("copy")
    >>> config, weights = qwen3np.read_checkpoint("copy")
    >>> weights["model.norm.weight"].shape
    (160,)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    check_links(folder)
    require_checkpoint(folder)
    problems: list[str] = []
    found: dict[str, Array | None] = {}  # None: its file is already listed as a problem
    unreadable = False
    identities: dict[Path, tuple[int, int, int]] = {}
    for path, listed in weight_files(folder, problems).items():
        tensors: Mapping[str, Array | None]
        try:
            identities[path.absolute()] = identity(path)
            tensors = map_tensors(path)
        except (CheckpointError, OSError) as error:
            cause = f"{path.name}: cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            problems.append(cause)
            unreadable |= not listed
            tensors = dict.fromkeys(listed or ())
        problems += [
            f"{name}: not in {path.name}, where {INDEX} puts it" for name in listed or () if name not in tensors
        ]
        problems += [f"{name}: in more than one file" for name in found.keys() & tensors.keys()]
        found |= tensors

    found, remarks = known_names(found)
    settings = _settings(folder / "config.json", found)
    config = hf_config.from_settings(settings, folder / "config.json")
    expected = weight_shapes(config) | {_HEAD: (config.vocab_size, config.hidden_size)}
    if unreadable:  # a file without an index: do not report its tensors as missing, too
        found = dict.fromkeys(expected) | found
    found, damaged = split_experts(without_zeros(found, expected), config)
    try:
        quantization = settings.get("quantization_config") or settings.get("quantization")
        stored, unfit = packed(found, expected, config, quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    stored = {name: _narrowed(tensor) for name, tensor in stored.items()}
    config, head = _with_its_head(config, stored)
    expected = _expected(config, stored)
    problems += [*damaged, *unfit, *_misfits(stored, expected)]
    if problems:
        raise CheckpointError(f"{folder}: not a usable checkpoint: {_listed(list(dict.fromkeys(problems)))}")
    weights = {name: cast("Array", stored[name]) for name in expected}
    return config, LoadedWeights(weights, identities, [*remarks, *hf_config.remarks(settings), *head])


def _settings(path: Path, found: Mapping[str, Array | None]) -> dict[str, Any]:
    """Return the contents of config.json; a missing head_dim is read from the tensors."""
    try:
        settings = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    norms = (tensor for name, tensor in found.items() if name.endswith(".self_attn.q_norm.weight"))
    norm = next(norms, None)
    if settings.get("head_dim") is None and norm is not None and norm.ndim == 1 and norm.size:
        settings["head_dim"] = norm.size
    return settings


def _with_its_head(config: Config, tensors: dict[str, Array | Stored | None]) -> tuple[Config, list[str]]:
    """Drop a stored head if the config ties it to the embedding, unless the two differ.

    Returns the config, which in that case no longer ties them, and a remark about it.
    """
    if not config.tie_word_embeddings or _HEAD not in tensors:
        return config, []
    embedding, head = tensors.get(_EMBEDDING), tensors[_HEAD]
    if _EMBEDDING not in tensors:
        tensors[_EMBEDDING] = head
    if embedding is None or head is None or _same_numbers(embedding, head):
        del tensors[_HEAD]
        return config, []
    remark = "config.json ties the head to the embedding, but the file has a different head, which is used"
    return replace(config, tie_word_embeddings=False), [remark]


def _same_numbers(a: Array | Stored, b: Array | Stored) -> bool:
    """Whether two matrices hold the same numbers; they are read in pieces, up to the first difference."""
    if a.shape != b.shape:
        return False
    step = max(_PIECE * len(a) // max(a.size, 1), 1)
    for start in range(0, len(a), step):
        one, other = (np.asarray(tensor[start : start + step]) for tensor in (a, b))
        if one.dtype == other.dtype:  # as bytes: faster, and NaN equals NaN
            one, other = one.view(np.uint8), other.view(np.uint8)
        if not np.array_equal(one, other):
            return False
    return True


def _expected(config: Config, tensors: Mapping[str, Array | Stored | None]) -> dict[str, tuple[int, ...]]:
    """Return the required shapes: the config's, plus a score head if there is one, minus a missing head."""
    expected = weight_shapes(config)
    if _HEAD not in tensors:  # a model for embeddings or scores
        expected.pop(_HEAD, None)
    if (score := tensors.get(SCORE)) is not None and score.ndim == 2:
        expected[SCORE] = (len(score), config.hidden_size)
    return expected


def _narrowed(tensor: Array | Stored | None) -> Array | Stored | None:
    """Convert a float64 tensor to float32 (no model is trained in float64); return any other unchanged."""
    return tensor.astype(np.float32) if tensor is not None and tensor.dtype == np.float64 else tensor


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
        Where to write; it is created if necessary.
    config, weights
        The contents of config.json and model.safetensors. A head that is tied to the embedding is left out.
    dtype
        The dtype to round weights to: bfloat16, float16 or float32. None keeps the dtype of each.
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
    >>> model = qwen3np.load()
    >>> qwen3np.save_checkpoint("copy", model.config, model.weights, dtype="float16")
    """
    folder = Path(folder)
    files = {"config.json": _json(config.to_dict())}
    if generation_config:
        files["generation_config.json"] = _json(dict(generation_config))
    if tokenizer:
        files |= tokenizer.files()
    for name in (*files, SINGLE, INDEX):
        path = folder / name  # a killed save may have left some of these files, with the same contents
        if path.exists() and not (path.is_file() and path.read_bytes() == files.get(name)):
            raise CheckpointError(f"{folder}: already holds a checkpoint ({name}); choose a new folder")
    shapes = _expected(config, weights)
    if config.tie_word_embeddings:  # as when reading
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    if problems := _misfits(weights, shapes, dtype):
        raise CheckpointError(f"{folder}: not saved: {_listed(problems)}")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with written_aside(folder / SINGLE) as part:  # renamed last: if this file exists, all do
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
    found: Mapping[str, Array | Stored | None],
    expected: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike | None = None,
) -> list[str]:
    """Return what is wrong with tensors as stored, or as they will be stored with `dtype`. None fits everything."""
    problems = [f"{name}: extra: no such tensor in this model" for name in sorted(found.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name}: missing")
        elif (tensor := found[name]) is not None:
            stored = np.dtype(dtype or tensor.dtype)
            if stored not in _STORED:
                problems.append(f"{name}: dtype {stored}; supported: {', '.join(map(str, _STORED))} (unquantised)")
            elif tensor.shape != shape:
                problems.append(f"{name}: shape {tensor.shape}, but the config requires {shape}")
    return problems


def _listed(problems: Sequence[str]) -> str:
    """Join problems into one line; if there are many, only the first ones."""
    rest = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "; ".join([*problems[:_LISTED], *rest])
