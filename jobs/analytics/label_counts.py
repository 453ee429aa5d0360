"""Label counts and scores of one dataset, or of every night of a store.

python jobs/analytics/label_counts.py nights --picture labels.png

A store is a folder of datasets named date=YYYY-MM-DD. The score is that of a row's best label.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pandas as pd
from common import BLUE, COLOURS, GREY, RED, database, parts, save, show, start
from matplotlib.figure import Figure

COUNTS = """
select night, case when status <> 'ok' then 'failed: ' || status else coalesce(label, 'no label') end as label,
  count(*) as rows, quantile_cont(score, 0.1) as low, median(score) as median, quantile_cont(score, 0.9) as high
from data group by all order by night, rows desc, label
"""
NIGHTS = """
select night, count(*) as rows, count(*) filter (status <> 'ok') as failed, count(distinct label) as labels,
  quantile_cont(score, 0.1) as low, median(score) as median, quantile_cont(score, 0.9) as high
from data group by all order by night
"""


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print and draw the counts, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder, or a store of nights")
    parser.add_argument("--top", type=int, default=7, help="labels with a colour of their own, at most 8 [7]")
    parser.add_argument("--out", help="write the counts of every label here (Parquet)")
    parser.add_argument("--picture", help="write a picture here (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    connection = database(data=parts(args.dataset, nights=True))
    counts, nights = connection.execute(COUNTS).df(), connection.execute(NIGHTS).df()
    show("nights: rows, and the score's 10 % quantile, median and 90 % quantile", nights.tail(31), rows=31)
    last = counts[counts["night"] == counts["night"].max()]
    show(f"labels of {last['night'].iloc[0]}", last.drop(columns="night"))
    if args.out:
        counts.to_parquet(args.out)
    if args.picture:
        save(one_night(last) if len(nights) == 1 else over_nights(counts, nights, min(args.top, 8)), args.picture)
    return counts


def over_nights(counts: pd.DataFrame, nights: pd.DataFrame, top: int) -> Figure:
    """Draw the most frequent labels, all rows and failed rows, and the median and middle 80 % of the score."""
    failed = counts["label"].str.startswith("failed: ")
    named = counts[~failed & (counts["label"] != "no label")]
    chosen = named.groupby("label")["rows"].sum().nlargest(top).index.tolist()
    group = counts["label"].where(counts["label"].isin([*chosen, "no label"]), "other labels").mask(failed, "failed")
    table = counts.pivot_table(index="night", columns=group, values="rows", aggfunc="sum", fill_value=0)
    table["labelled"] = table[[*chosen, *(name for name in ("other labels",) if name in table)]].sum(axis=1)
    figure = Figure(figsize=(10, 8), layout="constrained", facecolor="white")
    labels, rows, score = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    x = np.arange(len(table))
    _stack(labels, table, dict(zip(chosen, COLOURS, strict=False)))
    labels.set_title(f"Rows of each night: the {len(chosen)} most frequent of {named['label'].nunique()} labels")
    _stack(rows, table, {"labelled": GREY, "no label": "#E8E8E8", "failed": RED})
    rows.set_title("All rows of each night")
    score.fill_between(x, nights["low"], nights["high"], color=BLUE, alpha=0.2, label="10 % to 90 %", linewidth=0)
    score.plot(x, nights["median"], color=BLUE, marker="o", markersize=4, label="median")
    score.set_title("Score of the best label")
    score.legend(loc="upper left", bbox_to_anchor=(1, 1))
    step = max(1, -(-len(x) // 10))
    score.set_xticks(x[::step], table.index[::step], rotation=30, ha="right")
    return figure


def _stack(axes: Any, table: pd.DataFrame, colours: dict[str, str]) -> None:
    base = np.zeros(len(table))
    for name, colour in colours.items():
        if name in table:
            axes.bar(range(len(table)), table[name], bottom=base, width=0.8, label=name, color=colour)
            base += table[name].to_numpy()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1, 1))


def one_night(labels: pd.DataFrame, most: int = 25) -> Figure:
    """Draw the most frequent labels and their scores."""
    chosen = labels.head(most)[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(chosen)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(chosen["label"], chosen["rows"], color=BLUE)
    left.set_title(f"Rows, the {len(chosen)} most frequent of {len(labels)} labels")
    left.margins(y=0.01)
    right.hlines(chosen["label"], chosen["low"], chosen["high"], color=BLUE, alpha=0.35, linewidth=5)
    right.plot(chosen["median"], chosen["label"], "o", color=BLUE, markersize=4)
    right.set_title("Score: median (dot), 10 % to 90 % (bar)")
    figure.suptitle(str(labels["night"].iloc[0]))
    return figure


if __name__ == "__main__":
    start(main)
