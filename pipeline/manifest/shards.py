"""Shards: cut by row counts alone, and read by row group, a few rows at a time; a tar is a shard."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import ManifestError
from pipeline.core.plain import read_batches
from pipeline.core.records import DAMAGED, Failure, ImageRef, Piece, Shard
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.tar_stream import TarStream
from pipeline.manifest.tars import BEGINNING, SIDECARS, TarRow, TarRows
from pipeline.storage.urls import is_local, open_arrow

# Rows read at a time. Encoded images are large, so a batch of them is kept small.
PATH_ROWS = 512
BYTES_ROWS = 32
# Bytes of a column that are read, and held, at a time. Requests to a store take time whatever their size.
LOCAL_BUFFER, REMOTE_BUFFER = 2**20, 16 * 2**20
# Rows of a tar, and bytes of them, that are read at a time.
TAR_ROWS, TAR_BYTES = 128, 4 * 2**20
# The end of a tar, whose rows are not counted.
END = sys.maxsize
# The key of a batch's metadata that says why its last row stands for what is missing of a tar.
DAMAGE = b"damage"
log = logging.getLogger(__name__)


def cut(manifest: Manifest, shard_rows: int) -> Iterator[Shard]:
    """Every shard in order; a pure function of the manifest's row groups and ``shard_rows``, which is at least 1.

    A tar is one, of 0 rows until they are counted.
    """
    if shard_rows < 1:
        raise ValueError(f"shards of {shard_rows} rows")
    if not manifest.counted:
        yield from (Shard(number, 0, (Piece(number, 0, 0, END),)) for number in range(len(manifest.files)))
        return
    index, left, pieces = 0, shard_rows, list[Piece]()
    for number, file in enumerate(manifest.files):
        for group, rows in enumerate(file.row_groups):
            start = 0
            while start < rows:
                stop = min(rows, start + left)
                pieces.append(Piece(file=number, row_group=group, start=start, stop=stop))
                left -= stop - start
                start = stop
                if left == 0:
                    yield Shard(index=index, rows=shard_rows, pieces=tuple(pieces))
                    index, left, pieces = index + 1, shard_rows, []
    if pieces:
        yield Shard(index=index, rows=shard_rows - left, pieces=tuple(pieces))


@dataclass(slots=True)
class ShardReader:
    """Read shards; consecutive shards of one row group continue where the last one ended.

    It keeps one file open. Close it, or use it as a context manager. It reads ``columns``; by default the id, the kept
    columns and the image column. Of an image in a tar, ``max_bytes`` and one more are read.
    """

    manifest: Manifest
    columns: tuple[str, ...] = ()
    max_bytes: int = 268_435_456
    _parquet: pq.ParquetFile | None = field(default=None, init=False)
    _batches: Iterator[pa.RecordBatch] | None = field(default=None, init=False)
    _at: tuple[int, int, int] = field(default=(-1, -1, -1), init=False)
    _rest: pa.RecordBatch | None = field(default=None, init=False)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file, if any."""
        if self._parquet is not None:
            self._parquet.close(force=True)
        self._parquet = self._batches = self._rest = None
        self._at = (-1, -1, -1)

    def read(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """The rows of ``shard`` in order, a few at a time.

        Raises:
            ManifestError: the file changed or ends early.
        """
        for piece in shard.pieces:
            if not self.manifest.counted:
                yield from self._read_tar(piece)
                continue
            self._seek(piece)
            left = piece.stop - piece.start
            while left:
                batch = self._next(piece)
                if batch.num_rows > left:
                    self._rest = batch.slice(left)
                    batch = batch.slice(0, left)
                left -= batch.num_rows
                self._at = (piece.file, piece.row_group, self._at[2] + batch.num_rows)
                yield batch

    def _read_tar(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The rows of a piece, fewer if the tar has fewer; one without an end is read to the last byte of the tar."""
        file, manifest = self.manifest.files[piece.file], self.manifest
        names = list(dict.fromkeys(self.columns or (*manifest.schema.names, manifest.image)))
        limit = self.max_bytes + 1 if manifest.image in names else 0
        asked = {} if piece.stop == END else {"piece": BEGINNING}
        with TarStream(file.url, file.size, file.digest, **asked) as stream:
            texts = [name for name in names if name in SIDECARS]
            rows = islice(TarRows(file.url, stream, texts, limit), piece.start, piece.stop)
            some, held, count = list[TarRow](), 0, 0
            for row in rows:
                some.append(row)
                held += len(row.image or b"")
                count += 1
                if len(some) == TAR_ROWS or held >= TAR_BYTES:
                    yield _tar_batch(manifest, names, some)
                    some, held = [], 0
            if some:
                yield _tar_batch(manifest, names, some)
        if piece.stop == END and not count:
            log.warning("%s: no images; a WebDataset tar holds members such as 0001.jpg and 0001.txt", file.url)

    def _seek(self, piece: Piece) -> None:
        if self._at == (piece.file, piece.row_group, piece.start) and self._batches is not None:
            return
        if self._parquet is None or self._at[0] != piece.file:
            self.close()
            url = self.manifest.files[piece.file].url
            buffer = LOCAL_BUFFER if is_local(url) else REMOTE_BUFFER
            # No read-ahead: a row group of images may be larger than memory.
            with self._explained(piece):
                self._parquet = pq.ParquetFile(open_arrow(url), buffer_size=buffer, pre_buffer=False)
        kind = self.manifest.image_kind
        columns = self.columns or (*self.manifest.schema.names, self.manifest.image)
        rows = PATH_ROWS if kind == "path" or self.manifest.image not in columns else BYTES_ROWS
        names, known = list(dict.fromkeys(columns)), self.manifest.schema
        self._batches = read_batches(self._parquet, piece.row_group, names, rows, known)
        self._rest, skip = None, piece.start
        while skip:
            batch = self._next(piece)
            if batch.num_rows > skip:
                self._rest = batch.slice(skip)
            skip -= min(skip, batch.num_rows)
        self._at = (piece.file, piece.row_group, piece.start)

    def _next(self, piece: Piece) -> pa.RecordBatch:
        if self._rest is not None:
            rest, self._rest = self._rest, None
            return rest
        with self._explained(piece):
            batch = next(self._batches, None) if self._batches is not None else None
            if batch is None:
                raise EOFError("the rows end early")
        return batch

    @contextmanager
    def _explained(self, piece: Piece) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, EOFError) as error:
            url = self.manifest.files[piece.file].url
            raise ManifestError(
                f"{url}: row group {piece.row_group} cannot be read ({error}); did the file change during the run?"
            ) from error


def _tar_batch(manifest: Manifest, names: Sequence[str], rows: Sequence[TarRow]) -> pa.RecordBatch:
    def column(name: str) -> pa.Array:
        if name == manifest.image:
            return pa.array([row.image for row in rows], pa.binary())
        return pa.array([row.id if name == manifest.id else row.texts.get(name) for row in rows], pa.string())

    batch = pa.RecordBatch.from_arrays([column(name) for name in names], names=list(names))
    return batch.replace_schema_metadata({DAMAGE: rows[-1].damage.encode()} if rows[-1].damage else None)


def _cells(column: pa.Array) -> list[Any]:
    try:
        cells: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        # Paths are bytes to the operating system, and need not be UTF-8.
        raw = column.cast(pa.binary())
        cells = [None if cell is None else os.fsdecode(cell) for cell in raw.to_pylist()]
    return cells


def refs(manifest: Manifest, batch: pa.RecordBatch) -> list[ImageRef]:
    """The image references of a batch that :class:`ShardReader` read."""
    ids = batch.column(manifest.id).to_pylist()
    cells = _cells(batch.column(manifest.image))
    if manifest.image_kind == "path":
        return list(map(ImageRef, ids, cells))
    if manifest.image_kind == "bytes":
        found = [ImageRef(id=i, data=cell) for i, cell in zip(ids, cells, strict=True)]
        if damage := (batch.schema.metadata or {}).get(DAMAGE):
            found[-1] = ImageRef(id=ids[-1], failure=Failure(DAMAGED, damage.decode()))
        return found
    return [
        ImageRef(id=i, data=(cell or {}).get("bytes"), path=(cell or {}).get("path"))
        for i, cell in zip(ids, cells, strict=True)
    ]
