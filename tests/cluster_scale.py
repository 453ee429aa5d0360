"""What a scheduler costs: shards that take no time, on 1 to 16 processes that embed nothing.

    python -m tests.cluster_scale [--shards 10000] [--workers 1 2 4 8 16] [--seconds 5]

The dispatch is the real one (``DaskExecutor.run``, real nannies, real events); in the workers a stub takes the place of
the model and reports every shard at once. CPU time of the driver, in which scheduler, nannies and dispatch live, is
what counts: on few cores wall time is the stubs'. Prints JSON: core seconds per shard, and how many GPUs of
``--seconds`` a shard the driver serves before it is busy for 2 % and for the whole of its core.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask

from pipeline.config.schema import Config
from pipeline.core.records import Clocks, Piece, Shard, Stage
from pipeline.job.cluster import dask_worker as worker_module
from pipeline.job.cluster.affinity import VARIABLE, shares
from pipeline.job.cluster.dask_cluster import SETTINGS, open_processes
from pipeline.job.cluster.dask_executor import DaskExecutor
from pipeline.job.cluster.events import EventSender
from pipeline.storage.factory import open_storage
from pipeline.telemetry.run_stats import WorkerStats

TOKEN = "scale"


class Stub:
    """Reports every shard at once, with everything a real report holds."""

    drained = False

    def __init__(self, worker: Any) -> None:
        clocks = Clocks({stage: 1.0 for stage in Stage}, {stage: 1.0 for stage in Stage})
        self._events = EventSender(worker, f"pipeline-{TOKEN}")
        self._stats = WorkerStats(str(worker.name), "host", id(self) % 100_000, "cpu", 1, 1.0, clocks=clocks)

    def put(self, shard: Shard) -> Future[None]:
        report = {
            "shard": shard.index,
            "part": f"part-{shard.index:05d}-0123456789abcdef.parquet",
            "rows": shard.rows,
            "counts": {"ok": shard.rows},
            "committed": True,
        }
        for _ in range(8):
            self._events.send({"images": 512})
        self._events.send({"report": report, "stats": self._stats.to_json()})
        done: Future[None] = Future()
        done.set_result(None)
        return done


def plant(dask_worker: Any) -> None:
    # Dask passes the worker by this name.
    worker_module._STATES[TOKEN] = Stub(dask_worker)  # type: ignore[assignment]


def measure(shards: int, workers: int) -> dict[str, float]:
    config = Config().changed({"manifest.shard_rows": 4096})
    environments = [{VARIABLE: ",".join(map(str, share))} for share in shares(workers, 1)]
    with ExitStack() as opened:
        opened.enter_context(dask.config.set(SETTINGS))
        client = opened.enter_context(open_processes(config, environments))
        client.wait_for_workers(workers, timeout=600)
        client.run(plant)
        fleet = DaskExecutor(config, open_storage(str(Path("/nonexistent"))), lambda: None)
        fleet._client, fleet._token = client, TOKEN
        client.subscribe_topic(f"pipeline-{TOKEN}", lambda event: fleet._events.put(event[1]))
        fleet._tick()
        todo = (Shard(index, 4096, (Piece(0, index, 0, 4096),)) for index in range(shards))
        wall, core = time.perf_counter(), time.process_time()
        seen = {report.shard for report in fleet.run(todo, lambda images: None)}
        wall, core = time.perf_counter() - wall, time.process_time() - core
    assert seen == set(range(shards))
    return {"workers": workers, "shards": shards, "wall_seconds": wall, "driver_core_seconds_per_shard": core / shards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    rows = []
    for workers in options.workers:
        row = measure(options.shards, workers)
        each = row["driver_core_seconds_per_shard"]
        # N GPUs finish N / seconds shards a second, each of which takes the driver's core for a moment.
        row["gpus_at_2_percent_of_a_core"] = 0.02 * options.seconds / each
        row["gpus_at_a_whole_core"] = options.seconds / each
        rows.append({name: round(value, 6) for name, value in row.items()})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
