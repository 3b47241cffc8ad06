"""Limits on what is read from files, which are treated as untrusted input."""

from __future__ import annotations

import errno
import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any, cast

from qwen3np.errors import CheckpointError, ConfigError

MOST_BYTES = 1 << 24  # of a JSON file, a header or a template; the largest index of a released model has 3.5 million
_MOST_NAMES = 200_000  # of a JSON object; that index has 37,000


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError, which says what is wrong and where in the file."""
    try:
        value = parse_json(readable(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; a checkpoint folder needs one") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(lfs_pointer(path) or f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"holds a JSON {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def lfs_pointer(path: Path) -> str:
    """Return what to do about a file that is only a git-lfs pointer; "" for any other file."""
    with path.open("rb") as file:
        pointer = file.read(24) == b"version https://git-lfs."
    return f"only a git-lfs pointer: run `git lfs pull` in {path.parent}" if pointer else ""


def readable(path: Path, most: int = MOST_BYTES) -> Path:
    """Return the path if the file may be read whole. Raises OSError if it is too large or not a regular file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device would never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes; at most {most} are read", str(path))
    return path


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for malformed ones, repeated names and half surrogates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > _MOST_NAMES:
            raise ValueError(f"an object has {len(pairs)} names; at most {_MOST_NAMES} are read")
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r} is given twice")
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which is not a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_links(folder: Path) -> None:
    """Raise CheckpointError for a link that leads out of the folder. The Hub's cache may link to its own blobs."""
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
