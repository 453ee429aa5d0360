"""Conversion of a finished dataset to NumPy, FAISS, Hugging Face ``datasets`` or Lance.

Rows without an embedding are left out and counted. The folder is written under a temporary name, flushed and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError, Problem, install_hint
from pipeline.core.records import OK
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.index import TRAINED, import_faiss, lists_for, spread
from pipeline.dataset.parts import VECTORS
from pipeline.dataset.portable import converted, for_datasets, with_wide_decimals
from pipeline.dataset.vectors import vectors_of
from pipeline.storage.local import appearing
from pipeline.storage.urls import explained, within

NOTE = "conversion.json"


@dataclass(frozen=True, slots=True)
class Conversion:
    """Metadata of a conversion; ``left_out`` rows have no embedding, ``source`` is the dataset's digests."""

    format: str
    dataset: str
    source: dict[str, str]
    rows: int
    left_out: int
    dim: int
    dtype: str
    files: list[str]


def convert(dataset: Dataset, to: str, out: Path, *, ivf: bool = False) -> Conversion:
    """Write the dataset's embeddings and columns into the folder ``out``.

    Args:
        dataset: the dataset to convert.
        to: one of :data:`FORMATS`.
        out: a local folder that does not exist or is empty.
        ivf: for FAISS, an inverted file instead of the exact flat index.

    Raises:
        ConfigError: the folder is not empty, the format's package is not installed, or no row has an embedding.
        StorageError: it cannot be written.
    """
    out = Path(os.path.expanduser(out)).resolve()
    problems = []
    if within(str(out), dataset.address):
        problems.append(Problem("--out", str(out), "lies in the dataset, whose readers would read it as rows"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(Problem("--out", str(out), "must be a folder that is not there yet", "name another one"))
    if not dataset.vectors:
        problems.append(Problem("DATASET", dataset.url, "no row has an embedding, so there is nothing to convert"))
    if ivf and dataset.form.dtype == "binary":
        allowed = "is for floats; binary embeddings get an exact index, which compares bits"
        problems.append(Problem("--ivf", True, allowed, "leave it out"))
    if problems:
        raise ConfigError(problems)
    write = FORMATS[to]
    with explained(str(out)), appearing(out) as folder:
        write(dataset, folder, ivf)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        made = Conversion(
            format=to,
            dataset=dataset.address,
            source=dataset.fingerprint,
            rows=dataset.vectors,
            left_out=dataset.plan.rows - dataset.vectors,
            dim=dataset.dim,
            dtype=dataset.form.dtype,
            files=files,
        )
        (folder / NOTE).write_text(json.dumps(asdict(made), indent=2) + "\n")
    return made


def _to_numpy(dataset: Dataset, folder: Path, ivf: bool) -> None:
    """``embeddings.npy``, ``ids.npy`` ``[N]``, and the other columns in ``metadata.parquet``, row by row.

    Embeddings are as they are stored: ``[N, D]``, and uint8 ``[N, D / 8]`` for binary ones. Beside images, those of
    texts are in ``text_embeddings.npy``, with NaN where a row has no text; of int8 and binary, zeros.
    """
    count, kind, form = dataset.vectors, _id_type(dataset), dataset.form
    shape = (count, form.width)
    with (
        _array(folder / "embeddings.npy", shape, form.element) as matrix,
        _array(folder / "ids.npy", (count,), kind) as ids,
        closing(_rows(dataset)) as tables,
        _metadata(dataset, folder) as metadata,
        _text_array(dataset, folder / "text_embeddings.npy", shape) as texts,
    ):
        for table in tables:
            texts(table)
            matrix(vectors_of(table[dataset.column], form.width)[0])
            ids(table[dataset.id].to_numpy())
            metadata(table)


def _to_faiss(dataset: Dataset, folder: Path, ivf: bool) -> None:
    """``vectors.faiss``, whose row i is row i of ``metadata.parquet``; the index is in memory until it is written."""
    faiss = import_faiss("--to")
    if dataset.form.dtype == "binary":
        _to_binary_faiss(dataset, folder, faiss)
        return
    lists = lists_for(dataset.vectors)
    index = faiss.index_factory(dataset.dim, f"IVF{lists},Flat" if ivf else "Flat", faiss.METRIC_INNER_PRODUCT)
    if ivf:
        index.train(spread(dataset, min(dataset.vectors, TRAINED * lists))[0])
    with closing(_rows(dataset)) as tables, _metadata(dataset, folder) as metadata:
        for table in tables:
            index.add(np.ascontiguousarray(dataset.form.load(table[dataset.column])[0]))
            metadata(table)
    faiss.write_index(index, str(folder / "vectors.faiss"))


def _to_binary_faiss(dataset: Dataset, folder: Path, faiss: Any) -> None:
    """``vectors.faiss`` for ``faiss.read_index_binary``: the exact flat index by Hamming distance."""
    index = faiss.IndexBinaryFlat(dataset.dim)
    with closing(_rows(dataset)) as tables, _metadata(dataset, folder) as metadata:
        for table in tables:
            index.add(np.ascontiguousarray(vectors_of(table[dataset.column], dataset.form.width)[0]))
            metadata(table)
    faiss.write_index_binary(index, str(folder / "vectors.faiss"))


def _to_datasets(dataset: Dataset, folder: Path, ivf: bool) -> None:
    """Parquet files and a dataset card for ``datasets.load_dataset(folder)`` and the hub."""
    data = folder / "data"
    data.mkdir()
    total = sum(commit.counts.get(OK, 0) > 0 for commit in dataset.commits)
    schema = for_datasets(without_status(dataset))
    with closing(_rows(dataset)) as tables:
        # The library does not read a file without rows.
        for number, table in enumerate(table for table in tables if table.num_rows):
            pq.write_table(
                converted(table, schema),
                data / f"train-{number:05d}-of-{total:05d}.parquet",
                compression="zstd",
                use_dictionary=["label", "top_labels.list.element"],
                row_group_size=1024,
            )
    (folder / "README.md").write_text(_card(dataset))


def _to_lance(dataset: Dataset, folder: Path, ivf: bool) -> None:
    """A Lance table, ``vectors.lance``."""
    try:
        import lance
    except ImportError as error:
        allowed = f"pylance is not installed ({error})"
        raise ConfigError([Problem("--to", "lance", allowed, install_hint("lance"))]) from error
    schema = with_wide_decimals(without_status(dataset)).remove_metadata()
    # Lance searches in lists of a fixed length only.
    place = schema.get_field_index("embedding")
    schema = schema.set(place, schema.field(place).with_type(replace(dataset.form, fixed=True).type))
    failed: list[BaseException] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for table in tables:
                yield from converted(table, schema).to_batches()
        except BaseException as error:
            failed.append(error)
            raise

    with closing(_rows(dataset)) as tables:
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        try:
            lance.write_dataset(reader, str(folder / "vectors.lance"))
        except Exception:
            # Lance passes on only the text of an error of the reader.
            if failed:
                raise failed[0] from None
            raise


FORMATS: dict[str, Callable[[Dataset, Path, bool], None]] = {
    "numpy": _to_numpy,
    "faiss": _to_faiss,
    "datasets": _to_datasets,
    "lance": _to_lance,
}


def without_status(dataset: Dataset) -> pa.Schema:
    """Return the columns of a conversion: all but those of rows without an embedding."""
    fields = [field for field in dataset.schema if field.name not in ("status", "error")]
    return pa.schema(fields, metadata=dataset.schema.metadata)


def _rows(dataset: Dataset) -> Generator[pa.Table, None, None]:
    """The rows of every part that have an embedding, with all columns."""
    with closing(dataset.stream(dataset.schema.names)) as tables:
        for table in tables:
            yield table.filter(pc.is_valid(table[dataset.column]))


def _id_type(dataset: Dataset) -> np.dtype[Any]:
    """NumPy's type for the ids: the integer type, or text of the longest id's width; reads the ids."""
    kind = dataset.schema.field(dataset.id).type
    if pa.types.is_integer(kind):
        integer: np.dtype[Any] = np.dtype(str(kind))
        return integer

    def longest(commit: object, table: pa.Table) -> int:
        return int(pc.max(pc.utf8_length(table[dataset.id])).as_py() or 0)

    return np.dtype(f"<U{max(1, *dataset.each(longest, [dataset.id]))}")


@contextmanager
def _array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Callable[[NDArray[Any]], object]]:
    """Write a ``.npy`` file by a function that takes the next rows.

    A memory-mapped file is not used: a write to it on a full disk kills the process.
    """
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, described)
        yield lambda rows: file.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())


@contextmanager
def _text_array(dataset: Dataset, path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[pa.Table], object]]:
    """Write the embeddings of texts beside images, by a function that takes the next table; nothing without them."""
    name = "text_embedding"
    if name not in dataset.own_columns or dataset.column == name:
        yield lambda table: None
        return
    form = dataset.form
    with _array(path, shape, form.element) as write:

        def add(table: pa.Table) -> None:
            rows = np.full((table.num_rows, form.width), np.nan if form.exact else 0, dtype=form.element)
            vectors, there = vectors_of(table[name], form.width)
            rows[there] = vectors
            write(rows)

        yield add


@contextmanager
def _metadata(dataset: Dataset, folder: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Write ``metadata.parquet``, all columns but the embeddings, by a function that takes the next table."""
    unwanted = {*(name for name in VECTORS if name in dataset.own_columns), "status", "error"}
    left = [name for name in dataset.schema.names if name not in unwanted]
    schema = pa.schema([dataset.schema.field(name) for name in left], metadata=dataset.schema.metadata)
    with pq.ParquetWriter(folder / "metadata.parquet", schema, compression="zstd") as writer:
        yield lambda table: writer.write_table(table.select(left).cast(schema)) if table.num_rows else None


def _card(dataset: Dataset) -> str:
    """The text of a dataset card for the hub."""
    about = dataset.plan.about
    return f"""\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# {dataset.url.rstrip("/").rsplit("/", 1)[-1]}

{dataset.vectors:,} embeddings of length {dataset.dim}, L2-normalised, stored as {dataset.form.dtype}, with zero-shot
labels. Model: `{about.get("model", "unknown")}`. Rows without an embedding are left out:
{dataset.plan.rows - dataset.vectors:,}.

```python
from datasets import load_dataset

rows = load_dataset("<this folder>", split="train").with_format("numpy")
```
"""
