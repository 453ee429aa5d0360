"""Throughput and core seconds of work that threads do side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from pipeline.core.processes import spent

# Seconds before a measurement: idle threads of the one before may spin for a while.
PAUSE = 0.3
Submit = Callable[[Callable[[], tuple[int, float]]], Future[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Throughput:
    """Images/s of all threads together, and the core seconds of an image."""

    images_per_second: float
    core_seconds: float


def measure(
    work: Callable[[], int],
    *,
    threads: int,
    seconds: float,
    submit: Submit,
    finish: Callable[[], None] = lambda: None,
) -> Throughput:
    """Repeat ``work`` in ``threads`` threads for ``seconds``, after one call in each thread to warm up.

    Each thread has its own clock, which stops at the end of its last call, so that idle time is not counted.

    Args:
        work: does one piece; returns the number of its images.
        threads: how many threads repeat it side by side.
        seconds: the time after which a thread begins no other piece.
        submit: runs a function in one of the threads.
        finish: waits for work that the calls have queued, as on a GPU.
    """

    def loop(length: float) -> tuple[int, float]:
        began, done = time.perf_counter(), 0
        while True:
            done += work()
            if time.perf_counter() - began >= length:
                finish()
                return done, time.perf_counter() - began

    def all_threads(length: float) -> list[tuple[int, float]]:
        jobs = [submit(lambda: loop(length)) for _ in range(threads)]
        return [job.result() for job in jobs]

    time.sleep(PAUSE)
    all_threads(0.0)
    before = spent()
    results = all_threads(seconds)
    used = spent() - before
    images = sum(done for done, _ in results)
    return Throughput(
        images_per_second=sum(done / taken for done, taken in results), core_seconds=used.total / max(1, images)
    )
