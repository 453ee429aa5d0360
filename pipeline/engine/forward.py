"""Embeddings and labels of batches, with the proofs of their shape, length and order; the results of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import out_of_memory
from pipeline.backends.row_order import in_order, turned
from pipeline.core.errors import BackendUnavailable, NumericalError
from pipeline.core.failpoints import failpoint
from pipeline.core.records import Embeddings, ImageBatch, Shard, ShardRows, Stage, TextBank
from pipeline.dataset.parts import ShardResult, TextVectors
from pipeline.dataset.vectors import VectorFormat
from pipeline.engine.padding import repeats_on
from pipeline.engine.recall import RecallSample
from pipeline.engine.texts import ShardTexts
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
    """Results of a batch on the host, or being copied there: ``wait`` returns when they are there.

    ``release`` gives their memory back; nothing may be read from it then.
    """

    rows: np.ndarray
    vectors: torch.Tensor
    lengths: torch.Tensor
    in_order: torch.Tensor
    top: torch.Tensor
    scores: torch.Tensor
    wait: Callable[[], object] = lambda: None
    release: Callable[[], object] = lambda: None


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
    whole, proved = embed(encoder, pixels, count, twice=twice)
    vectors = whole[:count]
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    return Encoded(whole=whole, vectors=vectors, lengths=lengths, in_order=proved)


def embed(encoder: ImageEncoder, pixels: torch.Tensor, count: int, *, twice: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a batch with its padding, float32 ``[B, D]``, and the proof of their order; see :func:`encode`."""
    size = len(pixels)
    with memory_explained(size):
        encoded = _forward(encoder, pixels)
        if count < size:
            again, origin = encoded[count:], repeats_on(encoded.device, count, size)
        elif twice and size > 1:
            shuffled, origin = turned(pixels)
            again = _forward(encoder, shuffled)
        else:
            return encoded, torch.ones((), dtype=torch.bool, device=encoded.device)
        return encoded, in_order(encoded[:count], again, origin, pixels[:count])


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


class Forward:
    """Embeddings and labels of batches by one encoder.

    Args:
        encoder: the opened backend.
        labelling: None where rows get no labels.
    """

    def __init__(self, encoder: ImageEncoder, labelling: Labelling | None) -> None:
        self._encoder, self._labelling = encoder, labelling

    def launch(self, batch: ImageBatch, clocks: StageClocks, *, number: int) -> PendingBatch:
        """Embed and label a batch, the ``number``-th of its shard.

        Raises:
            NumericalError: the encoder returned another shape or type.
            BackendUnavailable: the device has no memory for the batch.
        """
        size = len(batch.pixels)
        # Of the shards without padding, one in PROVED_SHARDS has its first batch encoded twice; so has a tar, whose
        # rows are 0 until they are counted.
        twice = number == 0 and batch.shard.rows % size == 0 and batch.shard.index % PROVED_SHARDS == 0
        with clocks.time(Stage.ENCODE), memory_explained(size):
            failpoint("encode")
            try:
                whole, proved = embed(self._encoder, batch.pixels, len(batch.rows), twice=twice)
            except NumericalError as error:
                raise NumericalError(f"shard {batch.shard.index}, batch {number}: {error}") from error
            failpoint("encoded")
        with clocks.time(Stage.LABEL) if self._labelling is not None else nullcontext(), memory_explained(size):
            if self._labelling is not None:
                failpoint("label")
            return self._results(batch, whole, proved)

    def _results(self, batch: ImageBatch, whole: torch.Tensor, proved: torch.Tensor) -> PendingBatch:
        vectors = whole[: len(batch.rows)]
        lengths, top, scores = scored(vectors, labelling=self._labelling)
        return PendingBatch(rows=batch.rows, vectors=vectors, lengths=lengths, in_order=proved, top=top, scores=scores)


def scored(vectors: torch.Tensor, *, labelling: Labelling | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths of embeddings, float32 ``[N]``; indices int64 and scores float32 of their best labels, ``[N, K]``.

    Without labels these have no columns.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    if labelling is None:
        scores = torch.empty((len(vectors), 0), device=vectors.device)
        return lengths, scores.long(), scores
    found = label(Embeddings(vectors), labelling.bank, labelling.features, top_k=labelling.top_k)
    return lengths, found.indices, found.scores


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
        form: of the stored embeddings.
        labelling: as for :class:`Forward`.
        threshold: lowest score of the column ``label``.
        sample: takes embeddings before they are stored, or None.
    """

    def __init__(
        self,
        shard: Shard,
        form: VectorFormat,
        *,
        labelling: Labelling | None,
        threshold: float | None,
        sample: RecallSample | None = None,
    ) -> None:
        # Embeddings of texts beside those of images, once there are any.
        self._texts: np.ndarray | None = None
        self._shard, self._form, self._threshold, self._sample = shard, form, threshold, sample
        self._names = labelling.bank.names if labelling is not None else ()
        k = min(labelling.top_k, len(self._names)) if labelling is not None else 0
        self._vectors: NDArray[Any] = np.zeros((shard.rows, form.width), dtype=form.element)
        self._top: NDArray[np.int64] = np.zeros((shard.rows, k), dtype=np.int64)
        self._scores: NDArray[np.float32] = np.zeros((shard.rows, k), dtype=np.float32)
        self._batches = 0

    def add(self, batch: PendingBatch) -> None:
        """Add a batch's results; wait until they are copied.

        Raises:
            NumericalError: they are not embeddings and scores, or not those of their images; the shard is not
                committed.
        """
        batch.wait()
        self._grow(int(batch.rows[-1]) + 1)
        where = f"shard {self._shard.index}, batch {self._batches}"
        check(batch, batch.rows, where)
        check_scores(batch.scores, where)
        self._batches += 1
        vectors = batch.vectors.numpy()
        self._vectors[batch.rows] = self._form.encode(vectors)
        if self._sample is not None:
            self._sample.add(vectors)
        self._top[batch.rows] = batch.top.numpy()
        self._scores[batch.rows] = batch.scores.numpy()
        batch.release()

    def add_texts(self, batch: PendingBatch) -> None:
        """Add embeddings of texts that stand beside images, as :meth:`add` does."""
        batch.wait()
        check(batch, batch.rows, f"shard {self._shard.index}, texts")
        if self._texts is None:
            self._texts = np.zeros_like(self._vectors)
        self._texts = _longer(self._texts, int(batch.rows.max()) + 1)
        self._texts[batch.rows] = self._form.encode(batch.vectors.numpy())
        batch.release()

    def finish(self, rows: ShardRows, texts: ShardTexts | None = None) -> ShardResult:
        """The whole shard; duplicate images get the results of the first of them, and so do ``texts`` beside them."""
        count = rows.shard.rows
        self._grow(count)
        self._vectors, self._top, self._scores = self._vectors[:count], self._top[:count], self._scores[:count]
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
            texts=None if texts is None else self._finish_texts(texts),
        )

    def _grow(self, rows: int) -> None:
        """Make room for ``rows`` rows: those of a tar are counted as they are read."""
        if rows > len(self._vectors):
            rows = max(rows, 2 * len(self._vectors))
            self._vectors, self._top = _longer(self._vectors, rows), _longer(self._top, rows)
            self._scores = _longer(self._scores, rows)

    def _finish_texts(self, texts: ShardTexts) -> TextVectors:
        vectors = np.zeros_like(self._vectors) if self._texts is None else self._texts
        vectors = _longer(vectors, len(self._vectors))[: len(self._vectors)]
        vectors[list(texts.repeats)] = vectors[list(texts.repeats.values())]
        missing = np.zeros(len(vectors), dtype=bool)
        missing[list(texts.missing)] = True
        return TextVectors(vectors, missing)


def _longer(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """The array with zeros behind it, up to ``rows`` rows."""
    if rows <= len(array):
        return array
    return np.concatenate([array, np.zeros((rows - len(array), array.shape[1]), dtype=array.dtype)])
