"""Which loader: the pipeline's own, torch's DataLoader or SPDL, on the same images with the same decoding.

``python loaders.py FOLDER`` writes the table; ``FOLDER`` holds ``0.05``, ``0.2``, ``1`` and ``12`` (megapixels) with
``*.jpg``. ``--in-dask`` and ``--small-shm`` add how each fares there. SPDL is no dependency: ``pip install --no-deps
--target spdl spdl spdl-core spdl-io`` and ``PYTHONPATH=spdl``; to decode by itself it wants FFmpeg's shared libraries.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.config import CHOICES, Config, ManifestConfig
from pipeline.images.decode import limit_pixels
from pipeline.images.loader import Loader
from pipeline.images.wire import CHUNK
from pipeline.manifest.build import from_folder, from_tars
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.manifest.source import open_manifest
from pipeline.processes import cores
from pipeline.reading import pixel_reader
from pipeline.records import ImageBatch, Pixels, PreprocessSpec
from pipeline.report.summary import machine, versions

warnings.filterwarnings("ignore", "The given NumPy array is not writable")
SPEC = PreprocessSpec(resize=224, crop=(224, 224), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
# Megapixels -> images of a batch (so that a wave of them takes less than a second) and rows of a manifest's file.
BATCH = {"0.05": 64, "0.2": 64, "1": 32, "12": 8}
ROWS = {"0.05": 2000, "0.2": 2000, "1": 600, "12": 120}
SOURCES, DECODERS = ("files", "Parquet", "tar"), [d for d in ("exact", "fast") if d in CHOICES["images.decoder"]]
SHARD_ROWS, PREFETCH, MIB, SHM, LIMIT = 256, 3, 2**20, "/dev/shm", 90.0
# At least so many batches of each worker are counted, and the time is never shorter than asked for.
WAVES = 4
SMALL_SHM = f'mount -t tmpfs -o size=64m tmpfs {SHM} && exec "$@"'


class Cell(NamedTuple):
    """One line of the table."""

    size: str
    source: str
    workers: int
    decoder: str
    loader: str


def reader_of(cell, manifest, isolation="none"):
    """What turns a reference into pixels: the same for every loader."""
    config = Config()
    images = replace(config.images, decoder=cell.decoder if cell.decoder in DECODERS else DECODERS[0])
    limit_pixels(images.max_pixels)
    loader = replace(config.loader, workers=cell.workers, isolation=isolation)
    return pixel_reader(replace(config, images=images, loader=loader), manifest, SPEC)


def chunks(manifest, shards):
    """The references of all rows, a few at a time, as the pipeline's own loader hands them to its threads."""
    with ShardReader(manifest) as rows:
        for found in (refs(manifest, batch) for shard in shards for batch in rows.read(shard)):
            yield from (found[start : start + CHUNK] for start in range(0, len(found), CHUNK))


def by_reader(reader, ref):
    """One decoded image, uint8 ``[H, W, 3]``."""
    result = reader.read(ref)
    if isinstance(result, Pixels):
        return result.rgb
    raise ValueError(f"{ref.id}: {result.status}: {result.error}")


def by_ffmpeg(reader, ref):
    """The same with SPDL's own means: the pixels are others."""
    from spdl import io

    crop = io.get_video_filter_desc(scale_width=224, scale_height=224, scale_mode="crop")
    frames = io.decode_packets(io.demux_image(reader.source.read(ref)), filter_desc=crop)
    return io.to_numpy(io.convert_frames(frames))


def own(cell, manifest, batch, *, isolation):
    """The pipeline's loader: threads that fill reused buffers, and decode themselves or have processes do it."""
    settings = {"batch_size": batch, "workers": cell.workers, "prefetch": PREFETCH, "device": torch.device("cpu")}
    with (
        reader_of(cell, manifest, isolation) as reader,
        Loader(manifest, reader, timer=lambda stage, seconds: None, **settings) as loader,
    ):
        for item in loader.stream(cut(manifest, SHARD_ROWS)):
            if isinstance(item, ImageBatch):
                yield item.pixels.permute(0, 2, 3, 1)
                loader.release(item)


class Rows(IterableDataset):
    """Every n-th shard for each of n workers, which read the manifest themselves: no list of rows to copy."""

    def __init__(self, cell, manifest):
        self.cell, self.manifest = cell, manifest

    def __iter__(self):
        worker, reader = get_worker_info(), reader_of(self.cell, self.manifest)
        shards = islice(cut(self.manifest, SHARD_ROWS), worker.id, None, worker.num_workers)
        for chunk in chunks(self.manifest, shards):
            yield from (torch.from_numpy(by_reader(reader, ref)) for ref in chunk)


def of_torch(cell, manifest, batch, *, start):
    """torch's DataLoader with worker processes and its own collation."""
    settings = {"prefetch_factor": 2, "persistent_workers": True, "multiprocessing_context": start}
    yield from DataLoader(Rows(cell, manifest), batch_size=batch, num_workers=cell.workers, **settings)


def of_spdl(cell, manifest, batch):
    """SPDL's thread pipeline, in the order of the rows."""
    from spdl.pipeline import PipelineBuilder

    reader, decode = reader_of(cell, manifest), by_ffmpeg if cell.decoder == "FFmpeg" else by_reader
    # In order, SPDL keeps one task more than `concurrency` going: the threads of this pool are what limits it.
    threads = ThreadPoolExecutor(cell.workers)

    def decode_all(chunk):
        return [decode(reader, ref) for ref in chunk]

    pipeline = (
        PipelineBuilder()
        .add_source(chunks(manifest, cut(manifest, SHARD_ROWS)))
        .pipe(decode_all, concurrency=cell.workers, executor=threads, output_order="input")
        .disaggregate()
        .aggregate(batch)
        .pipe(lambda images: torch.from_numpy(np.stack(images)))
        .add_sink(PREFETCH)
        .build(num_threads=1)
    )
    with threads, pipeline.auto_stop():
        yield from pipeline


LOADERS = {
    "threads": partial(own, isolation="none"),
    "threads, contained": partial(own, isolation="process"),
    "DataLoader": partial(of_torch, start="fork"),
    "SPDL": of_spdl,
    "DataLoader, spawn": partial(of_torch, start="spawn"),
}


def cells(*, smoke):
    """All sources of all sizes with a worker for each core, other numbers of workers with one of them."""
    numbers = [number for number in (1, 2, 4, 8, 16) if number <= 2 * cores()]
    most = max(number for number in numbers if number <= cores())
    places = [(size, source, most) for size in BATCH for source in SOURCES]
    places += [("0.2", "files", number) for number in numbers if number != most]
    if smoke:
        places = [("0.2", "files", most), ("0.05", "Parquet", most), ("12", "tar", most)]
    # What a source costs does not depend on the decoder: all but the first have all sources at one size alone.
    both = [(*p, d) for p in places for d in DECODERS if d == DECODERS[0] or p[1] == "files" or p[0] == "0.2"]
    found = [Cell(*place, loader) for place in both for loader in list(LOADERS)[:4]]
    found += [Cell("0.2", "files", most, decoder, "DataLoader, spawn") for decoder in DECODERS]
    return found + [Cell(size, "files", most, "FFmpeg", "SPDL") for size in (["0.2"] if smoke else BATCH)]


def tree():
    """This process and all below it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def memory():
    """MiB that the tree holds: shared pages once (PSS), and files in memory that nobody maps."""
    total, files = 0, {}
    for folder in [Path(f"/proc/{process.pid}") for process in tree()]:
        with suppress(OSError):
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            for entry in (folder / "fd").iterdir():
                if os.readlink(entry).startswith("/memfd:"):
                    files[entry.stat().st_ino] = entry.stat().st_blocks * 512
    return (total + sum(files.values())) / MIB


def measure(cell, work, seconds, *, batch=0, pause=0.0):
    """Take batches for ``seconds`` after the first ones, which are the start-up; ``pause`` lets the queues fill."""
    torch.set_num_threads(1)
    manifest = open_manifest(ManifestConfig(path=f"{work}/{cell.size}-{cell.source}.parquet"))
    # Longer than any measurement: the same file again and again.
    manifest = replace(manifest, files=manifest.files * 10_000)
    begun = time.perf_counter()
    with closing(LOADERS[cell.loader](cell, manifest, batch or BATCH[cell.size])) as batches:
        first = next(batches)
        startup, digest = time.perf_counter() - begun, zlib.crc32(first.contiguous().numpy().data)
        time.sleep(pause)
        # Worker processes deliver in waves, a batch of each: only whole waves are counted.
        for _ in range(cell.workers - 1):
            next(batches)
        cpu, start, waves, images = sum(sum(p.cpu_times()[:4]) for p in tree()), time.perf_counter(), 0, 0
        while (wall := time.perf_counter() - start) < seconds or waves < WAVES:
            images += sum(len(next(batches)) for _ in range(cell.workers))
            waves += 1
        cpu = sum(sum(p.cpu_times()[:4]) for p in tree()) - cpu
    return {"images": images, "rate": images / wall, "cpu": 1000 * cpu / images, "startup": startup, "digest": digest}


def said(work, *arguments, **more):
    """The answer, or the error in one line, which of a worker's traceback is the last."""
    try:
        return work(*arguments, **more)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"[:300]}


def run(cell, work, seconds, *, watch=False, **more):
    """:func:`measure` in a fork of this process; ``watch`` samples its memory, which slows it down."""
    peak, before, until = [0, 0], shutil.disk_usage(SHM).used, time.monotonic() + LIMIT
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        future = pool.submit(measure, cell, work, seconds, **more)
        while wait([future], 0.05).not_done:
            if watch:
                peak = list(map(max, peak, (memory(), (shutil.disk_usage(SHM).used - before) / MIB)))
            for process in tree()[1:] if time.monotonic() > until else ():
                process.kill()
    return {**said(future.result), **({"memory": peak[0], "shm": peak[1]} if watch else {})}


def in_dask(*arguments, **more):
    """:func:`measure` in a worker of Dask under its nanny: a daemon, which may have no children of multiprocessing."""
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        return client.submit(measure, *arguments, **more, pure=False).result(timeout=LIMIT)


def situation(work, measured, batches):
    """What becomes of every loader in batches of such sizes, while the consumer is slower than the loader."""
    for cell in cells(smoke=True):
        for batch in batches if (cell.size, cell.decoder) == ("0.2", DECODERS[0]) else ():
            got = said(measured, cell, work, 0.0, batch=batch, pause=2.0)
            yield (
                cell.loader,
                batch,
                f"fails: {got['failure']}" if "failure" in got else f"works: {got['images']} images",
            )


def prepare(pictures, work):
    """A manifest of each kind for each size: paths, encoded bytes, members of a tar."""
    for size, rows in ROWS.items():
        folder = (pictures / size).resolve()
        from_folder(str(folder), f"{work}/files.parquet")
        paths = pq.read_table(f"{work}/files.parquet")
        names = paths["path"].to_pylist()
        with tarfile.open(f"{work}/{size}.tar", "w") as tar:
            for name in names:
                tar.add(folder / name, arcname=name)
        from_tars([f"{work}/{size}.tar"], f"{work}/tar.parquet")
        inside = pa.table({"id": names, "path": [(folder / name).read_bytes() for name in names]})
        for source, table in zip(SOURCES, (paths, inside, pq.read_table(f"{work}/tar.parquet")), strict=True):
            whole = pa.concat_tables([table] * -(-rows // len(names)))
            pq.write_table(whole, f"{work}/{size}-{source}.parquet", row_group_size=256, use_dictionary=False)


def compare(work, options):
    """A round that samples memory, then timed ones; cells of one place follow each other, in an order by chance."""
    chance, begun, order, found = random.Random(0), time.monotonic(), cells(smoke=options.smoke), []
    for number in range(options.rounds + 1):
        started, keys = time.monotonic(), {cell[:4]: chance.random() for cell in order}
        for cell in sorted(order, key=lambda cell: (keys[cell[:4]], chance.random())):
            result = run(cell, work, options.seconds if number else 0.3, watch=number == 0)
            found.append({**cell._asdict(), "round": number, **result})
            print(*found[-1].values(), flush=True)
        # The timed rounds take about as long as each other; one that would not fit is not begun.
        if number and 2 * time.monotonic() - started - begun > 60 * options.minutes:
            break
    return sorted(found, key=lambda one: order.index(tuple(one.values())[:5]))


def markdown(head, rows):
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]] + [""]


def page(facts):
    """All that was measured, as Markdown."""
    lines = ["# Loaders", "", *(f"- {name}: {value}" for name, value in facts.items() if isinstance(value, str)), ""]
    for name, outcomes in facts["situations"].items():
        lines += [f"## {name}", "", *markdown(["loader", "images in a batch", "outcome"], outcomes)]
    frame, keys = pd.DataFrame(facts["table"]), list(Cell._fields)
    own = frame[frame["loader"] == "threads"][[*keys[:4], "round", "rate"]]
    frame = frame.merge(own, on=[*keys[:4], "round"], how="left", suffixes=("", " of threads"))
    frame["to threads"] = frame["rate"] / frame["rate of threads"]
    rounds = frame[frame["round"] > 0].groupby(keys, sort=False)
    shown = rounds["rate"].agg(["median", "min", "max"]).join(rounds[["to threads", "cpu", "startup"]].median())
    shown = shown.join(frame[frame["round"] == 0].set_index(keys)[["memory", "shm", "digest"]])
    head = [*keys, "images/s", "lowest", "highest", "to threads", "CPU s / 1,000 images", "start-up s"]
    head += ["peak MiB", "/dev/shm MiB", "first pixels"]
    rows = [[*key, *(f"{value:,.2f}" for value in row), f"{crc:08x}"] for key, *row, crc in shown.itertuples()]
    return "\n".join([*lines, "## Speed", "", *markdown(head, rows)]).replace("nan", "")


def main():
    """Measure what is asked for, and write it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loaders-cpu.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.2, help="of each cell in each round")
    parser.add_argument("--minutes", type=float, default=14.0, help="no further round that would take longer")
    for name in ("--smoke", "--in-dask", "--small-shm"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    if options.small_shm and shutil.disk_usage(SHM).total > 64 * MIB:
        os.execvp("unshare", ["unshare", "-m", "sh", "-c", SMALL_SHM, "sh", sys.executable, *sys.argv])
    facts = json.loads(options.out.read_text()) if options.out.exists() else {"situations": {}}
    if "table" not in facts and (options.in_dask or options.small_shm):
        parser.error(f"{options.out} is not there: measure the table first")
    with tempfile.TemporaryDirectory() as work:
        prepare(options.pictures, work)
        if options.in_dask:
            facts["situations"]["In a Dask worker"] = list(situation(work, in_dask, (64,)))
        elif options.small_shm:
            facts["situations"]["With 64 MB of /dev/shm"] = list(situation(work, run, (64, 512)))
        else:
            facts["memory before any loader"] = f"{memory():.0f} MiB"
            facts["table"] = compare(work, options)
            facts["command"] = shlex.join(["python", *sys.argv])
            facts["machine"] = ", ".join(map(str, machine("cpu", cores()).values()))
            facts["versions"] = ", ".join(map(" ".join, {**versions(), "spdl": version("spdl")}.items()))
            facts["after CUDA was initialised"] = "not run: this machine has no GPU"
    options.out.write_text(json.dumps(facts, indent=1))
    options.out.with_suffix(".md").write_text(page(facts))


if __name__ == "__main__":
    main()
