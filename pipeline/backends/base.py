"""What every backend promises: uint8 pixels in, L2-normalised float32 embeddings out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from pipeline.config import BackendConfig
    from pipeline.models.checkpoint import Checkpoint


class ImageEncoder(ABC):
    """An opened image tower on one device, at one precision, for one static batch shape."""

    name: str
    precision: str
    device: torch.device
    dim: int
    batch_size: int

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed a batch.

        Args:
            pixels: uint8 ``[B, 3, H, W]``, RGB, on ``device``; scaled and normalised here.

        Returns:
            float32 ``[B, D]`` on ``device``, each row of length 1. Row i belongs to picture i, and does
            not depend on its neighbours at fp32.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What decides the numbers besides the model: runtime and version, precision, kind of device."""


class BackendFactory(Protocol):
    """How a backend is opened.

    Raises:
        BackendUnavailable: this machine cannot run it as asked.
    """

    def __call__(self, checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int) -> ImageEncoder:
        """Open the backend for batches of ``batch_size``."""
        ...
