"""The interface of every backend: uint8 pixels in, L2-normalised float32 embeddings out.

A backend is a module with a function ``open_encoder`` and a row of :data:`pipeline.config.choices.BACKENDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from pipeline.backends.artifacts.store import Artifact
    from pipeline.config.schema import BackendConfig, ParityConfig
    from pipeline.core.records import Sample
    from pipeline.models.checkpoint import Checkpoint


# Draws pictures of the job when they are needed, the same ones every time.
Draw: TypeAlias = "Callable[[], Sample]"


class ImageEncoder(ABC):
    """An opened image tower on one device, at one precision, for one static batch shape.

    ``weight_bytes`` is the size of the weights as the runtime takes them: in memory, or of the exported file.
    ``artifact`` is what it was loaded from, or None for a runtime that takes the checkpoint itself.
    ``streams`` is how many batches may be encoded side by side, see :mod:`pipeline.backends.streams`.
    ``graph`` is True if a batch is one CUDA graph, and False if its operations are launched one by one.
    ``flexible`` is True if smaller batches are encoded too, by the same operations, in less time.
    """

    name: str
    precision: str
    device: torch.device
    dim: int
    batch_size: int
    weight_bytes: int = 0
    artifact: Artifact | None = None
    streams: int = 1
    graph: bool = False
    flexible: bool = False

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed a batch; on a CPU safe to call from many threads.

        Args:
            pixels: uint8 ``[B, 3, H, W]``, RGB, on ``device``; scaled and normalised here.

        Returns:
            float32 ``[B, D]`` on ``device``, each row of length 1. Row i belongs to picture i, and does
            not depend on its neighbours, unless activations are scaled batch by batch (``onnx_int8``, dynamic).
        """

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Facts that decide the numbers besides the model: runtime and version, precision, kind of device."""


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Facts of an opened encoder; see :class:`ImageEncoder` for the fields that both have.

    ``options`` are the entries of the fingerprint besides the name, precision, device, runtime and artefact.
    """

    name: str
    precision: str
    device: torch.device
    batch_size: int
    weight_bytes: int
    artifact: Artifact | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    graph: bool = False


class RuntimeEncoder(ImageEncoder):
    """An encoder of one runtime, such as ``torch 2.9``, with the facts of ``info``."""

    def __init__(self, checkpoint: Checkpoint, info: EncoderInfo, runtime: str) -> None:
        self.name, self.precision, self.device = info.name, info.precision, info.device
        self.dim, self.batch_size = checkpoint.dim, info.batch_size
        self.weight_bytes, self.artifact = info.weight_bytes, info.artifact
        self.graph = info.graph
        self._runtime, self._options = runtime, info.options

    @property
    def fingerprint(self) -> dict[str, str]:
        """See :attr:`ImageEncoder.fingerprint`."""
        return {
            "name": self.name,
            "precision": self.precision,
            "device": self.device.type,
            "runtime": self._runtime,
            **({} if self.artifact is None else {"artifact": self.artifact.fingerprint}),
            **self._options,
        }


class BackendFactory(Protocol):
    """The function that opens a backend."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        config: BackendConfig,
        *,
        batch_size: int,
        sample: Draw,
        limits: ParityConfig,
    ) -> ImageEncoder:
        """Open the backend for batches of ``batch_size``; the checkpoint stays as it is.

        Device, precision and packages are checked before the checkpoint is read, since the doctor opens a backend
        only so far.

        A model that is exported now is calibrated on ``sample()`` where it must be, and then compared with fp32
        on it; ``limits`` says how near it must come.

        Raises:
            BackendUnavailable: this machine cannot run it as asked.
            ArtifactError: the export failed.
            ParityError: the export is too far from fp32.
        """
        ...


def factory(name: str) -> BackendFactory:
    """The function ``open_encoder`` of the backend ``name``, whose module is imported only now."""
    opener: BackendFactory = import_module(f"pipeline.backends.{name}").open_encoder
    return opener
