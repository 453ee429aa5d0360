"""The report as one self-contained HTML page without scripts and network access, for light, dark and print."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader

from pipeline.config.schema import Config
from pipeline.core.phases import listed
from pipeline.core.records import OK, Timeline, failed_rows
from pipeline.report import plots
from pipeline.report.bottleneck import WAITS, in_words, share_of_limit
from pipeline.report.history import in_short
from pipeline.report.scores import Row
from pipeline.report.summary import HINTS, DatasetSummary, Failed, headline, in_words_of_time, of_texts, stored_as

MOST_LABELS = 25
# Earlier runs that are listed.
SHOWN_RUNS = 8
# Tiles of one status.
TILES = 6
MISSING = "—"


@dataclass(frozen=True, slots=True)
class StageRow:
    """A line of the table of stages; ``width`` of the bar is in percent, ``waits`` marks waiting."""

    name: str
    seconds: float | None
    cores: float | None
    share: float | None
    rate: str
    width: float
    waits: bool


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """A phase of the start-up; ``offset`` and ``width`` of its bar are in percent of all of it."""

    name: str
    seconds: float
    offset: float
    width: float


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the dataset with its picture as base64 of JPEG bytes (None: no picture)."""

    id: str
    label: str | None = None
    score: float | None = None
    jpeg: str | None = None
    note: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the config; ``usual`` is its default if the run has another value, else None."""

    key: str
    value: str
    usual: str | None


def to_html(
    report: Mapping[str, Any],
    content: DatasetSummary,
    examples: Sequence[Row],
    pictures: Mapping[int, bytes],
    *,
    output: str,
) -> bytes:
    """The content of ``_report.html``.

    Args:
        report: the content of ``_report.json``.
        content: the summary of the dataset.
        examples: rows to show first.
        pictures: JPEG bytes by the number of the row, for all rows that have a picture.
        output: the address of the dataset.
    """

    def tiles(rows: Sequence[Row]) -> list[Tile]:
        # The gallery leaves out rows whose image could not be read again.
        shown = [row for row in rows if row.number in pictures]
        return [
            Tile(row.id, row.label, row.score, _jpeg(row.number, pictures), text=content.captions.get(row.number, ""))
            for row in shown
        ]

    most = max(content.labels.values(), default=1)
    page = environment().get_template("page.html.j2").render(
        report=report,
        headline=_headline(report),
        unit=of_texts("images/s", report["config"]),
        output=output,
        model=report["config"]["model"]["name"],
        started=when(report["started"]),
        failed=failed_rows(report["counts"]),
        share_of_limit=share_of_limit(report),
        stages=stage_rows(report),
        startup=phase_rows(report.get("startup", {})),
        ending=listed(report.get("ending", {})),
        timeline=_timeline(report),
        gallery=tiles(examples),
        sheet=[
            (label, most_certain, least_certain)
            for label in content.extremes
            if (most_certain := tiles(label.most)) or tiles(label.least)
            for least_certain in [tiles(label.least)]
        ],
        statuses=_statuses(report["counts"], content, pictures),
        odd=tiles(content.odd),
        labels=[(name, count, 100 * count / most) for name, count in list(content.labels.items())[:MOST_LABELS]],
        all_labels=len(content.labels),
        unlabelled=report["counts"].get(OK, 0) - sum(content.labels.values()),
        scores=plots.score_plot(content.scores) if content.scores else None,
        similarity=plots.similarity_plot(content.similarity) if content.similarity else None,
        pairs=(tiles(content.pairs.most), tiles(content.pairs.least)) if content.pairs else ([], []),
        decoder=report["config"]["images"]["decoder"],
        # Reports of earlier versions do not say it.
        stored=stored_as(report["stored"]) if report.get("stored") else "",
        runs=[] if "night" in report else _runs(report),
        nights=report.get("nights", []),
        settings=settings(report["config"]),
        fingerprints=json.dumps(report["fingerprints"], indent=2, ensure_ascii=False),
        missing=MISSING,
    )  # fmt: skip
    return page.encode()


@cache
def environment(*packages: str) -> Environment:
    """Return the environment of the templates here and in other packages, which keeps what it compiles."""
    loader = ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "pipeline.report")])
    made = Environment(loader=loader, autoescape=True, trim_blocks=True)
    made.globals["night_kinds"] = list(plots.KINDS)
    made.filters["rate"] = lambda value: in_words(value) if value else MISSING
    # A key such as images.decoder=fast keeps its case.
    made.filters["capital"] = lambda text: text if re.match(r"\S*[.=]\S", text) else f"{text[:1].upper()}{text[1:]}"
    made.filters["similarity"] = "{:.3f}".format
    made.filters["score"] = lambda score: f"{score:.2f}" if score >= 0.01 or not score else f"{score:.1g}"
    return made


def place_of(machine: Mapping[str, Any], bound: str) -> str:
    """The part of a machine that is the bottleneck: its GPU, or its cores; empty for other bottlenecks."""
    if bound not in ("encoding", "decoding"):
        return ""
    if "gpu" in machine and bound == "encoding":
        return str(machine["gpu"])
    cores = machine["cores"]
    return "1 core" if cores == 1 else f"{cores} cores"


def when(started: str) -> str:
    """An ISO time as text for people."""
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return started


def stage_rows(report: Mapping[str, Any]) -> list[StageRow]:
    """The stages by their share of the core time (of the seconds if that is unknown), then the waits."""
    stages = report["stages"]
    paces = report["pace"]["stages"] if report.get("pace") else {}
    work = sum(seconds for name, seconds in stages.items() if name not in WAITS)
    longest = max(stages.values(), default=0.0) or 1.0
    rows = []
    for name in dict.fromkeys([*stages, *paces]):
        seconds, pace = stages.get(name), paces.get(name)
        waits = name in WAITS
        share = None if waits else pace["share"] if pace is not None else (seconds or 0.0) / (work or 1.0)
        rows.append(
            StageRow(
                name=name,
                seconds=seconds,
                cores=pace["core_seconds"] if pace is not None else None,
                share=share,
                rate=in_words(pace["images_per_second"]) if pace is not None and pace["images_per_second"] else "",
                width=100 * (share if share is not None and paces else (seconds or 0.0) / longest),
                waits=waits,
            )
        )
    return sorted(rows, key=lambda row: (row.waits, -(row.share or 0.0), -(row.seconds or 0.0)))


def phase_rows(seconds: Mapping[str, float]) -> list[PhaseRow]:
    """The phases of a start-up, each with a bar that begins where the one before ends."""
    rows, begun, whole = [], 0.0, sum(seconds.values()) or 1.0
    for name, value in seconds.items():
        rows.append(PhaseRow(name, value, 100 * begun / whole, 100 * value / whole))
        begun += value
    return rows


def timeline_of(report: Mapping[str, Any]) -> Timeline | None:
    """The timeline of a report; None if it has none."""
    found = report.get("timeline")
    if not found or not any(any(amounts) for amounts in found["amounts"].values()):
        return None
    return Timeline(**found)


def settings(config: Mapping[str, Any]) -> list[Setting]:
    """Every key of a config, with its default if that is another."""
    usual = _flat(asdict(Config()))
    return [
        Setting(
            key=key, value=_shown(value), usual=_shown(usual[key]) if key in usual and usual[key] != value else None
        )
        for key, value in _flat(config).items()
    ]


def _timeline(report: Mapping[str, Any]) -> Any:
    line = timeline_of(report)
    if line is None:
        return None
    # The timeline of a night is that of its largest job.
    run = report.get("night", {}).get("job") or report
    began = datetime.fromisoformat(run["started"]).timestamp()
    return plots.timeline_plot(line, began=began, wall=run["wall_seconds"], startup=report["startup_seconds"])


def by_status(failed: Sequence[Failed]) -> dict[str, list[Failed]]:
    """The rows of each status that the page shows."""
    rows: dict[str, list[Failed]] = {}
    for row in failed:
        rows.setdefault(row.status, []).append(row)
    return {status: some[:TILES] for status, some in rows.items()}


def _headline(report: Mapping[str, Any]) -> str:
    machine, bound = report["machine"], report["bound"]
    text = headline(
        report["images"], report["wall_seconds"], report["images_per_second"], bound, where=place_of(machine, bound)
    )
    if "night" in report:
        night = report["night"]
        text = (
            f"Night of {night['date']}: {night['embedded']:,} of {report['rows']:,} rows embedded, the others carried, "
            f"in {in_words_of_time(report['wall_seconds'])}"
        )
    # No line break between a number and its unit.
    return re.sub(r"(\d) (s|min)\b", "\\1\N{NO-BREAK SPACE}\\2", of_texts(text, report["config"]))


def _jpeg(number: int, pictures: Mapping[int, bytes]) -> str | None:
    return base64.b64encode(pictures[number]).decode() if number in pictures else None


def _statuses(
    counts: Mapping[str, int], content: DatasetSummary, pictures: Mapping[int, bytes]
) -> list[tuple[str, int, str, list[Tile]]]:
    """Every status with its number of rows, its meaning, and some of its rows."""
    found, failed = [], by_status(content.failed)
    for status, count in counts.items():
        rows = failed.get(status, [])
        tiles = [Tile(str(row.id), jpeg=_jpeg(row.number, pictures), note=row.error) for row in rows]
        found.append((status, count, "" if status == OK else HINTS.get(status, ""), tiles))
    return found


def _runs(report: Mapping[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """Earlier runs and this one, oldest first, each with the width of its bar in percent."""
    runs = [*report.get("history", ())[-SHOWN_RUNS:], in_short(report)]
    if len(runs) == 1:
        return []
    rates = [throughput_of(run) for run in runs]
    fastest = max(rates) or 1.0
    shown = [{**run, "when": when(run["started"]), "pace": rate} for run, rate in zip(runs, rates, strict=True)]
    return [(run, 100 * rate / fastest) for run, rate in zip(shown, rates, strict=True)]


def throughput_of(run: Mapping[str, Any]) -> float:
    """Images per second of a run or its summary, after the start-up if that is known."""
    return float(run["steady_images_per_second"] or run["images_per_second"] or 0.0)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys such as ``loader.batch_size``; a mapping such as ``parity.top1`` counts as one value."""
    return {
        f"{group}.{name}": value
        for group, values in config.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
    }


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} ..."
