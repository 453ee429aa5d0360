"""The results of a benchmark as Markdown, as one self-contained HTML page, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.bench.command import progress
from pipeline.config.schema import Config

ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; ``marked`` is the index of a highlighted row."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of the page, as inline SVG."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Report:
    """The content of both files.

    ``bench`` is the dataclass that is written as JSON; its ``started``, ``command``, ``machine`` and ``versions`` are
    shown. ``findings`` are sentences without their full stop, ``tiles`` a figure and its unit each, ``failures`` a name
    and a reason each, ``details`` a heading and a text each.
    """

    title: str
    headline: str
    findings: tuple[str, ...]
    sample: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    bench: Any
    tiles: tuple[tuple[str, str], ...] = ()
    advice: str = ""
    plots: tuple[Plot, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    details: tuple[tuple[str, str], ...] = ()


def write(report: Report, out: Path, *, name: str) -> str:
    """Write ``name``.json, .html and .md into ``out``; return the Markdown."""
    from pipeline.storage.local import LocalStorage

    text = to_markdown(report)
    storage = LocalStorage(str(out))
    storage.write(f"{name}.json", (json.dumps(dataclasses.asdict(report.bench), indent=1) + "\n").encode())
    storage.write(f"{name}.html", to_html(report))
    storage.write(f"{name}.md", text.encode())
    progress(f"written: {out}/{name}.md, {name}.json, {name}.html")
    return text


def to_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {report.title}", f"**{report.headline}.**"]
    if report.advice:
        parts.append(f"    {report.advice}")
    if report.findings:
        parts.append("\n".join(f"- {text}." for text in report.findings))
    for table in report.tables:
        parts += [f"## {table.title}", _markdown(table)]
    if report.failures:
        parts += ["## Failures", "\n".join(f"- {name}: {reason}" for name, reason in report.failures)]
    parts += [
        "## How it was measured",
        f"{report.sample}; {report.bench.started}.\n\n{_machine_line(report.bench.machine, report.bench.versions)}.",
        f"    {report.bench.command}",
        "\n".join(f"- {note}" for note in report.notes),
    ]
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> bytes:
    """The report as a page without scripts and without files of its own, in light and dark."""
    from pipeline.report.page import environment

    return environment("pipeline.bench").get_template("bench.html.j2").render(report=report).encode()


def model_title(config: Config) -> str:
    """The name of the model and the kind of its weights."""
    return f"{config.model.name} ({'random weights' if config.model.weights == 'random' else 'pretrained'})"


def rate_range(values: Sequence[float]) -> str:
    """The lowest and the highest rate."""
    from pipeline.report.bottleneck import in_words

    return f"{in_words(min(values))} - {in_words(max(values))}"


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [line(table.heads), line(["---", *["---:" for _ in table.heads[1:]]])]
    for number, (first, *rest) in enumerate(table.rows):
        lines.append(line([f"**{first}**" if number == table.marked else first, *rest]))
    return "\n".join(lines)


def _machine_line(machine: Mapping[str, object], versions: Mapping[str, str]) -> str:
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
    packages = ", ".join(f"{name.replace('python', 'Python')} {version}" for name, version in versions.items())
    return f"{gpu}{machine['processor']}{instructions}, {machine['cores']} cores, {machine['system']}; {packages}"
