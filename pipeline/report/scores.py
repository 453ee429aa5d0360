"""The scores of a dataset: a histogram, and the rows of each label with the highest and lowest scores."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BINS = 40
SIMILARITY_BINS = 200
# Labels whose extreme rows are kept: the first in the dataset.
MOST_LABELS = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset: ``number`` counts the rows of the manifest from 0."""

    number: int
    id: str
    label: str | None
    score: float | None


@dataclass(frozen=True, slots=True)
class Extremes:
    """The rows of one label with the highest scores, highest first, and those with the lowest, lowest first."""

    label: str
    count: int
    most: tuple[Row, ...]
    least: tuple[Row, ...]


class _End:
    """The rows of each label with the highest scores, or with the lowest (``sign`` -1); labels are codes from 0.

    Of equal scores the earlier row wins.
    """

    def __init__(self, keep: int, sign: int) -> None:
        self._keep, self._sign = keep, sign
        # Heaps of (sign * score, -row, id): the first entry is replaced next.
        self._heaps: list[list[tuple[float, int, str]]] = []
        # The sign * score that a row has to exceed, by code; the last one is for rows without a code.
        self._limits = np.array([np.inf])

    def add(self, codes: NDArray[np.int64], scores: NDArray[np.float64], ids: pa.ChunkedArray, *, start: int) -> None:
        """Add rows with their codes (-1: none), scores and ids; ``start`` is the number of the first."""
        new = int(codes.max(initial=-1)) + 1 - len(self._heaps)
        if new > 0:
            self._heaps += [[] for _ in range(new)]
            self._limits = np.concatenate([self._limits[:-1], np.full(new, -np.inf), [np.inf]])
        values = self._sign * scores
        places = np.flatnonzero(values > self._limits[codes])
        # The best first, so that few others enter a heap only to leave it again.
        for place in places[np.lexsort((places, -values[places]))].tolist():
            code, value = codes[place], float(values[place])
            heap = self._heaps[code]
            if value <= self._limits[code]:
                continue
            entry = (value, -(start + place), str(ids[place].as_py()))
            if len(heap) < self._keep:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
            if len(heap) == self._keep:
                self._limits[code] = heap[0][0]

    def rows(self, code: int, label: str) -> list[Row]:
        """The rows of a label, the outermost first."""
        entries = sorted(self._heaps[code], reverse=True) if code < len(self._heaps) else []
        return [Row(number=-number, id=id, label=label, score=self._sign * value) for value, number, id in entries]


class Scores:
    """Statistics of a dataset that is added part by part, in order.

    Args:
        keep: number of rows of each label at either end.
    """

    def __init__(self, *, keep: int) -> None:
        self._labels: Counter[str] = Counter()
        self._bins = np.zeros(BINS, dtype=np.int64)
        self._codes: dict[str, int] = {}
        self._most, self._least = _End(keep, 1), _End(keep, -1)

    def add(self, ids: pa.ChunkedArray, labels: pa.ChunkedArray, scores: pa.ChunkedArray, *, start: int) -> None:
        """Add the next rows; ``start`` is the number of the first."""
        encoded = labels.combine_chunks().dictionary_encode()
        names: Sequence[str] = encoded.dictionary.to_pylist()
        local = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        values = scores.combine_chunks().fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)
        self._bins += np.histogram(np.clip(values[np.isfinite(values)], 0, 1), bins=BINS, range=(0, 1))[0]
        counts = np.bincount(local[local >= 0], minlength=len(names))
        for name, count in zip(names, counts.tolist(), strict=True):
            self._labels[name] += count
            if len(self._codes) < MOST_LABELS:
                self._codes.setdefault(name, len(self._codes))
        # The last entry is for rows without a label; it has the code -1, as labels beyond the limit.
        codes = np.array([*(self._codes.get(name, -1) for name in names), -1], dtype=np.int64)[local]
        values[np.isinf(values)] = np.nan
        for end in (self._most, self._least):
            end.add(codes, values, ids, start=start)

    @property
    def labels(self) -> dict[str, int]:
        """Rows of each label, most frequent first."""
        return dict(self._labels.most_common())

    @property
    def histogram(self) -> tuple[int, ...]:
        """Rows by score, in :data:`BINS` equal steps from 0 to 1; empty where no row has one."""
        return tuple(self._bins.tolist()) if self._bins.any() else ()

    def extremes(self, most_labels: int) -> tuple[Extremes, ...]:
        """The extreme rows of the most frequent labels."""
        found = []
        for label in [name for name in self.labels if name in self._codes][:most_labels]:
            most = self._most.rows(self._codes[label], label)
            # A row of a rare label is not listed twice.
            least = [row for row in self._least.rows(self._codes[label], label) if row not in most]
            found.append(Extremes(label=label, count=self._labels[label], most=tuple(most), least=tuple(least)))
        return tuple(found)

    def least_certain(self, count: int) -> tuple[Row, ...]:
        """The rows with the lowest scores of all labels, lowest first."""
        rows = [row for label, code in self._codes.items() for row in self._least.rows(code, label)]
        return tuple(sorted(rows, key=lambda row: (row.score, row.number))[:count])


class Similarities:
    """Statistics of pairs of images and texts, of a dataset that is added part by part, in order.

    Args:
        keep: number of rows at either end.
    """

    def __init__(self, *, keep: int) -> None:
        self._bins = np.zeros(SIMILARITY_BINS, dtype=np.int64)
        self._most, self._least = _End(keep, 1), _End(keep, -1)

    def add(self, ids: pa.ChunkedArray, similarity: pa.ChunkedArray, *, start: int) -> None:
        """Add the next rows; ``start`` is the number of the first."""
        values = similarity.combine_chunks().fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)
        there = np.isfinite(values)
        self._bins += np.histogram(np.clip(values[there], -1, 1), bins=SIMILARITY_BINS, range=(-1, 1))[0]
        for end in (self._most, self._least):
            end.add(np.where(there, 0, -1), values, ids, start=start)

    @property
    def histogram(self) -> tuple[int, ...]:
        """Rows by similarity, in :data:`SIMILARITY_BINS` equal steps from -1 to 1; empty where no row has one."""
        return tuple(self._bins.tolist()) if self._bins.any() else ()

    @property
    def extremes(self) -> Extremes | None:
        """The rows at either end, each once; None where no row has a similarity."""
        most = self._most.rows(0, "")
        least = [row for row in self._least.rows(0, "") if row not in most]
        return Extremes("", int(self._bins.sum()), tuple(most), tuple(least)) if most else None
