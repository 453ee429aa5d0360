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


class Scores:
    """Statistics of a dataset that is added part by part, in order; of equal scores the earlier row wins.

    Args:
        keep: number of rows of each label at either end.
    """

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._labels: Counter[str] = Counter()
        self._bins = np.zeros(BINS, dtype=np.int64)
        self._codes: dict[str, int] = {}
        # Heaps of (score, -row, id) or (-score, -row, id): the first entry is replaced next.
        self._most: list[list[tuple[float, int, str]]] = []
        self._least: list[list[tuple[float, int, str]]] = []
        # The score that a row needs to enter a full list.
        self._above = np.empty(0, dtype=np.float64)
        self._below = np.empty(0, dtype=np.float64)

    def add(self, ids: pa.ChunkedArray, labels: pa.ChunkedArray, scores: pa.ChunkedArray, *, start: int) -> None:
        """Add the next rows; ``start`` is the number of the first."""
        encoded = labels.combine_chunks().dictionary_encode()
        names: Sequence[str] = encoded.dictionary.to_pylist()
        local = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        values = scores.combine_chunks().fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)
        known = np.isfinite(values)
        self._bins += np.histogram(np.clip(values[known], 0, 1), bins=BINS, range=(0, 1))[0]
        counts = np.bincount(local[local >= 0], minlength=len(names))
        for name, count in zip(names, counts.tolist(), strict=True):
            self._labels[name] += count
            if name not in self._codes and len(self._codes) < MOST_LABELS:
                self._codes[name] = len(self._codes)
                self._most.append([])
                self._least.append([])
        new = len(self._codes) - len(self._above)
        self._above = np.concatenate([self._above, np.full(new, -np.inf)])
        self._below = np.concatenate([self._below, np.full(new, np.inf)])
        # The last entry is for rows without a label; it has the code -1, as labels beyond the limit.
        to_code = np.array([*(self._codes.get(name, -1) for name in names), -1], dtype=np.int64)
        codes = to_code[local]
        known &= codes >= 0
        for place in _best(codes, values, known & (values > np.append(self._above, np.inf)[codes])):
            self._keep_in(self._most, self._above, int(codes[place]), values[place], start + place, ids, place, 1)
        for place in _best(codes, -values, known & (values < np.append(self._below, -np.inf)[codes])):
            self._keep_in(self._least, self._below, int(codes[place]), values[place], start + place, ids, place, -1)

    def _keep_in(
        self,
        kept: list[list[tuple[float, int, str]]],
        limits: NDArray[np.float64],
        code: int,
        value: float,
        number: int,
        ids: pa.ChunkedArray,
        place: int,
        sign: int,
    ) -> None:
        heap = kept[code]
        entry = (sign * float(value), -number, str(ids[place].as_py()))
        if len(heap) < self._keep:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
        if len(heap) == self._keep:
            limits[code] = sign * heap[0][0]

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
            code = self._codes[label]
            most = [_row(entry, label, 1) for entry in sorted(self._most[code], reverse=True)]
            taken = {row.number for row in most}
            least = [_row(entry, label, -1) for entry in sorted(self._least[code], reverse=True)]
            # A row of a rare label is not listed twice.
            least = [row for row in least if row.number not in taken]
            found.append(Extremes(label=label, count=self._labels[label], most=tuple(most), least=tuple(least)))
        return tuple(found)

    def least_certain(self, count: int) -> tuple[Row, ...]:
        """The rows with the lowest scores of all labels, lowest first."""
        rows = [_row(entry, label, -1) for label, code in self._codes.items() for entry in self._least[code]]
        return tuple(sorted(rows, key=lambda row: (row.score, row.number))[:count])


def _best(codes: NDArray[np.int64], values: NDArray[np.float64], among: NDArray[np.bool_]) -> list[int]:
    """The positions of the candidates ``among``, highest value first within each label."""
    places = np.flatnonzero(among)
    found: list[int] = places[np.lexsort((places, -values[places], codes[places]))].tolist()
    return found


def _row(entry: tuple[float, int, str], label: str, sign: int) -> Row:
    score, number, id = entry
    return Row(number=-number, id=id, label=label, score=sign * score)
