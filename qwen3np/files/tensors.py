"""A safetensors file <-> tensors: mapped when read, written in pieces.

The format: https://huggingface.co/docs/safetensors. Eight bytes give the length of a JSON header, which gives the
dtype, shape and place of each tensor in the bytes after it. The safetensors library reads and checks the header; it
accepts neither gaps nor overlaps, so the order and sizes of the tensors determine their places. But it would copy the
tensors into memory when reading, and gather all bytes of a file before writing.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from qwen3np.errors import CheckpointError
from qwen3np.files.limits import MOST_BYTES, lfs_pointer
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.weights import Weights

if sys.byteorder == "big":
    raise ImportError("qwen3np: this machine is big-endian; checkpoints and bfloat16 are little-endian")

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind.upper()}{bits}": np.dtype(f"<{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
_PIECE = 1 << 22  # elements rounded and written at a time, so that saving takes hardly any memory


def map_tensors(path: Path) -> dict[str, Array]:
    """Return the tensors of a file as read-only views, without reading their numbers.

    Raises CheckpointError, which names the file, the problem and what to do, and OSError if the system cannot read it.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if pointer := lfs_pointer(path):
            raise CheckpointError(f"{path.name}: {pointer}")
        if length > size - 8:
            raise CheckpointError(f"{path.name}: truncated: {size} bytes, too few for its header; download it again")
        if length > MOST_BYTES:
            raise CheckpointError(f"{path.name}: its header has {length} bytes; at most {MOST_BYTES} are read")
        header = file.read(length)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    end = 8 + length
    try:
        with cast("Any", safe_open)(path, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        cause = f"damaged: {str(error).removeprefix('Error while deserializing header: ')}"
        if (whole := _described(header)) > size:
            cause = f"truncated: {size} bytes of {whole}"
        raise CheckpointError(f"{path.name}: {cause}; download it again") from None
    replaced = CheckpointError(f"{path.name}: was replaced while its header was being read; load it again")
    tensors: dict[str, Array] = {}
    for name, (dtype, shape) in found.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{name}: dtype {dtype} in {path.name} does not exist in NumPy")
        try:
            tensors[name] = np.ndarray(shape, _DTYPES[dtype], mapped, end)
        except ValueError as error:  # more dimensions than NumPy has, or more elements next to a dimension of 0
            raise CheckpointError(f"{name}: impossible shape in {path.name}: {error}") from None
        except TypeError:  # it ends after the file that was mapped
            raise replaced from None
        end += tensors[name].nbytes
    if end != size:
        raise replaced
    return tensors


def _described(header: bytes) -> int:
    """Return how many bytes a file with this header must have, or 0 if the header does not say."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        whole = 8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0
    return whole if type(whole) is int and whole < 2**63 else 0


def write_tensors(path: Path, tensors: Weights, names: Collection[str], dtype: DTypeLike | None = None) -> None:
    """Write these tensors in this order, rounded to `dtype` (None: as they are), and sync the file to disk.

    Raises FloatingPointError for a number that is too large for float16, OSError for a full disk.
    """
    spelled = {stored: name for name, stored in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this
    end = 0
    for name in names:
        tensor = tensors[name]
        stored = np.dtype(dtype or tensor.dtype)
        begin, end = end, end + tensor.size * stored.itemsize
        header[name] = {"dtype": spelled[stored], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            step = max(_PIECE * len(tensor) // tensor.size, 1)  # rows
            for start in range(0, len(tensor), step):
                with np.errstate(over="raise"):
                    piece = tensor[start : start + step].astype(dtype or tensor.dtype, copy=False)
                # a view as bytes: NumPy's buffer protocol has no format for bfloat16
                file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
