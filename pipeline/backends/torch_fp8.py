"""torchao, compiled: float8 weights and activations with a scale for every row, on Hopper GPUs and newer."""

from __future__ import annotations

import torch

from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.torch_attention import kernels, prove
from pipeline.backends.torch_module import (
    TIMED,
    ModuleEncoder,
    blank,
    compiled,
    count_bytes,
    need_torchao,
    note_timed,
    quantize_layers,
    tower_on,
)
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint

HOPPER = (9, 0)


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`.

    The patch embedding, a convolution, stays in bf16, as does all that is not a linear layer of the transformer.
    """
    device, precision = choose(config)
    if device.type != "cuda":
        raise BackendUnavailable(
            f"backend=torch_fp8 needs an NVIDIA GPU of Hopper's generation or newer, and the device is {device.type}: "
            "take backend=torch_int8 or onnx_int8"
        )
    if torch.cuda.get_device_capability(device) < HOPPER:
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)} has no float8 products as Hopper has them (compute capability 9.0): "
            "take backend=torch backend.precision=bf16, or backend=torch_int8"
        )
    torchao = need_torchao()
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    dtype = torch.bfloat16
    tower = tower_on(checkpoint, device, dtype)
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
    attention = prove(kernels(tower, pixels), device, dtype)
    quantize_layers(tower, "torch_fp8", Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    info = EncoderInfo(
        "torch_fp8",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options={"torchao": torchao, "activations": "fp8 by row", "attention": attention, **TIMED},
        graph=config.cuda_graph,
    )
    note_timed("backend=torch_fp8")
    forward = compiled(tower, mode="max-autotune-no-cudagraphs", pixels=pixels)
    return ModuleEncoder(forward, checkpoint, info, dtype=dtype)
