"""Publication of a night: ``_rows.night``, ``_dropped.night``, and ``_night.json`` last, which makes it count."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Config
from pipeline.core.errors import TooManyFailures
from pipeline.core.records import by_status, failed_rows
from pipeline.core.run_report import RunReport
from pipeline.dataset import plan
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.saved_config import with_backend_of
from pipeline.engine.demo.notes import notes_of
from pipeline.nightly.embed import digest_of, signs_of
from pipeline.nightly.prepare import PendingNight
from pipeline.nightly.records import DROPPED, EARLIER, NIGHT, ROWS, Kind, Night
from pipeline.nightly.rows import fingerprints_of
from pipeline.nightly.store import share_file


@dataclass(frozen=True, slots=True)
class NightDataset:
    """A night before publication.

    ``kinds`` counts rows by kind. ``dataset`` is None for a partition without rows. ``reports`` are those of its jobs.
    ``shared`` is the number of its parts that are files of the previous night.
    """

    kinds: Mapping[str, int]
    dataset: Dataset | None = None
    reports: tuple[Mapping[str, Any], ...] = ()
    shared: int = 0


def publish(pending: PendingNight, made: NightDataset, began: float) -> Night:
    """Write the night's metadata; ``began`` is when this run began it, in seconds since the epoch."""
    sources, statuses = set[str](), pa.chunked_array([], pa.string())
    previous, config, dataset = pending.previous, pending.config, made.dataset
    digest = previous.fingerprints if previous is not None else ""
    model = previous.signs.get("model") if previous is not None else None
    if dataset is not None:
        parts = list(dataset.stream(["status"]))
        sources = {plan.source_of(fingerprints_of(part.schema)) for part in parts}
        sources.discard(plan.source_of(dataset.plan.fingerprints))
        statuses = pa.concat_tables(parts)["status"]
        digest, model = digest_of(dataset.plan.fingerprints), dataset.plan.fingerprints["model"]
        config = with_backend_of(config, dataset.plan.config)
    counts = _write_rows(pending, statuses)
    share_file(pending.work, EARLIER[DROPPED], pending.output, DROPPED)
    for name in EARLIER.values():
        # An earlier version may have begun to publish this night.
        pending.output.remove(name)
    verdict = _verdict(pending, counts)
    signs = signs_of(config, model)
    # The report of a continued job covers its last run only.
    images, seconds = (sum(report[name] for report in made.reports) for name in ("images", "wall_seconds"))
    now = time.time()
    night = Night(
        date=pending.day,
        layout=pending.options.layout,
        dataset=dataset.url if dataset is not None else "",
        previous=previous.date if previous is not None else None,
        anew=pending.anew,
        content=str(pending.content),
        started=_iso(began),
        finished=_iso(now),
        seconds=round(now - began, 3),
        rows=pending.manifest.rows,
        kinds=made.kinds,
        counts=counts,
        embedded=sum(int(report["total_rows"]) for report in made.reports),
        images=sum(int(report["counts"].get("ok", 0)) for report in made.reports),
        images_per_second=round(images / seconds, 2) if seconds else 0.0,
        shared=made.shared,
        written=len(dataset.commits) - made.shared if dataset is not None else 0,
        exit_code=TooManyFailures.exit_code if verdict else 0,
        verdict=verdict,
        fingerprints=digest,
        versions=dict(signs["versions"]),
        signs=signs,
        sources=tuple(sorted(sources)),
    )
    fingerprints = dataset.plan.fingerprints if dataset is not None else {}
    report = night_report(night, made.reports, config, fingerprints)
    content = {**asdict(night), "report": report.to_dict(), "jobs": made.reports}
    pending.output.write(NIGHT, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return night


@dataclass(frozen=True, slots=True, kw_only=True)
class NightReport(RunReport):
    """The report of a night in the schema of a job's.

    Throughput, stages and parity are those of its largest embedding job. ``night`` has the kinds of its rows, and start
    and seconds of that job.
    """

    night: Mapping[str, object]


def night_report(
    night: Night, jobs: Sequence[Mapping[str, Any]], config: Config, fingerprints: Mapping[str, object]
) -> NightReport:
    """Return the report of a night from the reports of its embedding jobs."""
    job: Mapping[str, Any] = max(jobs, key=lambda one: one["rows"]) if jobs else {}
    carried = ", ".join(f"{count:,} {kind}" for kind, count in night.kinds.items() if count) or "no rows"
    advice = f"of {night.rows:,} rows {carried}"
    if night.anew:
        advice += f"; everything was embedded anew: {night.anew}"
    if job:
        advice += f". Of embedding: {job['advice']}"
    # Figures that are not of the night as a whole are those of the job.
    values: dict[str, Any] = {
        "stages": {},
        "bound": "nothing",
        "prompts": {"labels": 0, "cached": True},
        "memory": {},
        "machine": {"device": "cpu", "cores": 1},
        **{field.name: job[field.name] for field in fields(RunReport) if field.name in job},
        "started": night.started,
        "rows": night.rows,
        "total_rows": night.rows,
        "resumed_rows": 0,
        "images": night.images,
        "wall_seconds": night.seconds,
        "images_per_second": night.images / night.seconds if night.seconds else 0.0,
        "startup_seconds": min(job.get("startup_seconds", 0.0), night.seconds),
        "counts": night.counts,
        "advice": advice,
        "exit_code": night.exit_code,
        "versions": night.versions,
        "fingerprints": fingerprints,
        "config": asdict(config),
        "history": (),
        "notes": notes_of(config),
    }
    about = {name: getattr(night, name) for name in ("date", "previous", "kinds", "embedded", "verdict")}
    timed = {name: job[name] for name in ("started", "wall_seconds") if name in job}
    return NightReport(**values, night={**about, "job": timed})


def report_of(dataset: Dataset) -> Mapping[str, Any]:
    """The report of the main job that made a dataset, without the fields that the night has itself."""
    report: dict[str, Any] = json.loads(dataset.storage.read("_report.json") or b"{}")
    return {name: report[name] for name in report if name not in ("config", "fingerprints", "failures", "versions")}


def _verdict(pending: PendingNight, counts: Mapping[str, int]) -> str:
    """A message if more rows of the manifest failed than are allowed, else an empty text."""
    rows, limit = pending.manifest.rows, pending.config.errors.max_fraction
    failed = failed_rows(counts)
    if failed <= limit * rows:
        return ""
    return (
        f"{pending.output.url}: published, but {failed:,} of {rows:,} rows failed ({failed / rows:.1%}), more than "
        f"errors.max_fraction={limit}; see the column status"
    )


def _write_rows(pending: PendingNight, statuses: pa.ChunkedArray) -> dict[str, int]:
    """Write ``_rows.night``: id, key and status of every row of the manifest, for the next night's comparison.

    ``statuses`` are those of the night's dataset. Returns the rows of the manifest by status, ``ok`` first.
    """
    at, counts = 0, Counter[str]()
    with pending.output.staged() as staged:
        writer = None
        for batch in pending.compared("id", "key", "kind", "was"):
            own = np.ones(batch.num_rows, dtype=bool)
            if not pending.snapshot:
                own = batch.column("kind").to_numpy() != Kind.CARRIED
            found = batch.column("was").to_numpy(zero_copy_only=False).copy()
            found[own] = statuses.slice(at, int(own.sum())).to_numpy()
            at += int(own.sum())
            counts.update(found.tolist())
            columns = [batch.column("id"), batch.column("key"), pa.array(found, pa.string())]
            rows = pa.RecordBatch.from_arrays(columns, names=["id", "key", "status"])
            writer = writer or pq.ParquetWriter(staged.path, rows.schema, compression="zstd")
            writer.write_batch(rows)
        if writer is not None:
            writer.close()
        staged.publish(ROWS, replace=True)
    return by_status(counts)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
