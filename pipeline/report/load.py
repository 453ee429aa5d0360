"""Read the report of a dataset of the main job, of a night or of relabel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import StorageError
from pipeline.storage.base import Storage

REPORT, NIGHT = "_report.json", "_night.json"
# Defaults for a report that an older version or another job wrote.
_ABSENT: dict[str, Any] = {
    "images": 0, "images_per_second": 0.0, "steady_images_per_second": 0.0, "startup_seconds": 0.0, "stages": {},
    "resumed_rows": 0, "bound": "nothing", "advice": "", "prompts": {"labels": 0, "cached": True}, "parity": None,
    "decoder_parity": None, "batch_sizes": [], "memory": {}, "machine": {"device": "cpu", "cores": 1}, "exit_code": 0,
    "pace": None, "workers": [], "given_up": [], "repeats": 0, "timeline": None, "scores": [], "history": [], "run": "",
}  # fmt: skip


def report_of(storage: Storage, *, config: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the dataset at ``storage``, with every field of :class:`~pipeline.core.run_report.RunReport`.

    ``config`` and ``fingerprints`` are those of its plan, in case the report has none.

    Raises:
        StorageError: the report is missing or cannot be read.
    """
    for name in (NIGHT, REPORT):
        data = storage.read(name)
        if data is None:
            continue
        try:
            found = json.loads(data)
            if name == NIGHT:
                found = _of_night(found)
            elif "vectors" in found:
                found = _of_relabel(found)
            whole = {**_ABSENT, "config": config, "fingerprints": fingerprints, "versions": {}, **found}
            missing = {"started", "rows", "total_rows", "wall_seconds", "counts"} - set(whole)
            if missing:
                raise KeyError(", ".join(sorted(missing)))  # noqa: TRY301
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(
                f"{storage.url}/{name}: not readable as a report ({type(error).__name__}: {error}); move it away and "
                "run the job again, which has nothing left to do but writes a new report"
            ) from error
        return whole
    raise StorageError(f"{storage.url}: has no {REPORT}; run the job again, which writes a new one")


def _of_night(night: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a night on top of those of its largest embedding job."""
    jobs = night["jobs"]
    job = max(jobs, key=lambda one: one["rows"]) if jobs else {}
    kinds = night["kinds"]
    carried = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count) or "no rows"
    advice = f"of {night['rows']:,} rows {carried}"
    if night["anew"]:
        advice += f"; everything was embedded anew: {night['anew']}"
    if job:
        advice += f". Of embedding: {job['advice']}"
    return {
        **job,
        "started": night["started"],
        "rows": night["rows"],
        "total_rows": night["rows"],
        "resumed_rows": 0,
        "images": night["images"],
        "wall_seconds": night["seconds"],
        "images_per_second": night["images"] / night["seconds"] if night["seconds"] else 0.0,
        "startup_seconds": min(job.get("startup_seconds", 0.0), night["seconds"]),
        "counts": night["counts"],
        "advice": advice,
        "exit_code": night["exit_code"],
        "versions": night["versions"],
        "history": [],
        "night": {name: night[name] for name in ("date", "previous", "kinds", "embedded", "verdict")},
        # The start of the embedding job, which is the zero of its timeline.
        "timeline_began": job.get("started"),
        "timeline_wall": job.get("wall_seconds"),
    }


def _of_relabel(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **report,
        "images": report["vectors"],
        "images_per_second": report["vectors"] / report["wall_seconds"] if report["wall_seconds"] else 0.0,
        "advice": (
            f"{report['changed']:,} rows have another label than in {report['source']['dataset']}, from whose "
            "embeddings these labels come; no image was read"
        ),
        "bound": "labelling",
    }
