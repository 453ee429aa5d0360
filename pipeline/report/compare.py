"""Two runs side by side: figures, stages, timelines, labels and different settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pipeline.core.records import failed_rows
from pipeline.report.bottleneck import WAITS, in_words, share_of_limit
from pipeline.report.page import MISSING, environment, place_of, settings, throughput_of, timeline_of, when
from pipeline.report.plots import amount_axes, clock
from pipeline.report.svg import SERIES, WIDTH, plot
from pipeline.telemetry.timeline import IMAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Labels whose share changed most.
MOVED = 12


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of both runs as text, and the ratio of the second to the first."""

    name: str
    a: str
    b: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """One stage of both runs: core seconds (or seconds) for 1,000 images, and the bars' widths in percent."""

    name: str
    a: float
    b: float
    width_a: float
    width_b: float
    waits: bool


def compare_page(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str]) -> bytes:
    """A page that shows two reports side by side.

    Args:
        a: the content of a ``_report.json``, whole as :func:`~pipeline.report.load.report_of` returns it.
        b: the other.
        names: of the runs, such as the addresses of the datasets.
    """
    page = environment().get_template("compare.html.j2").render(
        headline=headline(a, b),
        names=names,
        started=(when(a["started"]), when(b["started"])),
        lines=_lines(a, b),
        stages=_stages(a, b),
        plot=_plot(a, b),
        statuses=_counts(a["counts"], b["counts"]),
        labels=_labels(a, b),
        settings=_settings(a["config"], b["config"]),
        versions=_different(a["versions"], b["versions"]),
        advice=(a["advice"], b["advice"]),
    )  # fmt: skip
    return page.encode()


def headline(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The comparison in one sentence."""
    one, other = throughput_of(a), throughput_of(b)
    if not one or not other:
        idle = (
            "Neither run embedded anything" if one == other else f"The {'second' if one else 'first'} embedded nothing"
        )
        return f"{idle}, so there is no throughput to compare"
    ratio = other / one
    rates = f"{in_words(one)} and {in_words(other)} images/s after start-up"
    if 0.97 <= ratio <= 1.03:
        return f"Both had the same throughput: {rates}"
    if ratio > 1:
        return f"The second was {ratio:.2f} times as fast as the first: {rates}"
    return f"The second had {ratio:.0%} of the first's throughput: {rates}"


def _lines(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Line]:
    def number(name: str, of: Any, form: str = "{:,.1f}") -> Line:
        one, other = of(a), of(b)
        if one is None or other is None:
            return Line(name, *(MISSING if value is None else form.format(value) for value in (one, other)))
        change = f"x {other / one:.2f}" if one and other and one != other else ""
        return Line(name, form.format(one), form.format(other), change)

    def bound(report: Mapping[str, Any]) -> str:
        where = place_of(report["machine"], report["bound"])
        return f"{report['bound']} on {where}" if where else str(report["bound"])

    parity = "{:.6f}"
    lines = [
        number("images/s after start-up", throughput_of),
        number("images/s including start-up", lambda report: report["images_per_second"]),
        number("seconds", lambda report: report["wall_seconds"]),
        number("seconds to the first batch", lambda report: report["startup_seconds"]),
        Line("bottleneck", bound(a), bound(b)),
        number("share of the highest possible rate, %", _share),
        number("cores busy", lambda report: report["pace"]["cores_busy"] if report["pace"] else None),
        number("GPU busy, %", lambda report: 100 * report["gpu_busy"] if report.get("gpu_busy") else None),
        number("peak memory, MiB", lambda report: report["memory"].get("peak_rss_mib"), "{:,.0f}"),
        number("GPU memory, MiB", lambda report: report["memory"].get("peak_gpu_mib"), "{:,.0f}"),
        number("rows of the dataset", lambda report: report["total_rows"], "{:,}"),
        number("images embedded", lambda report: report["images"], "{:,}"),
        number("rows failed", lambda report: failed_rows(report["counts"]), "{:,}"),
        number("lowest cosine to fp32", lambda report: (report["parity"] or {}).get("lowest_cosine"), parity),
        number("lowest cosine to exact", lambda report: (report["decoder_parity"] or {}).get("lowest_cosine"), parity),
        Line("exit code", str(a["exit_code"]), str(b["exit_code"])),
    ]
    lines += [
        Line(name, str(a["machine"].get(name, MISSING)), str(b["machine"].get(name, MISSING)))
        for name in dict.fromkeys([*a["machine"], *b["machine"]])
    ]
    return [line for line in lines if {line.a, line.b} != {MISSING}]


def _share(report: Mapping[str, Any]) -> float | None:
    share = share_of_limit(report)
    return None if share is None else 100 * share


def _stages(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Bars]:
    """The cost of 1,000 images in each stage, so that runs of different lengths compare."""

    def costs(report: Mapping[str, Any]) -> dict[str, float]:
        images = report["images"] or 1
        paces = report["pace"]["stages"] if report["pace"] else {}
        found = {name: paces[name]["core_seconds"] for name in paces}
        found |= {name: report["stages"][name] for name in WAITS if name in report["stages"]}
        return {name: 1000 * seconds / images for name, seconds in found.items()}

    one, other = costs(a), costs(b)
    longest = max([*one.values(), *other.values()], default=0.0) or 1.0
    names = sorted(dict.fromkeys([*one, *other]), key=lambda name: (name in WAITS, -one.get(name, 0.0)))
    return [
        Bars(
            name=name,
            a=one.get(name, 0.0),
            b=other.get(name, 0.0),
            width_a=100 * one.get(name, 0.0) / longest,
            width_b=100 * other.get(name, 0.0) / longest,
            waits=name in WAITS,
        )
        for name in names
    ]


def _plot(a: Mapping[str, Any], b: Mapping[str, Any]) -> Markup | None:
    """Images per second of both, each from its own first slice on; None unless both have a timeline."""
    lines = [timeline_of(a), timeline_of(b)]
    if None in lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.8 / WIDTH, right=1 - 0.15 / WIDTH, top=0.96, bottom=0.18)
        amount_axes(axes, "images/s")
        last = 0.0
        for line, colour in zip(lines, (SERIES[0], SERIES[1]), strict=True):
            assert line is not None
            # The last slice is seldom full.
            rate = np.array(line.amounts.get(IMAGES, (0.0,)))[:-1] / line.width
            if len(rate):
                edges = line.width * np.arange(len(rate) + 1)
                axes.stairs(rate, edges, color=colour, linewidth=1.6)
                last = max(last, float(edges[-1]))
        axes.set_xlim(0, last or 1.0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("since the first image")
        axes.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))

    return plot("throughput", "Images per second of both runs over time", 2.6, draw)


def _counts(a: Mapping[str, int], b: Mapping[str, int]) -> list[tuple[str, int, int]]:
    return [(name, a.get(name, 0), b.get(name, 0)) for name in dict.fromkeys([*a, *b])]


def _different(a: Mapping[str, str], b: Mapping[str, str]) -> list[Line]:
    names = dict.fromkeys([*a, *b])
    return [Line(name, a.get(name, MISSING), b.get(name, MISSING)) for name in names if a.get(name) != b.get(name)]


def _labels(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """The labels whose share of the labelled rows changed most: the shares in both."""
    one, other = a.get("labels") or {}, b.get("labels") or {}
    all_one, all_other = sum(one.values()) or 1, sum(other.values()) or 1
    shares = [(name, one.get(name, 0) / all_one, other.get(name, 0) / all_other) for name in {**one, **other}]
    moved = [share for share in shares if share[1] != share[2]]
    return sorted(moved, key=lambda share: -abs(share[1] - share[2]))[:MOVED]


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Line]:
    one = {setting.key: setting.value for setting in settings(a)}
    other = {setting.key: setting.value for setting in settings(b)}
    return _different(one, other)
