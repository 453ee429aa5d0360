"""PyTorch, eager: fp32, bf16 and fp16."""

from __future__ import annotations

import torch

from pipeline.backends.base import ImageEncoder
from pipeline.config import BackendConfig
from pipeline.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEncoder(ImageEncoder):
    """The checkpoint's own image tower; weights and activations are held at the precision."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, *, precision: str, device: torch.device, batch_size: int) -> None:
        self.precision = precision
        self.device = device
        self.dim = checkpoint.dim
        self.batch_size = batch_size
        self._dtype = DTYPES[precision]
        self._checkpoint = checkpoint
        if precision == "fp32" and device.type == "cuda":
            # fp32 is what every other backend is compared with: no TF32 in the patch embedding's convolution.
            torch.backends.cudnn.allow_tf32 = False
        # In place: nobody else may use the checkpoint's image tower afterwards.
        checkpoint.model.to(device=device, dtype=self._dtype)
        spec = checkpoint.spec
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`."""
        features = self._checkpoint.image_features(self.normalise(pixels).to(self._dtype))
        return torch.nn.functional.normalize(features.float(), dim=1)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(pixels / 255 - mean) / std`` in float32, in the reference's order of operations."""
        return (pixels.float() / 255 - self._mean) / self._std

    @property
    def fingerprint(self) -> dict[str, str]:
        """See :attr:`ImageEncoder.fingerprint`."""
        return {
            "name": self.name,
            "precision": self.precision,
            "device": self.device.type,
            "runtime": f"torch {torch.__version__}",
        }


def open_encoder(checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int) -> TorchEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device = choose_device(config.device)
    if device.type == "cuda":
        # Pinned memory, streams and memory figures belong to the current device.
        torch.cuda.set_device(device)
    precision = choose_precision(config.precision, device)
    return TorchEncoder(checkpoint, precision=precision, device=device, batch_size=batch_size)


def choose_device(name: str) -> torch.device:
    """The device that was asked for, proved to be there; ``auto`` is CUDA where there is one.

    Raises:
        BackendUnavailable: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = f"torch {torch.__version__}"
            why = (
                "was built without CUDA; install a CUDA build"
                if torch.version.cuda is None
                else "sees no GPU or driver"
            )
            raise BackendUnavailable(f"backend.device={name}: {build} {why}; or take backend.device=cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendUnavailable(
                f"backend.device={name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0"
            )
        return torch.device("cuda", device.index or 0)
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision that was asked for; ``auto`` is fp32 on the CPU, bf16 or else fp16 on CUDA.

    Raises:
        BackendUnavailable: fp16 was asked for on the CPU, where it is slower than fp32.
    """
    if name == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type != "cuda":
        raise BackendUnavailable(
            f"backend.precision=fp16 needs CUDA, and the device is {device.type}: there fp16 is slower than fp32; "
            "take bf16 or fp32"
        )
    return name
