"""All shards in this process, one after the other."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing

from pipeline.config.schema import Config
from pipeline.core.processes import Spent, cores, spent
from pipeline.core.records import OK, Shard, ShardReport
from pipeline.engine.loop import Job, Worker, embed
from pipeline.engine.prepare import Engine, Inputs, Prepared, note, open_engine, prepare
from pipeline.images.pool.pool import Decoders
from pipeline.images.reader import PixelReader
from pipeline.report.summary import memory
from pipeline.storage.base import Storage
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.members import Member


class Inline:
    """This process as the whole cluster of a job; use it as a context manager.

    ``decoders`` are processes that were started before.
    """

    given_up: tuple[int, ...] = ()

    def __init__(self, config: Config, storage: Storage, decoders: Decoders | None = None) -> None:
        self._config, self._storage, self._decoders = config, storage, decoders
        self._opened = ExitStack()
        self._began = time.time()
        self._engine: Engine
        self._prepared: Prepared
        self._clocks, self._spent, self._before = StageClocks(), Spent(0.0, 0.0), Spent(0.0, 0.0)
        self._startup, self._rows, self._images, self._repeats, self._shards = 0.0, 0, 0, 0, 0

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def prepare(self, inputs: Inputs) -> Prepared:
        """Open the model and pass the gates.

        Raises:
            PipelineError: see :func:`pipeline.engine.prepare.open_engine` and :func:`pipeline.engine.prepare.prepare`.
        """
        self._engine = open_engine(self._config, inputs, self._storage, self._opened, self._decoders)
        self._prepared = prepare(self._engine, inputs, self._storage)
        self._startup = time.time() - self._began
        return self._prepared

    def begin(self, job: Job) -> None:
        """The plan is settled."""
        self.rehearse(job)
        note(self._engine, self._prepared, self._storage)

    def rehearse(self, job: Job) -> None:
        """Take the job without a written plan: nothing is written to the output."""
        self._job = job

    def run(self, shards: Iterable[Shard], on_batch: Callable[[int], None]) -> Generator[ShardReport]:
        """See :func:`pipeline.engine.loop.embed`."""
        # A clock of the thread that runs the loop.
        self._clocks, self._before = StageClocks(), spent()
        engine = self._engine
        try:
            worker = Worker(engine.reader, engine.encoder, self._clocks)
            with closing(embed(shards, self._job, worker, on_batch=on_batch)) as reports:
                for report in reports:
                    self._shards += 1
                    self._rows += report.rows if report.committed else 0
                    self._images += report.counts.get(OK, 0) - report.repeats
                    self._repeats += report.repeats
                    yield report
        finally:
            self._spent = spent() - self._before

    @property
    def reader(self) -> PixelReader:
        """Reads pictures of the job."""
        return self._engine.reader

    @property
    def members(self) -> tuple[Member, ...]:
        """Statistics of this process."""
        engine = self._engine
        return (
            Member(
                name="0",
                host=socket.gethostname(),
                pid=os.getpid(),
                device=str(engine.encoder.device),
                cores=cores(),
                startup_seconds=self._startup,
                rows=self._rows,
                images=self._images,
                repeats=self._repeats,
                shards=self._shards,
                clocks=self._clocks.total(),
                own_core_seconds=self._spent.own,
                child_core_seconds=self._spent.children,
                memory={**memory(), **engine.reader.memory()},
                batch_sizes=tuple(engine.encoder.batch_sizes),
                timeline=self._clocks.timeline(),
            ),
        )
