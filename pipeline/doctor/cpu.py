"""Checks of the processor and the memory that this process may use, within the limits of a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.processes import cores
from pipeline.doctor.check import Check, Status, Subject

GROUP = "processor and memory"
CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30
# A small model and its libraries hardly fit into less.
LITTLE_MEMORY = 2 * GIB


def look(subject: Subject) -> Iterator[Check]:
    """Check cores and memory."""
    yield _cores()
    yield _memory()


def quota() -> float | None:
    """Return the cores' worth of time that the container may use; None for no limit."""
    for folder in _cgroup():
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
    limit, period = _read(CGROUPS / "cpu/cpu.cfs_quota_us"), _read(CGROUPS / "cpu/cpu.cfs_period_us")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def memory() -> tuple[int, int]:
    """Return the bytes of memory that this machine or its container has, and the available ones."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    total, available = known.get("MemTotal:", 0), known.get("MemAvailable:", 0)
    files = [(folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in _cgroup()]
    old = CGROUPS / "memory"
    files.append((old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"))
    for limit, usage, stat in files:
        words, used = _read(limit), _read(usage)
        if words.isdigit() and used.isdigit() and int(words) < (total or 1 << 62):
            # Pages of files are given up when memory is needed.
            cached = next((int(line.split()[1]) for line in _read(stat).splitlines() if "inactive_file" in line), 0)
            total, available = int(words), min(available, int(words) - int(used) + cached)
    return total, max(0, available)


def _cores() -> Check:
    usable, present, share = cores(), os.cpu_count() or 1, quota()
    figures = {"cores": float(usable), **({} if share is None else {"cores_quota": share})}
    fact = f"{usable} usable" if usable == present else f"{usable} of {present} usable"
    if share is None or share >= usable - 0.01:
        return Check(GROUP, "cores", Status.OK, fact, figures=figures)
    whole = max(1, round(share))
    way_out = (
        f"the job would start work for {usable}: give it cores of its own (docker run --cpuset-cpus=0-{whole - 1}), or "
        f"set loader.workers={whole} backend.streams={whole}"
    )
    return Check(GROUP, "cores", Status.WARN, f"{fact}, but the container gets {share:g}", way_out, figures)


def _memory() -> Check:
    total, available = memory()
    if not total:
        return Check(GROUP, "memory", Status.SKIP, "not reported by this system")
    figures = {"memory_bytes": float(total), "available_bytes": float(available)}
    fact = f"{available / GIB:,.1f} of {total / GIB:,.1f} GiB available"
    if available < LITTLE_MEMORY:
        way_out = "end other programs or raise the container's limit; a smaller loader.batch_size takes less too"
        return Check(GROUP, "memory", Status.WARN, fact, way_out, figures)
    return Check(GROUP, "memory", Status.OK, fact, figures=figures)


def _cgroup() -> list[Path]:
    """Return the folders of this process's cgroup (version 2), innermost first: each may set a limit."""
    lines = _read(Path("/proc/self/cgroup")).splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = CGROUPS / own.strip("/")
    return [one for one in (folder, *folder.parents) if one.is_relative_to(CGROUPS)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
