"""Two plots of a benchmark of backends as inline SVG; their colours are variables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.bench.records import Bench, Result
from pipeline.bench.stats import EXACT, Advice, ranked, rate
from pipeline.config.choices import BACKENDS
from pipeline.report.plots import bare
from pipeline.report.svg import LINE, PAPER, SERIES, SOFT, WIDTH, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(BACKENDS, cycle(SERIES), strict=False))
MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^", "fp8": "v"}
# Points from one name to the next; inches of a plot's height, and of a letter.
LINE_HEIGHT, HEIGHT, LETTER = 13.0, 4.2, 0.078


def accuracy_plot(bench: Bench, advice: Advice) -> Markup:
    """Throughput at the best batch size against 1 - lowest cosine; up and to the right is better."""
    points = [(result, rate(one), 1 - one.lowest_cosine) for result, one in ranked(bench)]

    def draw(figure: Figure) -> None:
        axes = _axes(figure, [result for result, _, _ in points], "1 - lowest cosine to torch fp32 (log)", "images/s")
        errors = [error for _, _, error in points if error > EXACT]
        largest = max(errors, default=1e-3)
        # Errors by rounding alone have a place of their own, right of a dashed line.
        exact = min([*errors, 1e-4]) / 4
        axes.set_xscale("log")
        axes.set_xlim(largest * 2.5, exact / 2)
        axes.set_ylim(0, 1.12 * max(speed for _, speed, _ in points))
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.axvline(exact * 2, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
        decades = [tick for power in range(-7, 1) if exact * 2 <= (tick := 10.0**power) <= largest * 2.5]
        axes.set_xticks([*decades, exact], [*(f"{tick:.0e}".replace("e-0", "e-") for tick in decades), "fp32"])
        axes.minorticks_off()
        places = []
        for result, speed, error in points:
            x = error if error > EXACT else exact
            if result.title == advice.title:
                axes.plot(x, speed, "o", markersize=15, markerfacecolor="none", markeredgecolor=_colour(result))
            axes.plot(x, speed, MARKERS[result.precision], color=_colour(result), markersize=7, markeredgecolor=PAPER)
            places.append((result, x, speed))
        _write_names(axes, places, advice)

    return plot("accuracy", "Throughput against accuracy, one point for each backend", HEIGHT, draw)


def batch_plot(bench: Bench, advice: Advice) -> Markup:
    """Throughput by batch size, one line for each row."""
    results = [result for result in bench.results if result.at]

    def draw(figure: Figure) -> None:
        axes = _axes(figure, results, "batch size", "images/s (log)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for result in results:
            axes.plot(
                [one.batch for one in result.at],
                [rate(one) for one in result.at],
                marker=MARKERS[result.precision],
                markersize=5,
                markeredgecolor=PAPER,
                color=_colour(result),
                linewidth=2.4 if result.title == advice.title else 1.3,
                linestyle=(0, (4, 2)) if result.row.compile != "none" or result.row.quantization == "static" else "-",
            )
        sizes = sorted({one.batch for result in results for one in result.at})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15 if len(sizes) > 1 else sizes[0] * 2)
        rates = [rate(one) for result in results for one in result.at]
        lowest, highest = min(rates) / 1.2, max(rates) * 1.5
        axes.set_ylim(lowest, highest)
        digits = (1, 2, 5) if highest / lowest < 2000 else (1,)
        ticks = [digit * 10.0**power for power in range(-3, 8) for digit in digits]
        ticks = [tick for tick in ticks if lowest <= tick <= highest]
        axes.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _write_names(axes, [(result, result.at[-1].batch, rate(result.at[-1])) for result in results], advice)

    return plot("batches", "Throughput by batch size, one line for each backend", HEIGHT, draw)


def _axes(figure: Figure, results: Sequence[Result], x: str, y: str) -> Axes:
    axes = figure.subplots()
    # Inches for the names beside the axes.
    names = 0.2 + LETTER * max(len(result.title) for result in results)
    figure.subplots_adjust(left=0.75 / WIDTH, right=1 - names / WIDTH, top=0.97, bottom=0.48 / HEIGHT)
    bare(axes)
    axes.spines["left"].set_visible(True)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _write_names(axes: Axes, places: Sequence[tuple[Result, float, float]], advice: Advice) -> None:
    """Write the names in a column right of the axes, each with a thin line to its point."""
    points = [axes.transData.transform((x, y)) for _, x, y in places]
    left, low = axes.transAxes.transform((1.03, 0.02))
    high = axes.transAxes.transform((1.03, 0.98))[1]
    heights = spread([float(y) for _, y in points], LINE_HEIGHT * axes.figure.dpi / 72, float(low), float(high))
    to_data: Any = axes.transData.inverted()
    for (result, x, y), height in zip(places, heights, strict=True):
        colour, weight = _colour(result), "bold" if result.title == advice.title else "normal"
        (end, level), (start, _) = to_data.transform([(left - 4, height), (left, height)])
        line: Any = {"color": colour, "linewidth": 0.7, "alpha": 0.55, "clip_on": False}
        axes.plot([x, end], [y, level], scalex=False, scaley=False, **line)
        axes.text(start, level, result.title, va="center", ha="left", color=colour, weight=weight, clip_on=False)


def spread(heights: Sequence[float], space: float, low: float, high: float) -> list[float]:
    """The heights, moved apart to a distance of ``space`` or more, between ``low`` and ``high``.

    The distance is smaller where they do not fit otherwise.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    space = min(space, (high - low) / max(1, len(order) - 1))
    result, lowest = list(heights), low
    for number, i in enumerate(order):
        # Leave space for the heights above this one.
        result[i] = min(max(heights[i], lowest), high - (len(order) - 1 - number) * space)
        lowest = result[i] + space
    return result


def _colour(result: Result) -> str:
    return COLOURS.get(result.row.backend, SOFT)
