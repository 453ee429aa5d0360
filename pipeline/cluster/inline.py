"""All shards in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from pipeline.backends.base import ImageEncoder
from pipeline.images.reader import PixelReader
from pipeline.records import Shard, ShardReport
from pipeline.report.clocks import StageClocks
from pipeline.worker import Job, embed


def run(
    shards: Iterable[Shard],
    job: Job,
    encoder: ImageEncoder,
    *,
    clocks: StageClocks,
    on_batch: Callable[[int], None],
    reader: PixelReader | None = None,
) -> Generator[ShardReport]:
    """See :func:`pipeline.worker.embed`."""
    return embed(shards, job, encoder, clocks=clocks, on_batch=on_batch, reader=reader)
