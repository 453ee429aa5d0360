"""The loop: shards in, committed parts out. Picklable in, picklable out, so it runs anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.backends import factory
from pipeline.backends.base import Draw, ImageEncoder
from pipeline.config import Config
from pipeline.dataset.commits import commit_part
from pipeline.dataset.parts import PartFormat, ShardResult, build_table, count_statuses
from pipeline.errors import BackendUnavailable, NumericalError
from pipeline.failpoints import failpoint
from pipeline.images.decode import Decoder
from pipeline.images.loader import Loader, PixelReader
from pipeline.images.sources import Source
from pipeline.manifest.source import Manifest
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.labels import label
from pipeline.records import (
    Embeddings,
    ImageBatch,
    PreprocessSpec,
    Shard,
    ShardReport,
    ShardRows,
    Stage,
    TextBank,
)
from pipeline.report.clocks import StageClocks
from pipeline.storage.opening import open_storage

# Parts that may wait for the disk before the loop waits too.
PENDING_PARTS = 2
# An embedding of length 1 in float32 is off by rounding only.
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know; it holds no model, no pixels and no open file."""

    config: Config
    manifest: Manifest
    spec: PreprocessSpec
    form: PartFormat
    bank: TextBank | None


@dataclass(frozen=True, slots=True)
class _Flying:
    """A batch whose results are on their way to the host; ``landed`` tells when (None: they are there)."""

    rows: np.ndarray
    vectors: torch.Tensor
    top: torch.Tensor
    scores: torch.Tensor
    healthy: torch.Tensor
    landed: torch.cuda.Event | None


def open_encoder(config: Config, checkpoint: Checkpoint, sample: Draw) -> ImageEncoder:
    """Open the backend of the config; once per process. See :class:`~pipeline.backends.base.BackendFactory`."""
    return factory(config.backend.name)(
        checkpoint, config.backend, batch_size=config.loader.batch_size, sample=sample, limits=config.parity
    )


def pixel_reader(config: Config, manifest: Manifest, spec: PreprocessSpec) -> PixelReader:
    """How this job turns a reference into pixels."""
    images = config.images
    return PixelReader(
        source=Source(root=manifest.root, max_bytes=images.max_bytes, schemes=tuple(images.schemes)),
        decoder=Decoder(
            formats=tuple(images.formats),
            max_pixels=images.max_pixels,
            exif=images.exif,
            transparency=images.transparency,
        ),
        spec=spec,
    )


def embed(
    shards: Iterable[Shard],
    job: Job,
    encoder: ImageEncoder,
    *,
    clocks: StageClocks,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Iterator[ShardReport]:
    """Embed, label, write and commit every shard; a report for each, in order, once it is durable.

    Args:
        shards: what to do; may be a generator.
        job: the specification.
        encoder: the opened backend.
        clocks: where the time of every stage is added up.
        on_batch: called after each batch with the images in it.

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
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for result in _results(shards, job, encoder, clocks, on_batch):
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
) -> Iterator[ShardResult]:
    config = job.config
    features = torch.from_numpy(job.bank.features).to(encoder.device) if job.bank is not None else None
    with Loader(
        job.manifest,
        pixel_reader(config, job.manifest, job.spec),
        batch_size=config.loader.batch_size,
        workers=worker_threads(config),
        prefetch=config.loader.prefetch,
        device=encoder.device,
        timer=clocks.add,
    ) as loader:
        items = loader.stream(shards)
        shard: _Accumulated | None = None
        flying: _Flying | None = None
        while True:
            with clocks.time(Stage.WAIT_INPUT):
                item = next(items, None)
            if item is None:
                return
            shard = shard or _Accumulated(job, item.shard, encoder.dim)
            if isinstance(item, ShardRows):
                if flying is not None:
                    with clocks.time(Stage.ENCODE):
                        shard.add(flying)
                    flying = None
                yield shard.finish(item)
                shard = None
                continue
            launched = _launch(item, encoder, job, features, clocks)
            loader.release(item)
            # On CUDA the last batch's results are fetched while this one is being computed: the clock of
            # the encoder then runs until the device is done, and that of the labels only while they queue.
            if flying is not None:
                with clocks.time(Stage.ENCODE):
                    shard.add(flying)
            flying = launched
            on_batch(len(item.rows))


def _launch(
    batch: ImageBatch, encoder: ImageEncoder, job: Job, features: torch.Tensor | None, clocks: StageClocks
) -> _Flying:
    with clocks.time(Stage.ENCODE), _memory_explained(len(batch.pixels)):
        failpoint("encode")
        encoded = encoder.encode(batch.pixels)
        failpoint("encoded")
    expected = (batch.pixels.shape[0], encoder.dim)
    if tuple(encoded.shape) != expected or encoded.dtype != torch.float32:
        raise NumericalError(
            f"shard {batch.shard.index}: {encoder.name} returned {encoded.dtype} {tuple(encoded.shape)}, wanted "
            f"float32 {expected}"
        )
    vectors = encoded[: len(batch.rows)]
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    healthy = (lengths - 1).abs() < UNIT_TOLERANCE
    empty = torch.empty((len(batch.rows), 0), device=vectors.device)
    top, scores = empty.long(), empty
    if job.bank is not None and features is not None:
        with clocks.time(Stage.LABEL):
            failpoint("label")
            found = label(Embeddings(vectors), job.bank, features, top_k=job.config.labels.top_k)
        top, scores = found.indices, found.scores
    results = [vectors, top, scores, healthy]
    landed = None
    if vectors.device.type == "cuda":
        # Copied behind this batch's own work, so that fetching it never waits for the next batch.
        results = [_to_host(tensor) for tensor in results]
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(vectors.device))
    vectors, top, scores, healthy = results
    return _Flying(rows=batch.rows, vectors=vectors, top=top, scores=scores, healthy=healthy, landed=landed)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def _memory_explained(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendUnavailable(
            f"the device has no memory for batches of {batch_size} images: lower loader.batch_size ({error})"
        ) from error


class _Accumulated:
    """The results of one shard as they come in."""

    def __init__(self, job: Job, shard: Shard, dim: int) -> None:
        self._job, self._shard = job, shard
        labels = job.bank.names if job.bank is not None else ()
        k = min(job.config.labels.top_k, len(labels))
        self._vectors = np.zeros((shard.rows, dim), dtype=np.dtype(job.config.output.dtype))
        self._top = np.zeros((shard.rows, k), dtype=np.int64)
        self._scores = np.zeros((shard.rows, k), dtype=np.float32)

    def add(self, batch: _Flying) -> None:
        """Take a batch's results; waits until they have landed."""
        if batch.landed is not None:
            batch.landed.synchronize()
        healthy = batch.healthy.numpy()
        if not healthy.all():
            position = int(batch.rows[int(np.flatnonzero(~healthy)[0])])
            raise NumericalError(
                f"shard {self._shard.index}, row {position}: the encoder returned NaN, infinity or a vector "
                "that is not of length 1; the shard is not committed. Try backend.precision=fp32, check the checkpoint"
            )
        self._vectors[batch.rows] = batch.vectors.numpy()
        self._top[batch.rows] = batch.top.numpy()
        self._scores[batch.rows] = batch.scores.numpy()

    def finish(self, rows: ShardRows) -> ShardResult:
        """The whole shard."""
        bank, threshold = self._job.bank, self._job.config.labels.threshold
        return ShardResult(
            rows=rows,
            vectors=self._vectors,
            top=self._top,
            scores=self._scores,
            names=bank.names if bank is not None else (),
            threshold=threshold,
        )
