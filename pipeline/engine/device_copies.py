"""Copies of batches from pinned memory of the host to a GPU."""

from __future__ import annotations

import queue
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import DecoderUnavailable
from pipeline.engine.prefetch import POLL
from pipeline.images.pool.processes import Abandoned

# cudaHostRegisterPortable, of driver_types.h.
_PORTABLE = 1


class DeviceCopies:
    """``count`` buffers of ``shape`` on a GPU, filled from pinned memory on a stream of their own."""

    def __init__(self, shape: tuple[int, ...], count: int, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(count)]
        # The memory may be in use by work of the stream that allocated it.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._encoded: list[torch.cuda.Event | None] = [None] * count
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._free.put(number)
        self._pinned: list[NDArray[np.uint8]] = []

    def pin(self, memory: NDArray[np.uint8]) -> None:
        """Pin memory of this process, so that copies from it run beside other work.

        Raises:
            DecoderUnavailable: the driver refuses.
        """
        with torch.cuda.device(self._stream.device):
            # For every context of this process.
            code = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)
        if int(code) != 0:
            raise DecoderUnavailable(
                f"{memory.nbytes:,} bytes of batch buffers cannot be pinned (CUDA error {int(code)}): raise the limit "
                "of locked memory (ulimit -l), lower loader.batch_size or loader.feeders, or take loader.feeders=0"
            )
        self._pinned.append(memory)

    def copy(self, pixels: torch.Tensor, stopped: threading.Event) -> tuple[int, torch.Tensor]:
        """Copy a batch from pinned memory, and wait for the copy alone; its buffer and the pixels on the device.

        Raises:
            Abandoned: ``stopped`` was set first.
        """
        while True:
            try:
                number = self._free.get(timeout=POLL)
                break
            except queue.Empty:
                if stopped.is_set():
                    raise Abandoned from None
        encoded, copied = self._encoded[number], torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            if encoded is not None:
                self._stream.wait_event(encoded)
            self._buffers[number].copy_(pixels, non_blocking=True)
            copied.record(self._stream)
        copied.synchronize()
        return number, self._buffers[number]

    def release(self, number: int) -> None:
        """Use a buffer again behind all that the current stream has been given."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._buffers[number].device))
        self._encoded[number] = event
        self._free.put(number)

    def close(self) -> None:
        """Wait for the copies, and release the pinned memory."""
        self._stream.synchronize()
        for memory in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
