"""Rows of manifests and datasets by position: read from parts, copied from manifests, cut to shards."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import METADATA_KEY
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.content_keys import FEW_ROWS, MANY_ROWS, scan
from pipeline.nightly.store import url_of
from pipeline.storage.base import Storage
from pipeline.storage.urls import explained, open_arrow

# Parts of a dataset that stay in memory, in bytes.
KEPT_BYTES = 256 << 20
# Row groups of a manifest that is copied from another one, in bytes.
GROUP_BYTES = 64 << 20


class RowReader:
    """The pipeline's own columns of a dataset, by position of the row; the parts read last stay in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        largest = max(commit.size for commit in dataset.commits)
        self._part = lru_cache(maxsize=max(1, KEPT_BYTES // max(1, largest)))(self._read)

    def take(self, positions: NDArray[np.int64]) -> pa.Table:
        """The rows at ``positions``, in that order."""
        parts = np.searchsorted(self.dataset.starts, positions, side="right") - 1
        order, tables = [], []
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            tables.append(self._part(int(part)).take(pa.array(positions[places] - self.dataset.starts[part])))
            order.append(places)
        return in_order_of(tables, order)

    def _read(self, part: int) -> pa.Table:
        # Rows of a damaged part would get a new digest, which would hide the damage for good.
        return self.dataset.read(self.dataset.commits[part], self.dataset.own_columns, proven=True)


def in_order_of(tables: Sequence[pa.Table], places: Sequence[NDArray[np.int64]]) -> pa.Table:
    """Rows of several tables in one, sorted by the place that is given for each of them."""
    order = np.argsort(np.concatenate(places), kind="stable")
    return pa.concat_tables(tables).take(pa.array(order))


def fingerprints_of(schema: pa.Schema) -> dict[str, Any]:
    """The fingerprints in the metadata of a part."""
    found: dict[str, Any] = json.loads((schema.metadata or {})[METADATA_KEY])
    return found


def read_batches(storage: Storage, name: str, columns: Sequence[str] | None = None) -> Generator[pa.RecordBatch]:
    """The rows of a Parquet file of a storage, a few at a time."""
    url = url_of(storage, name)
    with explained(url), open_arrow(url) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        yield from parquet.iter_batches(columns=None if columns is None else list(columns), use_threads=False)


def rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` each; the last may be shorter."""
    waiting: list[pa.RecordBatch] = []
    have = 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, rows - have)
            batch = batch.slice(piece.num_rows)
            waiting.append(piece)
            have += piece.num_rows
            if have == rows:
                yield pa.Table.from_batches(waiting).combine_chunks()
                waiting, have = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def read_rows(manifest: Manifest) -> Iterator[pa.RecordBatch]:
    """Id and kept columns of every row, in order."""
    for _, batch in scan(manifest, manifest.schema.names, rows=MANY_ROWS):
        columns = [batch.column(name) for name in manifest.schema.names]
        yield pa.RecordBatch.from_arrays(columns, schema=manifest.schema)


def copy_rows(
    manifest: Manifest, positions: NDArray[np.int64], columns: Sequence[str], storage: Storage, name: str
) -> None:
    """Write some rows of a manifest, in order, as a manifest of its own.

    Args:
        manifest: the whole manifest.
        positions: of the rows, ascending; at least one.
        columns: the columns to write.
        storage: the storage to write to.
        name: the file name there.
    """
    rows = MANY_ROWS if manifest.image_kind == "path" else FEW_ROWS
    names = list(dict.fromkeys(columns))
    writer, waiting, size, at = None, list[pa.RecordBatch](), 0, 0
    with explained(f"{storage.url}/{name}"), storage.staged() as staged:
        # Row groups without one of the rows are not read.
        for position, batch in scan(manifest, names, rows=rows, wanted=_ranges(positions)):
            stop = int(np.searchsorted(positions, position + batch.num_rows))
            chosen = batch.select(names).take(pa.array(positions[at:stop] - position))
            at = stop
            waiting.append(chosen)
            size += chosen.nbytes
            writer = writer or pq.ParquetWriter(staged.path, chosen.schema, compression="zstd")
            if size > GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting, size = [], 0
        if writer is None:
            raise ValueError("no rows were chosen")
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
        writer.close()
        staged.publish(name, replace=True)


def _ranges(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending positions as ranges of consecutive ones."""
    ends = np.flatnonzero(np.diff(positions) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, ends)] if len(positions) else []
