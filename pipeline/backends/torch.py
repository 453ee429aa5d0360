"""PyTorch, eager or compiled: fp32, bf16 and fp16."""

from __future__ import annotations

import torch

from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.torch_ahead import Compilation, load_or_compile
from pipeline.backends.torch_attention import kernels, prove
from pipeline.backends.torch_module import (
    TIMED,
    Forward,
    ModuleEncoder,
    blank,
    compiled,
    count_bytes,
    note_timed,
    tower_on,
)
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint

# Modes of torch.compile on CUDA without the graphs that torch captures itself: those cannot be used in another thread
# than the main one (pytorch#123177, mended in torch 2.13), and the encoder captures one anyway.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    dtype, cuda = DTYPES[precision], device.type == "cuda"
    whole = device.type == "cpu" and precision == "fp32"
    tower = checkpoint.image if whole else tower_on(checkpoint, device, dtype)
    options = {} if config.compile == "none" else {"compile": config.compile}
    if cuda and precision != "fp32":
        pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
        options["attention"] = prove(kernels(tower, pixels), device, dtype)
    forward: Forward = tower
    if config.compile != "none":
        pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
        if config.compile == "default" and not cuda:
            decides = {"compile": config.compile, "precision": precision}
            forward, _ = load_or_compile(Compilation(checkpoint, config, decides, pixels), lambda: tower)
        else:
            mode = WITHOUT_GRAPHS.get(config.compile, config.compile) if cuda else config.compile
            forward = compiled(tower, mode=mode, pixels=pixels)
        if cuda and config.compile == "max-autotune":
            options |= TIMED
            note_timed("backend.compile=max-autotune")
    info = EncoderInfo(
        "torch",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options=options,
        graph=cuda and config.cuda_graph,
    )
    encoder = ModuleEncoder(forward, checkpoint, info)
    # A compiled or captured forward has one shape.
    encoder.flexible = config.compile == "none" and not info.graph
    return encoder


def reference(checkpoint: Checkpoint, device: torch.device, *, batch_size: int, sample: Draw) -> ModuleEncoder:
    """Eager fp32 on ``device``: what every other backend is compared with."""
    # It embeds a few batches only, for which a graph is not worth its capture.
    config = BackendConfig(precision="fp32", device=str(device), cuda_graph=False)
    return open_encoder(checkpoint, config, batch_size=batch_size, sample=sample, limits=ParityConfig())
