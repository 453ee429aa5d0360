"""Statistics of a run: of each process, and of several processes or parts of a job, which add up with ``+``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.core.processes import Spent
from pipeline.core.records import OK, Clocks, ShardReport, Stage, Timeline
from pipeline.telemetry.timeline import merge


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Statistics of one process of a run; times are seconds, memory is MiB.

    ``name`` stays when a cluster restarts the process, ``pid`` does not. ``startup_seconds`` go from its first message
    about the job to its opened model. ``own_core_seconds`` are those of all its threads, ``child_core_seconds`` of its
    decoder processes. ``batch_sizes`` has more than one entry where the device had no memory for the first.
    ``gpu_seconds`` are those in which a GPU computed its ``gpu_batches``, of which ``gpu_starved`` waited for launches.
    ``texts`` see :class:`~pipeline.core.records.ShardRows`. ``recall`` has the ``rows`` of a sample, and the share
    ``at_10`` of their nearest rows that stored embeddings keep.
    """

    name: str
    host: str
    pid: int
    device: str
    cores: int
    startup_seconds: float
    rows: int = 0
    images: int = 0
    repeats: int = 0
    shards: int = 0
    clocks: Clocks = field(default_factory=Clocks)
    own_core_seconds: float = 0.0
    child_core_seconds: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()
    timeline: Timeline = field(default_factory=Timeline)
    gpu_batches: int = 0
    gpu_seconds: float = 0.0
    gpu_starved: int = 0
    texts: Mapping[str, int] = field(default_factory=dict)
    recall: Mapping[str, float] = field(default_factory=dict)

    def with_shard(self, report: ShardReport) -> WorkerStats:
        """Return the statistics with one more shard."""
        return replace(
            self,
            rows=self.rows + (report.rows if report.committed else 0),
            images=self.images + report.counts.get(OK, 0) - report.repeats,
            repeats=self.repeats + report.repeats,
            shards=self.shards + 1,
            texts=_sum((self.texts, report.texts)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as types that JSON has."""
        clocks = {
            kind: {str(stage.value if isinstance(stage, Stage) else stage): value for stage, value in sums.items()}
            for kind, sums in asdict(self.clocks).items()
        }
        return {**asdict(self), "clocks": clocks, "batch_sizes": list(self.batch_sizes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WorkerStats:
        """Return the statistics from the result of :meth:`to_json`.

        Raises:
            KeyError, TypeError: ``values`` are something else.
        """
        clocks, sizes = Clocks(**values["clocks"]), tuple(values["batch_sizes"])
        return cls(**{**values, "clocks": clocks, "batch_sizes": sizes, "timeline": Timeline(**values["timeline"])})


@dataclass(frozen=True, slots=True)
class RunStats:
    """Statistics of a command, or of several parts of a job: add them with ``+``.

    ``began`` and ``ended`` are seconds since the epoch, ``rows`` those that were committed, ``images`` those that were
    embedded, ``workers`` the processes.
    """

    began: float
    ended: float
    rows: int
    images: int
    workers: tuple[WorkerStats, ...]

    def __add__(self, other: RunStats) -> RunStats:
        return RunStats(
            began=min(self.began, other.began),
            ended=max(self.ended, other.ended),
            rows=self.rows + other.rows,
            images=self.images + other.images,
            workers=self.workers + other.workers,
        )

    @property
    def seconds(self) -> float:
        """Wall time from the first beginning to the last end."""
        # The clock of the machine may have been set back during the run.
        return max(self.ended - self.began, 1e-3)

    @property
    def clocks(self) -> Clocks:
        """Seconds by stage of all processes."""
        return sum((worker.clocks for worker in self.workers), Clocks())

    @property
    def spent(self) -> Spent:
        """Core seconds of all processes."""
        return Spent(
            own=sum(worker.own_core_seconds for worker in self.workers),
            children=sum(worker.child_core_seconds for worker in self.workers),
        )

    @property
    def processes(self) -> int:
        """Number of processes that worked side by side; a restarted process counts once."""
        return len({(worker.host, worker.name) for worker in self.workers})

    @property
    def cores(self) -> int:
        """Cores that worked side by side; a restarted process has those of its predecessor."""
        return sum({(worker.host, worker.name): worker.cores for worker in self.workers}.values())

    @property
    def cores_of_hosts(self) -> int:
        """Cores of all hosts; parts of a job may have run one after the other on the same cores."""
        hosts: dict[str, int] = {}
        for worker in self.workers:
            hosts[worker.host] = max(worker.cores, hosts.get(worker.host, 0))
        return sum(hosts.values())

    @property
    def memory(self) -> dict[str, float]:
        """Largest value of every figure, in MiB."""
        peaks: dict[str, float] = {}
        for worker in self.workers:
            for name, value in worker.memory.items():
                peaks[name] = max(value, peaks.get(name, 0.0))
        return peaks

    @property
    def gpu_seconds(self) -> float:
        """Seconds in which GPUs computed batches, of all processes."""
        return sum(worker.gpu_seconds for worker in self.workers)

    @property
    def gpu_starved(self) -> float | None:
        """Share of the batches on GPUs that waited for their launches; None without a batch on a GPU."""
        batches = sum(worker.gpu_batches for worker in self.workers)
        return sum(worker.gpu_starved for worker in self.workers) / batches if batches else None

    @property
    def repeats(self) -> int:
        """Number of rows that share the embedding of another row with the same bytes."""
        return sum(worker.repeats for worker in self.workers)

    @property
    def texts(self) -> dict[str, int]:
        """Rows of a job with texts, see :class:`~pipeline.core.records.ShardRows`."""
        return _sum(worker.texts for worker in self.workers)

    @property
    def recall(self) -> dict[str, float]:
        """The recall of all samples by their rows; empty without one."""
        found = [worker.recall for worker in self.workers if worker.recall]
        rows = sum(each["rows"] for each in found)
        return {"rows": rows, "at_10": sum(each["rows"] * each["at_10"] for each in found) / rows} if rows else {}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of the process that had to lower its own most often."""
        return max((worker.batch_sizes for worker in self.workers), key=len, default=())

    @property
    def timeline(self) -> Timeline | None:
        """Sum of the timelines of all processes."""
        return merge(worker.timeline for worker in self.workers)

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as types that JSON has."""
        own = {"began": self.began, "ended": self.ended, "rows": self.rows, "images": self.images}
        return {**own, "members": [worker.to_json() for worker in self.workers]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunStats:
        """Return the statistics from the result of :meth:`to_json`.

        Raises:
            KeyError, TypeError: ``values`` are something else.
        """
        own = {name: values[name] for name in ("began", "ended", "rows", "images")}
        return cls(**own, workers=tuple(map(WorkerStats.from_json, values["members"])))


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
