"""The images of a benchmark: good ones of the manifest, in a manifest of their own and in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.bench.command import quoted
from pipeline.core.concurrency import in_order
from pipeline.core.errors import ManifestError
from pipeline.core.records import Failure, ImageRef, Pixels
from pipeline.engine.sample import stack
from pipeline.images.decode import limit_pixels
from pipeline.images.pool.protocol import CHUNK
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, cut, refs

# The most images, and the most bytes of them, that are held in memory for the stages alone.
HELD_IMAGES, HELD_BYTES = 1024, 512 * 2**20
# Images that are taken where no number is given.
MOST = 1000


@dataclass(frozen=True, slots=True)
class Images:
    """The images that were taken, as a manifest (values for the config), and the first of them in memory.

    ``encoded`` are files, ``pixels`` uint8 ``[N, H, W, 3]``; ``bad`` ones were left out.
    """

    manifest: dict[str, Any]
    encoded: list[bytes]
    pixels: torch.Tensor
    count: int
    bad: int

    def overrides(self) -> list[str]:
        """Return the overrides of a job that name the manifest."""
        values = {name: quoted(str(value)) for name, value in self.manifest.items() if name != "keep"}
        return ["manifest.keep=[]", *(f"manifest.{name}={value}" for name, value in values.items())]

    def describe(self, source: str) -> str:
        """Return a text with the number of images from a source, and the medians of those in memory."""
        megapixels = median(_megapixels(data) for data in self.encoded)
        kilobytes = median(len(data) for data in self.encoded) / 1000
        left_out = f", {self.bad} bad ones left out" if self.bad else ""
        return (
            f"{self.count:,} {source} (median {megapixels:.2f} megapixels, {kilobytes:,.0f} kB{left_out}; "
            f"{len(self.encoded):,} in memory for the stages alone)"
        )


def take_images(given: Manifest, reader: PixelReader, work: Path, *, count: int | None, threads: int) -> Images:
    """Take the first ``count`` good images of a manifest, repeated where it is shorter.

    Paths stay paths, bytes stay bytes.

    Raises:
        ManifestError: there is no good image.
    """
    wanted = min(given.rows, MOST) if count is None else count
    good: list[ImageRef] = []
    encoded: list[bytes] = []
    pictures: list[Pixels] = []
    bad = size = 0
    for ref, result in _decoded(given, reader, threads):
        if isinstance(result, Failure):
            bad += 1
            continue
        good.append(ref)
        data = reader.source.read(ref) if len(encoded) < HELD_IMAGES and size < HELD_BYTES else None
        if isinstance(data, bytes):
            encoded.append(data)
            pictures.append(result)
            size += len(data)
        if len(good) >= wanted:
            break
    if not encoded:
        raise ManifestError(f"none of the {bad} images that were tried can be decoded")
    return Images(
        manifest=_write_manifest(given, [good[i % len(good)] for i in range(wanted)], work),
        encoded=encoded,
        pixels=stack([str(i) for i in range(len(pictures))], pictures).pixels.permute(0, 2, 3, 1).contiguous(),
        count=wanted,
        bad=bad,
    )


def image_refs(manifest: Manifest) -> Iterator[ImageRef]:
    """Yield the image references of all rows, in order."""
    with ShardReader(manifest) as reader:
        for shard in cut(manifest, 4096):
            for rows in reader.read(shard):
                yield from refs(manifest, rows)


def _decoded(given: Manifest, reader: PixelReader, threads: int) -> Iterator[tuple[ImageRef, Pixels | Failure]]:
    limit_pixels(reader.decoder.max_pixels)
    every = image_refs(given)
    chunks = iter(lambda: list(islice(every, CHUNK)), [])

    def decode(chunk: list[ImageRef]) -> list[tuple[ImageRef, Pixels | Failure]]:
        results = reader.read_all(chunk, lambda stage, seconds: None)
        return [(ref, result) for ref, result in zip(chunk, results, strict=True) if result is not None]

    for pairs in in_order(decode, chunks, threads=threads):
        yield from pairs


def _write_manifest(given: Manifest, taken: Sequence[ImageRef], work: Path) -> dict[str, Any]:
    """Write the manifest of the images that were taken; return values for the config."""
    if given.image_kind == "path":
        cells = pa.array([ref.path for ref in taken], pa.string())
    elif given.image_kind == "bytes":
        cells = pa.array([ref.data for ref in taken], pa.binary())
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = pa.array([{"bytes": ref.data, "path": ref.path} for ref in taken], kind)
    table = pa.table({"id": [f"{i:07d}" for i in range(len(taken))], "image": cells})
    # In a folder of its own, as an output may not lie beside a manifest.
    path = work / "manifest" / "images.parquet"
    path.parent.mkdir()
    pq.write_table(table, path, row_group_size=1024)
    return {"path": str(path), "id": "id", "image": "image", "keep": [], "root": given.root}


def _megapixels(data: bytes) -> float:
    with Image.open(io.BytesIO(data)) as image:
        return image.width * image.height / 1e6
