"""Jobs of a Slurm queue, by dask-jobqueue: one worker process in each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable, install_hint
from pipeline.job.cluster.dask_cluster import scale, scheduler_options, security, shards_at_once


def make_cluster(config: Config) -> Any:
    """The cluster, without a job yet; its ``job_script()`` is what would be submitted.

    Raises:
        ClusterUnavailable: dask-jobqueue is not installed.
    """
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise ClusterUnavailable(f"cluster=slurm needs dask-jobqueue ({error}): {install_hint('slurm')}") from error
    cluster = config.cluster
    cores = cluster.cores or 1
    # The process's threads only wait for its loop, so they are not counted as cores.
    threads = shards_at_once(config)
    options = scheduler_options(cluster)
    del options["protocol"], options["security"]
    return SLURMCluster(
        queue=cluster.slurm_partition,
        account=cluster.slurm_account,
        walltime=cluster.slurm_time,
        processes=1,
        cores=threads,
        job_cpu=cores,
        memory=cluster.slurm_memory,
        job_extra_directives=[
            *([f"--gres=gpu:{cluster.slurm_gpus}"] if cluster.slurm_gpus else []),
            *cluster.slurm_directives,
        ],
        job_script_prologue=list(cluster.slurm_prologue),
        python=cluster.slurm_python or sys.executable,
        protocol="tls://" if cluster.tls_ca else "tcp://",
        security=security(cluster),
        scheduler_options=options,
        # The loader keeps memory in bounds.
        worker_extra_args=["--memory-limit", "0"],
    )


@contextmanager
def open_client(config: Config) -> Iterator[Client]:
    """See :func:`pipeline.job.cluster.dask_cluster.open_cluster`."""
    with make_cluster(config) as cluster:
        scale(cluster, config.cluster)
        with Client(cluster, set_as_default=False) as client:
            yield client
