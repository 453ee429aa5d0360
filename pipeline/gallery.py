"""A few images of the dataset with what was said of them, for the report's page."""

from __future__ import annotations

import dataclasses
import io
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.addresses import open_arrow
from pipeline.images.reader import PixelReader
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.manifest.source import Manifest
from pipeline.records import OK, Failure, Pixels, PreprocessSpec
from pipeline.report.page import Example

# The square in the middle, which is about what the model saw.
THUMBNAIL = PreprocessSpec(
    resize=160, crop=(160, 160), resample=Image.Resampling.BICUBIC, mean=(0, 0, 0), std=(1, 1, 1)
)
# Rows of the first shard among which examples are spread: a bytes column is not read much further.
REACH = 512


def gallery(manifest: Manifest, reader: PixelReader, *, part: str, shard_rows: int, count: int) -> list[Example]:
    """Up to ``count`` embedded images, spread evenly over the first rows of the first shard.

    ``part`` is the address of the first shard's part.
    """
    if count == 0:
        return []
    with open_arrow(part) as file:
        table = pq.read_table(file, columns=[manifest.id, "label", "score", "status"]).slice(0, REACH)
    good = [position for position, status in enumerate(table["status"].to_pylist()) if status == OK]
    step = max(1, len(good) // count)
    chosen = set(good[::step][:count])
    examples: list[Example] = []
    shard = next(cut(manifest, shard_rows))
    # A decoder on the GPU makes pictures of the model's size alone.
    thumbnails = dataclasses.replace(reader, spec=THUMBNAIL, gpu=None)
    with ShardReader(manifest) as rows:
        images = (ref for batch in rows.read(shard) for ref in refs(manifest, batch))
        for position, ref in enumerate(islice(images, max(chosen, default=-1) + 1)):
            pixels = thumbnails.read(ref) if position in chosen else None
            if pixels is None or isinstance(pixels, Failure):
                continue
            row = table.slice(position, 1).to_pylist()[0]
            examples.append(
                Example(id=str(row[manifest.id]), label=row["label"], score=row["score"], thumbnail=_jpeg(pixels))
            )
    return examples


def _jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels.rgb)).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
