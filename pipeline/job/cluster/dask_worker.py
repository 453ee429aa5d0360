"""State of a worker process: the model, opened once, and one loop in a thread of its own that embeds the shards
of all tasks.

A task puts its shard in and waits. Several are under way at a time, so that the loop goes from one shard to the next
without a gap. This module is loaded by every worker when it joins; the thread that opens the model imports the rest.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.config.ranges import AUTO
from pipeline.core.concurrency import aside
from pipeline.core.errors import Interrupted, PlanMismatch, WorkerMismatch
from pipeline.core.records import Shard, ShardReport, TextBank
from pipeline.job.cluster.events import EventSender, Forward
from pipeline.job.cluster.job_spec import JobSpec
from pipeline.storage.factory import open_storage

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine
    from pipeline.engine.loop import Job
    from pipeline.engine.meter import Meter
    from pipeline.engine.prepare import Prepared
    from pipeline.engine.sample import FirstBatch

# A stream that brings no shard ends, so that rows which wait for more are embedded: after so many seconds, at least,
# without a batch, or twice what batches take here.
SHORTEST, LONGEST, TICK = 0.25, 5.0, 0.02
# On a GPU, feeders start first, each with its libraries; a stream that ended meanwhile would have them start again.
STARTING = 20.0
_STATES: dict[str, WorkerState] = {}
_GUARD = threading.Lock()


def receive(worker: Any, spec: JobSpec) -> WorkerState:
    """The state of a job in this process; the first call begins to open its model."""
    with _GUARD:
        found = _STATES.get(spec.token)
        if found is None:
            found = _STATES[spec.token] = WorkerState(worker, spec)
    job = spec.exact_job
    if job is not None:
        found.take(job)
    return found


def of(token: str) -> WorkerState:
    """The state of a job in this process."""
    return _STATES[token]


def leave(spec: JobSpec) -> None:
    """Close the state of a job."""
    with _GUARD:
        found = _STATES.pop(spec.token, None)
    if found is not None:
        found.close()


class WorkerState:
    """One process's part in a job."""

    def __init__(self, worker: Any, spec: JobSpec) -> None:
        self._worker, self._spec = worker, spec
        self._began, self._startup = time.time(), 0.0
        self._bank: Future[TextBank | None] = Future()
        self._job: Future[Job] = Future()
        self._lock = threading.Lock()
        self._engine: Future[Engine] | None = None
        self._prepared: Prepared | None = None
        # What came in and is not reported yet, and where the loop takes it from.
        self._waiting: dict[int, Future[None]] = {}
        self._queue: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = self.drained = False
        self._alive, self._gap, self._patience = time.monotonic(), 0.0, SHORTEST
        self._events = EventSender(worker, spec.topic)
        self._log = Forward(self._events, self.name, logging.WARNING)
        logging.getLogger("pipeline").addHandler(self._log)
        logging.getLogger("pipeline").setLevel(logging.INFO)
        self._meter: Meter | None = None
        if spec.config.loader.batch_size and spec.config.backend.name != AUTO:
            self._open()
        else:
            # One worker measures batch size and backends, and the others wait for it; they can import meanwhile.
            aside(partial(import_module, "pipeline.engine.prepare"), name="imports")

    def take(self, job: Job) -> None:
        """The plan is there: from now on shards may come."""
        if not self._job.done():
            self._job.set_result(job)
            if not self._bank.done():
                self._bank.set_result(job.bank)

    def prepare(self, bank: TextBank | None) -> tuple[str, Prepared]:
        """See :func:`pipeline.job.cluster.tasks.prepare`."""
        from pipeline.engine import prepare as setup

        if not self._bank.done():
            self._bank.set_result(bank)
        # Everything is logged for this worker; warnings only for the others.
        self._log.setLevel(logging.INFO)
        engine = self._open().result()
        # No shard comes before the plan is written, and that not before the gates are passed.
        self._prepared = setup.settle(engine, setup.prepare(engine, self._storage()), self._storage())
        self._log.setLevel(logging.WARNING)
        return self._worker.address, self._prepared

    def note(self) -> None:
        """See :func:`pipeline.job.cluster.tasks.note`."""
        from pipeline.engine.prepare import note

        if self._prepared is not None:
            note(self._open().result(), self._prepared, self._storage())

    def put(self, shard: Shard) -> Future[None]:
        """Let the loop embed a shard, and start the loop if it is the first."""
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise Interrupted(f"{self.name} is ending")
            self._waiting[shard.index] = future
            self._alive = time.monotonic()
            self._queue.put(shard)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="embed", daemon=True)
                self._thread.start()
        return future

    def close(self) -> None:
        """Stop the loop within a batch, and give back the model."""
        with self._lock:
            self._closed, engine = True, self._engine
        logging.getLogger("pipeline").removeHandler(self._log)
        # A loop closes when it ends; what is just being opened can only be closed afterwards.
        if self._thread is None and engine is not None:
            engine.add_done_callback(_close)

    def _storage(self) -> Any:
        return open_storage(self._spec.config.output.dir)

    def _open(self) -> Future[Engine]:
        with self._lock:
            if self._engine is None:
                self._engine = aside(self._open_engine, name="engine")
        return self._engine

    def _open_engine(self) -> Engine:
        from pipeline.engine.engine import Engine

        # Unless this one measures them, batch size and backend are those of the job.
        config = self._job.result().config if self._job.done() else self._spec.config
        # The driver has checked the ids.
        engine = Engine(config, manifest=self._spec.manifest, bank=self._bank.result, recorded=self._spec.model)
        found = engine.checkpoint.fingerprint
        if found != self._spec.model:
            raise WorkerMismatch(
                f"{self.name}: {config.model.name} is another model there than where the job was started; give all the "
                f"same files (there {found}, here {dict(self._spec.model)})"
            )
        try:
            engine.start()
            engine.open(self._storage())
        except BaseException:
            engine.close()
            raise
        self._startup = time.time() - self._began
        return engine

    @property
    def name(self) -> str:
        """The worker as people find it."""
        return f"worker {self._worker.name} (process {os.getpid()} on {socket.gethostname()})"

    def _prepare(self) -> tuple[Engine, Prepared]:
        from pipeline.engine import prepare as setup

        job = self._job.result()
        engine = self._open().result()
        if self._prepared is None:
            try:
                self._prepared = setup.prepare(engine, self._storage())
            except PlanMismatch as error:
                raise WorkerMismatch(f"{self.name} would make other rows than the rest of the job: {error}") from error
        if engine.config.loader.batch_size != job.config.loader.batch_size:
            raise WorkerMismatch(f"{self.name} has opened its model for another batch size than the job's")
        return engine, self._prepared

    def _hold(self, first: Sequence[FirstBatch]) -> None:
        from pipeline.engine import prepare as setup

        engine, prepared = self._prepare()
        self._prepared = setup.settle(engine, prepared, self._storage(), first)

    def _loop(self) -> None:
        """Embed what comes; an error ends the tasks that wait, and the next ones begin anew."""
        while not self._closed:
            try:
                first = self._queue.get(timeout=10 * TICK)
            except queue.Empty:
                continue
            try:
                self._embed(first)
            except BaseException as error:
                with self._lock:
                    failed, self._waiting = self._waiting, {}
                    while not self._queue.empty():
                        self._queue.get()
                for future in failed.values():
                    future.set_exception(error)
        if self._engine is not None:
            self._engine.add_done_callback(_close)

    def _embed(self, first: Shard) -> None:
        engine, prepared = self._prepare()
        import torch

        from pipeline.engine.loop import embed
        from pipeline.engine.meter import Meter
        from pipeline.engine.worker import worker_of

        if engine.encoder.device.type == "cuda":
            # Opened in another thread, and the current device is each thread's own.
            torch.cuda.set_device(engine.encoder.device)
            self._patience = STARTING
        if self._meter is None:
            self._meter = Meter(engine, str(self._worker.name), self._startup)
        meter = self._meter
        self._alive = time.monotonic()
        reports = embed(
            self._stream(first),
            self._job.result(),
            worker_of(engine, meter, self._hold if prepared.pending else None),
            on_batch=self._on_batch,
            on_commit=partial(self._report, meter),
        )
        deque(reports, maxlen=0)

    def _stream(self, first: Shard) -> Iterator[Shard]:
        yield first
        while not self._closed:
            try:
                yield self._queue.get(timeout=TICK)
            except queue.Empty:
                if self.drained or time.monotonic() - self._alive > self._patience:
                    return

    def _on_batch(self, images: int) -> None:
        if self._closed:
            raise Interrupted(f"{self.name} is ending")
        now = time.monotonic()
        self._gap, self._alive = max(self._gap, now - self._alive), now
        self._patience = max(SHORTEST, min(LONGEST, 2 * self._gap))
        self._events.count(images)

    def _report(self, meter: Meter, report: ShardReport) -> None:
        meter.add(report)
        meter.lap()
        # In this order: the events of a shard arrive before its task ends.
        self._events.flush()
        shard = {**asdict(report), "counts": dict(report.counts)}
        # Dask adds a key worker of its own.
        self._events.send({"report": shard, "stats": meter.stats().to_json()})
        with self._lock:
            future = self._waiting.pop(report.shard, None)
        if future is not None:
            future.set_result(None)


def _close(opened: Future[Engine]) -> None:
    """Close an engine, if it could be opened."""
    if opened.exception() is None:
        opened.result().close()
