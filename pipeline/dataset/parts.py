"""One shard's rows as an Arrow table, and that table as Parquet bytes that are the same every time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.records import OK, ShardRows
from pipeline.dataset.plan import Plan, own_columns
from pipeline.dataset.vectors import VectorFormat

METADATA_KEY = b"pipeline"
# Version of the encoding of rows as bytes, part of the fingerprints: raise it when the same rows give other bytes.
LAYOUT = 2
# Characters of an error.
LONGEST_ERROR = 500
# Columns of embeddings.
VECTORS = ("embedding", "text_embedding")
# Rows whose similarity is computed at a time.
ROWS_AT_ONCE = 4096
# Rows in a row group of a part, at most: readers skip, and read side by side, by row groups.
GROUP_ROWS = 32_768


@dataclass(frozen=True, slots=True)
class PartFormat:
    """The schema of every part of a dataset, and the Parquet columns with compression, statistics or a dictionary.

    ``stored`` is the form of embeddings.
    """

    schema: pa.Schema
    stored: VectorFormat
    compression: str
    compressed: tuple[str, ...]
    statistics: tuple[str, ...]
    dictionary: tuple[str, ...]

    @property
    def vectors(self) -> str:
        """Name of the column that ``status`` speaks of: ``text_embedding`` in a dataset of texts alone."""
        return vectors_in(self.schema)


def vectors_in(schema: pa.Schema) -> str:
    """Name of the column of a dataset's embeddings: ``embedding``, or ``text_embedding`` of texts alone."""
    return "embedding" if "embedding" in schema.names else "text_embedding"


def format_of(plan: Plan, manifest_schema: pa.Schema, dim: int) -> PartFormat:
    """The format of a dataset's parts: type and compression are those of the plan's fingerprints.

    Args:
        plan: the dataset's.
        manifest_schema: id and kept columns.
        dim: length of an embedding of the model, or of a stored one.
    """
    output = plan.fingerprints["output"]
    return part_format(
        manifest_schema,
        dim=dim,
        dtype=str(output["dtype"]),
        compression=str(output["compression"]),
        fingerprints=plan.fingerprints,
    )


def part_format(
    manifest_schema: pa.Schema, *, dim: int, dtype: str, compression: str, fingerprints: Mapping[str, Any]
) -> PartFormat:
    """Id and kept columns, then the columns of the pipeline; the fingerprints travel as metadata."""
    stored = VectorFormat.of({**fingerprints.get("output", {}), "dtype": dtype}, dim)
    types = {
        **dict.fromkeys(VECTORS, stored.type),
        "label": pa.string(),
        "top_labels": pa.list_(pa.field("element", pa.string())),
        "top_scores": pa.list_(pa.field("element", pa.float32())),
        "status": pa.string(),
        "error": pa.string(),
    }
    own = own_columns(fingerprints)
    # The score and the similarity, and the scores of heads.
    ours = [pa.field(name, types.get(name, pa.float32())) for name in own]
    text = json.dumps(fingerprints, sort_keys=True, ensure_ascii=False)
    schema = pa.schema([*manifest_schema, *ours], metadata={METADATA_KEY: text.encode()})
    # Embeddings and scores are close to random and ids occur once: a dictionary would make them larger. Statistics of
    # an embedding's numbers help no reader.
    vectors = set(VECTORS) & set(own)
    unlike = {manifest_schema.names[0], *vectors, "top_scores", *(name for name in own if name not in types)}
    if not stored.exact:
        # Parquet has no integers of less than 32 bits; a dictionary of the 256 values stores a byte for each.
        unlike -= vectors
    # Of float32 embeddings zstd saves 8 %, and much of the time goes there: a row of 512 is written in 6.1 microseconds
    # with it and in 3.9 without, and read in 5.0 and 3.0. Of float16 ones it saves 9 % for less (6.1 and 5.1, 3.4 and
    # 2.6), and the levels of their lists, which it packs too, weigh twice as much.
    plain = vectors if dtype == "float32" else set[str]()
    return PartFormat(
        schema=schema,
        stored=stored,
        compression=compression,
        compressed=_leaves(schema, without=plain),
        statistics=_leaves(schema, without=vectors),
        dictionary=_leaves(schema, without=unlike),
    )


@dataclass(frozen=True, slots=True)
class TextVectors:
    """Embeddings of the texts of one shard beside its images: ``[N, width]`` as stored, and rows without one."""

    vectors: NDArray[Any]
    missing: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """Embeddings and labels of one shard, by position in it; rows without an embedding hold zeros.

    ``vectors`` is ``[N, width]`` as they are stored, ``top`` int64 and ``scores`` float32 are ``[N, k]``
    (k is 0 without labels), ``names`` are the label names that ``top`` points at. ``values`` are further columns by
    name, float32 ``[N]``.
    """

    rows: ShardRows
    vectors: NDArray[Any]
    top: NDArray[np.int64]
    scores: NDArray[np.float32]
    names: tuple[str, ...]
    threshold: float | None
    values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    texts: TextVectors | None = None


def build_table(result: ShardResult, form: PartFormat) -> pa.Table:
    """The shard's rows in manifest order."""
    count, failures = result.rows.shard.rows, result.rows.failures
    failed = np.zeros(count, dtype=bool)
    failed[list(failures)] = True
    columns = {name: result.rows.table.column(name) for name in result.rows.table.column_names}
    columns |= {form.vectors: form.stored.column(result.vectors, failed), **_labels(result, failed)}
    columns |= {name: pa.array(values, pa.float32(), mask=failed) for name, values in result.values.items()}
    if result.texts is not None:
        none = failed | result.texts.missing
        columns["text_embedding"] = form.stored.column(result.texts.vectors, result.texts.missing)
        cosines = similarity(form.stored.decode(result.vectors), form.stored.decode(result.texts.vectors))
        columns["similarity"] = pa.array(cosines, pa.float32(), mask=none)
    statuses, errors = [OK] * count, list[str | None]([None]) * count
    for position, failure in failures.items():
        statuses[position], errors[position] = failure.status, short_error(_utf8(failure.error))
    columns |= {"status": pa.array(statuses, pa.string()), "error": pa.array(errors, pa.string())}
    return pa.Table.from_arrays([columns[name] for name in form.schema.names], schema=form.schema)


def similarity(
    images: NDArray[Any], texts: NDArray[Any], pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> NDArray[np.float32]:
    """Cosines of the rows of two ``[N, D]``, float32 ``[N]``: of the vectors as they are stored, computed in float64.

    With ``pairs``, of these rows of ``[N, D]`` and ``[M, D]``. Rows of zeros have none, and get 0.
    """
    count = len(images) if pairs is None else len(pairs[0])
    cosines = np.zeros(count, dtype=np.float32)
    for start in range(0, count, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        left, right = (rows, rows) if pairs is None else (pairs[0][rows], pairs[1][rows])
        one, other = images[left].astype(np.float64), texts[right].astype(np.float64)
        lengths = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
        products = (one * other).sum(axis=1)
        cosines[rows] = np.clip(np.divide(products, lengths, out=products, where=lengths > 0), -1, 1)
    return cosines


def write_part(table: pa.Table, path: Path, form: PartFormat) -> None:
    """Write a part in as few row groups as ``GROUP_ROWS`` allows, of the same length but for the last.

    The same table gives the same bytes with the same version of Arrow.
    """
    groups = max(1, -(-table.num_rows // GROUP_ROWS))
    pq.write_table(
        table,
        path,
        row_group_size=max(1, -(-table.num_rows // groups)),
        # Columns that are not named are left as they are.
        compression=dict.fromkeys(form.compressed, form.compression),
        use_dictionary=list(form.dictionary),
        write_statistics=list(form.statistics),
        version="2.6",
    )


def _leaves(schema: pa.Schema, *, without: set[str]) -> tuple[str, ...]:
    """The paths of Parquet's leaf columns, without those of some fields."""
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    columns = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).schema
    paths = (columns.column(index).path for index in range(len(columns)))
    return tuple(path for path in paths if path.split(".")[0] not in without)


def count_statuses(rows: ShardRows) -> dict[str, int]:
    """Rows by status, ``ok`` first."""
    failed = Counter(failure.status for failure in rows.failures.values())
    return {OK: rows.shard.rows - len(rows.failures), **dict(sorted(failed.items()))}


def short_error(text: str) -> str:
    """A text for the column ``error``: of a longer one than :data:`LONGEST_ERROR`, the beginning and the end."""
    if len(text) <= LONGEST_ERROR:
        return text
    # The end says what happened, behind the address.
    end = LONGEST_ERROR // 2
    return f"{text[: LONGEST_ERROR - end - 5]} ... {text[-end:]}"


def _utf8(text: str) -> str:
    """Replace by question marks what is not UTF-8: file names need not be."""
    return text.encode(errors="replace").decode()


def _labels(result: ShardResult, failed: NDArray[np.bool_]) -> dict[str, pa.Array]:
    count, k = result.top.shape
    if k == 0:
        return {
            "label": pa.nulls(count, pa.string()),
            "score": pa.nulls(count, pa.float32()),
            "top_labels": pa.nulls(count, pa.list_(pa.field("element", pa.string()))),
            "top_scores": pa.nulls(count, pa.list_(pa.field("element", pa.float32()))),
        }
    names = pa.array(result.names, pa.string())
    unsure = failed.copy()
    if result.threshold is not None:
        unsure |= result.scores[:, 0] < result.threshold
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * k)
    mask = pa.array(failed)
    top = names.take(pa.array(result.top.reshape(-1)))
    scores = pa.array(result.scores.reshape(-1), pa.float32())
    return {
        "label": names.take(pa.array(result.top[:, 0], mask=unsure)),
        "score": pa.array(result.scores[:, 0], pa.float32(), mask=failed),
        "top_labels": _lists(offsets, top, mask, pa.string()),
        "top_scores": _lists(offsets, scores, mask, pa.float32()),
    }


def _lists(offsets: pa.Array, values: pa.Array, mask: pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(offsets, values, type=pa.list_(pa.field("element", kind)), mask=mask)
