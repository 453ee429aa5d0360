"""The loader: shards in, batches on the device out, a few of them always ready.

One feeder thread reads the manifest, hands chunks of rows to a pool of decoding threads, takes the
results back in order, fills buffers that are used again and again, and (on CUDA) copies them ahead on
a stream of its own. Threads live anywhere: in a Dask worker, in a container with a small /dev/shm, after
CUDA was started; what they decode is decoded for them by processes of :mod:`pipeline.images.decoders`.

What a batch holds follows from the manifest and the config alone: the rows of one shard that could be
decoded, in order, ``batch_size`` at a time, the last one filled up with pictures of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType

import numpy as np
import pyarrow as pa
import torch

from pipeline.failpoints import failpoint
from pipeline.images.children import Abandoned
from pipeline.images.decode import limit_pixels
from pipeline.images.padding import repeats
from pipeline.images.reader import PixelReader, Timer
from pipeline.images.wire import CHUNK
from pipeline.manifest.shards import ShardReader, refs
from pipeline.manifest.source import Manifest
from pipeline.records import Failure, ImageBatch, ImageRef, Pixels, Shard, ShardRows, Stage

# Finished shards that may wait for the consumer: they hold no buffer, so nothing else would stop a run
# whose images all fail from reading the whole manifest into memory.
WAITING_SHARDS = 4
# How often a blocked feeder looks whether it should stop, in seconds.
POLL = 0.2


@dataclass(slots=True)
class _Slot:
    """A reused buffer: on the host (pinned for CUDA), and its twin on the device."""

    host: torch.Tensor
    device: torch.Tensor
    copied: torch.cuda.Event | None = None
    encoded: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A few consecutive rows of a shard that are being decoded."""

    shard: Shard
    start: int
    rows: int
    results: Future[list[Pixels | Failure]]


@dataclass(slots=True)
class _Filling:
    """The shard that is being put together."""

    shard: Shard
    failures: dict[int, Failure] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    slot: int = -1


class Loader:
    """Streams shards as batches; use it as a context manager, once.

    Args:
        manifest: where the rows are.
        reader: how a row becomes pixels.
        batch_size: the static first dimension of every batch.
        workers: decoding threads.
        prefetch: batches that may be ready before they are asked for.
        device: where the pixels are wanted.
        timer: called with a stage and seconds, from any thread.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: PixelReader,
        *,
        batch_size: int,
        workers: int,
        prefetch: int,
        device: torch.device,
        timer: Timer,
    ) -> None:
        self._manifest, self._reader, self._timer = manifest, reader, timer
        self._batch_size, self._workers = batch_size, workers
        limit_pixels(reader.decoder.max_pixels)
        self._cuda = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One in the encoder's hands, one being filled, the others ready.
        self._slots = [self._new_slot(device) for _ in range(prefetch + 2)]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(self._slots)):
            self._free.put(index)
        self._ready: queue.SimpleQueue[ImageBatch | ShardRows | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(WAITING_SHARDS)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
                copied = self._slots[item.slot].copied
                if copied is not None:
                    torch.cuda.current_stream(item.pixels.device).wait_event(copied)
            yield item

    def release(self, batch: ImageBatch) -> None:
        """Give a batch's buffer back, once all work on its pixels has been enqueued."""
        slot = self._slots[batch.slot]
        if self._cuda is not None:
            slot.encoded = torch.cuda.Event()
            slot.encoded.record(torch.cuda.current_stream(slot.device.device))
        self._free.put(batch.slot)

    def _new_slot(self, device: torch.device) -> _Slot:
        height, width = self._reader.spec.size
        shape = (self._batch_size, height, width, 3)
        if device.type != "cuda":
            host = torch.zeros(shape, dtype=torch.uint8)
            return _Slot(host=host, device=host)
        host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        # Left empty: zeroing would run on another stream than the first copy, and might come after it.
        return _Slot(host=host, device=torch.empty(shape, dtype=torch.uint8, device=device))

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

    def _feed(self, shards: Iterable[Shard], pool: ThreadPoolExecutor) -> None:
        """Keep about a batch of rows in the pool, across shard boundaries, and fill batches in order."""
        window: deque[_Chunk | ShardRows] = deque()
        limit = self._batch_size + 2 * CHUNK * self._workers
        rows, filling = 0, None
        with ShardReader(self._manifest) as reader:
            for item in chain(self._submit(shards, reader, pool), [None]):
                if item is not None:
                    window.append(item)
                    rows += item.rows if isinstance(item, _Chunk) else 0
                while window and (item is None or rows > limit):
                    if self._stopped.is_set():
                        raise Abandoned
                    done = window.popleft()
                    rows -= done.rows if isinstance(done, _Chunk) else 0
                    filling = self._take(done, filling)

    def _submit(
        self, shards: Iterable[Shard], reader: ShardReader, pool: ThreadPoolExecutor
    ) -> Iterator[_Chunk | ShardRows]:
        for shard in shards:
            position, kept = 0, []
            for batch in reader.read(shard):
                failpoint("rows")
                columns = [batch.column(name) for name in self._manifest.schema.names]
                kept.append(pa.RecordBatch.from_arrays(columns, schema=self._manifest.schema))
                images = refs(self._manifest, batch)
                for start in range(0, len(images), CHUNK):
                    part = images[start : start + CHUNK]
                    future = pool.submit(self._decode, part)
                    yield _Chunk(shard=shard, start=position + start, rows=len(part), results=future)
                position += len(images)
            table = pa.Table.from_batches(kept, schema=self._manifest.schema)
            yield ShardRows(shard=shard, table=table, failures={})

    def _decode(self, images: list[ImageRef]) -> list[Pixels | Failure]:
        return self._reader.read_all(images, self._timer, self._stopped.is_set)

    def _take(self, done: _Chunk | ShardRows, filling: _Filling | None) -> _Filling | None:
        filling = filling or _Filling(done.shard)
        if isinstance(done, ShardRows):
            if filling.rows:
                self._finish(filling)
            while not self._room.acquire(timeout=POLL):
                if self._stopped.is_set():
                    raise Abandoned
            self._ready.put(ShardRows(shard=done.shard, table=done.table, failures=filling.failures))
            return None
        for position, result in enumerate(done.results.result(), start=done.start):
            if isinstance(result, Failure):
                filling.failures[position] = result
                continue
            if filling.slot < 0:
                filling.slot = self._take_slot()
            self._slots[filling.slot].host.numpy()[len(filling.rows)] = result.rgb
            filling.rows.append(position)
            if len(filling.rows) == self._batch_size:
                self._finish(filling)
        return filling

    def _finish(self, filling: _Filling) -> None:
        started = time.perf_counter()
        slot = self._slots[filling.slot]
        count = len(filling.rows)
        slot.host[count:] = slot.host[repeats(count, self._batch_size)]
        if self._cuda is not None:
            with torch.cuda.stream(self._cuda):
                if slot.encoded is not None:
                    self._cuda.wait_event(slot.encoded)
                slot.device.copy_(slot.host, non_blocking=True)
                slot.copied = torch.cuda.Event()
                slot.copied.record(self._cuda)
        # The memory stays [B, H, W, 3]; the view has the shape that encoders take.
        pixels = slot.device.permute(0, 3, 1, 2)
        rows = np.asarray(filling.rows, dtype=np.int64)
        self._timer(Stage.COPY, time.perf_counter() - started)
        self._ready.put(ImageBatch(shard=filling.shard, rows=rows, pixels=pixels, slot=filling.slot))
        filling.rows, filling.slot = [], -1

    def _take_slot(self) -> int:
        while not self._stopped.is_set():
            try:
                index = self._free.get(timeout=POLL)
            except queue.Empty:
                continue
            copied = self._slots[index].copied
            if copied is not None:
                copied.synchronize()
            return index
        raise Abandoned
