"""Near duplicates of a dataset: rows whose embedding is within a threshold of that of a kept row.

Rows are taken in the order in which they are preferred. A row is a duplicate of the nearest row kept so far if their
cosine is at least the threshold; else it is kept itself. A copy that is equal to the last bit goes with the first one.
So every duplicate is within the threshold of the row that stands for it, and no two kept rows are, but for what an
approximate search misses. Groups are no chains, whose ends may show different things. No pairs are stored: a million
pictures that are nearly the same take no more memory than others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError, Problem
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.kept import EXACT_ROWS, ExactSearch, InvertedSearch, KeptSearch, keep
from pipeline.dataset.search import normalised, take_rows
from pipeline.dataset.vectors import vectors_of
from pipeline.storage.local import temporary_folder
from pipeline.storage.urls import explained

FIRST = "first"


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Groups of near duplicates.

    Attributes:
        table: the rows of an analysis of kind ``duplicates``, see :mod:`pipeline.dataset.analysis`.
        parameters: ``threshold``, ``keep`` and ``search``, which is ``exact``, or FAISS's settings and recall.
        counts: ``rows``, those of them ``left_out`` without an embedding, ``embeddings``, ``different`` ones,
            ``groups``, and rows that are ``dropped`` if one of each group is kept.
    """

    table: pa.Table
    parameters: dict[str, Any]
    counts: dict[str, int]


def find_duplicates(dataset: Dataset, threshold: float, rule: str = FIRST, *, exact: bool = False) -> Duplicates:
    """Find the near duplicates of a dataset.

    Embeddings are copied to a temporary file, as they are stored. Memory: 4 bytes for each number of a kept embedding
    with the exact search, 2 with FAISS, and about 100 for each row.

    Args:
        dataset: the dataset; rows without an embedding are left out.
        threshold: the smallest cosine of a duplicate with its kept row, above 0; 1 finds equal embeddings alone.
        rule: the preferred row: ``first`` of the dataset, or ``max:COLUMN`` or ``min:COLUMN``; rows without a value
            come last, and of equal values the first row is preferred.
        exact: compare all, also if there are more than :data:`EXACT_ROWS` different embeddings.

    Raises:
        ConfigError: the threshold or the rule is wrong, or FAISS is needed and not installed.
        StorageError: a part cannot be read, or the temporary file not written.
    """
    if not 0 < threshold <= 1:
        raise ConfigError([Problem("--threshold", threshold, "must be above 0 and at most 1")])
    with _copied(dataset, _column(dataset, rule)) as (rows, stored, digests, values):
        order = np.arange(len(rows))
        if values is not None:
            direction = "descending" if rule.startswith("max:") else "ascending"
            order = pc.array_sort_indices(values, order=direction, null_placement="at_end").to_numpy().astype(np.int64)
        # Equal embeddings are one until the groups are made.
        firsts, alike = _distinct(digests[order])
        heads = order[firsts]

        def load(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
            return normalised(dataset.form.decode(stored[heads[numbers]]))

        kept, cosines, about = np.arange(len(heads)), np.ones(len(heads), np.float32), "exact"
        if threshold < 1:
            approximate = len(heads) > EXACT_ROWS and not exact
            search: KeptSearch = (
                InvertedSearch(load, len(heads), dataset.dim, threshold)
                if approximate
                else ExactSearch(len(heads), dataset.dim)
            )
            kept, cosines = keep(load, len(heads), threshold, search)
            about = search.about
        equal = kept == np.arange(len(heads))
    table = _grouped(rows[order], rows[heads[kept]][alike], cosines[alike], equal[alike])
    groups = len(table) - pc.sum(pc.invert(table["keep"])).as_py() if len(table) else 0
    counts = {
        "rows": dataset.plan.rows,
        "left_out": dataset.plan.rows - len(rows),
        "embeddings": len(rows),
        "different": len(heads),
        "groups": groups,
        "dropped": len(table) - groups,
    }
    parameters = {"threshold": threshold, "keep": rule, "search": about}
    return Duplicates(_with_ids(dataset, table, rule), parameters, counts)


def _grouped(
    rows: NDArray[np.int64], owners: NDArray[np.int64], cosines: NDArray[np.float32], equal: NDArray[np.bool_]
) -> pa.Table:
    """The rows of groups of two or more, which come in the order of preference; the largest group is number 0."""
    owner, first, group, sizes = np.unique(owners, return_index=True, return_inverse=True, return_counts=True)
    place = np.empty(len(owner), np.int64)
    place[np.lexsort((first, -sizes))] = np.arange(len(owner))
    own = rows == owners
    chosen = np.lexsort((rows, ~own, place[group]))
    chosen = chosen[sizes[group[chosen]] > 1]
    columns = {
        "row": rows[chosen],
        "group": place[group[chosen]],
        "size": sizes[group[chosen]].astype(np.int32),
        "keep": own[chosen],
        "similarity": cosines[chosen],
        "equal": equal[chosen],
    }
    return pa.table(columns)


def _with_ids(dataset: Dataset, table: pa.Table, rule: str) -> pa.Table:
    """The columns of the analysis: ids instead of row numbers, and reasons."""
    key = dataset.schema.field(dataset.id)
    ids = take_rows(dataset, table["row"].to_numpy(), [dataset.id])[dataset.id]
    # Groups are in order, and the kept row of each is its first.
    group = table["group"].to_numpy()
    kept_ids = ids.take(pa.array(np.searchsorted(group, group)))
    which, _, column = rule.partition(":")
    preferred = "first row of its group"
    if column:
        preferred = f"{'highest' if which == 'max' else 'lowest'} {column} of its group, then the first row"
    reasons = [
        preferred if keep else "same embedding as the kept row" if equal else f"cosine {cosine:.6g} with the kept row"
        for keep, equal, cosine in zip(
            *(table[name].to_pylist() for name in ("keep", "equal", "similarity")), strict=True
        )
    ]
    fields = [pa.field("kept_id", key.type), pa.field("similarity", pa.float32()), pa.field("reason", pa.string())]
    schema = pa.schema([key, *(table.schema.field(name) for name in ("group", "size", "keep")), *fields])
    columns = [ids, table["group"], table["size"], table["keep"], kept_ids, table["similarity"], reasons]
    return pa.table(columns, schema=schema)


def _column(dataset: Dataset, rule: str) -> str | None:
    """The column that a rule names; None for the order of the rows."""
    if rule == FIRST:
        return None
    which, _, name = rule.partition(":")
    if which not in ("max", "min"):
        raise ConfigError([Problem("--keep", rule, f"must be {FIRST}, max:COLUMN or min:COLUMN")])
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_temporal)
    usable = [field.name for field in dataset.schema if any(is_kind(field.type) for is_kind in kinds)]
    if name not in usable:
        allowed = f"must name a column of numbers or times: {', '.join(usable)}"
        raise ConfigError([Problem("--keep", rule, allowed, "manifest.keep takes columns from the manifest")])
    return name


@contextmanager
def _copied(
    dataset: Dataset, column: str | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.void], pa.Array | None]]:
    """The rows with an embedding: their numbers, embeddings as stored, digests of these, and values of a column.

    Embeddings are in a temporary file that is mapped into memory, so that the system may take that memory back.
    """
    form = dataset.form

    def read(commit: Commit, table: pa.Table) -> tuple[NDArray[np.int64], NDArray[Any], bytes, list[pa.Array]]:
        stored, places = vectors_of(table[dataset.column], form.width)
        stored = np.ascontiguousarray(stored)
        digests = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in stored)
        values = table[column].take(pa.array(places)).chunks if column else []
        return places + dataset.starts[commit.shard], stored, digests, values

    rows, digests, chunks = [np.zeros(0, np.int64)], [], []
    with temporary_folder("a copy of the embeddings") as folder:
        path = folder / "embeddings"
        wanted = [dataset.column, *([column] if column else [])]
        with (
            explained(str(path), needed=dataset.vectors * form.size),
            path.open("wb") as file,
            closing(dataset.each(read, wanted)) as parts,
        ):
            for numbers, stored, digest, values in parts:
                file.write(stored.data)
                rows.append(numbers)
                digests.append(digest)
                chunks += values
        found = np.concatenate(rows)
        shape = (len(found), form.width)
        # An empty file cannot be mapped.
        matrix = np.memmap(path, form.element, "r", shape=shape) if len(found) else np.zeros(shape, form.element)
        kept = pa.concat_arrays(chunks) if chunks else None
        yield found, matrix, np.frombuffer(b"".join(digests), dtype="V16"), kept


def _distinct(digests: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first place of each different digest, in order, and for every place the position in that list."""
    _, first, alike = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return first[order], position[alike]
