"""Sessions of ONNX Runtime on the provider that was asked for, and their encoder; shared by the ONNX backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backends.artifacts.external_data import check_external
from pipeline.backends.artifacts.onnx_export import INPUTS, OUTPUTS
from pipeline.backends.base import EncoderInfo, RuntimeEncoder
from pipeline.backends.devices import out_of_memory
from pipeline.core.errors import BackendUnavailable
from pipeline.core.records import PreprocessSpec
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import Normaliser

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
INPUT, OUTPUT = INPUTS["image"][0], OUTPUTS["image"]


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime: a key of ``PROVIDERS``, and its options on a GPU."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def open_session(
    path: Path, provider: Provider, *, device: torch.device, batch_size: int, stream: torch.cuda.Stream | None
) -> Any:
    """An ONNX Runtime session of one static batch size.

    On a GPU it takes every node or is refused, and queues its work on ``stream``.

    Raises:
        BackendUnavailable: the provider's libraries are missing, or it did not take the whole graph.
        ArtifactError: the graph names files outside its folder.
    """
    import onnxruntime

    check_external(path)
    wanted = PROVIDERS[provider.name]
    advice = f"with {wanted}; its libraries may be missing or of another version: pip uninstall onnxruntime, then "
    advice += "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # With the batch size known, ONNX Runtime folds all arithmetic on shapes, which CUDA would leave to the CPU.
    settings.add_free_dimension_override_by_name("batch", batch_size)
    if stream is None:
        settings.intra_op_num_threads = torch.get_num_threads()
        given: list[Any] = [wanted]
    else:
        if wanted not in onnxruntime.get_available_providers():
            raise BackendUnavailable(f"ONNX Runtime {onnxruntime.__version__} was not built {advice}")
        # Loads the CUDA libraries that came with torch or with NVIDIA's packages.
        onnxruntime.preload_dlls()
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # The handle of torch's default stream is 0, which ONNX Runtime takes for none, and makes one of its own.
        place = {"device_id": str(device.index or 0), "user_compute_stream": str(stream.cuda_stream)}
        given = [(wanted, {**place, **provider.options})]
    try:
        # Its own way of falling back would try other providers, and report their failure in the place of this one.
        session = onnxruntime.InferenceSession(str(path), settings, providers=given, enable_fallback=0)
    except Exception as error:
        # ONNX Runtime raises classes of its own that have no common base but Exception.
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendUnavailable(
            f"ONNX Runtime {onnxruntime.__version__} could not open {path} ({first}) {advice}"
        ) from error
    kept = session.get_providers()
    if kept[0] != wanted:
        raise BackendUnavailable(
            f"ONNX Runtime {onnxruntime.__version__} kept {', '.join(kept)} and would not go on {advice}"
        )
    return session


class SessionEncoder(RuntimeEncoder):
    """An image tower in an ONNX Runtime session; on CUDA its tensors are torch's own, bound without a copy."""

    def __init__(self, graph: Path, checkpoint: Checkpoint, info: EncoderInfo, provider: Provider) -> None:
        import onnxruntime

        super().__init__(checkpoint, info, f"onnxruntime {onnxruntime.__version__}")
        device = info.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._session = open_session(graph, provider, device=device, batch_size=info.batch_size, stream=self._stream)
        self._spec = checkpoint.spec
        self._normalise = Normaliser(checkpoint.spec, device)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`."""
        if self._stream is None:
            values = normalise(pixels.numpy(), self._spec)
            return torch.from_numpy(self._session.run([OUTPUT], {INPUT: values})[0])
        return self._encode_bound(self._normalise(pixels), self._stream)

    def _encode_bound(self, values: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
        import onnxruntime

        vectors = torch.empty(len(values), self.dim, device=self.device, dtype=torch.float32)
        binding = self._session.io_binding()
        index = self.device.index or 0
        binding.bind_input(INPUT, "cuda", index, np.float32, tuple(values.shape), values.data_ptr())
        binding.bind_output(OUTPUT, "cuda", index, np.float32, tuple(vectors.shape), vectors.data_ptr())
        options = onnxruntime.RunOptions()
        # The host does not wait: the two streams wait for one another on the device.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        try:
            self._session.run_with_iobinding(binding, options)
        finally:
            current.wait_stream(stream)
            # Their memory is not given to others before this stream is done with it, even where the run broke off.
            values.record_stream(stream)
            vectors.record_stream(stream)
        return vectors


def normalise(pixels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """The computation of :class:`~pipeline.models.towers.Normaliser`, bit for bit, without torch.

    torch's threads go on spinning for a while after they are done, on the cores that ONNX Runtime's threads want:
    a small model lost more than half of its speed to that.
    """
    values = np.empty(pixels.shape, dtype=np.float32)
    np.divide(pixels, np.float32(255), out=values)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        values[:, channel] -= np.float32(mean)
        values[:, channel] /= np.float32(std)
    return values
