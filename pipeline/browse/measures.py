"""Measures of rows and of labels: margins, mean embeddings, counts, histograms and confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.browse.cached import CachedDataset, texts
from pipeline.core.errors import ConfigError, Problem
from pipeline.core.plain import one_array
from pipeline.dataset.commits import Commit
from pipeline.dataset.search import blocks
from pipeline.dataset.vectors import vectors_of

# Labels whose mean embedding is computed; rows of the others are compared with the mean of all rows.
MOST_MEANS = 4096
# Labels that have a histogram of their own: the first in the dataset.
MOST_HISTOGRAMS = 4096
# Pairs of a label and another value that are counted.
MOST_PAIRS = 1_000_000
BINS = 40
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """The labels of a dataset.

    Attributes:
        counts: rows of each label, most frequent first.
        histogram: scores of all rows, in :data:`BINS` equal steps from 0 to 1.
        histograms: those of each label, as far as they are kept.
        mean: the mean score; NaN where no row has one.
    """

    counts: Mapping[str, int]
    histogram: tuple[int, ...]
    histograms: Mapping[str, tuple[int, ...]]
    mean: float


def count_labels(dataset: CachedDataset, progress: Progress) -> LabelCounts:
    """Count labels and scores; reads these columns of every part.

    Raises:
        StorageError: a part is missing or damaged.
    """
    counts, codes = Counter[str](), dict[str, int]()
    histograms, histogram = np.zeros((MOST_HISTOGRAMS, BINS), np.int64), np.zeros(BINS, np.int64)
    total, scored = 0.0, 0
    with closing(dataset.each(lambda commit, table: table, ["label", "score"])) as parts:
        for done, table in enumerate(parts, 1):
            names, local = encoded(table["label"])
            scores = floats(table["score"])
            bins = np.minimum((np.clip(scores, 0, 1) * BINS), BINS - 1)
            there = np.isfinite(scores)
            histogram += np.bincount(bins[there].astype(np.int64), minlength=BINS)
            total, scored = total + float(scores[there].sum()), scored + int(there.sum())
            counts.update(dict(zip(names, np.bincount(local[local >= 0], minlength=len(names)).tolist(), strict=True)))
            for name in names[: MOST_HISTOGRAMS - len(codes)] if len(codes) < MOST_HISTOGRAMS else ():
                codes.setdefault(name, len(codes))
            code = np.array([*(codes.get(name, -1) for name in names), -1])[local]
            here = there & (code >= 0)
            np.add.at(histograms, (code[here], bins[here].astype(np.int64)), 1)
            progress(done, len(dataset.commits))
    return LabelCounts(
        counts=dict(counts.most_common()),
        histogram=tuple(histogram.tolist()),
        histograms={name: tuple(histograms[code].tolist()) for name, code in codes.items()},
        mean=total / scored if scored else float("nan"),
    )


def confusion(dataset: CachedDataset, truth: str, progress: Progress) -> Counter[tuple[str | None, str | None]]:
    """Rows by the value of a column and their label, None for a null; reads both columns of every part.

    Raises:
        ConfigError: there are more than :data:`MOST_PAIRS` of them, as of a column of names.
        StorageError: a part is missing or damaged.
    """
    found = Counter[tuple[str | None, str | None]]()
    with closing(dataset.each(lambda commit, table: table, [truth, "label"])) as parts:
        for done, table in enumerate(parts, 1):
            (trues, one), (labels, other) = encoded(table[truth]), encoded(table["label"])
            pairs, counts = np.unique(np.stack([one, other]), axis=1, return_counts=True)
            values = [*trues, None], [*labels, None]
            for row, label, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
                found[values[0][row], values[1][label]] += count
            if len(found) > MOST_PAIRS:
                raise ConfigError([Problem("truth", truth, f"{truth} has more than {MOST_PAIRS:,} values with labels")])
            progress(done, len(dataset.commits))
    return found


def encoded(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct values of a column as texts, and for each row the place of its own; -1 for a null."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    coded = one_array(column.cast(pa.string())).dictionary_encode()
    return texts(coded.dictionary), coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def margins(top_scores: pa.ChunkedArray) -> NDArray[np.float64]:
    """The difference of the two highest scores of each row; NaN where there are fewer."""
    lists = one_array(top_scores)
    found = np.full(len(lists), np.nan)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    first = np.cumsum(lengths) - lengths
    two = lengths >= 2
    found[two] = values[first[two]] - values[first[two] + 1]
    return found


def label_means(dataset: CachedDataset) -> dict[str | None, NDArray[np.float32]]:
    """The mean embedding of the rows of each label, of length 1; that of all rows by the key None."""
    key = (dataset.url, dataset.fingerprint["success"], "means")
    held: dict[str | None, NDArray[np.float32]] | None = dataset.memory.get(key)
    if held is not None:
        return held
    sums: dict[str | None, NDArray[np.float64]] = {None: np.zeros(dataset.dim)}

    def of_part(commit: Commit, table: pa.Table) -> dict[str | None, NDArray[np.float64]]:
        stored, rows = vectors_of(table[dataset.column], dataset.form.width)
        names, codes = encoded(table["label"].take(pa.array(rows)))
        # The last one is of rows without a label.
        added = np.zeros((len(names) + 1, dataset.dim))
        for at, block in blocks(dataset.form, stored):
            np.add.at(added, codes[at : at + len(block)], block)
        return {None: added.sum(axis=0), **dict(zip(names, added, strict=False))}

    with closing(dataset.each(of_part, [dataset.column, "label"])) as parts:
        for part in parts:
            for label, added in part.items():
                if label in sums:
                    sums[label] += added
                elif len(sums) <= MOST_MEANS:
                    sums[label] = added
    means = {
        label: (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32) for label, total in sums.items()
    }
    dataset.memory.put(key, means, 4 * dataset.dim * len(means))
    return means


def to_means(
    dataset: CachedDataset, stored: NDArray[Any], labels: pa.ChunkedArray, means: Mapping[str | None, NDArray[Any]]
) -> NDArray[np.float64]:
    """The cosine of each row and the mean of its label."""
    names = labels.to_pylist()
    found = np.empty(len(stored))
    for at, block in blocks(dataset.form, stored):
        centres = np.stack([means.get(name, means[None]) for name in names[at : at + len(block)]])
        found[at : at + len(block)] = np.einsum("ij,ij->i", block, centres)
    return found


def floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of numbers as float64; NaN for a null."""
    found: NDArray[np.float64] = column.to_numpy().astype(np.float64)
    return found
