"""The loop: shards in, committed parts out. Picklable in, picklable out, so it runs anywhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.decoder_parity import PICTURES
from pipeline.backends.streams import Streams
from pipeline.config.schema import Config
from pipeline.core.failpoints import failpoint
from pipeline.core.log_format import within
from pipeline.core.records import ImageBatch, Shard, ShardReport, ShardRows, Stage, TextBank
from pipeline.dataset.commits import commit_part
from pipeline.dataset.parts import PartFormat, ShardResult, build_table, count_statuses
from pipeline.engine.feeder_pool import FeederPool, share_of
from pipeline.engine.feeder_process import FeederSpec, GpuDecoding
from pipeline.engine.feeders import Feeders, open_feeders
from pipeline.engine.forward import Forward, Labelling, PendingBatch, ShardResults, memory_explained
from pipeline.engine.gpu_clock import GpuClock
from pipeline.engine.loader import Loader, LoaderSpec
from pipeline.engine.recall import RecallSample
from pipeline.engine.sample import FirstBatch
from pipeline.engine.static_forward import open_forward
from pipeline.engine.texts import ShardTexts, TextLoader, Texts
from pipeline.images.factory import worker_threads
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.models.heads import Head, values_of
from pipeline.models.tokens import Tokenizer
from pipeline.storage.factory import open_storage
from pipeline.telemetry.clocks import StageClocks

# Parts that may wait for the disk before the loop waits too.
PENDING_PARTS = 2


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know; it holds no model, no pixels and no open file."""

    config: Config
    manifest: Manifest
    form: PartFormat
    bank: TextBank | None
    heads: tuple[Head, ...] = ()


@dataclass(frozen=True, slots=True)
class Worker:
    """The opened reader and encoder of a process that embeds, the clocks of its stages and of its GPU, its feeders.

    ``before_writing`` is called once, before anything is written, with the first batches: as many as are encoded side
    by side, or all. The next ones begin behind it; what it raises ends the loop. A job with texts has a ``tokenizer``;
    ``text_encoder`` embeds texts beside images, and in a job of texts alone, which has no reader, ``encoder`` does.
    """

    reader: PixelReader | None
    encoder: ImageEncoder
    clocks: StageClocks
    gpu: GpuClock = field(default_factory=lambda: GpuClock(torch.device("cpu")))
    feeders: FeederPool | None = None
    before_writing: Callable[[Sequence[FirstBatch]], None] | None = None
    tokenizer: Tokenizer | None = None
    text_encoder: ImageEncoder | None = None
    sample: RecallSample | None = None


def embed(
    shards: Iterable[Shard],
    job: Job,
    worker: Worker,
    *,
    on_batch: Callable[[int], None] = lambda images: None,
    on_commit: Callable[[ShardReport], None] = lambda report: None,
) -> Generator[ShardReport]:
    """Embed, label, write and commit every shard; a report for each, in order, once it is durable.

    Args:
        shards: what to do; may be a generator.
        job: the specification.
        worker: of this process.
        on_batch: called after each batch with the images in it.
        on_commit: called with each report, in order, as soon as the shard is durable, in the thread that writes; the
            loop hands it out only when it has embedded the next shard.

    Raises:
        NumericalError: the encoder returned something that is not an embedding; the shard stays undone.
        StorageError: a part or a commit could not be written.
    """
    clocks = worker.clocks
    storage = open_storage(job.config.output.dir)
    asked: dict[int, float] = {}

    def noted() -> Iterator[Shard]:
        for shard in shards:
            asked[shard.index] = time.time()
            yield shard

    def write(result: ShardResult) -> ShardReport:
        number = result.rows.shard.index
        with within(number), clocks.time(Stage.WRITE):
            failpoint("part.build")
            values = values_of(job.heads, job.form.stored.decode(result.vectors)) if job.heads else {}
            table = build_table(replace(result, values=values), job.form)
            report = commit_part(storage, number, table, job.form, count_statuses(result.rows))
            report = replace(report, repeats=len(result.rows.repeats), texts=result.rows.texts)
            report = replace(report, began=asked.pop(number), ended=time.time())
        on_commit(report)
        return report

    pending: list[Future[ShardReport]] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
        # Whatever ends the loop ends the loader too, before finished shards are waited for.
        closing(_results(noted(), job, worker, on_batch)) as results,
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


def _results(
    shards: Iterable[Shard], job: Job, worker: Worker, on_batch: Callable[[int], None]
) -> Generator[ShardResult]:
    config, encoder, clocks = job.config, worker.encoder, worker.clocks
    labelling = None
    # One batch more than are being encoded, so that no stream waits for this thread. On a GPU, the results of a batch
    # are fetched while the next one is being computed, across the ends of shards too.
    ahead = encoder.streams + 1
    with ExitStack() as opened:
        with memory_explained(config.loader.batch_size):
            if job.bank is not None:
                features = torch.from_numpy(job.bank.features).to(encoder.device)
                labelling = Labelling(bank=job.bank, features=features, top_k=config.labels.top_k)
            tokens, device = worker.tokenizer, encoder.device
            texts = None if tokens is None else Texts(job.manifest, tokens, config.loader.batch_size, device)
            loader: Loader | Feeders | TextLoader = (
                TextLoader(texts)
                if worker.reader is None and texts is not None
                else open_loader(config, job.manifest, worker, ahead)
            )
        opened.enter_context(loader)
        beside = None
        if worker.text_encoder is not None and texts is not None:
            beside = _TextPass(opened.enter_context(texts), open_forward(worker.text_encoder, None))
        streams = opened.enter_context(Streams(encoder.device, encoder.streams))
        encoding = _Encoding(job, worker, loader, streams, labelling, open_forward(encoder, labelling), beside)

        for step in _in_order(encoding.steps(shards), ahead):
            if step.batch is not None:
                batch = step.batch.result()
                # On CUDA the clock of the encoder runs until the device is done.
                with clocks.time(Stage.ENCODE):
                    (step.results.add_texts if step.beside else step.results.add)(batch)
                if not step.beside:
                    clocks.count(len(batch.rows))
                    on_batch(len(batch.rows))
            if step.rows is not None:
                yield step.results.finish(step.rows, step.texts)


def open_loader(config: Config, manifest: Manifest, worker: Worker, ahead: int) -> Loader | Feeders:
    """The loader of this process, or feeders, each with a loader of its own and its share of the cores."""
    device, reader = worker.encoder.device, worker.reader
    assert reader is not None
    pool = worker.feeders or open_feeders(config, device)
    count = min(pool.count, manifest.shards(config.manifest.shard_rows)) if pool is not None else 0
    if count:
        config = share_of(config, count)
    spec = LoaderSpec(
        batch_size=config.loader.batch_size,
        # While processes decode, one more thread reads what comes next and hands in what is done.
        workers=worker_threads(config) + (reader.decoders is not None),
        prefetch=config.loader.prefetch,
        in_flight=ahead if device.type == "cpu" else 1,
        once=config.images.repeats == "once",
    )
    if pool is None or not count:
        return Loader(manifest, reader, spec, device=device, timer=worker.clocks.add)
    # One batch is filled while another one is copied; on a CPU, batches are encoded where they lie.
    buffers = 3 if device.type == "cuda" else 2 + ahead
    gpu = GpuDecoding(str(device), reader.gpu.engine) if reader.gpu is not None else None
    feeder = FeederSpec(config=config, manifest=manifest, preprocess=reader.spec, loader=spec, buffers=buffers, gpu=gpu)
    on_peak = reader.decoders.count_peak if reader.decoders is not None else lambda peak: None
    pool.start(count)
    return Feeders(feeder, pool, device=device, clocks=worker.clocks, on_peak=on_peak)


@dataclass(frozen=True, slots=True)
class _Step:
    """One batch of a shard, of texts ``beside`` its images too, or its rows behind the last batch."""

    results: ShardResults
    batch: Future[PendingBatch] | None = None
    rows: ShardRows | None = None
    beside: bool = False
    texts: ShardTexts | None = None


@dataclass(frozen=True, slots=True)
class _TextPass:
    """The texts of the shards beside their images, and what embeds them."""

    texts: Texts
    forward: Forward


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Submission of every batch to the encoder's threads."""

    job: Job
    worker: Worker
    loader: Loader | Feeders | TextLoader
    streams: Streams
    labelling: Labelling | None
    forward: Forward
    texts: _TextPass | None = None

    def steps(self, shards: Iterable[Shard]) -> Iterator[_Step]:
        """Every batch as it is submitted; each shard ends with its rows."""
        items, held = self.loader.stream(shards), _Held(self.worker, self.job.config)
        # Those of several shards come in turn; the number is that of the next batch.
        open_shards: dict[int, tuple[ShardResults, int]] = {}
        while True:
            if len(held.first) == self.streams.count:
                held.call()
            with self.worker.clocks.time(Stage.WAIT_INPUT):
                item = next(items, None)
            if not isinstance(item, ImageBatch):
                held.call()
            if item is None:
                return
            if item.shard.index not in open_shards and self.texts is not None:
                self.texts.texts.begin(item.shard)
            results, number = open_shards.get(item.shard.index) or (self._results_of(item.shard), 0)
            if isinstance(item, ShardRows):
                open_shards.pop(item.shard.index, None)
                if self.texts is None:
                    yield _Step(results, rows=item)
                else:
                    yield from self._text_steps(self.texts, results, item)
            else:
                open_shards[item.shard.index] = results, number + 1
                yield _Step(results, batch=held.submit(self.streams, item, partial(self._encode, item, number)))

    def _text_steps(self, beside: _TextPass, results: ShardResults, rows: ShardRows) -> Iterator[_Step]:
        """Every batch of texts of a shard as it is submitted, and then its rows."""
        with self.worker.clocks.time(Stage.WAIT_INPUT):
            found = beside.texts.take(rows)
        for number, batch in enumerate(found.batches):
            encode = partial(self._encode_texts, beside.forward, batch, number)
            yield _Step(results, batch=self.streams.submit(encode), beside=True)
        yield _Step(results, rows=replace(rows, texts=found.counts), texts=found)

    def _results_of(self, shard: Shard) -> ShardResults:
        return ShardResults(
            shard,
            self.job.form.stored,
            labelling=self.labelling,
            threshold=self.job.config.labels.threshold,
            sample=self.worker.sample,
        )

    def _encode_texts(self, forward: Forward, batch: ImageBatch, number: int) -> PendingBatch:
        with within(batch.shard.index), self.worker.gpu.batch():
            # From memory that a GPU copies from without being waited for.
            there = replace(batch, pixels=batch.pixels.to(self.worker.encoder.device, non_blocking=True))
            return forward.launch(there, self.worker.clocks, number=number)

    def _encode(self, batch: ImageBatch, number: int) -> PendingBatch:
        try:
            if self.worker.reader is None:
                return self._encode_texts(self.forward, batch, number)
            with within(batch.shard.index), self.worker.gpu.batch():
                return self.forward.launch(batch, self.worker.clocks, number=number)
        except BaseException as error:
            # The thread that waits for the next batch raises this at once.
            self.loader.fail(error)
            raise
        finally:
            self.loader.release(batch)


class _Held:
    """The call of ``Worker.before_writing``, which is made once, and the batches that it is made with."""

    def __init__(self, worker: Worker, config: Config) -> None:
        self._hold, self._streams = worker.before_writing, worker.encoder.streams
        self._count = max(config.parity.images, PICTURES)
        self.first: list[Future[FirstBatch]] = []

    def submit(self, streams: Streams, batch: ImageBatch, encode: Callable[[], PendingBatch]) -> Future[PendingBatch]:
        """Submit a batch to ``streams``; until the call is made, images of it are kept."""
        if self._hold is None:
            return streams.submit(encode)
        self.first.append(Future())
        return streams.submit(partial(self._keep, batch, encode, self.first[-1]))

    def call(self) -> None:
        """Make the call, unless it was made."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold([first.result() for first in self.first])
            self.first.clear()

    def _keep(self, batch: ImageBatch, encode: Callable[[], PendingBatch], kept: Future[FirstBatch]) -> PendingBatch:
        try:
            count = len(batch.rows)
            places = torch.arange(min(count, self._count)) * count // min(count, self._count)
            # Copied before the buffer is given back.
            pixels, began = batch.pixels[places.to(batch.pixels.device)].cpu(), time.perf_counter()
            pending = encode()
            pending.wait()
            seconds = (time.perf_counter() - began) / len(batch.pixels) / self._streams
            rows, vectors = batch.rows[places.numpy()], pending.vectors[places]
            kept.set_result(FirstBatch(batch.shard, rows, pixels, vectors, seconds, full=count == len(batch.pixels)))
        except BaseException as error:
            kept.set_exception(error)
            raise
        return pending


def _in_order(steps: Iterator[_Step], ahead: int) -> Iterator[_Step]:
    """The same steps, each batch only once ``ahead`` are submitted; shards of failed rows alone cannot pile up."""
    waiting: deque[_Step] = deque()
    batches = 0
    for step in steps:
        waiting.append(step)
        batches += step.batch is not None
        while waiting and (batches >= ahead or len(waiting) > 2 * ahead or waiting[0].batch is None):
            batches -= waiting[0].batch is not None
            yield waiting.popleft()
    yield from waiting
