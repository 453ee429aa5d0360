"""The progress of a job: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0
# In a shorter time, images that were decoded before the clock started would distort the rate.
STEADY_SECONDS = 1.0
LINE = ("rows", "total", "images_per_second", "failed")
log = logging.getLogger(__name__)


class Progress:
    """A counter of rows towards a total; use it as a context manager.

    ``mode`` is ``bar``, ``plain``, ``none``, or ``auto``: a bar if standard error is a terminal. ``steady`` throughput
    counts from the end of the first batches, as many as are embedded side by side (``streams``), to the end of the
    last. The total is ``about`` right where rows are counted as they are read.
    """

    def __init__(self, total: int, *, done: int, mode: str, streams: int = 1, about: bool = False) -> None:
        self._about = "about " if about else ""
        self._total, self._rows, self._failed, self._images = total, done, 0, 0
        self._plain = mode == "plain" or (mode == "auto" and not _is_terminal())
        wanted = mode == "bar" or (mode == "auto" and not self._plain)
        # Without a size, as a bare pty with 0 columns, tqdm draws no bar.
        size = {"dynamic_ncols": True} if _columns() else {"ncols": 80, "nrows": 24}
        self._bar = tqdm(total=total, initial=done, unit="img", smoothing=0.1, **size) if wanted else None
        self._started = self._logged = self._moved = time.perf_counter()
        self._streams, self._batches = streams, 0
        self._first = self._last = self._started
        self._warm: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()

    @property
    def first_batch_seconds(self) -> float:
        """Seconds from the start of this progress to the end of the first batch; 0 before it."""
        return self._first - self._started

    @property
    def steady_images_per_second(self) -> float:
        """Images per second after the first batches; 0 where there were no others."""
        if self._warm is None or self._last - self._warm[0] < STEADY_SECONDS:
            return 0.0
        return (self._images - self._warm[1]) / (self._last - self._warm[0])

    def figures(self) -> dict[str, float]:
        """The counts so far: ``rows`` that this run has finished, the ``total``, and so on.

        The rate is that up to the last of these rows.
        """
        rate = self._images / max(self._moved - self._started, 1e-9)
        counts = {"rows": self._rows, "total": self._total, "images": self._images, "failed": self._failed}
        return {**counts, "images_per_second": round(rate, 2)}

    def embedded(self, images: int) -> None:
        """Count the images of one more batch."""
        self._last = time.perf_counter()
        self._images += images
        self._batches += 1
        if self._batches == 1:
            self._first = self._last
        if self._batches == self._streams:
            self._warm = (self._last, self._images)
        self._advance(images)

    def failed(self, rows: int) -> None:
        """Count rows that have a failure instead of an embedding."""
        self._failed += rows
        self._advance(rows)

    def shared(self, rows: int) -> None:
        """Count rows that have the embedding of another one."""
        self._advance(rows)

    def expect(self, total: int) -> None:
        """Take another total."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def _advance(self, rows: int) -> None:
        self._rows += rows
        if self._bar is not None:
            # A closed terminal does not end the job.
            with suppress(OSError, ValueError):
                self._bar.set_postfix(failed=self._failed, refresh=False)
                self._bar.update(rows)
        now = self._moved = time.perf_counter()
        if self._plain and now - self._logged >= LINE_SECONDS:
            self._logged = now
            counts = self.figures()
            text = f"%d of {self._about}%d rows, %.1f images/s, %d failed"
            log.info(text, *map(counts.get, LINE), extra=counts)


class EstimatedRows:
    """Rows of a job by the bytes of its shards, of which those that are done have so many rows."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes, self._all, self._bytes, self._rows = sizes, sum(sizes), 0, 0

    def count(self, shard: int, rows: int) -> int:
        """Count a shard that is done; return the rows of all shards."""
        self._bytes += self._sizes[shard]
        self._rows += rows
        return round(self._rows * self._all / max(1, self._bytes))


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
