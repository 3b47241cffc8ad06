"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Yield the name of a file next to `path` to write to; it replaces `path` when the block ends.

    Raises ValueError where the disk is full or cannot be written to, and where another call started writing `path` in
    the meantime. After any error the new file is removed and `path` is unchanged. Its permissions are kept.
    """
    path = path.resolve()  # what a link leads to, not the link
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file; name another place")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two calls must not share one
    try:
        for left in path.parent.glob(f"{escape(path.name)}.{'[0-9a-f]' * 8}.part"):  # by a killed call
            with suppress(OSError):
                left.unlink()
        if path.exists():
            part.touch(0o600)  # what few may read must not be readable meanwhile
        yield part
        if not part.exists():
            raise ValueError(f"{path}: another call started writing it in the meantime; try again")
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error  # NumPy's error for a full disk has no errno
        raise ValueError(f"{path}: cannot be written ({reason}); make room there, or name another place") from error
    finally:
        with suppress(OSError):  # it is not there, or the disk is read-only
            part.unlink()
