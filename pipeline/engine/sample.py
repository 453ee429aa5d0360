"""A few pictures of the manifest, for comparing backends and for calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True)
class FirstBatch:
    """Images of one of the first batches of a run, up to as many as are compared, spread over the batch.

    Attributes:
        shard: the shard of the batch.
        rows: positions of the images in the shard, int64 ``[N]``.
        pixels: uint8 ``[N, 3, H, W]`` on the CPU.
        vectors: their embeddings, float32 ``[N, D]`` on the CPU, which nothing has been proved of.
        seconds: for one image of the batch, on the clock.
        full: False if it is the last one of its shard.
    """

    shard: Shard
    rows: NDArray[np.int64]
    pixels: torch.Tensor
    vectors: torch.Tensor
    seconds: float
    full: bool


@dataclass(frozen=True, slots=True)
class FirstImages:
    """The images of the first batches with their references; ``complete`` if the manifest has no others."""

    sample: Sample
    refs: tuple[ImageRef, ...]
    complete: bool

    def has(self, count: int) -> bool:
        """True if there are ``count`` images, or all of the manifest."""
        return self.complete or len(self.refs) >= count


def first_images(manifest: Manifest, first: Sequence[FirstBatch]) -> FirstImages | None:
    """The images of ``first``; None where there are none, or a sample is spread over the row groups of the manifest.

    Of a manifest of one row group, :func:`draw_sample` takes the first images: those of the first batches are no worse.
    """
    if not first or sum(len([rows for rows in file.row_groups if rows]) for file in manifest.files) != 1:
        return None
    found = [ref for batch in first for ref in _refs_of(manifest, batch)]
    sample = Sample(
        ids=tuple(str(ref.id) for ref in found),
        pixels=torch.cat([batch.pixels for batch in first]),
        vectors=torch.cat([batch.vectors for batch in first]),
    )
    return FirstImages(sample, tuple(found), complete=not first[-1].full and first[-1].shard.rows == manifest.rows)


def _refs_of(manifest: Manifest, first: FirstBatch) -> list[ImageRef]:
    wanted, found, start = set(first.rows.tolist()), list[ImageRef](), 0
    with ShardReader(manifest) as reader:
        for batch in reader.read(first.shard):
            found += [ref for row, ref in enumerate(refs(manifest, batch), start) if row in wanted]
            start += batch.num_rows
            if len(found) == len(wanted):
                break
    return found


def read_sample(reader: PixelReader, images: Sequence[ImageRef]) -> Sample | None:
    """Those of the images that ``reader`` can decode; None if it can decode none."""
    limit_pixels(reader.decoder.max_pixels)
    with ThreadPoolExecutor(SAMPLE_THREADS) as threads:
        read = [
            (str(ref.id), pixels)
            for ref, pixels in zip(images, threads.map(reader.read, images), strict=True)
            if not isinstance(pixels, Failure)
        ]
    return stack(*zip(*read, strict=True)) if read else None


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
