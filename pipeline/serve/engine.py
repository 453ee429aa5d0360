"""Engine of the service: the engine of a job, opened for several batch sizes, behind threads and futures."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import choose_device
from pipeline.backends.parity import check, embed_reference
from pipeline.backends.streams import count_streams, keep_memory
from pipeline.config.schema import Config
from pipeline.core.processes import cores
from pipeline.core.records import Failure, ImageRef, Parity, Pixels, PreprocessSpec
from pipeline.dataset.vectors import VectorFormat, form_of
from pipeline.engine import engine as job
from pipeline.engine.forward import Labelling, memory_explained
from pipeline.images.factory import decoder_of, open_decoders, worker_threads
from pipeline.images.reader import PixelReader
from pipeline.images.sources.http import SCHEMES
from pipeline.images.sources.source import Source
from pipeline.images.versions import fingerprint as decoding
from pipeline.models.checkpoint import Checkpoint
from pipeline.serve.forward import Forward, Picture, Row
from pipeline.serve.text_cache import Texts

Timer = Callable[[str, float], None]
# Of two shapes, the smaller one holds so many times fewer pictures.
STEP = 4
# Images that are fetched from other servers at a time.
FETCHES = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """The opened model; close what it was opened in. Its methods return futures, and work in threads of their own.

    ``fingerprints`` is what an answer follows from, and ``fingerprint`` its digest; ``parity`` the figures of each
    shape that was compared with fp32; ``vectors`` the form of the embeddings of a dataset with the same config.
    """

    config: Config
    checkpoint: Checkpoint
    vectors: VectorFormat
    texts: Texts
    labelling: Labelling | None
    batch_size: int
    streams: int
    device: str
    precision: str
    parity: tuple[Parity, ...]
    fingerprints: dict[str, Any]
    fingerprint: str
    _reader: PixelReader
    _source: Source
    _fetching: ThreadPoolExecutor
    _decoding: ThreadPoolExecutor
    _encoding: ThreadPoolExecutor
    _forward: Forward

    @property
    def chunk(self) -> int:
        """How many images are best decoded together."""
        return self._reader.chunk

    def fetch(self, url: str) -> Future[bytes | Failure]:
        """The bytes of an image at an http or https address, or the failure that a dataset's row would have."""
        return self._fetching.submit(self._source.read, ImageRef(id=0, path=url))

    def decode(self, images: Sequence[bytes]) -> Future[list[Pixels | Failure]]:
        """Pixels, or the failure that a dataset's row would have, for each image; in processes that may crash."""
        return self._decoding.submit(self._decode, images)

    def encode(self, pictures: Sequence[Picture]) -> Future[Sequence[Row]]:
        """A row for each of up to ``batch_size`` pictures."""
        return self._encoding.submit(self._forward, pictures)

    def _decode(self, images: Sequence[bytes]) -> list[Pixels | Failure]:
        refs = [ImageRef(id=place, data=data) for place, data in enumerate(images)]
        results = self._reader.read_all(refs, lambda stage, seconds: None)
        return [result for result in results if result is not None]


def open_engine(config: Config, opened: ExitStack, *, timer: Timer, texts: Callable[[str], None]) -> Engine:
    """Open the model on its backend, compare it with fp32, and run it once; what must be closed is left to ``opened``.

    Args:
        config: checked by :func:`~pipeline.serve.settings.check_service`.
        opened: closes the engine.
        timer: called with the seconds of ``encode`` and ``label``, from any thread.
        texts: called with the origin of text features.

    Raises:
        PipelineError: one of :mod:`pipeline.core.errors`; a missed parity is a ParityError.
    """
    # A decoder has no longer than the request that waits for it.
    seconds = min(config.loader.decode_seconds, config.serve.timeout_seconds)
    # Latency comes before throughput here: a batch gets all cores, unless the config says otherwise.
    config = config.changed({"loader.decode_seconds": seconds, "backend.streams": config.backend.streams or 1})
    decoders = open_decoders(config)
    if decoders is not None:
        opened.callback(decoders.close)
        decoders.start()
    device = choose_device(config.backend.device)
    streams = count_streams(config.backend.streams, device)
    threads = max(1, cores() // streams)
    parts = opened.enter_context(job.Engine(config, decoders=decoders))
    # Nothing is measured here: of what is remembered, the fastest is taken.
    parts.choose_backend()
    config = parts.config
    checkpoint, spec, bank = parts.checkpoint, parts.spec, parts.bank()
    vectors = form_of(config.output, checkpoint.dim)
    if device.type == "cpu":
        keep_memory()
    encoding = _pool("encode", streams, opened, initializer=torch.set_num_threads, initargs=(threads,))
    encoders, parity = _open_shapes(parts, encoding)
    largest = encoders[0]
    log.info("model %s with %s on %s in %s", config.model.name, largest.name, largest.device, largest.precision)
    embedder = Texts(checkpoint, config, device=largest.device, threads=threads, on_lookup=texts)
    opened.callback(embedder.close)
    reader = PixelReader(
        # No request names a file; only bytes come here.
        source=Source(root=os.devnull, max_bytes=config.images.max_bytes),
        decoder=decoder_of(config),
        spec=spec,
        decoders=decoders,
    )
    forward = Forward(encoders, spec.size, timer)
    prints = _fingerprints(parts, largest)
    engine = Engine(
        config=config,
        checkpoint=checkpoint,
        vectors=vectors,
        texts=embedder,
        labelling=None if bank is None else embedder.with_bank(bank, config.labels.top_k),
        batch_size=largest.batch_size,
        streams=streams,
        device=str(largest.device),
        precision=largest.precision,
        parity=tuple(parity),
        fingerprints=prints,
        fingerprint=hashlib.sha256(json.dumps(prints, sort_keys=True, default=str).encode()).hexdigest(),
        _reader=reader,
        _source=_web(config),
        _fetching=_pool("fetch", FETCHES, opened),
        _decoding=_pool("decode", worker_threads(config), opened),
        _encoding=encoding,
        _forward=forward,
    )
    _warm(engine, encoders, spec)
    return engine


def _web(config: Config) -> Source:
    """The source of images that requests name: no root, and of the allowed schemes those of the web alone."""
    return Source(
        root=os.devnull,
        max_bytes=min(config.images.max_bytes, config.serve.max_body_bytes),
        schemes=tuple(scheme for scheme in config.images.schemes if scheme in SCHEMES),
        private_hosts=tuple(config.images.private_hosts),
        read_seconds=min(config.loader.read_seconds, config.serve.timeout_seconds),
    )


def shapes(config: Config) -> list[int]:
    """The batch sizes that are opened, largest first."""
    sizes = [math.ceil(config.loader.batch_size / STEP**step) for step in range(config.serve.shapes)]
    return list(dict.fromkeys(sizes))


def _open_shapes(parts: job.Engine, encoding: ThreadPoolExecutor) -> tuple[list[ImageEncoder], list[Parity]]:
    """An encoder for each of :func:`shapes`, and what the gate found of those that pass one."""
    # In a thread that will encode: what is compiled or captured there belongs to it on a GPU.
    # One after the other, so that what the first one exports is there for the next.
    encoders: list[ImageEncoder] = []
    parity: list[Parity] = []
    # Embedded once, for the first encoder.
    wanted = cache(lambda: embed_reference(encoders[0], parts.checkpoint, parts.sample_or_scenes()))
    for size in shapes(parts.config):
        with memory_explained(size):
            encoder = encoding.submit(parts.open_encoder, size).result()
            encoders.append(encoder)
            gate = partial(check, bank=parts.bank(), limits=parts.config.parity)
            found = encoding.submit(gate, encoder, parts.checkpoint, wanted).result()
        if found is not None:
            parity.append(found)
    return encoders, parity


def _fingerprints(parts: job.Engine, encoder: ImageEncoder) -> dict[str, Any]:
    """As those of a dataset (:func:`pipeline.engine.prepare.fingerprints`), but for its manifest and its files."""
    config, bank = parts.config, parts.bank()
    return {
        "model": parts.checkpoint.fingerprint,
        "images": decoding(config.images, parts.jpeg_engine),
        "backend": encoder.fingerprint,
        "batch_sizes": shapes(config),
        "prompts": None if bank is None else {"text": bank.fingerprint, "count": len(bank.names)},
    }


def _warm(engine: Engine, encoders: Sequence[ImageEncoder], spec: PreprocessSpec) -> None:
    """A batch of every shape in every thread, and the text tower once: what is slow at first is slow now.

    On a CPU nothing is made for a shape but by a compiler or a runtime, so that other backends run their smallest one.
    """
    grey = Picture(rgb=np.full((*spec.size, 3), 128, dtype=np.uint8), labelling=engine.labelling)
    sizes = [encoder.batch_size for encoder in encoders]
    if encoders[0].flexible and encoders[0].device.type == "cpu":
        sizes = [min(sizes)]
    work: list[Future[Any]] = [engine.encode([grey] * size) for size in sizes for _ in range(engine.streams)]
    if engine.checkpoint.text is not None:
        work.append(engine.texts.embed(["a photo"]))
    for each in work:
        each.result()


def _pool(name: str, threads: int, opened: ExitStack, **settings: Any) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, **settings)
    opened.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool
