"""Feeders: processes that read, decode and fill batches, so that the process of the encoder handles no single image.

Python's lock lets one thread of a process run at a time. Beside threads that read and hand images on, the launches of a
forward on a GPU wait for the lock again and again. So each feeder (:mod:`pipeline.engine.feeder_process`) takes whole
shards, and runs a loader with decoder processes of its own over them. Its batches lie in memory that both processes
have, pinned for the GPU; a message for each batch and each shard is all that comes here.

The batches of a shard come in order, but those of several shards in turn. What a batch holds is the same as without
feeders, so that the parts have the same bytes.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core import errors
from pipeline.core.errors import DecoderUnavailable, PipelineError
from pipeline.core.processes import Spent
from pipeline.core.records import Clocks, ImageBatch, Shard, ShardRows, Stage
from pipeline.engine.device_copies import DeviceCopies
from pipeline.engine.feeder_pool import FeederPool, FeederProcess
from pipeline.engine.feeder_process import FeederSpec, parse_rows
from pipeline.engine.prefetch import POLL
from pipeline.images.factory import worker_threads
from pipeline.images.pool.processes import Abandoned
from pipeline.images.pool.shared_memory import shared
from pipeline.storage.urls import scheme_of
from pipeline.telemetry.clocks import StageClocks

# Cores of a feeder and its decoders: its own thread of Python fills the batches of about so many.
CORES = 4
# Feeders at most where they decode on the GPU. Each takes half a gigabyte of it and more, and contexts of several
# processes take turns there.
ON_GPU = 4
# Shards that a feeder has at a time, so that it goes on with the next one at once.
SHARDS = 2
# A feeder whose stream has ended may take this long to end, in seconds.
END_SECONDS = 5.0


def count_feeders(config: Config, device: torch.device) -> int:
    """Number of feeders; 0 for a loader in this process.

    By default one for ``CORES`` cores where a GPU is fed, and ``ON_GPU`` of them at most with the decoder ``gpu``, with
    which the cores read files and headers alone. A CPU that encodes leaves less to read than one loader does. Files in
    memory are in the process of the encoder alone.
    """
    places = (config.manifest.path or "", config.manifest.root or "")
    if any(scheme_of(place) == "memory" for place in places):
        return 0
    if config.loader.feeders is not None:
        return config.loader.feeders
    if device.type != "cuda":
        return 0
    count = max(1, worker_threads(config) // CORES)
    return min(count, ON_GPU) if config.images.decoder == "gpu" else count


def open_feeders(config: Config, device: torch.device) -> FeederPool | None:
    """Feeder processes, none of which is started yet; None if the loader is in this process."""
    count = count_feeders(config, device)
    return FeederPool(config, count) if count else None


@dataclass(slots=True)
class _Feeder:
    """A process and its memory; ``shards`` are those that it has, ``clocks`` and ``spent`` the last figures of it."""

    process: FeederProcess
    pixels: NDArray[np.uint8]
    shards: int = 0
    ended: bool = False
    clocks: Clocks = field(default_factory=Clocks)
    spent: Spent = field(default_factory=lambda: Spent(0.0, 0.0))


class Feeders:
    """Streams shards as batches, as :class:`~pipeline.engine.loader.Loader` does; use it as a context manager, once.

    Args:
        spec: work of each feeder.
        pool: processes of the feeders, each of which begins when a shard waits for it; all are ended with these.
        device: where the pixels are wanted.
        clocks: clocks of this process, to which those of the feeders are added.
        on_peak: called with the bytes that the largest decoder of a feeder held.
    """

    def __init__(
        self,
        spec: FeederSpec,
        pool: FeederPool,
        *,
        device: torch.device,
        clocks: StageClocks,
        on_peak: Callable[[int], None] = lambda peak: None,
    ) -> None:
        self._spec, self._pool, self._clocks, self._on_peak = spec, pool, clocks, on_peak
        self._feeders: list[_Feeder] = []
        self._copies = DeviceCopies(spec.shape[1:], spec.loader.prefetch + 2, device) if device.type == "cuda" else None
        self._open: dict[int, Shard] = {}
        self._ready: queue.SimpleQueue[ImageBatch | ShardRows | BaseException | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._supplied = False
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._wake, self._woken = socket.socketpair()

    def __enter__(self) -> Feeders:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the feeders; what they read is abandoned."""
        self._stopped.set()
        self._wake.send(b"\0")
        for thread in self._threads:
            thread.join()
        for feeder in self._feeders:
            if feeder.ended:
                with suppress(subprocess.TimeoutExpired):
                    feeder.process.popen.wait(END_SECONDS)
        self._pool.close()
        if self._copies is not None:
            self._copies.close()
        self._wake.close()
        self._woken.close()

    def stream(self, shards: Iterable[Shard]) -> Iterator[ImageBatch | ShardRows]:
        """Every shard's batches in order, then its :class:`ShardRows`; those of other shards may come between.

        Each batch must be given back with :meth:`release`. An error of a feeder is raised here.
        """
        if self._threads:
            raise RuntimeError("feeders stream once")
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._supply, shards), name="supply", daemon=True),
            threading.Thread(target=self._guarded, args=(self._receive,), name="receive", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def fail(self, error: BaseException) -> None:
        """End the stream with an error of the encoder, so that no thread waits for more batches."""
        self._ready.put(error)

    def release(self, batch: ImageBatch) -> None:
        """Give a batch's buffer back, once all work on its pixels has been enqueued."""
        if self._copies is not None:
            self._copies.release(batch.slot)
        else:
            self._feeders[batch.slot // self._spec.buffers].process.send(batch.slot % self._spec.buffers)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Abandoned:
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _supply(self, shards: Iterable[Shard]) -> None:
        """Give every shard to a feeder that has room for it."""
        iterator = iter(shards)
        while True:
            feeder = self._with_room()
            shard = next(iterator, None)
            if shard is None:
                break
            self._open[shard.index] = shard
            with self._changed:
                feeder.shards += 1
            feeder.process.send(shard)
        self._supplied = True
        self._wake.send(b"\0")

    def _with_room(self) -> _Feeder:
        """The feeder with the fewest shards; a new one while all have some."""
        while not self._stopped.is_set():
            least = min(self._feeders, key=lambda feeder: feeder.shards, default=None)
            if (least is None or least.shards) and self._pool.waiting:
                least = self._begin()
                self._feeders.append(least)
                self._wake.send(b"\0")
            if least is not None and least.shards < SHARDS:
                return least
            with self._changed:
                self._changed.wait_for(lambda: any(each.shards < SHARDS for each in self._feeders), POLL)
        raise Abandoned

    def _begin(self) -> _Feeder:
        """A feeder with its memory and its work."""
        size = int(np.prod(self._spec.shape))
        process = self._pool.take()
        try:
            os.ftruncate(process.file.fileno(), size)
            pixels = shared(process.file.fileno(), size).reshape(self._spec.shape)
        except OSError as error:
            raise DecoderUnavailable(
                f"no room for the batches of a feeder, {size:,} bytes: {error}; raise the limits on files and memory "
                "(ulimit -f, ulimit -v), lower loader.batch_size, or read in the job (loader.feeders=0)"
            ) from error
        if self._copies is not None:
            self._copies.pin(pixels)
        process.send(self._spec)
        return _Feeder(process, pixels)

    def _receive(self) -> None:
        """Take the messages of all feeders, until each has ended."""
        while not (self._supplied and not self._open):
            if self._stopped.is_set():
                raise Abandoned
            by_connection = {feeder.process.connection: number for number, feeder in enumerate(list(self._feeders))}
            for found in wait([*by_connection, self._woken]):
                if found is self._woken:
                    self._woken.recv(4096)
                else:
                    self._take(by_connection[found])  # type: ignore[index]
        for number, feeder in enumerate(self._feeders):
            feeder.process.send(None)
            while not feeder.ended:
                self._take(number)
        self._ready.put(None)

    def _take(self, number: int) -> None:
        feeder = self._feeders[number]
        try:
            content = json.loads(feeder.process.connection.recv_bytes())
            data = feeder.process.connection.recv_bytes()
        except (EOFError, OSError):
            raise _lost(feeder) from None
        if "error" in content:
            raise _error_of(content)
        now = Clocks(*({name: pair[i] for name, pair in content["clocks"].items()} for i in (0, 1)))
        spent = Spent(*content["spent"])
        self._clocks.merge(_since(feeder.clocks, now), spent - feeder.spent)
        feeder.clocks, feeder.spent = now, spent
        if "end" in content:
            feeder.ended = True
            self._on_peak(content["peak_decoder"])
        elif "rows" in content:
            self._ready.put(parse_rows(self._open.pop(content["rows"]), content, data))
            with self._changed:
                feeder.shards -= 1
                self._changed.notify_all()
        else:
            rows = np.frombuffer(data, dtype=np.int64)
            self._ready.put(self._batch(number, content["slot"], self._open[content["batch"]], rows))

    def _batch(self, number: int, buffer: int, shard: Shard, rows: NDArray[np.int64]) -> ImageBatch:
        feeder, slot = self._feeders[number], number * self._spec.buffers + buffer
        pixels = torch.from_numpy(feeder.pixels[buffer])
        if self._copies is not None:
            started = time.perf_counter()
            slot, pixels = self._copies.copy(pixels, self._stopped)
            # The copy is complete.
            feeder.process.send(buffer)
            self._clocks.merge(Clocks({Stage.COPY: time.perf_counter() - started}, {Stage.COPY: 0.0}))
        return ImageBatch(shard=shard, rows=rows, pixels=pixels.permute(0, 3, 1, 2), slot=slot)


def _since(before: Clocks, now: Clocks) -> Clocks:
    return Clocks(
        {name: spent - before.seconds.get(name, 0.0) for name, spent in now.seconds.items()},
        {name: spent - before.cores.get(name, 0.0) for name, spent in now.cores.items()},
    )


def _lost(feeder: _Feeder) -> DecoderUnavailable:
    code = feeder.process.popen.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return DecoderUnavailable(
        f"a feeder process {how}, most often because the machine has no memory left; the same command goes on, with "
        "fewer processes (loader.feeders) or smaller batches (loader.batch_size)"
    )


def _error_of(content: dict[str, str]) -> Exception:
    kind = getattr(errors, content["error"], None)
    if isinstance(kind, type) and issubclass(kind, PipelineError) and kind is not errors.ConfigError:
        return kind(content["text"])
    return RuntimeError(f"a feeder process failed:\n{content['text']}")
