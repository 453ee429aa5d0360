"""Rows of manifests and datasets by their positions: taken from parts, cut out of manifests, in shards of one size."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import OUTPUT_COLUMNS
from pipeline.core.concurrency import in_order
from pipeline.dataset.commits import Commit
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import METADATA_KEY
from pipeline.dataset.plan import source_of
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.content_keys import FEW_ROWS, MANY_ROWS, scan
from pipeline.storage.base import Storage
from pipeline.storage.urls import explained, open_arrow

# Parts of the night before that stay in memory, in bytes of Arrow.
KEPT_BYTES = 256 << 20
# Row groups of a manifest that is cut out of another one.
GROUP_BYTES = 64 << 20


@dataclass(slots=True)
class Taken:
    """The pipeline's own columns of a dataset, by positions of rows; those parts that were read last are kept."""

    dataset: Dataset
    _kept: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def take(self, positions: NDArray[np.int64]) -> pa.Table:
        """The rows at ``positions``, in that order."""
        parts = np.searchsorted(self.dataset.starts, positions, side="right") - 1
        order, tables = [], []
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            rows = positions[places] - self.dataset.starts[part]
            tables.append(self._read(int(part)).take(pa.array(rows)))
            order.append(places)
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_tables(tables).take(pa.array(back))

    def _read(self, part: int) -> pa.Table:
        with self._lock:
            if part in self._kept:
                self._kept.move_to_end(part)
                return self._kept[part]
        # Rows of a damaged part would get a new digest, and nobody would ever find out.
        table = self.dataset.read(self.dataset.commits[part], OUTPUT_COLUMNS, proven=True)
        with self._lock:
            self._kept[part] = table
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return table


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part says of itself: the manifest that it was written for, and the status of each row."""

    source: str
    statuses: pa.Array


def read_footers(dataset: Dataset) -> Iterator[Footer]:
    """Of every part, in order."""
    return in_order(partial(_footer, dataset), dataset.commits, threads=dataset.storage.threads)


def _footer(dataset: Dataset, commit: Commit) -> Footer:
    url = f"{dataset.url.rstrip('/')}/{commit.part}"
    with explained(url), open_arrow(url) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        prints = json.loads((parquet.schema_arrow.metadata or {})[METADATA_KEY])
        statuses = parquet.read(columns=["status"], use_threads=False).column(0).combine_chunks()
    return Footer(source=source_of(prints), statuses=_whole(statuses))


def read_batches(storage: Storage, name: str, columns: Sequence[str] | None = None) -> Generator[pa.RecordBatch]:
    """A Parquet file of a storage, a few rows at a time."""
    url = f"{storage.url.rstrip('/')}/{name}"
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


def cut_out(
    manifest: Manifest, positions: NDArray[np.int64], columns: Sequence[str], storage: Storage, name: str
) -> None:
    """Write some rows of a manifest, in order, as a manifest of its own.

    Args:
        manifest: the whole one.
        positions: of the rows, ascending.
        columns: to be written.
        storage: where to.
        name: of the file.
    """
    rows = MANY_ROWS if manifest.image_kind == "path" else FEW_ROWS
    names = list(dict.fromkeys(columns))
    writer, waiting, held, at = None, list[pa.RecordBatch](), 0, 0
    with explained(f"{storage.url}/{name}"), storage.staged() as staged:
        # Only row groups that hold one of the rows are read.
        for position, batch in scan(manifest, names, rows=rows, wanted=_ranges(positions)):
            stop = int(np.searchsorted(positions, position + batch.num_rows))
            chosen = batch.select(names).take(pa.array(positions[at:stop] - position))
            at = stop
            waiting.append(chosen)
            held += chosen.nbytes
            writer = writer or pq.ParquetWriter(staged.path, chosen.schema, compression="zstd")
            if held > GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting, held = [], 0
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


def _whole(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
