"""Requests and results in other formats than JSON lines: compressed, as tables, and vectors alone as an array.

A file in any of these formats appears whole, made from JSON lines.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen3np.batches.requests import LONGEST
from qwen3np.errors import one_line

READ = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
WRITTEN = (*READ, ".npy")
_ROWS = 1024  # in a batch of a table


def suffix(path: Path, known: tuple[str, ...]) -> str:
    """Return which of these formats a name has. Raises ValueError for another."""
    for one in known:
        if path.name.lower().endswith(one) and len(path.name) > len(one):
            return one
    raise ValueError(f"{path}: the name must end with one of {', '.join(known)}")


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of requests, without their ends. Of one that is too long the beginning. Raises ValueError."""
    kind = suffix(path, READ)
    try:
        if kind in (".parquet", ".arrow"):
            yield from _rows(path, kind)
            return
        with _opened(path, kind) as file:
            first = True
            while line := file.readline(LONGEST + 1):
                rest = line
                while len(rest) == LONGEST + 1 and not rest.endswith(b"\n"):
                    rest = file.readline(LONGEST + 1)
                yield line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") if first else line.rstrip(b"\r\n")
                first = False
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(getattr(error, 'strerror', None) or error)}") from None


def ids(path: Path, kind: str) -> list[str | None]:
    """Return the id of each result in a file; None where the format holds none. Raises ValueError."""
    is_table = kind in (".parquet", ".arrow")
    if is_table or kind == ".jsonl.zst":
        _pyarrow()  # an error of its own where it is missing
    try:
        if kind == ".npy":
            return [None] * len(np.load(path, mmap_mode="r"))
        if is_table:
            batches = _tables(path, kind, ["id"])
            return [one for batch in batches for one in batch.column("id").to_pylist()]
        with _opened(path, kind) as file:
            return [json.loads(line)["id"] for line in file]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: holds no results of qwen3np batch; choose another name for the results") from None


def write(path: Path, kind: str, lines: Iterable[bytes], count: int) -> None:
    """Write lines of results, `count` of them, as a file of this format. Raises ValueError for what it cannot hold."""
    if kind == ".npy":
        _write_vectors(path, lines, count)
    elif kind == ".parquet":
        with _pyarrow().parquet.ParquetWriter(path, _schema(), compression="zstd") as writer:
            for batch in _batches(lines):
                writer.write_batch(batch)
    elif kind == ".arrow":
        with _pyarrow().ipc.new_file(str(path), _schema()) as writer:
            for batch in _batches(lines):
                writer.write_batch(batch)
    elif kind == ".jsonl.zst":
        with _pyarrow().output_stream(str(path), compression="zstd") as file:
            file.writelines(lines)
    elif kind == ".jsonl.gz":  # without name and time, so that equal lines are equal bytes
        with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            file.writelines(lines)
    else:
        with path.open("wb") as file:
            file.writelines(lines)


def _opened(path: Path, kind: str) -> IO[bytes]:
    if kind == ".jsonl.gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    if kind == ".jsonl.zst":
        return io.BufferedReader(_pyarrow().input_stream(str(path), compression="zstd"))  # pyright: ignore[reportReturnType]
    return path.open("rb")


def _tables(path: Path, kind: str, columns: list[str] | None = None) -> Iterator[Any]:
    if kind == ".parquet":
        return _pyarrow().parquet.ParquetFile(path).iter_batches(_ROWS, columns=columns)
    file = _pyarrow().ipc.open_file(str(path))
    return map(file.get_batch, range(file.num_record_batches))


def _rows(path: Path, kind: str) -> Iterator[bytes]:
    for batch in _tables(path, kind):
        for row in batch.to_pylist():
            if isinstance(row.get("body"), str):
                with suppress(ValueError, RecursionError):  # then it is no object
                    row["body"] = json.loads(row["body"])
            yield json.dumps({name: value for name, value in row.items() if value is not None}, default=repr).encode()


def _schema() -> Any:
    pa = _pyarrow()
    texts = {name: pa.string() for name in ("id", "custom_id", "body", "error")}
    return pa.schema({**texts, "status_code": pa.int32(), "embedding": pa.list_(pa.float32())})


def _batches(lines: Iterable[bytes]) -> Iterator[Any]:
    rest = iter(lines)
    while rows := [_row(line) for line in islice(rest, _ROWS)]:
        yield _pyarrow().RecordBatch.from_pylist(rows, _schema())


def _row(line: bytes) -> dict[str, Any]:
    """A line of results as a row: the body as JSON, except a vector."""
    result: dict[str, Any] = json.loads(line)
    response: dict[str, Any] = result["response"] or {"status_code": None, "body": None}
    vector = _vector(response["body"])
    if vector is not None:
        response["body"]["data"][0]["embedding"] = None
    body, error = (None if one is None else json.dumps(one) for one in (response["body"], result["error"]))
    found = {"id": result["id"], "custom_id": result["custom_id"], "body": body, "error": error}
    return {**found, "status_code": response["status_code"], "embedding": vector}


def _vector(body: dict[str, Any] | None) -> Any:
    """The vector of the answer to one text, else None."""
    data = (body or {}).get("data", ())
    if len(data) != 1:
        return None
    given = data[0]["embedding"]
    return np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given, np.float32)


def _write_vectors(path: Path, lines: Iterable[bytes], count: int) -> None:
    """Write an array (N, D): the vector of each request; NaN where it has none."""
    width, before = None, 0
    with path.open("wb") as file:
        for line in lines:
            result = json.loads(line)
            response = result["response"]
            vector = _vector(response and response["body"])
            if vector is None and response and response["status_code"] == 200:
                raise ValueError(f".npy holds one vector for each request, unlike {result['custom_id']!r}")
            if width is None:
                if vector is None:
                    before += 1
                    continue
                width = vector.size
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(np.full((before, width), np.nan, "<f4").tobytes())
            if vector is not None and vector.size != width:
                raise ValueError(f".npy holds vectors of length {width}, unlike that of {result['custom_id']!r}")
            file.write((np.full(width, np.nan, "<f4") if vector is None else vector).tobytes())
    if width is None:
        raise ValueError(".npy holds vectors, but no request has one")


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc  # pyright: ignore[reportUnusedImport]
        import pyarrow.parquet  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ValueError("this format needs pyarrow: pip install qwen3np[batch]") from None
    return pyarrow
