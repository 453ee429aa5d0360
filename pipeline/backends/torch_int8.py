"""torchao, compiled: int8 weights, and int8 activations with a scale for every row where the hardware has them."""

from __future__ import annotations

import copy

import torch

from pipeline.backends.artifacts.exports import need_packages
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.torch_module import ModuleEncoder, blank, compiled, count_bytes, in_a_layer
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

# Turing, the first GPUs with int8 tensor cores.
INT8_CAPABILITY = (7, 5)


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    need_packages("torchao", extra="int8")
    import torchao
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    device, precision = choose(config)
    # Of all other operations. On the CPU converting to bf16 and back costs more than it saves.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dynamic = multiplies_int8(device)
    tower = copy.deepcopy(ImageTower(checkpoint)).to(device=device, dtype=dtype)
    scheme = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(tower, scheme, filter_fn=in_a_layer)
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
    info = EncoderInfo(
        "torch_int8",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options={"torchao": torchao.__version__, "activations": "int8 by row" if dynamic else str(dtype)},
    )
    return ModuleEncoder(compiled(tower, mode="default", pixels=pixels), checkpoint, info, dtype=dtype)


def multiplies_int8(device: torch.device) -> bool:
    """True if the hardware multiplies int8 by int8: VNNI or AMX on a CPU, tensor cores on a GPU.

    Without them int8 activations cost more than they save, and only the weights are quantized.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= INT8_CAPABILITY
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "i8mm"))
