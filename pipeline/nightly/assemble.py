"""Assembly of a night's dataset from rows that were embedded tonight and rows of the previous night."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.concurrency import in_order
from pipeline.core.errors import StorageError
from pipeline.core.plain import plain_table
from pipeline.dataset import commits, lease, plan
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.parts import PartFormat, format_of
from pipeline.dataset.saved_config import with_backend_of
from pipeline.manifest.manifest import Manifest
from pipeline.nightly.embed import EmbeddedRows
from pipeline.nightly.prepare import PendingNight, Target
from pipeline.nightly.records import Kind
from pipeline.nightly.rows import RowReader, fingerprints_of, in_order_of, read_rows, rechunk
from pipeline.nightly.store import open_night, share_file, url_of
from pipeline.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one shard: id and kept columns, and for each reader the rows to take from it, or -1 for none."""

    index: int
    table: pa.Table
    sources: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Inputs of the assembly; ``readers`` read the previous night (None without one), then the embedded rows."""

    manifest: Manifest
    plan: plan.Plan
    form: PartFormat
    storage: Storage
    readers: tuple[RowReader | None, ...]


def assemble(pending: PendingNight, target: Target, embedded: EmbeddedRows, held: lease.Lease) -> int:
    """Write or share parts until every shard is committed, then write ``_SUCCESS``; continue an earlier run.

    Returns:
        The number of parts that the previous night has too, byte for byte; an earlier run may have shared them.
    """
    previous = None
    if pending.snapshot and pending.carried_from is not None:
        previous = open_dataset(open_night(pending.store, pending.carried_from.date).url)
    work, storage = _assembly(pending, target, embedded, previous), pending.output
    plan.write_once(storage, work.plan)
    done = commits.find_done(storage, work.plan, held.confirm)

    def step(shard: Shard) -> None:
        held.check()
        if shard.index not in done and not (previous is not None and _share_part(work, previous, shard)):
            _write_part(work, shard)

    shards = _shards(work, _origins(pending), embedded.retried)
    with closing(in_order(step, shards, threads=storage.threads)) as steps:
        for _ in steps:
            pass
    committed = commits.read_commits(storage, work.plan, known=done)
    commits.finalize(storage, work.plan, committed, held.confirm)
    before = {commit.sha256 for commit in previous.commits} if previous is not None else set()
    return sum(commit.sha256 in before for commit in committed)


def _assembly(pending: PendingNight, target: Target, embedded: EmbeddedRows, previous: Dataset | None) -> Assembly:
    from pipeline.engine.batch_size import known_size
    from pipeline.engine.shard_size import with_shard_rows
    from pipeline.models.checkpoint import open_checkpoint

    manifest = target.manifest
    sample = next(dataset for dataset in (*embedded.datasets, previous) if dataset is not None)
    config = with_backend_of(target.config, sample.plan.config)
    if not config.manifest.shard_rows:
        config = with_shard_rows(config, open_checkpoint(config.model), manifest, pending.output)
    # The batch size of the main job over the whole manifest; that over few rows is smaller.
    size = known_size(config, manifest.rows) or int(sample.plan.fingerprints["batch_size"])
    fingerprints = {
        **sample.plan.fingerprints,
        "manifest": manifest.fingerprint,
        "batch_size": min(size, config.manifest.shard_rows, manifest.rows),
    }
    sources = set[str]()
    if previous is not None and pending.previous is not None:
        sources = {*pending.previous.sources, plan.source_of(previous.plan.fingerprints)}
    planned = plan.new_plan(config, fingerprints, rows=manifest.rows, sources=sorted(sources))
    wanted = plan.settle(pending.output, planned)
    return Assembly(
        manifest=manifest,
        plan=wanted,
        form=format_of(wanted, manifest.schema, sample.dim),
        storage=pending.output,
        readers=tuple(RowReader(each) if each is not None else None for each in (previous, *embedded.datasets)),
    )


def _origins(pending: PendingNight) -> Iterator[pa.RecordBatch]:
    """The compared rows that the dataset holds."""
    for batch in pending.compared("position", "kind", "prev", "delta"):
        yield batch if pending.snapshot else batch.filter(pc.not_equal(batch["kind"], int(Kind.CARRIED)))


def _shards(work: Assembly, origins: Iterable[pa.RecordBatch], retried: NDArray[np.int64]) -> Iterator[Shard]:
    size = work.plan.shard_rows
    pairs = zip(rechunk(read_rows(work.manifest), size), rechunk(origins, size), strict=True)
    for index, (table, origin) in enumerate(pairs):
        previous, first = (origin.column(name).fill_null(-1).to_numpy() for name in ("prev", "delta"))
        second = np.full(len(first), -1)
        if len(retried):
            # Duplicates of rows that could not be read have results of their own.
            position = origin.column("position").to_numpy()
            places = np.minimum(np.searchsorted(retried, position), len(retried) - 1)
            second = np.where(retried[places] == position, places, -1)
            first = np.where(second < 0, first, -1)
        yield Shard(index, table, (previous, first, second)[: len(work.readers)])


def _share_part(work: Assembly, previous: Dataset, shard: Shard) -> bool:
    """Commit a part of the previous night if it holds exactly this shard: the same ids and kept columns in order."""
    rows = shard.sources[0]
    part = int(np.searchsorted(previous.starts, rows[0]))
    if rows[0] < 0 or part == len(previous.starts) or previous.starts[part] != rows[0]:
        return False
    commit = previous.commits[part]
    if commit.rows != len(rows) or not np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return False
    names = work.manifest.schema.names
    # Some readers do not take parts with several encodings of one column.
    if previous.encoded or previous.schema.names != [*names, *previous.own_columns]:
        return False
    if previous.storage.size(commit.part) != commit.size:
        url = url_of(previous.storage, commit.part)
        raise StorageError(f"{url}: missing or torn; python -m pipeline.verify {previous.url} --repair does it again")
    there = previous.read(commit, names)
    if not _same_job(fingerprints_of(there.schema), work.plan):
        return False
    # Equal values of a dictionary column may have other indices.
    one, other = (plain_table(table.replace_schema_metadata(None)) for table in (there, shard.table))
    if not one.equals(other):
        return False
    name = f"part-{shard.index:05d}-{commit.sha256[:16]}.parquet"
    share_file(previous.storage, commit.part, work.storage, name)
    commits.commit_shared(work.storage, replace(commit, shard=shard.index, part=name))
    return True


def _same_job(found: Mapping[str, Any], wanted: plan.Plan) -> bool:
    """True if a part's fingerprints allow it in the dataset; its manifest may be a known earlier one."""
    ours = json.loads(json.dumps(wanted.fingerprints))
    same = all(found.get(name) == ours.get(name) for name in {*found, *ours} - {"manifest"})
    return same and (plan.source_of(found) in wanted.sources or found.get("manifest") == ours["manifest"])


def _write_part(work: Assembly, shard: Shard) -> None:
    pieces, places = [], []
    for reader, rows in zip(work.readers, shard.sources, strict=True):
        here = np.flatnonzero(rows >= 0)
        if reader is not None and len(here):
            pieces.append(reader.take(rows[here]))
            places.append(here)
    found = sum(map(len, places))
    if found != shard.table.num_rows:
        raise ValueError(f"shard {shard.index}: {shard.table.num_rows} rows come from {found} places")
    made = in_order_of(pieces, places)
    columns = {name: shard.table.column(name) for name in shard.table.column_names}
    columns |= {name: made.column(name) for name in plan.own_columns(work.plan.fingerprints)}
    schema = work.form.schema
    table = pa.Table.from_arrays([_as(columns[field.name], field.type) for field in schema], schema=schema)
    table = table.combine_chunks()
    statuses = Counter(table["status"].to_pylist())
    counts = {"ok": statuses.pop("ok", 0), **dict(sorted(statuses.items()))}
    commits.commit_part(work.storage, shard.index, table, work.form, counts)


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column if column.type == kind else column.cast(kind)
