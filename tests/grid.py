"""A job of nine shards, and a small Dask cluster that several tests share, whose workers have imported everything."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client

from pipeline.config.schema import Config
from pipeline.core.failpoints import arm
from pipeline.job.cluster.affinity import VARIABLE, shares
from pipeline.job.cluster.dask_cluster import SETTINGS, open_processes
from pipeline.job.main import run_job
from tests.crashes import leftovers
from tests.jobs import config_for, scenes_manifest

ROWS, SHARDS = 72, 9


def nine_shards(folder: Path) -> Config:
    """A finished job of nine shards in one process."""
    config = config_for(
        scenes_manifest(folder / "m.parquet", ROWS),
        folder / "single",
        manifest={"shard_rows": 8},
        loader={"batch_size": 4},
        prompts={"cache": str(folder / "cache")},
    )
    run_job(config)
    return config


def at(config: Config, output: Path) -> Config:
    return replace(config, output=replace(config.output, dir=str(output)))


def rows_of(output: Path) -> dict[str, bytes]:
    """The plan, the parts, the commits and the marker."""
    files = [*output.glob("*.parquet"), *output.glob("_commits/*"), output / "_plan.json", output / "_SUCCESS"]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(files)}


def same(config: Config, output: Path) -> None:
    assert rows_of(output) == rows_of(Path(config.output.dir))
    assert not leftovers(output)


def when_committed(output: Path, shards: int, act: object) -> threading.Thread:
    """Call ``act`` once so many shards are committed."""

    def wait() -> None:
        while len(list(output.glob("_commits/*.json"))) < shards:
            time.sleep(0.01)
        act()  # type: ignore[operator]

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@contextmanager
def grid(workers: int) -> Iterator[Client]:
    """A client of a cluster on loopback, whose address jobs may take."""
    environments = [{VARIABLE: ",".join(map(str, share))} for share in shares(workers, 1)]
    with dask.config.set(SETTINGS), open_processes(config_for(Path("m"), Path("o")), environments) as client:
        client.wait_for_workers(workers, timeout=300)
        yield client


def on(client: Client, config: Config, **values: Any) -> Config:
    """The job on that cluster."""
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
