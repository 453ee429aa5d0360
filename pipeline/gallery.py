"""A few images of the dataset with what was said of them, for the report's page."""

from __future__ import annotations

import io
from itertools import islice

import pyarrow.parquet as pq
from PIL import Image

from pipeline.addresses import open_arrow
from pipeline.images.decode import Decoder
from pipeline.images.sources import Source
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.manifest.source import Manifest
from pipeline.records import OK, Failure
from pipeline.report.page import Example

THUMBNAIL = 160
# Rows of the first shard among which examples are spread: a bytes column is not read much further.
REACH = 512


def gallery(
    manifest: Manifest, source: Source, decoder: Decoder, *, part: str, shard_rows: int, count: int
) -> list[Example]:
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
    with ShardReader(manifest) as reader:
        images = (ref for batch in reader.read(shard) for ref in refs(manifest, batch))
        for position, ref in enumerate(islice(images, max(chosen, default=-1) + 1)):
            data = source.read(ref) if position in chosen else None
            if data is None or isinstance(data, Failure):
                continue
            image = decoder.decode(data)
            if isinstance(image, Failure):
                continue
            row = table.slice(position, 1).to_pylist()[0]
            examples.append(
                Example(id=str(row[manifest.id]), label=row["label"], score=row["score"], thumbnail=_thumbnail(image))
            )
    return examples


def _thumbnail(image: Image.Image) -> bytes:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
