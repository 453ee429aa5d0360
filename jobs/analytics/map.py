"""A map of the embeddings: every dot is an image, and images that are similar to the model are near each other.

python jobs/analytics/map.py outputs/demo --picture map.png

PCA gives the two directions in which the embeddings differ most, and all distances are meaningful. UMAP and t-SNE (pip
install umap-learn, or openTSNE) start from 50 such directions and keep neighbours together: near images are similar,
but the sizes of groups and the distances between them mean little.
"""

from __future__ import annotations

import argparse
import importlib.util

import numpy as np
import pandas as pd
from common import COLOURS, GREY, identifier, parts, picture_arguments, save, show, start, thumbnails, vectors
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

PACKAGES = {"umap": "umap", "tsne": "openTSNE"}
# Colour and shape of a label's dots; each colour is used with two shapes.
MARKS = [*((colour, "o") for colour in COLOURS), *((colour, "^") for colour in COLOURS)]


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print and draw the positions, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder; of a store of nights, the newest is taken")
    parser.add_argument("--method", choices=("auto", "pca", *PACKAGES), default="auto", help="auto: the best installed")
    parser.add_argument("--sample", type=int, default=10_000, help="largest number of rows, drawn at random [10000]")
    parser.add_argument("--top", type=int, default=12, help="number of labels with their own mark, at most 16 [12]")
    parser.add_argument("--by", default="label", help="the column that colours the dots [label]")
    parser.add_argument("--thumbnails", type=int, default=0, help="number of images drawn into the map [0]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and of the layout [0]")
    parser.add_argument("--out", help="write the positions here (Parquet): id, colour column, x, y")
    parser.add_argument("--picture", help="write the map here (.png, .svg, .pdf)")
    picture_arguments(parser)
    args = parser.parse_args(argv)
    files = parts(args.dataset)
    key = identifier(files)
    rows, matrix, left_out = vectors(files, [key, args.by])
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(rows))[: args.sample])
    total, rows, matrix = len(rows), rows.iloc[chosen].reset_index(drop=True), matrix[chosen]
    parted, explained = pca(matrix, min(50, *matrix.shape))
    method = args.method if args.method != "auto" else next((m for m, p in PACKAGES.items() if _installed(p)), "pca")
    places = parted[:, :2] if method == "pca" else laid_out(parted, method, args.seed)
    rows["x"], rows["y"] = places[:, 0], places[:, 1] if places.shape[1] > 1 else 0.0
    if args.method == "auto" and method == "pca":
        print("PCA alone: neither umap-learn nor openTSNE is installed")
    print(f"{len(rows):,} of {total:,} embeddings by {method}; {left_out:,} rows without one left out")
    print(f"two directions hold {explained[:2].sum():.0%} of the variance, {len(explained)} hold {explained.sum():.0%}")
    centres = rows.groupby(args.by).agg(rows=(key, "size"), x=("x", "median"), y=("y", "median")).reset_index()
    show(f"medians by {args.by}", centres.sort_values("rows", ascending=False))
    if args.out:
        rows.to_parquet(args.out, index=False)
    if args.picture:
        names = {"pca": "PCA", "umap": "UMAP", "tsne": "t-SNE"}
        title = f"{len(rows):,} images by {names[method]}: near images are similar to the model"
        if method == "pca":
            title += f" (these two directions hold {explained[:2].sum():.0%} of the differences)"
        images = thumbnails(spread(rows, args.thumbnails)[key], files, args, side=48) if args.thumbnails else {}
        save(draw(rows, args.by, key, title, min(args.top, len(MARKS)), images), args.picture)
    return rows


def pca(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [N, D] along the first ``count`` principal directions, and the share of variance of each."""
    centred = matrix - matrix.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][:count]
    directions = directions[:, order]
    # The sign of a direction is arbitrary: make the largest component positive, so that runs give the same picture.
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(len(order))])
    return centred @ directions, values[order] / max(values.sum(), 1e-12)


def laid_out(parted: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Return two columns of positions by UMAP or t-SNE, equal for equal seeds."""
    if not _installed(PACKAGES[method]):
        package = {"umap": "umap-learn", "tsne": "openTSNE"}[method]
        raise SystemExit(f"--method {method}: {package} is not installed; pip install {package}, or --method pca")
    if method == "umap":
        from umap import UMAP

        return np.asarray(UMAP(n_neighbors=min(15, len(parted) - 1), random_state=seed, n_jobs=1).fit_transform(parted))
    from openTSNE import TSNE

    return np.asarray(TSNE(perplexity=min(30, len(parted) / 4), random_state=seed).fit(parted))


def spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return at most ``count`` rows that cover the map: those nearest to the centres of a grid's cells."""
    side = max(1, int(count**0.5))
    low, high = rows[["x", "y"]].min(), rows[["x", "y"]].max()
    place = (rows[["x", "y"]] - low) / (high - low).clip(lower=1e-12) * side
    cell = place.clip(upper=side - 1e-6).astype(int)
    off = ((place - cell - 0.5) ** 2).sum(axis=1).sort_values().index
    return rows.loc[off[~cell.loc[off].duplicated().to_numpy()]]


def draw(rows: pd.DataFrame, by: str, key: str, title: str, top: int, images: dict[object, object]) -> Figure:
    """Draw dots with a legend, and images on top."""
    figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    counts = rows[by].value_counts()
    rest = ~rows[by].isin(counts.index[:top])
    size = float(np.clip(20_000 / len(rows), 3, 26))
    if rest.any():
        name = f"{len(counts) - top:,} others" if len(counts) > top else f"no {by}"
        axes.scatter(rows["x"][rest], rows["y"][rest], s=size, color=GREY, alpha=0.6, linewidths=0, label=name)
    for label, (colour, mark) in zip(counts.index[:top], MARKS, strict=False):
        at = rows[by] == label
        style = {"s": size * 1.6, "color": colour, "marker": mark, "linewidths": 0.3, "edgecolors": "white"}
        axes.scatter(rows["x"][at], rows["y"][at], label=f"{label} ({counts[label]:,})", **style)
    for _, row in rows[rows[key].isin(list(images))].iterrows():
        box = OffsetImage(np.asarray(images[row[key]]), zoom=0.62)
        axes.add_artist(AnnotationBbox(box, (row["x"], row["y"]), pad=0.08, bboxprops={"edgecolor": "#888888"}))
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.legend(title=by, loc="upper left", bbox_to_anchor=(1, 1), markerscale=1.5)
    return figure


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    start(main)
