"""Summaries of earlier runs of the same job, which each report keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.core.records import failed_rows
from pipeline.report.load import read_report

# Earlier runs that a report keeps.
KEPT = 20


def earlier_runs(previous: bytes | None) -> tuple[Mapping[str, Any], ...]:
    """Summaries of the previous run, from its ``_report.json``, and of the runs before it, oldest first.

    Empty if there is none, or if it cannot be read.
    """
    try:
        report = json.loads(previous or b"null")
        return (*report.get("history", ()), in_short(report))[-KEPT:]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


def is_stale(previous: bytes | None, counts: Mapping[str, int]) -> bool:
    """Return whether a ``_report.json`` does not describe a complete dataset with ``counts``."""
    try:
        report = read_report(previous or b"")
        return bool(report["counts"] != counts or report["given_up"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return True


def in_short(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report for a comparison of runs.

    Raises:
        KeyError, TypeError: it is not a report of the main job.
    """
    config, machine = report["config"], report["machine"]
    return {
        "started": report["started"],
        "rows": report["rows"],
        "images": report["images"],
        "failed": failed_rows(report["counts"]),
        "wall_seconds": report["wall_seconds"],
        "startup_seconds": report["startup_seconds"],
        "images_per_second": report["images_per_second"],
        "steady_images_per_second": report["steady_images_per_second"],
        "bound": report.get("bound", "nothing"),
        "backend": config["backend"]["name"],
        "precision": config["backend"]["precision"],
        "decoder": config["images"]["decoder"],
        "cluster": config["cluster"]["name"],
        "device": machine.get("gpu", machine["device"]),
        "cores": machine["cores"],
        "peak_rss_mib": report.get("memory", {}).get("peak_rss_mib"),
        "exit_code": report.get("exit_code", 0),
    }
