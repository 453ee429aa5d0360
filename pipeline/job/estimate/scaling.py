"""How one measured process stands for those of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable
from pipeline.core.processes import cores


@dataclass(frozen=True, slots=True)
class Processes:
    """``count`` of them, None where nobody knows before the job runs; ``words`` say what is taken for granted.

    ``gain`` is how many times as fast as one they are at most, ``shared`` whether the cores of this machine are all
    that they have.
    """

    count: int | None
    gain: int = 1
    shared: bool = True
    words: str = ""

    def rate(self, one: float, core_seconds: float) -> float:
        """Images/s of all, from those of ``one``, in which an image takes ``core_seconds`` of this machine's cores."""
        if not self.shared or core_seconds <= 0:
            return one * self.gain
        return max(one, min(one * self.gain, cores() / core_seconds))


def processes_of(config: Config) -> Processes:
    """Those that ``cluster`` asks for.

    Raises:
        ClusterUnavailable: there are not so many GPUs.
    """
    cluster = config.cluster
    if cluster.name == "inline":
        return Processes(1)
    if cluster.name == "local":
        from pipeline.job.cluster.local import WORKERS

        count = cluster.workers or WORKERS
        return Processes(count, words=f"one process was measured; {count} share the same cores")
    if cluster.name == "cuda":
        from pipeline.job.cluster.cuda import visible

        found = len(visible())
        count = cluster.workers or found
        if not found or count > found:
            raise ClusterUnavailable(
                f"cluster=cuda: {count or 'some'} GPUs are asked for, and {found} can be seen; "
                "lower cluster.workers, or take cluster=local"
            )
        words = f"one GPU was measured; {count} are taken for as many times that, as far as the cores keep up"
        return Processes(count, gain=count, words=words)
    if cluster.name == "address":
        words = "one process was measured here, and the time is for one: divide it by the workers of the scheduler"
        return Processes(None, shared=False, words=words)
    count = cluster.workers or 1
    words = f"one process was measured here; {count} are taken for as many times that, each on a machine like this one"
    return Processes(count, gain=count, shared=False, words=words)
