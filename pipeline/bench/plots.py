"""Two plots as inline SVG; their colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.bench.records import Bench, Result
from pipeline.bench.stats import EXACT, Advice, best, rate
from pipeline.report.svg import LINE, PAPER, SERIES, SOFT, STYLE, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKENDS = ("torch", "torchscript", "torch_int8", "torch_fp8", "onnx", "onnx_int8", "tensorrt")
COLOURS = dict(zip(BACKENDS, SERIES, strict=True))
# Marker by precision, and dashes for what is compiled or static.
MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^", "fp8": "v"}
SPACE = 13.0


def accuracy_plot(bench: Bench, advice: Advice) -> str:
    """Throughput at the best batch size against 1 - lowest cosine; up and to the right is better."""
    points = [(result, rate(one), 1 - one.lowest_cosine) for result in bench.results if (one := best(result))]
    figure, axes = _axes("1 - lowest cosine to torch fp32 (log)", "images/s")
    errors = [error for _, _, error in points if error > EXACT]
    furthest = max(errors, default=1e-3)
    exact = min([*errors, 1e-4]) / 4
    axes.set_xscale("log")
    axes.set_xlim(furthest * 2.5, exact / 12)
    axes.set_ylim(0, 1.12 * max(speed for _, speed, _ in points))
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.axvline(exact * 2, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
    ticks = _decades(exact * 2, furthest)
    axes.set_xticks([*ticks, exact], [*(f"{tick:.0e}".replace("e-0", "e-") for tick in ticks), "fp32"])
    axes.minorticks_off()
    spots = []
    for result, speed, error in points:
        x = error if error > EXACT else exact
        if result.title == advice.title:
            axes.plot(x, speed, "o", markersize=15, markerfacecolor="none", markeredgecolor=_colour(result))
        axes.plot(x, speed, MARKERS[result.precision], color=_colour(result), markersize=7, markeredgecolor=PAPER)
        spots.append((x, speed, result, result.title == advice.title))
    _name_points(axes, spots)
    return to_svg(figure, "accuracy", "Throughput against accuracy, one point for each backend")


def batch_plot(bench: Bench, advice: Advice) -> str:
    """Throughput by batch size, one line for each row."""
    results = [result for result in bench.results if result.at]
    figure, axes = _axes("batch size", "images/s (log)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({one.batch for result in results for one in result.at})
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
    axes.set_xticks(sizes, [str(size) for size in sizes])
    rates = [rate(one) for result in results for one in result.at]
    lowest, highest = min(rates) / 1.2, max(rates) * 1.5
    axes.set_ylim(lowest, highest)
    ticks = [tick for tick in _steps(lowest, highest) if lowest <= tick <= highest]
    axes.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15 if len(sizes) > 1 else sizes[0] * 2)
    figure.subplots_adjust(right=0.76)
    _name_lines(axes, results, advice)
    return to_svg(figure, "batches", "Throughput by batch size, one line for each backend")


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    import matplotlib

    figure = new_figure(9.6, 4.8)
    with matplotlib.rc_context(STYLE):
        axes = figure.add_subplot()
    figure.subplots_adjust(left=0.08, right=0.985, top=0.97, bottom=0.12)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _name_lines(axes: Axes, results: Sequence[Result], advice: Advice) -> None:
    """Names to the right of the last points, as near as they can be without touching."""
    ends = [(axes.transData.transform((r.at[-1].batch, rate(r.at[-1]))), r) for r in results]
    heights = spread([float(end[1]) for end, _ in ends], SPACE * axes.figure.dpi / 72, *_limits(axes))
    x = axes.transAxes.transform((1.03, 0))[0]
    for (end, result), height in zip(ends, heights, strict=True):
        _leader(axes, (float(end[0]), float(end[1])), (x - 4, height), _colour(result))
        _write(axes, (x, height), result, bold=result.title == advice.title)


def _name_points(axes: Axes, spots: Sequence[tuple[float, float, Result, bool]]) -> None:
    """Names beside points: the nearest of some places where they touch no name and no point."""
    scale = axes.figure.dpi / 72
    places = [tuple(map(float, axes.transData.transform(spot[:2]))) for spot in spots]
    taken = [(x - 7 * scale, y - 7 * scale, x + 7 * scale, y + 7 * scale) for x, y in places]
    left, low = axes.transAxes.transform((0.005, 0.01))
    right, high = axes.transAxes.transform((0.998, 0.99))
    for (x, y), (_, _, result, bold) in sorted(zip(places, spots, strict=True), key=lambda pair: -pair[0][1]):
        width, height = (6.6 if bold else 6.1) * len(result.title) * scale, SPACE * scale
        for reach, rise in candidates():
            distance = reach if not bold else 1.5 * reach
            near = x + distance * scale if distance > 0 else x + distance * scale - width
            box = (near, y + rise * scale - height / 2, near + width, y + rise * scale + height / 2)
            inside = left <= box[0] and box[2] <= right and low <= box[1] and box[3] <= high
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > height / 2:
            _leader(axes, (x, y), (box[0] - 2 * scale if distance > 0 else box[2] + 2 * scale, middle), _colour(result))
        # Browsers' fonts are of other widths than the estimate: hold the end beside the point.
        side: Literal["left", "right"] = "left" if distance > 0 else "right"
        _write(axes, (box[0] if distance > 0 else box[2], middle), result, bold=bold, side=side)


def candidates() -> list[tuple[float, float]]:
    """Where a name may stand, in points from its mark, nearest first: to the right or the left, higher or lower."""
    rises = sorted((step * SPACE / 2 for step in range(-24, 25)), key=lambda rise: (abs(rise), -rise))
    places = [(side * reach, rise) for rise in rises for reach in (10.0, 26.0, 60.0) for side in (1, -1)]
    return sorted(places, key=lambda place: abs(place[1]) + abs(place[0]) / 2 + (3 if place[0] < 0 else 0))


def spread(heights: Sequence[float], space: float, low: float, high: float) -> list[float]:
    """The heights, moved apart until neighbours are ``space`` from each other, between ``low`` and ``high``.

    Too many for the room stand nearer to each other.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    space = min(space, (high - low) / max(1, len(order) - 1))
    placed: list[float] = []
    for number, i in enumerate(order):
        lowest = placed[-1] + space if placed else low
        placed.append(min(max(heights[i], lowest), high - (len(order) - 1 - number) * space))
    # From above: what was pushed up needlessly far comes down in the middle between both ways.
    ceiling, down = high, [0.0] * len(order)
    for number in reversed(range(len(order))):
        down[number] = max(min(heights[order[number]], ceiling), low + number * space)
        ceiling = down[number] - space
    result = [0.0] * len(order)
    for number, i in enumerate(order):
        result[i] = (placed[number] + down[number]) / 2
    return result


def _limits(axes: Axes) -> tuple[float, float]:
    low, high = axes.transAxes.transform([(0, 0.02), (0, 0.98)])[:, 1]
    return float(low), float(high)


def _leader(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    inverse: Any = axes.transData.inverted()
    (x0, y0), (x1, y1) = inverse.transform([begin, end])
    axes.plot([x0, x1], [y0, y1], color=colour, linewidth=0.7, alpha=0.55, clip_on=False, scalex=False, scaley=False)


def _write(
    axes: Axes, place: tuple[float, float], result: Result, *, bold: bool, side: Literal["left", "right"] = "left"
) -> None:
    x, y = axes.transData.inverted().transform(place)
    weight = "bold" if bold else "normal"
    axes.text(x, y, result.title, va="center", ha=side, color=_colour(result), weight=weight, clip_on=False)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _colour(result: Result) -> str:
    return COLOURS.get(result.row.backend, SOFT)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(-7, 1) if low <= 10.0**power <= high * 2.5]


def _steps(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis: 1, 2, 5, or powers of ten where there are many."""
    digits = (1, 2, 5) if high / low < 2000 else (1,)
    return [digit * 10.0**power for power in range(-3, 8) for digit in digits]
