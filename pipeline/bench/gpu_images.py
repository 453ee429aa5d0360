"""``python -m pipeline.bench.gpu_images FOLDER COUNT``: JPEG files of 0.2 megapixels, rendered on all cores.

Each has a figure, a background and noise of all scales: detail decides what decoding costs. Pictures come again under
other bytes: a comment makes each file unique, so that no image is skipped as a repeat.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.processes import cores
from pipeline.manifest.manifest import ROOT_KEY

SIZE = (512, 400)
QUALITY = 88
# Different pictures of one process; the files of its share repeat them.
PICTURES = 48
SEED = 40_000_003
# Rows of one Parquet file, and of its row groups.
ROWS, GROUP = 8192, 1024


# Manifests of fewer rows are the first part of them: 1 in so many.
PARTS = (1, 2, 8)


def files_in(folder: Path, part: int = 1) -> Path:
    """The manifest of paths."""
    return folder / f"files-{part}.parquet"


def bytes_in(folder: Path, part: int = 1) -> Path:
    """The folder of manifests whose rows hold the bytes."""
    return folder / f"bytes-{part}"


def picture(number: int) -> bytes:
    """A JPEG file of a figure in front of noise of all scales."""
    from pipeline.engine.demo import scenes

    width, height = SIZE
    rng = np.random.default_rng([SEED, number])
    noise = np.zeros((height, width, 3), np.float32)
    for step in (1, 2, 4, 8, 16, 32, 64):
        # Amplitudes grow with the scale, as in natural images.
        small = rng.standard_normal((-(-height // step), -(-width // step), 3), dtype=np.float32) * 3.5 * step**0.5
        layers = [Image.fromarray(small[..., c]).resize(SIZE, Image.Resampling.BILINEAR) for c in range(3)]
        noise += np.stack([np.asarray(layer) for layer in layers], axis=2)
    scene = np.asarray(scenes.render(scenes.sample(SEED, number), width, height), np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(scene + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def numbered(data: bytes, number: int) -> bytes:
    """The same picture with a comment, ITU-T T.81 B.2.4.5, behind the marker that begins the file."""
    text = f"{number:010d}".encode()
    return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]


def write_share(folder: Path, start: int, stop: int, pictures: int = PICTURES) -> None:
    """Write the files ``start`` to ``stop``, and their rows of bytes."""
    drawn = [picture(start + i) for i in range(min(pictures, stop - start))]
    rows = [numbered(drawn[i % len(drawn)], i) for i in range(start, stop)]
    for number, data in enumerate(rows, start):
        path = folder / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    table = pa.table({"id": ids(start, stop), "image": pa.array(rows, pa.binary())})
    # JPEG does not compress, and a dictionary of unique values is their copy.
    pq.write_table(
        table,
        share_of(folder, start),
        row_group_size=GROUP,
        compression="none",
        use_dictionary=False,
    )


def share_of(folder: Path, start: int) -> Path:
    """The file of the rows of bytes from ``start`` on."""
    return bytes_in(folder) / f"{start:08d}.parquet"


def ids(start: int, stop: int) -> list[str]:
    """The ids of rows."""
    return [f"{number:08d}" for number in range(start, stop)]


def name_of(number: int) -> str:
    """The name of a file below the folder."""
    return f"files/{number // 1000:05d}/{number:08d}.jpg"


def render(folder: Path, count: int) -> None:
    """Render ``count`` images; the manifests of paths are written last."""
    for part in PARTS:
        bytes_in(folder, part).mkdir(parents=True, exist_ok=True)
    size = min(ROWS, -(-count // cores()))
    starts = range(0, count, size)
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for share in [pool.submit(write_share, folder, start, min(start + size, count)) for start in starts]:
            share.result()
    for part in reversed(PARTS):
        rows = max(1, count // part)
        for start in starts:
            if part > 1 and start < rows:
                os.link(share_of(folder, start), bytes_in(folder, part) / share_of(folder, start).name)
        table = pa.table({"id": ids(0, rows), "path": [name_of(number) for number in range(rows)]})
        table = table.replace_schema_metadata({ROOT_KEY: str(folder.resolve()).encode()})
        pq.write_table(table, files_in(folder, part))


if __name__ == "__main__":
    render(Path(sys.argv[1]), int(sys.argv[2]))
