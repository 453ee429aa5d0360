"""The loop: shards in, committed parts out. Picklable in, picklable out, so it runs anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from pipeline.backends import factory
from pipeline.backends.base import Draw, ImageEncoder
from pipeline.backends.halving import HalvingEncoder
from pipeline.backends.parity import check
from pipeline.config import Config
from pipeline.dataset.commits import commit_part
from pipeline.dataset.parts import PartFormat, ShardResult, build_table, count_statuses
from pipeline.failpoints import failpoint
from pipeline.images.decode import Decoder
from pipeline.images.decoders import Decoders
from pipeline.images.loader import Loader
from pipeline.images.reader import PixelReader
from pipeline.images.sources import Source
from pipeline.manifest.source import Manifest
from pipeline.models.checkpoint import Checkpoint
from pipeline.records import PreprocessSpec, Shard, ShardReport, ShardRows, Stage, TextBank
from pipeline.report.clocks import StageClocks
from pipeline.results import Accumulated, Flying, Labelling, launch, memory_explained
from pipeline.storage.opening import open_storage

# Parts that may wait for the disk before the loop waits too.
PENDING_PARTS = 2


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know; it holds no model, no pixels and no open file."""

    config: Config
    manifest: Manifest
    spec: PreprocessSpec
    form: PartFormat
    bank: TextBank | None


def open_encoder(config: Config, checkpoint: Checkpoint, sample: Draw) -> ImageEncoder:
    """Open the backend of the config; once per process. See :class:`~pipeline.backends.base.BackendFactory`."""
    return factory(config.backend.name)(
        checkpoint, config.backend, batch_size=config.loader.batch_size, sample=sample, limits=config.parity
    )


def open_for_job(config: Config, checkpoint: Checkpoint, sample: Draw, bank: TextBank | None) -> HalvingEncoder:
    """As :func:`open_encoder`, and open it again for smaller batches where the device has no memory for these."""

    def reopen(size: int) -> ImageEncoder:
        return open_encoder(replace(config, loader=replace(config.loader, batch_size=size)), checkpoint, sample)

    def judge(encoder: ImageEncoder) -> None:
        check(encoder, checkpoint, sample, bank=bank, limits=config.parity)

    return HalvingEncoder(reopen, judge, batch_size=config.loader.batch_size)


def pixel_reader(config: Config, manifest: Manifest, spec: PreprocessSpec) -> PixelReader:
    """How this job turns a reference into pixels; close it, as it may start processes that decode."""
    images, loader = config.images, config.loader
    decoder = Decoder(
        formats=tuple(images.formats),
        max_pixels=images.max_pixels,
        exif=images.exif,
        transparency=images.transparency,
    )
    decoders = None
    if loader.isolation == "process":
        # Threads beyond the cores help where reading waits; processes beyond them would only take memory.
        processes = min(worker_threads(config), cores())
        decoders = Decoders(decoder, processes=processes, seconds=loader.decode_seconds, memory=loader.decode_memory)
    return PixelReader(
        source=Source(
            root=manifest.root,
            max_bytes=images.max_bytes,
            schemes=tuple(images.schemes),
            private_hosts=tuple(images.private_hosts),
            read_seconds=loader.read_seconds,
        ),
        decoder=decoder,
        spec=spec,
        decoders=decoders,
    )


def embed(
    shards: Iterable[Shard],
    job: Job,
    encoder: ImageEncoder,
    *,
    clocks: StageClocks,
    on_batch: Callable[[int], None] = lambda images: None,
    reader: PixelReader | None = None,
) -> Generator[ShardReport]:
    """Embed, label, write and commit every shard; a report for each, in order, once it is durable.

    Args:
        shards: what to do; may be a generator.
        job: the specification.
        encoder: the opened backend.
        clocks: where the time of every stage is added up.
        on_batch: called after each batch with the images in it.
        reader: the opened reader of images; without one, this opens and closes its own.

    Raises:
        NumericalError: the encoder returned something that is not an embedding; the shard stays undone.
        StorageError: a part or a commit could not be written.
    """
    storage = open_storage(job.config.output.dir)

    def write(result: ShardResult) -> ShardReport:
        with clocks.time(Stage.WRITE):
            failpoint("part.build")
            table = build_table(result, job.form)
            return commit_part(storage, result.rows.shard.index, table, job.form, count_statuses(result.rows))

    pending: list[Future[ShardReport]] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
        # Whatever ends the loop ends the loader too, before finished shards are waited for.
        closing(_results(shards, job, encoder, clocks, on_batch, reader)) as results,
    ):
        for result in results:
            pending.append(writer.submit(write, result))
            while pending and (pending[0].done() or len(pending) > PENDING_PARTS):
                with clocks.time(Stage.WAIT_OUTPUT):
                    report = pending.pop(0).result()
                yield report
        for future in pending:
            with clocks.time(Stage.WAIT_OUTPUT):
                report = future.result()
            yield report


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_threads(config: Config) -> int:
    """Decoding threads: as configured, or one for each core."""
    return config.loader.workers or cores()


def _results(
    shards: Iterable[Shard],
    job: Job,
    encoder: ImageEncoder,
    clocks: StageClocks,
    on_batch: Callable[[int], None],
    reader: PixelReader | None,
) -> Generator[ShardResult]:
    config = job.config
    labelling = None
    with ExitStack() as opened:
        pixels = reader or opened.enter_context(pixel_reader(config, job.manifest, job.spec))
        with memory_explained(config.loader.batch_size):
            if job.bank is not None:
                features = torch.from_numpy(job.bank.features).to(encoder.device)
                labelling = Labelling(bank=job.bank, features=features, top_k=config.labels.top_k)
            loader = Loader(
                job.manifest,
                pixels,
                batch_size=config.loader.batch_size,
                workers=worker_threads(config),
                prefetch=config.loader.prefetch,
                device=encoder.device,
                timer=clocks.add,
            )
        opened.enter_context(loader)
        items = loader.stream(shards)
        shard: Accumulated | None = None
        flying: Flying | None = None
        number = 0
        while True:
            with clocks.time(Stage.WAIT_INPUT):
                item = next(items, None)
            if item is None:
                return
            shard = shard or Accumulated(
                item.shard,
                dim=encoder.dim,
                dtype=config.output.dtype,
                labelling=labelling,
                threshold=config.labels.threshold,
            )
            if isinstance(item, ShardRows):
                if flying is not None:
                    with clocks.time(Stage.ENCODE):
                        shard.add(flying)
                    flying = None
                yield shard.finish(item)
                shard, number = None, 0
                continue
            launched = launch(item, encoder, labelling, clocks, number=number)
            loader.release(item)
            # On CUDA the last batch's results are fetched while this one is being computed: the clock of
            # the encoder then runs until the device is done, and that of the labels only while they queue.
            if flying is not None:
                with clocks.time(Stage.ENCODE):
                    shard.add(flying)
            flying = launched
            number += 1
            on_batch(len(item.rows))
