"""The check that ids are unique, before any work starts.

Ids are hashed to 64 bits, 8 bytes a row (an integer id is its own hash), and sorted; only ids with equal hashes are
compared by value. So the check is exact, and its memory does not depend on the length of the ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.concurrency import in_order
from pipeline.core.errors import ManifestError
from pipeline.core.plain import plain_array
from pipeline.core.processes import cores
from pipeline.manifest.manifest import FILES_AT_A_TIME, Manifest, ManifestFile, example_row
from pipeline.storage.urls import is_local, open_arrow

BATCH_ROWS = 65_536
# Ids that are hashed at a time: their words then fit in the processor's cache.
HASHED_ROWS = 8192
BLOCK = 1 << 20
_WORD = 8
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
# Masks of a word whose first n bytes belong to the id.
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(_WORD + 1)], dtype=np.uint64)


def check_ids(manifest: Manifest) -> None:
    """Check the ids of all rows, in one pass over the column.

    Raises:
        ManifestError: an id is null or repeated; the message names the rows.
    """
    repeated = _repeated(_hashes(manifest))
    if len(repeated):
        _explain(manifest, repeated)


def _hashes(manifest: Manifest) -> NDArray[np.uint64]:
    """The hashes of all rows, in order."""
    hashes = np.empty(manifest.rows, dtype=np.uint64)

    def fill(place: tuple[int, ManifestFile]) -> None:
        position, file = place
        for ids in _batches(manifest, file):
            _check(manifest, position, ids)
            hashes[position : position + len(ids)] = _hash(ids)
            position += len(ids)

    threads = cores() if is_local(manifest.files[0].url) else FILES_AT_A_TIME
    for _ in in_order(fill, _places(manifest), threads=threads):
        pass
    return hashes


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The repeated values; sorts in place, without a second array of that length."""
    hashes.sort()
    starts = range(0, len(hashes), BLOCK)
    # Each block includes the first value of the next one, so that no pair is missed.
    blocks = (hashes[start : start + BLOCK + 1] for start in starts)
    return np.unique(np.concatenate([block[1:][block[1:] == block[:-1]] for block in blocks]))


def _places(manifest: Manifest) -> Iterator[tuple[int, ManifestFile]]:
    """Every file with the position of its first row."""
    return zip(accumulate((file.rows for file in manifest.files), initial=0), manifest.files, strict=False)


def _batches(manifest: Manifest, file: ManifestFile) -> Iterator[pa.Array]:
    """The ids of one file, a few at a time."""
    with open_arrow(file.url) as handle:
        parquet = pq.ParquetFile(handle, pre_buffer=False)
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[manifest.id], use_threads=False):
            yield plain_array(batch.column(0), manifest.schema.field(0).type)


def _check(manifest: Manifest, position: int, ids: pa.Array) -> None:
    """Refuse ids that are null or not UTF-8."""
    if ids.null_count:
        row = pc.index(ids.is_null(), pa.scalar(True)).as_py()
        raise ManifestError(
            f"{_place(manifest, position + row)}: {manifest.id} is null; every row needs an id, or its embedding "
            f"could not be found{_example(manifest, position + row)}"
        )
    try:
        ids.validate(full=True)
    except pa.ArrowException as error:
        raise ManifestError(
            f"{_place(manifest, position)} or one of the {len(ids) - 1} after it: {manifest.id} is not UTF-8; "
            "write the ids as UTF-8 text"
        ) from error


def _hash(ids: pa.Array) -> NDArray[np.uint64]:
    """64-bit hashes, equal for equal ids; an integer is its own hash."""
    if pa.types.is_integer(ids.type):
        numbers = ids.to_numpy(zero_copy_only=False)
        wide: NDArray[np.uint64] = numbers.astype(np.int64 if numbers.dtype.kind == "i" else np.uint64).view(np.uint64)
        return wide
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if not pa.types.is_string(ids.type):
        ids = ids.cast(pa.large_string())
    parts = [_hash_texts(ids.slice(start, HASHED_ROWS)) for start in range(0, len(ids), HASHED_ROWS)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)


def _hash_texts(ids: pa.Array) -> NDArray[np.uint64]:
    """Hashes of texts: the length, then eight bytes at a time, multiplied and folded.

    Untrusted texts may be chosen so that hashes collide. Such ids are compared by value, which only takes longer.
    """
    _, offsets, data = ids.buffers()
    kind = np.int32 if pa.types.is_string(ids.type) else np.int64
    bounds = np.frombuffer(offsets, dtype=kind)[ids.offset : ids.offset + len(ids) + 1].astype(np.int64)
    first, last = int(bounds[0]), int(bounds[-1])
    # Padding after the last text, as words are read whole; bytes of the next text are masked.
    padded = np.zeros(last - first + _WORD, dtype=np.uint8)
    if data is not None:
        padded[: last - first] = np.frombuffer(data, dtype=np.uint8)[first:last]
    words = np.ndarray(last - first + 1, dtype="<u8", buffer=padded, strides=(1,))
    starts, lengths = bounds[:-1] - first, np.diff(bounds)
    hashes = (lengths.astype(np.uint64) + np.uint64(1)) * _FACTOR
    shortest, longest = int(lengths.min()), int(lengths.max())
    for at in range(0, longest, _WORD):
        if at + _WORD <= shortest:
            hashes ^= words[starts + at]
            hashes *= _FACTOR
            hashes ^= hashes >> _SHIFT
            continue
        # Only the texts that are longer.
        left = np.flatnonzero(lengths > at)
        found = words[starts[left] + at] & _MASKS[np.minimum(lengths[left] - at, _WORD)]
        found = (hashes[left] ^ found) * _FACTOR
        hashes[left] = found ^ (found >> _SHIFT)
    return hashes


def _explain(manifest: Manifest, repeated: NDArray[np.uint64]) -> None:
    """Raise if two ids are equal; return if only their hashes are."""
    seen: dict[object, int] = {}
    for where, file in _places(manifest):
        position = where
        for ids in _batches(manifest, file):
            for offset in np.flatnonzero(np.isin(_hash(ids), repeated)):
                value = ids[int(offset)].as_py()
                row = position + int(offset)
                if value in seen:
                    raise ManifestError(
                        f"{manifest.id} {value!r} stands twice: at {_place(manifest, seen[value])} and at "
                        f"{_place(manifest, row)}; ids must be unique: drop a row, or set manifest.id to another column"
                        f"{_example(manifest, row)}"
                    )
                seen[value] = row
            position += len(ids)


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
