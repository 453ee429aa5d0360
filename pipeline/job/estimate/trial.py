"""Trial of a job: its own loop over a sample of its rows, into a temporary folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.processes import Spent
from pipeline.core.records import Clocks, Shard, by_status
from pipeline.dataset import commits
from pipeline.dataset.parts import PartFormat, write_part
from pipeline.engine.loop import Job
from pipeline.job.cluster.inline import Inline
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.telemetry.run_stats import WorkerStats

# Batches of every stream that are measured at least.
BATCHES = 4
# Rows from which the size of the others is extrapolated.
SIZED_ROWS = 8192
# Groups of batches whose speeds are compared for the error of the throughput.
GROUPS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """Length of a trial.

    Measuring begins when the buffers of the loader are full, or after ``warm_seconds``. It lasts ``seconds`` and
    ``batches`` of every stream; the whole trial ends after ``longest`` seconds.
    """

    warm_seconds: float = 2.0
    seconds: float = 5.0
    batches: int = BATCHES
    longest: float = 25.0


@dataclass(frozen=True, slots=True)
class Mark:
    """State of a trial ``at`` so many seconds since its loop began: embedded images and batches, time spent."""

    at: float
    images: int
    batches: int
    clocks: Clocks
    spent: Spent


@dataclass(frozen=True, slots=True)
class Trial:
    """Measurements of a trial.

    Attributes:
        seconds: duration of the loop; ``first`` is that of the first batch.
        begin: start of the measured batches, and ``end`` their end; None where nothing was embedded.
        times: end of each batch, in seconds since the loop began; ``images`` are the images in each.
        whole: True if the loop reached the end of the sample.
        worker: statistics of this process.
        rows: rows of the finished shards; so are ``counts`` (by status) and ``repeats`` (share of the rows).
        largest: rows of the largest finished shard.
        bytes_per_row: size of a row in a part; ``bytes_per_part`` is that of a part without rows.
        memory_per_row: bytes of a row in memory.
        error_example: error of the first failed row.
    """

    seconds: float
    first: float
    begin: Mark | None
    end: Mark | None
    times: tuple[float, ...]
    images: tuple[int, ...]
    whole: bool
    worker: WorkerStats
    rows: int
    counts: Mapping[str, int]
    repeats: float
    largest: int = 0
    bytes_per_row: float = 0.0
    bytes_per_part: float = 0.0
    memory_per_row: float = 0.0
    error_example: str = ""

    @property
    def counted_images(self) -> int:
        """Images between ``begin`` and ``end``."""
        return self.end.images - self.begin.images if self.begin and self.end else 0

    @property
    def counted_seconds(self) -> float:
        """Seconds between ``begin`` and ``end``."""
        return self.end.at - self.begin.at if self.begin and self.end else 0.0

    @property
    def images_per_second(self) -> float:
        """Throughput between ``begin`` and ``end``; 0 where nothing was measured."""
        return self.counted_images / self.counted_seconds if self.counted_seconds > 0 else 0.0

    @property
    def error(self) -> float:
        """Two standard errors of the time for an image, as a share of it, from groups of the measured batches."""
        if self.begin is None or self.end is None:
            return 1.0
        times, images = self.times[self.begin.batches - 1 :], self.images[self.begin.batches :]
        groups = min(GROUPS, len(images) // 2)
        if groups < 2:
            return 0.5
        edges = [number * len(images) // groups for number in range(groups + 1)]
        paces = [(times[b] - times[a]) / max(1, sum(images[a:b])) for a, b in pairwise(edges)]
        mean = sum(paces) / groups
        deviation = (sum((pace - mean) ** 2 for pace in paces) / (groups - 1)) ** 0.5
        return float(2 * deviation / groups**0.5 / mean)


class _Enough(Exception):
    """The trial has reached its limits."""


@dataclass(slots=True)
class _Stopwatch:
    """Record the end of every batch, and stop the loop when the limits are reached."""

    executor: Inline
    streams: int
    ahead: int
    least: int
    limits: Limits
    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    early: Mark | None = None
    warm: Mark | None = None
    end: Mark | None = None

    def on_batch(self, images: int) -> None:
        now = time.perf_counter() - self.began
        self.times.append(now)
        self.images.append(images)
        count = len(self.times)
        if count == self.streams:
            self.early = self._mark(now)
        if count < self.streams:
            return
        limits = self.limits
        if self.warm is None:
            if now >= limits.warm_seconds or count >= self.streams + self.ahead:
                self.warm = self._mark(now)
            return
        measured = now - self.warm.at >= limits.seconds and count - self.warm.batches >= limits.batches * self.streams
        if count > self.least and (measured or now >= limits.longest):
            self.end = self._mark(now)
            raise _Enough

    def finish(self) -> float:
        """Return the duration of the loop."""
        if self.end is not None:
            return self.end.at
        now = time.perf_counter() - self.began
        if self.times:
            self.end = self._mark(self.times[-1])
        return now

    def _mark(self, now: float) -> Mark:
        self.executor.lap()
        [worker] = self.executor.workers
        used = Spent(worker.own_core_seconds, worker.child_core_seconds)
        return Mark(now, sum(self.images), len(self.times), worker.clocks, used)


@dataclass(frozen=True, slots=True)
class Sample:
    """Shards of a trial.

    ``least`` batches are in the first one, which is always finished; ``streams`` are encoded at the same time, and the
    loader may have ``ahead`` ready.
    """

    shards: Iterable[Shard]
    least: int
    streams: int
    ahead: int


def measure(executor: Inline, sample: Sample, job: Job, limits: Limits) -> Trial:
    """Run the loop over the sample until the limits are reached or the sample ends.

    ``executor`` is this process with an opened engine; the output of ``job`` is a temporary folder.
    """
    storage = open_storage(job.config.output.dir)
    watch = _Stopwatch(executor, sample.streams, sample.ahead, sample.least, limits)
    whole, repeats, reported = True, 0, 0
    try:
        with closing(executor.run(sample.shards, watch.on_batch)) as reports:
            for report in reports:
                repeats += report.repeats
                reported += report.rows
                # Without a readable image there is no batch that could end the trial.
                if not watch.times and time.perf_counter() - watch.began >= limits.seconds:
                    whole = False
                    break
    except _Enough:
        whole = False
    seconds = watch.finish()
    found = [commits.read_commit(storage, name) for name in sorted(storage.sizes(commits.FOLDER))]
    done = [commit for commit in found if commit is not None]
    counts: Counter[str] = Counter()
    for commit in done:
        counts.update(commit.counts)
    # The peak of memory is taken before the parts are read, which a job does not do.
    worker = executor.workers[0]
    table = _rows(storage, done)
    per_row, per_part = _sizes(storage, table, job.form) if table is not None and table.num_rows else (0.0, 0.0)
    errors = table["error"].drop_null().to_pylist() if table is not None else []
    return Trial(
        seconds=seconds,
        first=watch.times[0] if watch.times else seconds,
        begin=watch.early if whole or watch.warm is None else watch.warm,
        end=watch.end,
        times=tuple(watch.times),
        images=tuple(watch.images),
        whole=whole,
        worker=worker,
        rows=sum(commit.rows for commit in done),
        counts=by_status(counts),
        repeats=repeats / reported if reported else 0.0,
        largest=max((commit.rows for commit in done), default=0),
        bytes_per_row=per_row,
        bytes_per_part=per_part,
        memory_per_row=table.nbytes / max(1, table.num_rows) if table is not None else 0.0,
        error_example=errors[0] if errors else "",
    )


def _rows(storage: Storage, done: Sequence[commits.Commit]) -> pa.Table | None:
    """Return rows of the finished shards, about ``SIZED_ROWS`` of them; None where there are none."""
    tables, rows = list[pa.Table](), 0
    for commit in done:
        if rows >= SIZED_ROWS:
            break
        tables.append(pq.ParquetFile(Path(storage.url) / commit.part).read())
        rows += commit.rows
    return pa.concat_tables(tables).combine_chunks() if tables else None


def _sizes(storage: Storage, table: pa.Table, form: PartFormat) -> tuple[float, float]:
    """Return the bytes of a row, and of a part without rows, from a whole and a half table as they are written."""
    with storage.staged() as staged:

        def size(rows: int) -> int:
            write_part(table.slice(0, rows).cast(form.schema), staged.path, form)
            return staged.path.stat().st_size

        half = table.num_rows // 2
        whole, smaller = size(table.num_rows), size(half)
    per_row = max(0.0, (whole - smaller) / (table.num_rows - half))
    return per_row, max(0.0, whole - per_row * table.num_rows)
