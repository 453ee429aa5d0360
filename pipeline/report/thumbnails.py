"""Small pictures of chosen rows of a manifest."""

from __future__ import annotations

import io
import logging
import time
from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.errors import PipelineError, short
from pipeline.core.plain import plain_array, plain_type
from pipeline.core.records import OK, Failure, ImageRef, Piece, PreprocessSpec, Shard
from pipeline.images.decode import EXACT, GLANCE
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, refs

# The square in the middle, which is about the input of the model.
THUMBNAIL = PreprocessSpec(
    resize=160, crop=(160, 160), resample=Image.Resampling.BICUBIC, mean=(0, 0, 0), std=(1, 1, 1)
)
# The first rows, from which examples are taken: reading further into a column of bytes is slow.
REACH = 512
# Pictures that are read in parallel.
AT_ONCE = 8
# Characters of a text.
CAPTION = 160
# Timeout for reading one of them, and for decoding it, in seconds.
ONE_SECONDS = 5.0
log = logging.getLogger(__name__)


def spread(statuses: Sequence[str], count: int) -> list[int]:
    """The positions of up to ``count`` embedded rows, evenly spaced over ``statuses``."""
    good = [place for place, status in enumerate(statuses) if status == OK]
    step = max(1, len(good) // count) if count else 1
    return good[::step][:count]


def thumbnails(
    manifest: Manifest, reader: PixelReader, ids: Mapping[int, str], *, seconds: float = 20.0
) -> dict[int, bytes]:
    """JPEG bytes by the number of the row in the manifest; see :func:`pictures`, which gets a reader for them."""
    with lenient(reader) as shown:
        return pictures(manifest, shown, ids, seconds=seconds)


def lenient(reader: PixelReader) -> PixelReader:
    """A reader of thumbnails with processes of its own; close it.

    The readable part of a damaged file is shown if decoders are separate processes.
    """
    # A decoder on the GPU makes only pictures of the model's size.
    made = reader.by(EXACT if reader.decoders is None else GLANCE, spec=THUMBNAIL)
    # No single picture may use up the time.
    if made.decoders is not None:
        made.decoders.seconds = min(made.decoders.seconds, ONE_SECONDS)
    return replace(made, source=replace(made.source, read_seconds=min(made.source.read_seconds, ONE_SECONDS)))


def pictures(manifest: Manifest, shown: PixelReader, ids: Mapping[int, str], *, seconds: float) -> dict[int, bytes]:
    """JPEG bytes by the number of the row in the manifest, without those that cannot be read.

    ``ids`` are those of the wanted rows: a row with another id by now has another picture and is left out. After
    ``seconds`` the rest is left out, because a late row of a large column of images takes long to reach. ``shown`` is
    a reader of :func:`lenient`.
    """
    made: dict[int, bytes] = {}
    end = time.monotonic() + seconds
    try:
        with closing(find(manifest, sorted(ids), seconds=seconds)) as found, ThreadPoolExecutor(AT_ONCE) as threads:
            there = ((number, ref) for number, ref in found if str(ref.id) == ids[number])
            while time.monotonic() < end and (some := list(islice(there, AT_ONCE))):
                for (number, _), pixels in zip(some, threads.map(shown.read, (ref for _, ref in some)), strict=True):
                    if not isinstance(pixels, Failure):
                        made[number] = _jpeg(np.asarray(pixels.rgb))
    except PipelineError as error:
        log.warning("pictures are missing: %s", error)
    return made


def find(manifest: Manifest, numbers: Sequence[int], *, seconds: float) -> Generator[tuple[int, ImageRef]]:
    """The references of the rows ``numbers`` (ascending), one row group after the other, until ``seconds`` are over.

    Raises:
        ManifestError: the manifest cannot be read any more.
    """
    for chosen, batch in rows_of(manifest, numbers, (), seconds=seconds):
        yield from zip(chosen, refs(manifest, batch), strict=True)


def captions(manifest: Manifest, numbers: Sequence[int], *, seconds: float = 5.0) -> dict[int, str]:
    """The texts of some rows, as far as they are shown; fewer where they cannot be read, or not in time."""
    found: dict[int, str] = {}
    try:
        for chosen, batch in rows_of(manifest, sorted(numbers), (manifest.text,), seconds=seconds) if numbers else ():
            texts = batch.column(manifest.text)
            cells = plain_array(texts, plain_type(texts.type)).to_pylist()
            found |= {number: short(cell, CAPTION) for number, cell in zip(chosen, cells, strict=True) if cell}
    except (PipelineError, UnicodeDecodeError) as error:
        log.warning("texts are missing in the report: %s", error)
    return found


def rows_of(
    manifest: Manifest, numbers: Sequence[int], columns: tuple[str, ...], *, seconds: float
) -> Generator[tuple[Sequence[int], pa.RecordBatch]]:
    """Some of the rows ``numbers`` (ascending) at a time, and their columns; see :class:`ShardReader`."""
    end, begin = time.monotonic() + seconds, 0
    with ShardReader(manifest, columns) as reader:
        for file, source in enumerate(manifest.files):
            for group, rows in enumerate(source.row_groups):
                wanted = numbers[bisect_left(numbers, begin) : bisect_left(numbers, begin + rows)]
                if wanted:
                    # Read from the first row, so that the timeout also ends the search for a late one.
                    piece = Piece(file=file, row_group=group, start=0, stop=wanted[-1] + 1 - begin)
                    at = begin
                    for batch in reader.read(Shard(index=0, rows=piece.stop, pieces=(piece,))):
                        chosen = wanted[bisect_left(wanted, at) : bisect_left(wanted, at + batch.num_rows)]
                        if chosen:
                            yield chosen, batch.take([n - at for n in chosen])
                        at += batch.num_rows
                        if time.monotonic() > end:
                            return
                begin += rows


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
