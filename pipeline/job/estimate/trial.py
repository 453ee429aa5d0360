"""A few seconds of a job's own loop, over rows from all over it, into a folder that is thrown away."""

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

from pipeline.core.processes import Spent, spent
from pipeline.core.records import OK, Clocks, Shard
from pipeline.dataset import commits
from pipeline.dataset.parts import PartFormat, write_part
from pipeline.job.cluster.inline import Inline
from pipeline.storage.base import Storage
from pipeline.telemetry.members import Member

# Counting begins when the loader's buffers are full, or after so many seconds; then so many seconds, and so many
# batches of every stream, are counted; and a trial takes no longer than that.
WARM_SECONDS, SECONDS, BATCHES, LONGEST = 2.0, 5.0, 4, 25.0
# Rows by which the size of the others is told.
SIZED_ROWS = 8192
# The counted time in as many groups of batches tells how even the pace is.
GROUPS = 8


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the trial had come: ``at`` in seconds since its loop began, images and batches that were embedded."""

    at: float
    images: int
    batches: int
    clocks: Clocks
    spent: Spent


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured.

    ``seconds`` are those of the whole loop, ``first`` those to the end of the first batch. ``begin`` and ``end`` are
    where counting began and ended, None where nothing was embedded; ``times`` are when each batch was done. ``whole``
    says that no row was left over. ``rows``, ``counts`` (by status), and the share of ``repeats`` are of the shards
    that were finished, ``largest`` the rows of the largest shard. A part has ``bytes_per_row`` and ``bytes_per_part``,
    and a row takes ``memory_per_row`` bytes; ``error_example`` is what the first row that failed says.
    """

    seconds: float
    first: float
    begin: Mark | None
    end: Mark | None
    times: tuple[float, ...]
    images: tuple[int, ...]
    whole: bool
    member: Member
    rows: int
    counts: Mapping[str, int]
    repeats: float
    largest: int = 0
    bytes_per_row: float = 0.0
    bytes_per_part: float = 0.0
    memory_per_row: float = 0.0
    error_example: str = ""

    @property
    def images_per_second(self) -> float:
        """Between ``begin`` and ``end``; 0 where that is not known."""
        if self.begin is None or self.end is None or self.end.at <= self.begin.at:
            return 0.0
        return (self.end.images - self.begin.images) / (self.end.at - self.begin.at)

    @property
    def error(self) -> float:
        """Twice the standard error of the pace, as a share of it, from how even groups of batches were."""
        if self.begin is None or self.end is None:
            return 1.0
        times, images = self.times[self.begin.batches - 1 :], self.images[self.begin.batches :]
        groups = min(GROUPS, len(images) // 2)
        if groups < 2:
            return 0.5
        at = [number * len(images) // groups for number in range(groups + 1)]
        paces = [(times[b] - times[a]) / max(1, sum(images[a:b])) for a, b in pairwise(at)]
        mean = sum(paces) / groups
        spread = (sum((pace - mean) ** 2 for pace in paces) / (groups - 1)) ** 0.5
        return float(2 * spread / groups**0.5 / mean)


class _Enough(Exception):
    """The trial has lasted long enough."""


@dataclass(slots=True)
class _Watch:
    """Looks at every batch, and ends the trial."""

    crew: Inline
    streams: int
    ahead: int
    least: int
    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    early: Mark | None = None
    warm: Mark | None = None
    end: Mark | None = None

    def embedded(self, images: int) -> None:
        now = time.perf_counter() - self.began
        self.times.append(now)
        self.images.append(images)
        count = len(self.times)
        if count == self.streams:
            self.early = self._mark(now)
        if count < self.streams:
            return
        if self.warm is None:
            if now >= WARM_SECONDS or count >= self.streams + self.ahead:
                self.warm = self._mark(now)
            return
        measured = now - self.warm.at >= SECONDS and count - self.warm.batches >= BATCHES * self.streams
        if count > self.least and (measured or now >= LONGEST):
            self.end = self._mark(now)
            raise _Enough

    def finish(self) -> float:
        """The seconds of the loop, when it has ended by itself."""
        now = time.perf_counter() - self.began
        if self.times:
            self.end = self._mark(self.times[-1])
        return now

    def _mark(self, now: float) -> Mark:
        return Mark(now, sum(self.images), len(self.times), self.crew.members[0].clocks, spent())


def try_out(
    crew: Inline, shards: Iterable[Shard], *, least: int, storage: Storage, form: PartFormat, streams: int, ahead: int
) -> Trial:
    """Run the loop over ``shards`` until enough is known, or nothing is left of them.

    Args:
        crew: begun, with a job whose output is ``storage``.
        shards: what may be sampled.
        least: batches of the first of them, which must be finished.
        storage: a folder that is thrown away.
        form: of the parts.
        streams: batches that are encoded side by side.
        ahead: batches that the loader may have ready.
    """
    watch = _Watch(crew=crew, streams=streams, ahead=ahead, least=least)
    whole, repeats, reported = True, 0, 0
    try:
        with closing(crew.run(shards, watch.embedded)) as reports:
            for report in reports:
                repeats += report.repeats
                reported += report.rows
                # Where no image can be read no batch ends the trial.
                if not watch.times and time.perf_counter() - watch.began >= SECONDS:
                    whole = False
                    break
    except _Enough:
        whole = False
    seconds = watch.finish() if watch.end is None else watch.end.at
    found = [commits.read_commit(storage, name) for name in sorted(storage.sizes(commits.FOLDER))]
    done = [commit for commit in found if commit is not None]
    counts: Counter[str] = Counter()
    for commit in done:
        counts.update(commit.counts)
    # Before the parts are read, which is no part of the job's memory.
    member = crew.members[0]
    table = _rows(storage, done)
    per_row, per_part = _sizes(storage, table, form) if table is not None else (0.0, 0.0)
    errors = table["error"].drop_null().to_pylist() if table is not None else []
    return Trial(
        seconds=seconds,
        first=watch.times[0] if watch.times else seconds,
        begin=watch.early if whole or watch.warm is None else watch.warm,
        end=watch.end,
        times=tuple(watch.times),
        images=tuple(watch.images),
        whole=whole,
        member=member,
        rows=sum(commit.rows for commit in done),
        counts={OK: counts.pop(OK, 0), **dict(sorted(counts.items()))},
        repeats=repeats / reported if reported else 0.0,
        largest=max((commit.rows for commit in done), default=0),
        bytes_per_row=per_row,
        bytes_per_part=per_part,
        memory_per_row=table.nbytes / table.num_rows if table is not None else 0.0,
        error_example=errors[0] if errors else "",
    )


def _rows(storage: Storage, done: Sequence[commits.Commit]) -> pa.Table | None:
    """Rows of the finished shards, as many as tell the size of the others; None where there are none."""
    tables, rows = list[pa.Table](), 0
    for commit in done:
        if rows >= SIZED_ROWS:
            break
        tables.append(pq.ParquetFile(Path(storage.url) / commit.part).read())
        rows += commit.rows
    return pa.concat_tables(tables).combine_chunks() if tables else None


def _sizes(storage: Storage, table: pa.Table, form: PartFormat) -> tuple[float, float]:
    """Bytes of a row, and of a part without rows, as they are written."""
    with storage.staged() as staged:

        def size(rows: int) -> int:
            write_part(table.slice(0, rows).cast(form.schema), staged.path, form)
            return staged.path.stat().st_size

        half = table.num_rows // 2
        whole, smaller = size(table.num_rows), size(half)
    per_row = max(0.0, (whole - smaller) / (table.num_rows - half))
    return per_row, max(0.0, whole - per_row * table.num_rows)
