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
    """Yield the name of a temporary file next to `path`, which replaces `path` when the block ends.

    Raises ValueError if the disk is full or not writable, and if another call started writing `path` in the meantime.
    After any error the new file is removed and `path` is unchanged. Permissions are preserved.
    """
    path = path.resolve()  # what a link leads to, not the link
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file; choose another name")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two calls must not share one
    try:
        for left in path.parent.glob(f"{escape(path.name)}.{'[0-9a-f]' * 8}.part"):  # left by a killed call
            with suppress(OSError):
                left.unlink()
        if path.exists():
            part.touch(0o600)  # a private file must not be readable in the meantime
        yield part
        if not part.exists():
            raise ValueError(f"{path}: another call started writing it in the meantime; try again")
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # it is not there, or the disk is read-only
            part.unlink()


def unwritable(path: Path, error: OSError) -> ValueError:
    """The error for a file that cannot be written, or not completely."""
    reason = error.strerror or error  # NumPy's error for a full disk has no errno
    return ValueError(f"{path}: cannot be written ({reason}); free some space there, or choose another place")
