"""History of the nights: rows, time and throughput of every night in runs.parquet, which jobs/nightly.py writes.

python jobs/analytics/runs.py nights --last 60 --picture runs.png
"""

from __future__ import annotations

import argparse
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from common import BLUE, COLOURS, GREY, RED, save, show, start
from matplotlib.figure import Figure

# Kinds of rows of a night and their colours; columns that a file does not have are skipped.
KINDS = {
    "carried": "#DDDDDD",
    "new": BLUE,
    "changed": COLOURS[1],
    "retried": COLOURS[2],
    "anew": COLOURS[4],
    "duplicate": COLOURS[5],
}
SHOWN = ("date", "rows", *KINDS, "dropped", "failed", "seconds", "images_per_second", "exit_code")


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print and draw the nights, and return them, oldest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="the store of nights, or its runs.parquet")
    parser.add_argument("--last", type=int, default=90, help="number of newest nights [90]")
    parser.add_argument("--picture", help="write a picture here (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    path = args.store if args.store.endswith(".parquet") else f"{args.store.rstrip('/')}/runs.parquet"
    try:
        with fsspec.open(path) as file:
            runs = pd.read_parquet(file)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file; jobs/nightly.py writes it after its first night") from None
    if runs.empty or "date" not in runs:
        raise SystemExit(f"{path}: no nights in it, or no column date; it has {', '.join(runs)}")
    runs = runs.assign(date=pd.to_datetime(runs["date"])).sort_values("date", kind="stable").tail(args.last)
    missing = pd.date_range(runs["date"].min(), runs["date"].max()).difference(pd.DatetimeIndex(runs["date"]))
    codes = _column(runs, "exit_code")
    print(
        f"{len(runs):,} nights, {(codes != 0).sum()} with an exit code other than 0, {len(missing)} dates without one"
    )
    show("the newest nights", runs[[name for name in SHOWN if name in runs]].tail(14), rows=14)
    if args.picture:
        save(draw(runs, missing), args.picture)
    return runs


def draw(runs: pd.DataFrame, missing: pd.DatetimeIndex) -> Figure:
    """Draw new and changed rows, all rows, time and failed rows by night, with bad nights and missing dates marked."""
    figure = Figure(figsize=(11, 9), layout="constrained", facecolor="white")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(2, 1, 1, 1))
    worked = runs.reindex(columns=[kind for kind in KINDS if kind != "carried"]).fillna(0)
    for axes, title, columns, colours in (
        (panels[0], "Rows that were new, changed, retried or computed again\n", worked, KINDS),
        (
            panels[1],
            "All rows",
            {"carried": _column(runs, "carried"), "embedded": worked.sum(axis=1)},
            {"carried": KINDS["carried"]},
        ),
        (panels[2], "Minutes", {"minutes": _column(runs, "seconds") / 60}, {"minutes": GREY}),
        (panels[3], "Rows that failed", {"failed": _column(runs, "failed")}, {"failed": RED}),
    ):
        base = np.zeros(len(runs))
        for name, values in columns.items():
            axes.bar(runs["date"], values, bottom=base, color=colours.get(name, BLUE), label=name)
            base += np.asarray(values, float)
        axes.set_title(title)
        if len(columns) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        _limit(axes, runs["date"], base)
        axes.yaxis.set_major_formatter("{x:,.10g}")
    if not _column(runs, "failed").any():
        panels[3].set_yticks([0])
        panels[3].text(0.5, 0.5, "none", transform=panels[3].transAxes, ha="center")
    _mark(panels, runs["date"], _column(runs, "exit_code"), missing)
    panels[-1].set_xlabel(
        "shaded: exit code other than 0;  hatched: no such night;  a number in a bar: taller than its panel"
    )
    span = pd.date_range(runs["date"].min(), runs["date"].max())
    ticks = span[:: -(-len(span) // 12)]
    panels[-1].set_xticks(ticks, ticks.strftime("%Y-%m-%d"), rotation=30, ha="right")
    return figure


def _limit(axes: Any, dates: pd.Series, heights: np.ndarray) -> None:
    """Cut bars that would flatten all others, such as the first night's, and label them with their height."""
    top = 1.05 * heights.max() or 1
    usual = np.median(heights[heights > 0]) if heights.any() else top
    top = min(top, 4 * usual) if top > 8 * usual else top
    axes.set_ylim(0, top)
    for date, height in zip(dates, heights, strict=True):
        if height > top:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
            axes.text(date, 0.95 * top, f"{height:,.0f}", rotation=90, ha="center", va="top", fontsize=8, bbox=box)


def _mark(panels: Any, dates: pd.Series, codes: pd.Series, missing: pd.DatetimeIndex) -> None:
    half = pd.Timedelta(hours=12)
    for axes in panels:
        for date in dates[codes != 0]:
            axes.axvspan(date - half, date + half, color=RED, alpha=0.15, linewidth=0, zorder=0)
        for date in missing:
            axes.axvspan(date - half, date + half, facecolor="none", edgecolor="#BBBBBB", hatch="////", linewidth=0)
    for date, code in zip(dates[codes != 0], codes[codes != 0], strict=True):
        panels[0].annotate(
            f"exit {code:.0f}", (date, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=RED
        )


def _column(runs: pd.DataFrame, name: str) -> pd.Series:
    return runs[name].fillna(0) if name in runs else pd.Series(0, index=runs.index)


if __name__ == "__main__":
    start(main)
