"""ONNX Runtime on the CPU in fp32, on CUDA in fp32 and fp16."""

from __future__ import annotations

from pipeline.artifacts.exports import GraphOptions, onnx_graph
from pipeline.artifacts.store import ArtifactStore
from pipeline.backends.base import Draw
from pipeline.backends.devices import choose
from pipeline.backends.sessions import SessionEncoder, graph_of, open_session
from pipeline.config import BackendConfig, ParityConfig
from pipeline.models.checkpoint import Checkpoint


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> SessionEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    artifact = onnx_graph(
        checkpoint,
        GraphOptions(precision=precision),
        ArtifactStore(config.artifacts),
        sample=sample,
        limits=limits,
    )
    session = open_session(graph_of(artifact), provider=device.type, device=device, batch_size=batch_size)
    return SessionEncoder(
        session,
        checkpoint,
        name="onnx",
        precision=precision,
        device=device,
        batch_size=batch_size,
        artifact=artifact,
    )
