"""Executor on the workers of a Dask cluster: as many shards at a time as they take, while workers join and leave.

Workers report by events, in order and over the connection that exists anyway. Nothing is fetched from a worker, so that
no report is lost with a worker that dies. A shard whose worker dies runs again. A shard whose workers die twice runs
after all others, on a worker that has no other shard, so that the cause is certain.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from distributed import Client, Future, KilledWorker, Worker, WorkerPlugin
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterLost, ClusterUnavailable
from pipeline.core.records import Shard, ShardReport
from pipeline.dataset.commits import FOLDER, read_commit
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job
from pipeline.engine.prepare import Prepared
from pipeline.job.cluster import dask_worker, tasks
from pipeline.job.cluster.dask_cluster import open_cluster
from pipeline.job.cluster.job_spec import JobSpec
from pipeline.storage.base import Storage
from pipeline.telemetry.run_stats import WorkerStats

LOST = "the scheduler of the cluster is gone; what was committed stays, and the same command goes on"


@contextmanager
def connected(*more: type[Exception]) -> Iterator[None]:
    """Around what needs the scheduler.

    Args:
        more: further exceptions that mean a lost connection.

    Raises:
        ClusterLost: it is gone.
    """
    gone: tuple[type[Exception], ...] = (CommClosedError, ClosedClientError, FutureCancelledError, *more)
    try:
        yield
    except gone as error:
        raise ClusterLost(LOST) from error


# How often the driver checks workers and tasks without events, and how often it counts free places, in seconds;
# and the shards that are sent ahead of the room, so that a worker need not wait for the driver.
TICK, COUNTED, AHEAD = 0.1, 1.0, 2
log = logging.getLogger(__name__)


class DaskExecutor:
    """The cluster of a job; use it as a context manager.

    Args:
        config: of the job.
        storage: the output.
        check: called often; raises if the job must stop.
    """

    def __init__(self, config: Config, storage: Storage, check: Callable[[], None]) -> None:
        self._config, self._storage, self._check = config, storage, check
        self._token = uuid.uuid4().hex
        self._opened = ExitStack()
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._workers: dict[tuple[str, int], WorkerStats] = {}
        self._client: Client
        self._spec: JobSpec
        self.prepared: Prepared
        self._slots: dict[str, int] = {}
        self._counted, self._seen = 0.0, time.monotonic()
        self.given_up: tuple[int, ...] = ()

    def __enter__(self) -> DaskExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @connected()
    def prepare(self, engine: Engine) -> Prepared:
        """Open the cluster, and let its first worker open the model and pass the gates.

        Raises:
            ClusterUnavailable: it cannot be opened, or has no worker.
            PipelineError: what the worker found.
        """
        self._client = self._opened.enter_context(open_cluster(engine.config))
        self._client.subscribe_topic(f"pipeline-{self._token}", lambda event: self._events.put(event[1]))
        self._spec = JobSpec(
            token=self._token, config=engine.config, manifest=engine.manifest, model=engine.checkpoint.fingerprint
        )
        self._clear()
        self._deliver("order", self._spec, closes=True)
        deaths = 0
        while True:
            bank = engine.bank()
            future = self._client.submit(
                tasks.prepare, self._token, bank, key=f"prepare-{self._token}-{deaths}", pure=False
            )
            while not future.done():
                self._tick()
                for message in self._messages():
                    self._handle(message)
            if future.status in ("cancelled", "lost"):
                raise ClusterLost(LOST)
            error = future.exception()
            if error is None:
                break
            deaths += _deaths(error)
            if not isinstance(error, KilledWorker) or deaths >= self._config.cluster.tries:
                raise self._explained(error, "while it opened the model")
        self._first, self.prepared = future.result()
        return self.prepared

    @connected()
    def begin(self, job: Job, write: Callable[[], None]) -> None:
        """Write the plan, and send the job to all workers."""
        write()
        # The worker that measured may be gone by now; then the next one measures again.
        with suppress(OSError, ValueError, KeyError):
            self._client.run(tasks.note, self._token, workers=[self._first], on_error="ignore")
        self._deliver("job", self._spec.with_job(job), closes=False)

    def run(self, shards: Iterable[Shard], on_batch: Callable[[int], None]) -> Generator[ShardReport]:
        """A report of every shard once it is durable, in any order; ``given_up`` names the others afterwards.

        Raises:
            ClusterUnavailable: there was no worker for ``cluster.wait_seconds``.
            ClusterLost: the scheduler is gone.
            PipelineError: what a worker found.
        """
        todo, again, alone = iter(shards), deque[Shard](), deque[Shard]()
        under: dict[int, tuple[Shard, Future[None]]] = {}
        deaths, given_up, drained, single = Counter[int](), list[int](), False, False
        while True:
            # One at least, while there is no worker too: only where nothing is under way then, nothing is left.
            # Dask gives a task to a worker that has none, while there is one.
            while len(under) < max(1, len(self._slots) if single else self._room):
                shard = alone.popleft() if single and alone else again.popleft() if again else next(todo, None)
                if shard is None:
                    break
                under[shard.index] = (shard, self._submit(shard, deaths[shard.index]))
            if len(under) < self._room and not drained and not again:
                # Nobody waits for a shard that will not come.
                drained = True
                with suppress(OSError, ClosedClientError):
                    self._client.run(tasks.drain, self._token, wait=False, on_error="ignore")
            if not under:
                if not alone:
                    break
                single = True
                continue
            for message in self._messages():
                report = self._handle(message, on_batch)
                if report is not None and under.pop(report.shard, None) is not None:
                    yield report
            self._tick()
            for shard, future in list(under.values()):
                if not future.done():
                    continue
                if future.status in ("cancelled", "lost"):
                    raise ClusterLost(LOST)
                error = future.exception() if future.status == "error" else None
                if error is None:
                    # Its report was received: it is sent before the task ends.
                    continue
                if not isinstance(error, KilledWorker):
                    raise self._explained(error, "")
                del under[shard.index]
                # Counted as gone at once, so that none of those that run alone gets company.
                self._slots.pop(getattr(error.last_worker, "address", ""), None)
                report = self._committed(shard)
                if report is not None:
                    yield report
                    continue
                deaths[shard.index] += _deaths(error)
                count = deaths[shard.index]
                this = {"shard": shard.index}
                log.warning("shard %d: the worker that had it died (%d)", shard.index, count, extra=this)
                if single and count >= self._config.cluster.tries:
                    given_up.append(shard.index)
                    log.error("shard %d is given up: every worker that had it died", shard.index, extra=this)
                else:
                    (again if count == 1 else alone).append(shard)
        self.given_up = tuple(sorted(given_up))

    @property
    def workers(self) -> tuple[WorkerStats, ...]:
        """Statistics of every worker process, as far as they were reported."""
        return tuple(sorted(self._workers.values(), key=lambda worker: (worker.host, worker.name, worker.pid)))

    @connected(OSError)
    def _deliver(self, kind: str, spec: JobSpec, *, closes: bool) -> None:
        name = f"pipeline-{kind}-{self._token}/{self._client.id}"
        self._client.register_plugin(Delivery(spec, closes=closes), name=name)
        self._opened.callback(self._take_back, name)

    def _take_back(self, name: str) -> None:
        # A cluster of one's own ends anyway; one that goes on gets its memory back.
        if self._config.cluster.name == "address" and self._client.status == "running":
            with suppress(Exception):
                self._client.unregister_worker_plugin(name)

    def _clear(self) -> None:
        """Take back what killed drivers left on a cluster that goes on: orders, and models opened for them."""
        if self._config.cluster.name == "address":
            # Not a function of a module, which a scheduler need not have.
            left = self._client.run_on_scheduler(
                lambda dask_scheduler: [
                    name
                    for name in dask_scheduler.worker_plugins
                    if name.startswith("pipeline-") and name.partition("/")[2] not in dask_scheduler.clients
                ]
            )
            for name in left:
                self._take_back(name)

    @connected()
    def _submit(self, shard: Shard, deaths: int) -> Future[None]:
        key = f"shard-{self._token}-{shard.index}-{deaths}"
        return self._client.submit(tasks.embed, self._token, shard, key=key, pure=False, retries=0)

    @property
    def _room(self) -> int:
        return sum(self._slots.values()) + AHEAD * len(self._slots)

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Events received by now; waits a moment if there are none."""
        with suppress(queue.Empty):
            yield self._events.get(timeout=TICK)
            while True:
                yield self._events.get_nowait()

    def _handle(self, message: dict[str, Any], on_batch: Callable[[int], None] = lambda _: None) -> ShardReport | None:
        if "log" in message:
            known = {**message["fields"], "plain": message["log"]}
            logger = logging.getLogger(message["logger"])
            logger.log(message["level"], "%s: %s", message["from"], message["log"], extra=known)
        if "images" in message:
            on_batch(message["images"])
        if "stats" in message:
            worker = WorkerStats.from_json(message["stats"])
            self._workers[worker.host, worker.pid] = worker
        return ShardReport(**message["report"]) if "report" in message else None

    def _tick(self) -> None:
        """Look whether all is well, and count the room of the workers.

        Raises:
            ClusterUnavailable: no worker for too long.
            ClusterLost: no scheduler.
        """
        self._check()
        now = time.monotonic()
        if self._client.status != "running":
            raise ClusterLost(LOST)
        if now - self._counted < COUNTED and self._slots:
            return
        self._counted = now
        try:
            self._slots = self._client.nthreads()
        except (OSError, ValueError) as error:
            raise ClusterLost(LOST) from error
        if self._slots:
            self._seen = now
        elif now - self._seen > self._config.cluster.wait_seconds:
            raise ClusterUnavailable(
                f"cluster={self._config.cluster.name}: no worker for {now - self._seen:.0f} s; look at the workers' "
                "own logs, or raise cluster.wait_seconds"
            )

    def _committed(self, shard: Shard) -> ShardReport | None:
        """Commits of a worker that died before it could report them."""
        commit = read_commit(self._storage, f"{shard.index:05d}.json")
        if commit is None or not self._storage.size(f"{FOLDER}/{shard.index:05d}.json"):
            return None
        return ShardReport(shard=shard.index, part=commit.part, rows=commit.rows, counts=commit.counts, committed=True)

    def _explained(self, error: BaseException, when: str) -> BaseException:
        if isinstance(error, KilledWorker):
            return ClusterUnavailable(
                f"cluster={self._config.cluster.name}: every worker died {when}; it may have had no memory for the "
                "model: look at the system's log, or run once with cluster=inline"
            )
        return error


def _deaths(error: BaseException) -> int:
    """Workers that died of a task; a scheduler of one's own tells of the first, others try it elsewhere before."""
    return 1 + (error.allowed_failures if isinstance(error, KilledWorker) else 0)


class Delivery(WorkerPlugin):
    """Worker plugin: sends a job, and closes its state and model at the end if ``closes``."""

    def __init__(self, spec: JobSpec, *, closes: bool) -> None:
        self.spec, self.closes = spec, closes

    def setup(self, worker: Worker) -> None:
        """Begin to open the model; returns at once."""
        dask_worker.receive(worker, self.spec)

    def teardown(self, worker: Worker) -> None:
        """The worker ends, or the job does."""
        if self.closes:
            dask_worker.leave(self.spec)
