"""torchao, compiled: int8 weights, and int8 activations with a scale for every row where the hardware has them."""

from __future__ import annotations

import torch

from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.torch_ahead import Compilation, load_or_compile
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
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

# Turing, the first GPUs with int8 tensor cores.
INT8_CAPABILITY = (7, 5)


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    torchao = need_torchao()
    device, precision = choose(config)
    # Of all other operations. On the CPU converting to bf16 and back costs more than it saves.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dynamic = multiplies_int8(device)
    options = {"torchao": torchao, "activations": "int8 by row" if dynamic else str(dtype)}
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
    if device.type == "cpu":
        whole = Compilation(checkpoint, config, {"activations": options["activations"]}, pixels)
        forward, weight_bytes = load_or_compile(
            whole, lambda: _quantized(tower_on(checkpoint, device, dtype), dynamic=dynamic)
        )
    else:
        tower = tower_on(checkpoint, device, dtype)
        options |= {"attention": prove(kernels(tower, pixels), device, dtype), **TIMED}
        note_timed("backend=torch_int8")
        _quantized(tower, dynamic=dynamic)
        forward, weight_bytes = compiled(tower, mode="default", pixels=pixels), count_bytes(tower)
    info = EncoderInfo(
        "torch_int8",
        precision,
        device,
        batch_size,
        weight_bytes=weight_bytes,
        options=options,
        graph=device.type == "cuda" and config.cuda_graph,
    )
    return ModuleEncoder(forward, checkpoint, info, dtype=dtype)


def _quantized(tower: ImageTower, *, dynamic: bool) -> ImageTower:
    """The tower itself, with the layers of its transformer in int8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    scheme = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_layers(tower, "torch_int8", scheme)
    return tower


def multiplies_int8(device: torch.device) -> bool:
    """True if the hardware multiplies int8 by int8: VNNI or AMX on a CPU, tensor cores on a GPU.

    Without them int8 activations cost more than they save, and only the weights are quantized.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= INT8_CAPABILITY
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "i8mm"))
