"""TensorRT through ONNX Runtime: fp16 with norms in fp32, one shape, the engine built once and kept."""

from __future__ import annotations

import ctypes

import torch

from pipeline.backends.artifacts.exports import GraphOptions, graph_recipe, need_packages, onnx_graph
from pipeline.backends.artifacts.onnx_export import GRAPH, INPUTS
from pipeline.backends.artifacts.store import Artifact, ArtifactStore
from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import choose
from pipeline.backends.onnx_session import Provider, SessionEncoder
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint

# ONNX Runtime 1.27 and newer link this one; TensorRT 11 brings another.
LIBRARY = "libnvinfer.so.10"
ENGINES = "engines"


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> SessionEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    if device.type != "cuda":
        raise BackendUnavailable(
            f"backend=tensorrt needs an NVIDIA GPU, and the device is {device.type}: take backend=onnx or onnx_int8"
        )
    need_packages()
    library, gpu = find_library(), torch.cuda.get_device_name(device)
    # Standard operators alone: TensorRT knows none of ONNX Runtime's own, and fuses by itself.
    graph = GraphOptions(precision=precision, fused=False)
    artifact = onnx_graph(checkpoint, graph, ArtifactStore(config.artifacts), sample=sample, limits=limits)
    info = EncoderInfo(
        "tensorrt",
        precision,
        device,
        batch_size,
        weight_bytes=artifact.size,
        artifact=artifact,
        options={"tensorrt": library, "gpu": gpu},
    )
    settings = engine_options(checkpoint, artifact, batch_size=batch_size, gpu=gpu, library=library)
    return SessionEncoder(artifact.file(GRAPH), checkpoint, info, Provider("tensorrt", settings))


def is_built(checkpoint: Checkpoint, artifacts: str | None) -> bool:
    """True if a job has built an engine of this model."""
    store = ArtifactStore(artifacts)
    graph = graph_recipe(checkpoint, GraphOptions(precision="fp16", fused=False))
    return (store.root / ENGINES / graph.fingerprint).is_dir()


def find_library() -> str:
    """The version of the TensorRT library that ONNX Runtime will load.

    Raises:
        BackendUnavailable: it is not on this machine.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendUnavailable(
            f"backend=tensorrt: {LIBRARY} cannot be loaded ({error}); install TensorRT 10, not 11: "
            "pip install 'tensorrt-cu13>=10.13,<11', and put its folder tensorrt_libs on LD_LIBRARY_PATH"
        ) from error
    return version_text(int(library.getInferLibVersion()))


def version_text(number: int) -> str:
    """``10.13.3`` of 101303, as ``getInferLibVersion`` of TensorRT 10 codes it."""
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def engine_options(
    checkpoint: Checkpoint, artifact: Artifact, *, batch_size: int, gpu: str, library: str
) -> dict[str, str]:
    """Options of the provider: one profile shape, and a cache folder for this graph, GPU and library alone."""
    height, width = checkpoint.spec.size
    shape = f"{INPUTS['image'][0]}:{batch_size}x3x{height}x{width}"
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    store = artifact.path.parent
    folder = store / ENGINES / artifact.fingerprint / f"{name}-tensorrt-{library}-batch-{batch_size}"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "trt_fp16_enable": "True",
        "trt_layer_norm_fp32_fallback": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": shape,
        "trt_profile_opt_shapes": shape,
        "trt_profile_max_shapes": shape,
    }
