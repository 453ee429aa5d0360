"""One process for each GPU, or MIG device, of this machine, each of which sees its own alone."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable
from pipeline.core.gpus import VISIBLE, visible
from pipeline.job.cluster.affinity import VARIABLE, shares
from pipeline.job.cluster.dask_cluster import open_processes


def open_client(config: Config) -> AbstractContextManager[Client]:
    """See :func:`pipeline.job.cluster.dask_cluster.open_cluster`.

    Raises:
        ClusterUnavailable: there are not so many GPUs.
    """
    chosen = chosen_gpus(config.cluster.workers)
    cores = shares(len(chosen), config.cluster.cores)
    return open_processes(
        config,
        [{VARIABLE: ",".join(map(str, share)), VISIBLE: gpu} for gpu, share in zip(chosen, cores, strict=True)],
    )


def chosen_gpus(workers: int) -> list[str]:
    """The first ``workers`` GPUs or MIG devices that this process may use; all of them for 0.

    Raises:
        ClusterUnavailable: there are not so many, or none.
    """
    found = visible()
    if not found or workers > len(found):
        raise ClusterUnavailable(
            f"cluster=cuda: {workers or 'some'} GPUs are asked for, and {len(found)} can be seen "
            f"({VISIBLE}={os.environ.get(VISIBLE, '')!r}); lower cluster.workers, or take cluster=local"
        )
    return found[: workers or len(found)]
