"""Outliers: rows far from the other rows of their label, and rows with the lowest scores.

python jobs/analytics/outliers.py outputs/demo --picture outliers.png

--method
  centroid     1 - cosine to the mean of the label's other rows; reads the dataset twice, one part at a time, in this
               process or with --cluster on Dask, with the same results: embeddings stay where they are read
  knn          mean 1 - cosine to the --k nearest rows of the label: for labels that show several kinds of thing;
               takes n^2 * D operations for a label of n rows
  mahalanobis  distance to the label's mean under the covariance that all labels share (Lee et al. 2018, "A Simple
               Unified Framework for Detecting Out-of-Distribution Samples", NeurIPS, equation 1)
Each distance is divided by the label's median, so that labels can be compared: 3 is three times the usual distance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from common import contact_sheet, identifier, parts, picture_arguments, show, start, thumbnails, vectors, workers


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print and draw, and return all rows with their distance, the furthest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder; of a store of nights, the newest is taken")
    parser.add_argument("--method", choices=("centroid", "knn", "mahalanobis"), default="centroid", help="[centroid]")
    parser.add_argument("--k", type=int, default=5, help="neighbours for --method knn [5]")
    parser.add_argument("--min-rows", type=int, default=5, help="labels with fewer rows are left out [5]")
    parser.add_argument("--cluster", metavar="ADDRESS", help="work on Dask: the scheduler's address, or local")
    parser.add_argument("--out", help="write every judged row with its distance here (Parquet)")
    parser.add_argument("--picture", help="write a contact sheet here (.png, .svg, .pdf)")
    picture_arguments(parser)
    args = parser.parse_args(argv)
    if args.cluster and args.method != "centroid":
        parser.error(f"--cluster goes with --method centroid: {args.method} compares rows of all parts")
    files = parts(args.dataset)
    key = identifier(files)
    if args.method == "centroid":
        with workers(args.cluster) as each:
            rows, left_out = centroid_distances(files, key, each)
    else:
        rows, matrix, left_out = vectors(files, [key, "label", "score"])
    sizes = rows.groupby("label")["label"].transform("size")
    keep = (sizes >= args.min_rows).to_numpy()
    print(
        f"{keep.sum():,} rows judged; {left_out:,} without an embedding and {(~keep).sum():,} of no or rare labels not"
    )
    lowest = rows.nsmallest(max(len(rows) // 100, 16), "score")
    rows = rows[keep].reset_index(drop=True)
    if args.method != "centroid":
        rows["distance"] = distances(rows["label"], matrix[keep], args.method, args.k)
    rows["times_usual"] = rows["distance"] / rows.groupby("label")["distance"].transform("median").clip(lower=1e-6)
    rows = rows.sort_values("times_usual", ascending=False, kind="stable")
    show("furthest from their label", rows)
    show("lowest scores", lowest)
    if args.out:
        rows.to_parquet(args.out, index=False)
    if args.picture:
        draw(rows, lowest, key, files, args)
    return rows


def centroid_distances(files: list[str], key: str, each: Callable[..., list[Any]]) -> tuple[pd.DataFrame, int]:
    """Return the rows with their distance from the others of their label, and the number of rows without embedding.

    Raises:
        SystemExit: no row has an embedding.
    """
    totals: dict[str, np.ndarray] = {}
    for sums in each(label_sums, files):
        for label, total in sums.items():
            totals[label] = totals.get(label, 0) + total
    found = each(part_distances, files, (key, totals))
    left_out = sum(count for _, count in found)
    tables = [rows for rows, _ in found if len(rows)]
    if not tables:
        raise SystemExit(f"{files[0]}: none of {left_out} rows has an embedding")
    return pd.concat(tables, ignore_index=True), left_out


def label_sums(file: str, shared: None) -> dict[str, np.ndarray]:
    """Return the sum of the embeddings of each label in one part, float64 [D]."""
    rows, matrix, _ = vectors([file], ["label"], empty=True)
    return {label: matrix[at].sum(axis=0, dtype=np.float64) for label, at in rows.groupby("label").indices.items()}


def part_distances(file: str, shared: tuple[str, dict[str, np.ndarray]]) -> tuple[pd.DataFrame, int]:
    """Return the rows of one part with their distance, and the number of rows without an embedding."""
    key, totals = shared
    rows, matrix, left_out = vectors([file], [key, "label", "score"], empty=True)
    rows["distance"] = np.nan
    for label, at in rows.groupby("label").indices.items():
        own = matrix[at].astype(np.float64)
        others = totals[label] - own
        lengths = np.maximum(np.linalg.norm(others, axis=1), 1e-12)
        rows.loc[at, "distance"] = 1 - np.einsum("ij,ij->i", own, others) / lengths
    return rows, left_out


def distances(labels: pd.Series, matrix: np.ndarray, method: str, k: int) -> np.ndarray:
    """Return the distance of each row [N, D] from the others of its label."""
    result = np.zeros(len(matrix))
    groups = list(labels.groupby(labels, sort=False).indices.values())
    if method == "mahalanobis":
        centred = np.concatenate([matrix[at] - matrix[at].mean(axis=0) for at in groups])
        covariance = centred.T @ centred / len(matrix)
        # Shrink slightly towards a sphere, because there may be fewer rows than dimensions.
        sphere = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
        inverse = np.linalg.inv(0.9 * covariance + 0.1 * sphere)
    for at in groups:
        own = matrix[at]
        if method == "knn":
            result[at] = np.concatenate(
                [_nearest(own[i : i + 1024], own, min(k, len(own) - 1)) for i in range(0, len(own), 1024)]
            )
        else:
            apart = own - own.mean(axis=0)
            result[at] = np.sqrt(np.einsum("ij,jk,ik->i", apart, inverse, apart, optimize=True))
    return result


def _nearest(some: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """Return the mean of 1 - cosine to the ``k`` nearest rows, without the row itself, which is the nearest."""
    largest = -np.partition(-(some @ own.T), k, axis=1)[:, : k + 1]
    return 1 - (largest.sum(axis=1) - largest.max(axis=1)) / k


def draw(rows: pd.DataFrame, lowest: pd.DataFrame, key: str, files: list[str], args: argparse.Namespace) -> None:
    """Draw a contact sheet: two lines of the furthest rows, and two of the lowest scores."""
    furthest, lowest = rows.head(16), lowest.head(16)
    images = thumbnails([*furthest[key], *lowest[key]], files, args)
    blocks = []
    for heading, table, column, text in (
        (
            f"Furthest from their label: times its median distance ({args.method})",
            furthest,
            "times_usual",
            "{:.1f} times",
        ),
        ("Lowest scores", lowest, "score", "score {:.3f}"),
    ):
        names = (
            table[key].astype(str) + "\n" + table["label"].fillna("no label") + "\n" + table[column].map(text.format)
        )
        cells = [(caption, images.get(one)) for caption, one in zip(names, table[key], strict=True)]
        blocks += [(heading if i == 0 else "", cells[i : i + 8]) for i in range(0, len(cells), 8)]
    contact_sheet("Rows to check: id, label, and distance or score", blocks, args.picture)


if __name__ == "__main__":
    start(main)
