"""An encoder for which the device's memory turned out to be too small, opened again for smaller batches."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.errors import BackendUnavailable

log = logging.getLogger(__name__)


class HalvingEncoder(ImageEncoder):
    """Takes batches of one size; where the device has no memory for one, encodes it in halves, quarters, ...

    Args:
        encoder: the opened backend; not used by anybody else, so that its memory can be given back.
        reopen: opens the same backend for another batch size.
        check: compares a reopened backend with fp32; raises ``ParityError`` if it is too far.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        reopen: Callable[[int], ImageEncoder],
        check: Callable[[ImageEncoder], None],
    ) -> None:
        self.name, self.precision, self.device = encoder.name, encoder.precision, encoder.device
        self.dim, self.batch_size = encoder.dim, encoder.batch_size
        self.weight_bytes, self.artifact = encoder.weight_bytes, encoder.artifact
        # What the dataset is said to be made with does not change with the memory of a machine.
        self._fingerprint = encoder.fingerprint
        self._inner: ImageEncoder | None = encoder
        self._reopen, self._check = reopen, check
        self.batch_sizes = [encoder.batch_size]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`.

        Raises:
            BackendUnavailable: the device has no memory for a single picture.
        """
        while True:
            try:
                return self._encode(pixels)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Not within the handler: what the exception holds would keep the memory.
            self._halve(reason)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        size = self.batch_sizes[-1]
        if self._inner is None:
            self._inner = self._reopen(size)
            self._check(self._inner)
        if size == len(pixels):
            return self._inner.encode(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            whole = part
            if len(part) < size:
                # The static shape, in the batch's own layout of memory.
                whole = torch.zeros_like(pixels[:size])
                whole[: len(part)] = part
            parts.append(self._inner.encode(whole)[: len(part)])
        return torch.cat(parts)

    def _halve(self, reason: str) -> None:
        size = self.batch_sizes[-1]
        if size == 1:
            raise BackendUnavailable(
                f"{self.device} has no memory to embed a single picture with backend={self.name} ({reason}); "
                "free the device, or take a smaller model or precision"
            )
        self.batch_sizes.append(-(-size // 2))
        log.warning(
            "%s has no memory for batches of %d pictures; going on with %d (%s)",
            self.device,
            size,
            self.batch_sizes[-1],
            reason,
        )
        self._inner = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def fingerprint(self) -> dict[str, str]:
        """See :attr:`ImageEncoder.fingerprint`."""
        return self._fingerprint
