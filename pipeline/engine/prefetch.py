"""An iterator that runs in a thread of its own, ahead of its consumer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from pipeline.images.pool.processes import Abandoned

Item = TypeVar("Item")
# Interval at which waiting threads look whether their result is still needed, in seconds.
POLL = 0.2


class Prefetcher(Generic[Item]):
    """The items of a generator in its order; use it as a context manager, and iterate once.

    The generator runs, and is closed, in the thread. Its error is raised after the items that came before.

    Args:
        items: what to run.
        count: items that may wait to be asked for.
        size: their weight together at most; a single item may weigh more.
        weigh: the weight of an item.
        abandoned: called often; true once the items are not needed any more.
        pause: called while no item waits; where it is true, None comes instead of the next item.
    """

    def __init__(
        self,
        items: Generator[Item],
        *,
        count: int,
        size: int,
        weigh: Callable[[Item], int],
        abandoned: Callable[[], bool],
        pause: Callable[[], bool] = lambda: False,
    ) -> None:
        self._items, self._weigh, self._abandoned = items, weigh, abandoned
        self._count, self._size, self._pause = count, size, pause
        self._waiting: deque[Item] = deque()
        self._weight = 0
        self._changed = threading.Condition()
        self._ended = self._left = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._left = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def wake(self) -> None:
        """Call ``pause`` again, from any thread."""
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item | None]:
        """The items; None for a pause.

        Raises:
            Abandoned: the items are not needed any more.
        """
        while True:
            item = None
            with self._changed:
                while not self._waiting and not self._ended and not self._pause():
                    if self._abandoned():
                        raise Abandoned
                    self._changed.wait(POLL)
                if self._waiting:
                    item = self._waiting.popleft()
                    self._weight -= self._weigh(item)
                    self._changed.notify_all()
                elif self._ended:
                    break
            yield item
            del item
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                del item
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._items.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, item: Item) -> None:
        weight = self._weigh(item)
        with self._changed:
            while self._waiting and (len(self._waiting) >= self._count or self._weight + weight > self._size):
                if self._left or self._abandoned():
                    raise Abandoned
                self._changed.wait(POLL)
            if self._left:
                raise Abandoned
            self._waiting.append(item)
            self._weight += weight
            self._changed.notify_all()
