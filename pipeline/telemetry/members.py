"""The processes of a run and the work of each, as the report shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core.records import Clocks, Stage, Timeline


@dataclass(frozen=True, slots=True)
class Member:
    """The work of one process for a run; times are seconds, memory is MiB.

    ``name`` stays when a cluster restarts the process, ``pid`` does not. ``startup_seconds`` go from its first message
    about the job to its opened model. ``own_core_seconds`` are those of all its threads, ``child_core_seconds`` of its
    decoder processes. ``batch_sizes`` has more than one entry where the device had no memory for the first.
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

    def to_json(self) -> dict[str, Any]:
        """The member as types that JSON has."""
        clocks = {
            kind: {str(stage.value if isinstance(stage, Stage) else stage): value for stage, value in sums.items()}
            for kind, sums in asdict(self.clocks).items()
        }
        return {**asdict(self), "clocks": clocks, "batch_sizes": list(self.batch_sizes)}


def from_json(values: Mapping[str, Any]) -> Member:
    """Return the member from the result of :meth:`Member.to_json`.

    Raises:
        KeyError, TypeError: ``values`` are something else.
    """
    clocks, sizes = Clocks(**values["clocks"]), tuple(values["batch_sizes"])
    timeline = Timeline(**values["timeline"])
    return Member(**{**values, "clocks": clocks, "batch_sizes": sizes, "timeline": timeline})


def total_clocks(members: Iterable[Member]) -> Clocks:
    """The sum of the clocks of all processes."""
    return sum((member.clocks for member in members), Clocks())


def total_cores(members: Iterable[Member]) -> int:
    """Cores that worked; a restarted process has those of its predecessor."""
    return sum({(member.host, member.name): member.cores for member in members}.values())


def peak_memory(members: Iterable[Member]) -> dict[str, float]:
    """The largest value of every figure."""
    peaks: dict[str, float] = {}
    for member in members:
        for name, value in member.memory.items():
            peaks[name] = max(value, peaks.get(name, 0.0))
    return peaks
