"""The report of the benchmark of a GPU: a table for each group, the targets, the gap of the fastest job, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.gpu_records import GROUPS, GpuBench, Outcome
from pipeline.bench.report import ABSENT, Report, Table

# Of an H100 with 16 cores: step, case, figure, and the lowest value.
TARGETS = (
    ("clip_vit_b32-files-fast", "", "images_per_second", 12_000),
    ("clip_vit_b32-files-fast", "", "whole_over_slowest", 0.95),
    ("clip_vit_b32-files-gpu", "", "images_per_second", 15_000),
    ("clip_vit_l14-files-fast", "", "images_per_second", 2_400),
    ("clip_vit_l14-files-fast-torch_fp8", "", "images_per_second", 3_000),
    ("forward-clip_vit_b32", "as a job opens it", "of_matmul", 0.30),
    ("forward-clip_vit_l14", "as a job opens it", "of_matmul", 0.50),
)
NOTES = (
    "Every step runs in processes of its own. It has a JSON file of its name beside this one, and a log under logs/.",
    "Weights are random at full size. Gates let pass here; within_gate says which ones would not.",
    "images_per_second of a job: after its first batch; of several processes: by the times of their commits. "
    "whole_over_slowest: the same over the limit that the stages set.",
    "gpu_busy: the share of the loop in which the GPU computed, by its own clock; gpu_busy_by_driver: the share of the "
    "steady part in which a kernel ran, as NVML says. Core microseconds an image: of the process that drives the GPU, "
    "and of all that it started.",
    "The forward alone: uint8 pixels on the device in, embeddings out, by CUDA events. of_matmul: its floating-point "
    "operations a second over those of the fastest square product in the same precision on this device.",
    "Clusters: same_bytes and lowest_cosine compare a dataset with that of one process (cluster-inline, "
    "cluster-memory).",
)


def to_report(bench: GpuBench) -> Report:
    """The content of ``gpu.md`` and ``gpu.html``."""
    outcomes = bench.outcomes
    headline = f"{sum(outcome.status == 'done' for outcome in outcomes)} of {len(outcomes)} steps are done"
    best = best_run(outcomes)
    if best is not None:
        headline += f"; the fastest job had {_cell(rate_of(best))} images/s ({best.title})"
    steps = [{"step": o.title, "group": o.group, "status": o.status, "seconds": o.seconds} for o in outcomes]
    groups = [table(group, _rows([outcome for outcome in outcomes if outcome.group == group])) for group in GROUPS]
    others = [table("Targets", _targets(outcomes)), table("The gap of the fastest job", _gap(best, outcomes))]
    return Report(
        title=f"GPU: {bench.machine.get('gpu', bench.machine['device'])}",
        headline=headline,
        findings=(),
        sample=f"{bench.rows:,} rendered JPEG files of 0.2 megapixels; at most {bench.minutes:g} minutes",
        tables=tuple(one for one in (table("Steps", steps), *groups, *others) if one.rows),
        notes=NOTES,
        failures=tuple((o.title, f"{o.status}: {_cell(o.reason)}") for o in outcomes if o.reason),
        bench=bench,
    )


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of all rows' figures; the columns are in the order of their first appearance."""
    heads = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(title, heads, tuple(tuple(_cell(row.get(name)) for name in heads) for row in rows))


def rate_of(outcome: Outcome) -> float:
    """Images/s of a job; 0 where it has none."""
    rows = outcome.figures.get("rows", ()) if outcome.group == "pipeline" else ()
    return max((float(row.get("images_per_second", 0.0)) for row in rows), default=0.0)


def best_run(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The job with the highest rate; None where there is none."""
    return max((outcome for outcome in outcomes if rate_of(outcome)), key=rate_of, default=None)


def draw(outcome: Outcome, path: Path) -> None:
    """Write a PNG file of a job over time: the GPU, and the cores that its processes kept busy."""
    from matplotlib.figure import Figure

    times, busy, own, others = zip(*outcome.figures["curve"], strict=True)
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_title(f"{outcome.title}: {_cell(rate_of(outcome))} images/s")
    upper.fill_between(times, [100 * share for share in busy], step="pre", color="#4477aa")
    upper.set(ylabel="GPU busy, %", ylim=(0, 105))
    labels = ("process of the GPU", "what it started")
    lower.stackplot(times, own, others, labels=labels, colors=("#cc6677", "#ddcc77"))
    lower.set(xlabel="seconds", ylabel="busy cores")
    lower.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rows of a group's outcomes; a row that occurs in several steps, as the reference does, once."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        for row in outcome.figures.get("rows", ()) or ([{"remark": outcome.reason}] if outcome.reason else []):
            case = row.get("case")
            name = (
                outcome.title if case is None else case if outcome.group == "backends" else f"{outcome.title}: {case}"
            )
            found.setdefault(name, {outcome.group: name, **{key: row[key] for key in row if key != "case"}})
    return list(found.values())


def _targets(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    found = []
    for step, case, figure, lowest in TARGETS:
        rows = next((o.figures.get("rows", ()) for o in outcomes if o.name == step), None)
        if rows is not None:
            value = next((row.get(figure) for row in rows if row.get("case", "") == case), None)
            reached = None if value is None else value >= lowest
            found.append(
                {"step": f"{step} {case}".strip(), "of": figure, "target": lowest, "is": value, "reached": reached}
            )
    return found


def _gap(best: Outcome | None, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """From the rate of the device down to that of the fastest job: what each layer leaves."""
    if best is None:
        return []
    forward = next((o.figures for o in outcomes if o.name == f"forward-{best.name.split('-')[0]}"), {})
    rates = {row["case"]: row["images_per_second"] for row in forward.get("rows", ()) if row.get("images_per_second")}
    pace = best.figures["report"]["pace"]
    ladder = {
        "the matmul rate of the device": forward.get("matmul_images_per_second"),
        "the fastest forward alone": max(rates.values(), default=None),
        "the encoder as a job opens it": rates.get("as a job opens it"),
        "the limit that the stages of the job set": pace["bound"] if pace else None,
        f"the job ({best.title})": rate_of(best),
        "the whole command, with its start-up": best.figures["command_images_per_second"],
    }
    found, before = list[dict[str, Any]](), None
    for name, rate in ladder.items():
        if rate is not None:
            found.append(
                {"layer": name, "images_per_second": rate, "of_the_row_above": rate / before if before else None}
            )
            before = rate
    for name, stage in (pace["stages"] if pace else {}).items():
        alone, share = stage["images_per_second"], stage["share"]
        found.append({"layer": f"stage {name}", "images_per_second": alone, "share_of_core_time": share})
    for name, share in list(forward.get("kernels", {}).items())[:8]:
        found.append({"layer": f"kernel {name[:70]}", "share_of_forward": share})
    return found


def _cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        digits = 0 if isinstance(value, int) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 5
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if digits == 5 else text
    return " ".join(str(value).replace("|", "/").split())[:300]
