"""A feeder process: ``python -m pipeline.engine.feeder_process SETTINGS``, started by :mod:`pipeline.engine.feeders`.

It runs a :class:`~pipeline.engine.loader.Loader` over the shards that it is given, with decoder processes of its own,
and fills batch buffers in memory that it shares with the process of the encoder. It sends the rows of every batch, and
the table and the failures of every shard: as JSON, numbers and Arrow's format, never as pickled objects.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pipeline.config.schema import Config
from pipeline.core.errors import BackendUnavailable, PipelineError
from pipeline.core.processes import Spent, end_with, spent
from pipeline.core.records import Failure, ImageBatch, PreprocessSpec, Shard, ShardRows
from pipeline.engine.buffers import SharedSlot
from pipeline.engine.loader import Loader, LoaderSpec
from pipeline.engine.prefetch import POLL
from pipeline.images.factory import decoder_processes, open_decoders, pixel_reader, with_gpu
from pipeline.images.pool.pool import Decoders
from pipeline.images.pool.shared_memory import shared
from pipeline.images.reader import PixelReader
from pipeline.manifest.manifest import Manifest
from pipeline.telemetry.clocks import StageClocks


@dataclass(frozen=True, slots=True)
class GpuDecoding:
    """The decoder ``gpu`` of a job: the name of its device, and what decodes there according to the fingerprint."""

    device: str
    engine: str


@dataclass(frozen=True, slots=True)
class FeederSpec:
    """All that a feeder must know; ``buffers`` is the number of batches in its memory, ``gpu`` None without one."""

    config: Config
    manifest: Manifest
    preprocess: PreprocessSpec
    loader: LoaderSpec
    buffers: int
    gpu: GpuDecoding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the memory: ``[buffers, B, H, W, 3]``, uint8."""
        return (self.buffers, self.loader.batch_size, *self.preprocess.size, 3)


class _Feeder:
    """One run of the loader; requests are taken in a thread of its own."""

    def __init__(self, connection: Connection, decoders: Decoders | None) -> None:
        self._connection, self._decoders, self._clocks = connection, decoders, StageClocks()
        self._shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        # Imports, and the start of the decoders, are no work of the run.
        self._before = self._spent()

    def run(self, spec: FeederSpec, memory: int) -> None:
        decoders = self._decoders
        pixels = shared(memory, int(np.prod(spec.shape))).reshape(spec.shape)
        slots = [SharedSlot(buffer) for buffer in pixels]
        with open_reader(spec, decoders) as reader:
            loader = Loader(spec.manifest, reader, spec.loader, timer=self._clocks.add, slots=slots)
            with loader:
                threading.Thread(target=self._listen, args=(loader,), daemon=True).start()
                for item in loader.stream(self._assigned(loader)):
                    self._send_item(item)
            peak = decoders.peak_rss() if decoders is not None else 0
        # All decoders have ended, so that their core time is whole.
        self._send({"end": True, "peak_decoder": peak})

    def _listen(self, loader: Loader) -> None:
        try:
            while True:
                wanted: Shard | int | None = self._connection.recv()
                if isinstance(wanted, int):
                    loader.give_back(wanted)
                else:
                    self._shards.put(wanted)
        except (EOFError, OSError):
            _leave()

    def _assigned(self, loader: Loader) -> Iterator[Shard]:
        while not loader.stopped:
            with suppress(queue.Empty):
                shard = self._shards.get(timeout=POLL)
                if shard is None:
                    return
                yield shard

    def _send_item(self, item: ImageBatch | ShardRows) -> None:
        if isinstance(item, ImageBatch):
            self._send({"batch": item.shard.index, "slot": item.slot}, item.rows.tobytes())
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, item.table.schema) as writer:
            writer.write_table(item.table)
        self._send(
            {
                "rows": item.shard.index,
                "failures": [[row, failure.status, failure.error] for row, failure in item.failures.items()],
                "repeats": list(item.repeats.items()),
            },
            sink.getvalue(),
        )

    def _send(self, content: dict[str, object], data: bytes | pa.Buffer = b"") -> None:
        clocks = self._clocks.total()
        by_stage = {name: [clocks.seconds[name], clocks.cores[name]] for name in clocks.seconds}
        since = self._spent() - self._before
        content |= {"clocks": by_stage, "spent": [since.own, since.children]}
        self._connection.send_bytes(json.dumps(content).encode())
        self._connection.send_bytes(data)

    def _spent(self) -> Spent:
        return spent(() if self._decoders is None else self._decoders.children.pids)

    def fail(self, error: Exception) -> None:
        """Send the error that ends this process."""
        text = str(error) if isinstance(error, PipelineError) else traceback.format_exc()
        with suppress(OSError):
            self._send({"error": type(error).__name__, "text": text})


def open_reader(spec: FeederSpec, decoders: Decoders | None = None) -> PixelReader:
    """The reader of a feeder, with the decoder ``gpu`` where the job has it.

    Raises:
        BackendUnavailable: the GPU cannot decode here, or decodes in another way than in the job's process.
    """
    reader = pixel_reader(spec.config, spec.manifest.root, spec.preprocess, decoders)
    if spec.gpu is None:
        return reader
    import torch

    # The process of the job has logged the same warnings.
    logging.getLogger("pipeline.images.gpu").setLevel(logging.ERROR)
    device = torch.device(spec.gpu.device)
    if device.type == "cuda":
        # Pinned memory belongs to the current device.
        torch.cuda.set_device(device)
    reader = with_gpu(reader, spec.config, device)
    if reader.gpu is not None and reader.gpu.engine != spec.gpu.engine:
        raise BackendUnavailable(
            f"images.decoder=gpu: a feeder process decodes by {reader.gpu.engine} and the job by {spec.gpu.engine}, "
            "which gives other pixels; another program may have taken the GPU's memory meanwhile: run the same "
            "command again, or with fewer processes (loader.feeders)"
        )
    return reader


def parse_rows(shard: Shard, content: dict[str, object], data: bytes) -> ShardRows:
    """The rows of a shard, from the message of a feeder."""
    failures: list[tuple[int, str, str]] = content["failures"]  # type: ignore[assignment]
    repeats: list[tuple[int, int]] = content["repeats"]  # type: ignore[assignment]
    table = pa.ipc.open_stream(data).read_all()
    return ShardRows(
        shard=replace(shard, rows=table.num_rows),
        table=table,
        failures={row: Failure(status, error) for row, status, error in failures},
        repeats=dict(repeats),
    )


def _leave() -> NoReturn:
    """End this process: the process of the encoder has closed its end, and wants nothing any more."""
    os._exit(0)


def main() -> None:
    """Feed until the connection closes.

    The config comes first, so that the decoders start; then, when the model is open, the :class:`FeederSpec`; then the
    shards, the numbers of free buffers in between, and None behind the last shard.
    """
    settings = json.loads(sys.argv[1])
    end_with(settings["parent"])
    # Some schedulers send these to every process of a job; the job itself ends its feeders.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # As pipeline.run does: each image is a few objects, and none is part of a cycle.
    gc.set_threshold(100_000, 20, 50)
    connection = Connection(settings["control"])
    try:
        config: Config = connection.recv()
        decoders = open_decoders(config)
        if decoders is not None:
            decoders.start()
        if config.images.decoder == "gpu":
            # It imports torch, which takes longer than all else.
            import pipeline.images.gpu.decoder  # noqa: F401
        spec: FeederSpec = connection.recv()
    except (EOFError, OSError):
        _leave()
    feeder = _Feeder(connection, decoders)
    try:
        if decoders is not None:
            # With fewer shards than feeders, each has more cores than was known.
            decoders.grow(decoder_processes(spec.config))
        feeder.run(spec, settings["memory"])
    except Exception as error:
        feeder.fail(error)


if __name__ == "__main__":
    main()
