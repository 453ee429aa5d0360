"""Near duplicates: pairs of images whose embeddings have a cosine of at least the threshold, and groups of them.

python jobs/analytics/near_duplicates.py outputs/demo --threshold 0.99 --picture pairs.png

The exact search takes N^2 * D floating-point operations for N different embeddings of D numbers. A core with 50 GFLOP/s
takes about 2 minutes for 100,000 embeddings of 512, and three hours for a million. Memory: the embeddings as they are
stored, and --block^2 * 5 bytes. For more than a million, --faiss (pip install faiss-cpu) searches only the nearest
--probe of 4 * sqrt(N) cells: it may miss a few pairs but reports no wrong ones.
Embeddings that are equal to the last bit count as one until the groups are made. A group is a chain of pairs: its ends
may be less similar than the threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd
from common import contact_sheet, identifier, parts, picture_arguments, show, start, thumbnails, vectors

MOST_PAIRS = 20_000_000


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Print and draw the groups, and return one row for each grouped image, the largest groups first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset's folder; of a store of nights, the newest is taken")
    parser.add_argument("--threshold", type=float, default=0.98, help="lowest cosine of a pair [0.98]")
    parser.add_argument("--block", type=int, default=4096, help="rows of a block [4096]")
    parser.add_argument("--faiss", action="store_true", help="use FAISS, approximately, for millions of rows")
    parser.add_argument("--probe", type=int, default=32, help="cells that --faiss looks into [32]")
    parser.add_argument("--out", help="write the groups here (Parquet): id, group, cosine to the group's first")
    parser.add_argument("--picture", help="write a contact sheet of the largest groups here (.png, .svg, .pdf)")
    picture_arguments(parser)
    args = parser.parse_args(argv)
    files = parts(args.dataset)
    key = identifier(files)
    rows, matrix, left_out = vectors(files, [key, "label"], dtype=None)
    # The bytes of a row as one value, which NumPy sorts faster.
    whole = np.ascontiguousarray(matrix).view(np.dtype((np.void, matrix.dtype.itemsize * matrix.shape[1]))).ravel()
    _, first, same = np.unique(whole, return_index=True, return_inverse=True)
    different = matrix[first]
    found = approximate(different, args) if args.faiss else exact(different, args.threshold, args.block)
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    group = components(len(different), pairs)[same]
    rows["group"], rows["size"] = group, np.bincount(group, minlength=len(different))[group]
    rows = rows[rows["size"] > 1].sort_values(["size", "group"], ascending=[False, True], kind="stable")
    head = rows.index.to_series().groupby(rows["group"]).transform("first").to_numpy(np.int64)
    one, other = (matrix[at].astype(np.float32) for at in (rows.index, head))
    rows["cosine"] = np.einsum("ij,ij->i", one, other) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    rows["group"] = pd.factorize(rows["group"])[0]
    print(f"{len(matrix):,} embeddings, {len(different):,} different; {left_out:,} rows without one left out")
    print(f"{len(pairs):,} pairs of different embeddings with a cosine of at least {args.threshold}")
    surplus = len(rows) - rows["group"].nunique()
    print(f"{rows['group'].nunique():,} groups; keeping one image of each would drop {surplus:,} rows")
    show("groups, largest first", rows)
    if args.out:
        rows.to_parquet(args.out, index=False)
    if args.picture and len(rows):
        draw(rows, key, files, args)
    return rows


def exact(matrix: np.ndarray, threshold: float, block: int) -> Iterator[np.ndarray]:
    """Yield pairs [P, 2], i < j, of all rows with a cosine of at least ``threshold``.

    Raises:
        SystemExit: there are more pairs than may be held in memory.
    """
    count = 0
    for i in range(0, len(matrix), block):
        left = _unit(matrix[i : i + block])
        for j in range(i, len(matrix), block):
            near = left @ _unit(matrix[j : j + block]).T >= threshold
            pairs = np.argwhere(np.triu(near, 1) if i == j else near) + np.array([i, j])
            count += len(pairs)
            if count > MOST_PAIRS:
                raise SystemExit(f"more than {MOST_PAIRS:,} pairs: take a higher --threshold than {threshold}")
            yield pairs


def approximate(matrix: np.ndarray, args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Yield such pairs by FAISS's inverted lists, which compare only rows of the nearest cells."""
    try:
        import faiss
    except ImportError:
        raise SystemExit("--faiss: FAISS is not installed; pip install faiss-cpu") from None
    unit = _unit(matrix)
    cells = max(1, min(int(4 * len(unit) ** 0.5), len(unit) // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(unit.shape[1]), unit.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.train(unit[np.random.default_rng(0).permutation(len(unit))[: 64 * cells]])
    index.add(unit)
    index.nprobe = args.probe
    for i in range(0, len(unit), args.block):
        limits, _, neighbours = index.range_search(unit[i : i + args.block], args.threshold)
        pairs = np.stack([np.repeat(np.arange(len(limits) - 1) + i, np.diff(limits).astype(int)), neighbours], axis=1)
        yield pairs[pairs[:, 0] < pairs[:, 1]]


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return the connected component of each of ``count`` rows, by propagating the lowest number."""
    group = np.arange(count)
    while True:
        before = group.copy()
        lowest = np.minimum(group[pairs[:, 0]], group[pairs[:, 1]])
        np.minimum.at(group, pairs[:, 0], lowest)
        np.minimum.at(group, pairs[:, 1], lowest)
        group = group[group]
        if np.array_equal(group, before):
            return group


def draw(rows: pd.DataFrame, key: str, files: list[str], args: argparse.Namespace, most: int = 8) -> None:
    """Draw a contact sheet of the largest groups, each with its first images."""
    groups = [group.head(most) for _, group in rows[rows["group"] < 24].groupby("group")]
    images = thumbnails(pd.concat(groups)[key], files, args)
    blocks = []
    for group in groups:
        names = group[key].astype(str) + "\n" + group["label"].fillna("no label") + "\n"
        captions = names + group["cosine"].map("cosine {:.4f}".format)
        cells = [(caption, images.get(one)) for caption, one in zip(captions, group[key], strict=True)]
        size = group["size"].iloc[0]
        blocks.append((f"{size:,} images" + (f", {most} of them" if size > most else ""), cells))
    title = f"Near duplicates, largest groups first: pairs of at least {args.threshold:g}; cosine to the group's first"
    contact_sheet(title, blocks, args.picture)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return rows as float32 of length 1, which stored float16 values have only approximately."""
    whole = rows.astype(np.float32)
    return whole / np.linalg.norm(whole, axis=1, keepdims=True)


if __name__ == "__main__":
    start(main)
