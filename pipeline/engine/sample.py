"""A few pictures of the manifest, for comparing backends and for calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from pipeline.core.records import Failure, ImageRef, Piece, Pixels, Sample, Shard
from pipeline.images.decode import limit_pixels
from pipeline.images.factory import SAMPLE_THREADS
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, refs

# Row groups among which the pictures are spread. Only their first rows are looked at: to reach a later row
# of a column of images means to read all before it.
PLACES = 16
# Rows tried for each picture wanted, where images are damaged.
TRIES = 4


def draw_sample(manifest: Manifest, reader: PixelReader, count: int) -> Sample | None:
    """Up to ``count`` pictures from the beginnings of row groups all over the manifest; always the same ones.

    None where no image that was tried could be decoded.
    """
    groups = [(file, group) for file, f in enumerate(manifest.files) for group, rows in enumerate(f.row_groups) if rows]
    places = min(PLACES, len(groups), count)
    chosen = [groups[place * len(groups) // places] for place in range(places)]
    # If a place has too few good pictures, more are taken from the next ones, and then from the rest of the manifest.
    spare = [place for place in groups[: PLACES * TRIES] if place not in chosen]
    ids: list[str] = []
    pictures: list[Pixels] = []
    limit_pixels(reader.decoder.max_pixels)
    with ShardReader(manifest) as rows, ThreadPoolExecutor(SAMPLE_THREADS) as threads:
        for number, (file, group) in enumerate([*chosen, *spare]):
            left = count - len(ids)
            if left == 0:
                break
            wanted = -(-left // max(1, places - number))
            tried = islice(_refs(manifest, rows, file, group), TRIES * wanted)
            while wanted and (some := list(islice(tried, wanted))):
                for ref, pixels in zip(some, threads.map(reader.read, some), strict=True):
                    if not isinstance(pixels, Failure):
                        ids.append(str(ref.id))
                        pictures.append(pixels)
                        wanted -= 1
    return stack(ids, pictures) if ids else None


def stack(ids: Sequence[str], pictures: Sequence[Pixels]) -> Sample:
    """A sample of decoded pictures, laid out as the loader lays out its batches."""
    # Arrays are copied: Pillow's may not be written to, of which torch would warn.
    pixels = np.stack([picture.rgb for picture in pictures])
    return Sample(ids=tuple(ids), pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2))


def _refs(manifest: Manifest, reader: ShardReader, file: int, group: int) -> Iterator[ImageRef]:
    rows = manifest.files[file].row_groups[group]
    piece = Piece(file=file, row_group=group, start=0, stop=rows)
    for batch in reader.read(Shard(index=0, rows=rows, pieces=(piece,))):
        yield from refs(manifest, batch)
