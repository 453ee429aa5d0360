"""Small pictures of chosen rows of a manifest, for people to look at."""

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
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.records import OK, Failure, ImageRef, Piece, PreprocessSpec, Shard
from pipeline.images.decode import EXACT, GLANCE
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, refs

# The square in the middle, which is about what the model saw.
THUMBNAIL = PreprocessSpec(
    resize=160, crop=(160, 160), resample=Image.Resampling.BICUBIC, mean=(0, 0, 0), std=(1, 1, 1)
)
# The first rows, among which examples are spread: a bytes column is not read much further.
REACH = 512
# Pictures that are read at once.
AT_ONCE = 8
# What reading one of them, or decoding it, may take.
ONE_SECONDS = 5.0
log = logging.getLogger(__name__)


def spread(statuses: Sequence[str], count: int) -> list[int]:
    """The places of up to ``count`` embedded rows, spread evenly over ``statuses``."""
    good = [place for place, status in enumerate(statuses) if status == OK]
    step = max(1, len(good) // count) if count else 1
    return good[::step][:count]


def thumbnails(
    manifest: Manifest, reader: PixelReader, ids: Mapping[int, str], *, seconds: float = 20.0
) -> dict[int, bytes]:
    """JPEG bytes by the number of the row in the manifest; what cannot be shown is left out.

    ``ids`` are those of the wanted rows: where the manifest has another one by now, it has another picture.
    Of a damaged file whatever can be seen is shown, if decoders are processes of their own. After ``seconds`` the rest
    is left out, too: to reach a late row of a large column of images takes long.
    """
    # A decoder on the GPU makes pictures of the model's size alone.
    lenient = reader.by(EXACT if reader.decoders is None else GLANCE, spec=THUMBNAIL)
    # No single picture may take all of the time.
    lenient = replace(lenient, source=replace(reader.source, read_seconds=min(reader.source.read_seconds, ONE_SECONDS)))
    if lenient.decoders is not None:
        lenient.decoders.seconds = min(lenient.decoders.seconds, ONE_SECONDS)
    made: dict[int, bytes] = {}
    end = time.monotonic() + seconds
    try:
        with closing(find(manifest, sorted(ids), seconds=seconds)) as found, ThreadPoolExecutor(AT_ONCE) as threads:
            there = ((number, ref) for number, ref in found if str(ref.id) == ids[number])
            while time.monotonic() < end and (some := list(islice(there, AT_ONCE))):
                for (number, _), pixels in zip(some, threads.map(lenient.read, (ref for _, ref in some)), strict=True):
                    if not isinstance(pixels, Failure):
                        made[number] = _jpeg(np.asarray(pixels.rgb))
    except PipelineError as error:
        log.warning("pictures are missing in the report: %s", error)
    finally:
        lenient.close()
    return made


def find(manifest: Manifest, numbers: Sequence[int], *, seconds: float) -> Generator[tuple[int, ImageRef]]:
    """The references of some rows, given in order, from one row group after the other; no more after ``seconds``.

    Raises:
        ManifestError: the manifest cannot be read any more.
    """
    end, begin = time.monotonic() + seconds, 0
    with ShardReader(manifest) as reader:
        for file, source in enumerate(manifest.files):
            for group, rows in enumerate(source.row_groups):
                wanted = numbers[bisect_left(numbers, begin) : bisect_left(numbers, begin + rows)]
                if wanted:
                    # From its first row on, so that the way to a late one has a limit in time.
                    piece = Piece(file=file, row_group=group, start=0, stop=wanted[-1] + 1 - begin)
                    at = begin
                    for batch in reader.read(Shard(index=0, rows=piece.stop, pieces=(piece,))):
                        chosen = [number for number in wanted if at <= number < at + batch.num_rows]
                        if chosen:
                            yield from zip(chosen, refs(manifest, batch.take([n - at for n in chosen])), strict=True)
                        at += batch.num_rows
                        if time.monotonic() > end:
                            return
                begin += rows


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
