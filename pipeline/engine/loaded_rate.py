"""Images/s of an encoder beside the loader of its job.

A loader takes cores and bandwidth of the memory from the encoder, and its threads hold Python's lock while a GPU waits
for its next launch. How much of that a batch size bears is part of its speed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

from pipeline.backends.timing import images_per_second
from pipeline.config.schema import Config
from pipeline.core.records import ImageBatch, Shard, Stage
from pipeline.engine.feeders import Feeders
from pipeline.engine.loader import Loader
from pipeline.engine.loop import Worker, open_loader
from pipeline.images.pool.processes import Abandoned
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import cut

# Seconds to wait for the first batch of the loader; a slow store may take longer, and is read beside the encoder then.
FIRST_SECONDS = 10.0
# Batches that the loader may be behind, so that it need not make up for all that it once was late.
BEHIND = 2
# With a smaller share of the encoder's batches, the loader is the limit of the job.
KEEPS_UP = 0.9
log = logging.getLogger(__name__)


def rate_beside_loader(config: Config, manifest: Manifest, worker: Worker, seconds: float) -> float:
    """Images/s of the encoder of ``worker``, as :func:`~pipeline.backends.timing.images_per_second`, beside its loader.

    The loader reads the first shards of the manifest, and again where it has few. For each batch that was encoded, one
    of the loader is taken and given back; the encoder waits for none, so that a slow store is not measured.

    Raises:
        PipelineError: the images cannot be read, as in the job.
    """
    encoder, reader = worker.encoder, worker.reader
    assert reader is not None
    config = config.changed({"loader.batch_size": encoder.batch_size})
    # A loader that is stopped ends decoders in the middle of an image; those of the job go on.
    decoders = None if reader.decoders is None else reader.decoders.like(reader.decoder)
    with (
        replace(reader, decoders=decoders) as reader,
        open_loader(config, manifest, replace(worker, reader=reader), encoder.streams + 1) as loader,
    ):
        taker = _Taker(loader, manifest, config.manifest.shard_rows)
        with ThreadPoolExecutor(1, thread_name_prefix="taker") as thread:
            taken = thread.submit(taker.run)
            try:
                taker.first.wait(FIRST_SECONDS)
                rate = images_per_second(encoder, size=reader.spec.size, seconds=seconds, after=taker.owe)
            finally:
                taker.end()
                taken.result()
    reading, decoding = (worker.clocks.total().seconds.get(stage, 0.0) for stage in (Stage.READ, Stage.DECODE))
    # On a CPU, decoding is slower because the encoder, which waits for nothing here, has the cores.
    if taker.share < KEEPS_UP and (reading > decoding or encoder.device.type != "cpu"):
        limit = "reading" if reading > decoding else "decoding"
        words = "batches of %d images: %s gives about %.1f images/s, the encoder beside it %.1f"
        log.info(words, encoder.batch_size, limit, taker.share * rate, rate)
    return rate


class _Taker:
    """A thread that takes as many batches of a loader as are owed."""

    def __init__(self, loader: Loader | Feeders, manifest: Manifest, shard_rows: int) -> None:
        self._loader, self._manifest, self._shard_rows = loader, manifest, shard_rows
        self._owed, self._changed, self._ended = 0, threading.Condition(), threading.Event()
        self._asked = self._taken = 0
        self._empty = False
        self.first = threading.Event()

    @property
    def share(self) -> float:
        """Share of the batches that were owed which the loader had; 1 where no image can be read."""
        return self._taken / self._asked if self._asked and not self._empty else 1.0

    def owe(self) -> None:
        """Take one batch more, unless some are late."""
        with self._changed:
            self._asked += 1
            self._owed = min(self._owed + 1, BEHIND)
            self._changed.notify()

    def end(self) -> None:
        """Take none any more."""
        self._ended.set()
        with self._changed:
            self._changed.notify()
        self._loader.fail(Abandoned())

    def run(self) -> None:
        """Take batches until the end."""
        shards = self._manifest.shards(self._shard_rows)
        try:
            for item in self._loader.stream(self._shards()):
                if isinstance(item, ImageBatch):
                    self.first.set()
                    with self._changed:
                        self._changed.wait_for(lambda: self._owed or self._ended.is_set())
                        self._owed -= 1
                        self._taken += not self._ended.is_set()
                    self._loader.release(item)
                else:
                    shards -= 1
                    if not shards and not self.first.is_set():
                        # No image of the manifest can be read: there is no batch to wait for.
                        self._empty = True
                        self._ended.set()
        except Abandoned:
            pass
        finally:
            self.first.set()

    def _shards(self) -> Iterator[Shard]:
        numbers = count()
        while True:
            for shard in cut(self._manifest, self._shard_rows):
                if self._ended.is_set():
                    return
                # Each has a number of its own, also where it comes again.
                yield replace(shard, index=next(numbers))
