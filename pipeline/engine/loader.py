"""The loader: shards in, batches on the device out, a few of them always ready.

One thread reads the manifest a little ahead. The feeder hands chunks of rows to a pool of decoding threads,
takes the results back in order, fills buffers that are used again and again, and (on CUDA) copies them ahead
on a stream of its own. What the threads decode is decoded for them by processes of :mod:`pipeline.images.pool.pool`.

Torch's DataLoader and SPDL are not faster (jobs/results/loaders-cpu.md). DataLoader's processes may not be started in a
Dask worker, and its batches do not fit into a /dev/shm of 64 MB; with either, an image that crashes its decoder ends
the run.

What a batch holds follows from the manifest and the config alone: the rows of one shard that could be decoded, in
order and without repeats, ``batch_size`` at a time, the last one filled up with pictures of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.core.failpoints import failpoint
from pipeline.core.records import Failure, ImageBatch, ImageRef, Pixels, Shard, ShardRows, Stage
from pipeline.engine.buffers import SharedSlot, copy_stream, new_slot
from pipeline.engine.duplicates import Repeats
from pipeline.engine.prefetch import POLL, Prefetcher
from pipeline.images.decode import limit_pixels
from pipeline.images.pool.pool import GiveBack
from pipeline.images.pool.processes import Abandoned
from pipeline.images.reader import PixelReader, Timer
from pipeline.images.sources.spans import Spans
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import ShardReader, refs

if TYPE_CHECKING:
    import torch

# Finished shards that may wait. They hold no buffer: a run whose images all fail would read the whole manifest.
WAITING_SHARDS = 4
# Rows that are read before they are wanted: record batches of the manifest, and bytes of them.
AHEAD_BATCHES = 8
AHEAD_BYTES = 32 * 2**20
# The smallest task of the pool, in rows.
LEAST = 8


@dataclass(frozen=True, slots=True)
class _Read:
    """Consecutive rows of a shard from ``start`` on, as they were read."""

    shard: Shard
    repeats: Repeats | None
    start: int
    images: list[ImageRef]
    bytes: int


@dataclass(slots=True)
class _Chunk:
    """A few consecutive rows of a shard that are being decoded."""

    shard: Shard
    repeats: Repeats | None
    start: int
    rows: int
    results: Future[list[Pixels | Failure | None]]


@dataclass(slots=True)
class _Filling:
    """The shard that is being put together."""

    shard: Shard
    failures: dict[int, Failure] = field(default_factory=dict)
    repeats: dict[int, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    slot: int = -1


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """Batches of a loader, and the threads and buffers that make them.

    Attributes:
        batch_size: the static first dimension of every batch.
        workers: decoding threads.
        prefetch: batches that may be ready before they are asked for.
        in_flight: batches that may be encoded at the same time.
        once: images of a shard with the same bytes come once, see :class:`~pipeline.core.records.ShardRows`.
    """

    batch_size: int
    workers: int
    prefetch: int
    in_flight: int = 1
    once: bool = True

    @property
    def buffers(self) -> int:
        """Buffers for batches: some being encoded, one being filled, the others ready."""
        return self.prefetch + 1 + self.in_flight


class Loader:
    """Streams shards as batches; use it as a context manager, once.

    Args:
        manifest: where the rows are.
        reader: how a row becomes pixels.
        spec: the batches.
        timer: called with a stage and seconds, from any thread.
        device: where the pixels are wanted; the CPU by default.
        slots: buffers that another process has, too, where the batches stay; new ones by default.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: PixelReader,
        spec: LoaderSpec,
        *,
        timer: Timer,
        device: torch.device | None = None,
        slots: Sequence[SharedSlot] | None = None,
    ) -> None:
        self._manifest, self._reader, self._timer, self._once = manifest, reader, timer, spec.once
        self._batch_size, self._workers = spec.batch_size, spec.workers
        # At least two tasks of every batch for each worker, so that all have work to the end of it.
        task = max(LEAST, min(reader.chunk, spec.batch_size // (2 * spec.workers) // LEAST * LEAST))
        self._task = reader.chunk if reader.gpu is not None else task
        # Rows that are with the threads, or wait for those before them.
        self._window = self._batch_size + 2 * self._task * self._workers
        if reader.decoders is not None:
            reader.decoders.lent = 1 + self._window // (self._task * reader.decoders.processes)
        limit_pixels(reader.decoder.max_pixels)
        shape = (spec.batch_size, *reader.spec.size, 3)
        self._slots: Sequence[Any] = slots or [new_slot(shape, device) for _ in range(spec.buffers)]
        self._cuda = copy_stream(device)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(self._slots)):
            self._free.put(index)
        self._ready: queue.SimpleQueue[ImageBatch | ShardRows | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(WAITING_SHARDS)
        self._stopped = threading.Event()
        # For each task whose pictures are not in a batch yet: calls that give its decoder's answers back.
        self._lent: deque[list[GiveBack]] = deque()
        self._spans = Spans(reader.source)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; what they decode is abandoned, and the reader is left as it is."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self._cuda is not None:
            self._cuda.synchronize()

    def stream(self, shards: Iterable[Shard]) -> Iterator[ImageBatch | ShardRows]:
        """Every shard's batches in order, then its :class:`ShardRows`, shard after shard.

        Each batch must be given back with :meth:`release`. An error of the feeder is raised here.
        """
        if self._thread is not None:
            raise RuntimeError("a loader streams once")
        self._thread = threading.Thread(target=self._run, args=(shards,), name="loader", daemon=True)
        self._thread.start()
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, ShardRows):
                self._room.release()
            elif self._cuda is not None:
                import torch

                copied = self._slots[item.slot].copied
                if copied is not None:
                    torch.cuda.current_stream(item.pixels.device).wait_event(copied)
            yield item

    @property
    def stopped(self) -> bool:
        """True once no further shard is wanted."""
        return self._stopped.is_set()

    def fail(self, error: BaseException) -> None:
        """End the stream with an error of the encoder, so that no thread waits for more batches."""
        self._ready.put(error)

    def release(self, batch: ImageBatch) -> None:
        """Give a batch's buffer back, once all work on its pixels has been enqueued."""
        slot = self._slots[batch.slot]
        if self._cuda is not None:
            slot.mark_encoded()
        self.give_back(batch.slot)

    def give_back(self, slot: int) -> None:
        """Use a buffer again that no device copies from any more."""
        self._free.put(slot)

    def _run(self, shards: Iterable[Shard]) -> None:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            self._feed(shards, pool)
            self._ready.put(None)
        except Abandoned:
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._spans.close()
            for lent in self._lent:
                for give_back in lent:
                    give_back()

    def _feed(self, shards: Iterable[Shard], pool: ThreadPoolExecutor) -> None:
        """Keep about a batch of rows in the pool, across shard boundaries, and fill batches in order."""
        window: deque[_Chunk | ShardRows] = deque()
        rows, filling = 0, None

        def take() -> None:
            nonlocal rows, filling
            if self._stopped.is_set():
                raise Abandoned
            done = window.popleft()
            rows -= done.rows if isinstance(done, _Chunk) else 0
            filling = self._take(done, filling)

        with Prefetcher(
            self._read(shards),
            count=AHEAD_BATCHES,
            size=AHEAD_BYTES,
            weigh=lambda item: item.bytes if isinstance(item, _Read) else 0,
            abandoned=self._stopped.is_set,
            # The next shard may come only once this one is finished.
            pause=lambda: bool(window) and (isinstance(window[0], ShardRows) or window[0].results.done()),
        ) as read:
            try:
                for item in self._submit(read, pool):
                    if item is None:
                        take()
                        continue
                    window.append(item)
                    if isinstance(item, _Chunk):
                        rows += item.rows
                        item.results.add_done_callback(lambda _: read.wake())
                    while window and rows > self._window:
                        take()
                while window:
                    take()
            except BaseException:
                # An iterator that waits for the next shard looks at this.
                self._stopped.set()
                raise

    def _read(self, shards: Iterable[Shard]) -> Generator[_Read | ShardRows]:
        schema = self._manifest.schema
        with ShardReader(self._manifest, max_bytes=self._reader.source.max_bytes) as reader:
            for shard in shards:
                start, kept, repeats = 0, [], Repeats() if self._once else None
                for batch in reader.read(shard):
                    failpoint("rows")
                    kept.append(pa.RecordBatch.from_arrays([batch[name] for name in schema.names], schema=schema))
                    images = self._spans.join(refs(self._manifest, batch))
                    yield _Read(shard=shard, repeats=repeats, start=start, images=images, bytes=batch.nbytes)
                    start += batch.num_rows
                yield ShardRows(replace(shard, rows=start), pa.Table.from_batches(kept, schema), failures={})

    def _submit(
        self, read: Iterable[_Read | ShardRows | None], pool: ThreadPoolExecutor
    ) -> Iterator[_Chunk | ShardRows | None]:
        for item in read:
            if item is None or isinstance(item, ShardRows):
                yield item
                continue
            for start in range(0, len(item.images), self._task):
                part = item.images[start : start + self._task]
                first = item.start + start
                known = partial(item.repeats.known, first) if item.repeats is not None else None
                self._lent.append([])
                arguments = (part, self._timer, self._stopped.is_set, known, self._lent[-1])
                yield _Chunk(item.shard, item.repeats, first, len(part), pool.submit(self._reader.read_all, *arguments))

    def _take(self, done: _Chunk | ShardRows, filling: _Filling | None) -> _Filling | None:
        filling = filling or _Filling(done.shard)
        if isinstance(done, ShardRows):
            if filling.rows:
                self._finish(filling)
            while not self._room.acquire(timeout=POLL):
                if self._stopped.is_set():
                    raise Abandoned
            self._ready.put(replace(done, failures=filling.failures, repeats=filling.repeats))
            return None
        for position, result in enumerate(done.results.result(), start=done.start):
            first = position if done.repeats is None else done.repeats.first(position)
            if first != position and first not in filling.failures:
                # Its pixels may be here too, if both were decoded at once.
                filling.repeats[position] = first
                continue
            result = filling.failures.get(first, result)
            if isinstance(result, Failure):
                filling.failures[position] = result
                continue
            assert result is not None
            if filling.slot < 0:
                filling.slot = self._take_slot()
            self._slots[filling.slot].pixels[len(filling.rows)] = result.rgb
            filling.rows.append(position)
            if len(filling.rows) == self._batch_size:
                self._finish(filling)
        for give_back in self._lent.popleft():
            give_back()
        return filling

    def _finish(self, filling: _Filling) -> None:
        started = time.perf_counter()
        slot = self._slots[filling.slot]
        slot.fill(len(filling.rows), self._cuda)
        rows = np.asarray(filling.rows, dtype=np.int64)
        self._timer(Stage.COPY, time.perf_counter() - started)
        self._ready.put(ImageBatch(shard=filling.shard, rows=rows, pixels=slot.batch(), slot=filling.slot))
        filling.rows, filling.slot = [], -1

    def _take_slot(self) -> int:
        while not self._stopped.is_set():
            try:
                index = self._free.get(timeout=POLL)
            except queue.Empty:
                continue
            if (copied := self._slots[index].copied) is not None:
                copied.synchronize()
            return index
        raise Abandoned
