"""Processes of this machine, each with its share of the cores."""

from __future__ import annotations

from contextlib import AbstractContextManager

from distributed import Client

from pipeline.config.schema import Config
from pipeline.job.cluster.affinity import VARIABLE, shares
from pipeline.job.cluster.dask_cluster import open_processes

WORKERS = 2


def open_client(config: Config) -> AbstractContextManager[Client]:
    """See :func:`pipeline.job.cluster.dask_cluster.open_cluster`."""
    cluster = config.cluster
    cores = shares(cluster.workers or WORKERS, cluster.cores)
    return open_processes(config, [{VARIABLE: ",".join(map(str, share))} for share in cores])
