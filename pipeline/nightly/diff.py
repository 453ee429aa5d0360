"""Comparison of tonight's rows with those of the previous night: an SQL join by id, on disk beyond the memory limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import install_hint
from pipeline.core.processes import cores
from pipeline.nightly.records import Kind, NightError

# DuckDB spills to its folder beyond this.
MEMORY = "2GB"
GROUP_ROWS = 65_536
# Temporary failures: the file was missing, the disk did not answer.
OF_READING = ("not_found", "permission", "unreadable", "timeout", "outside_root", "address_not_allowed")
OF_DECODING = ("out_of_memory", "decoder_timeout", "decoder_crashed")
# A file that was still being copied; its size and date differ by now, its digest was known from the beginning.
OF_COPYING = ("empty", "truncated")

# Each statement makes a table for the next; of rows with equal bytes, the first is embedded unless the previous night
# has a result (previous_keys).
_STEPS = (
    """
create table matched as
select t.position, t.id, t.key, b.position as prev, b.status as was,
  case when b.id is null then {NEW}
       when {anew} then {ANEW}
       when t.key is not distinct from b.key
        and (list_contains({retried}, b.status) or (t.key is null and b.status <> 'ok')) then {RETRIED}
       when t.key is null or b.key is null or t.key <> b.key then {CHANGED}
       else {CARRIED} end as kind
from tonight t left join before b on t.id = b.id
""",
    """
create table previous_keys as
select b.key, min(b.position) as position from before b
where {shared} and b.status = 'ok' and b.key in (select key from matched where kind in ({NEW}, {CHANGED}))
group by b.key
""",
    """
create table placed as
select m.position, m.id, m.key, m.was,
  case when k.key is not null or f.first <> m.position then {DUPLICATE} else m.kind end as kind,
  case when m.kind = {CARRIED} then m.prev else k.position end as prev, f.first
from matched m
left join previous_keys k on m.kind in ({NEW}, {CHANGED}) and m.key = k.key
left join (
  select key, min(position) as first from matched
  where {digest} and kind in ({NEW}, {CHANGED}, {ANEW}) and key is not null group by key
) f on m.kind in ({NEW}, {CHANGED}, {ANEW}) and m.key = f.key
""",
    """
create table embedded as
select position, row_number() over (order by position) - 1 as delta from placed
where kind not in ({CARRIED}, {DUPLICATE})
""",
)
_RESULT = """
select p.position, p.id, p.key, cast(p.kind as tinyint) as kind, cast(p.prev as bigint) as prev,
  cast(coalesce(e.delta, d.delta) as bigint) as delta, p.was
from placed p
left join embedded e on p.position = e.position
left join embedded d on p.kind = {DUPLICATE} and p.prev is null and p.first = d.position
order by p.position
"""
_DROPPED = "select b.id from before b anti join tonight t on b.id = t.id order by b.position"


@dataclass(frozen=True, slots=True)
class Rule:
    """Comparison settings.

    ``digest``: rows with equal keys are embedded once. ``shared``: the previous night's results count for that too.
    ``retried``: statuses that are tried again. ``anew``: nothing is carried. ``id_type``: the type of the ids.
    """

    digest: bool
    shared: bool
    retried: tuple[str, ...]
    anew: bool
    id_type: pa.DataType


@dataclass(frozen=True, slots=True)
class Compared:
    """Result of a comparison.

    ``rows`` is a Parquet file with ``position`` (the row of the manifest), ``id``, ``key``, ``kind`` (:class:`Kind`),
    ``prev`` (the row of the previous night that holds the result), ``delta`` (the row among the embedded ones, in
    order, that holds it) and ``was`` (the previous status). ``dropped`` is a Parquet file with the ``id`` of the rows
    that left. ``counts`` is rows by kind, in lower case, and ``dropped``.
    """

    rows: Path
    dropped: Path
    counts: dict[str, int]


def compare(tonight: Iterable[pa.RecordBatch], before: Iterable[pa.RecordBatch], rule: Rule, scratch: Path) -> Compared:
    """Compare two nights.

    Args:
        tonight: ``id`` and ``key`` of every row, in order.
        before: ``id``, ``key`` and ``status`` of the previous night; empty for the first one.
        rule: the settings.
        scratch: an empty folder on a local disk, for the database and the result.

    Raises:
        NightError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        way_out = install_hint("nightly")
        raise NightError(f"nights are compared with DuckDB, which is not installed: {way_out}") from error
    words = {kind.name: int(kind) for kind in Kind} | {
        "anew": rule.anew,
        "retried": "[" + ", ".join(f"'{status}'" for status in rule.retried) + "]::varchar[]",
        "digest": rule.digest,
        "shared": rule.digest and rule.shared and not rule.anew,
    }
    rows, dropped = scratch / "rows.parquet", scratch / "dropped.parquet"
    config: dict[str, Any] = {"memory_limit": MEMORY, "temp_directory": str(scratch), "threads": cores()}
    with duckdb.connect(str(scratch / "night.duckdb"), config=config) as database:
        keyed = pa.schema([("position", pa.int64()), ("id", rule.id_type), ("key", pa.string())])
        _load(database, "tonight", tonight, keyed)
        _load(database, "before", before, keyed.append(pa.field("status", pa.string())))
        for step in _STEPS:
            database.execute(step.format(**words))
        database.sql(_RESULT.format(**words)).write_parquet(str(rows), compression="zstd", row_group_size=GROUP_ROWS)
        database.sql(_DROPPED).write_parquet(str(dropped), compression="zstd", row_group_size=GROUP_ROWS)
        found = database.execute("select kind, count(*) from placed group by kind").fetchall()
    counts = {kind.name.lower(): 0 for kind in Kind} | {Kind(kind).name.lower(): count for kind, count in found}
    return Compared(rows, dropped, {**counts, "dropped": pq.read_metadata(dropped).num_rows})


def _load(database: Any, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    def numbered() -> Iterator[pa.RecordBatch]:
        position = 0
        for batch in batches:
            numbers = pa.array(range(position, position + batch.num_rows), pa.int64())
            yield pa.RecordBatch.from_arrays([numbers, *batch.columns], schema=schema)
            position += batch.num_rows

    database.register("incoming", pa.RecordBatchReader.from_batches(schema, numbered()))
    database.execute(f"create table {name} as select * from incoming")
    database.unregister("incoming")
