"""Choice of embeddings to keep: each is kept, or has a cosine of at least a threshold with one that came before.

Up to :data:`EXACT_ROWS` embeddings, each is compared with all that are kept. More are searched in an inverted file of
FAISS (Jegou et al. 2011). It may miss one, so that an embedding is kept too much; cosines are exact in both cases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.index import LEAST, import_faiss, lists_for
from pipeline.dataset.parts import similarity
from pipeline.dataset.search import CLOSE, closest

EXACT_ROWS = 100_000
# Rows that are compared at a time, and the kept ones that they are compared with.
BLOCK, KEYS = 1024, 8192
# The share of rows at the threshold that the inverted file must find, measured on so many.
RECALL, QUERIES = 0.99, 1000
# Candidates of the inverted file for each row, and the error of its cosines, which come of numbers of 16 bits.
CANDIDATES, ROUNDING = 4, 0.01
# Rows for a line of the log.
REPORTED = 100_000
log = logging.getLogger(__name__)
# The embeddings of these numbers, float32 [N, D] of length 1.
Load = Callable[[NDArray[np.int64]], NDArray[np.float32]]
Nearest = tuple[NDArray[np.int64], NDArray[np.float32]]


class KeptSearch(Protocol):
    """A search among kept embeddings, which have numbers; ``about`` describes it."""

    about: Any

    def add(self, numbers: NDArray[np.int64], unit: NDArray[np.float32]) -> None:
        """Keep embeddings ``[N, D]`` of length 1."""

    def nearest(self, unit: NDArray[np.float32], least: float) -> Nearest:
        """The nearest kept embedding of each, int64 ``[N]``, and the cosine; -1 and -2 if it is below ``least``."""


def keep(load: Load, count: int, threshold: float, search: KeptSearch) -> Nearest:
    """Choose embeddings to keep among ``count``, in their order.

    Returns:
        The nearest of those kept before it, or the embedding itself, int64 ``[count]``, and the cosine with it.
    """
    kept, cosines = np.arange(count), np.ones(count, np.float32)
    for start in range(0, count, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, count))
        unit = load(numbers)
        best, values = search.nearest(unit, threshold)
        new = _new(unit, np.flatnonzero(best < 0), threshold)
        if len(new):
            search.add(numbers[new], unit[new])
            # Those kept in this block come before some of its rows only.
            found, closer = closest(unit, unit[new], threshold, new <= np.arange(len(unit))[:, None])
            better = closer > values
            best[better], values[better] = numbers[new[found[better]]], closer[better]
            best[new], values[new] = numbers[new], 1
        kept[numbers], cosines[numbers] = best, values
        if start % REPORTED > (start + BLOCK) % REPORTED:
            log.info("%d of %d different embeddings are compared", start + len(numbers), count)
    return kept, cosines


def _new(unit: NDArray[np.float32], open: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """The positions to keep in a block, of the ``open`` ones, which are near to none of earlier blocks."""
    products = unit[open] @ unit[open].T
    near = products >= threshold
    row, column = np.nonzero(np.abs(products - np.float32(threshold)) < CLOSE)
    near[row, column] = similarity(unit, unit, (open[row], open[column])) >= np.float32(threshold)
    covered = np.zeros(len(open), bool)
    for place in range(len(open)):
        if not covered[place]:
            covered[place + 1 :] |= near[place, place + 1 :]
    return open[~covered]


class ExactSearch:
    """A comparison with all kept embeddings, ``most`` or fewer; see :class:`KeptSearch`."""

    about = "exact"

    def __init__(self, most: int, dim: int) -> None:
        # The system provides memory for what is written only.
        self._keys, self._numbers, self._count = np.empty((most, dim), np.float32), np.empty(most, np.int64), 0

    def add(self, numbers: NDArray[np.int64], unit: NDArray[np.float32]) -> None:
        """See :meth:`KeptSearch.add`."""
        new = slice(self._count, self._count + len(unit))
        self._keys[new], self._numbers[new] = unit, numbers
        self._count += len(unit)

    def nearest(self, unit: NDArray[np.float32], least: float) -> Nearest:
        """See :meth:`KeptSearch.nearest`."""
        best, cosines = np.full(len(unit), -1), np.full(len(unit), -2, np.float32)
        for start in range(0, self._count, KEYS):
            keys = slice(start, min(start + KEYS, self._count))
            found, values = closest(unit, self._keys[keys], least)
            better = values > cosines
            best[better], cosines[better] = self._numbers[keys][found[better]], values[better]
        return best, cosines


class InvertedSearch:
    """An inverted file of FAISS; see :class:`KeptSearch`.

    It reads as many lists as find an embedding for one that was moved away from it, towards another one, until their
    cosine is ``least``.

    Raises:
        ConfigError: FAISS is not installed.
    """

    def __init__(self, load: Load, count: int, dim: int, least: float) -> None:
        faiss = import_faiss(f"more than {EXACT_ROWS:,} embeddings without --exact")
        self._load, lists = load, lists_for(count)
        self._index = faiss.index_factory(dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        self._index.train(load(np.arange(LEAST * lists) * count // (LEAST * lists)))
        chance = np.random.default_rng(0)
        one, other = (load(chance.integers(count, size=QUERIES)) for _ in range(2))
        aside = other - np.einsum("ij,ij->i", one, other)[:, None] * one
        aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
        moved = np.float32(least) * one + np.float32(np.sqrt(1 - least**2)) * aside
        ranked, own = (self._index.quantizer.search(*each)[1] for each in ((moved, lists), (one, 1)))
        places = np.argmax(ranked == own, axis=1)
        read = self._index.nprobe = int(np.quantile(places, RECALL, method="higher")) + 1
        recall = round(float(np.mean(places < read)), 4)
        self.about = {"library": f"faiss {faiss.__version__}", "lists": lists, "lists_read": read, "recall": recall}
        log.info("%d embeddings: FAISS reads %d of %d lists, recall %s", count, read, lists, recall)

    def add(self, numbers: NDArray[np.int64], unit: NDArray[np.float32]) -> None:
        """See :meth:`KeptSearch.add`."""
        self._index.add_with_ids(unit, numbers)

    def nearest(self, unit: NDArray[np.float32], least: float) -> Nearest:
        """See :meth:`KeptSearch.nearest`."""
        rough, found = self._index.search(unit, CANDIDATES)
        best, cosines = np.full(len(unit), -1), np.full(len(unit), -2, np.float32)
        for number, value in zip(found.T, rough.T, strict=True):
            row = np.flatnonzero((number >= 0) & (value >= least - ROUNDING))
            exact = similarity(unit[row], self._load(number[row]))
            better = (exact > cosines[row]) | ((exact == cosines[row]) & (number[row] < best[row]))
            better &= exact >= np.float32(least)
            best[row[better]], cosines[row[better]] = number[row[better]], exact[better]
        return best, cosines
