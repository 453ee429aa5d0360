"""The plots of the report: the timeline and the histogram of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pipeline.core.records import Stage, Timeline
from pipeline.report.svg import INK, LINE, SERIES, SOFT, WAIT, WIDTH, plot
from pipeline.telemetry.timeline import IMAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORK = (Stage.READ, Stage.DECODE, Stage.COPY, Stage.ENCODE, Stage.LABEL, Stage.WRITE)
WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
COLOURS = dict(zip(WORK, SERIES, strict=False))
# Kinds of the rows that were not carried from the night before, and their colours.
KINDS = {"new": SERIES[0], "changed": SERIES[1], "retried": SERIES[2], "anew": SERIES[3], "duplicate": SERIES[4]}
# A last slice with a smaller share of its width has no meaningful rate.
FULL = 0.3
LANE_INCHES = 0.27


def timeline_plot(timeline: Timeline, *, began: float, wall: float, startup: float) -> Markup:
    """Images per second and the work of every stage, over the time since the command.

    ``began`` is in seconds since the epoch, ``wall`` and ``startup`` are seconds.
    """
    stages = [stage for stage in (*WORK, *WAITS) if any(timeline.amounts.get(stage, ()))]

    def draw(figure: Figure) -> None:
        rates, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, max(0.5, LANE_INCHES * len(stages))))
        figure.subplots_adjust(
            left=1.12 / WIDTH, right=1 - 0.55 / WIDTH, top=0.97, bottom=0.42 / figure.get_figheight()
        )
        bare(lanes)
        for axes in (rates, lanes):
            axes.axvspan(0, startup, color=LINE, alpha=0.45, linewidth=0)
        edges = timeline.began - began + timeline.width * np.arange(len(next(iter(timeline.amounts.values()))) + 1)
        edges = np.clip(edges, 0, max(wall, edges[0] + timeline.width))
        _draw_rates(rates, timeline, edges)
        _draw_lanes(lanes, timeline, edges, stages)
        if startup > 0.12 * wall:
            rates.text(startup / 2, 0.93, "start-up", transform=rates.get_xaxis_transform(), **_SMALL)
        lanes.set_xlim(0, max(wall, float(edges[-1])))
        lanes.set_xlabel("since the command")
        lanes.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
        lanes.locator_params(axis="x", nbins=5)

    title = "Images per second and the work of each stage over the time of the run"
    return plot("timeline", title, 1.9 + LANE_INCHES * len(stages) + 0.5, draw)


_SMALL = {"color": SOFT, "ha": "center", "va": "top", "fontsize": 8.5}


def _draw_rates(axes: Axes, timeline: Timeline, edges: np.ndarray) -> None:
    images = np.array(timeline.amounts.get(IMAGES, np.zeros(len(edges) - 1)))
    spans = np.diff(edges)
    full = spans >= FULL * timeline.width
    rate = np.where(full, images / np.where(full, spans, 1.0), np.nan)
    axes.stairs(np.nan_to_num(rate), edges, fill=True, color=SERIES[0], alpha=0.22, linewidth=0)
    axes.stairs(np.nan_to_num(rate), edges, color=SERIES[0], linewidth=1.4)
    axes.set_ylim(0, 1.15 * float(np.nanmax(rate, initial=1.0)))
    amount_axes(axes, "images/s")


def _draw_lanes(axes: Axes, timeline: Timeline, edges: np.ndarray, stages: Sequence[Stage]) -> None:
    """Average number of threads at work, in a lane for each stage; the busiest slice has the height of the lane."""
    spans = np.maximum(np.diff(edges), FULL * timeline.width)
    for place, stage in enumerate(reversed(stages)):
        busy = np.array(timeline.amounts[stage]) / spans
        most = max(1.0, float(busy.max()))
        colour = WAIT if stage in WAITS else COLOURS[stage]
        axes.stairs(place + 0.86 * np.minimum(busy / most, 1), edges, baseline=place, fill=True, color=colour)
        axes.axhline(place, color=LINE, linewidth=0.6)
        axes.text(
            1.008, place + 0.4, f"{most:.1f}" if most > 1.05 else "1", transform=axes.get_yaxis_transform(),
            color=SOFT, va="center", fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks([place + 0.4 for place in range(len(stages))], [str(stage) for stage in reversed(stages)])
    axes.set_ylim(0, len(stages))
    for label, stage in zip(axes.get_yticklabels(), reversed(stages), strict=True):
        label.set_color(SOFT if stage in WAITS else INK)


def score_plot(histogram: Sequence[int]) -> Markup:
    """Rows by the score of their best label."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.75 / WIDTH, right=1 - 0.2 / WIDTH, top=0.96, bottom=0.2)
        amount_axes(axes, "rows", integer=True)
        edges = np.linspace(0, 1, len(histogram) + 1)
        axes.stairs(histogram, edges, fill=True, color=SERIES[0])
        axes.set_xlim(0, 1)
        axes.set_xlabel("score of the best label")

    return plot("scores", "Rows by the score of their best label", 2.2, draw)


def similarity_plot(histogram: Sequence[int]) -> Markup:
    """Rows by the similarity of image and text, over the part of the axis that has rows."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.75 / WIDTH, right=1 - 0.2 / WIDTH, top=0.96, bottom=0.2)
        amount_axes(axes, "rows", integer=True)
        edges = np.linspace(-1, 1, len(histogram) + 1)
        there = np.flatnonzero(histogram)
        axes.stairs(histogram, edges, fill=True, color=SERIES[0])
        axes.set_xlim(max(-1, edges[there[0]] - 0.05), min(1, edges[there[-1] + 1] + 0.05))
        axes.set_xlabel("similarity of image and text")

    return plot("similarity", "Rows by the similarity of image and text", 2.2, draw)


def amount_axes(axes: Axes, name: str, *, bins: int = 4, integer: bool = False) -> None:
    """Make axes of amounts, such as images/s: without a box, with a grid and about ``bins`` values."""
    bare(axes)
    axes.set_ylabel(name)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.locator_params(axis="y", nbins=bins, integer=integer)
    axes.grid(axis="y", color=LINE, linewidth=0.6)


def bare(axes: Axes) -> None:
    """Make axes without a box."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def clock(seconds: float) -> str:
    """Seconds as the label of an axis: ``45 s``, ``2:05``, ``1:02:05``."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:g} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
