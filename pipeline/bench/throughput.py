"""Threads that do pieces of work side by side for a while: how much they did, and the core seconds that it took."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from pipeline.core.processes import spent

# One piece of work, known by its number; returns how many images it did.
Unit = Callable[[int], int]
# Threads of what ran before may turn round for a while, in seconds.
REST = 0.3


@dataclass(frozen=True, slots=True)
class Pace:
    """Images/s of all threads together, and the core seconds of an image."""

    images_per_second: float
    core_seconds: float


class Race:
    """Goes on with the pieces where it stopped the last time."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count()

    def run(
        self,
        unit: Unit,
        *,
        threads: int,
        seconds: float,
        submit: Callable[[Callable[[], tuple[int, float]]], Future[tuple[int, float]]],
        finish: Callable[[], None] = lambda: None,
    ) -> Pace:
        """Have ``threads`` threads of ``submit`` do pieces for ``seconds``, whole ones, after one each to warm up.

        ``finish`` waits for what a piece may have left to do. Each thread has its own clock, so that none counts
        the time in which it has nothing left to do.
        """

        def loop(length: float) -> tuple[int, float]:
            began, done = time.perf_counter(), 0
            while True:
                done += unit(next(self._numbers))
                if time.perf_counter() - began >= length:
                    finish()
                    return done, time.perf_counter() - began

        def all_threads(length: float) -> list[tuple[int, float]]:
            jobs = [submit(lambda: loop(length)) for _ in range(threads)]
            return [job.result() for job in jobs]

        time.sleep(REST)
        all_threads(0.0)
        before = spent()
        results = all_threads(seconds)
        used = spent() - before
        images = sum(done for done, _ in results)
        return Pace(
            images_per_second=sum(done / taken for done, taken in results), core_seconds=used.total / max(1, images)
        )
