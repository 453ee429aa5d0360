"""``python -m pipeline.bench feed``: the speed at which images reach the process of the encoder, and its cost there.

All is real, from the manifest to committed parts, but two ends: decoders answer at once, and an encoder looks up random
embeddings. So the figures are those of the pipeline itself, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench import command
from pipeline.core.errors import ConfigError, Interrupted

EXAMPLES = """\
examples:
  python -m pipeline.bench feed
  python -m pipeline.bench feed --feeders 0 --rows 8192
  python -m pipeline.bench feed --rate 8000

driver: the process of the encoder; feeder: one that reads and fills batches. Core microseconds are those of a process
with all its threads, without the decoders. --feeders 0 reads in the driver. Files are in a temporary folder (TMPDIR).
exit codes: 0 done, 2 wrong options or machine, 1 interrupted or anything else
"""
# Bytes of an image file of 0.2 megapixels, side of a picture, length and number of embeddings.
FILE_BYTES, SIDE, DIM, VECTORS = 30_000, 224, 512, 4096
BATCH, SHARD, MOST_SHARDS = 512, 4096, 32
# Small operations of torch: about those of a forward of ViT-B/32, for how long they are repeated, and how often.
OPERATIONS, LAUNCH_SECONDS, LAUNCH_ROUNDS = 350, 0.4, 5


@dataclass(frozen=True, slots=True)
class _Bench:
    """Rows of each run, feeders, the folder of the files, and images/s that are held beside the launches."""

    rows: int
    feeders: int
    folder: Path
    rate: float

    def job(self, source: str, output: str) -> tuple[Any, Any]:
        """A job over the files or the bytes, and its worker."""
        import pyarrow as pa

        from pipeline.config.schema import Config
        from pipeline.core.records import PreprocessSpec, TextBank
        from pipeline.dataset.parts import part_format
        from pipeline.engine.loop import Job, Worker
        from pipeline.images.factory import pixel_reader
        from pipeline.manifest.manifest import open_manifest
        from pipeline.telemetry.clocks import StageClocks

        pa.set_cpu_count(1)
        config = Config().changed(
            {
                "manifest.path": str(self.folder / f"{source}.parquet"),
                "manifest.root": str(self.folder),
                "manifest.image": "path" if source == "files" else "image",
                "manifest.shard_rows": SHARD,
                "output.dir": str(self.folder / output),
                "loader.batch_size": BATCH,
                "loader.feeders": self.feeders,
                "images.decoder": "blank",
            }
        )
        manifest = open_manifest(config.manifest)
        vectors = _vectors()
        names = tuple(f"label {number}" for number in range(10))
        bank = TextBank(names=names, features=vectors[:10], scoring="softmax", scale=100.0, bias=0.0, fingerprint="")
        form = part_format(manifest.schema, dim=DIM, dtype="float32", compression="zstd", fingerprints={})
        spec = PreprocessSpec(resize=SIDE, crop=(SIDE, SIDE), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
        reader = pixel_reader(config, manifest.root, spec)
        return Job(config, manifest, form, bank), Worker(reader, _encoder(vectors), StageClocks())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print JSON; return the exit code."""

    def work(options: argparse.Namespace, line: str) -> str:
        problems = command.too_small(options, {"rows": 2 * SHARD, "feeders": 0, "rate": 1})
        if problems:
            raise ConfigError(problems)
        with tempfile.TemporaryDirectory(prefix="clip-pipeline-") as folder:
            bench = _Bench(-(-options.rows // SHARD) * SHARD, options.feeders, Path(folder), options.rate)
            return json.dumps(_measure(bench, line), indent=2) + "\n"

    return command.run(_parser(), arguments, work)


def _measure(bench: _Bench, line: str) -> dict[str, object]:
    from pipeline.core.machine import machine, versions
    from pipeline.core.processes import cores

    command.progress(f"writing {SHARD:,} files and {bench.rows:,} rows")
    _write(bench)
    found: dict[str, object] = {
        "command": line,
        "machine": machine("cpu", cores()),
        "versions": versions(),
        "rows": bench.rows,
        "feeders": bench.feeders,
        "batch_size": BATCH,
    }
    for source in ("files", "bytes"):
        command.progress(f"{source}: all of a job")
        found[source] = _whole(bench, source)
        command.progress(f"{source}: batches alone")
        found[source] |= {"batches_alone": _batches(bench, source)}  # type: ignore[operator]
    command.progress("launches beside the loader")
    found["launches"] = _launches(bench)
    return found


def _write(bench: _Bench) -> None:
    """Write one shard of files, and a manifest of paths and one of bytes; the bytes of a shard are all different."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    (bench.folder / "photos").mkdir()
    images = [b"\xff\xd8\xff" + random.bytes(FILE_BYTES - 3) for _ in range(SHARD)]
    paths = [f"photos/{number:06d}.jpg" for number in range(SHARD)]
    for path, data in zip(paths, images, strict=True):
        (bench.folder / path).write_bytes(data)
    shards = bench.rows // SHARD
    # Enough for all rounds of the launches.
    ids = [f"photo-{number:09d}" for number in range(SHARD * max(shards, MOST_SHARDS))]
    pq.write_table(pa.table({"id": ids, "path": paths * (len(ids) // SHARD)}), bench.folder / "files.parquet")
    with pq.ParquetWriter(
        bench.folder / "bytes.parquet",
        pa.schema([("id", pa.string()), ("image", pa.binary())]),
        compression="none",
        use_dictionary=False,
    ) as writer:
        for shard in range(shards):
            own = ids[shard * SHARD : (shard + 1) * SHARD]
            writer.write_table(pa.table({"id": own, "image": pa.array(images, pa.binary())}), row_group_size=512)
    # Else the system writes them while it is measured.
    os.sync()


def _whole(bench: _Bench, source: str) -> dict[str, float]:
    """A whole job to committed parts; its first shard is warm-up."""
    from pipeline.engine.loop import embed
    from pipeline.manifest.shards import cut

    job, worker = bench.job(source, f"out-{source}")
    with worker.reader:
        marks: list[tuple[float, float]] = []

        def mark(*_: object) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        shards = islice(cut(job.manifest, SHARD), bench.rows // SHARD)
        for _ in embed(shards, job, worker, on_commit=mark):
            pass
    (began, before), (ended, after) = marks[0], marks[-1]
    images = SHARD * (len(marks) - 1)
    clocks = worker.clocks.total().cores
    fed = sum(clocks.get(stage, 0.0) for stage in ("read", "decode", "copy"))
    return {
        "images_per_second": round(images / (ended - began), 1),
        "driver_core_us_per_image": round((after - before) / images * 1e6, 2),
        "feeder_core_us_per_image": round(fed / bench.rows * 1e6, 2) if bench.feeders else 0.0,
    }


def _batches(bench: _Bench, source: str) -> dict[str, float]:
    """Batches that are given back at once, without parts."""
    with _stream(bench, source, bench.rows // SHARD) as (loader, items):
        first = next(items)
        loader.release(first)
        before, began, images = time.process_time(), time.perf_counter(), 0
        for item in items:
            if hasattr(item, "pixels"):
                loader.release(item)
                images += len(item.rows)
        seconds, spent = time.perf_counter() - began, time.process_time() - before
    return {
        "images_per_second": round(images / seconds, 1),
        "driver_core_us_per_image": round(spent / images * 1e6, 2),
    }


@contextmanager
def _stream(bench: _Bench, source: str, shards: int | None = None) -> Iterator[tuple[Any, Iterator[Any]]]:
    from pipeline.engine.loop import open_loader
    from pipeline.manifest.shards import cut

    job, worker = bench.job(source, "none")
    with worker.reader, open_loader(job.config, job.manifest, worker, 2) as loader:
        yield loader, iter(loader.stream(islice(cut(job.manifest, SHARD), shards)))


def _launches(bench: _Bench) -> dict[str, float]:
    """Small operations of torch beside a loader whose batches are taken at a steady rate, and while it is paused.

    Both are measured in turn, several times. The driver has one core and the feeders have the others.
    """
    ours, theirs = _split()
    _pin(theirs)
    with _stream(bench, "files") as (loader, items):
        loader.release(next(items))
        _pin(ours)
        taker = _Taker(loader, items, bench.rate)
        times = [_round(taker) for _ in range(LAUNCH_ROUNDS)]
        taker.end()
    _pin(ours | theirs)
    alone, beside, rates = map(statistics.median, zip(*times, strict=True))
    return {
        "operations": OPERATIONS,
        "alone_ms": round(alone * 1e3, 3),
        "beside_ms": round(beside * 1e3, 3),
        "launch_slowdown": round(statistics.median(one[1] / one[0] for one in times), 2),
        "images_per_second": round(rates, 1),
    }


def _round(taker: _Taker) -> tuple[float, float, float]:
    """Seconds of the operations alone and beside the loader, and its images/s."""
    # The feeders fill what is free, and wait then.
    time.sleep(LAUNCH_SECONDS)
    alone = _operations(LAUNCH_SECONDS)
    taker.running.set()
    time.sleep(LAUNCH_SECONDS)
    began, before = time.perf_counter(), taker.images
    beside = _operations(2 * LAUNCH_SECONDS)
    rate = (taker.images - before) / (time.perf_counter() - began)
    taker.running.clear()
    return alone, beside, rate


class _Taker:
    """A thread that takes batches at ``rate`` images/s while ``running`` is set, and gives them back."""

    def __init__(self, loader: Any, items: Iterator[Any], rate: float) -> None:
        self._loader, self._items, self._rate = loader, items, rate
        self.running, self.images = threading.Event(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self.running.set()
        self._loader.fail(Interrupted())
        self._thread.join()

    def _take(self) -> None:
        due = time.perf_counter()
        with suppress(Interrupted):
            for item in self._items:
                if not hasattr(item, "pixels"):
                    continue
                self.running.wait()
                # A rate that is not reached is not made up for.
                due = max(due + len(item.rows) / self._rate, time.perf_counter())
                self._ended.wait(due - time.perf_counter())
                self.images += len(item.rows)
                self._loader.release(item)


def _operations(seconds: float) -> float:
    """Median seconds of some small operations, one after the other."""
    import torch

    torch.set_num_threads(1)
    tensor, times, end = torch.zeros(8), list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            tensor.add_(1.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _split() -> tuple[set[int], set[int]]:
    """One core for the driver, and the others; the same one where there is no other."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, {*others} or {first}


def _pin(cores: set[int]) -> None:
    """Give every thread of this process these cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def _vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((VECTORS, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _encoder(vectors: np.ndarray) -> Any:
    import torch

    from pipeline.backends.base import ImageEncoder
    from pipeline.backends.streams import count_streams

    class Lookup(ImageEncoder):
        """Random embeddings by the first pixel."""

        name, precision, dim, device, batch_size = "lookup", "fp32", DIM, torch.device("cpu"), BATCH
        # As every encoder on a CPU: else its threads of torch would wait for one another.
        streams = count_streams(0, device)

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            first = pixels.numpy()[:, :2, 0, 0].astype(np.int64)
            return torch.from_numpy(vectors[(first[:, 0] * 256 + first[:, 1]) % VECTORS])

        @property
        def fingerprint(self) -> dict[str, str]:
            return {}

    return Lookup()


def _parser() -> argparse.ArgumentParser:
    from pipeline.core.cli import command_parser
    from pipeline.core.processes import cores
    from pipeline.engine.feeders import CORES

    parser = command_parser(
        "python -m pipeline.bench feed",
        "Measure the speed at which images reach the process of the encoder, and its cost there, without a GPU.",
        EXAMPLES,
    )
    parser.add_argument("--rows", type=int, default=4 * SHARD, metavar="N", help=f"rows (default: {4 * SHARD})")
    default = max(1, cores() // CORES)
    parser.add_argument("--feeders", type=int, default=default, metavar="N", help=f"(default here: {default})")
    parser.add_argument("--rate", type=float, default=5000.0, help="images/s to hold beside the launches (5000)")
    return parser
