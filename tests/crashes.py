"""Interruptions of a job: its failpoints, a small job, and checks of the dataset that an interrupted run leaves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.schema import Config
from tests.jobs import config_for, scenes_manifest

ROWS, SHARD_ROWS = 24, 2
# What publishing one file comes by; a file that is there already is replaced, a part or a commit never is.
_CREATED = ("storage.staged", "storage.synced", "storage.linked", "storage.durable")
_WRITTEN = ("storage.staged", "storage.synced", "storage.replaced", "storage.durable")


def _file(points: tuple[str, ...], name: str) -> list[str]:
    return [f"{point}[{name}]" for point in points]


# Every place of a job, as failpoints are armed, in the order in which a job comes by.
BEGIN = [*_file(_CREATED, "_lease/"), "lease.taken", *_file(_CREATED, "_plan.json"), "plan.settled"]
SHARDS = [
    *("rows", "read", "decode", "decoded", "encode", "encoded", "label", "part.build", "part.write", "part.written"),
    *_file(_CREATED, "part-"),
    "part.published",
    *_file(_CREATED, "_commits/"),
    "commit.done",
]
END = [
    *("finalize.begin", "finalize.checked", "finalize.cleared"),
    *_file(_WRITTEN, "_SUCCESS"),
    "finalize.done",
    *_file(_WRITTEN, "_report.json"),
    *_file(_WRITTEN, "_report.html"),
    "report.written",
]
PLACES = BEGIN + SHARDS + END
# Not reached by an unbroken job on a local disk; each has a test of its own.
SPECIAL = ("ids.write", "child.decode", "object.put", "object.created", "commit.lost")


def small_job(folder: Path, rows: int = ROWS, **groups: dict[str, Any]) -> Config:
    """A job of ``rows`` scenes, two of them damaged, in shards of two."""
    manifest = folder / f"scenes-{rows}.parquet"
    if not manifest.exists():
        scenes_manifest(manifest, rows)
    defaults: dict[str, dict[str, Any]] = {
        "manifest": {"shard_rows": SHARD_ROWS},
        "loader": {"batch_size": SHARD_ROWS},
        "prompts": {"cache": str(folder / "cache")},
        "report": {"html": True},
    }
    for name, values in groups.items():
        defaults[name] = {**defaults.get(name, {}), **values}
    return config_for(manifest, folder / "unbroken", **defaults)


def at(config: Config, output: Path | str) -> dict[str, dict[str, Any]]:
    """The job with another output, as :func:`tests.forks.job` takes it."""
    return asdict(config.changed({"output.dir": str(output)}))


def check_dataset(output: Path, ids: list[str]) -> int:
    """Check a dataset, also of a killed run; return the number of committed rows.

    Every committed part is there, whole, with the rows that its commit says; readers see no row twice and
    no row that the manifest does not have; a dataset that calls itself done is complete.
    """
    rows, parts = 0, set()
    for path in sorted((output / "_commits").glob("*.json")):
        commit = json.loads(path.read_bytes())
        data = (output / commit["part"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == commit["sha256"], f"{path.name}: its part is damaged"
        assert len(data) == commit["size"]
        statuses = pq.read_table(output / commit["part"])["status"].to_pylist()
        assert Counter(statuses) == commit["counts"], f"{path.name}: other counts than its part"
        assert len(statuses) == commit["rows"]
        rows += commit["rows"]
        parts.add(commit["part"])
    visible = sorted(output.glob("part-*.parquet"))
    seen = [name for path in visible for name in pq.read_table(path)["id"].to_pylist()]
    assert len(seen) == len(set(seen)), "a reader sees a row twice"
    assert set(seen) <= set(ids), "a reader sees a row that the manifest does not have"
    if (output / "_SUCCESS").exists():
        assert seen == ids, "_SUCCESS stands, but rows are missing"
        assert set(json.loads((output / "_SUCCESS").read_bytes())["parts"]) == parts
    return rows


def leftovers(output: Path) -> list[str]:
    """Temporary files that a finished dataset still holds."""
    return [str(path) for path in output.rglob("*") if path.name.startswith(("_tmp", ".", "tmp"))]
