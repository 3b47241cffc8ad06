"""How much memory is free, and a refusal with the numbers, before anything is allocated, of what would not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_memory() -> int:
    """Return the bytes of memory that can be used without swapping, as the system estimates it; 0 if it cannot say.

    Linux: of the whole machine, or of the control groups of this process (containers are some) if that is less.
    """
    meminfo, groups = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if meminfo.exists():
        own = ""
        with suppress(OSError):
            own = os.fsdecode(groups.read_bytes())  # a path
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return max(min([int(line.split()[1]) * 1024, *left_in_groups(own)]), 1)
    try:  # macOS and other Unix systems: no estimate of what is free, so a part of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 0


def left_in_groups(own: str, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what each memory limit over a process leaves. `own` is its /proc/PID/cgroup; either version is read.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html. Pages of files do not count: the
    system takes them back when it needs them.
    """
    for line in own.splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, limit, usage, total = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, total = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = top / group.lstrip("/")
        for above in (folder, *folder.parents[: len(folder.parts) - len(top.parts)]):
            with suppress(
                OSError, ValueError, KeyError
            ):  # not there, as seen from inside of a container; "max", no limit
                left = int((above / limit).read_text("ascii")) - int((above / usage).read_text("ascii"))
                counts = dict(line.split() for line in (above / "memory.stat").read_text("ascii").splitlines())
                yield left + int(counts[f"{total}inactive_file"]) + int(counts[f"{total}active_file"])


def require_memory(size: int, what: str, way_out: str) -> None:
    """Raise ValueError if `what` takes more bytes than are free, where the system says how many are."""
    free = available_memory()
    if 0 < free < size:
        raise ValueError(
            f"{what} would take {size / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB of memory are free; {way_out}"
        )
