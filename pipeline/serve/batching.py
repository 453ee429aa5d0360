"""Dynamic batching: pictures of many requests wait a few milliseconds for one another and share a batch.

Everything here happens in the thread of the event loop; a batch alone is worked on in another. A picture's place in
its batch is that of its item in a list that nobody changes, so that no answer can go to another request; that the
encoder keeps its rows in order too is proved in :mod:`pipeline.serve.forward`.
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

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Item(Generic[_Given, _Made]):
    """One thing that waits, since when (``time.perf_counter``), and who is told what came of it."""

    given: _Given
    since: float
    answer: asyncio.Future[_Made]


def portion(count: int, shapes: Sequence[int]) -> int:
    """How many of so many things are best taken at once, where a batch costs as much as its shape holds.

    All that a shape takes which is more than half full then, else as many as fill a smaller one. ``shapes`` rise.
    """
    if count >= shapes[-1]:
        return shapes[-1]
    whole = next(shape for shape in shapes if shape >= count)
    filled = max((shape for shape in shapes if shape <= count), default=0)
    return count if 2 * count > whole or not filled else filled


class Batcher(Generic[_Given, _Made]):
    """Hands out batches of many things, as many at a time as there are ``lanes``.

    Args:
        start: begins the work on a batch in another thread; its result has one entry for each thing, in order.
        shapes: sizes that batches cost, see :func:`portion`; none is larger than the largest.
        lanes: batches that are worked on at once.
        wait: seconds that a thing waits for others while a lane is free.
        launched: told of each batch: how long each of its things has waited, in seconds.
        ended: told how long a batch took.
    """

    def __init__(
        self,
        start: Callable[[Sequence[_Given]], Future[Sequence[_Made]]],
        *,
        shapes: Sequence[int],
        lanes: int,
        wait: float,
        launched: Callable[[Sequence[float]], None] = lambda waited: None,
        ended: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._start, self._free, self._wait = start, lanes, wait
        self._shapes = sorted(shapes)
        self._launched, self._ended = launched, ended
        self._waiting: deque[Item[_Given, _Made]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, given: _Given) -> asyncio.Future[_Made]:
        """What comes of one thing; if the future is cancelled before its batch begins, the thing drops out."""
        answer: asyncio.Future[_Made] = asyncio.get_running_loop().create_future()
        self._waiting.append(Item(given, time.perf_counter(), answer))
        self._pump()
        return answer

    @property
    def waiting(self) -> int:
        """Things in no batch yet, those that were cancelled among them."""
        return len(self._waiting)

    def _pump(self) -> None:
        """Begin every batch that can begin now, and see to it that the next one begins in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free:
            if any(item.answer.done() for item in self._waiting):
                # Cancelled, as its client has gone.
                self._waiting = deque(item for item in self._waiting if not item.answer.done())
            if not self._waiting:
                return
            left = self._waiting[0].since + self._wait - time.perf_counter()
            if left > 0 and len(self._waiting) < self._shapes[-1]:
                self._timer = asyncio.get_running_loop().call_later(left, self._pump)
                return
            self._launch()

    def _launch(self) -> None:
        items = [self._waiting.popleft() for _ in range(portion(len(self._waiting), self._shapes))]
        began = time.perf_counter()
        self._launched([began - item.since for item in items])
        self._free -= 1
        try:
            work = asyncio.wrap_future(self._start([item.given for item in items]))
        except BaseException as error:
            self._free += 1
            _fail(items, error)
            raise
        work.add_done_callback(partial(self._land, items, began))

    def _land(self, items: Sequence[Item[_Given, _Made]], began: float, work: asyncio.Future[Sequence[_Made]]) -> None:
        self._free += 1
        self._ended(time.perf_counter() - began)
        if work.cancelled():
            _fail(items, RuntimeError("the service has ended"))
        elif error := work.exception():
            _fail(items, error)
        else:
            for item, made in zip(items, work.result(), strict=True):
                if not item.answer.done():
                    item.answer.set_result(made)
        self._pump()


def _fail(items: Sequence[Item[_Given, _Made]], error: BaseException) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
