"""Clocks that many threads may use at once; the sums by stage say where the time went."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.records import Clocks


class StageClocks:
    """Adds up seconds by stage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the body's wall time towards ``stage``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Count ``seconds`` towards ``stage``."""
        with self._lock:
            self._seconds[stage] += seconds

    def total(self) -> Clocks:
        """The sums so far."""
        with self._lock:
            return Clocks(dict(self._seconds))
