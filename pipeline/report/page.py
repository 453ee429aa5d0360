"""The report as one self-contained HTML page: no script, no network, light and dark, printable."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jinja2 import Environment, PackageLoader

from pipeline.records import OK, RunReport
from pipeline.report.pace import WAITS, in_words
from pipeline.report.summary import headline

MOST_LABELS = 25


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the table of stages; ``width`` of the bar in percent, waiting is drawn in grey."""

    name: str
    seconds: float | None
    cores: float | None
    share: float | None
    rate: str
    width: float
    waits: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One image of the gallery: its row, and a thumbnail as JPEG bytes."""

    id: str
    label: str | None
    score: float | None
    thumbnail: bytes


def to_json(report: RunReport) -> bytes:
    """The content of ``_report.json``."""
    return (json.dumps(asdict(report), indent=2, ensure_ascii=False, default=str) + "\n").encode()


def to_html(report: RunReport, gallery: Sequence[Example], *, output: str, model: str) -> bytes:
    """The content of ``_report.html``."""
    environment = Environment(loader=PackageLoader("pipeline.report", "."), autoescape=True, trim_blocks=True)
    most = max(report.labels.values(), default=1)
    page = environment.get_template("page.html.j2").render(
        report=report,
        headline=headline(report.images, report.wall_seconds, report.images_per_second, report.bound),
        output=output,
        model=model,
        failed=sum(count for status, count in report.counts.items() if status != OK),
        gallery=[
            {"id": e.id, "label": e.label, "score": e.score, "jpeg": base64.b64encode(e.thumbnail).decode()}
            for e in gallery
        ],
        stages=_rows(report),
        labels=[(name, count, 100 * count / most) for name, count in list(report.labels.items())[:MOST_LABELS]],
        decoder=_decoder(report),
        config=json.dumps(report.config, indent=2, ensure_ascii=False),
        fingerprints=json.dumps(report.fingerprints, indent=2, ensure_ascii=False),
    )
    return page.encode()


def _rows(report: RunReport) -> list[_Row]:
    """The stages by their share of the core time, or of the seconds of work where that is not known; then the waits."""
    paces = report.pace.stages if report.pace is not None else {}
    work = sum(seconds for name, seconds in report.stages.items() if name not in WAITS)
    longest = max(report.stages.values(), default=0.0) or 1.0
    rows = []
    for name in dict.fromkeys([*report.stages, *paces]):
        seconds, pace = report.stages.get(name), paces.get(name)
        waits = name in WAITS
        share = None if waits else pace.share if pace is not None else (seconds or 0.0) / (work or 1.0)
        rows.append(
            _Row(
                name=name,
                seconds=seconds,
                cores=pace.core_seconds if pace is not None else None,
                share=share,
                rate=in_words(pace.images_per_second) if pace is not None and pace.images_per_second else "",
                width=100 * (share if share is not None and paces else (seconds or 0.0) / longest),
                waits=waits,
            )
        )
    return sorted(rows, key=lambda row: (row.waits, -(row.share or 0.0), -(row.seconds or 0.0)))


def _decoder(report: RunReport) -> str:
    images = report.config.get("images", {})
    return str(images.get("decoder", "")) if isinstance(images, dict) else ""
