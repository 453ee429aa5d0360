"""The interface of what embeds the shards of a job, and the choice between this process and Dask workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Protocol, Self

from pipeline.config.choices import CLUSTERS
from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable, install_hint
from pipeline.core.records import Shard, ShardReport
from pipeline.engine.engine import Engine
from pipeline.engine.loop import Job
from pipeline.engine.prepare import Prepared
from pipeline.job.cluster.inline import Inline
from pipeline.storage.base import Storage
from pipeline.telemetry.run_stats import WorkerStats


class Executor(Protocol):
    """Embeds shards; the calls come in the order of the methods."""

    def __enter__(self) -> Self: ...

    def prepare(self, engine: Engine) -> Prepared:
        """Open the model and make the plan, of which nothing is written yet."""

    def begin(self, job: Job, write: Callable[[], None]) -> None:
        """Take the job; ``write`` writes its plan, and is called once the gates are passed."""

    @property
    def prepared(self) -> Prepared:
        """The result of :meth:`prepare`, with the figures of the gates once these are passed."""

    def run(self, shards: Iterable[Shard], on_batch: Callable[[int], None]) -> Generator[ShardReport]:
        """Embed and commit shards; ``on_batch`` is called with the images of each batch."""

    @property
    def workers(self) -> tuple[WorkerStats, ...]:
        """Statistics of each process."""

    @property
    def given_up(self) -> tuple[int, ...]:
        """Shards that ended every worker that had them."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def executor_of(config: Config, storage: Storage, check: Callable[[], None]) -> Executor:
    """The executor of ``cluster.name``; not opened yet.

    Args:
        config: of the job.
        storage: the output.
        check: called often; raises if the job must stop.

    Raises:
        ClusterUnavailable: Dask is not installed.
    """
    name = config.cluster.name
    if name == "inline":
        return Inline(storage)
    try:
        from pipeline.job.cluster.dask_executor import DaskExecutor
    except ImportError as error:
        raise ClusterUnavailable(f"cluster={name} needs Dask ({error}): {install_hint(CLUSTERS[name][-1])}") from error
    return DaskExecutor(config, storage, check)
