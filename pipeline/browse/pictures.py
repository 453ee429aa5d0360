"""Thumbnails and originals of rows, from the manifest that a dataset was made from, by the rules of its job."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.browse.cached import CachedDataset
from pipeline.core.errors import ManifestError, PipelineError
from pipeline.core.records import Failure
from pipeline.engine.query import config_of_dataset
from pipeline.images.factory import pixel_reader
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.report.thumbnails import THUMBNAIL, find, lenient, pictures, rows_of

# Timeout for the thumbnails of one page, and for finding one original, in seconds.
BATCH_SECONDS, ONE_SECONDS = 20.0, 10.0
# Seconds after which a picture that could not be read, or a manifest, is tried again.
AGAIN_SECONDS = 60.0
# Formats that browsers show, by the first bytes of a file and those from the given place on.
_SHOWN = (
    ("image/jpeg", b"\xff\xd8\xff", 0, b""),
    ("image/png", b"\x89PNG\r\n\x1a\n", 0, b""),
    ("image/gif", b"GIF8", 0, b""),
    ("image/webp", b"RIFF", 8, b"WEBP"),
    ("image/avif", b"", 4, b"ftypavif"),
)
# SVG in the place of a missing thumbnail.
NO_PICTURE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160"><rect width="160" height="160" fill="#8883"/>'
    b'<text x="80" y="84" text-anchor="middle" font-family="sans-serif" font-size="14" fill="#888">no picture</text>'
    b"</svg>"
)


@dataclass(frozen=True, slots=True)
class Original:
    """The encoded picture of a row, and its media type, empty where browsers do not show the format."""

    data: bytes
    kind: str


class Pictures:
    """The pictures of a dataset; nothing is opened before the first one is wanted. Close it."""

    def __init__(self, dataset: CachedDataset) -> None:
        self._dataset = dataset
        self._lock = threading.Lock()
        self._opened: tuple[Manifest, PixelReader] | str | None = None
        self._closed, self._tried = False, 0.0
        # The pictures of another state of the dataset are others.
        self.state = f"{dataset.url} {dataset.fingerprint['success']}"
        self._missing: dict[int, float] = {}
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="thumbnails")
        self._coming: dict[int, Future[Mapping[int, bytes]]] = {}

    def close(self) -> None:
        """End the processes that decode."""
        with self._lock:
            self._closed = True
        self._maker.shutdown(cancel_futures=True)
        with self._lock:
            if isinstance(self._opened, tuple):
                self._opened[1].close()
            self._opened = "closed"

    @property
    def problem(self) -> str:
        """The reason why there are no pictures; empty while there are."""
        return self._opened if isinstance(self._opened, str) else ""

    def want(self, ids: Mapping[int, str]) -> None:
        """Begin to make the thumbnails of rows, by their numbers, of which these are the ids."""
        with self._lock:
            new = {row: id for row, id in ids.items() if row not in self._coming and self._held(row) is None}
            if new and not self._closed:
                future = self._maker.submit(self._make, new)
                self._coming |= dict.fromkeys(new, future)

    def thumbnail(self, row: int) -> bytes:
        """JPEG bytes of a row's thumbnail; empty where it has none."""
        held = self._held(row)
        if held is not None:
            return held
        future = self._coming.get(row)
        if future is None:
            self.want({row: self._id(row)})
            future = self._coming.get(row)
        if future is None:
            return self._held(row) or b""
        try:
            return future.result(timeout=BATCH_SECONDS).get(row, b"")
        except (TimeoutError, CancelledError):
            return b""

    def source(self) -> tuple[Manifest, PixelReader]:
        """The manifest, and the reader of thumbnails.

        Raises:
            ManifestError: the manifest is gone, or another one.
        """
        opened = self._open()
        if isinstance(opened, str):
            raise ManifestError(opened)
        return opened

    def manifest_rows(self, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
        """Id, image and kept columns of some rows of the manifest, ascending, a few at a time.

        Raises:
            ManifestError: the manifest cannot be read any more.
        """
        manifest, _ = self.source()
        columns = tuple(dict.fromkeys((*manifest.schema.names, manifest.image, *self._dataset.kept)))
        none, there = True, iter(rows.tolist())
        for chosen, batch in rows_of(manifest, rows.tolist(), columns, seconds=math.inf):
            none = False
            ids = self._dataset.rows([next(there) for _ in chosen], [self._dataset.id])
            if batch.column(self._dataset.id).to_pylist() != [each[self._dataset.id] for each in ids]:
                raise ManifestError("the manifest has other rows in these places by now, so none of them are written")
            yield pa.Table.from_batches([batch])
        if none:
            raise ManifestError("the selection has no row")

    def original(self, row: int) -> Original | Failure:
        """The encoded picture of a row, or the reason why there is none."""
        opened = self._open()
        if isinstance(opened, str):
            return Failure("not_found", opened)
        manifest, reader = opened
        try:
            with closing(find(manifest, [row], seconds=ONE_SECONDS)) as found:
                number, ref = next(found, (-1, None))
            if ref is None or number != row or str(ref.id) != self._id(row):
                return Failure("not_found", "the manifest has another row in this place by now")
            data = reader.source.read(ref)
        except PipelineError as error:
            return Failure("unreadable", str(error))
        if isinstance(data, Failure):
            return data
        kinds = (kind for kind, begin, at, mark in _SHOWN if data.startswith(begin) and data[at:].startswith(mark))
        return Original(data, next(kinds, ""))

    def _id(self, row: int) -> str:
        return str(self._dataset.rows([row], [self._dataset.id])[0][self._dataset.id])

    def _held(self, row: int) -> bytes | None:
        if time.monotonic() - self._missing.get(row, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return b""
        found: bytes | None = self._dataset.memory.get((self.state, "thumbnail", row))
        return found

    def _make(self, ids: Mapping[int, str]) -> Mapping[int, bytes]:
        made: Mapping[int, bytes] = {}
        try:
            opened = self._open()
            if not isinstance(opened, str):
                made = pictures(*opened, ids, seconds=BATCH_SECONDS)
            for row in ids:
                if data := made.get(row):
                    self._dataset.memory.put((self.state, "thumbnail", row), data, len(data) + 100)
                else:
                    self._missing[row] = time.monotonic()
        finally:
            with self._lock:
                for row in ids:
                    self._coming.pop(row, None)
        return made

    def _open(self) -> tuple[Manifest, PixelReader] | str:
        with self._lock:
            late = isinstance(self._opened, str) and time.monotonic() - self._tried > AGAIN_SECONDS
            if self._opened is None or (late and not self._closed):
                self._tried = time.monotonic()
                try:
                    self._opened = self._read()
                except PipelineError as error:
                    self._opened = str(error)
            return self._opened

    def _read(self) -> tuple[Manifest, PixelReader]:
        dataset = self._dataset
        # The kept columns are in the dataset.
        config = config_of_dataset(dataset).changed({"manifest.keep": []})
        manifest = open_manifest(config.manifest).with_rows([commit.rows for commit in dataset.commits])
        if not manifest.image:
            raise ManifestError("the rows are texts alone")
        if manifest.rows != dataset.plan.rows:
            raise ManifestError(f"{config.manifest.path} has changed since the dataset was made")
        # One process is enough for a page, and starts sooner.
        with pixel_reader(config.changed({"loader.workers": 1}), manifest.root, THUMBNAIL) as reader:
            return manifest, lenient(reader)
