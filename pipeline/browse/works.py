"""Work in threads beside the requests, with its progress."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import PipelineError

# Works at a time, and results that are kept.
AT_ONCE, KEPT = 2, 16
# Seconds after which a work ends that nobody asks for any more; a page in the background asks once a minute.
ABANDONED = 90.0


@dataclass(slots=True)
class Work:
    """One work: ``done`` of ``total`` steps, and the future of its result.

    ``told`` is set when its failure was raised; ``ended`` and ``asked`` are the times of its end and last question.
    """

    done: int = 0
    total: int = 0
    told: bool = False
    ended: float = math.inf
    asked: float = math.inf
    future: Future[Any] = field(default_factory=Future)

    def result(self, seconds: float) -> Any:
        """The result, or None if it takes longer than ``seconds``; raises what the work raised."""
        self.asked = time.monotonic()
        try:
            return self.future.result(timeout=seconds)
        except NotYet:
            if self.future.done():
                raise
            return None
        except BaseException:
            self.told = True
            raise


class Works:
    """Works by key. The same key again gives the work that runs, or its result.

    A failed one begins anew once its failure was raised: a page that asks now and then would else never see it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="work")
        self._works: OrderedDict[Hashable, Work] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Begin nothing more; what runs ends at its next step."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, done: int = 0, total: int = 0) -> None:
        """Go on with work, unless the page ends; a progress of what runs elsewhere.

        Raises:
            PipelineError: the page ends.
        """
        if self._closed:
            raise PipelineError("the page is closed")

    def start(
        self, key: Hashable, work: Callable[[Callable[[int, int], None]], Any], *, fresh: float = math.inf
    ) -> Work:
        """The work of a key; ``work`` gets a function for its progress, done and total.

        A result is given for ``fresh`` seconds.
        """
        with self._lock:
            found = self._works.get(key)
            if found is not None and not found.told and time.monotonic() - found.ended <= fresh:
                self._works.move_to_end(key)
                return found
            made = Work()

            def progress(done: int, total: int) -> None:
                self.step()
                if time.monotonic() - made.asked > ABANDONED:
                    # The next question begins it anew.
                    made.told = True
                    raise CancelledError
                made.done, made.total = done, total

            made.future = self._pool.submit(work, progress)
            made.future.add_done_callback(lambda future: setattr(made, "ended", time.monotonic()))
            self._works[key] = made
            ended = [key for key, each in self._works.items() if each.future.done()]
            for old in ended[: max(0, len(self._works) - KEPT)]:
                del self._works[old]
            return made
