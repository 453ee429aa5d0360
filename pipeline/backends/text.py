"""The text tower of a job: PyTorch, eager, beside every backend of the image tower.

Exports and quantized backends hold the image tower alone. Their texts are embedded by the checkpoint's own text tower:
in ``backend.precision`` where that is fp32, bf16 or fp16, and for int8 and fp8 in fp32 on a CPU and bf16 on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.backends.base import EncoderInfo, ImageEncoder, RuntimeEncoder
from pipeline.backends.compare import compare, hold
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.torch_attention import preferred
from pipeline.backends.torch_module import copied, count_bytes
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.records import Parity
from pipeline.models.checkpoint import Checkpoint


class TextEncoder(RuntimeEncoder):
    """Token ids and attention mask, int64 ``[B, 2, T]``, in place of pixels; else as an encoder of images."""

    def __init__(self, checkpoint: Checkpoint, info: EncoderInfo) -> None:
        super().__init__(checkpoint, info, f"torch {torch.__version__}")
        tower, self._dtype = checkpoint.texts()[0], DTYPES[info.precision]
        shared = info.device.type == "cpu" and info.precision == "fp32"
        self._tower = tower if shared else copied(tower, info.device, self._dtype)
        self.weight_bytes, self.flexible = count_bytes(self._tower), True

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed a batch of tokens; see :meth:`pipeline.backends.base.ImageEncoder.encode`."""
        with preferred(self.device, self._dtype):
            vectors: torch.Tensor = self._tower(pixels[:, 0], None if self._tower.causal else pixels[:, 1])
        return vectors


def open_text_encoder(checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int) -> TextEncoder:
    """Open the text tower on the device of the backend.

    Raises:
        ModelError: the model has none.
        BackendUnavailable: this machine has not the device, or not the precision.
    """
    device, precision = choose(config)
    if precision not in DTYPES:
        precision = "bf16" if device.type == "cuda" else "fp32"
    return TextEncoder(checkpoint, EncoderInfo("text tower", precision, device, batch_size, weight_bytes=0))


def pass_text_gate(
    encoder: ImageEncoder, checkpoint: Checkpoint, tokens: torch.Tensor, texts: Sequence[str], limits: ParityConfig
) -> Parity | None:
    """Compare the text tower with fp32 on some texts of the job; None without texts.

    Args:
        encoder: the job's, in another precision.
        checkpoint: its model.
        tokens: of ``texts``, int64 ``[N, 2, T]`` on the CPU.
        texts: to name the worst.
        limits: the lowest values that pass.

    Raises:
        ParityError: a figure misses its limit.
    """
    if not texts:
        return None
    exact = open_text_encoder(checkpoint, BackendConfig(precision="fp32", device=str(encoder.device)), batch_size=1)
    wanted, found = (each.encode(tokens.to(encoder.device)) for each in (exact, encoder))
    names = [text[:80] for text in texts]
    parity = replace(compare(found, wanted, ids=names, bank=None), images=len(texts))
    hold(parity, limits, precision=encoder.precision, what=f"the text tower of {checkpoint.name}")
    return parity
