"""Work beside the main thread's, for what takes a while and is only needed later."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")
_AT_WORK: set[Future[Any]] = set()


def aside(work: Callable[[], _T], *, name: str) -> Future[_T]:
    """Start ``work`` in a thread of its own; what it returns or raises is in the future.

    The thread is a daemon: a run that ends for another reason does not wait for it; see
    :func:`pipeline.core.cli.own_exit_code`.
    """
    future: Future[_T] = Future()
    _AT_WORK.add(future)

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            _AT_WORK.discard(future)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def unfinished() -> bool:
    """Return true while a thread of :func:`aside` is at work."""
    return bool(_AT_WORK)


# For each thread so many things are begun or done before their turn; what waits is bounded, however many there are.
AHEAD = 4
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int
) -> Generator[_Result, None, None]:
    """Results of ``work`` for every item, in the items' order, computed by ``threads`` threads.

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
