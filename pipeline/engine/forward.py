"""What an encoder makes of a shard's batches: labelled embeddings that were proved to be such."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import out_of_memory
from pipeline.backends.row_order import in_order, turned
from pipeline.core.errors import BackendUnavailable, NumericalError
from pipeline.core.failpoints import failpoint
from pipeline.core.records import Embeddings, ImageBatch, Shard, ShardRows, Stage, TextBank
from pipeline.dataset.parts import ShardResult
from pipeline.engine.padding import repeats_on
from pipeline.models.labels import label
from pipeline.telemetry.clocks import StageClocks

# An embedding of length 1 in float32 is off by rounding only.
UNIT_TOLERANCE = 1e-3
# Of the shards whose batches are all full, one in so many has its first batch encoded twice.
PROVED_SHARDS = 8


@dataclass(frozen=True, slots=True)
class Labelling:
    """The text bank, its features on the encoder's device, and how many labels a row gets."""

    bank: TextBank
    features: torch.Tensor
    top_k: int


@dataclass(frozen=True, slots=True)
class Flying:
    """A batch whose results are on their way to the host; ``landed`` tells when (None: they are there)."""

    rows: np.ndarray
    vectors: torch.Tensor
    top: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor
    in_order: torch.Tensor
    landed: torch.cuda.Event | None


def launch(
    batch: ImageBatch, encoder: ImageEncoder, labelling: Labelling | None, clocks: StageClocks, *, number: int
) -> Flying:
    """Embed and label a batch, the ``number``-th of its shard; on CUDA the results are not waited for.

    Raises:
        NumericalError: the encoder returned another shape.
    """
    where = f"shard {batch.shard.index}, batch {number}"
    with clocks.time(Stage.ENCODE), memory_explained(len(batch.pixels)):
        failpoint("encode")
        encoded = encoder.encode(batch.pixels)
        failpoint("encoded")
        expected = (batch.pixels.shape[0], encoder.dim)
        if tuple(encoded.shape) != expected or encoded.dtype != torch.float32:
            raise NumericalError(
                f"{where}: {encoder.name} returned {encoded.dtype} {tuple(encoded.shape)}, wanted float32 {expected}"
            )
        proved = _in_order(batch, encoded, encoder, first=number == 0)
    vectors = encoded[: len(batch.rows)]
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    if labelling is not None:
        with clocks.time(Stage.LABEL), memory_explained(len(batch.pixels)):
            failpoint("label")
            found = label(Embeddings(vectors), labelling.bank, labelling.features, top_k=labelling.top_k)
        top, scores = found.indices, found.scores
    else:
        scores = torch.empty((len(batch.rows), 0), device=vectors.device)
        top = scores.long()
    results = [vectors, top, scores, lengths, proved]
    landed = None
    if vectors.device.type == "cuda":
        # Copied behind this batch's own work, so that fetching it never waits for the next batch.
        results = [_to_host(tensor) for tensor in results]
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(vectors.device))
    vectors, top, scores, lengths, proved = results
    return Flying(
        rows=batch.rows, vectors=vectors, top=top, scores=scores, lengths=lengths, in_order=proved, landed=landed
    )


def _in_order(batch: ImageBatch, encoded: torch.Tensor, encoder: ImageEncoder, *, first: bool) -> torch.Tensor:
    """Whether the rows belong to their pictures, as far as this batch tells; a bool on the device.

    A batch with free places shows it in them. Where a shard has none, now and then its first batch is encoded
    again with its pictures at other places.
    """
    count, size = len(batch.rows), len(batch.pixels)
    if count < size:
        again, origin = encoded[count:], repeats_on(encoded.device, count, size)
    elif first and size > 1 and batch.shard.rows % size == 0 and batch.shard.index % PROVED_SHARDS == 0:
        pixels, origin = turned(batch.pixels)
        again = encoder.encode(pixels)
    else:
        return torch.ones((), dtype=torch.bool, device=encoded.device)
    return in_order(encoded[:count], again, origin, batch.pixels[:count])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def memory_explained(batch_size: int) -> Iterator[None]:
    """Turn a want of the device's memory that no smaller batch of the encoder can mend into an error that says so."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise BackendUnavailable(
            f"the device has no memory for batches of {batch_size} images: lower loader.batch_size ({error})"
        ) from error


class Accumulated:
    """The results of one shard as they come in.

    Args:
        shard: which one.
        dim: length of an embedding.
        dtype: how embeddings are stored.
        labelling: as for :func:`launch`.
        threshold: lowest score of the column ``label``.
    """

    def __init__(
        self, shard: Shard, *, dim: int, dtype: str, labelling: Labelling | None, threshold: float | None
    ) -> None:
        self._shard, self._threshold = shard, threshold
        self._names = labelling.bank.names if labelling is not None else ()
        k = min(labelling.top_k, len(self._names)) if labelling is not None else 0
        self._vectors = np.zeros((shard.rows, dim), dtype=np.dtype(dtype))
        self._top = np.zeros((shard.rows, k), dtype=np.int64)
        self._scores = np.zeros((shard.rows, k), dtype=np.float32)
        self._batches = 0

    def add(self, batch: Flying) -> None:
        """Take a batch's results; waits until they have landed.

        Raises:
            NumericalError: they are no embeddings, or not those of their pictures.
        """
        if batch.landed is not None:
            batch.landed.synchronize()
        where = f"shard {self._shard.index}, batch {self._batches}"
        self._batches += 1
        # NaN is within no tolerance.
        healthy = np.abs(batch.lengths.numpy() - 1) < UNIT_TOLERANCE
        if not healthy.all():
            position = int(batch.rows[int(np.flatnonzero(~healthy)[0])])
            raise NumericalError(
                f"{where}, row {position}: the encoder returned NaN, infinity or a vector that is not of length 1; "
                "the shard is not committed. Try backend.precision=fp32, check the checkpoint"
            )
        if not batch.in_order:
            raise NumericalError(
                f"{where}, rows {batch.rows[0]} to {batch.rows[-1]}: the encoder's rows are not those of the pictures "
                "at their places; the shard is not committed. Take another backend, and report this one"
            )
        self._vectors[batch.rows] = batch.vectors.numpy()
        self._top[batch.rows] = batch.top.numpy()
        self._scores[batch.rows] = batch.scores.numpy()

    def finish(self, rows: ShardRows) -> ShardResult:
        """The whole shard, with what repeated images share with the first of their kind."""
        if rows.repeats:
            repeated, first = list(rows.repeats), list(rows.repeats.values())
            for column in (self._vectors, self._top, self._scores):
                column[repeated] = column[first]
        return ShardResult(
            rows=rows,
            vectors=self._vectors,
            top=self._top,
            scores=self._scores,
            names=self._names,
            threshold=self._threshold,
        )
