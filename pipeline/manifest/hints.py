"""Hints for columns that a manifest lacks, and the refusal of text in a column of images."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.extensions import EXTENSIONS, extension_of
from pipeline.core.errors import ManifestError
from pipeline.storage.urls import open_arrow

# Rows of a file that are searched for a column of unique values, and columns that are looked at.
_SEARCHED_ROWS, _SEARCHED_COLUMNS = 2_000_000, 8
# Cells of an image column that are looked at, and the longest path among them.
_CELLS, _LONGEST_PATH = 16, 4096
_USUAL_IDS = ("id", "key", "sku", "name")


def for_missing(url: str, schema: pa.Schema, key: str, name: str) -> str:
    """The remedy for a column that a file lacks, as the end of a message; empty if none is known.

    Args:
        url: the file.
        schema: its schema.
        key: the key that names the column: ``manifest.id``, ``manifest.image`` or ``manifest.keep``.
        name: the column.
    """
    partition = next((part for part in url.split("/")[:-1] if part.startswith(f"{name}=")), None)
    if partition is not None:
        folder = f"{url.partition(f'/{partition}/')[0]}/**/*.parquet"
        return (
            f"; {name} is the name of a folder ({partition}), not a column of the files: leave it out, or write it "
            f"into them: duckdb -c \"copy (from read_parquet('{folder}', hive_partitioning=true)) "
            "to 'manifest.parquet'\""
        )
    if key == "manifest.image":
        images = [field for field in schema if pa.types.is_struct(field.type) or _is_bytes(field.type)]
        return f"; {images[0].name} may hold the images: manifest.image={images[0].name}" if len(images) == 1 else ""
    if key == "manifest.id":
        found = _unique_column(url, schema)
        if found:
            return f"; the values of {found} are unique in this file: manifest.id={found}"
        reason = "files of Hugging Face datasets have no ids" if b"huggingface" in (schema.metadata or {}) else ""
        return (
            f'; {reason or "no column of this file has unique values"}: number the rows, such as: python -c "import '
            f"pyarrow as pa, pyarrow.parquet as pq; t = pq.read_table('{url}'); "
            "pq.write_table(t.add_column(0, 'id', pa.array(range(len(t)))), 'manifest.parquet')\""
        )
    return ""


def refuse_text(url: str, column: str) -> None:
    """Refuse a binary column of images whose first cells hold paths or URLs as text.

    Raises:
        ManifestError: every row would fail.
    """
    try:
        with open_arrow(url) as handle:
            parquet = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False)
            batches = parquet.iter_batches(_CELLS, columns=[column], use_threads=False)
            batch = next((batch for batch in batches if batch.num_rows), None)
            cells = batch.column(0).to_pylist() if batch is not None else []
    except (pa.ArrowException, OSError):
        # A damaged file is reported with its row group by what reads all of it.
        return
    found = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    texts = [_path_of(cell) for cell in found if cell]
    if texts and all(texts):
        raise ManifestError(
            f"{url}: manifest.image={column} is a column of bytes, but holds text such as {texts[0]!r}; for paths and "
            f"URLs write it as text: table.set_column(table.column_names.index('{column}'), '{column}', "
            f"table['{column}'].cast('string'))"
        )


def _path_of(cell: bytes) -> str:
    """The path or URL that a cell holds as text; empty if it holds anything else."""
    if len(cell) > _LONGEST_PATH:
        return ""
    try:
        text = cell.decode()
    except UnicodeDecodeError:
        return ""
    path = text.partition("?")[0].partition("#")[0]
    return text if text.isprintable() and ("://" in text or extension_of(path) in EXTENSIONS) else ""


def _unique_column(url: str, schema: pa.Schema) -> str:
    """The name of a column of texts or integers without a null and without a repeated value; empty for none."""
    fields = [field for field in schema if pa.types.is_integer(field.type) or _is_text(field.type)]
    # Columns that are usually ids first; one of paths, which may be the images, last.
    order = sorted(fields, key=lambda field: (not any(word in field.name.lower() for word in _USUAL_IDS), field.name))
    try:
        with open_arrow(url) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            rows = parquet.metadata.num_rows
            for field in order[:_SEARCHED_COLUMNS] if 1 < rows <= _SEARCHED_ROWS else ():
                values = parquet.read(columns=[field.name], use_threads=False).column(0)
                if _is_text(field.type):
                    values = values.cast(pa.large_string())
                if not values.null_count and pc.count_distinct(values).as_py() == rows:
                    return str(field.name)
    except (pa.ArrowException, OSError):
        # The message is about the missing column, which it names in any case.
        return ""
    return ""


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
