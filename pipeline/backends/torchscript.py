"""TorchScript: the image tower, traced once and loaded from the artefact store."""

from __future__ import annotations

import torch

from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.artifacts.torchscript import FILE, TraceOptions, load, traced
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.torch_attention import preferred
from pipeline.backends.torch_module import ModuleEncoder, blank
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint

# Calls that TorchScript's executor profiles before it settles.
PROFILED = 2


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    artifact = traced(
        checkpoint,
        TraceOptions(precision, device),
        ArtifactStore(config.artifacts),
        sample=sample,
        limits=limits,
    )
    module = load(artifact.file(FILE), device)
    pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=DTYPES[precision])
    with torch.inference_mode(), preferred(device, DTYPES[precision]):
        # TorchScript watches the first calls and then compiles: from here on every batch runs in the same kernels.
        for _ in range(PROFILED + 1):
            module(pixels)
    info = EncoderInfo(
        "torchscript",
        precision,
        device,
        batch_size,
        weight_bytes=artifact.size,
        artifact=artifact,
        graph=device.type == "cuda" and config.cuda_graph,
    )
    return ModuleEncoder(module, checkpoint, info)
