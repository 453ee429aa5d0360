"""Throughput and core seconds of work that threads do side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from pipeline.core.processes import spent

# Seconds before a measurement: idle threads of the one before may spin for a while.
PAUSE = 0.3


@dataclass(frozen=True, slots=True)
class Throughput:
    """Images/s of all threads together, and the core seconds of an image."""

    images_per_second: float
    core_seconds: float


@dataclass(frozen=True, slots=True)
class Workers:
    """Threads that work side by side.

    Attributes:
        count: number of the threads.
        submit: runs a function in one of them.
        finish: waits for work that they have queued, as on a GPU.
    """

    count: int
    submit: Callable[[Callable[[], tuple[int, float]]], Future[tuple[int, float]]]
    finish: Callable[[], None] = lambda: None


def measure(work: Callable[[], int], seconds: float, workers: Workers) -> Throughput:
    """Repeat ``work`` in every thread for ``seconds``, after one call in each to warm up.

    Each thread has its own clock, which stops at the end of its last call, so that idle time is not counted.

    Args:
        work: does one piece; returns the number of its images.
        seconds: the time after which a thread begins no other piece.
        workers: the threads.
    """

    def loop(length: float) -> tuple[int, float]:
        began, done = time.perf_counter(), 0
        while True:
            done += work()
            if time.perf_counter() - began >= length:
                workers.finish()
                return done, time.perf_counter() - began

    def all_threads(length: float) -> list[tuple[int, float]]:
        jobs = [workers.submit(lambda: loop(length)) for _ in range(workers.count)]
        return [job.result() for job in jobs]

    time.sleep(PAUSE)
    all_threads(0.0)
    before = spent()
    results = all_threads(seconds)
    core_seconds = (spent() - before).total / max(1, sum(done for done, _ in results))
    return Throughput(sum(done / taken for done, taken in results), core_seconds)
