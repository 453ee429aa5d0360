"""ONNX Runtime on the CPU in fp32, on CUDA in fp32 and fp16."""

from __future__ import annotations

from pipeline.backends.artifacts.exports import GraphOptions, onnx_graph
from pipeline.backends.artifacts.onnx_export import GRAPH
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.onnx_session import Provider, SessionEncoder
from pipeline.config.schema import BackendConfig, ParityConfig
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
    # By default ONNX Runtime computes fp32 on CUDA in TF32, which is not fp32.
    exact = {"use_tf32": "0"} if device.type == "cuda" and precision == "fp32" else {}
    info = EncoderInfo("onnx", precision, device, batch_size, weight_bytes=artifact.size, artifact=artifact)
    return SessionEncoder(artifact.file(GRAPH), checkpoint, info, Provider(device.type, exact))
