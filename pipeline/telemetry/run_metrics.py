"""The metrics of a run, while it works and after it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.core.run_report import RunReport
from pipeline.telemetry.prometheus import Metric, by, one

PREFIX = "clip_pipeline"
SUCCESS = "last_success_timestamp_seconds"
MIB = 2**20
# Metrics of the progress by its keys, see pipeline.telemetry.progress.
_PROGRESS = {
    "total": ("manifest_rows", "Rows of the manifest."),
    "rows": ("processed_rows", "Rows that this run has finished."),
    "failed": ("failed_rows", "Rows of this run that have a failure instead of an embedding."),
    "images": ("images", "Images that this run has embedded."),
    "images_per_second": ("images_per_second", "Images embedded in a second, since the first shard began."),
}


@dataclass(slots=True)
class RunState:
    """The state of a run so far; times are seconds since the epoch.

    ``progress`` returns the counts of a run whose loop has begun, and nothing before. ``succeeded`` is the time when a
    run of this job last ended with exit code 0.
    """

    run: str
    began: float
    progress: Callable[[], Mapping[str, float]] = dict
    resumed: int = 0
    report: RunReport | None = None
    dataset_bytes: int | None = None
    exit_code: int | None = None
    succeeded: float | None = None

    def metrics(self) -> list[Metric]:
        """The state as gauges; unknown values are left out."""
        now, counts = time.time(), self.progress()
        found = [
            by("run", "run_info", "The name of the run.", {self.run: 1}),
            one("running", "1 while the run works; it stays 1 if the run is killed.", self.exit_code is None),
            one("start_timestamp_seconds", "When the run began.", self.began),
            one("last_update_timestamp_seconds", "When these metrics were written.", now),
            one("wall_seconds", "Wall time of the run so far.", now - self.began),
        ]
        if self.exit_code is not None:
            found.append(one("exit_code", "Exit code of the run, once it has ended.", self.exit_code))
        if self.succeeded is not None:
            found.append(one(SUCCESS, "When a run of this job last ended with exit code 0.", self.succeeded))
        if counts:
            found.append(one("resumed_rows", "Rows that earlier runs had committed.", self.resumed))
            found += [one(*named, counts[key]) for key, named in _PROGRESS.items()]
        if self.dataset_bytes is not None:
            found.append(one("dataset_bytes", "Size of the committed parts.", self.dataset_bytes))
        return found + ([] if self.report is None else _of_report(self.report))


def _of_report(report: RunReport) -> list[Metric]:
    memory = {name.removeprefix("peak_").removesuffix("_mib"): mib * MIB for name, mib in report.memory.items()}
    steady = report.steady_images_per_second
    busy = (
        []
        if report.gpu_busy is None
        else [one("gpu_busy_ratio", "Share of the loop in which the GPUs computed.", report.gpu_busy)]
    )
    return [
        *busy,
        by("status", "rows", "Rows of the dataset by status.", report.counts),
        by("stage", "stage_seconds", "Seconds of the run by stage, summed over threads and processes.", report.stages),
        by("kind", "peak_memory_bytes", "The most memory that one process of the run took, by kind.", memory),
        one("startup_seconds", "From the command to the first shard's first batch.", report.startup_seconds),
        one("steady_images_per_second", "Images embedded in a second, without the start-up.", steady),
        one("repeated_rows", "Rows that share the embedding of an equal image.", report.repeats),
        one("given_up_shards", "Shards that ended every process that had them.", len(report.given_up)),
    ]
