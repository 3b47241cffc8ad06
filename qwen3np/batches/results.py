"""Lines of results, appended whole: a killed run leaves what it had, and the next one goes on after it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen3np.batches.answers import BEGINNING, is_failure, key_of
from qwen3np.batches.requests import Key
from qwen3np.files.writing import unwritable

_MODEL = re.compile(rb'"system_fingerprint": "(fp-[^"-]+)')  # which no text contains: its quotes are escaped


class Results:
    """A file of results that grows. One process at a time has it open."""

    def __init__(self, path: Path) -> None:
        """Open a file, or create it; drop an incomplete last line.

        Raises ValueError where another process has it open, for a file that holds anything else, and one that cannot
        be written.
        """
        self.path, self.done, self.failed = path, set[Key](), 0
        self._model: bytes | None = None  # that made the results: its part of the fingerprint
        try:
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            _lock(path, self._file)
            self._file.seek(0)
            self._end = 0
            with path.open("rb") as file:
                for n, line in enumerate(file, 1):
                    if line.endswith(b"\n") or not _begun(line):
                        self._count(n, line)
                        self._end += len(line)
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Results:
        """Return these."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self._file.close()

    def write(self, key: Key, line: bytes) -> bool:
        """Append the line of a request, unless it is there already; whether it was written.

        Raises ValueError where it cannot be written, and leaves the lines before it.
        """
        if key in self.done:
            return False
        self._require_same_model(line)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except BaseException as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from error
            raise
        self._end += len(line)
        self.done.add(key)
        self.failed += is_failure(line)
        return True

    def _require_same_model(self, line: bytes) -> None:
        if made_by := _MODEL.search(line):
            if self._model not in (None, made_by[1]):
                raise ValueError(f"{self.path}: holds results of another model or engine; choose another name")
            self._model = made_by[1]

    def _count(self, n: int, line: bytes) -> None:
        try:
            self.done.add(key_of(json.loads(line)))
            self.failed += is_failure(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{self.path}: line {n} is not a result of qwen3np batch; choose another name for the results"
            ) from None
        self._require_same_model(line)


def _begun(line: bytes) -> bool:
    """Whether a line without an end may be the beginning of a result, which is computed again."""
    return line.startswith(BEGINNING) or BEGINNING.startswith(line)


def _lock(path: Path, file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing it; wait for it, or choose another name") from None
    except OSError:  # a file system without locks
        return
