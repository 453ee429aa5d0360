"""The pipeline's own cost per row: all of it real but the reading, the decoding and the encoder.

``python -m tests.own_cost [ROWS] [--dtype float16] [--batch 256] [--tar 15000] [--streamed]`` makes a manifest of ROWS
rows (an id and a path each), streams it through the loader, the labels, the parts and the commits on one core, and
prints the CPU time of a row: user and system time of the whole process, over every thread, fsync included.

What stands in: a source that gives a few bytes for every path without a look at the disk, decoders that give
ready-made pictures of 8 x 8 pixels (so that copying pixels is not the measure), and an encoder of 512 dimensions that
looks ready-made unit vectors up. Rows get the best 5 of 10 labels. With ``--tar BYTES``, rows are members of a tar of
so many bytes each, which are read; with ``--streamed`` too, the tars are the manifest.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.streams import count_streams
from pipeline.config.schema import Config, LoaderConfig, ManifestConfig, OutputConfig
from pipeline.core.records import Failure, ImageRef, Pixels, PreprocessSpec, TextBank
from pipeline.dataset.parts import part_format
from pipeline.engine.loop import Job, Worker, embed
from pipeline.images.decode import Decoder
from pipeline.images.pool.pool import Decoders, GiveBack
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source
from pipeline.manifest.build import from_tars
from pipeline.manifest.manifest import open_manifest
from pipeline.manifest.shards import cut
from pipeline.telemetry.clocks import StageClocks

SIDE, DIM, LABELS, TOP_K = 8, 512, 10, 5
SPEC = PreprocessSpec(resize=SIDE, crop=(SIDE, SIDE), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
# More pictures than a page of a part has rows, or else the parts would be smaller than embeddings can be. They are told
# apart by two numbers of the first pixel.
MANY = 4096
PICTURES = [Pixels(rgb=np.full((SIDE, SIDE, 3), (n // 256, n % 256, 0), dtype=np.uint8)) for n in range(MANY)]
VECTORS = np.random.default_rng(0).standard_normal((MANY, DIM), dtype=np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


@dataclass(frozen=True)
class ReadySource:
    """The path itself stands for the bytes of the image."""

    max_bytes: int = 0

    def read(self, ref: ImageRef) -> bytes | Failure:
        return (ref.path or "").encode()


class ReadyDecoders:
    """Looks the picture up by the number at the end of the path."""

    processes, lent = 1, 0

    def decode(
        self,
        encoded: list[bytes],
        spec: PreprocessSpec,
        abandoned: Callable[[], bool],
        give_back: list[GiveBack] | None,
        *,
        exact: bool,
    ) -> list[Pixels | Failure]:
        return [PICTURES[int(data[-9:]) % MANY] for data in encoded]

    def peak_rss(self) -> int:
        return 0

    def close(self) -> None:
        pass


class ReadyEncoder(ImageEncoder):
    """Looks the embedding up by the first pixel."""

    name, precision, dim = "torch", "fp32", DIM

    def __init__(self, batch_size: int) -> None:
        self.device, self.batch_size = torch.device("cpu"), batch_size
        # As for every encoder on a CPU: threads of torch that wait for one another would be the measure.
        self.streams = count_streams(0, self.device)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        first = pixels.numpy()[:, :2, 0, 0].astype(np.int64)
        return torch.from_numpy(VECTORS[first[:, 0] * 256 + first[:, 1]])

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name}


@dataclass(frozen=True)
class Cost:
    """Figures of one run: microseconds of CPU time a row, bytes of the parts against those of the embeddings."""

    rows: int
    cpu_us: float
    system_us: float
    wall_us: float
    rows_per_cpu_second: float
    size_ratio: float
    threads_us: dict[str, float] = field(default_factory=dict)
    stages_us: dict[str, float] = field(default_factory=dict)


def write_manifest(path: Path, rows: int, group: int = 50_000) -> None:
    """Ids and paths as a folder of photos would give them."""
    schema = pa.schema([("id", pa.string()), ("path", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, group):
            names = [f"shard-{n // 1000:05d}/photo-{n:09d}" for n in range(start, min(rows, start + group))]
            writer.write_table(pa.table({"id": names, "path": names}, schema=schema))


def write_tars(folder: Path, rows: int, size: int) -> None:
    """Tars of MANY members of ``size`` bytes that end with their number, and their manifest."""
    noise = np.random.default_rng(0).bytes(size - 9)
    for first in range(0, rows, MANY):
        with tarfile.open(folder / f"{first:09d}.tar", "w") as tar:
            for row in range(first, min(rows, first + MANY)):
                info = tarfile.TarInfo(f"{row:09d}.jpg")
                info.size = size
                tar.addfile(info, io.BytesIO(noise + f"{row:09d}".encode()))
    from_tars([str(folder / "*.tar")], str(folder / "manifest.parquet"))


@contextmanager
def _thread_times(spent: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of threads by the first word of their names, as they end."""
    run = threading.Thread.run

    def timed(thread: threading.Thread) -> None:
        try:
            run(thread)
        finally:
            name = thread.name.split("_")[0]
            spent[name] = spent.get(name, 0.0) + time.thread_time()

    threading.Thread.run = timed  # type: ignore[method-assign]
    started = time.thread_time()
    try:
        yield
    finally:
        spent["loop"] = time.thread_time() - started
        threading.Thread.run = run  # type: ignore[method-assign]


def job_for(
    folder: Path, *, dtype: str, compression: str, batch: int, workers: int, tar: int, streamed: bool
) -> tuple[Job, PixelReader]:
    """A job over ``folder/manifest.parquet``, or its tars, into ``folder/out``, and the reader that decodes nothing."""
    config = Config(
        manifest=ManifestConfig(path=str(folder / ("*.tar" if streamed else "manifest.parquet")), shard_rows=MANY),
        loader=LoaderConfig(batch_size=batch, workers=workers),
        output=OutputConfig(dir=str(folder / "out"), dtype=dtype, compression=compression),
    )
    manifest = open_manifest(config.manifest)
    bank = TextBank(
        names=tuple(f"label {n}" for n in range(LABELS)),
        features=VECTORS[:LABELS],
        scoring="softmax",
        scale=100.0,
        bias=0.0,
        fingerprint="",
    )
    form = part_format(manifest.schema, dim=DIM, dtype=dtype, compression=compression, fingerprints={})
    reader = PixelReader(
        source=Source(root=manifest.root, max_bytes=2**20) if tar else cast("Source", ReadySource()),
        decoder=Decoder(formats=("JPEG",), max_pixels=100_000_000),
        spec=SPEC,
        decoders=cast("Decoders", ReadyDecoders()),
    )
    return Job(config=config, manifest=manifest, form=form, bank=bank), reader


def measure(
    folder: Path,
    rows: int,
    *,
    dtype: str = "float32",
    compression: str = "zstd",
    batch: int = 64,
    workers: int = 1,
    tar: int = 0,
    streamed: bool = False,
    warm: bool = True,
) -> Cost:
    """Run the loop over ``rows`` rows in this process; with ``warm``, over a small shard before."""
    if not (folder / "manifest.parquet").exists():
        if tar:
            write_tars(folder, rows, tar)
        else:
            write_manifest(folder / "manifest.parquet", rows)
    options: dict[str, Any] = {"batch": batch, "workers": workers, "tar": tar, "streamed": streamed}
    job, reader = job_for(folder, dtype=dtype, compression=compression, **options)
    clocks, spent = StageClocks(), dict[str, float]()
    shards = list(cut(job.manifest, job.config.manifest.shard_rows))
    if warm:
        list(embed(shards[:1], job, Worker(reader, ReadyEncoder(batch), StageClocks())))
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with _thread_times(spent):
        done = sum(one.rows for one in embed(shards[warm:], job, Worker(reader, ReadyEncoder(batch), clocks)))
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    size = sum(part.stat().st_size for part in (folder / "out").glob("part-*.parquet"))
    raw = rows * DIM * np.dtype(dtype).itemsize

    def each(seconds: float) -> float:
        return round(seconds / done * 1e6, 2)

    return Cost(
        rows=done,
        cpu_us=each(user + system),
        system_us=each(system),
        wall_us=each(wall),
        rows_per_cpu_second=round(done / (user + system)),
        size_ratio=round(size / raw, 4),
        threads_us={name: each(seconds) for name, seconds in sorted(spent.items())},
        stages_us={name: each(seconds) for name, seconds in clocks.total().seconds.items()},
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=int, default=200_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compression", default="zstd")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tar", type=int, default=0, help="bytes of each member of a tar, instead of paths alone")
    parser.add_argument("--streamed", action="store_true", help="read the tars without a manifest of Parquet")
    parser.add_argument("--folder", type=Path, help="where the manifest and the dataset go for the time being")
    given = parser.parse_args(arguments)
    settings: dict[str, Any] = {
        name: getattr(given, name) for name in ("dtype", "compression", "batch", "workers", "tar", "streamed")
    }
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    # As pipeline.run does.
    gc.set_threshold(100_000, 20, 50)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        cost = measure(Path(folder), given.rows, **settings)
    print(json.dumps({**settings, **asdict(cost)}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
