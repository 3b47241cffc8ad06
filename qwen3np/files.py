"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Give the name of a file beside `path` to write to; it takes the place of `path` when the block is done.

    Raises ValueError where the disk is full or refuses; after any error the file beside is gone, and `path` as it was.
    """
    path = path.resolve()  # what a link leads to, not the link
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file; name another place")
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error  # NumPy's has no errno when a disk is full
        raise ValueError(f"{path}: cannot be written ({reason}); make room there, or name another place") from error
    finally:
        part.unlink(missing_ok=True)
