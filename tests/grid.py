"""A small Dask cluster that several tests share: two worker processes that have imported everything by now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client

from pipeline.cluster.cores import VARIABLE, shares
from pipeline.cluster.opening import SETTINGS, open_processes
from pipeline.config import Config
from pipeline.failpoints import arm
from tests.jobs import config_for


@contextmanager
def grid(workers: int) -> Iterator[Client]:
    """A client of a cluster on loopback, whose address jobs may take."""
    environments = [{VARIABLE: ",".join(map(str, share))} for share in shares(workers, 1)]
    with dask.config.set(SETTINGS), open_processes(config_for(Path("m"), Path("o")), environments) as client:
        client.wait_for_workers(workers, timeout=300)
        yield client


def on(client: Client, config: Config, **values: Any) -> Config:
    """The job on that cluster."""
    from dataclasses import replace

    cluster = replace(config.cluster, name="address", address=client.scheduler.address, **values)
    return replace(config, cluster=cluster)


@contextmanager
def failpoints(client: Client, text: str) -> Iterator[None]:
    """Arm failpoints in the workers, in those that are started meanwhile too, and not in this process."""
    os.environ["PIPELINE_FAILPOINTS"] = text
    client.run(arm, text)
    try:
        yield
    finally:
        del os.environ["PIPELINE_FAILPOINTS"]
        client.run(arm, "", on_error="ignore")
