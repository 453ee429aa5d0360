"""Columns of a dataset as columns of PostgreSQL, and their values for a binary COPY."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import Problem, StorageError, short
from pipeline.dataset.databases import json_value
from pipeline.dataset.parts import VECTORS
from pipeline.dataset.vectors import VectorFormat, vectors_of

_TYPES: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_boolean, "bool"),
    (lambda kind: kind in (pa.int8(), pa.int16(), pa.uint8()), "int2"),
    (lambda kind: kind in (pa.int32(), pa.uint16()), "int4"),
    (lambda kind: kind in (pa.int64(), pa.uint32()), "int8"),
    (lambda kind: kind in (pa.float16(), pa.float32()), "float4"),
    (pa.types.is_float64, "float8"),
    (lambda kind: pa.types.is_decimal(kind) or kind == pa.uint64(), "numeric"),
    (pa.types.is_date, "date"),
    (lambda kind: pa.types.is_timestamp(kind) and kind.tz is None, "timestamp"),
    (pa.types.is_timestamp, "timestamptz"),
    (pa.types.is_time, "time"),
    (pa.types.is_duration, "interval"),
    (lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind), "text"),
    (
        lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind),
        "bytea",
    ),
)
# Type of embeddings, operators of an index, and the most dimensions of an index, by the dtype of the dataset.
FORMS = {
    "float32": ("vector", "vector_cosine_ops", 2000),
    "float16": ("halfvec", "halfvec_cosine_ops", 4000),
    "int8": ("halfvec", "halfvec_cosine_ops", 4000),
    "binary": ("bit", "bit_hamming_ops", 64_000),
}
# Bytes of a name, where PostgreSQL cuts longer ones, and numbers of an embedding in pgvector.
LONGEST, MOST = 63, 16_000
NAME = re.compile(r"(?:[A-Za-z_]\w{0,62}\.)?[A-Za-z_]\w{0,62}", re.ASCII)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def sql_type(kind: pa.DataType) -> str:
    """Return the type of PostgreSQL for a type of Arrow: ``jsonb`` for nested ones, arrays for lists of plain ones."""
    for matches, name in _TYPES:
        if matches(kind):
            return name
    if any(matches(kind) for matches in _LISTS) and not any(matches(kind.value_type) for matches in _LISTS):
        inner = sql_type(kind.value_type)
        return inner if inner == "jsonb" else f"{inner}[]"
    return "jsonb"


def problems_of(table: str, columns: pa.Schema, form: VectorFormat, *, index: bool) -> list[Problem]:
    """Return what PostgreSQL or pgvector does not take: a name, a length of embeddings, an index."""
    problems = []
    if not NAME.fullmatch(table):
        problems.append(Problem("--table", table, "must be NAME or SCHEMA.NAME of letters, digits and _"))
    for name in columns.names:
        if len(name.encode()) > LONGEST:
            problems.append(Problem("a column", name, f"is over {LONGEST} bytes, where PostgreSQL cuts names"))
    if form.dim > MOST and form.dtype != "binary":
        problems.append(Problem("DATASET", f"{form.dim} numbers", f"pgvector stores at most {MOST:,}"))
    kind, _, most = FORMS[form.dtype]
    if index and form.dim > most:
        allowed = f"an index of the type {kind} has at most {most:,} dimensions"
        problems.append(Problem("--index", True, allowed, "leave it out, or convert a dataset with output.dims"))
    return problems


def microseconds(schema: pa.Schema) -> pa.Schema:
    """Return the columns with times in microseconds, as PostgreSQL stores them."""

    def cut(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind):
            return pa.timestamp("us", kind.tz)
        if pa.types.is_time64(kind):
            return pa.time64("us")
        return pa.duration("us") if pa.types.is_duration(kind) else kind

    return pa.schema([field.with_type(cut(field.type)) for field in schema])


def rows_of(batch: pa.Table, form: VectorFormat, columns: pa.Schema) -> Iterator[tuple[Any, ...]]:
    """Return the rows of a batch as values for :meth:`psycopg.Copy.write_row`.

    Raises:
        StorageError: a text has the character NUL, which PostgreSQL does not store; names the row.
    """
    batch = batch.cast(columns, safe=False)
    id = columns.names[0]
    values = []
    for field in columns:
        column = batch[field.name]
        if field.name in VECTORS:
            values.append(_vectors(column, form))
            continue
        kind, found = sql_type(field.type), column.to_pylist()
        if kind in ("text", "text[]", "jsonb"):
            for row, value in enumerate(found):
                if _has_nul(value):
                    where = f"{id} = {short(repr(batch[id][row].as_py()))}, column {field.name}"
                    raise StorageError(
                        f"{where}: PostgreSQL cannot store the character NUL in a text; convert to another format, or "
                        "make a dataset without it"
                    )
        if kind == "jsonb":
            found = [json_value(value) for value in found]
        values.append(found)
    return zip(*values, strict=True)


def _vectors(column: pa.ChunkedArray, form: VectorFormat) -> list[bytes | None]:
    """Return embeddings as pgvector reads them: a head with the length, and numbers in the order of the network."""
    stored, rows = vectors_of(column, form.width)
    head = struct.pack(">i", form.dim) if form.dtype == "binary" else struct.pack(">HH", form.dim, 0)
    if form.dtype == "int8":
        stored = form.decode(stored).astype(np.float16)
    data: NDArray[Any] = np.ascontiguousarray(stored.astype(stored.dtype.newbyteorder(">")))
    found: list[bytes | None] = [None] * len(column)
    for place, row in zip(rows.tolist(), data, strict=True):
        found[place] = head + row.tobytes()
    return found


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(map(_has_nul, value)) or any(map(_has_nul, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_nul, value))
