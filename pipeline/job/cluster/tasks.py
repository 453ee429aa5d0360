"""Tasks that a driver runs on a worker; only their arguments are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.records import Shard, TextBank
from pipeline.job.cluster import dask_worker

if TYPE_CHECKING:
    from pipeline.engine.prepare import Prepared


def prepare(token: str, bank: TextBank | None) -> tuple[str, Prepared]:
    """Open the model, pass the gates; the address of the worker, and what it found."""
    return dask_worker.of(token).prepare(bank)


def note(token: str) -> None:
    """Write what this worker's gates measured into the output."""
    dask_worker.of(token).note()


def embed(token: str, shard: Shard) -> None:
    """Embed a shard; its report is sent under the topic of the job."""
    dask_worker.of(token).put(shard).result()


async def drain(token: str) -> None:
    """Stop waiting for more shards for now; a coroutine, so that Dask does not wait either."""
    dask_worker.of(token).drained = True
