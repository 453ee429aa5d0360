"""What is wrong with a part: its place, size and digest, its rows and counts, and the job that it says it is of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import OUTPUT_COLUMNS
from pipeline.dataset.parts import METADATA_KEY
from pipeline.dataset.plan import Plan, source_of
from pipeline.storage.base import Storage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, open_arrow

# Parts of a store up to this many bytes are held whole by the threads that look at them.
WHOLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a part: a short name of it, and a sentence."""

    kind: str
    text: str


def prefix_of(shard: int) -> str:
    """What the name of every part of a shard begins with."""
    return f"part-{shard:05d}-"


def audit(
    storage: Storage,
    plan: Plan,
    size_of: Callable[[str], int | None],
    *,
    every_byte: bool,
    shard: int,
    part: str,
    rows: int,
    size: int,
    sha256: str,
    counts: Mapping[str, int],
) -> Problem | None:
    """The first thing wrong with a part, or with what its commit says of it.

    Args:
        storage: the dataset.
        plan: what it is.
        size_of: the bytes of a file of the output, or None if it is not there.
        every_byte: read the part, whatever the storage can prove of it. Else a digest that the storage itself keeps
            with the bytes is enough, if it is that of the commit.
        shard: of the commit, as all that follows.
        part: its name.
        rows: its rows.
        size: its bytes.
        sha256: its digest.
        counts: its rows by status.

    Raises:
        StorageError: the storage does not answer, which says nothing about the part.
    """
    wanted = min(plan.shard_rows, plan.rows - shard * plan.shard_rows)
    if not part.startswith(prefix_of(shard)):
        return Problem("wrong part", f"the commit names {part}, which is no part of shard {shard}")
    there = size_of(part)
    if there is None:
        return Problem("missing part", f"its part {part} is missing")
    if there != size:
        return Problem("wrong size", f"its part {part} has {there} bytes, not {size}")
    if rows != wanted:
        return Problem("wrong rows", f"the commit says {rows} rows; the plan gives the shard {wanted}")
    if sum(counts.values()) != rows:
        return Problem("wrong counts", f"the counts of the commit add up to {sum(counts.values())}, not {rows} rows")
    if not every_byte and storage.proven(part) == sha256:
        return None
    # A part in a store is read once, where it fits into memory beside those of the other threads.
    data = storage.read(part) if size <= WHOLE_BYTES and storage.remote else None
    found = storage.digest(part) if data is None else hashlib.sha256(data).hexdigest()
    if found != sha256:
        if found is None:
            return Problem("missing part", f"its part {part} is missing")
        return Problem("wrong digest", f"its part {part} has another digest: {found[:16]}..., not {sha256[:16]}...")
    url = f"{storage.url}/{part}"
    # A fault that may pass is no damage.
    with explained(url):
        return retried(url, lambda: _look_into(url, data, plan, part, rows, counts))


def _look_into(
    url: str, data: bytes | None, plan: Plan, part: str, rows: int, counts: Mapping[str, int]
) -> Problem | None:
    try:
        with _opened(url, data) as parquet:
            there = parquet.metadata.num_rows
            if there != rows:
                return Problem("wrong rows", f"its part {part} has {there} rows, not {rows}")
            if problem := _audit_schema(parquet.schema_arrow, plan, part):
                return problem
            statuses = _count(parquet)
    except pa.ArrowMemoryError:
        raise
    except pa.ArrowException as error:
        return Problem("unreadable part", f"its part {part} is not readable as Parquet: {error}")
    told = {name: count for name, count in counts.items() if count}
    if statuses != told:
        return Problem("wrong counts", f"its part {part} holds {_listed(statuses)}; the commit says {_listed(told)}")
    return None


def _audit_schema(schema: pa.Schema, plan: Plan, part: str) -> Problem | None:
    if tuple(schema.names[-len(OUTPUT_COLUMNS) :]) != OUTPUT_COLUMNS:
        return Problem("wrong schema", f"its part {part} has the columns {', '.join(schema.names)}")
    try:
        prints = json.loads((schema.metadata or {}).get(METADATA_KEY, b""))
    except ValueError:
        prints = None
    if not isinstance(prints, dict):
        return Problem("wrong fingerprints", f"its part {part} has no fingerprints in its metadata")
    wanted = json.loads(json.dumps(plan.fingerprints))
    differing = sorted(name for name in {*prints, *wanted} if prints.get(name) != wanted.get(name))
    # A part that was shared says of which manifest it was when it was written.
    shared = differing == ["manifest"] and source_of(prints) in plan.sources
    if differing and not shared:
        return Problem("wrong fingerprints", f"its part {part} is of another job; what differs: {', '.join(differing)}")
    # The id and the kept columns; the image's own stands second in the fingerprint, and not in the output.
    wanted_names = [name for place, name in enumerate(wanted["manifest"]["columns"]) if place != 1]
    kind, dtype = schema.field("embedding").type, str(wanted["output"]["dtype"])
    stored = pa.types.is_fixed_size_list(kind) and kind.value_type == pa.type_for_alias(dtype)
    if schema.names[: -len(OUTPUT_COLUMNS)] != wanted_names or not stored:
        return Problem("wrong schema", f"its part {part} has columns {', '.join(schema.names)}, embeddings of {kind}")
    return None


def _count(parquet: pq.ParquetFile) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in parquet.iter_batches(columns=["status"], use_threads=False):
        for entry in batch.column(0).value_counts().to_pylist():
            counts[str(entry["values"])] += entry["counts"]
    return dict(counts)


@contextmanager
def _opened(url: str, data: bytes | None) -> Iterator[Any]:
    with open_arrow(url) if data is None else pa.BufferReader(data) as file:
        try:
            yield pq.ParquetFile(file, pre_buffer=False)
        except OSError as error:
            # Arrow tells of a damaged file so too, then without a number of the system's; drivers of stores raise
            # classes of their own.
            if type(error) is OSError and error.errno is None:
                raise pa.ArrowInvalid(str(error)) from error
            raise


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
