"""torchao, compiled: float8 weights and activations with a scale for every row, on Hopper GPUs and newer."""

from __future__ import annotations

import copy

import torch

from pipeline.backends.artifacts.exports import need_packages
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.torch_module import ModuleEncoder, blank, compiled, count_bytes, in_a_layer
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

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
    need_packages("torchao", extra="int8")
    import torchao
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    tower = copy.deepcopy(ImageTower(checkpoint)).to(device=device, dtype=torch.bfloat16)
    quantize_(tower, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_layer)
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=torch.bfloat16)
    info = EncoderInfo(
        "torch_fp8",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options={"torchao": torchao.__version__, "activations": "fp8 by row"},
    )
    forward = compiled(tower, mode="max-autotune-no-cudagraphs", pixels=pixels)
    return ModuleEncoder(forward, checkpoint, info, dtype=torch.bfloat16)
