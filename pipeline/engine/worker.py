"""The opened parts of an engine as the loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.engine.engine import Engine
from pipeline.engine.loop import Worker
from pipeline.engine.meter import Meter
from pipeline.engine.sample import FirstBatch


def worker_of(engine: Engine, meter: Meter, before_writing: Callable[[Sequence[FirstBatch]], None] | None) -> Worker:
    """Return the worker of this process; for ``before_writing`` see :class:`~pipeline.engine.loop.Worker`."""
    images = engine.has_images
    return Worker(
        reader=engine.reader if images else None,
        encoder=engine.encoder,
        clocks=meter.clocks,
        gpu=meter.gpu,
        feeders=engine.feeders,
        before_writing=before_writing,
        tokenizer=engine.checkpoint.texts()[1] if engine.manifest.text else None,
        text_encoder=engine.text_tower if images else None,
        sample=meter.sample,
    )
