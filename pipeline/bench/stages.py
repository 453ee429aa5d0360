"""The stages of a job, each alone on request, over images that are held in memory.

Each stage works as in the job, with as many threads and processes, and continues where its last measurement ended.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.backends.devices import choose_device
from pipeline.backends.streams import Streams, count_streams
from pipeline.bench.images import image_refs, take_images
from pipeline.bench.timing import Workers, measure
from pipeline.config.schema import Config
from pipeline.core.machine import machine
from pipeline.core.processes import cores
from pipeline.core.records import Embeddings, ImageRef, Pixels, ShardRows, Stage
from pipeline.dataset.commits import commit_part
from pipeline.dataset.parts import ShardResult, build_table, part_format
from pipeline.dataset.vectors import form_fingerprint
from pipeline.engine.engine import Engine
from pipeline.images.factory import worker_threads
from pipeline.images.reader import PixelReader
from pipeline.manifest.shards import ShardReader, cut, refs
from pipeline.models.labels import label
from pipeline.storage.factory import open_storage

ROWS = "rows"
NAMES = (ROWS, Stage.READ, Stage.DECODE, Stage.COPY, Stage.ENCODE, Stage.LABEL, Stage.WRITE)
# Batches that are held ready for the encoder.
HELD_BATCHES = 8
# Calls that are queued on a GPU before the next one waits.
QUEUED = 2
# One piece of a stage's work, by its number; returns the number of its images.
Unit = Callable[[int], int]


class Stages:
    """The images of the job in memory, its encoder, and the stages; use it as a context manager.

    Args:
        given: the config of the job.
        work: an empty folder.
        images: the number of images; None for those of the manifest, up to a limit.
        decoders: decoders to measure besides the config's own.
    """

    def __init__(self, given: Config, work: Path, images: int | None, decoders: Sequence[str]) -> None:
        self._work, self._opened = work, ExitStack()
        self._numbers: dict[str, Iterator[int]] = {}
        self._parts = itertools.count()
        self._device = choose_device(given.backend.device)
        with Engine(given) as whole:
            threads = worker_threads(given)
            self.images = take_images(whole.manifest, whole.reader, work, count=images, threads=threads)
        self._config = given.changed({f"manifest.{name}": value for name, value in self.images.manifest.items()})
        engine = self._engine = self._opened.enter_context(Engine(self._config))
        self._manifest, self._dim = engine.manifest, engine.checkpoint.dim
        self.batch = min(given.loader.batch_size, self._manifest.rows, given.manifest.shard_rows)
        bank = engine.bank()
        assert bank is not None, "the command gives labels"
        self.bank = bank
        self._features = torch.from_numpy(self.bank.features).to(self._device)
        self.encoder = engine.open_at(self.batch)
        self.stream_count = count_streams(given.backend.streams, self._device)
        self._streams = self._opened.enter_context(Streams(self._device, self.stream_count))
        self._readers = {name: self._reader(name) for name in dict.fromkeys([given.images.decoder, *decoders])}

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def machine(self) -> dict[str, object]:
        """Return the facts of the machine and of the encoder's device."""
        return {**machine(str(self._device), cores()), "instructions": torch.backends.cpu.get_cpu_capability()}

    def measure(self, stage: str, seconds: float, decoder: str | None = None) -> dict[str, float]:
        """Run ``stage`` alone for about ``seconds``: images/s, core seconds of an image, threads."""
        workers, streams = worker_threads(self._config), self.stream_count
        makers: dict[str, tuple[Callable[[], Unit], int]] = {
            ROWS: (self._rows, 1),
            Stage.READ: (self._read, workers),
            Stage.DECODE: (partial(self._decode, decoder or self._config.images.decoder), workers),
            Stage.COPY: (self._copy, 1),
            Stage.ENCODE: (self._encode, streams),
            Stage.LABEL: (self._label, streams),
            Stage.WRITE: (self._write, 1),
        }
        make, threads = makers[stage]
        unit = make()
        numbers = self._numbers.setdefault(f"{stage} {decoder}", itertools.count())
        with ThreadPoolExecutor(threads) as pool:
            submit = self._streams.submit if stage in (Stage.ENCODE, Stage.LABEL) else pool.submit
            throughput = measure(lambda: unit(next(numbers)), seconds, Workers(threads, submit, self._finish))
        shutil.rmtree(self._work / "parts", ignore_errors=True)
        return {**asdict(throughput), "threads": threads}

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _reader(self, decoder: str) -> PixelReader:
        if decoder == self._config.images.decoder:
            return self._engine.reader
        engine = Engine(self._config.changed({"images.decoder": decoder}), manifest=self._manifest)
        return self._opened.enter_context(engine).reader

    def _rows(self) -> Unit:
        shards = list(cut(self._manifest, self._config.manifest.shard_rows))

        def unit(number: int) -> int:
            with ShardReader(self._manifest) as reader:
                return sum(len(refs(self._manifest, rows)) for rows in reader.read(shards[number % len(shards)]))

        return unit

    def _read(self) -> Unit:
        source = self._readers[self._config.images.decoder].source
        every = list(itertools.islice(image_refs(self._manifest), len(self.images.encoded)))

        def unit(number: int) -> int:
            source.read(every[number % len(every)])
            return 1

        return unit

    def _decode(self, decoder: str) -> Unit:
        reader, encoded = self._readers[decoder], self.images.encoded
        size = reader.chunk
        starts = range(0, len(encoded), size)

        def unit(number: int) -> int:
            start = starts[number % len(starts)]
            chunk = [ImageRef(id=start, data=data) for data in encoded[start : start + size]]
            results = reader.read_all(chunk, lambda stage, seconds: None)
            return sum(isinstance(result, Pixels) for result in results)

        return unit

    def _copy(self) -> Unit:
        cuda = self._device.type == "cuda"
        shape = (self.batch, *self.images.pixels.shape[1:])
        host = torch.zeros(shape, dtype=torch.uint8, pin_memory=cuda)
        device = torch.empty(shape, dtype=torch.uint8, device=self._device) if cuda else host
        images, buffer = self.images.pixels.numpy(), host.numpy()

        def unit(number: int) -> int:
            for place in range(len(buffer)):
                buffer[place] = images[(number * len(buffer) + place) % len(images)]
            if cuda:
                device.copy_(host, non_blocking=True)
                torch.cuda.synchronize(device.device)
            return len(buffer)

        return unit

    def _encode(self) -> Unit:
        places, size = torch.arange(self.batch), self.batch
        wanted = range(0, min(len(self.images.pixels), HELD_BATCHES * size), size)
        batches = [
            self.images.pixels[(places + start) % len(self.images.pixels)].to(self._device).permute(0, 3, 1, 2)
            for start in wanted
        ]
        queued: list[torch.cuda.Event] = []

        def unit(number: int) -> int:
            self.encoder.encode(batches[number % len(batches)])
            if self._device.type == "cuda":
                queued.append(torch.cuda.Event())
                queued[-1].record(torch.cuda.current_stream(self._device))
                if len(queued) > QUEUED:
                    queued.pop(0).synchronize()
            return size

        return unit

    def _label(self) -> Unit:
        vectors = torch.nn.functional.normalize(torch.randn(self.batch, self._dim), dim=1).to(self._device)

        def unit(number: int) -> int:
            label(Embeddings(vectors), self.bank, self._features, top_k=self._config.labels.top_k)
            return len(vectors)

        return unit

    def _write(self) -> Unit:
        config, names = self._config, self.bank.names
        form = part_format(
            self._manifest.schema,
            dim=self._dim,
            dtype=config.output.dtype,
            compression=config.output.compression,
            fingerprints={"output": form_fingerprint(config.output, self._dim)},
        )
        shards = list(cut(self._manifest, config.manifest.shard_rows))
        with ShardReader(self._manifest) as reader:
            rows = list(reader.read(shards[0]))
        table = pa.Table.from_batches(rows).select(self._manifest.schema.names).cast(self._manifest.schema)
        count, k = shards[0].rows, min(config.labels.top_k, len(names))
        generator = np.random.default_rng(0)
        result = ShardResult(
            rows=ShardRows(shard=shards[0], table=table, failures={}),
            vectors=form.stored.encode(generator.standard_normal((count, self._dim)).astype(np.float32)),
            top=generator.integers(0, len(names), (count, k)),
            scores=generator.random((count, k), dtype=np.float32),
            names=names,
            threshold=config.labels.threshold,
        )
        storage = open_storage(str(self._work / "parts"))

        def unit(number: int) -> int:
            # A new name each time, as an existing part would not be written again.
            commit_part(storage, next(self._parts), build_table(result, form), form, {"ok": count})
            return count

        return unit
