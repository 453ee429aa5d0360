"""Checks of a part against its commit and the plan: name, size, digest, rows, counts, fingerprints."""

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

from pipeline.dataset.parts import METADATA_KEY, VECTORS, vectors_in
from pipeline.dataset.plan import Plan, own_columns, source_of
from pipeline.dataset.vectors import VectorFormat, other_lengths
from pipeline.storage.base import Storage
from pipeline.storage.retry import retried
from pipeline.storage.urls import explained, open_arrow

# Parts of an object store up to this many bytes are read into memory for the check.
WHOLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a part: its kind in two words, and a sentence."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class PartRecord:
    """The fields of a commit: shard, name of the part, rows, bytes, SHA-256 in hex, rows by status."""

    shard: int
    part: str
    rows: int
    size: int
    sha256: str
    counts: Mapping[str, int]


def prefix_of(shard: int) -> str:
    """The beginning of the name of every part of a shard."""
    return f"part-{shard:05d}-"


# True if a part need not be read, as the storage answers for its bytes.
Proof = Callable[[PartRecord], bool]


def audit(
    storage: Storage, plan: Plan, size_of: Callable[[str], int | None], record: PartRecord, proof: Proof | None
) -> Problem | None:
    """The first problem of a part or of what its commit records, or None.

    Args:
        storage: the dataset.
        plan: its plan.
        size_of: returns the bytes of a file of the dataset, or None if it is missing.
        record: the content of the commit.
        proof: asked whether the storage answers for the bytes, where that is enough; None: the part is read.

    Raises:
        StorageError: the storage does not answer, which is not a problem of the part.
    """
    part, size, sha256 = record.part, record.size, record.sha256
    wanted = min(plan.shard_rows, plan.rows - record.shard * plan.shard_rows) if plan.counted else record.rows
    if not part.startswith(prefix_of(record.shard)):
        return Problem("wrong part", f"the commit names {part}, which is no part of shard {record.shard}")
    there = size_of(part)
    if there is None:
        return Problem("missing part", f"its part {part} is missing")
    if there != size:
        return Problem("wrong size", f"its part {part} has {there} bytes, not {size}")
    if record.rows != wanted:
        return Problem("wrong rows", f"the commit says {record.rows} rows; the plan gives the shard {wanted}")
    total = sum(record.counts.values())
    if total != record.rows:
        return Problem("wrong counts", f"the counts of the commit add up to {total}, not {record.rows} rows")
    if proof is not None and proof(record):
        return None
    # A part in an object store is downloaded once, if it fits into memory beside those of the other threads.
    data = storage.read(part) if size <= WHOLE_BYTES and storage.remote else None
    found = storage.digest(part) if data is None else hashlib.sha256(data).hexdigest()
    if found is None:
        return Problem("missing part", f"its part {part} is missing")
    if found != sha256:
        return Problem("wrong digest", f"its part {part} has another digest: {found[:16]}..., not {sha256[:16]}...")
    url = f"{storage.url}/{part}"
    # A transient error of the storage is retried; it is not damage.
    with explained(url):
        return retried(url, lambda: _audit_content(url, data, plan, record))


def _audit_content(url: str, data: bytes | None, plan: Plan, record: PartRecord) -> Problem | None:
    part = record.part
    try:
        with _open(url, data) as parquet:
            there = parquet.metadata.num_rows
            if there != record.rows:
                return Problem("wrong rows", f"its part {part} has {there} rows, not {record.rows}")
            if problem := _audit_schema(parquet.schema_arrow, plan, part):
                return problem
            if problem := _audit_lengths(parquet, plan, part):
                return problem
            found = _count(parquet)
    except pa.ArrowMemoryError:
        raise
    except pa.ArrowException as error:
        return Problem("unreadable part", f"its part {part} is not readable as Parquet: {error}")
    wanted = {name: count for name, count in record.counts.items() if count}
    if found != wanted:
        return Problem("wrong counts", f"its part {part} holds {_listed(found)}; the commit says {_listed(wanted)}")
    return None


def _audit_schema(schema: pa.Schema, plan: Plan, part: str) -> Problem | None:
    own = own_columns(plan.fingerprints)
    if tuple(schema.names[-len(own) :]) != own:
        return Problem("wrong schema", f"its part {part} has the columns {', '.join(schema.names)}")
    try:
        found = json.loads((schema.metadata or {}).get(METADATA_KEY, b""))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return Problem("wrong fingerprints", f"its part {part} has no fingerprints in its metadata")
    wanted = json.loads(json.dumps(plan.fingerprints))
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    # A shared part has the manifest that it was written for.
    shared = differing == ["manifest"] and source_of(found) in plan.sources
    if differing and not shared:
        return Problem("wrong fingerprints", f"its part {part} is of another job; what differs: {', '.join(differing)}")
    # The id and the kept columns; the image column is second in the fingerprint, and not in the output.
    wanted_names = [name for place, name in enumerate(wanted["manifest"]["columns"]) if place != 1]
    kind = schema.field(vectors_in(schema)).type
    fixed = pa.types.is_fixed_size_list(kind)
    form = VectorFormat.of(wanted["output"], kind.list_size if fixed else 0)
    stored = fixed == form.fixed and (kind.list_size == form.width if fixed else pa.types.is_list(kind))
    stored = stored and kind.value_type == form.type.value_type
    stored = stored and all(schema.field(name).type == kind for name in VECTORS if name in own)
    if schema.names[: -len(own)] != wanted_names or not stored:
        return Problem("wrong schema", f"its part {part} has columns {', '.join(schema.names)}, embeddings of {kind}")
    return None


def _audit_lengths(parquet: pq.ParquetFile, plan: Plan, part: str) -> Problem | None:
    """Compare the length of every embedding where its type does not fix it."""
    form = VectorFormat.of(plan.fingerprints["output"], 0)
    if form.fixed:
        return None
    columns = [name for name in VECTORS if name in own_columns(plan.fingerprints)]
    for batch in parquet.iter_batches(columns=columns, use_threads=False):
        if wrong := [length for column in batch.columns for length in other_lengths(column, form.width)]:
            return Problem("wrong schema", f"its part {part} has an embedding of {wrong[0]} elements, not {form.width}")
    return None


def _count(parquet: pq.ParquetFile) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in parquet.iter_batches(columns=["status"], use_threads=False):
        for entry in batch.column(0).value_counts().to_pylist():
            counts[str(entry["values"])] += entry["counts"]
    return dict(counts)


@contextmanager
def _open(url: str, data: bytes | None) -> Iterator[Any]:
    with open_arrow(url) if data is None else pa.BufferReader(data) as file:
        try:
            yield pq.ParquetFile(file, pre_buffer=False)
        except OSError as error:
            # Arrow raises this for a damaged file too, then without errno; drivers of stores raise subclasses.
            if type(error) is OSError and error.errno is None:
                raise pa.ArrowInvalid(str(error)) from error
            raise


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
