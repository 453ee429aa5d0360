"""Exact search for the rows nearest to a vector: every embedding is read once, a few parts at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError, NumericalError, Problem
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import similarity
from pipeline.dataset.vectors import VectorFormat, vectors_of

# The error of a float32 product of unit vectors is smaller; candidates this close to the last one are recomputed.
MARGIN = 1e-4
# Rows that are decoded at a time.
BLOCK = 4096
# The same for products of which all that are as close are recomputed.
CLOSE = 5e-6


@dataclass(frozen=True, slots=True)
class Found:
    """The best rows for one query, best first: ``rows`` int64 numbers in the dataset, ``scores`` float64 cosines.

    Equal scores are in the order of the rows.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hit:
    """One row of a result; ``kept`` are its columns from the manifest."""

    rank: int
    score: float
    id: str | int
    label: str | None
    kept: Mapping[str, Any]


def nearest(dataset: Dataset, queries: NDArray[np.float32], count: int) -> list[Found]:
    """The ``count`` rows with the largest inner product with each query, float32 ``[Q, D]`` of length 1.

    Rows and queries have length 1, so this is the cosine. With float16 embeddings the error is up to 0.001. Of binary
    ones, whose numbers are their signs, it is 1 - 2 * h / D between two rows, with h the Hamming distance.
    """
    _check(dataset, queries)

    def best_of(commit: Commit, table: pa.Table) -> list[Found]:
        stored, rows = vectors_of(table[dataset.column], dataset.form.width)
        rough = products(dataset.form, stored, queries)
        numbers = rows + dataset.starts[commit.shard]
        return [
            best(dataset.form, stored, numbers, rough[:, place], query, count) for place, query in enumerate(queries)
        ]

    none = Found(np.zeros(0, np.int64), np.zeros(0))
    results = [none] * len(queries)
    with closing(dataset.each(best_of, [dataset.column])) as parts:
        for part in parts:
            results = [merge([before, found], count) for before, found in zip(results, part, strict=True)]
    return results


def products(form: VectorFormat, stored: NDArray[Any], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products in float32 of rows as stored ``[n, width]`` and queries ``[Q, D]``, as ``[n, Q]``."""
    found = np.empty((len(stored), len(queries)), np.float32)
    torch = _torch_for(stored)
    across = torch.from_numpy(np.array(queries.T)) if torch else queries.T
    for start, block in blocks(form, stored):
        found[start : start + len(block)] = torch.from_numpy(block) @ across if torch else block @ across
    return found


def blocks(form: VectorFormat, stored: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows as stored ``[n, width]``, decoded as float32 ``[m, D]`` a few at a time, and the place of the first.

    A block is small enough for the processor's cache.
    """
    torch = _torch_for(stored)
    for start in range(0, len(stored), BLOCK):
        block = stored[start : start + BLOCK]
        yield start, torch.from_numpy(np.array(block)).float().numpy() if torch else form.decode(block)


def closest(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    least: float = -1,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The key with the largest cosine with each query.

    Products in float32 find candidates, and :func:`similarity` decides between those that are close; of equal ones the
    first key is taken. So the result does not depend on the order of additions in a product of matrices.

    Args:
        queries: ``[Q, D]`` of length 1.
        keys: ``[K, D]`` of length 1, one or more.
        least: the smallest cosine that counts.
        allowed: ``[Q, K]``, which keys a query may have.

    Returns:
        int64 ``[Q]``, the number of the key, or -1 if none has ``least``, and the cosine, float32 ``[Q]``, or -2.
    """
    products = queries @ keys.T
    if allowed is not None:
        products[~allowed] = -2
    best, cosines = np.full(len(queries), -1), np.full(len(queries), -2, np.float32)
    top = products.max(axis=1)
    there = np.flatnonzero(top >= least - CLOSE)
    row, key = np.nonzero(products[there] >= top[there, None] - CLOSE)
    exact = similarity(queries, keys, (there[row], key))
    order = np.lexsort((key, -exact, row))
    first = order[np.unique(row[order], return_index=True)[1]]
    first = first[exact[first] >= np.float32(least)]
    best[there[row[first]]], cosines[there[row[first]]] = key[first], exact[first]
    return best, cosines


def normalised(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Vectors ``[N, D]`` with length 1; those of float16 embeddings are stored with other ones."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    unit = np.empty(vectors.shape, np.float32)
    np.divide(vectors, np.maximum(lengths, 1e-12)[:, None], out=unit, casting="same_kind")
    return unit


def _torch_for(stored: NDArray[Any]) -> Any:
    """PyTorch for numbers of 16 bits, which it converts four times as fast as NumPy, where it is loaded anyway."""
    if stored.dtype != np.float16 or "torch" not in sys.modules:
        return None
    # Another thread may import it now: this waits until it has.
    return import_module("torch")


def merge(found: Sequence[Found], count: int) -> Found:
    """The best ``count`` rows of several results."""
    rows = np.concatenate([each.rows for each in found])
    scores = np.concatenate([each.scores for each in found])
    order = np.lexsort((rows, -scores))[:count]
    return Found(rows=rows[order], scores=scores[order])


def score(stored: NDArray[Any], query: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inner products in float64, computed row by row: equal rows have equal scores at any position."""
    products: NDArray[np.float64] = (stored.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return products


def rescore(dataset: Dataset, rows: NDArray[np.int64], query: NDArray[np.float32], count: int) -> Found:
    """The best ``count`` of some rows; reads their parts."""
    none = Found(np.zeros(0, np.int64), np.zeros(0))

    def of_part(commit: Commit, table: pa.Table) -> Found:
        start = dataset.starts[commit.shard]
        stored, there = vectors_of(table[dataset.column], dataset.form.width)
        chosen = np.isin(there + start, rows)
        return Found(there[chosen] + start, score(dataset.form.decode(stored[chosen]), query))

    found = dataset.each(of_part, [dataset.column], parts=_parts(dataset, rows))
    return merge([none, *found], count)


def fetch(dataset: Dataset, found: Found) -> list[Hit]:
    """The rows of a result with id, label and kept columns; reads their parts, without the embeddings."""
    columns = [dataset.id, *dataset.kept, "label"]

    def take(commit: Commit, table: pa.Table) -> dict[int, dict[str, Any]]:
        start = int(dataset.starts[commit.shard])
        wanted = sorted(int(row) for row in found.rows if start <= row < start + commit.rows)
        taken = table.take(pa.array([row - start for row in wanted], pa.int64())).to_pylist()
        return dict(zip(wanted, taken, strict=True))

    content: dict[int, dict[str, Any]] = {}
    for part in dataset.each(take, columns, parts=_parts(dataset, found.rows)):
        content |= part
    return [
        Hit(
            rank=rank,
            score=value,
            id=content[row][dataset.id],
            label=content[row]["label"],
            kept={name: content[row][name] for name in dataset.kept},
        )
        for rank, (row, value) in enumerate(zip(found.rows.tolist(), found.scores.tolist(), strict=True), 1)
    ]


def take_rows(dataset: Dataset, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """Columns of some rows, in their order; reads their parts."""
    wanted = np.unique(rows)

    def take(commit: Commit, table: pa.Table) -> pa.Table:
        first = dataset.starts[commit.shard]
        here = slice(*np.searchsorted(wanted, [first, first + commit.rows]))
        return table.take(pa.array(wanted[here] - first))

    none = pa.schema([dataset.schema.field(name) for name in columns]).empty_table()
    found = pa.concat_tables([none, *dataset.each(take, columns, parts=_parts(dataset, wanted))])
    return found.take(pa.array(np.searchsorted(wanted, rows)))


def find_row(dataset: Dataset, id: str) -> tuple[int, NDArray[np.float32]]:
    """The number of the row with this id, and its embedding, float32 ``[D]``.

    Raises:
        ConfigError: there is no such row, or it has no embedding.
    """
    kind = dataset.schema.field(dataset.id).type
    try:
        wanted = pa.scalar(int(id) if pa.types.is_integer(kind) else id, kind)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ConfigError([Problem("--id", id, f"the ids of {dataset.url} are {kind}")]) from error

    def look(commit: Commit, table: pa.Table) -> tuple[Commit, int]:
        return commit, int(pc.index(table[dataset.id], wanted).as_py())

    with closing(dataset.each(look, [dataset.id])) as places:
        commit, place = next(((commit, place) for commit, place in places if place >= 0), (None, -1))
    if commit is None:
        raise ConfigError([Problem("--id", id, f"no row of {dataset.url} has this {dataset.id}")])
    row = dataset.read(commit, [dataset.column, "status", "error"]).slice(place, 1)
    stored, _ = dataset.form.load(row[dataset.column])
    if not len(stored):
        values = row.select(["status", "error"]).to_pylist()[0]
        # The status is that of the image, where there is one.
        why = f" ({values['status']}: {values['error']})" if values["error"] else ""
        raise ConfigError([Problem("--id", id, f"has no {dataset.column}{why}")])
    return int(dataset.starts[commit.shard]) + place, stored[0]


def without(found: Found, row: int | None, count: int) -> Found:
    """The best ``count`` rows without one of them."""
    others = found.rows != row
    return Found(found.rows[others][:count], found.scores[others][:count])


def best(
    form: VectorFormat,
    stored: NDArray[Any],
    numbers: NDArray[np.int64],
    rough: NDArray[np.float32],
    query: NDArray[np.float32],
    count: int,
) -> Found:
    """The best ``count`` of rows as stored, whose ``numbers`` and float32 products ``rough`` are given."""
    near = np.arange(len(rough))
    if len(rough) > count:
        near = np.flatnonzero(rough >= np.partition(rough, -count)[-count] - MARGIN)
    return merge([Found(numbers[near], score(form.decode(stored[near]), query))], count)


def _parts(dataset: Dataset, rows: NDArray[np.int64]) -> list[Commit]:
    places = np.unique(np.searchsorted(dataset.starts, rows, side="right") - 1)
    return [dataset.commits[place] for place in places.tolist()]


def _check(dataset: Dataset, queries: NDArray[np.float32]) -> None:
    if queries.shape[1:] != (dataset.dim,) or not np.isfinite(queries).all():
        raise NumericalError(f"queries must be finite float32 [Q, {dataset.dim}], not {queries.shape}")
