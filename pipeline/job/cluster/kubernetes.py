"""Pods of a Kubernetes cluster, by the operator of dask-kubernetes: one worker process in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable, install_hint
from pipeline.job.cluster.dask_cluster import scale, shards_at_once


def pod_settings(config: Config) -> dict[str, Any]:
    """Settings of the operator, as ``KubeCluster`` takes them."""
    cluster = config.cluster
    limits = {"memory": cluster.kubernetes_memory}
    if cluster.cores:
        limits["cpu"] = str(cluster.cores)
    if cluster.kubernetes_gpus:
        limits["nvidia.com/gpu"] = str(cluster.kubernetes_gpus)
    threads = str(shards_at_once(config))
    return {
        "namespace": cluster.kubernetes_namespace,
        "image": cluster.kubernetes_image,
        "n_workers": cluster.workers or 1,
        "resources": {"limits": limits, "requests": limits},
        "env": dict(entry.split("=", 1) for entry in cluster.kubernetes_env),
        "worker_command": ["dask", "worker", "--nthreads", threads, "--memory-limit", "0"],
        "quiet": True,
    }


@contextmanager
def open_client(config: Config) -> Iterator[Client]:
    """See :func:`pipeline.job.cluster.dask_cluster.open_cluster`.

    Raises:
        ClusterUnavailable: dask-kubernetes is not installed.
    """
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise ClusterUnavailable(
            f"cluster=kubernetes needs dask-kubernetes ({error}): {install_hint('kubernetes')}"
        ) from error
    name = "clip-pipeline-{uuid}"
    with KubeCluster(name=name, **pod_settings(config)) as cluster, Client(cluster, set_as_default=False) as client:
        scale(cluster, config.cluster)
        yield client
