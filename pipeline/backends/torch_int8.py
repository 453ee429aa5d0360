"""torchao, compiled: int8 weights, and int8 activations with a scale for every row where the hardware has them."""

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
    in_a_layer,
    need_torchao,
    note_timed,
    tower_on,
)
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint

# Turing, the first GPUs with int8 tensor cores.
INT8_CAPABILITY = (7, 5)


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    torchao = need_torchao()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    device, precision = choose(config)
    # Of all other operations. On the CPU converting to bf16 and back costs more than it saves.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dynamic = multiplies_int8(device)
    tower = tower_on(checkpoint.image, device, dtype)
    options = {"torchao": torchao, "activations": "int8 by row" if dynamic else str(dtype)}
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
    if device.type == "cuda":
        options |= {"attention": prove(kernels(tower, pixels), device, dtype), **TIMED}
        note_timed("backend=torch_int8")
    scheme = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(tower, scheme, filter_fn=in_a_layer)
    info = EncoderInfo(
        "torch_int8",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options=options,
        graph=device.type == "cuda" and config.cuda_graph,
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
