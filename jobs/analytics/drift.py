"""Changes between two nights: labels, scores, embeddings, and rows whose label changed.

python jobs/analytics/drift.py nights/date=2026-01-04 nights/date=2026-01-05 --picture drift.png

  Jensen-Shannon distance of the labels' shares, in [0, 1] (square root of the divergence in bits; Lin 1991,
    Endres and Schindelin 2003)
  Kolmogorov-Smirnov distance of the scores, in [0, 1]: the widest gap between the two cumulative curves
  1 - cosine of the mean embeddings, over all rows
  ids in both nights whose embedding changed: the image or the model was replaced
  MMD^2 of the embeddings, over a sample: the squared distance of the two nights' means under a Gaussian kernel whose
    width is the median distance, with the 95 % quantile of shuffled nights beside it (Gretton et al. 2012, "A Kernel
    Two-Sample Test", JMLR 13, equation 5 and section 8). Rows that both nights share lower it.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from common import BLUE, GREY, ORANGE, database, identifier, parts, save, show, start, vectors
from matplotlib.figure import Figure

# Below this cosine, the image or the model was replaced.
MOVED = 0.99
SHARES = """
select coalesce(a.label, b.label) as label, coalesce(a.rows, 0) as rows_a, coalesce(b.rows, 0) as rows_b,
  coalesce(a.share, 0) as share_a, coalesce(b.share, 0) as share_b, share_b - share_a as change
from (select coalesce(label, 'no label') as label, count(*) as rows, rows / sum(rows) over () as share
      from a where status = 'ok' group by 1) a
full join (select coalesce(label, 'no label') as label, count(*) as rows, rows / sum(rows) over () as share
      from b where status = 'ok' group by 1) b on a.label = b.label
order by abs(change) desc, label
"""
KIND = "case when {0}.status <> 'ok' then 'failed' else coalesce({0}.label, 'no label') end"
MOVES = f"""
select {KIND.format("a")} as "from", {KIND.format("b")} as "to", count(*) as rows,
  avg(b.score) as score_b from a join b on a."KEY" = b."KEY" group by all
having "from" <> "to" order by rows desc, "from", "to"
"""

IDS = """
select count(*) filter (a."KEY" = b."KEY"), count(*) filter (b."KEY" is null), count(*) filter (a."KEY" is null)
from a full join b on a."KEY" = b."KEY"
"""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and draw the figures, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="the earlier night's dataset")
    parser.add_argument("b", help="the later night's dataset")
    parser.add_argument("--sample", type=int, default=1000, help="rows of each night for MMD, the same ids [1000]")
    parser.add_argument("--moves", help="write every from -> to here (Parquet)")
    parser.add_argument("--picture", help="write a picture here (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    a, b = parts(args.a), parts(args.b)
    connection, key = database(a=a, b=b), identifier(a)
    shares = connection.execute(SHARES).df()
    moves = connection.execute(MOVES.replace("KEY", key)).df()
    both, gone, new = connection.execute(IDS.replace("KEY", key)).fetchall()[0]
    scores = [
        connection.execute(f"select score from {night} where score is not null").df()["score"].to_numpy()
        for night in ("a", "b")
    ]
    figures = {
        "ids in both": both,
        "ids only in A": gone,
        "ids only in B": new,
        "ids whose label moved": int(moves["rows"].sum()),
        "labels: Jensen-Shannon distance": jensen_shannon(shares["share_a"].to_numpy(), shares["share_b"].to_numpy()),
        "scores: Kolmogorov-Smirnov distance": kolmogorov_smirnov(*scores),
        **embedding_drift(a, b, key, args.sample),
    }
    show(f"A: {args.a}\nB: {args.b}", pd.DataFrame({"": figures.keys(), " ": [f"{v:.4g}" for v in figures.values()]}))
    show("labels whose share changed most", shares[shares["change"] != 0], rows=10)
    show(f"labels that moved, of {both:,} ids in both", moves, rows=10)
    if args.moves:
        moves.to_parquet(args.moves)
    if args.picture:
        save(draw(figures, shares, moves, scores, (args.a, args.b)), args.picture)
    return figures


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Square root of the Jensen-Shannon divergence in bits."""
    middle = (p + q) / 2
    gain = [np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0])) for x in (p, q)]
    return float(np.sqrt(max(0.0, sum(gain) / 2)))


def kolmogorov_smirnov(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest distance between the cumulative distributions of two samples."""
    if not len(x) or not len(y):
        return float("nan")
    at = np.concatenate([x, y])
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (x, y)]
    return float(np.abs(below[0] - below[1]).max())


def embedding_drift(a: list[str], b: list[str], key: str, sample: int) -> dict[str, float]:
    """Return the distance of the means of all rows, the ids whose embedding changed, and MMD of a sample.

    The sample has the ids with the smallest hashes, so that it is the same in both nights.
    """
    (ids_a, x, _), (ids_b, y, _) = vectors(a, [key]), vectors(b, [key])
    if x.shape[1] != y.shape[1]:
        raise SystemExit(
            f"embeddings of {x.shape[1]} and {y.shape[1]} numbers are of two models; compare nights of one model"
        )
    means = [matrix.mean(axis=0, dtype=np.float64) for matrix in (x, y)]
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    place = pd.Index(ids_b[key]).get_indexer(ids_a[key])
    shared = np.flatnonzero(place >= 0)
    blocks = np.array_split(shared, len(shared) // 10_000 + 1)
    moved = sum(int(np.sum(np.einsum("ij,ij->i", x[at], y[place[at]]) < MOVED)) for at in blocks)
    hashes = [pd.util.hash_array(ids[key].to_numpy(object)) for ids in (ids_a, ids_b)]
    samples = [
        matrix[np.argsort(hashed, kind="stable")[:sample]] for matrix, hashed in zip((x, y), hashes, strict=True)
    ]
    squared, chance = mmd(*samples)
    return {
        f"ids whose embedding moved (cosine < {MOVED})": moved,
        "embeddings: 1 - cosine of the means": max(0.0, 1 - float(cosine)),
        "embeddings: MMD^2": squared,
        "embeddings: MMD^2 by chance (95 %)": chance,
    }


def mmd(x: np.ndarray, y: np.ndarray, shuffles: int = 200) -> tuple[float, float]:
    """MMD^2 of two samples [N, D] and [M, D], and the 95 % quantile of shuffled ones; (N + M)^2 numbers of memory."""
    pool = np.concatenate([x, y]).astype(np.float64)
    norms = np.sum(pool**2, axis=1)
    distances = np.maximum(norms[:, None] + norms - 2 * pool @ pool.T, 0)
    kernel = np.exp(-distances / (np.median(distances[np.triu_indices(len(pool), 1)]) or 1))
    weights = np.repeat([1 / len(x), -1 / len(y)], [len(x), len(y)])
    shuffled = np.random.default_rng(0).permuted(np.tile(weights, (shuffles, 1)), axis=1)
    chance = np.einsum("ij,ij->i", shuffled @ kernel, shuffled)
    squared = float(weights @ kernel @ weights)
    return squared if squared > 1e-12 else 0.0, float(np.quantile(chance, 0.95))


def draw(
    figures: dict[str, float],
    shares: pd.DataFrame,
    moves: pd.DataFrame,
    scores: list[np.ndarray],
    names: tuple[str, str],
) -> Figure:
    """Draw changed shares, changed labels, score curves, and the figures as text."""
    figure = Figure(figsize=(12, 8.5), layout="constrained", facecolor="white")
    figure.suptitle(f"A: {names[0]}\nB: {names[1]}", x=0.01, ha="left", fontsize=10)
    (changed, moved), (curves, text) = figure.subplots(2, 2, height_ratios=(1.2, 1))
    most = shares[shares["change"] != 0].head(12)[::-1]
    colours = [BLUE if change > 0 else ORANGE for change in most["change"]]
    changed.barh(most["label"], 100 * most["change"], color=colours)
    changed.axvline(0, color="black", linewidth=0.8, visible=not most.empty)
    changed.set_title("Labels whose share changed most, in percentage points (blue: more in B)")
    top = moves.head(12)[::-1]
    moved.barh(top["from"] + "  \N{RIGHTWARDS ARROW}  " + top["to"], top["rows"], color=GREY)
    moved.set_title(f"Labels that moved from A to B: rows, of {figures['ids in both']:,} ids in both")
    for axes, table in ((changed, most), (moved, top)):
        if table.empty:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
            axes.set_axis_off()
    for score, colour, name, style in zip(scores, (ORANGE, BLUE), "AB", ("-", (0, (4, 2))), strict=True):
        curves.plot(np.sort(score), np.linspace(0, 1, len(score)), color=colour, label=name, linestyle=style)
    curves.set_title("Share of rows with at most this score")
    curves.set_xlabel("score of the best label")
    curves.legend()
    text.set_axis_off()
    text.set_title("Figures (a distance is 0 where nothing changed)")
    for line, (name, value) in enumerate(figures.items()):
        text.text(0, 0.93 - 0.09 * line, name, transform=text.transAxes)
        text.text(0.98, 0.93 - 0.09 * line, f"{value:,.4g}", transform=text.transAxes, ha="right")
    return figure


if __name__ == "__main__":
    start(main)
