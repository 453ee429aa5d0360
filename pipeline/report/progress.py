"""What a person sees while the job runs: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0
log = logging.getLogger(__name__)


class Progress:
    """Counts rows towards a total; use it as a context manager.

    ``mode`` is ``bar``, ``plain``, ``none``, or ``auto``: a bar if standard error is a terminal.
    ``steady`` throughput counts from the end of the first batch to the end of the last.
    """

    def __init__(self, total: int, *, done: int, mode: str) -> None:
        self._total, self._rows, self._failed, self._images = total, done, 0, 0
        self._plain = mode == "plain" or (mode == "auto" and not _is_terminal())
        wanted = mode == "bar" or (mode == "auto" and not self._plain)
        # A terminal that does not tell its size (a bare pty has 0 columns) would get no bar at all.
        size = {"dynamic_ncols": True} if _columns() else {"ncols": 80, "nrows": 24}
        self._bar = tqdm(total=total, initial=done, unit="img", smoothing=0.1, **size) if wanted else None
        self._started = self._said = time.perf_counter()
        self._first: tuple[float, int] | None = None
        self._last = self._started

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()

    @property
    def images(self) -> int:
        """Images embedded so far."""
        return self._images

    @property
    def first_batch_seconds(self) -> float:
        """From the start of this progress to the end of the first batch; 0 before it."""
        return self._first[0] - self._started if self._first is not None else 0.0

    @property
    def steady_images_per_second(self) -> float:
        """Images a second after the first batch; 0 with fewer than two batches."""
        if self._first is None or self._last <= self._first[0]:
            return 0.0
        return (self._images - self._first[1]) / (self._last - self._first[0])

    def embedded(self, images: int) -> None:
        """Count the images of one more batch."""
        self._last = time.perf_counter()
        self._images += images
        if self._first is None:
            self._first = (self._last, images)
        self._advance(images)

    def failed(self, rows: int) -> None:
        """Count rows that have a failure instead of an embedding."""
        self._failed += rows
        self._advance(rows)

    def _advance(self, rows: int) -> None:
        self._rows += rows
        if self._bar is not None:
            # A terminal that has gone away does not end the job.
            with suppress(OSError, ValueError):
                self._bar.set_postfix(failed=self._failed, refresh=False)
                self._bar.update(rows)
        now = time.perf_counter()
        if self._plain and now - self._said >= LINE_SECONDS:
            self._said = now
            rate = self._images / (now - self._started)
            log.info("%d of %d rows, %.1f images/s, %d failed", self._rows, self._total, rate, self._failed)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (AttributeError, OSError, ValueError):
        return 0
