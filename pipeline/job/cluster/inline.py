"""All shards in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace

from pipeline.core.records import Shard, ShardReport
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job, embed
from pipeline.engine.meter import Meter
from pipeline.engine.prepare import Prepared, note, prepare, settle
from pipeline.engine.sample import FirstBatch
from pipeline.engine.worker import worker_of
from pipeline.storage.base import Storage
from pipeline.telemetry.run_stats import WorkerStats


class Inline:
    """This process as the whole cluster of a job; use it as a context manager."""

    given_up: tuple[int, ...] = ()

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._began = time.time()
        self._startup = 0.0
        self._engine: Engine
        self._write: Callable[[], None]
        self.prepared: Prepared
        self._meter: Meter | None = None

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, engine: Engine) -> Prepared:
        """See :func:`pipeline.engine.prepare.prepare`."""
        self._engine = engine
        engine.open(self._storage)
        self.prepared = prepare(engine, self._storage)
        self._startup = time.time() - self._began
        return self.prepared

    def settle(self) -> Prepared:
        """Pass the gates now, where the first batch is not that of the job."""
        self.prepared = settle(self._engine, self.prepared, self._storage)
        return self.prepared

    def begin(self, job: Job, write: Callable[[], None]) -> None:
        """Take the job; ``write`` its plan now, or behind the gates that are pending."""
        self.rehearse(job)
        self._write = write
        if not self.prepared.pending:
            self._record()

    def rehearse(self, job: Job) -> None:
        """Take the job without a written plan: nothing is written to the output."""
        self._job = job

    def _record(self) -> None:
        self._write()
        note(self._engine, self.prepared, self._storage)

    def _hold(self, first: Sequence[FirstBatch]) -> None:
        began = time.time()
        with self._measured().stopped():
            settled = settle(self._engine, self.prepared, self._storage, first)
        self.prepared = replace(settled, gate_seconds=time.time() - began)
        self._record()

    def run(self, shards: Iterable[Shard], on_batch: Callable[[int], None]) -> Generator[ShardReport]:
        """See :func:`pipeline.engine.loop.embed`; the statistics are those of all calls."""
        meter = self._measured()
        try:
            hold = self._hold if self.prepared.pending else None
            with closing(embed(shards, self._job, worker_of(self._engine, meter, hold), on_batch=on_batch)) as reports:
                for report in reports:
                    meter.add(report)
                    yield report
        finally:
            meter.lap()

    def lap(self) -> None:
        """Take the core seconds so far as those of the job; see :attr:`workers`."""
        self._measured().lap()

    @property
    def workers(self) -> tuple[WorkerStats, ...]:
        """Statistics of this process."""
        return (self._measured().stats(),)

    def _measured(self) -> Meter:
        if self._meter is None:
            self._meter = Meter(self._engine, "0", self._startup)
        return self._meter
