"""One process for each GPU of this machine, each of which sees its own alone."""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager

from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.errors import ClusterUnavailable
from pipeline.job.cluster.affinity import VARIABLE, shares
from pipeline.job.cluster.dask_cluster import open_processes

VISIBLE = "CUDA_VISIBLE_DEVICES"


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
    """The first ``workers`` GPUs that this process may use; all of them for 0.

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


def visible() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them: by number, UUID or MIG instance.

    The driver's own tool counts them, since a process that opens CUDA itself takes memory of the first one.
    """
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    # "GPU 0: NVIDIA H100 (UUID: GPU-5d...)"; the lines of MIG instances are indented.
    return [line.split("UUID: ")[1].rstrip(") ") for line in listed.splitlines() if line.startswith("GPU ")]
