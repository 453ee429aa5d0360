"""Dynamic batching: images of several requests wait a few milliseconds and share a batch.

All code here runs in the thread of the event loop; only the work on a batch runs in another thread. The results of a
batch are assigned by the position of the items in an unchanged list, so no result goes to another request. That the
encoder keeps the order of its rows is checked in :mod:`pipeline.serve.forward`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


@dataclass(frozen=True, slots=True)
class Item(Generic[_Input, _Output]):
    """Input that waits for a batch, its time of submission (``time.perf_counter``), and the future of its result."""

    value: _Input
    submitted: float
    result: asyncio.Future[_Output]


def next_batch_size(count: int, shapes: Sequence[int]) -> int:
    """Return how many of ``count`` waiting items form the next batch.

    A batch costs as much as its shape, however many items it holds. So the result is all items if they fill more than
    half of their shape, else as many as fill the next smaller shape. ``shapes`` are in ascending order.
    """
    if count >= shapes[-1]:
        return shapes[-1]
    larger = next(shape for shape in shapes if shape >= count)
    smaller = max((shape for shape in shapes if shape <= count), default=0)
    return count if 2 * count > larger or not smaller else smaller


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Batch sizes of the encoders, batches that run at the same time, and seconds to wait while a stream is free."""

    shapes: Sequence[int]
    streams: int
    wait: float


class Batcher(Generic[_Input, _Output]):
    """Queue that forms batches and runs several of them at a time.

    Args:
        start: starts a batch in another thread; its result has one entry for each item, in order.
        limits: sizes, number and waiting time of the batches.
        on_start: called with the seconds that each item of a batch has waited.
        on_end: called with the seconds that a batch took.
    """

    def __init__(
        self,
        start: Callable[[Sequence[_Input]], Future[Sequence[_Output]]],
        limits: BatchLimits,
        *,
        on_start: Callable[[Sequence[float]], None] = lambda waited: None,
        on_end: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._start, self._free, self._wait = start, limits.streams, limits.wait
        self._shapes = sorted(limits.shapes)
        self._on_start, self._on_end = on_start, on_end
        self._waiting: deque[Item[_Input, _Output]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, value: _Input) -> asyncio.Future[_Output]:
        """Add an item and return the future of its result; cancelling the future removes a waiting item."""
        result: asyncio.Future[_Output] = asyncio.get_running_loop().create_future()
        self._waiting.append(Item(value, time.perf_counter(), result))
        self._start_due()
        return result

    @property
    def waiting(self) -> int:
        """Number of items that wait for a batch, including cancelled ones."""
        return len(self._waiting)

    def _start_due(self) -> None:
        """Start every batch that is due, and set the timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free:
            if any(item.result.done() for item in self._waiting):
                # Cancelled, since its client disconnected.
                self._waiting = deque(item for item in self._waiting if not item.result.done())
            if not self._waiting:
                return
            left = self._waiting[0].submitted + self._wait - time.perf_counter()
            if left > 0 and len(self._waiting) < self._shapes[-1]:
                self._timer = asyncio.get_running_loop().call_later(left, self._start_due)
                return
            self._start_batch()

    def _start_batch(self) -> None:
        items = [self._waiting.popleft() for _ in range(next_batch_size(len(self._waiting), self._shapes))]
        started = time.perf_counter()
        self._on_start([started - item.submitted for item in items])
        self._free -= 1
        try:
            work = asyncio.wrap_future(self._start([item.value for item in items]))
        except BaseException as error:
            self._free += 1
            _fail(items, error)
            raise
        work.add_done_callback(partial(self._finish, items, started))

    def _finish(
        self, items: Sequence[Item[_Input, _Output]], started: float, work: asyncio.Future[Sequence[_Output]]
    ) -> None:
        self._free += 1
        self._on_end(time.perf_counter() - started)
        if work.cancelled():
            _fail(items, RuntimeError("the service has ended"))
        elif error := work.exception():
            _fail(items, error)
        else:
            for item, output in zip(items, work.result(), strict=True):
                if not item.result.done():
                    item.result.set_result(output)
        self._start_due()


def _fail(items: Sequence[Item[_Input, _Output]], error: BaseException) -> None:
    for item in items:
        if not item.result.done():
            item.result.set_exception(error)
