"""What the system lets a process have: open files, processes, memory, files of memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from pipeline.doctor.check import Check, Status, Subject

GROUP = "limits"
MIB = 2**20
# Name, the limit, below what it is little, in what unit it is told, and what raises it.
LIMITS = (
    ("open files", resource.RLIMIT_NOFILE, 1024, 1, "ulimit -n 4096"),
    ("processes", resource.RLIMIT_NPROC, 1024, 1, "ulimit -u 4096 (threads count too)"),
    ("address space", resource.RLIMIT_AS, 32 * 2**30, MIB, "ulimit -v unlimited: torch maps far more than it uses"),
    ("file size", resource.RLIMIT_FSIZE, 2**30, MIB, "ulimit -f unlimited: parts and exports are larger"),
)
# Docker's default; PyTorch's own loaders and NCCL want more, this pipeline's loader none.
SHARED = Path("/dev/shm")


def look(subject: Subject) -> Iterator[Check]:
    """The limits of this process, which a job started in the same way has too."""
    for name, number, little, unit, way_out in LIMITS:
        soft, hard = resource.getrlimit(number)
        if soft == resource.RLIM_INFINITY:
            yield Check(GROUP, name, Status.OK, "no limit")
            continue
        shown = f"{soft:,}" if unit == 1 else f"{soft / unit:,.0f} MiB"
        status = Status.WARN if soft < little else Status.OK
        raised = (
            ""
            if hard == resource.RLIM_INFINITY or hard >= little
            else " (the hard limit is as low: root must raise it)"
        )
        yield Check(GROUP, name, status, shown, f"{way_out}{raised}" if status is Status.WARN else "",
                    {f"{name.replace(' ', '_')}_limit": float(soft)})  # fmt: skip
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    fact = "off" if soft == 0 else "on: a crash of this process may leave a large file; decoders leave none"
    yield Check(GROUP, "core files", Status.OK, fact)
    yield _shared()


def _shared() -> Check:
    try:
        found = os.statvfs(SHARED)
    except OSError as error:
        fact = f"not there ({error.strerror}); this pipeline's own processes need none"
        return Check(GROUP, "/dev/shm", Status.SKIP, fact)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    fact = f"{free / MIB:,.0f} of {size / MIB:,.0f} MiB free; this pipeline's own processes need none"
    return Check(GROUP, "/dev/shm", Status.OK, fact, figures={"shm_bytes": float(size), "shm_free_bytes": float(free)})
