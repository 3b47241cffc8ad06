"""Points compared by hash alone: for ports that are exact themselves.

An exact recording (engine="exact") has the same bits wherever it is made, so a port that rounds every operation
correctly needs no golden values, only their SHA-256 (verify.sha256).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen3np.files.limits import read_json


def read_hashes(path: Path) -> dict[str, str]:
    """Return the hashes in a JSON file {point: SHA-256}. Raises ValueError for anything else."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, value in found.items():
        if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
            raise ValueError(f"{path}: {name}: {value!r} is no SHA-256 in hexadecimal digits")
    return found


def differing(golden: Mapping[str, str], mine: Mapping[str, str]) -> tuple[list[str], list[str], list[str]]:
    """Return the points that differ, in the order of golden, those missing in mine, and unknown names of mine."""
    return (
        [name for name in golden if name in mine and mine[name] != golden[name]],
        [name for name in golden if name not in mine],
        [name for name in mine if name not in golden],
    )
