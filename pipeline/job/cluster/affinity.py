"""A process's share of the machine's cores; a worker process loads this first, before torch counts them.

The share is an affinity, not a number in the environment: torch, ONNX Runtime, Arrow and the decoder processes all
keep to it, and :func:`pipeline.core.processes.cores` says it.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from typing import Any

VARIABLE = "PIPELINE_WORKER_CORES"


def shares(workers: int, each: int) -> list[list[int]]:
    """The cores of every worker; ``each`` is how many, 0 for an equal share of all that this process may use.

    Neighbouring numbers go together, as they share caches and memory. Where more are asked for than there are, workers
    share them in turn.
    """
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    size = min(each, len(known)) or max(1, len(known) // workers)
    return [[known[(start + place) % len(known)] for place in range(size)] for start in range(0, workers * size, size)]


def dask_setup(worker: Any) -> None:
    """Called by Dask in a worker process that begins: take the share, and leave Ctrl-C to the process that started it.

    All signals of a terminal go to its whole group, and only that process knows how to end the job.
    """
    wanted = {int(number) for number in os.environ[VARIABLE].split(",")}
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            # A thread may end meanwhile; those to come inherit the share.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), wanted)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()


def quiet() -> dict[str, int]:
    """Silence what Dask says of workers that come and go, which the job says itself; the levels from before."""
    before = {}
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] in ("distributed", "tornado") and isinstance(logger, logging.Logger):
            before[name] = logger.level
            logger.setLevel(logging.CRITICAL)
    return before
