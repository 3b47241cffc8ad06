"""What a measurement depends on: the machine, what else runs on it, and versions."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qwen3np.commands.bench import blas, processor


def busy() -> float:
    """Return the seconds that all cores together have worked since the system started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


@contextmanager
def others(shares: list[float]) -> Generator[None]:
    """Add to `shares` how many cores were busy with other processes in the meantime."""

    def own() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    began, before = time.perf_counter(), busy() - own()
    yield
    shares.append(max(0.0, busy() - own() - before) / (time.perf_counter() - began))


def heading(threads: int, packages: Sequence[str] = ("numpy",)) -> str:
    """Return the lines above a table of measurements."""

    def found(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} (not installed)"

    versions = ", ".join([*map(found, packages), f"Python {platform.python_version()}"])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"- {processor()}, {os.cpu_count()} cores, {threads} threads; {platform.platform()}\n"
        f"- {blas()}; {versions}\n- {date}"
    )
