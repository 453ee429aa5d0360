"""The forward on CUDA: every result has the static shape of a batch, and nothing waits for the device.

Pixels to embeddings is one CUDA graph of the encoder (:mod:`pipeline.backends.torch_graph`), embeddings to lengths and
labels another one behind it. So labels are captured for every runtime, and an encoder that was opened again for
smaller batches needs no other labels. The order of the rows is proved outside of them: the few batches for which that
is done all have another number of images.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.torch_graph import Capture, Replay, Tensors
from pipeline.core.records import ImageBatch
from pipeline.engine.forward import Forward, Labelling, PendingBatch, memory_explained, scored


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """Memory on the host for the results of one batch, and the event behind their copies; None on a CPU."""

    tensors: Tensors
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait for the copies."""
        if self.copied is not None:
            self.copied.synchronize()


class HostBuffers:
    """Buffers for the results of batches on the host, pinned for a GPU, each used again once it was given back.

    There are as many as there are batches on the way at a time.
    """

    def __init__(self) -> None:
        self._free: deque[HostBuffer] = deque()
        self.made = 0

    def copy(self, results: Tensors) -> HostBuffer:
        """Queue copies of tensors, whose shapes and types are always the same, into a free buffer."""
        buffer = self._free.popleft() if self._free else self._make(results)
        for host, result in zip(buffer.tensors, results, strict=True):
            host.copy_(result, non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record(torch.cuda.current_stream(results[0].device))
        return buffer

    def give_back(self, buffer: HostBuffer) -> None:
        """Take a buffer back, from which nothing is read any more."""
        self._free.append(buffer)

    def _make(self, results: Tensors) -> HostBuffer:
        self.made += 1
        cuda = results[0].is_cuda
        tensors = tuple(torch.empty(result.shape, dtype=result.dtype, pin_memory=cuda) for result in results)
        # Without blocking, a thread that waits keeps a core busy.
        return HostBuffer(tensors, torch.cuda.Event(blocking=True) if cuda else None)


class StaticForward(Forward):
    """Embeddings and labels of batches by an encoder on CUDA; see :class:`~pipeline.engine.forward.Forward`.

    Args:
        encoder: the opened backend; with its own graph, lengths and labels are a graph too.
        labelling: None where rows get no labels.
        capture: see :class:`~pipeline.backends.torch_graph.Replay`.

    Raises:
        BackendUnavailable: the labels cannot be captured.
        NumericalError: the captured labels are others.
    """

    def __init__(self, encoder: ImageEncoder, labelling: Labelling | None, capture: Capture | None = None) -> None:
        super().__init__(encoder, labelling)
        self._score = partial(scored, labelling=labelling)
        self._replay = Replay(self._score, (_unit_noise(encoder),), capture) if encoder.graph else None
        self.host = HostBuffers()

    @torch.inference_mode()
    def _results(self, batch: ImageBatch, whole: torch.Tensor, proved: torch.Tensor) -> PendingBatch:
        lengths, top, scores = (self._replay or self._score)(whole)
        buffer = self.host.copy((whole, lengths, proved, top, scores))
        count = len(batch.rows)
        whole, lengths, proved, top, scores = buffer.tensors
        return PendingBatch(
            rows=batch.rows,
            vectors=whole[:count],
            lengths=lengths[:count],
            in_order=proved,
            top=top[:count],
            scores=scores[:count],
            wait=buffer.wait,
            release=partial(self.host.give_back, buffer),
        )


def open_forward(encoder: ImageEncoder, labelling: Labelling | None) -> Forward:
    """The forward for the encoder's device.

    Raises:
        BackendUnavailable: the labels cannot be captured, or the device has no memory for it.
        NumericalError: the captured labels are others.
    """
    if encoder.device.type != "cuda":
        return Forward(encoder, labelling)
    with memory_explained(encoder.batch_size):
        return StaticForward(encoder, labelling)


def _unit_noise(encoder: ImageEncoder) -> torch.Tensor:
    dice = torch.Generator(encoder.device).manual_seed(0)
    noise = torch.randn(encoder.batch_size, encoder.dim, device=encoder.device, generator=dice)
    return torch.nn.functional.normalize(noise, dim=1)
