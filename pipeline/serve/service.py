"""The service without HTTP: opens the engine in the background and computes the rows of requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import DEMO_MODEL, Config
from pipeline.core.concurrency import aside
from pipeline.core.errors import DecoderUnavailable, ModelError, StorageError
from pipeline.core.records import OK, Failure, Pixels
from pipeline.engine.demo.notes import NOTICE
from pipeline.engine.forward import Labelling
from pipeline.serve.batching import Batcher, BatchLimits
from pipeline.serve.engine import Engine, open_engine, shapes
from pipeline.serve.errors import Refused, invalid
from pipeline.serve.forward import Picture, Row
from pipeline.serve.limits import Admission
from pipeline.serve.metrics import Metrics
from pipeline.serve.requests import EncodedImage, PredictRequest

# Retry-After in seconds while the model is opened, or where no decoder can be started.
RETRY = 5
_T = TypeVar("_T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    engine: Engine
    batcher: Batcher[Picture, Row]
    close: Callable[[], None]


@dataclass(slots=True)
class Service:
    """Engine, batch queue, limits and metrics; all but the engine's work runs in the thread of the event loop.

    ``fault`` is the error after which the engine cannot be used: a supervisor that checks ``/healthz`` starts a new
    process. ``unanswered`` counts the requests that were not answered within serve.grace_seconds.
    """

    config: Config
    metrics: Metrics = field(default_factory=Metrics)
    admission: Admission = field(init=False)
    fault: BaseException | None = None
    draining: bool = False
    unanswered: int = 0
    _opened: _Opened | None = None
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.admission = Admission(self.config.serve, self.metrics)

    def start(self, failed: Callable[[BaseException], None]) -> None:
        """Start to open the engine; ``failed`` is called in the thread of the event loop if it cannot be opened."""
        self._task = asyncio.create_task(self._start(failed))

    async def _start(self, failed: Callable[[BaseException], None]) -> None:
        log.info("opening model %s", self.config.model.name)
        if self.config.model.name == DEMO_MODEL:
            log.warning("%s", NOTICE)
        try:
            engine, close = await asyncio.wrap_future(aside(self._open, name="engine"))
        except Exception as error:
            self.fault = error
            failed(error)
            return
        batcher: Batcher[Picture, Row] = Batcher(
            engine.encode,
            BatchLimits(shapes(self.config), engine.streams, wait=self.config.serve.wait_ms / 1000),
            on_start=self._batch_started,
            on_end=self._batch_ended,
        )
        self._opened = _Opened(engine, batcher, close)
        self._update_ready()
        log.info("ready: batches of up to %d images, %d at a time", engine.batch_size, engine.streams)

    def _open(self) -> tuple[Engine, Callable[[], None]]:
        opened = ExitStack()
        try:
            return open_engine(self.config, opened, timer=self.metrics.stage, texts=self._count_text), opened.close
        except BaseException:
            opened.close()
            raise

    async def close(self) -> None:
        """End the engine's threads and processes; work in progress is finished, waiting work is dropped."""
        if self._task is not None:
            self._task.cancel()
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)
        log.info("ended")

    def drain(self) -> None:
        """Close connections with their next answer from now on, and report ``draining`` at ``/readyz``."""
        if not self.draining:
            log.info("ending: %d requests are in progress", self.admission.request_count)
        self.draining = True
        self._update_ready()

    @property
    def engine(self) -> Engine | None:
        """The engine; None until it is ready, and after a fault."""
        return None if self._opened is None or self.fault is not None else self._opened.engine

    @property
    def not_ready_reason(self) -> str | None:
        """Reason why the service is not ready, or None."""
        if self.fault is not None:
            return f"failed: {self.fault}"
        return "the model is being opened" if self._opened is None else None

    def ready_engine(self) -> Engine:
        """Return the engine.

        Raises:
            Refused: it is not ready.
        """
        engine = self.engine
        if engine is None:
            raise Refused(503, "not_ready", self.not_ready_reason or "", retry=RETRY)
        return engine

    async def rows(self, images: Sequence[EncodedImage], labelling: Labelling | None) -> list[Row | Failure]:
        """Return the row of each image, or the failure that its row of a dataset would have.

        Raises:
            Refused: no decoder is available, or the engine failed.
        """
        engine, data = self.ready_engine(), [image.data for image in images]
        chunks = [data[start : start + engine.chunk] for start in range(0, len(data), engine.chunk)]
        found = await asyncio.gather(*(self._chunk(engine, chunk, labelling) for chunk in chunks))
        rows = [row for chunk in found for row in chunk]
        for row in rows:
            self.metrics.images.labels(row.status if isinstance(row, Failure) else OK).inc()
        return rows

    async def labelling(self, request: PredictRequest) -> Labelling:
        """Return the labelling of a request.

        Raises:
            Refused: neither the request nor the service has labels, or the model has no text tower.
        """
        engine = self._engine_of_texts()
        top_k = request.top_k or self.config.labels.top_k
        if request.labels is not None:
            templates = request.templates or tuple(self.config.prompts.templates)
            return await self._text(engine.texts.labelling(request.labels, templates, top_k))
        if engine.labelling is None:
            raise invalid("this service has no default labels (prompts.labels, prompts.path); give labels")
        return replace(engine.labelling, top_k=min(top_k, len(engine.labelling.bank.names)))

    async def texts(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return the features of each text.

        Raises:
            Refused: the model has no text tower.
        """
        return await self._text(self._engine_of_texts().texts.embed(texts)) if texts else []

    async def count_tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of all texts, also of those that are cut.

        Raises:
            Refused: the model has no text tower.
        """
        return await asyncio.wrap_future(self._engine_of_texts().texts.count_tokens(texts)) if texts else 0

    async def fetch(self, url: str) -> bytes | Failure:
        """Return the bytes of an image at an http or https address, or the failure that its row would have.

        Raises:
            Refused: it is too large, or no server answers any more.
        """
        try:
            found = await self._timed("fetch", self.ready_engine().fetch(url))
        except StorageError as error:
            log.warning("no image can be fetched: %s", error)
            raise Refused(503, "no_network", "no server of images answers; try again", retry=RETRY) from error
        if isinstance(found, Failure) and found.status == "too_many_bytes":
            limit = f"{min(self.config.images.max_bytes, self.config.serve.max_body_bytes):,} bytes"
            raise Refused(413, "too_large", f"{url[:200]}: over {limit} (images.max_bytes, serve.max_body_bytes)")
        return found

    def _engine_of_texts(self) -> Engine:
        engine = self.ready_engine()
        if engine.checkpoint.text is None:
            name, family = engine.checkpoint.name, engine.checkpoint.family
            raise invalid(f"the model of this service embeds images alone ({name}, {family}); send images to /embed")
        return engine

    async def _text(self, work: Future[_T]) -> _T:
        try:
            return await self._timed("text", work)
        except ModelError as error:
            # A text tower that gives NaN for one text is damaged.
            self._fail(error)
            raise Refused(503, "not_ready", self.not_ready_reason or "", retry=RETRY) from error

    async def _chunk(self, engine: Engine, data: Sequence[bytes], labelling: Labelling | None) -> list[Row | Failure]:
        assert self._opened is not None
        try:
            decoded = await self._timed("decode", engine.decode(data))
        except DecoderUnavailable as error:
            log.warning("no image can be decoded: %s", error)
            raise Refused(503, "decoder_unavailable", str(error), retry=RETRY) from error
        submit = self._opened.batcher.submit
        rows: list[Row | Failure | asyncio.Future[Row]] = [
            submit(Picture(rgb=np.asarray(each.rgb), labelling=labelling)) if isinstance(each, Pixels) else each
            for each in decoded
        ]
        self.metrics.waiting.set(self._opened.batcher.waiting)
        try:
            embedded = iter(await asyncio.gather(*(row for row in rows if isinstance(row, asyncio.Future))))
        except Exception as error:
            self._fail(error)
            raise
        return [next(embedded) if isinstance(row, asyncio.Future) else row for row in rows]

    def _fail(self, error: BaseException) -> None:
        """Record the fault: an encoder raises for a broken machine, model or device, never for a bad image."""
        if self.fault is None and not self.draining:
            self.fault = error
            self._update_ready()
            log.error("the engine failed, and all further requests are refused: %s", error)

    async def _timed(self, stage: str, work: Future[_T]) -> _T:
        started = time.perf_counter()
        result = await asyncio.wrap_future(work)
        self.metrics.stage(stage, time.perf_counter() - started)
        return result

    def _batch_started(self, waited: Sequence[float]) -> None:
        self.metrics.batch.observe(len(waited))
        for seconds in waited:
            self.metrics.stage("wait", seconds)
        if self._opened is not None:
            self.metrics.waiting.set(self._opened.batcher.waiting)

    def _batch_ended(self, seconds: float) -> None:
        if self._opened is not None:
            engine = self._opened.engine
            batches = self.admission.image_count / engine.batch_size / engine.streams
            self.admission.seconds_ahead = batches * seconds

    def _count_text(self, source: str) -> None:
        self.metrics.texts.labels(source).inc()

    def _update_ready(self) -> None:
        self.metrics.ready.set(self.engine is not None and not self.draining)
