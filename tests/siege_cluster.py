"""A soak of a job on a cluster: workers are killed at random moments, and the dataset is that of one process.

    python -m tests.siege_cluster [--rows 20000] [--workers 2] [--kills 10] [--seed 1]

Renders scenes, embeds them inline, then on ``cluster=local``, and again while workers are killed. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.schema import ClusterConfig, Config
from pipeline.engine.demo.folder import render_folder
from pipeline.job.main import run_job
from tests.crashes import check_dataset, leftovers


def files(output: Path) -> dict[str, bytes]:
    """The files that must be equal, by name."""
    found = [*output.glob("*.parquet"), *output.glob("_commits/*"), output / "_plan.json", output / "_SUCCESS"]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(found)}


def workers() -> list[int]:
    """The worker processes of this one; its decoders and helpers are others."""
    found = []
    for child in psutil.Process().children():
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def kill(times: int, pause: float, seed: int, over: threading.Event, killed: list[int]) -> None:
    """Kill a worker now and then."""
    dice = random.Random(seed)
    while len(killed) < times and not over.wait(dice.uniform(0.5, 1.5) * pause):
        found = workers()
        if found:
            pid = dice.choice(found)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


def run(config: Config, name: str) -> dict[str, Any]:
    report = run_job(config.changed({"output.dir": str(Path(config.output.dir) / name)}))
    return {
        "name": name,
        "wall_seconds": report.wall_seconds,
        "startup_seconds": report.startup_seconds,
        "steady_images_per_second": report.steady_images_per_second,
        "rows": report.rows,
        "processes": len(report.workers),
        "given_up": list(report.given_up),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shard-rows", type=int, default=256)
    parser.add_argument("--pause", type=float, default=20.0, help="seconds between kills, about")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="siege-cluster-"))
    manifest = render_folder(folder / "scenes", options.rows)
    config = Config()
    config = replace(
        config,
        manifest=replace(config.manifest, path=str(manifest), shard_rows=options.shard_rows),
        output=replace(config.output, dir=str(folder)),
        prompts=replace(config.prompts, cache=str(folder / "cache")),
        report=replace(config.report, progress="none"),
    )
    results = [run(config, "inline")]
    spread = ClusterConfig(name="local", workers=1, cores=1)
    results.append(run(replace(config, cluster=spread), "one"))
    spread = replace(spread, workers=options.workers, tries=100)
    results.append(run(replace(config, cluster=spread), "many"))
    over, killed = threading.Event(), list[int]()
    thread = threading.Thread(target=kill, args=(options.kills, options.pause, options.seed, over, killed), daemon=True)
    thread.start()
    results.append(run(replace(config, cluster=spread), "killed"))
    over.set()
    time.sleep(1)
    wanted = files(folder / "inline")
    for result in results:
        output = folder / result["name"]
        result["same_bytes"] = files(output) == wanted
        result["leftovers"] = leftovers(output)
    import pyarrow.parquet as pq

    ids = pq.read_table(manifest, columns=["id"])["id"].to_pylist()
    checked = check_dataset(folder / "killed", ids)
    print(json.dumps({"kills": len(killed), "rows_checked": checked, "orphans": workers(), "runs": results}, indent=2))


if __name__ == "__main__":
    main()
