"""Figures of the steps, from the files that their processes left: ``rows`` for the table, and what only JSON has."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench.gpu_records import Ran
from pipeline.bench.gpu_watch import Sample
from pipeline.config.schema import ParityConfig
from pipeline.core.machine import peak_rss
from pipeline.core.processes import descendants

# Points of a run's curve in its JSON file, about.
CURVE = 400


def job_figures(ran: Ran, output: Path) -> dict[str, Any]:
    """Figures of a job, or of several that shared the work; rates and core time are of its steady part."""
    report = json.loads((output / "_report.json").read_bytes())
    shared = (output / "_parts").is_dir()
    rate = (rate_of_commits(output) if shared else report["steady_images_per_second"]) or report["images_per_second"]
    pace = report["pace"] or {}
    # The clock of a run begins with its process.
    first = ran.samples[0].at if ran.samples else 0.0
    window = first + report["startup_seconds"], first + report["wall_seconds"]
    engine = report["fingerprints"]["images"].get("engine")
    row = {
        "images_per_second": rate,
        "whole_over_slowest": rate / pace["bound"] if pace else None,
        "gpu_busy": report.get("gpu_busy"),
        **steady(ran.samples, window, rate),
        "startup_seconds": report["startup_seconds"],
        **_gates(report),
        **({"jpeg_engine": engine} if engine else {}),
    }
    return {
        "rows": [row],
        "command_images_per_second": report["images"] / ran.seconds,
        "curve": curve(ran.samples),
        "report": report,
    }


def steady(samples: Sequence[Sample], window: tuple[float, float], rate: float) -> dict[str, float | None]:
    """Core microseconds of an image in the watched processes and in those that they started, the share of time in
    which the GPU computed, and its memory, over a window of time; nothing where it has fewer than two samples."""
    inside = [sample for sample in samples if window[0] <= sample.at <= window[1]]
    if len(inside) < 2 or not rate:
        return {}
    first, last = inside[0], inside[-1]
    images = rate * (last.at - first.at)
    busy = [sample.busy / 100 for sample in inside if sample.busy >= 0]
    return {
        "gpu_busy_by_driver": sum(busy) / len(busy) if busy else None,
        "driver_core_us_per_image": 1e6 * (last.own - first.own) / images,
        "other_core_us_per_image": 1e6 * (last.others - first.others) / images,
        "gpu_mib": max((sample.gpu_mib for sample in samples if sample.gpu_mib >= 0), default=None),
    }


def curve(samples: Sequence[Sample]) -> list[tuple[float, ...]]:
    """Seconds since the first sample, busy share of the GPU, busy cores of the processes, and of what they started."""
    rows = []
    for a, b in pairwise(samples[:: max(1, len(samples) // CURVE)]):
        seconds = max(1e-3, b.at - a.at)
        row = b.at - samples[0].at, max(0.0, b.busy) / 100, (b.own - a.own) / seconds, (b.others - a.others) / seconds
        rows.append(tuple(round(value, 3) for value in row))
    return rows


def rate_of_commits(output: Path) -> float:
    """Images/s of processes that shared a dataset; 0 where one of them has fewer than two commits.

    Each has its own clock, which its first commit starts.
    """
    rates = []
    for number, count in (map(int, path.stem.split("-of-")) for path in (output / "_parts").glob("*-of-*.json")):
        commits = [path for path in (output / "_commits").glob("*.json") if int(path.stem) % count == number - 1]
        done = sorted((path.stat().st_mtime, int(json.loads(path.read_bytes())["rows"])) for path in commits)
        if len(done) < 2 or done[-1][0] <= done[0][0]:
            return 0.0
        rates.append(sum(rows for _, rows in done[1:]) / (done[-1][0] - done[0][0]))
    return sum(rates)


def junit(ran: Ran, report: Path) -> dict[str, Any]:
    """Counts of a JUnit file; the tests that failed, and why others were skipped."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    found: dict[str, list[str]] = {"failed": [], "left_out": []}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                message = " ".join((child.get("message") or "").split())[:200]
                key = "left_out" if child.tag == "skipped" else "failed"
                found[key].append(f"{case.get('classname')}.{case.get('name')}: {message}")
    return {"rows": [{name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}], **found}


def read_figures(ran: Ran, path: Path) -> dict[str, Any]:
    """Figures that the process wrote itself, also of one that was ended under way."""
    figures: dict[str, Any] = json.loads(path.read_bytes())
    return figures


def backend_rows(ran: Ran, path: Path) -> dict[str, Any]:
    """Figures of ``pipeline.bench backends``, each row at its largest batch size."""
    rows = []
    for result in json.loads(path.read_bytes())["results"]:
        row: dict[str, Any] = {"case": f"{result['row']['backend']} {result['precision']}"}
        for one in result["at"]:
            if one["latencies"]:
                row["latency_ms"] = 1000 * median(one["latencies"])
            row |= {"batch": one["batch"], "images_per_second": median(one["images_per_second"])}
            row |= {"gpu_mib": one["device"], "weights_mib": result["weight_bytes"] / 2**20}
            row |= {"cosine_to_fp32": one["lowest_cosine"], "top1": one["top1"]}
            row["within_gate"] = one["lowest_cosine"] >= ParityConfig().lowest_cosine[result["precision"]]
        rows.append(row | ({"remark": result["failure"]} if result["failure"] else {}))
    return {"rows": rows}


class Killer:
    """Ends the worker of a cluster, once the dataset has its first commit."""

    def __init__(self, output: Path) -> None:
        self._output, self.killed = output, 0

    def __call__(self, pid: int) -> None:
        """Send SIGKILL to the process with the most memory of those that ``pid`` started: it holds the encoder."""
        if not self.killed and any(self._output.glob("_commits/*.json")) and (found := descendants([pid])):
            self.killed = max(found, key=peak_rss)
            with suppress(ProcessLookupError):
                os.kill(self.killed, signal.SIGKILL)


def cluster_figures(ran: Ran, output: Path, other: Path, killer: Killer | None = None) -> dict[str, Any]:
    """Figures of a job that should equal ``other``: the names of parts hold the digests of their bytes."""
    report = json.loads((output / "_report.json").read_bytes())
    row = {
        "images_per_second": report["steady_images_per_second"] or report["images_per_second"],
        "batch_sizes": ", ".join(map(str, report["batch_sizes"])),
    }
    if other != output:
        ours, theirs = ({path.name for path in folder.glob("part-*.parquet")} for folder in (output, other))
        if not theirs:
            raise ValueError(f"{other.name}, which it is compared with, left no parts")
        cosine = lowest_cosine(output, other)
        limit = ParityConfig().lowest_cosine[report["fingerprints"]["backend"]["precision"]]
        row |= {"same_bytes": ours == theirs, "lowest_cosine": cosine, "within_gate": cosine >= limit}
    if killer is not None:
        row["remark"] = (
            f"process {killer.killed} was killed" if killer.killed else "it ended before its worker was killed"
        )
    return {"rows": [row], "memory": report["memory"]}


def lowest_cosine(output: Path, other: Path) -> float:
    """The lowest cosine of two datasets' embeddings, row by row.

    Raises:
        ValueError: their ids differ.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, vectors = [], []
    for folder in (output, other):
        paths = sorted(folder.glob("part-*.parquet"))
        table = pa.concat_tables([pq.read_table(path, columns=["id", "embedding"]) for path in paths])
        ids.append(table["id"].to_pylist())
        numbers = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors.append(numbers.astype(np.float64).reshape(len(table), -1))
    if ids[0] != ids[1]:
        raise ValueError(f"the rows differ from those of {other.name}")
    return float((vectors[0] * vectors[1]).sum(axis=1).min())


def _gates(report: Mapping[str, Any]) -> dict[str, Any]:
    """The lowest cosines to fp32 and to the decoder ``exact``, and whether both are within their gates."""
    config, limits = report["config"], ParityConfig()
    gates = (
        ("cosine_to_fp32", report["parity"], limits.lowest_cosine.get(report["fingerprints"]["backend"]["precision"])),
        ("cosine_to_exact", report.get("decoder_parity"), limits.decoder.get(config["images"]["decoder"])),
    )
    found: dict[str, Any] = {name: parity["lowest_cosine"] for name, parity, _ in gates if parity}
    misses = [name for name, parity, limit in gates if parity and limit and parity["lowest_cosine"] < limit]
    return found | ({"within_gate": not misses} if found else {})
