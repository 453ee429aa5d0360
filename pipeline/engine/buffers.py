"""The buffers that batches lie in: on the host, and on the device."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.padding import repeated

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Slot:
    """A reused buffer, uint8 ``[B, H, W, 3]``: on the host (pinned for CUDA), and its twin on the device.

    ``pixels`` is the same memory as ``host``.
    """

    host: torch.Tensor
    pixels: NDArray[np.uint8]
    device: torch.Tensor
    copied: torch.cuda.Event | None = None
    encoded: torch.cuda.Event | None = None

    def batch(self) -> torch.Tensor:
        """The pixels as encoders take them: a view ``[B, 3, H, W]`` of the memory on the device."""
        return self.device.permute(0, 3, 1, 2)

    def mark_encoded(self) -> None:
        """Let the next copy wait for all that the current stream has been given."""
        import torch

        self.encoded = torch.cuda.Event()
        self.encoded.record(torch.cuda.current_stream(self.device.device))

    def fill(self, count: int, stream: torch.cuda.Stream | None) -> None:
        """Fill the free places behind ``count`` pictures with some of them, and bring all to the device.

        On CUDA the copy is queued on ``stream``, behind the last batch that was encoded from this buffer.
        """
        import torch

        self.pixels[count:] = self.pixels[repeated(count, len(self.pixels))]
        if stream is None:
            return
        with torch.cuda.stream(stream):
            if self.encoded is not None:
                stream.wait_event(self.encoded)
            self.device.copy_(self.host, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(stream)


@dataclass(slots=True)
class SharedSlot:
    """A reused buffer, uint8 ``[B, H, W, 3]``, in memory that the process of the encoder has, too."""

    pixels: NDArray[np.uint8]
    copied: None = None

    def fill(self, count: int, stream: None) -> None:
        """Fill the free places behind ``count`` pictures with some of them."""
        self.pixels[count:] = self.pixels[repeated(count, len(self.pixels))]

    def batch(self) -> NDArray[np.uint8]:
        """The pixels where they lie."""
        return self.pixels


def copy_stream(device: torch.device | None) -> torch.cuda.Stream | None:
    """The stream for copies to the buffers on a GPU, which are there already; None for another device."""
    if device is None or device.type != "cuda":
        return None
    import torch

    stream = torch.cuda.Stream(device)
    # Their memory may be in use by work of the stream that allocated it.
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def new_slot(shape: tuple[int, ...], device: torch.device | None) -> Slot:
    """A buffer of ``shape``; without CUDA, both sides are one."""
    import torch

    if device is None or device.type != "cuda":
        # As a mapping of its own it begins at a page, like what is copied into it: copies whose source and destination
        # lie a few bytes apart within a page take twice as long on some processors (sourceware.org bug 30994).
        host = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).reshape(shape)
        return Slot(host=host, pixels=host.numpy(), device=host)
    host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
    # Left empty: zeroing would run on another stream than the first copy, and might come after it.
    return Slot(host=host, pixels=host.numpy(), device=torch.empty(shape, dtype=torch.uint8, device=device))
