"""The report as one self-contained HTML page: no script, no network, light and dark, printable."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jinja2 import Environment, PackageLoader

from pipeline.records import OK, RunReport, Stage
from pipeline.report.summary import headline

MOST_LABELS = 25
WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)


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
    work = sum(seconds for name, seconds in report.stages.items() if name not in WAITS)
    longest = max(report.stages.values(), default=0.0) or 1.0
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
        stages=[
            (name, seconds, None if name in WAITS else seconds / (work or 1.0), 100 * seconds / longest)
            for name, seconds in sorted(report.stages.items(), key=lambda item: (item[0] in WAITS, -item[1]))
        ],
        labels=[(name, count, 100 * count / most) for name, count in list(report.labels.items())[:MOST_LABELS]],
        config=json.dumps(report.config, indent=2, ensure_ascii=False),
        fingerprints=json.dumps(report.fingerprints, indent=2, ensure_ascii=False),
    )
    return page.encode()
