"""The check that every id is there once, before any work starts.

Ids are hashed to 64 bits, 8 bytes a row (an integer id is its own hash), and sorted; only ids whose
hashes meet are looked at again, by value. So the check is exact, and its memory does not depend on how
long the ids are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.addresses import open_arrow
from pipeline.errors import ManifestError
from pipeline.manifest.source import Manifest, example_row

BATCH_ROWS = 65_536


def check_ids(manifest: Manifest) -> None:
    """Read the id column once.

    Raises:
        ManifestError: an id is null or stands twice; the message names the rows.
    """
    hashes = np.empty(manifest.rows, dtype=np.uint64)
    filled = 0
    for where, ids in _ids(manifest):
        if ids.null_count:
            row = pc.index(ids.is_null(), pa.scalar(True)).as_py()
            raise ManifestError(
                f"{_place(manifest, where + row)}: {manifest.id} is null; every row needs an id, or nobody could "
                f"find its embedding{_example(manifest, where + row)}"
            )
        try:
            hashes[filled : filled + len(ids)] = _hash(ids)
        except (UnicodeDecodeError, pa.ArrowException) as error:
            raise ManifestError(
                f"{_place(manifest, where)} or one of the {len(ids) - 1} after it: {manifest.id} is not UTF-8"
            ) from error
        filled += len(ids)
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):
        _explain(manifest, repeated)


def _ids(manifest: Manifest) -> Iterator[tuple[int, pa.Array]]:
    """Batches of the id column, each with the position of its first row."""
    position = 0
    for file in manifest.files:
        with open_arrow(file.url) as handle:
            parquet = pq.ParquetFile(handle, pre_buffer=False)
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[manifest.id]):
                column = batch.column(0)
                yield position, column
                position += len(column)


def _hash(ids: pa.Array) -> np.ndarray:
    if pa.types.is_integer(ids.type):
        numbers = ids.to_numpy(zero_copy_only=False)
        wide: np.ndarray = numbers.astype(np.int64 if numbers.dtype.kind == "i" else np.uint64).view(np.uint64)
        return wide
    hashes: np.ndarray = pd.util.hash_array(ids.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return hashes


def _explain(manifest: Manifest, repeated: np.ndarray) -> None:
    """Raise if two ids are equal; return if only their hashes are."""
    seen: dict[object, int] = {}
    for where, ids in _ids(manifest):
        for offset in np.flatnonzero(np.isin(_hash(ids), repeated)):
            value = ids[int(offset)].as_py()
            row = where + int(offset)
            if value in seen:
                raise ManifestError(
                    f"{manifest.id} {value!r} stands twice: at {_place(manifest, seen[value])} and at "
                    f"{_place(manifest, row)}; ids must be unique{_example(manifest, row)}"
                )
            seen[value] = row


def _place(manifest: Manifest, row: int) -> str:
    url, row = _find(manifest, row)
    return f"{url}, row {row}"


def _example(manifest: Manifest, row: int) -> str:
    return example_row(*_find(manifest, row))


def _find(manifest: Manifest, row: int) -> tuple[str, int]:
    """The file of a row, and the row's position in it."""
    for file in manifest.files:
        if row < file.rows:
            return file.url, row
        row -= file.rows
    raise IndexError(row)
