"""Pairs of images and texts above a similarity, in a Parquet file that is the next manifest.

python jobs/analytics/pairs.py outputs/pairs --min-similarity 0.28 --out kept.parquet

The dataset is that of a job with manifest.text. LAION kept pairs above 0.28 by a CLIP ViT-B/32; other models have other
similarities, and the table shows how many pairs each threshold would leave.
"""

from __future__ import annotations

import argparse

import pandas as pd
from common import database, identifier, parts, save, show, start
from matplotlib.figure import Figure

# Of the pairs, for the thresholds of the table.
SHARES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01)
KEPT = "from data where similarity >= $least"


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print thresholds, write the pairs that are kept, and return the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder, or a store of nights")
    parser.add_argument("--min-similarity", type=float, default=0.28, metavar="COSINE", help="keep these [0.28]")
    parser.add_argument("--out", help="write id, kept columns and similarity of the pairs here (Parquet)")
    parser.add_argument("--embeddings", action="store_true", help="write their embeddings too")
    parser.add_argument("--picture", help="write a histogram here (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    files = parts(args.dataset)
    connection = database(data=files)
    names = [name for name, *_ in connection.execute("describe data").fetchall()]
    if "similarity" not in names:
        raise SystemExit(f"{args.dataset}: no column similarity; run its job with manifest.text=COLUMN")
    rows, pairs = connection.execute("select count(*), count(similarity) from data").fetchall()[0]
    if not pairs:
        raise SystemExit(f"{args.dataset}: none of {rows:,} rows has an image and a text")
    least = {"least": args.min_similarity}
    found = connection.execute(f"select count(*) {KEPT}", least).fetchall()[0][0]
    quantiles = ", ".join(f"quantile_cont(similarity, {1 - share})" for share in SHARES)
    values = connection.execute(f"select {quantiles} from data").fetchall()[0]
    table = pd.DataFrame({"share of pairs": SHARES, "similarity of at least": values})
    show("thresholds", table, rows=len(SHARES))
    print(f"{found:,} of {pairs:,} pairs have {args.min_similarity} or more; {rows - pairs:,} rows are no pair")
    if args.out:
        left = {"label", "score", "top_labels", "top_scores", "status", "error", "night"}
        left |= set() if args.embeddings else {"embedding", "text_embedding"}
        columns = ", ".join(f'"{name}"' for name in dict.fromkeys([identifier(files), *names]) if name not in left)
        path = args.out.replace("'", "''")
        connection.execute(f"copy (select {columns} {KEPT}) to '{path}' (format parquet, compression zstd)", least)
        print(f"written to {args.out}: {found:,} rows")
    if args.picture:
        bins = connection.execute(
            "select floor(similarity * 100) / 100 as similarity, count(*) as rows from data"
            " where similarity is not null group by 1 order by 1"
        ).df()
        figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.bar(bins["similarity"], bins["rows"], width=0.01, align="edge")
        axes.axvline(args.min_similarity, color="black", linewidth=1)
        axes.set_xlabel("similarity of image and text")
        axes.set_ylabel("pairs")
        save(figure, args.picture)
    return table


if __name__ == "__main__":
    start(main)
