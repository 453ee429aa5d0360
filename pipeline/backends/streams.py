"""Batches side by side on a CPU: as many encoding threads as there are cores, each with its share of them.

Threads that work on one batch together wait for one another at the end of every layer, and for longer wherever a
decoder takes a core from one of them. Measured on two cores with a ViT-B/32, one batch of two threads against two
batches of one thread each: 14.7 and 16.6 images/s in fp32, 33 and 36 in bf16. What one thread computes does not depend
on the number of cores either.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import TypeVar

import torch

from pipeline.core.processes import cores

# Each stream holds the activations of a batch: beyond these, more cores go to each one.
MOST = 8
# Numbers of mallopt's parameters, from glibc's malloc.h; 32 MiB is the most that the first one takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_T = TypeVar("_T")


def count_streams(wanted: int, device: torch.device) -> int:
    """Number of batches that are encoded at the same time; ``wanted`` is the config's number, 0 is automatic.

    A GPU takes one after the other: it fills itself with each.
    """
    if device.type != "cpu":
        return 1
    return wanted or min(cores(), MOST)


@cache
def keep_memory() -> None:
    """Let glibc keep the memory of activations for the next batch, where it would give each back to the kernel.

    Fresh pages for every layer of a ViT-B/32 in fp32 took a tenth of the speed: 14.5 and 15.0 images/s without, 16.2
    and 16.4 with this (two cores, in turn).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 512 * 2**20)


class Streams:
    """Threads for ``count`` batches at a time, each with its share of the cores; on a GPU the calling thread itself.

    Use it as a context manager: it waits for what runs, and drops what does not run yet.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            keep_memory()
            share = max(1, cores() // count)
            self._pool = ThreadPoolExecutor(
                count, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(share,)
            )

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """The result of ``work`` when it is there; on a GPU, where work only queues, it is there at once."""
        if self._pool is not None:
            return self._pool.submit(work)
        done: Future[_T] = Future()
        done.set_result(work())
        return done
