"""The same work for many things at a time, where the things are many and the results few enough to wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# For each thread so many things are begun or done before their turn; what waits is bounded, however many there are.
AHEAD = 4
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int
) -> Generator[_Result, None, None]:
    """What ``work`` returns for every item, in the items' order, done by so many threads.

    Raises:
        Exception: the first of ``work``'s, in order; what was not begun by then is not done.
    """
    waiting: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Without waiting: a generator that was left in the middle ends wherever the garbage is collected, which may be
        # a thread that is just starting, and that can join no other.
        pool.shutdown(wait=False, cancel_futures=True)
