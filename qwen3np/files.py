"""Files that are read within limits, since strangers wrote them, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, cast

from qwen3np.errors import ConfigError

MOST_BYTES = 1 << 24  # of a JSON file, a header or a template; the largest index of a released model has 3.5 million
_MOST_NAMES = 200_000  # of a JSON object; that index has 37,000


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Give the name of a file beside `path` to write to; it takes the place of `path` when the block is done.

    Raises ValueError where the disk is full or refuses, and where another call began to write `path` meanwhile; after
    any error the file beside is gone, and `path` as it was. Who may read and write `path` stays the same.
    """
    path = path.resolve()  # what a link leads to, not the link
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file; name another place")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # its own: two calls must not write to one file
    try:
        for left in path.parent.glob(f"{escape(path.name)}.{'[0-9a-f]' * 8}.part"):  # by a call that was killed
            with suppress(OSError):
                left.unlink()
        if path.exists():
            part.touch(0o600)  # what few may read stays so on the way
        yield part
        if not part.exists():
            raise ValueError(f"{path}: another call began to write it meanwhile; do it again")
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error  # NumPy's has no errno when a disk is full
        raise ValueError(f"{path}: cannot be written ({reason}); make room there, or name another place") from error
    finally:
        with suppress(OSError):  # it is not there, or the disk takes no change
            part.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError, which says what is wrong and where in the file."""
    try:
        value = parse_json(readable(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; a checkpoint folder needs one") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"holds a JSON {type(value).__name__}, not an object")
    return cast("dict[str, Any]", value)


def readable(path: Path, most: int = MOST_BYTES) -> Path:
    """Return the path of a file that is read whole. Raises OSError for more bytes, and for what is no regular file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes; at most {most} are read", str(path))
    return path


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for bad ones: a name given twice, half a surrogate pair."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > _MOST_NAMES:
            raise ValueError(f"an object has {len(pairs)} names; at most {_MOST_NAMES} are read")
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r} is given twice")
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which is no character
        json.dumps(value, ensure_ascii=False).encode()
    return value
