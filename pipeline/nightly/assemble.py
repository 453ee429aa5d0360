"""A night's dataset, put together: each row from what was embedded tonight or from the night before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import OUTPUT_COLUMNS
from pipeline.core.concurrency import in_order
from pipeline.core.errors import StorageError
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.parts import METADATA_KEY, PartFormat
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.records import Kind
from pipeline.nightly.rows import Taken, read_rows, rechunk
from pipeline.nightly.store import share
from pipeline.storage.base import Storage
from pipeline.storage.urls import explained, open_arrow


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one shard, by position in it: id and kept columns, and where the rest comes from.

    ``prev`` are rows of the night before; ``embedded`` holds, for each dataset of tonight, the rows in it; -1 is none.
    """

    index: int
    table: pa.Table
    prev: NDArray[np.int64]
    embedded: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a night is put together of; ``again`` are the positions, in tonight's manifest, of the second dataset."""

    target: Manifest
    plan: plan.Plan
    form: PartFormat
    storage: Storage
    previous: Taken | None
    embedded: tuple[Taken, ...]
    again: NDArray[np.int64]


def assemble(work: Assembly, rows: Iterable[pa.RecordBatch], held: lease.Lease) -> tuple[int, int]:
    """Write and share parts until every shard is committed, then ``_SUCCESS``; goes on where it stopped.

    Args:
        work: what it is put together of.
        rows: ``position`` (in tonight's manifest), ``kind``, ``prev`` and ``delta`` of every row of the target.
        held: the lease on the store.

    Returns:
        Parts that are shared with the night before, and parts that were written, as far as this run knows: those that
        an earlier run committed count as shared if the night before has the same bytes.
    """
    storage = work.storage
    plan.settle(storage, work.plan)
    done = commits.find_done(storage, work.plan, held.confirm)

    def step(shard: Shard) -> None:
        held.check()
        if shard.index not in done and not _share(work, shard):
            _write(work, shard)

    with closing(in_order(step, _shards(work, rows), threads=storage.threads)) as steps:
        for _ in steps:
            pass
    settled = commits.read_commits(storage, work.plan, known=done)
    commits.finalize(storage, work.plan, settled, held.confirm)
    before = {commit.sha256 for commit in work.previous.dataset.commits} if work.previous is not None else set()
    shared = sum(commit.sha256 in before for commit in settled)
    return shared, len(settled) - shared


def _shards(work: Assembly, rows: Iterable[pa.RecordBatch]) -> Iterator[Shard]:
    size = work.plan.shard_rows
    pairs = zip(rechunk(read_rows(work.target), size), rechunk(rows, size), strict=True)
    for index, (table, origins) in enumerate(pairs):
        position = origins.column("position").to_numpy()
        prev, delta = (_numbers(origins.column(name)) for name in ("prev", "delta"))
        embedded: tuple[NDArray[np.int64], ...] = (delta,)
        if len(work.again):
            # Rows whose twin could not be read were tried on their own.
            places = np.minimum(np.searchsorted(work.again, position), len(work.again) - 1)
            second = np.where(work.again[places] == position, places, -1)
            embedded = (np.where(second < 0, delta, -1), second)
        yield Shard(index=index, table=table, prev=prev, embedded=embedded[: len(work.embedded)])


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = column.fill_null(-1).to_numpy()
    return numbers


def _share(work: Assembly, shard: Shard) -> bool:
    """Commit a whole part of the night before, if this shard is one, id by id and kept column by kept column."""
    if work.previous is None or shard.prev[0] < 0:
        return False
    dataset, count = work.previous.dataset, len(shard.prev)
    part = int(np.searchsorted(dataset.starts, shard.prev[0]))
    if part == len(dataset.starts) or dataset.starts[part] != shard.prev[0]:
        return False
    commit = dataset.commits[part]
    if commit.rows != count or not np.array_equal(shard.prev, np.arange(shard.prev[0], shard.prev[0] + count)):
        return False
    url = f"{dataset.url.rstrip('/')}/{commit.part}"
    if dataset.storage.size(commit.part) != commit.size:
        raise StorageError(f"{url}: missing or torn; python -m pipeline.verify {dataset.url} --repair does it again")
    names = work.target.schema.names
    with explained(url), open_arrow(url) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        schema = parquet.schema_arrow
        if schema.names != [*names, *OUTPUT_COLUMNS] or not _same_job(schema, work.plan):
            return False
        there = parquet.read(columns=names, use_threads=False).select(names)
    if not there.replace_schema_metadata(None).equals(shard.table.replace_schema_metadata(None)):
        return False
    name = f"part-{shard.index:05d}-{commit.sha256[:16]}.parquet"
    share(dataset.storage, commit.part, work.storage, name)
    commits.commit_shared(work.storage, replace(commit, shard=shard.index, part=name))
    return True


def _same_job(schema: pa.Schema, wanted: plan.Plan) -> bool:
    """Whether a part may stand in the dataset, though it was written for another manifest."""
    prints: dict[str, Any] = json.loads((schema.metadata or {})[METADATA_KEY])
    ours = json.loads(json.dumps(wanted.fingerprints))
    same = all(prints.get(name) == ours.get(name) for name in {*prints, *ours} - {"manifest"})
    return same and (plan.source_of(prints) in wanted.sources or prints.get("manifest") == ours["manifest"])


def _write(work: Assembly, shard: Shard) -> None:
    pieces, places = [], []
    for taken, rows in zip((work.previous, *work.embedded), (shard.prev, *shard.embedded), strict=True):
        here = np.flatnonzero(rows >= 0)
        if taken is not None and len(here):
            pieces.append(taken.take(rows[here]))
            places.append(here)
    order = np.concatenate(places)
    if len(order) != len(shard.prev):
        raise ValueError(f"shard {shard.index}: {len(shard.prev)} rows come from {len(order)} places")
    made = pa.concat_tables(pieces).take(pa.array(np.argsort(order, kind="stable")))
    columns = {name: shard.table.column(name) for name in shard.table.column_names}
    columns |= {name: made.column(name) for name in OUTPUT_COLUMNS}
    schema = work.form.schema
    arrays = [_as(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema).combine_chunks()
    found = Counter(table.column("status").to_pylist())
    counts = {"ok": found.pop("ok", 0), **dict(sorted(found.items()))}
    commits.commit_part(work.storage, shard.index, table, work.form, counts)


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column if column.type == kind else column.cast(kind)


def origins(rows: Iterable[pa.RecordBatch], *, changed: bool) -> Iterator[pa.RecordBatch]:
    """``position``, ``kind``, ``prev`` and ``delta`` of the compared rows; with ``changed`` of those not carried."""
    position = 0
    for batch in rows:
        numbers = pa.array(np.arange(position, position + batch.num_rows))
        position += batch.num_rows
        names = ["kind", "prev", "delta"]
        made = pa.RecordBatch.from_arrays([numbers, *map(batch.column, names)], names=["position", *names])
        if changed:
            made = made.filter(pa.array(batch.column("kind").to_numpy() != Kind.CARRIED))
        yield made
