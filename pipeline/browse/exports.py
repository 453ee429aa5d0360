"""Rows of a selection as a file: ids, a manifest of them, or a dataset of Hugging Face."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.browse.measures import Progress
from pipeline.browse.opened import OpenedDataset
from pipeline.browse.selection import ROW, Result, Selection, select
from pipeline.core.errors import ConfigError, Problem
from pipeline.core.records import Failure
from pipeline.manifest.manifest import ROOT_KEY
from pipeline.storage.urls import explained

FORMATS = ("parquet", "csv", "manifest", "datasets")
ENDINGS = {"parquet": ".parquet", "csv": ".csv", "manifest": ".manifest.parquet", "datasets": ".images.parquet"}
# Rows written at a time, and fewer of pictures.
ROWS_AT_ONCE, PICTURES_AT_ONCE = 8192, 64


def silent(done: int, total: int) -> None:
    """A progress that nobody watches."""


def export(
    opened: OpenedDataset,
    selection: Selection,
    form: str,
    path: Path,
    *,
    most: int | None = None,
    progress: Progress = silent,
) -> int:
    """Write the rows of a selection to a file; returns their number.

    ``parquet`` and ``csv`` hold id, label, score and the value that orders the rows, ``manifest`` what a job reads,
    ``datasets`` what ``datasets.load_dataset("parquet", data_files=...)`` reads, with the encoded pictures. In an order
    other than the dataset's only the listed rows are written. ``most`` limits the pictures. ``progress`` is called now
    and then, and may raise.

    Raises:
        ConfigError: the form does not exist, or the dataset has no manifest any more.
        StorageError: the file cannot be written.
        PipelineError: see :meth:`OpenedDataset.find`.
    """
    if form not in FORMATS:
        raise ConfigError([Problem("format", form, f"must be one of {', '.join(FORMATS)}")])
    rows, values = _rows_of(opened, selection, progress)
    if form == "datasets" and most is not None and len(rows) > most:
        allowed = f"is for {most:,} pictures at most, and these are {len(rows):,}"
        raise ConfigError(
            [Problem("format", form, allowed, f"this writes them: {command_of(opened, selection, form)}")]
        )
    with explained(str(path)):
        if form == "manifest":
            return _write(path, _manifest(opened, rows), progress)
        if form == "datasets":
            return _write(path, _pictures(opened, rows), progress)
        return _write(path, _tables(opened, rows, values), progress, csv=form == "csv")


def command_of(opened: OpenedDataset, selection: Selection, form: str = "parquet") -> str:
    """The command that writes the same file."""
    words = ["python", "-m", "pipeline.browse", opened.dataset.url, "--export", f"rows{ENDINGS[form]}"]
    words += ["--format", form] * (form not in ("parquet", "csv")) + ["--select", selection.address()]
    return shlex.join(words)


def _rows_of(
    opened: OpenedDataset, selection: Selection, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    result: Result = opened.find(selection, progress)
    if selection.order != ROW or result.total == len(result.rows):
        return result.rows, result.values
    if selection.plain:
        return np.arange(result.total, dtype=np.int64), None
    # More than the page lists.
    ids = opened.members(selection.group) if selection.group else None
    return select(opened.dataset, selection, ids=ids, most=result.total, progress=progress).rows, None


def _tables(opened: OpenedDataset, rows: NDArray[np.int64], values: NDArray[np.float64] | None) -> Iterator[pa.Table]:
    dataset = opened.dataset
    names = [dataset.id, *(name for name in ("label", "score", "status") if name in dataset.schema.names)]
    schema = pa.schema([dataset.schema.field(name).remove_metadata() for name in names])
    for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        table = pa.Table.from_pylist(dataset.rows(some.tolist(), names), schema)
        if values is not None:
            table = table.append_column("order", pa.array(values[start : start + ROWS_AT_ONCE]))
        yield table


def _manifest(opened: OpenedDataset, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Id, image and kept columns of the rows, in the order of the dataset."""
    manifest, _ = opened.pictures.source()
    # Relative paths start there, wherever the new manifest lies.
    about = {ROOT_KEY: manifest.root.encode()} if manifest.image_kind != "bytes" else None
    for table in opened.pictures.manifest_rows(np.sort(rows)):
        yield table.replace_schema_metadata(about)


def _pictures(opened: OpenedDataset, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
    dataset = opened.dataset
    names = [dataset.id, *(name for name in ("label", "score") if name in dataset.schema.names)]
    schema = pa.schema([dataset.schema.field(name).remove_metadata() for name in names])
    image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features: dict[str, Any] = {name: {"dtype": _dtype(schema.field(name).type), "_type": "Value"} for name in names}
    told = json.dumps({"info": {"features": {**features, "image": {"_type": "Image"}}}})
    for start in range(0, max(1, len(rows)), PICTURES_AT_ONCE):
        some = rows[start : start + PICTURES_AT_ONCE].tolist()
        table = pa.Table.from_pylist(dataset.rows(some, names), schema)
        found = [opened.pictures.original(row) for row in some]
        cells = [None if isinstance(each, Failure) else {"bytes": each.data, "path": None} for each in found]
        yield table.append_column(image, pa.array(cells, image.type)).replace_schema_metadata({"huggingface": told})


def _dtype(kind: pa.DataType) -> str:
    """The name of a type in the features of ``datasets``."""
    return {"float": "float32", "double": "float64", "halffloat": "float16"}.get(str(kind), str(kind))


def _write(path: Path, tables: Iterator[pa.Table], progress: Progress, *, csv: bool = False) -> int:
    first = next(tables)
    count = 0
    opened = pc.CSVWriter(path, first.schema) if csv else pq.ParquetWriter(path, first.schema, compression="zstd")
    try:
        with opened as writer:
            for table in chain([first], tables):
                writer.write_table(table)
                count += table.num_rows
                progress(count, 0)
    except BaseException:
        # A file with some of the rows looks like one with all.
        if path.is_file():
            path.unlink()
        raise
    return count
