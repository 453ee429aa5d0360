"""A cluster as the config asks for it: opened, quiet, and closed again whatever happens."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Scheduler, SpecCluster
from distributed.security import Security

from pipeline.config.schema import ClusterConfig, Config
from pipeline.core.errors import ClusterUnavailable
from pipeline.core.machine import is_loopback
from pipeline.core.processes import cores
from pipeline.engine.loader import LEAST
from pipeline.job.cluster import main_guard
from pipeline.job.cluster.affinity import quiet

MOST_SHARDS = 32
SETTINGS = {
    # :mod:`pipeline.job.cluster.dask_executor` finds the shard that ended a worker.
    "distributed.scheduler.allowed-failures": 0,
    # A worker that is just being started when this is over, since it was lost, would not be started again ever after.
    "distributed.deploy.lost-worker-timeout": "1000 days",
    # Building an engine may keep a worker from answering for minutes; one that is gone closes its connection.
    "distributed.scheduler.worker-ttl": "1 hour",
    # The share of the cores is an affinity; these would give every library one thread.
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.worker.profile.enabled": False,
    # Memory is kept in bounds by the loader, not by pausing workers.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}
log = logging.getLogger(__name__)


@contextmanager
def open_cluster(config: Config) -> Iterator[Client]:
    """A client of the cluster that ``cluster.name`` names.

    Raises:
        ClusterUnavailable: it cannot be started or reached.
    """
    cluster = config.cluster
    module = importlib.import_module(f"pipeline.job.cluster.{cluster.name}")
    levels = quiet()
    if cluster.name != "address" and not is_loopback(cluster.host) and cluster.tls_ca is None:
        log.warning(
            "the scheduler listens on %s without TLS: who reaches its port can run code as you; see cluster.tls_ca",
            cluster.host,
        )
    try:
        with dask.config.set(SETTINGS), module.open_client(config) as client:
            log.info("cluster=%s: scheduler at %s", cluster.name, client.scheduler.address)
            yield client
    except OSError as error:
        raise ClusterUnavailable(f"cluster={cluster.name}: {error or type(error).__name__}") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def shards_at_once(config: Config, processes: int = 1) -> int:
    """Shards under way in a process, so that its loop never waits for the next one; ``processes`` share the cores.

    One is written, one is embedded; and the loader keeps about two batches of rows in its hands, which short shards
    must add up to. Feeders take whole shards, some each.
    """
    import torch

    from pipeline.engine.feeders import SHARDS, count_feeders
    from pipeline.engine.shard_size import asks_for_gpus

    batch = config.loader.batch_size or 256
    workers = config.loader.workers or config.cluster.cores or max(1, cores() // processes)
    held = batch + max(batch, 2 * LEAST * workers)
    config = config.changed({"loader.workers": workers})
    feeders = count_feeders(config, torch.device("cuda" if asks_for_gpus(config) else "cpu"))
    return min(MOST_SHARDS, 2 + max(-(-held // config.manifest.shard_rows), SHARDS * feeders))


def scale(opened: Any, cluster: ClusterConfig) -> None:
    """Ask for ``cluster.workers``, or let Dask follow the work from there up to ``cluster.max_workers``."""
    least = cluster.workers or 1
    if cluster.max_workers > least:
        opened.adapt(minimum=least, maximum=cluster.max_workers)
    else:
        opened.scale(least)


def security(cluster: ClusterConfig) -> Security | None:
    """The TLS files, for all sides; None where there are none."""
    if cluster.tls_ca is None:
        return None
    return Security(
        require_encryption=True,
        tls_ca_file=cluster.tls_ca,
        tls_client_cert=cluster.tls_cert,
        tls_client_key=cluster.tls_key,
        tls_scheduler_cert=cluster.tls_cert,
        tls_scheduler_key=cluster.tls_key,
        tls_worker_cert=cluster.tls_cert,
        tls_worker_key=cluster.tls_key,
    )


def scheduler_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Address and protocol of a scheduler that this job starts."""
    dashboard = f"{cluster.dashboard_host}:{cluster.dashboard_port if cluster.dashboard else 0}"
    return {
        "host": cluster.host,
        "port": cluster.port,
        "protocol": "tls" if cluster.tls_ca else "tcp",
        "security": security(cluster),
        "dashboard": cluster.dashboard,
        "dashboard_address": dashboard,
    }


@contextmanager
def open_processes(config: Config, environments: list[dict[str, str]]) -> Iterator[Client]:
    """A scheduler in this process, and a worker process for every environment; one that dies is started anew."""
    from distributed import Nanny

    cluster = config.cluster
    options = {
        "nthreads": shards_at_once(config, len(environments)),
        "host": cluster.host,
        "protocol": "tls" if cluster.tls_ca else "tcp",
        "security": security(cluster),
        "dashboard_address": f"{cluster.host}:0",
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
        "preload": ["pipeline.job.cluster.affinity"],
    }
    workers = {
        number: {"cls": Nanny, "options": {**options, "env": environment}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": scheduler_options(cluster)}
    with (
        main_guard.watched() as mark,
        _started(cluster, workers, scheduler, mark) as opened,
        Client(opened, set_as_default=False) as client,
    ):
        yield client


def _started(cluster: ClusterConfig, workers: dict[int, Any], scheduler: dict[str, Any], mark: Path) -> SpecCluster:
    """A cluster that runs; one of which a process died while it began has closed the others, and is started anew."""
    for number in range(1, cluster.tries + 1):
        try:
            return SpecCluster(
                workers=workers, scheduler=scheduler, security=security(cluster), silence_logs=logging.CRITICAL
            )
        except RuntimeError as error:
            if mark.exists():
                main_guard.refuse(cluster.name)
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            # A port that is taken stays so.
            if number == cluster.tries or isinstance(reason, OSError):
                raise ClusterUnavailable(f"cluster={cluster.name}: its processes do not start: {reason}") from error
            log.warning("a process of the cluster died while it began (%d)", number)
    raise AssertionError("cluster.tries is at least one")
