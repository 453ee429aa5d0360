"""Thread-safe sums of wall and core seconds by stage."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.processes import Spent
from pipeline.core.records import Clocks, Timeline
from pipeline.telemetry.timeline import IMAGES, Slices


class StageClocks:
    """Sums of seconds by stage, and of the core seconds of the threads that report them.

    The core time of a thread since its last report counts towards the stage that it reports next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cores: defaultdict[str, float] = defaultdict(float)
        self._slices = Slices()
        self._others: Spent | None = None
        self._marks = threading.local()
        # The time of this thread before the run does not count.
        self._marks.at = time.thread_time()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the body towards ``stage``."""
        started = time.perf_counter()
        self._marks.at = time.thread_time()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Count ``seconds`` of wall time towards ``stage``, and the core time of this thread since its last report."""
        now = time.thread_time()
        # A thread without a report yet was started for the run.
        core = now - getattr(self._marks, "at", 0.0)
        self._marks.at = now
        with self._lock:
            self._seconds[stage] += seconds
            self._cores[stage] += core
            self._slices.spend(stage, seconds, time.perf_counter())

    def merge(self, clocks: Clocks, spent: Spent | None = None) -> None:
        """Count what another process spent up to this moment: by stages, and in all, with its children."""
        now = time.perf_counter()
        with self._lock:
            for stage, seconds in clocks.seconds.items():
                self._seconds[stage] += seconds
                self._cores[stage] += clocks.cores[stage]
                self._slices.spend(stage, seconds, now)
            if spent is not None:
                self._others = spent if self._others is None else self._others + spent

    @property
    def others(self) -> Spent | None:
        """Core seconds of the other processes, whose children are theirs alone; None if there were none."""
        with self._lock:
            return self._others

    def count(self, images: int) -> None:
        """Count images that were embedded at this moment."""
        with self._lock:
            self._slices.add(IMAGES, images, time.perf_counter())

    def total(self) -> Clocks:
        """The sums so far."""
        with self._lock:
            return Clocks(dict(self._seconds), dict(self._cores))

    def timeline(self) -> Timeline:
        """The sums by slices of time."""
        with self._lock:
            return self._slices.total()
