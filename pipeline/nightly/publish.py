"""The end of a night: its books, the last of which makes it count."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import TooManyFailures
from pipeline.dataset import plan
from pipeline.dataset.dataset import Dataset
from pipeline.nightly import embed
from pipeline.nightly.prepare import COMPARED, Tonight
from pipeline.nightly.records import DROPPED, NIGHT, ROWS, SNAPSHOT, Kind, Night
from pipeline.nightly.rows import read_batches, read_footers
from pipeline.nightly.store import share
from pipeline.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Made:
    """The night's dataset (None where a partition has no rows), and the reports of the jobs that embedded for it."""

    dataset: Dataset | None
    reports: tuple[Mapping[str, Any], ...]
    shared: int
    written: int


def publish(tonight: Tonight, kinds: Mapping[str, int], made: Made, began: float) -> Night:
    """Write the night's books, ``_night.json`` last: with it the night counts.

    Args:
        tonight: the night.
        kinds: rows by what became of them.
        made: its dataset.
        began: when this run began with it, in seconds since the epoch.
    """
    sources, statuses = set[str](), pa.chunked_array([], pa.string())
    if made.dataset is not None:
        footers = list(read_footers(made.dataset))
        sources = {footer.source for footer in footers} - {plan.source_of(made.dataset.plan.fingerprints)}
        statuses = pa.chunked_array([footer.statuses for footer in footers])
    counts = _write_rows(tonight, statuses)
    share(tonight.work, DROPPED, tonight.target, DROPPED)
    rows, config = tonight.manifest.rows, tonight.config
    failed = sum(count for status, count in counts.items() if status != "ok")
    verdict = ""
    if failed > config.errors.max_fraction * rows:
        verdict = (
            f"{tonight.target.url}: published, but {failed:,} of {rows:,} rows failed ({failed / rows:.1%}), more than "
            f"errors.max_fraction={config.errors.max_fraction}; see the column status"
        )
    previous = tonight.previous
    prints = made.dataset.plan.fingerprints if made.dataset is not None else None
    if prints is not None:
        digest, model = embed.digest_of(prints), prints["model"]
    else:
        digest = previous.fingerprints if previous is not None else ""
        model = previous.signs.get("model") if previous is not None else None
    signs = embed.signs_of(config, model)
    images = sum(int(report["counts"].get("ok", 0)) for report in made.reports)
    # A job that was resumed knows its last run alone.
    rate = sum(report["images"] for report in made.reports), sum(report["wall_seconds"] for report in made.reports)
    now = time.time()
    night = Night(
        date=tonight.day,
        layout=tonight.wanted.layout,
        dataset=made.dataset.url if made.dataset is not None else "",
        previous=previous.date if previous is not None else None,
        anew=tonight.anew,
        content=str(tonight.content),
        started=_iso(began),
        finished=_iso(now),
        seconds=round(now - began, 3),
        rows=rows,
        kinds=kinds,
        counts=counts,
        embedded=sum(int(report["total_rows"]) for report in made.reports),
        images=images,
        images_per_second=round(rate[0] / rate[1], 2) if rate[1] else 0.0,
        shared=made.shared,
        written=made.written,
        exit_code=TooManyFailures.exit_code if verdict else 0,
        verdict=verdict,
        fingerprints=digest,
        versions=dict(signs["versions"]),
        signs=signs,
        sources=tuple(sorted(sources)),
    )
    content = {**asdict(night), "jobs": made.reports}
    tonight.target.write(NIGHT, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return night


def _write_rows(tonight: Tonight, statuses: pa.ChunkedArray) -> dict[str, int]:
    """``_rows.parquet``: id, key and status of every row of the manifest, with which the next night compares.

    ``statuses`` are those of the night's dataset. Returns the rows of the manifest by status, ``ok`` first.
    """
    whole, at, counts = tonight.wanted.layout == SNAPSHOT, 0, Counter[str]()
    with tonight.target.staged() as staged:
        writer = None
        for batch in read_batches(tonight.work, COMPARED, ["id", "key", "kind", "was"]):
            own = np.ones(batch.num_rows, dtype=bool)
            if not whole:
                own = batch.column("kind").to_numpy() != Kind.CARRIED
            found = batch.column("was").to_numpy(zero_copy_only=False).copy()
            found[own] = statuses.slice(at, int(own.sum())).to_numpy()
            at += int(own.sum())
            counts.update(found.tolist())
            found = pa.array(found, pa.string())
            made = pa.RecordBatch.from_arrays(
                [batch.column("id"), batch.column("key"), found], names=["id", "key", "status"]
            )
            writer = writer or pq.ParquetWriter(staged.path, made.schema, compression="zstd")
            writer.write_batch(made)
        if writer is not None:
            writer.close()
        staged.publish(ROWS, replace=True)
    return {"ok": counts.pop("ok", 0), **dict(sorted(counts.items()))}


def report_of(storage: Storage) -> Mapping[str, Any]:
    """The main job's own report; fields that the night has itself are left out."""
    report: dict[str, Any] = json.loads(storage.read("_report.json") or b"{}")
    left = ("config", "fingerprints", "failures", "versions")
    return {name: value for name, value in report.items() if name not in left}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
