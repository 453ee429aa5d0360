"""The images and the model of a benchmark, as files that the job and other tools take alike."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.core.errors import ManifestError
from pipeline.core.records import Failure, ImageRef, Pixels, PreprocessSpec
from pipeline.engine.sample import stack
from pipeline.images.decode import limit_pixels
from pipeline.images.pool.protocol import CHUNK
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.urls import is_local, local_path

# Held in memory for the stages alone: so many images at most, and so many bytes of them.
HELD_IMAGES, HELD_BYTES = 1024, 512 * 2**20
# Chunks that are decoded before one looks whether there are enough.
AT_ONCE = 16
# Images of a manifest that are taken where no number is given.
MOST = 1000
FILES = "files.json"
PROCESSORS = {
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """The images that were taken, how many the manifest has, how many of those tried were bad, and what they are like.

    ``held`` of them are in memory; ``megapixels`` and ``kilobytes`` are medians of those.
    """

    images: int
    rows: int
    bad: int
    held: int
    megapixels: float
    kilobytes: float


@dataclass(frozen=True, slots=True)
class Copies:
    """A manifest of good images (``manifest``: values for the config), and the first of them in memory.

    ``encoded`` are files, ``pixels`` uint8 ``[N, H, W, 3]``.
    """

    manifest: dict[str, Any]
    encoded: list[bytes]
    pixels: torch.Tensor
    facts: Facts


def copy_images(
    given: Manifest, reader: PixelReader, work: Path, *, count: int | None, files: bool, threads: int
) -> Copies:
    """A manifest of the first ``count`` good images of ``given``, begun again where they end.

    Paths stay paths, bytes stay bytes. With ``files``, a list of image files is written too.

    Raises:
        ManifestError: there is no good image.
    """
    wanted = min(given.rows, MOST) if count is None else count
    good: list[ImageRef] = []
    encoded: list[bytes] = []
    pictures: list[Pixels] = []
    bad = held = 0
    limit_pixels(reader.decoder.max_pixels)
    chunks = _chunks(given)
    with ThreadPoolExecutor(threads) as pool:
        # A few at a time: a manifest may be longer than what is wanted of it.
        while len(good) < wanted and (some := list(islice(chunks, AT_ONCE))):
            decoded = pool.map(lambda chunk: reader.read_all(chunk, lambda stage, seconds: None), some)
            for ref, result in zip(chain(*some), chain.from_iterable(decoded), strict=True):
                if isinstance(result, Failure):
                    bad += 1
                    continue
                assert result is not None
                good.append(ref)
                if len(encoded) < min(wanted, HELD_IMAGES) and held < HELD_BYTES:
                    data = reader.source.read(ref)
                    if isinstance(data, bytes):
                        encoded.append(data)
                        pictures.append(_on_host(result))
                        held += len(data)
    if not encoded:
        raise ManifestError(f"none of the {bad} images that were tried can be decoded")
    taken = [good[i % len(good)] for i in range(wanted)]
    # A folder of its own, as an output may not lie beside a manifest.
    folder = work / "manifest"
    folder.mkdir()
    if given.image_kind == "path":
        cells = pa.array([ref.path for ref in taken], pa.string())
    elif given.image_kind == "bytes":
        cells = pa.array([ref.data for ref in taken], pa.binary())
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = pa.array([{"bytes": ref.data, "path": ref.path} for ref in taken], kind)
    ids = [f"{i:07d}" for i in range(wanted)]
    table = pa.table({"id": ids, "image": cells})
    pq.write_table(table, folder / "images.parquet", row_group_size=1024)
    if files:
        (work / FILES).write_text(json.dumps(_as_files(taken, good[:wanted], reader, work)))
    return Copies(
        manifest={
            "path": str(folder / "images.parquet"),
            "id": "id",
            "image": "image",
            "keep": [],
            "root": given.root,
        },
        encoded=encoded,
        pixels=stack([str(i) for i in range(len(pictures))], pictures).pixels.permute(0, 2, 3, 1).contiguous(),
        facts=Facts(
            images=wanted,
            rows=given.rows,
            bad=bad,
            held=len(encoded),
            megapixels=median(_megapixels(data) for data in encoded),
            kilobytes=median(len(data) for data in encoded) / 1000,
        ),
    )


def save_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Save what other tools load: model, tokenizer and preprocessing."""
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    values = preprocessor_of(checkpoint.spec, checkpoint.family)
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=1))


def preprocessor_of(spec: PreprocessSpec, family: str) -> dict[str, Any]:
    """The spec as transformers spells it."""
    size: dict[str, int] = (
        {"shortest_edge": spec.resize}
        if isinstance(spec.resize, int)
        else {"height": spec.resize[0], "width": spec.resize[1]}
    )
    values: dict[str, Any] = {
        "image_processor_type": PROCESSORS[family],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": spec.resample,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.crop is not None:
        values |= {"do_center_crop": True, "crop_size": {"height": spec.crop[0], "width": spec.crop[1]}}
    elif family == "chinese_clip":
        values["do_center_crop"] = False
    return values


def _chunks(manifest: Manifest) -> Iterator[list[ImageRef]]:
    with ShardReader(manifest) as reader:
        every = (ref for shard in cut(manifest, 4096) for rows in reader.read(shard) for ref in refs(manifest, rows))
        while chunk := list(islice(every, CHUNK)):
            yield chunk


def _as_files(taken: list[ImageRef], good: list[ImageRef], reader: PixelReader, work: Path) -> list[str]:
    """Where the images lie; what is no file of this machine becomes one."""
    root = reader.source.root
    places: dict[str | int, str] = {}
    for number, ref in enumerate(good):
        path = Path(local_path(root)) / local_path(ref.path or "")
        if ref.data is None and ref.path and is_local(root) and is_local(ref.path) and path.is_file():
            places[ref.id] = str(path)
            continue
        data = reader.source.read(ref)
        path = work / "files" / f"{number:07d}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else b"")
        places[ref.id] = str(path)
    return [places[ref.id] for ref in taken]


def _on_host(pixels: Pixels) -> Pixels:
    """The same in the host's memory; what a GPU decoded lies there."""
    return Pixels(pixels.rgb.cpu().numpy()) if isinstance(pixels.rgb, torch.Tensor) else pixels


def _megapixels(data: bytes) -> float:
    with Image.open(io.BytesIO(data)) as image:
        return image.width * image.height / 1e6
