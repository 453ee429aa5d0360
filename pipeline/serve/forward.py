"""Batches of the service: padded, embedded, checked and labelled as those of a job."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends.base import ImageEncoder
from pipeline.core.records import Embeddings
from pipeline.engine.buffers import Slot, new_slot
from pipeline.engine.forward import PROVED_SHARDS, Labelling, check, encode, memory_explained
from pipeline.models.labels import label
from pipeline.models.numbers import check_scores


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded picture, uint8 ``[H, W, 3]``, and how it is labelled, if it is."""

    rgb: NDArray[np.uint8]
    labelling: Labelling | None


@dataclass(frozen=True, slots=True)
class Row:
    """What comes of a picture: its embedding, float32 ``[D]``, and its best labels, int64 and float32 ``[k]``."""

    vector: NDArray[np.float32]
    top: NDArray[np.int64]
    scores: NDArray[np.float32]


NO_LABELS = (np.zeros(0, np.int64), np.zeros(0, np.float32))


class Forward:
    """Embeds batches at the shapes of its encoders; each thread that calls it has buffers of its own.

    Args:
        encoders: of different batch sizes; a batch takes the smallest that holds it.
        size: height and width of the pictures.
        timer: called with the seconds of ``encode`` and ``label``.
    """

    def __init__(
        self, encoders: Sequence[ImageEncoder], size: tuple[int, int], timer: Callable[[str, float], None]
    ) -> None:
        self._encoders = sorted(encoders, key=lambda encoder: encoder.batch_size)
        self._size, self._timer = size, timer
        self._number = itertools.count()
        self._slots = threading.local()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture]) -> list[Row]:
        """A row for each picture, in their order.

        Labels are scored at the whole batch's shape, as those of a job's full batches are.

        Raises:
            NumericalError: the encoder returned something that is not an embedding, or not those of the pictures.
            BackendUnavailable: the device has no memory for the batch.
        """
        encoder = next(each for each in self._encoders if each.batch_size >= len(pictures))
        started = time.perf_counter()
        encoded = self._encode(pictures, encoder)
        vectors = encoded[: len(pictures)].cpu().numpy()
        self._timer("encode", time.perf_counter() - started)
        labels = list(itertools.repeat(NO_LABELS, len(pictures)))
        # Requests that bring the same labels have the same object.
        groups: dict[int, list[int]] = {}
        for place, picture in enumerate(pictures):
            if picture.labelling is not None:
                groups.setdefault(id(picture.labelling.bank), []).append(place)
        started = time.perf_counter()
        for places in groups.values():
            wanted = {place: picture.labelling for place, picture in enumerate(pictures) if place in places}
            self._label(encoded, wanted, labels)
        if groups:
            self._timer("label", time.perf_counter() - started)
        return [Row(vector, *found) for vector, found in zip(vectors, labels, strict=True)]

    def _encode(self, pictures: Sequence[Picture], encoder: ImageEncoder) -> torch.Tensor:
        """Embed the pictures, as a job does with a batch; of full batches one in ``PROVED_SHARDS`` is encoded twice."""
        count, size = len(pictures), encoder.batch_size
        slot = self._slot(encoder)
        for place, picture in enumerate(pictures):
            slot.pixels[place] = picture.rgb
        stream = torch.cuda.current_stream(encoder.device) if encoder.device.type == "cuda" else None
        with memory_explained(size):
            slot.fill(count, stream)
        # The memory stays [B, H, W, 3], as the loader's does.
        pixels = slot.device.permute(0, 3, 1, 2)
        twice = count == size and next(self._number) % PROVED_SHARDS == 0
        encoded = encode(encoder, pixels, count, twice=twice)
        check(encoded, range(count), encoder.name)
        # Labels are scored at the whole shape.
        return encoded.whole

    def _label(
        self,
        encoded: torch.Tensor,
        wanted: dict[int, Labelling | None],
        labels: list[tuple[NDArray[np.int64], NDArray[np.float32]]],
    ) -> None:
        """Score once against one bank; the best few are the first of the best many."""
        labellings = [each for each in wanted.values() if each is not None]
        first, most = labellings[0], max(each.top_k for each in labellings)
        found = label(Embeddings(encoded), first.bank, first.features, top_k=most)
        # Rows of padding are copies of others.
        top, scores = found.indices.cpu().numpy(), found.scores.cpu().numpy()
        check_scores(scores, "labels")
        for place, each in wanted.items():
            if each is not None:
                labels[place] = (top[place, : each.top_k], scores[place, : each.top_k])

    def _slot(self, encoder: ImageEncoder) -> Slot:
        slots: dict[int, Slot] = self._slots.__dict__.setdefault("by_size", {})
        if encoder.batch_size not in slots:
            slots[encoder.batch_size] = new_slot((encoder.batch_size, *self._size, 3), encoder.device)
        return slots[encoder.batch_size]
