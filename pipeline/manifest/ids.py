"""The check that ids are unique, before any work starts.

Ids are hashed to 64 bits, 8 bytes a row, and sorted; only ids with equal hashes are compared by value. So the check is
exact, and its memory does not depend on the length of the ids. The hashes of more than ``IN_MEMORY_ROWS`` rows are
sorted in files on the local disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
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
from pipeline.manifest.hash_files import HashFiles, repeated_values
from pipeline.manifest.manifest import FILES_AT_A_TIME, Manifest, ManifestFile, example_row
from pipeline.storage.urls import is_local, open_arrow

BATCH_ROWS = 65_536
# Ids that are hashed at a time: their words then fit in the processor's cache.
HASHED_ROWS = 8192
# Their hashes take 512 MB.
IN_MEMORY_ROWS = 1 << 26
# Repeated hashes whose ids are compared in one pass; these ids are kept in memory.
COMPARED = 1 << 16
_WORD = 8
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
# Masks of a word whose first n bytes belong to the id.
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(_WORD + 1)], dtype=np.uint64)


def check_ids(manifest: Manifest) -> None:
    """Check the ids of all rows, in one pass over the column; a repeated id takes a few more.

    Raises:
        ManifestError: an id is null or repeated; the message names the rows.
        StorageError: TMPDIR has no room for 8 bytes a row, beyond ``IN_MEMORY_ROWS``.
    """
    if not manifest.counted:
        # Ids begin with the name of their tar, and are told apart as a tar is read.
        return
    rows, most, found = manifest.rows, COMPARED, None
    while True:
        repeated = _repeated_hashes(manifest, rows, most)
        pair = _first_pair(manifest, rows, repeated) if len(repeated) else None
        if pair is not None:
            # Of more repeated ids than are compared in one pass, the first one may stand before these rows.
            found, rows = pair, pair[2]
        if len(repeated) < most:
            break
        if pair is None:
            # So many different ids with equal hashes are no chance: compare more of them.
            most *= 16
    if found is not None:
        value, first, row = found
        raise ManifestError(
            f"{manifest.id} {value!r} stands twice: at {_place(manifest, first)} and at {_place(manifest, row)}; "
            f"ids must be unique: drop a row, or set manifest.id to another column{_example(manifest, row)}"
        )


def _repeated_hashes(manifest: Manifest, rows: int, most: int) -> NDArray[np.uint64]:
    """Up to ``most`` of the hashes that occur more than once in the first ``rows`` rows, in order."""
    if rows <= IN_MEMORY_ROWS:
        hashes = np.empty(rows, dtype=np.uint64)

        def fill(position: int, found: NDArray[np.uint64]) -> None:
            hashes[position : position + len(found)] = found

        _hash_rows(manifest, rows, fill)
        return repeated_values(hashes)[:most]
    repeated = [np.empty(0, dtype=np.uint64)]
    with HashFiles(rows) as files:
        _hash_rows(manifest, rows, lambda _, hashes: files.append(hashes))
        with closing(files.repeated(most)) as results:
            for found in results:
                repeated.append(found)
                if sum(map(len, repeated)) >= most:
                    break
    return np.concatenate(repeated)[:most]


def _hash_rows(manifest: Manifest, rows: int, take: Callable[[int, NDArray[np.uint64]], None]) -> None:
    """Check and hash the first ``rows`` ids; threads call ``take`` with a position and the hashes from there on."""

    def read(place: tuple[int, ManifestFile]) -> None:
        for position, ids in _batches(manifest, rows, *place):
            _check(manifest, position, ids)
            take(position, _hash(ids))

    threads = cores() if is_local(manifest.files[0].url) else FILES_AT_A_TIME
    for _ in in_order(read, _places(manifest, rows), threads=threads):
        pass


def _places(manifest: Manifest, rows: int) -> Iterator[tuple[int, ManifestFile]]:
    """The files of the first ``rows`` rows, each with the position of its first row."""
    places = zip(accumulate((file.rows for file in manifest.files), initial=0), manifest.files, strict=False)
    return ((position, file) for position, file in places if position < rows)


def _batches(manifest: Manifest, rows: int, position: int, file: ManifestFile) -> Iterator[tuple[int, pa.Array]]:
    """The ids of one file, up to the first ``rows`` rows of the manifest, a few at a time; each with its position."""
    with open_arrow(file.url) as handle:
        parquet = pq.ParquetFile(handle, pre_buffer=False)
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[manifest.id], use_threads=False):
            if position >= rows:
                return
            yield position, plain_array(batch.column(0), manifest.schema.field(0).type).slice(0, rows - position)
            position += batch.num_rows


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
    """64-bit hashes, equal for equal ids; two integers never have the same."""
    if pa.types.is_integer(ids.type):
        numbers = ids.to_numpy(zero_copy_only=False)
        kind = np.int64 if numbers.dtype.kind == "i" else np.uint64
        hashes: NDArray[np.uint64] = numbers.astype(kind).view(np.uint64)
        # Each step has an inverse.
        hashes ^= hashes >> _SHIFT
        hashes *= _FACTOR
        return hashes
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
        if at < shortest:
            found = words[starts + at]
            if at + _WORD > shortest:
                found &= _MASKS[np.minimum(lengths - at, _WORD)]
            hashes ^= found
            hashes *= _FACTOR
            hashes ^= hashes >> _SHIFT
            continue
        # Only the texts that are longer.
        left = np.flatnonzero(lengths > at)
        found = words[starts[left] + at] & _MASKS[np.minimum(lengths[left] - at, _WORD)]
        found = (hashes[left] ^ found) * _FACTOR
        hashes[left] = found ^ (found >> _SHIFT)
    return hashes


def _first_pair(manifest: Manifest, rows: int, repeated: NDArray[np.uint64]) -> tuple[object, int, int] | None:
    """The first id of these hashes that stands twice, with its rows; None if only hashes are equal."""
    seen: dict[object, int] = {}
    for place in _places(manifest, rows):
        for position, ids in _batches(manifest, rows, *place):
            hashes = _hash(ids)
            nearest = repeated[np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)]
            for offset in np.flatnonzero(hashes == nearest):
                value, row = ids[int(offset)].as_py(), position + int(offset)
                if value in seen:
                    return value, seen[value], row
                seen[value] = row
    return None


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
