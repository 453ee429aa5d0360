"""A few images of the manifest's first rows, and what became of those that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.records import Failure, Piece, Pixels, Sample, Shard
from pipeline.engine.sample import stack
from pipeline.images.decode import limit_pixels
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, refs


@dataclass(frozen=True, slots=True)
class Drawn:
    """The images that can be read, None for none; the others with their ids; and how many were tried."""

    sample: Sample | None
    failures: tuple[tuple[str, Failure], ...]
    tried: int


def draw(manifest: Manifest, reader: PixelReader, count: int) -> Drawn:
    """Read up to ``count`` images: those of the first rows, always the same ones."""
    limit_pixels(reader.decoder.max_pixels)
    group = next(index for index, rows in enumerate(manifest.files[0].row_groups) if rows)
    rows = min(count, manifest.files[0].row_groups[group])
    shard = Shard(index=0, rows=rows, pieces=(Piece(file=0, row_group=group, start=0, stop=rows),))
    with ShardReader(manifest) as opened:
        chosen = [ref for batch in opened.read(shard) for ref in refs(manifest, batch)]
    results = [(str(ref.id), reader.read(ref)) for ref in chosen]
    good = [(id, result) for id, result in results if isinstance(result, Pixels)]
    return Drawn(
        sample=stack([id for id, _ in good], [pixels for _, pixels in good]) if good else None,
        failures=tuple((id, result) for id, result in results if isinstance(result, Failure)),
        tried=len(chosen),
    )


def repeated(sample: Sample, count: int) -> Sample:
    """``count`` pictures: those of the sample, begun again where they end."""
    rows = [place % len(sample.ids) for place in range(count)]
    return Sample(ids=tuple(sample.ids[row] for row in rows), pixels=sample.pixels[rows])
