"""An encoder for which the device's memory turned out to be too small, opened again for smaller batches."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.backends.devices import out_of_memory
from pipeline.core.errors import BackendUnavailable

_T = TypeVar("_T")
log = logging.getLogger(__name__)


class HalvingEncoder(ImageEncoder):
    """Takes batches of one size; where the device has no memory for one, encodes it in halves, quarters, ...

    Args:
        reopen: opens the backend for a batch size; the encoder is not used elsewhere, so that its memory can be freed.
        check: compares a backend that was opened again with fp32; raises ``ParityError`` if it is too far.
        batch_size: of the batches that come.

    Raises:
        BackendUnavailable: the device has no memory for a single picture, or smaller batches would change the numbers.
    """

    def __init__(
        self, reopen: Callable[[int], ImageEncoder], check: Callable[[ImageEncoder], None], *, batch_size: int
    ) -> None:
        self._reopen, self._check = reopen, check
        self.batch_size, self.batch_sizes = batch_size, [batch_size]
        self._lock = threading.RLock()
        self._inner: ImageEncoder | None = None
        while self._inner is None:
            self._try(self._open_first, self.batch_sizes[-1])
        encoder = self._inner
        self.name, self.precision, self.device = encoder.name, encoder.precision, encoder.device
        self.dim, self.weight_bytes, self.artifact = encoder.dim, encoder.weight_bytes, encoder.artifact
        self.streams, self.graph, self.flexible = encoder.streams, encoder.graph, encoder.flexible
        # The fingerprint of the dataset does not depend on the memory of a machine.
        self._fingerprint: dict[str, str] = encoder.fingerprint
        if self.batch_sizes != [batch_size]:
            self._refuse_other_numbers()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`."""
        vectors = None
        while vectors is None:
            size = self.batch_sizes[-1]
            vectors = self._try(partial(self._encode, pixels, size), size)
        return vectors

    def _try(self, work: Callable[[], _T], size: int) -> _T | None:
        """Result of ``work``; None if the memory was too small for ``size``, and the batch is now half of that."""
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Not within the handler: what the exception holds would keep the memory.
        self._halve(reason, size)
        return None

    def _open_first(self) -> None:
        self._inner = self._reopen(self.batch_sizes[-1])

    def _refuse_other_numbers(self) -> None:
        if self.name == "onnx_int8" and self._fingerprint.get("quantization") == "dynamic":
            raise BackendUnavailable(
                f"the device has no memory for batches of {self.batch_size} pictures, and with "
                "backend.quantization=dynamic smaller ones would give other numbers: lower loader.batch_size in a new "
                "output.dir, or take backend.quantization=static"
            )

    def _encode(self, pixels: torch.Tensor, size: int) -> torch.Tensor | None:
        with self._lock:
            if size != self.batch_sizes[-1]:
                return None
            if self._inner is None:
                self._refuse_other_numbers()
                inner = self._reopen(size)
                # Not used by other threads before it has passed.
                self._check(inner)
                self._inner = inner
            inner = self._inner
        if size == len(pixels):
            return inner.encode(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            whole = part
            if len(part) < size:
                # The static shape, in the batch's own layout of memory.
                whole = torch.zeros_like(pixels[:size])
                whole[: len(part)] = part
            parts.append(inner.encode(whole)[: len(part)])
        return torch.cat(parts)

    def _halve(self, reason: str, size: int) -> None:
        with self._lock:
            # Of several batches at a time, only the first that finds no memory halves the size.
            if size == self.batch_sizes[-1]:
                self._free(reason, size)

    def _free(self, reason: str, size: int) -> None:
        if size == 1:
            raise BackendUnavailable(
                f"the device has no memory to embed a single picture ({reason}); free it, or take a smaller model or "
                "precision"
            )
        self.batch_sizes.append(-(-size // 2))
        log.warning(
            "the device has no memory for batches of %d pictures; going on with %d (%s)",
            size,
            self.batch_sizes[-1],
            reason,
        )
        self._inner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def fingerprint(self) -> dict[str, str]:
        """See :attr:`ImageEncoder.fingerprint`."""
        return self._fingerprint
