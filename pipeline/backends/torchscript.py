"""TorchScript: the image tower, traced once and loaded from the artefact store."""

from __future__ import annotations

from pipeline.artifacts.store import ArtifactStore
from pipeline.artifacts.torchscript import FILE, load, traced
from pipeline.backends.base import Draw
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.modules import ModuleEncoder
from pipeline.config import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    artifact = traced(
        checkpoint,
        ArtifactStore(config.artifacts),
        precision=precision,
        dtype=DTYPES[precision],
        device=device,
        sample=sample,
        limits=limits,
    )
    return ModuleEncoder(
        load(artifact.file(FILE), device),
        checkpoint,
        name="torchscript",
        precision=precision,
        device=device,
        batch_size=batch_size,
        weight_bytes=artifact.size,
        options={"artifact": artifact.fingerprint},
        artifact=artifact,
    )
