"""The parts of a job, opened the same way for every command: manifest, model, prompts, images, backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from typing import Any

from pipeline.backends.base import ImageEncoder
from pipeline.backends.decoder_parity import PICTURES
from pipeline.backends.devices import choose_device
from pipeline.backends.oom import HalvingEncoder
from pipeline.backends.parity import Reference, check, embed_reference
from pipeline.backends.streams import Streams, count_streams
from pipeline.config.ranges import AUTO
from pipeline.config.schema import BackendConfig, Config
from pipeline.core.concurrency import aside
from pipeline.core.errors import ManifestError, ParityError
from pipeline.core.phases import phase
from pipeline.core.records import ImageRef, PreprocessSpec, Sample, TextBank
from pipeline.dataset.names import check_columns
from pipeline.engine.batch_size import Benchmark, settle_batch_size
from pipeline.engine.columns import bank_of, heads_of
from pipeline.engine.demo import folder as demo
from pipeline.engine.feeder_pool import FeederPool
from pipeline.engine.feeders import open_feeders
from pipeline.engine.loaded_rate import rate_beside_loader
from pipeline.engine.loop import Worker
from pipeline.engine.opening import images_compared, open_backend, spec_of
from pipeline.engine.sample import draw_sample, read_sample
from pipeline.engine.shard_size import most_rows, with_shard_rows
from pipeline.engine.text_tower import open_tower
from pipeline.images.factory import pixel_reader, with_gpu, worker_threads
from pipeline.images.pool.pool import Decoders
from pipeline.images.reader import PixelReader
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.overlap import check_places
from pipeline.models.checkpoint import Checkpoint, as_recorded, open_checkpoint
from pipeline.models.heads import Head
from pipeline.storage.base import Storage
from pipeline.telemetry.clocks import StageClocks
from pipeline.telemetry.tracing import span

# Seconds to wait for the check of the ids before the model is opened; millions of rows are checked in that time.
IDS_SECONDS = 0.5
log = logging.getLogger(__name__)


class Engine:
    """The opened parts of a config; each is opened once, at its first use. Use it as a context manager.

    Args:
        config: config of the job; an open batch size is measured by :meth:`open`.
        manifest: its manifest with unique ids, where another process has opened it.
        bank: returns its text bank, where another process embeds the prompts.
        decoders: decoder processes that were started before.
        recorded: the model's fingerprint in a dataset that this one belongs to (see
            :func:`~pipeline.models.checkpoint.as_recorded`).
    """

    def __init__(
        self,
        config: Config,
        *,
        manifest: Manifest | None = None,
        bank: Callable[[], TextBank | None] | None = None,
        decoders: Decoders | None = None,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self._recorded = config, recorded
        self._manifest, self._given_bank, self._decoders = manifest, bank, decoders
        self._opened = ExitStack()
        # By the number of images.
        self._samples: dict[int, Sample | None] = {}
        self._chosen = False
        self._ids: Future[None] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._chosen and isinstance(error, ParityError):
            from pipeline.engine.backend_choice import forget

            # On these images it is not what it was chosen for.
            forget(self.config, self.checkpoint)
        self.close()

    def close(self) -> None:
        """End the feeder and decoder processes."""
        self._opened.close()

    def start(self) -> None:
        """Start the processes that read and decode for a job, and do not wait for them: their imports take a second.

        Raises:
            BackendUnavailable: the config asks for a device that is not there.
        """
        if self.feeders is not None:
            self.feeders.start(self.feeders.count)
        elif self._decoders is not None:
            self._decoders.start()

    @cached_property
    def feeders(self) -> FeederPool | None:
        """Feeder processes of a job; None if it reads in this process."""
        pool = open_feeders(self.config, choose_device(self.config.backend.device)) if self.has_images else None
        if pool is not None:
            self._opened.callback(pool.close)
        return pool

    def begin(self, storage: Storage, check: Callable[[Manifest], None] = check_ids) -> None:
        """Open manifest and model, settle the output's shards, begin to ``check`` the ids and to embed the prompts.

        Raises:
            PipelineError: one of :mod:`pipeline.core.errors`; nothing was written then.
        """
        config, manifest, path = self.config, self.manifest, self.config.manifest.path
        check_columns(config)
        check_places(config, manifest)
        with suppress(TimeoutError), phase("ids"):
            # A wrong manifest of ordinary size is reported before a model is opened.
            self._ids = aside(partial(check, manifest), name="ids")
            self._ids.result(IDS_SECONDS)
        log.info("%s: %s%d rows in %d files", path, manifest.about, manifest.rows, len(manifest.files))
        if manifest.text:
            # A model without a text tower is refused before any work.
            self.checkpoint.texts()
        # The model is opened in this thread, the prompts are embedded in another one.
        _ = self._bank, self.heads
        self.config = with_shard_rows(config, self.checkpoint, manifest, storage)

    def open(self, storage: Storage) -> None:
        """Open the reader and the encoder; backend and batch size are measured where the config leaves them open.

        Args:
            storage: the output, which may hold a plan with both.

        Raises:
            PipelineError: one of :mod:`pipeline.core.errors`; nothing was written then.
        """
        if self.has_images:
            # A decoder that this machine does not have is reported before a batch size is measured.
            _ = self.reader
        self.choose_backend(storage)
        self._choose_batch_size(storage)
        _ = self.encoder, self.text_tower

    @property
    def has_images(self) -> bool:
        """False in a job of texts alone."""
        return self.config.manifest.image is not None

    @cached_property
    def text_tower(self) -> HalvingEncoder | None:
        """The text tower, opened for the batch size of the config; None where the manifest names no texts."""
        return open_tower(self.config, self.checkpoint)

    def choose_backend(self, storage: Storage | None = None) -> None:
        """Take a backend where the config leaves it open: measured now for the job of an output, else remembered."""
        if self.config.backend.name != AUTO:
            return
        # Imports the modules of many backends.
        from pipeline.engine.backend_choice import Trial, settle_backend

        trial = None
        if storage is not None:
            rows, whole = most_rows(self.config, self.manifest), self.config.run.dry
            trial = Trial(self.open_at, self.some_or_scenes, self._alone, rows, whole)
        self.config = settle_backend(self.config, self.checkpoint, storage=storage, trial=trial)
        self._chosen = True

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the config, which names one."""
        with span("manifest"):
            return self._manifest or open_manifest(self.config.manifest)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Model of the config."""
        with span("model"):
            return as_recorded(open_checkpoint(self.config.model), self._recorded)

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """Heads of the config.

        Raises:
            ModelError: one cannot be read, or belongs to another model.
            ConfigError: one of their columns has the name of another one.
        """
        return heads_of(self.config, self.checkpoint)

    @cached_property
    def spec(self) -> PreprocessSpec:
        """Preprocessing of the images."""
        return spec_of(self.config, self.checkpoint)

    def bank(self) -> TextBank | None:
        """Wait for the embedded labels; None where the config has none."""
        with phase("prompts"):
            return self._given_bank() if self._given_bank is not None else self._bank.result()

    def check_ids(self) -> None:
        """Wait for the check of the ids that :meth:`begin` began.

        Raises:
            ManifestError: an id is null or occurs twice.
        """
        if self._ids is not None:
            with phase("ids"):
                self._ids.result()

    @cached_property
    def cpu_reader(self) -> PixelReader:
        """Reader that decodes on the CPU, also where the config names the decoder ``gpu``."""
        root = self.manifest.root
        return self._opened.enter_context(pixel_reader(self.config, root, self.spec, self._decoders))

    @cached_property
    def reader(self) -> PixelReader:
        """Reader of the images.

        Raises:
            BackendUnavailable: the config names the decoder ``gpu``, and this machine has none.
        """
        if self.config.images.decoder != "gpu":
            return self.cpu_reader
        return with_gpu(self.cpu_reader, self.config, choose_device(self.config.backend.device))

    @property
    def jpeg_engine(self) -> str | None:
        """The decoder of JPEG files on the GPU, for the fingerprint; None if the cores decode all."""
        # The reader of other decoders is not opened for this.
        gpu = self.reader.gpu if self.config.images.decoder == "gpu" else None
        return None if gpu is None else gpu.engine

    def decoded_sample(self) -> Sample | None:
        """Images of the manifest to compare decoders on; None where the ones that were tried are damaged."""
        return self._drawn(PICTURES)

    def exactly_decoded_sample(self, images: Sequence[ImageRef] | None = None) -> Sample | None:
        """The same images, or those given, by the decoder ``exact``, with which the other decoders are compared."""
        with self.reader.exact() as reader:
            return self._draw(reader, PICTURES) if images is None else read_sample(reader, images)

    def sample_or_scenes(self) -> Sample:
        """Images of the manifest, or rendered scenes: backends can be compared on those, decoders cannot."""
        return self.some_or_scenes(images_compared(self.config))

    def some_or_scenes(self, count: int) -> Sample:
        """Up to ``count`` such images, always the same ones."""
        # Those that decoders are compared on are drawn anyway.
        drawn = self._drawn(max(count, PICTURES) if self.config.images.decoder != "exact" else count)
        if drawn is not None:
            return drawn.spread(count)
        if self.config.manifest.path is not None:
            log.warning("none of the images that were tried can be read; the backend is compared on rendered scenes")
        return demo.rendered_sample(self.spec, count)

    def _alone(self) -> TextBank | None:
        """Wait until nothing but the loader is at work, as speeds are compared; return the embedded labels."""
        self.check_ids()
        return self.bank()

    def _choose_batch_size(self, storage: Storage) -> None:
        def opened(size: int) -> ImageEncoder:
            # The feeders of the size before have ended.
            self.start()
            return self.open_at(size)

        def rate(encoder: ImageEncoder, seconds: float) -> float:
            worker = Worker(self.reader, encoder, StageClocks(), feeders=self.feeders)
            return rate_beside_loader(self.config, self.manifest, worker, seconds)

        images, count = self.config.images, 0 if self.feeders is None else self.feeders.count
        beside = {"decoder": images.decoder, "workers": worker_threads(self.config), "feeders": count}
        benchmark = Benchmark(self.config.backend, self.checkpoint, opened, self._alone, rate, beside)
        with phase("batch size"):
            size = settle_batch_size(
                self.config, benchmark, rows=most_rows(self.config, self.manifest), storage=storage
            )
        self.config = self.config.changed({"loader.batch_size": size})
        self.start()

    def cpu_decoded_sample(self) -> Sample:
        """Images of the manifest by a decoder of the CPU; rendered scenes where the config names no manifest.

        Raises:
            ManifestError: none of the images that were tried can be decoded.
        """
        path, count = self.config.manifest.path, images_compared(self.config)
        drawn = self.sample_or_scenes() if path is None else self._draw(self.cpu_reader, count)
        if drawn is None:
            raise ManifestError(f"manifest.path={path}: none of the images that were tried can be decoded")
        return drawn

    @cached_property
    def encoder(self) -> HalvingEncoder:
        """The backend, opened for the batch size of the config; the text tower in a job of texts alone."""
        if not self.has_images and self.text_tower is not None:
            return self.text_tower
        with span("backend", {"name": self.config.backend.name}):
            return self.open_encoder(self.config.loader.batch_size)

    def open_encoder(self, size: int) -> HalvingEncoder:
        """Open the backend for batches of ``size``, and again for smaller ones if the device runs out of memory.

        The smaller ones are compared with fp32 as well.
        """

        def judge(encoder: ImageEncoder) -> None:
            def reference() -> Reference:
                return embed_reference(encoder, self.checkpoint, self.sample_or_scenes())

            check(encoder, self.checkpoint, reference, bank=self.bank(), limits=self.config.parity)

        return HalvingEncoder(self.open_at, judge, batch_size=size)

    def open_at(self, size: int, backend: BackendConfig | None = None) -> ImageEncoder:
        """Open the backend, or another one, for batches of ``size``, in a thread like those that it will run in.

        What is compiled or opened there is made for their share of the cores.
        """
        config = self.config if backend is None else self.config.changed({"backend": backend})
        device = choose_device(config.backend.device)
        streams = count_streams(config.backend.streams, device)
        with Streams(device, streams) as threads:
            opening = partial(open_backend, config, self.checkpoint, self.sample_or_scenes, size)
            encoder = threads.submit(opening).result()
        encoder.streams = streams
        return encoder

    @cached_property
    def _bank(self) -> Future[TextBank | None]:
        return aside(partial(bank_of, self.config, self.checkpoint), name="prompts")

    def _drawn(self, count: int) -> Sample | None:
        if count not in self._samples:
            without = self.config.manifest.path is None
            self._samples[count] = None if without else self._draw(self.reader, count)
        return self._samples[count]

    def _draw(self, reader: PixelReader, count: int) -> Sample | None:
        return draw_sample(self.manifest, reader, count)
