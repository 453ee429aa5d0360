"""Throughput of the processes of a cluster, from that of the one that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.core.processes import cores


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes that embed.

    Attributes:
        count: their number; None where the scheduler decides.
        gain: the most by which they are faster than one.
        shared: True if they all share the cores of this machine.
        words: assumptions of the estimate, for people.
    """

    count: int | None
    gain: int = 1
    shared: bool = True
    words: str = ""

    def rate(self, one: float, core_seconds: float) -> float:
        """Return images/s of all, from those of ``one``, which spends ``core_seconds`` of this machine on an image."""
        if not self.shared or core_seconds <= 0:
            return one * self.gain
        return max(one, min(one * self.gain, cores() / core_seconds))


def processes_of(config: Config) -> Processes:
    """Return the processes that ``cluster`` asks for.

    Raises:
        ClusterUnavailable: this machine has fewer GPUs.
    """
    cluster = config.cluster
    if cluster.name == "inline":
        return Processes(1)
    if cluster.name == "local":
        from pipeline.job.cluster.local import WORKERS

        count = cluster.workers or WORKERS
        return Processes(count, words=f"one process was measured; {count} share the same cores")
    if cluster.name == "cuda":
        from pipeline.job.cluster.cuda import chosen_gpus

        count = len(chosen_gpus(cluster.workers))
        words = f"one GPU was measured; {count} are assumed to be {count} times as fast, as far as the cores keep up"
        return Processes(count, gain=count, words=words)
    if cluster.name == "address":
        words = "one process was measured here, and the time is for one: divide it by the workers of the scheduler"
        return Processes(None, shared=False, words=words)
    count = cluster.workers or 1
    words = f"one process was measured here; {count} like it, each on a machine like this one, are assumed"
    return Processes(count, gain=count, shared=False, words=words)
