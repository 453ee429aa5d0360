"""ONNX Runtime in int8 on the CPU: activations scaled batch by batch, or by fixed scales from images of the job."""

from __future__ import annotations

from pipeline.backends.artifacts.exports import GraphOptions, onnx_graph
from pipeline.backends.artifacts.onnx_export import GRAPH
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.onnx_session import Provider, SessionEncoder
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> SessionEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    if device.type != "cpu":
        raise BackendUnavailable(
            "backend=onnx_int8 runs on the CPU alone, since ONNX Runtime has no int8 products for CUDA: take "
            "backend=torch_int8, backend=onnx backend.precision=fp16, or backend.device=cpu"
        )
    artifact = onnx_graph(
        checkpoint,
        GraphOptions(precision=precision, quantization=config.quantization),
        ArtifactStore(config.artifacts),
        sample=sample,
        limits=limits,
    )
    info = EncoderInfo(
        "onnx_int8",
        precision,
        device,
        batch_size,
        weight_bytes=artifact.size,
        artifact=artifact,
        options={"quantization": config.quantization},
    )
    return SessionEncoder(artifact.file(GRAPH), checkpoint, info, Provider(device.type))
