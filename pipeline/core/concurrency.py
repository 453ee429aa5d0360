"""Work beside the main thread's, for what takes a while and is only needed later."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

_T = TypeVar("_T")
_AT_WORK: set[Future[Any]] = set()
# What a shell says of a program that SIGPIPE ended.
UNREAD = 141


def aside(work: Callable[[], _T], *, name: str) -> Future[_T]:
    """Start ``work`` in a thread of its own; what it returns or raises is in the future.

    The thread is a daemon: a run that ends for another reason does not wait for it; see :func:`own_exit_code`.
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


@contextmanager
def own_exit_code() -> Iterator[None]:
    """Around the last call of a process: it ends with the call's exit code, though work aside still goes on.

    Python stops such a thread when it comes back from C++, which torch answers by aborting the process: exit code 134.
    Where nobody reads what is printed any more, as behind ``| head``, it ends without a word about it.
    """
    try:
        yield
    except BrokenPipeError:
        if not _unread():
            raise
        raise SystemExit(UNREAD) from None
    except SystemExit as end:
        _unread()
        if _AT_WORK:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _unread() -> bool:
    """Whether the reader of standard output has gone; what is left for it is dropped then."""
    try:
        number = sys.stdout.fileno()
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        poll = select.poll()
        poll.register(number, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        if gone:
            # Python flushes once more as it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    except (OSError, ValueError, AttributeError):
        return False
    return gone


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
