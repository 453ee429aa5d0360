"""The report of a benchmark of backends: tables, plots, notes."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import median

from pipeline.bench.plots import accuracy_plot, batch_plot
from pipeline.bench.records import Bench, Measurement, Result
from pipeline.bench.report import ABSENT, Plot, Report, Table, rate_range
from pipeline.bench.stats import (
    Advice,
    advise,
    at_batch,
    floored,
    misses,
    percentile,
    ranked,
    rate,
    speed,
    speed_at_same_batch,
)
from pipeline.report.bottleneck import in_words

NOTES = (
    "The encoder alone: uint8 pixels on the device in, embeddings out; no reading, no decoding, no copy to the GPU.",
    "Each row runs in a process of its own; rounds go over all rows in turn, and only one of them computes at a time.",
    "images/s: the median of the rounds at the row's best batch size, with the lowest and the highest round.",
    "x fp32: the ratio to torch fp32, medians of this run, each at its own best batch size; same batch: both at "
    "the row's.",
    "Latency: every single call at batch 1, from uint8 pixels until the device is done.",
    "Memory: the peak of the process while measuring at the best batch size (the libraries, torch among them, take a "
    "few hundred MiB of it); on the GPU the memory it holds, without the CUDA context.",
    "Start-up: opening the backend and its first batch, with nothing exported or compiled before; loading the "
    "checkpoint and importing torch come on top for every row.",
    "Cosine and top-1: against torch fp32 on the same images, at the row's best batch size.",
)


def to_report(bench: Bench) -> Report:
    """The content of ``backends.md`` and ``backends.html``."""
    advice, reference = advise(bench), bench.results[0]
    chosen, one = next(row for row in ranked(bench) if row[0].title == advice.title)
    return Report(
        title=f"Backends: {bench.model}",
        headline=advice.text,
        findings=(advice.remark,) if advice.remark else (),
        advice=f"python -m pipeline.run {advice.overrides}",
        sample=(
            f"{bench.model} on {bench.machine['device']}; {bench.images} {bench.sample}, {bench.labels} labels; "
            f"{bench.repeats} rounds of about {bench.seconds:g} s"
        ),
        tiles=(
            (in_words(rate(one)), f"images/s, {chosen.title}"),
            (f"{speed(chosen, reference) or 0:.1f} x", "as fast as torch fp32"),
            (floored(one.lowest_cosine, 4), "its lowest cosine to torch fp32"),
            (f"{_mib(chosen):,.0f} MiB", f"of weights; torch fp32 {_mib(reference):,.0f} MiB"),
        ),
        plots=(
            Plot(
                "Throughput against accuracy",
                "Each at its best batch size; up and to the right is better. Differences to torch fp32 by rounding "
                "alone are on the right, at fp32. The ring marks the advised row.",
                accuracy_plot(bench, advice),
            ),
            Plot("Throughput by batch size", "Dashed: compiled, or static quantization.", batch_plot(bench, advice)),
        ),
        tables=(main_table(bench, advice), batch_table(bench, advice)),
        failures=tuple((result.title, " ".join(result.failure.split())) for result in bench.results if result.failure),
        notes=NOTES,
        details=(("Parity thresholds", json.dumps(asdict(bench.parity), indent=2)),),
        bench=bench,
    )


def main_table(bench: Bench, advice: Advice) -> Table:
    """The figures of every measured row at its best batch size, fastest first."""
    gpu = str(bench.machine["device"]).startswith("cuda")
    lines = [_cells(result, one, bench, gpu=gpu) for result, one in ranked(bench)]
    rows = tuple(tuple(line.values()) for line in lines)
    return Table("The figures", tuple(lines[0]), rows, _place(bench, advice))


def _cells(result: Result, one: Measurement, bench: Bench, *, gpu: bool) -> dict[str, str]:
    reference, single, start = bench.results[0], at_batch(result, 1), result.at[0].startup_seconds
    return {
        "backend": " ".join(word for word in result.title.split() if word != result.precision),
        "precision": result.precision,
        "images/s": in_words(rate(one)),
        "min - max": rate_range(one.images_per_second),
        "batch": str(one.batch),
        "x fp32": _ratio(speed(result, reference)),
        "same batch": _ratio(speed_at_same_batch(result, reference)),
        "p50 ms": f"{1000 * median(single.latencies):,.1f}" if single else ABSENT,
        "p99 ms": f"{1000 * percentile(single.latencies, 99):,.1f}" if single else ABSENT,
        "memory MiB": f"{one.rss:,.0f}",
        **({"GPU MiB": f"{one.device:,.0f}"} if gpu else {}),
        "weights MiB": f"{_mib(result):,.1f}",
        "lowest cosine": floored(one.lowest_cosine, 5),
        "mean cosine": floored(one.mean_cosine, 5),
        "top-1": f"{one.top1:.1%}",
        "parity": "misses" if misses(one, result.precision, bench.parity) else "holds",
        "start-up s": f"{start:,.1f}" if start >= 1 else f"{start:.2f}",
    }


def batch_table(bench: Bench, advice: Advice) -> Table:
    """Images per second by batch size."""
    results = [result for result, _ in ranked(bench)]
    sizes = sorted({one.batch for result in results for one in result.at})
    rows = []
    for result in results:
        found = [at_batch(result, size) for size in sizes]
        rows.append((result.title, *(in_words(rate(one)) if one else ABSENT for one in found)))
    heads = ("images/s at batch", *map(str, sizes))
    return Table("Images/s by batch size", heads, tuple(rows), _place(bench, advice))


def _place(bench: Bench, advice: Advice) -> int:
    return [result.title for result, _ in ranked(bench)].index(advice.title)


def _mib(result: Result) -> float:
    return result.weight_bytes / 2**20


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
