"""A file of requests -> a file of results, or several: what is done already is not done again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from qwen3np.batches import tables
from qwen3np.batches.answers import REQUEST, Answers, is_failure, key_of, tag
from qwen3np.batches.requests import Key, Request, left_of, packets, requests_of
from qwen3np.batches.results import Results
from qwen3np.files.writing import written_aside
from qwen3np.terminal import bars

Answering: TypeAlias = Callable[[Iterable[list[Request]]], Iterator[tuple[Request, bytes]]]


def here(answers: Answers) -> Answering:
    """Answer packets in this process, one after the other."""
    return lambda packets: chain.from_iterable(map(answers, packets))


def run(
    source: Path, out: Path, answering: Callable[[], Answering], *, in_order: bool = False, per_file: int | None = None
) -> Counter[str]:
    """Answer a file of requests. Returns how many results there are, in files that were complete, and failures.

    Parameters
    ----------
    source, out
        Their names tell the formats. JSON lines grow as results come; other formats are made from them at the end, in
        the order of the requests.
    answering
        Called once, if there is anything to do.
    in_order
        Give JSON lines this order, too.
    per_file
        The results of this many requests go to a file: NAME-00000.jsonl and so on.

    Raises
    ------
    ValueError
        For names of other formats, files that cannot be read or written, and results that do not belong to these
        requests. CheckpointError for a checkpoint that changes.
    """
    kind = tables.suffix(out, tables.WRITTEN)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: the results need another file than the requests")
    total, counts, started = sum(map(len, tables.lines_of(source))), Counter[str](), list[Answering]()

    def answered(work: Iterable[list[Request]]) -> Iterator[tuple[Request, bytes]]:
        rest = iter(work)
        for first in rest:  # nothing is loaded if there is none
            started.extend([] if started else [answering()])
            yield from started[0](chain([first], rest))

    with bars()(total=total, desc="batch", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for n, requests in enumerate(_slices(requests_of(tables.lines_of(source)), per_file)):
            name = out.name[: -len(kind)] + f"-{n:05}" * (per_file is not None) + kind
            _fill(out.with_name(name), kind, requests, answered, in_order, bar, counts)
    return counts


def _slices(requests: Iterator[Request], size: int | None) -> Iterator[Iterator[Request]]:
    """Yield iterators over `size` requests each, or one over all; each must be exhausted before the next."""
    for first in requests:
        yield chain([first], requests if size is None else islice(requests, size - 1))


def _fill(
    out: Path,
    kind: str,
    requests: Iterator[Request],
    answered: Answering,
    in_order: bool,
    bar: Any,
    counts: Counter[str],
) -> None:
    """Write one file of results."""
    grows = kind == ".jsonl" and not in_order
    growing = out if grows else out.with_name(f"{out.name}.growing.jsonl")
    keys = list[Key]()
    if not grows and out.exists() and not growing.exists():
        keys += [request.key for request in requests]
        found = tables.ids(out, kind)
        if len(found) != len(keys):
            raise ValueError(f"{out}: has {len(found):,} results for {len(keys):,} requests; choose another name")
        for n, (found_id, key) in enumerate(zip(found, keys, strict=True), 1):
            if found_id not in (None, REQUEST + tag(key)):
                raise ValueError(f"{out}: result {n:,} is not that of request {key!r}; choose another name")
        counts["results"] += len(keys)
        counts["complete"] += len(keys)
        return

    with Results(growing) as results:

        def left() -> Iterator[list[Request]]:
            for packet in packets(noted()):
                done = sum(request.size for request in packet if request.key in results.done)
                if done and not bar.disable:
                    bar.initial += done  # which says nothing about the speed of this run
                    bar.update(done)
                if todo := left_of(packet, results.done):
                    yield todo

        def noted() -> Iterator[Request]:
            for request in requests:
                keys.append(request.key)
                yield request

        for request, line in answered(left()):
            if results.write(request.key, line):
                bar.update(request.size)
                bar.set_postfix_str(f"{len(results.done):,} requests, {results.failed:,} failed", refresh=False)
        counts["results"] += len(results.done)
        counts["failures"] += results.failed
        if grows:
            return
        with written_aside(out) as part:
            tables.write(part, kind, _ordered(growing, keys), len(keys))
        if kind == ".npy" and results.failed:
            with written_aside(out.with_name(f"{out.name}.failed.jsonl")) as part, part.open("wb") as file:
                file.writelines(line for line in _ordered(growing, keys) if is_failure(line))
    growing.unlink()


def _ordered(path: Path, keys: list[Key]) -> Iterator[bytes]:
    """Yield the lines of results of these requests, in this order."""
    with path.open("rb") as file:
        places = dict[Key, int]()
        while line := file.readline():
            places[key_of(json.loads(line))] = file.tell() - len(line)
        for key in keys:
            file.seek(places[key])
            yield file.readline()
