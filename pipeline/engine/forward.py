"""Embeddings and labels of batches, with the proofs of their shape, length and order; the results of a shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from pipeline.models.numbers import UNIT_TOLERANCE, check_scores
from pipeline.telemetry.clocks import StageClocks

# Of the shards whose batches are all full, one in so many has its first batch encoded twice.
PROVED_SHARDS = 8


@dataclass(frozen=True, slots=True)
class Labelling:
    """The text bank, its features on the encoder's device, and the number of labels of a row."""

    bank: TextBank
    features: torch.Tensor
    top_k: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings of the images of a batch, and the proofs of them, on the encoder's device.

    Attributes:
        whole: float32 ``[B, D]``, with the padding.
        vectors: float32 ``[N, D]``, without it.
        lengths: Euclidean length of each, float32 ``[N]``.
        in_order: a bool; False if the rows are not those of the images at their places.
    """

    whole: torch.Tensor
    vectors: torch.Tensor
    lengths: torch.Tensor
    in_order: torch.Tensor


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch whose results are being copied to the host; ``copied`` is None where they are there already."""

    rows: np.ndarray
    vectors: torch.Tensor
    lengths: torch.Tensor
    in_order: torch.Tensor
    top: torch.Tensor
    scores: torch.Tensor
    copied: torch.cuda.Event | None


def encode(encoder: ImageEncoder, pixels: torch.Tensor, count: int, *, twice: bool) -> Encoded:
    """Embed a batch at the encoder's static shape; on CUDA the results are not waited for.

    Args:
        encoder: the opened backend.
        pixels: uint8 ``[B, 3, H, W]``.
        count: images in it; the places behind them repeat some (see :mod:`pipeline.engine.padding`), which proves the
            order of the rows.
        twice: prove the order of a full batch by encoding it again in another order.

    Raises:
        NumericalError: the encoder returned another shape or type.
        BackendUnavailable: the device has no memory for the batch.
    """
    size = len(pixels)
    with memory_explained(size):
        encoded = _forward(encoder, pixels)
        vectors = encoded[:count]
        if count < size:
            again, origin = encoded[count:], repeats_on(encoded.device, count, size)
        elif twice and size > 1:
            shuffled, origin = turned(pixels)
            again = _forward(encoder, shuffled)
        else:
            again, origin = None, None
        proved = torch.ones((), dtype=torch.bool, device=encoded.device)
        if again is not None and origin is not None:
            proved = in_order(vectors, again, origin, pixels[:count])
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    return Encoded(whole=encoded, vectors=vectors, lengths=lengths, in_order=proved)


def _forward(encoder: ImageEncoder, pixels: torch.Tensor) -> torch.Tensor:
    encoded, expected = encoder.encode(pixels), (len(pixels), encoder.dim)
    if tuple(encoded.shape) != expected or encoded.dtype != torch.float32:
        raise NumericalError(
            f"{encoder.name} returned {encoded.dtype} {tuple(encoded.shape)}, wanted float32 {expected}"
        )
    return encoded


def check(encoded: Encoded | PendingBatch, rows: Sequence[int] | np.ndarray, where: str) -> None:
    """Hold embeddings against their proofs; ``rows`` are their numbers for the message, ``where`` is its beginning.

    Raises:
        NumericalError: an embedding is NaN, infinite or not of unit length, or the rows are not in order.
    """
    # NaN is within no tolerance.
    wrong = ~((encoded.lengths - 1).abs() < UNIT_TOLERANCE)
    if bool(wrong.any()):
        raise NumericalError(
            f"{where}, row {rows[int(wrong.nonzero()[0])]}: the encoder returned NaN, infinity or a vector that is not "
            "of length 1; nothing of it is kept. Try backend.precision=fp32, check the checkpoint"
        )
    if not bool(encoded.in_order):
        raise NumericalError(
            f"{where}, rows {rows[0]} to {rows[-1]}: the encoder's rows are not those of the images at their places; "
            "nothing of it is kept. Take another backend, and report this one"
        )


def launch(
    batch: ImageBatch, encoder: ImageEncoder, labelling: Labelling | None, clocks: StageClocks, *, number: int
) -> PendingBatch:
    """Embed and label a batch, the ``number``-th of its shard; on CUDA the results are not waited for.

    Raises:
        NumericalError: the encoder returned another shape.
    """
    count, size = len(batch.rows), len(batch.pixels)
    # Of the shards without padding, one in PROVED_SHARDS has its first batch encoded twice.
    twice = number == 0 and batch.shard.rows % size == 0 and batch.shard.index % PROVED_SHARDS == 0
    with clocks.time(Stage.ENCODE), memory_explained(size):
        failpoint("encode")
        try:
            encoded = encode(encoder, batch.pixels, count, twice=twice)
        except NumericalError as error:
            raise NumericalError(f"shard {batch.shard.index}, batch {number}: {error}") from error
        failpoint("encoded")
    device = encoded.vectors.device
    if labelling is not None:
        with clocks.time(Stage.LABEL), memory_explained(size):
            failpoint("label")
            found = label(Embeddings(encoded.vectors), labelling.bank, labelling.features, top_k=labelling.top_k)
        top, scores = found.indices, found.scores
    else:
        scores = torch.empty((count, 0), device=device)
        top = scores.long()
    results = [encoded.vectors, encoded.lengths, encoded.in_order, top, scores]
    copied = None
    if device.type == "cuda":
        # Copied behind the batch's own work, so that fetching it does not wait for the next batch.
        results = [_to_host(tensor) for tensor in results]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
    vectors, lengths, proved, top, scores = results
    return PendingBatch(
        rows=batch.rows, vectors=vectors, lengths=lengths, in_order=proved, top=top, scores=scores, copied=copied
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@contextmanager
def memory_explained(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error of the device into one that says what to lower."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise BackendUnavailable(
            f"the device has no memory for batches of {batch_size} images: lower loader.batch_size ({error})"
        ) from error


class ShardResults:
    """The results of one shard, filled in batch by batch.

    Args:
        shard: the shard.
        dim: length of an embedding.
        dtype: type of the stored embeddings.
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

    def add(self, batch: PendingBatch) -> None:
        """Add a batch's results; wait until they are copied.

        Raises:
            NumericalError: they are not embeddings and scores, or not those of their images; the shard is not
                committed.
        """
        if batch.copied is not None:
            batch.copied.synchronize()
        where = f"shard {self._shard.index}, batch {self._batches}"
        check(batch, batch.rows, where)
        check_scores(batch.scores, where)
        self._batches += 1
        self._vectors[batch.rows] = batch.vectors.numpy()
        self._top[batch.rows] = batch.top.numpy()
        self._scores[batch.rows] = batch.scores.numpy()

    def finish(self, rows: ShardRows) -> ShardResult:
        """The whole shard; duplicate images get the results of the first of them."""
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
