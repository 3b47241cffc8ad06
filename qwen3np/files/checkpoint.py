"""A folder <-> (config, weights): the safetensors files of a Hugging Face checkpoint, mapped and checked.

The format: https://huggingface.co/docs/safetensors. Eight bytes give the length of a JSON header, which gives each
tensor's dtype, shape and place in the bytes behind it. Reading it here, rather than through a library, is what lets
every tensor be a view of the mapped file, in bfloat16 too.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import MOST_BYTES, parse_json, read_json
from qwen3np.files.writing import written_aside
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.weights import MappedWeights, Weights, identity, weight_shapes

if sys.byteorder == "big":
    raise ImportError("qwen3np: checkpoints are little-endian, and bfloat16 has no other form: this machine is not")

_DTYPES: dict[str, np.dtype[Any]] = {"BF16": BFLOAT16, "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PIECE = 1 << 22  # elements that are rounded and written at a time: saving takes no memory to speak of
_LISTED = 20  # problems told one by one, so that an error stays readable


def read_checkpoint(folder: str | Path) -> tuple[Config, MappedWeights]:
    """Return the config and the mapped, read-only weights of a folder, after checking all of them.

    Reads config.json and the headers of model.safetensors, or of the shards in model.safetensors.index.json; not one
    weight. A head that is stored though the config ties it to the embedding is left out, and names without `model.`
    (of a file that was saved without the head) get it. Raises ConfigError for the config, CheckpointError for the rest:
    one message that lists what is missing, extra, truncated, or of another shape or dtype than the config asks for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    check_links(folder)
    config = Config.from_file(folder / "config.json")
    problems: list[str] = []
    stored: dict[str, Array | None] = {}  # None: found, but not usable; its problem is listed
    identities: dict[Path, tuple[int, int, int]] = {}
    for path, listed in _files(folder, problems).items():
        try:
            identities[path.absolute()] = identity(path)
            tensors = _map_file(path, problems)
        except OSError as error:
            problems.append(f"{path.name}: cannot be read: {error.strerror}")
            continue
        for name in listed or ():
            if name not in tensors:
                problems.append(f"{name}: not in {path.name}, where {_INDEX} puts it")
        for name in stored.keys() & tensors.keys():
            problems.append(f"{name}: in more than one file")
        stored |= tensors

    expected = weight_shapes(config)
    if not any(name.startswith("model.") for name in stored):
        stored = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in stored.items()}
        if "lm_head.weight" not in stored:  # of a model that makes embeddings
            expected.pop("lm_head.weight", None)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    problems += [f"{name}: extra: no such tensor in this model" for name in sorted(stored.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in stored:
            problems.append(f"{name}: missing")
        elif (tensor := stored[name]) is not None and tensor.shape != shape:
            problems.append(f"{name}: shape {tensor.shape}, but the config asks for {shape}")
    if problems:
        raise CheckpointError(f"{folder}: not a usable checkpoint: {_listed(list(dict.fromkeys(problems)))}")
    weights = MappedWeights({name: cast("Array", stored[name]) for name in expected})
    weights.files = identities
    return config, weights


def check_links(folder: Path) -> None:
    """Raise CheckpointError for a file that is a link out of the folder, but to the blobs of the Hub's own cache."""
    root = folder.resolve()
    blobs = (root.parent.parent / "blobs").resolve() if root.parent.name == "snapshots" else root
    for pattern in ("*.safetensors", "*.json", "*.jinja", "merges.txt", "additional_chat_templates", "*/*.jinja"):
        for path in folder.glob(pattern):
            if path.is_symlink():
                try:
                    target = path.resolve()
                except (OSError, RuntimeError) as error:  # a loop
                    raise CheckpointError(f"{path}: a link that leads nowhere: {error}") from None
                if not {root, blobs} & set(target.parents):
                    raise CheckpointError(f"{path}: leads to {target}, outside the checkpoint's folder; copy that file")


def save_checkpoint(folder: str | Path, config: Config, weights: Weights, *, dtype: DTypeLike | None = None) -> None:
    """Write config.json and model.safetensors, which transformers loads unchanged.

    dtype (bfloat16, float16 or float32) is what the tensors are rounded to; None keeps each as it is. The folder is
    made if need be. Raises CheckpointError for tensors that do not fit the config, for another dtype and for a folder
    that already holds a checkpoint, and ValueError for a full disk. Each file appears whole or not at all, and a save
    that was killed can be done again.
    """
    folder, config_file = Path(folder), Path(folder, "config.json")
    config_text = json.dumps(config.to_dict(), indent=2) + "\n"
    for file in (config_file, folder / _SINGLE, folder / _INDEX):
        # the same config alone is what is left of a save that was killed between its two files
        if file.exists() and not (file == config_file and file.read_bytes() == config_text.encode()):
            raise CheckpointError(f"{folder}: already holds a checkpoint ({file.name}); choose a new folder")
    shapes = weight_shapes(config)
    if config.tie_word_embeddings:  # as when reading: the embedding is the head
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    names = {stored: name for name, stored in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know whose layout it is
    problems = [f"{name}: extra: no such tensor in this model" for name in weights.keys() - shapes.keys()]
    end = 0
    for name, shape in shapes.items():
        if name not in weights:
            problems.append(f"{name}: missing")
            continue
        stored = np.dtype(dtype or weights[name].dtype)
        if weights[name].shape != shape:
            problems.append(f"{name}: shape {weights[name].shape}, but the config asks for {shape}")
        elif stored not in names:
            problems.append(f"{name}: dtype {stored}; supported: bfloat16, float16, float32")
        else:
            begin, end = end, end + math.prod(shape) * stored.itemsize
            header[name] = {"dtype": names[stored], "shape": shape, "data_offsets": [begin, end]}
    if problems:
        raise CheckpointError(f"{folder}: not saved: {_listed(problems)}")

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    try:
        with written_aside(folder / _SINGLE) as weights_part:  # the last to get its name: where it is, all is
            with weights_part.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in shapes:
                    flat = weights[name].reshape(-1)
                    for start in range(0, flat.size, _PIECE):
                        with np.errstate(over="raise"):  # a value that float16 cannot hold
                            piece = flat[start : start + _PIECE].astype(dtype or flat.dtype, copy=False)
                        # a view as bytes: NumPy's buffer protocol has no format for bfloat16
                        file.write(np.ascontiguousarray(piece).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            with written_aside(config_file) as config_part:
                config_part.write_bytes(config_text.encode())
    except FloatingPointError:
        raise CheckpointError(f"{folder}: not saved: a weight is too large for {np.dtype(dtype)}") from None


def _listed(problems: Sequence[str]) -> str:
    """Put problems into one line, the first of them if they are many."""
    rest = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "; ".join([*problems[:_LISTED], *rest])


def _files(folder: Path, problems: list[str]) -> dict[Path, list[str] | None]:
    """Return the safetensors files of a folder, each with the tensors that the index, if there is one, puts there."""
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
        if os.path.isfile(folder / shard):  # False for names that no file can have, too
            files[folder / shard] = listed
        else:
            problems.append(f"{shard}: missing, though {_INDEX} names it")
    return files


def _map_file(path: Path, problems: list[str]) -> dict[str, Array | None]:
    """Map a safetensors file and return its tensors as read-only views; what cannot be one goes into problems."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            problems.append(f"{path.name}: truncated: {size} bytes, too few for its header")
            return {}
        if length > MOST_BYTES:
            problems.append(f"{path.name}: its header has {length} bytes; at most {MOST_BYTES} are read")
            return {}
        try:
            header = parse_json(file.read(length).decode())
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name}: the header is not JSON: {error}")
            return {}
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not isinstance(header, dict):
        problems.append(f"{path.name}: the header is not an object")
        return {}
    tensors: dict[str, Array | None] = {}
    spans: list[tuple[int, int, str]] = []
    cut: list[tuple[int, str]] = []  # where those end that the file is too short for
    for name, entry in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            texts = list(cast("dict[str, Any]", entry).values()) if isinstance(entry, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                problems.append(f"{path.name}: the metadata is not an object of texts")
            continue
        tensors[name] = None
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**63 for n in (begin, end, *shape))
        except (KeyError, TypeError, ValueError):
            whole, dtype, shape, begin, end = False, "", (), 0, 0
        if not whole:
            problems.append(f"{name}: its entry in the header of {path.name} is malformed")
        elif dtype not in _DTYPES:
            problems.append(f"{name}: dtype {dtype}; supported: BF16, F16, F32 (unquantised weights)")
        elif end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            problems.append(f"{name}: {end - begin} bytes in {path.name} do not make {dtype} {shape}")
        elif 8 + length + end > size:
            cut.append((8 + length + end, name))
        else:
            spans.append((begin, end, name))
            try:
                tensors[name] = np.ndarray(shape, _DTYPES[dtype], mapped, 8 + length + begin)
            except ValueError as error:  # more dimensions, or more in one of them beside a zero, than NumPy has
                problems.append(f"{name}: no array of {path.name} has this shape: {error}")
    if cut:
        end, name = max(cut)
        more = f", which cuts off {len(cut) - 1} more tensors" if len(cut) > 1 else ""
        problems.append(f"{name}: {path.name} is truncated: {size} bytes of at least {end}{more}; download it again")
    # the format leaves neither holes nor overlaps: where there are some, an offset is wrong
    for (_, end, before), (begin, _, name) in pairwise(sorted(spans)):
        if begin < end:
            problems.append(f"{name}: overlaps {before} in {path.name}")
    if len(spans) == len(tensors) and sum(end - begin for begin, end, _ in spans) != size - 8 - length:
        problems.append(f"{path.name}: holds bytes that belong to no tensor")
    return tensors
