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
