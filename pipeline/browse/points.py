"""A map of a dataset: a sample of its embeddings in two dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.browse.cached import CachedDataset
from pipeline.browse.measures import Progress
from pipeline.dataset.vectors import vectors_of

# Rows on the map, and row groups that they are taken from.
ROWS, GROUPS = 20_000, 64
# Labels with a colour of their own; the others share one.
COLOURS = 7


def points_of(dataset: CachedDataset, progress: Progress) -> dict[str, Any]:
    """Rows, positions and labels of a sample, for JSON.

    Positions are the first two principal components, from 0 to 1000. The sample is spread evenly over up to
    :data:`GROUPS` row groups.

    Raises:
        StorageError: a part is missing or damaged.
    """
    chosen = np.unique(np.linspace(0, len(dataset.commits) - 1, GROUPS).round().astype(int)).tolist()
    each = -(-ROWS // len(chosen))
    labelled = "label" in dataset.schema.names
    numbers, vectors, labels = [], [], list[str | None]()
    for done, place in enumerate(chosen, 1):
        commit = dataset.commits[place]
        # Few parts are read as a whole, so that small datasets are shown in full.
        sizes = dataset.group_sizes(commit)
        groups = range(len(sizes)) if len(chosen) * len(sizes) <= GROUPS else range(1)
        first = 0
        for group in groups:
            table = dataset.read_group(commit, group, [dataset.column, *(["label"] if labelled else [])])
            stored, rows = vectors_of(table[dataset.column], dataset.form.width)
            share = max(1, -(-each // len(groups)))
            some = np.unique(np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(int))
            vectors.append(dataset.form.decode(stored[some]))
            numbers.append(rows[some] + int(dataset.starts[place]) + first)
            labels += table["label"].take(rows[some]).to_pylist() if labelled else [None] * len(some)
            first += int(sizes[group])
        progress(done, len(chosen))
    whole = np.concatenate(vectors)
    if not len(whole):
        return {"rows": [], "x": [], "y": [], "label": [], "names": []}
    flat = _principal(whole)
    names, codes = np.unique([label or "" for label in labels], return_inverse=True)
    common = np.argsort(-np.bincount(codes, minlength=len(names)), kind="stable")[:COLOURS]
    colour = np.full(len(names), COLOURS)
    colour[common] = np.arange(len(common))
    return {
        "rows": np.concatenate(numbers).tolist(),
        "x": flat[:, 0].tolist(),
        "y": flat[:, 1].tolist(),
        "label": colour[codes].tolist(),
        "names": [str(names[code]) or "no label" for code in common],
    }


def _principal(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Two principal components of rows ``[N, D]``, as whole numbers from 0 to 1000 ``[N, 2]``."""
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    flat = centred @ axes[:, :-3:-1]
    low, high = flat.min(axis=0), flat.max(axis=0)
    scaled: NDArray[np.int64] = np.rint(1000 * (flat - low) / np.maximum(high - low, 1e-9)).astype(np.int64)
    return scaled
