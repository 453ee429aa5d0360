"""Plain Arrow columns: the same values without views, dictionaries and run ends, which many operations do not take."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.processes import runs_a_command

# Dictionaries of several row groups are joined, for which smaller indices may not suffice.
_INDEX = pa.int32()


def leave_out_pandas() -> None:
    """Keep Arrow from looking for pandas in this process, and so from importing it at the first array.

    Nothing is done where pandas is imported already, or where another program may make a DataFrame.
    """
    if "pandas" in sys.modules or not runs_a_command():
        return
    finder: Any = _WithoutPandas()
    sys.meta_path.insert(0, finder)
    try:
        # Arrow asks once.
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


class _WithoutPandas:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def plain_type(kind: pa.DataType, *, kept: bool = False) -> pa.DataType:
    """The plain type with the same values.

    Views become ``string`` and ``binary``, list views lists, dictionaries and run ends their values, at any depth. Of a
    ``kept`` column of texts or bytes the outermost dictionary stays, with 32-bit indices.
    """
    types = pa.types
    if types.is_dictionary(kind):
        values = plain_type(kind.value_type)
        stays = kept and (types.is_string(values) or types.is_large_string(values) or types.is_binary(values))
        return pa.dictionary(_INDEX, values, kind.ordered) if stays else values
    if types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(_plain_field(kind.value_field))
    if isinstance(kind, pa.BaseExtensionType):
        storage = plain_type(kind.storage_type)
        if storage == kind.storage_type:
            return kind
        return pa.json_(storage) if isinstance(kind, pa.JsonType) else storage
    return kind


def plain_fields(schema: pa.Schema) -> pa.Schema:
    """The schema of a dataset or of its manifest, of which the first column is the id, with plain types."""
    fields = [field.with_type(plain_type(field.type, kept=place > 0)) for place, field in enumerate(schema)]
    return pa.schema(fields, metadata=schema.metadata)


def plain_table(table: pa.Table, known: pa.Schema | None = None, *, kept: bool = False) -> pa.Table:
    """The table with plain columns: with the types of ``known`` if it has them, else with :func:`plain_type`'s."""
    for place, field in enumerate(table.schema):
        kind = _kind(field, known, kept=kept)
        if kind != field.type:
            chunks = [plain_array(chunk, kind) for chunk in table.column(place).chunks]
            table = table.set_column(place, field.with_type(kind), pa.chunked_array(chunks, kind))
    return table


def plain_batch(batch: pa.RecordBatch, known: pa.Schema) -> pa.RecordBatch:
    """The same for a batch."""
    for place, field in enumerate(batch.schema):
        kind = _kind(field, known)
        if kind != field.type:
            batch = batch.set_column(place, field.with_type(kind), plain_array(batch.column(place), kind))
    return batch


def _kind(field: pa.Field, known: pa.Schema | None, *, kept: bool = False) -> pa.DataType:
    if known is not None and field.name in known.names:
        return known.field(field.name).type
    return plain_type(field.type, kept=kept)


def text_bytes(column: pa.Array) -> list[bytes | None]:
    """The cells of a plain column of texts, whose bytes need not be UTF-8."""
    large = pa.types.is_large_string(column.type)
    cells: list[bytes | None] = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    return cells


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; its only chunk is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array


def plain_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values of an array as an array of ``kind``, its plain type."""
    if array.type == kind:
        return array
    try:
        return _converted(array, kind)
    except pa.ArrowNotImplementedError:
        # Rare combinations, such as run ends of views.
        return pa.array(array.to_pylist(), kind)


def _converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    types, given = pa.types, array.type
    if types.is_run_end_encoded(given):
        return plain_array(pc.run_end_decode(array), kind)
    if types.is_dictionary(given) and not types.is_dictionary(kind):
        return plain_array(array.dictionary, kind).take(array.indices)
    if isinstance(given, pa.BaseExtensionType):
        if isinstance(given, pa.UuidType) and types.is_string(kind):
            return pa.array([None if cell is None else str(cell) for cell in array.to_pylist()], kind)
        if not isinstance(kind, pa.BaseExtensionType):
            return plain_array(array.storage, kind)
        return pa.ExtensionArray.from_storage(kind, plain_array(array.storage, kind.storage_type))
    if types.is_struct(given):
        children = [plain_array(child, field.type) for child, field in zip(array.flatten(), kind, strict=True)]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if types.is_list(kind) or types.is_large_list(kind):
        return _plain_list(array, kind)
    if "list_view" in str(given):
        # Arrow 26 casts a list view to an invalid list.
        return pa.array(array.to_pylist(), kind)
    return array.cast(kind)


def read_batches(
    parquet: pq.ParquetFile, group: int, columns: Sequence[str], rows: int, known: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Plain columns of a row group, see :func:`plain_batch`, up to ``rows`` rows at a time.

    Arrow 26 cannot read a struct or a list, nor decode a dictionary, of more than 2 GiB of texts or bytes in these
    rows; such rows come one by one.
    """
    done = 0
    try:
        for batch in _iter_batches(parquet, group, columns, rows):
            yield plain_batch(batch, known)
            done += batch.num_rows
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowCapacityError):
        # Any other error is raised again.
        for row, batch in enumerate(_iter_batches(parquet, group, columns, 1)):
            if row >= done:
                yield plain_batch(batch, known)


def _iter_batches(parquet: pq.ParquetFile, group: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    found: Iterator[pa.RecordBatch] = parquet.iter_batches(
        batch_size=rows, row_groups=[group], columns=list(columns), use_threads=False
    )
    return found


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def _plain_list(array: pa.Array, kind: pa.DataType) -> pa.Array:
    made, width = (pa.LargeListArray, pa.int64()) if pa.types.is_large_list(kind) else (pa.ListArray, pa.int32())
    ends = pc.cumulative_sum(array.value_lengths().fill_null(0).cast(width))
    offsets = pa.concat_arrays([pa.array([0], width), ends])
    values = plain_array(array.flatten(), kind.value_type)
    return made.from_arrays(offsets, values, type=kind, mask=array.is_null())
