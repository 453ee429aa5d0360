"""Seconds in which a GPU computes batches, by events on its stream; nothing is waited for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# A batch that ends no later than this after its launches, in their own time, waited for them.
PROMPT = 1.25


@dataclass(frozen=True, slots=True)
class GpuTime:
    """The batches of a GPU, the seconds in which it computed them, and how many of them waited for their launches."""

    batches: int = 0
    seconds: float = 0.0
    starved: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch between two events; ``ahead`` if all of it was launched while the GPU still computed the one before."""

    start: Any
    end: Any
    launch_seconds: float
    ahead: bool


class GpuClock:
    """Measures batches on a GPU; on a CPU it does nothing.

    The span between the two events of a batch is the GPU's own time if the batch was launched ahead. A batch that
    waited for its launches has gaps between its kernels: it counts as much as the quickest one that was launched ahead.

    Args:
        device: where the batches are computed.
        open_event: opens an event with a time.
        clock: of the host, in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        open_event: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._on_gpu = device.type == "cuda" or open_event is not None
        self._open: Callable[[], Any] = open_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: deque[_Batch] = deque()
        self._batches = self._starved = 0
        self._seconds = self._starved_seconds = 0.0
        self._quickest = float("inf")

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Count what the body launches on the current stream as one batch, unless it raises."""
        if not self._on_gpu:
            yield
            return
        start, end = self._open(), self._open()
        began = self._clock()
        start.record()
        yield
        end.record()
        seconds = self._clock() - began
        with self._lock:
            ahead = bool(self._pending) and not self._pending[-1].end.query()
            self._pending.append(_Batch(start, end, seconds, ahead))
            self._settle()

    def total(self) -> GpuTime:
        """The batches that have ended so far."""
        with self._lock:
            self._settle()
            starved = min(self._starved_seconds, self._starved * self._quickest) if self._starved else 0.0
            return GpuTime(self._batches, self._seconds + starved, self._starved)

    def _settle(self) -> None:
        while self._pending and self._pending[0].end.query():
            batch = self._pending.popleft()
            span = batch.start.elapsed_time(batch.end) / 1000
            self._batches += 1
            if batch.ahead:
                self._quickest = min(self._quickest, span)
            elif span < PROMPT * batch.launch_seconds:
                self._starved += 1
                self._starved_seconds += span
                continue
            self._seconds += span
