"""The nights of a store, from its ``runs.parquet``: a table for the page of a night, and a page of all nights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from pipeline.core.errors import NoDataset, StorageError
from pipeline.report.page import environment
from pipeline.report.plots import KINDS, amount_axes
from pipeline.report.summary import in_words_of_time
from pipeline.report.svg import INK, LINE, SERIES, SOFT, WAIT, WIDTH, plot
from pipeline.storage.urls import explained, filesystem, open_arrow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS = "runs.parquet"
# Nights in the table of a night's page.
RECENT = 8
# Nights on the page of all nights.
SHOWN = 120
_COLUMNS = (
    "date", "started", "seconds", "rows", "carried", *KINDS, "dropped", "embedded", "images", "images_per_second",
    "failed", "exit_code", "reason",
)  # fmt: skip


def recent_nights(dataset: str, day: str) -> list[dict[str, Any]]:
    """The nights up to ``day`` in the store around a night's dataset, oldest first; empty where it has no history."""
    try:
        nights = read_nights(f"{dataset.rstrip('/').rpartition('/')[0] or '.'}/{RUNS}")
    except (NoDataset, StorageError):
        return []
    return [night for night in nights if str(night["date"]) <= day][-RECENT:]


def read_nights(path: str) -> list[dict[str, Any]]:
    """The rows of a ``runs.parquet``, oldest first; ``path`` may be the store too.

    Raises:
        NoDataset: there is no such file.
        StorageError: the file holds no nights.
    """
    path = path if path.endswith(".parquet") else f"{path.rstrip('/')}/{RUNS}"
    try:
        with explained(path):
            fs, where = filesystem(path)
            if not fs.exists(where):
                raise NoDataset(f"{path}: not there; give the runs.parquet of a store of nights, or the store")
            with open_arrow(path) as file:
                table = pq.read_table(file)
    except pa.ArrowException as error:
        raise StorageError(f"{path}: not readable as Parquet ({error}); give the runs.parquet of a store") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or not table.num_rows:
        what = f"has no column {missing[0]}" if missing else "holds no night"
        raise StorageError(f"{path}: {what}; jobs/nightly.py writes such a file after each night")
    rows: list[dict[str, Any]] = table.select(list(_COLUMNS)).to_pylist()
    return sorted(rows, key=lambda row: row["date"])


def history_page(path: str) -> bytes:
    """A page that draws the nights of a store.

    Raises:
        NoDataset, StorageError: see :func:`read_nights`.
    """
    every = read_nights(path)
    nights = every[-SHOWN:]
    dates = {night["date"] for night in nights}
    span = range((nights[-1]["date"] - nights[0]["date"]).days + 1)
    missing = [day for n in span if (day := nights[0]["date"] + timedelta(days=n)) not in dates]
    bad = [night for night in nights if night["exit_code"]]
    page = environment().get_template("nights.html.j2").render(
        path=path,
        headline=_headline(nights),
        nights=list(reversed(nights)),
        older=len(every) - len(nights),
        missing=missing,
        bad=bad,
        plot=_plot(nights),
        colours={name: f"series-{number}" for number, name in enumerate(KINDS, start=1)},
    )  # fmt: skip
    return page.encode()


def _headline(nights: Sequence[dict[str, Any]]) -> str:
    last = nights[-1]
    usual = float(np.median([night["seconds"] for night in nights]))
    count = "1 night" if len(nights) == 1 else f"{len(nights):,} nights"
    return (
        f"{count} up to {last['date']}: the last one embedded {last['embedded']:,} of {last['rows']:,} rows in "
        f"{in_words_of_time(last['seconds'])} (median {in_words_of_time(usual)})"
    )


def _plot(nights: Sequence[dict[str, Any]]) -> Markup:
    """Rows embedded, time, throughput and failures of each night, over one axis of dates."""
    first = nights[0]["date"]
    days = np.array([(night["date"] - first).days for night in nights])
    gaps = [(one, other) for one, other in pairwise(days.tolist()) if other - one > 1]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(4, 1, sharex=True, height_ratios=(1.6, 1, 1, 1))
        figure.subplots_adjust(left=0.95 / WIDTH, right=1 - 0.15 / WIDTH, top=0.98, bottom=0.07, hspace=0.22)
        base = np.zeros(len(nights))
        for kind, colour in KINDS.items():
            rows = np.array([night[kind] or 0 for night in nights], dtype=float)
            panels[0].bar(days, rows, bottom=base, color=colour, width=0.8)
            base += rows
        _line(panels[1], days, [night["seconds"] for night in nights], SERIES[0])
        _line(panels[2], days, [night["images_per_second"] or np.nan for night in nights], SERIES[0])
        panels[3].bar(days, [night["failed"] for night in nights], color=SERIES[5], width=0.8)
        for panel, name in zip(panels, ("rows not carried", "seconds", "images/s", "failed rows"), strict=True):
            amount_axes(panel, name, bins=3)
            panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
            for begin, end in gaps:
                panel.axvspan(begin + 0.5, end - 0.5, color=LINE, alpha=0.5, linewidth=0)
            for night, day in zip(nights, days, strict=True):
                if night["exit_code"]:
                    panel.axvspan(day - 0.5, day + 0.5, color=WAIT, alpha=0.25, linewidth=0)
        last = int(days[-1])
        ticks = sorted({round(last * part) for part in np.linspace(0, 1, min(5, last + 1))})
        panels[-1].set_xticks(ticks, [(first + timedelta(days=tick)).isoformat()[5:] for tick in ticks])
        panels[-1].set_xlim(-0.7, last + 0.7)
        for label in panels[-1].get_xticklabels():
            label.set_color(SOFT)

    return plot("nights", "Rows embedded, time, throughput and failed rows of each night", 6.4, draw)


def _line(axes: Axes, days: np.ndarray, values: Sequence[float], colour: str) -> None:
    axes.plot(days, values, color=colour, linewidth=1.3, marker="o", markersize=3.5, markeredgecolor=INK, mew=0)
    axes.set_ylim(0, max([1.0, *(value for value in values if value == value)]))
