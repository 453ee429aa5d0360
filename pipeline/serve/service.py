"""The service apart from HTTP: opened beside the server, it turns what is asked into rows."""

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

from pipeline.config.schema import Config
from pipeline.core.concurrency import aside
from pipeline.core.errors import DecoderUnavailable
from pipeline.core.records import OK, Failure, Pixels
from pipeline.engine.forward import Labelling
from pipeline.serve.batching import Batcher
from pipeline.serve.engine import Engine, open_engine, shapes
from pipeline.serve.errors import Refused
from pipeline.serve.forward import Picture, Row
from pipeline.serve.limits import Admission
from pipeline.serve.metrics import Metrics
from pipeline.serve.requests import Asked, Image, invalid

# Seconds after which a client may ask again while the model is opened, or where no decoder can be started.
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
    """One engine, its queue and its books; everything but the engine's work happens in the event loop's thread.

    ``fault`` is what broke it, for good: a supervisor that looks at ``/healthz`` starts another. ``unanswered`` counts
    the requests that the grace was too short for.
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
        """Begin to open the engine; ``failed`` is told, in the event loop's thread, if it cannot be opened."""
        self._task = asyncio.create_task(self._start(failed))

    async def _start(self, failed: Callable[[BaseException], None]) -> None:
        log.info("opening model %s", self.config.model.name)
        try:
            engine, close = await asyncio.wrap_future(aside(self._open, name="engine"))
        except Exception as error:
            self.fault = error
            failed(error)
            return
        batcher: Batcher[Picture, Row] = Batcher(
            engine.encode,
            shapes=shapes(self.config),
            lanes=engine.streams,
            wait=self.config.serve.wait_ms / 1000,
            launched=self._launched,
            ended=self._ended,
        )
        self._opened = _Opened(engine, batcher, close)
        self._say_ready()
        log.info("ready: batches of up to %d images, %d at a time", engine.batch_size, engine.streams)

    def _open(self) -> tuple[Engine, Callable[[], None]]:
        opened = ExitStack()
        try:
            return open_engine(self.config, opened, timer=self.metrics.stage, texts=self._count_text), opened.close
        except BaseException:
            opened.close()
            raise

    async def close(self) -> None:
        """End the engine's threads and processes; what it works on is finished, what waits is not."""
        if self._task is not None:
            self._task.cancel()
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)
        log.info("ended")

    def drain(self) -> None:
        """From now on no answer keeps its connection open, and ``/readyz`` says that the service ends."""
        if not self.draining:
            log.info("ending: %d requests are under way", self.admission.requests)
        self.draining = True
        self._say_ready()

    @property
    def engine(self) -> Engine | None:
        """The engine, once it is ready; None before, and after it broke."""
        return None if self._opened is None or self.fault is not None else self._opened.engine

    @property
    def trouble(self) -> str | None:
        """Why nothing can be asked; None where it can."""
        if self.fault is not None:
            return f"failed: {self.fault}"
        return "the model is being opened" if self._opened is None else None

    def ready_engine(self) -> Engine:
        """The engine.

        Raises:
            Refused: it is not ready.
        """
        engine = self.engine
        if engine is None:
            raise Refused(503, "not_ready", self.trouble or "", retry=RETRY)
        return engine

    async def rows(self, images: Sequence[Image], labelling: Labelling | None) -> list[Row | Failure]:
        """What comes of each image: its row, or the failure that a dataset's row would have.

        Raises:
            Refused: no image can be decoded just now, or the engine broke.
        """
        engine, data = self.ready_engine(), [image.data for image in images]
        chunks = [data[start : start + engine.chunk] for start in range(0, len(data), engine.chunk)]
        found = await asyncio.gather(*(self._chunk(engine, chunk, labelling) for chunk in chunks))
        rows = [row for chunk in found for row in chunk]
        for row in rows:
            self.metrics.images.labels(row.status if isinstance(row, Failure) else OK).inc()
        return rows

    async def labelling(self, asked: Asked) -> Labelling:
        """How the pictures of a request are labelled.

        Raises:
            Refused: neither the request nor the service has labels.
        """
        engine = self.ready_engine()
        top_k = asked.top_k or self.config.labels.top_k
        if asked.labels is not None:
            templates = asked.templates or tuple(self.config.prompts.templates)
            return await self._timed("text", engine.texts.labelling(asked.labels, templates, top_k))
        if engine.labelling is None:
            raise invalid("this service has no labels of its own (prompts.labels, prompts.path); give labels")
        return replace(engine.labelling, top_k=min(top_k, len(engine.labelling.bank.names)))

    async def texts(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """The features of each text."""
        return await self._timed("text", self.ready_engine().texts.embed(texts)) if texts else []

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
            self._break(error)
            raise
        return [next(embedded) if isinstance(row, asyncio.Future) else row for row in rows]

    def _break(self, error: BaseException) -> None:
        """What an encoder raises says that the machine, the model or the device is broken; a bad image never does."""
        if self.fault is None and not self.draining:
            self.fault = error
            self._say_ready()
            log.error("the engine broke, and answers nothing from now on: %s", error)

    async def _timed(self, stage: str, work: Future[_T]) -> _T:
        started = time.perf_counter()
        result = await asyncio.wrap_future(work)
        self.metrics.stage(stage, time.perf_counter() - started)
        return result

    def _launched(self, waited: Sequence[float]) -> None:
        self.metrics.batch.observe(len(waited))
        for seconds in waited:
            self.metrics.stage("wait", seconds)
        if self._opened is not None:
            self.metrics.waiting.set(self._opened.batcher.waiting)

    def _ended(self, seconds: float) -> None:
        if self._opened is not None:
            engine = self._opened.engine
            batches = self.admission.images / engine.batch_size / engine.streams
            self.admission.seconds_ahead = batches * seconds

    def _count_text(self, source: str) -> None:
        self.metrics.texts.labels(source).inc()

    def _say_ready(self) -> None:
        self.metrics.ready.set(self.engine is not None and not self.draining)
