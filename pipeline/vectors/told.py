"""What a relabelling tells of itself, to programs and to people."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

REPORT = "_report.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelabelReport:
    """What ``_report.json`` says of a relabelled dataset; times are seconds, ``stages`` those of the threads' cores.

    ``rows`` counts what this run committed, ``vectors`` those of them that have an embedding, ``changed`` those whose
    label is another than in the source. ``core_seconds`` are of the whole loop, ``rows_per_core_second`` follows.
    """

    source: Mapping[str, str]
    started: str
    rows: int
    vectors: int
    changed: int
    resumed_rows: int
    total_rows: int
    wall_seconds: float
    startup_seconds: float
    core_seconds: float
    rows_per_core_second: float
    stages: Mapping[str, float]
    counts: Mapping[str, int]
    labels: Mapping[str, int]
    prompts: Mapping[str, object]
    memory: Mapping[str, float]
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    fingerprints: Mapping[str, object]
    config: Mapping[str, object]
    exit_code: int = 0


def say(result: RelabelReport, output: str) -> None:
    """The same for the log, in a few lines."""
    if not result.rows:
        log.info("%s is complete: %d rows; nothing to do", output, result.total_rows)
        return
    log.info(
        "%s rows labelled in %.1f s, %s rows a second of a core; %s have another label than in the source",
        f"{result.rows:,}",
        result.wall_seconds,
        f"{result.rows_per_core_second:,.0f}",
        f"{result.changed:,}",
    )
    log.info("dataset: %s   report: %s/_report.html", output, output)
