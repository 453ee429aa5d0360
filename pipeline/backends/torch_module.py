"""Shared code of the backends that run a torch module: pixels to tensors, the compiler, the encoder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch

from pipeline.backends.artifacts.onnx_export import quiet
from pipeline.backends.base import EncoderInfo, RuntimeEncoder
from pipeline.backends.devices import DTYPES, out_of_memory
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import Normaliser

Forward = Callable[[torch.Tensor], torch.Tensor]


class ModuleEncoder(RuntimeEncoder):
    """An image tower that is a torch callable: normalised pixels in ``dtype`` to unit vectors in float32.

    ``dtype`` is that of the precision by default. ``reuses_memory`` if a result lies where the next one is written.
    """

    def __init__(
        self,
        forward: Forward,
        checkpoint: Checkpoint,
        info: EncoderInfo,
        *,
        dtype: torch.dtype | None = None,
        reuses_memory: bool = False,
    ) -> None:
        super().__init__(checkpoint, info, f"torch {torch.__version__}")
        self._forward, self._reuses_memory = forward, reuses_memory
        self._dtype = dtype or DTYPES[info.precision]
        self._normalise = Normaliser(checkpoint.spec, info.device)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`."""
        vectors = self._forward(self._normalise(pixels).to(self._dtype))
        # A CUDA graph writes its next result over this one.
        return vectors.clone() if self._reuses_memory else vectors


def compiled(module: torch.nn.Module, *, mode: str, pixels: torch.Tensor) -> Forward:
    """``torch.compile`` at the one static shape of ``pixels``, run once, so that what fails fails here.

    Args:
        module: the tower, on its device.
        mode: a mode of ``torch.compile``.
        pixels: normalised pixels of the static shape, in the dtype and on the device of the tower.

    Raises:
        BackendUnavailable: there is no C++ compiler, or the compiler failed.
    """
    compiler = os.environ.get("CXX", "g++") if pixels.device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(compiler.split()[0]) is None and shutil.which("clang++") is None:
        raise BackendUnavailable(
            f"torch.compile needs a C++ compiler, and {compiler} is not on this machine: install it (Debian and "
            "Ubuntu: apt-get install g++), name another in CXX, or take backend.compile=none or backend=onnx_int8"
        )
    try:
        # The compiler warns of parts of torch that it uses itself.
        with quiet(), torch.inference_mode():
            forward: Forward = torch.compile(module, mode=mode, dynamic=False)
            forward(pixels)
    except Exception as error:
        if out_of_memory(error):
            raise
        # The compiler raises its own and the toolchain's exceptions, of many kinds.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendUnavailable(
            f"torch.compile failed ({type(error).__name__}: {first}); take backend.compile=none, or backend=onnx"
        ) from error
    return forward


def in_a_layer(module: torch.nn.Module, name: str) -> bool:
    """True for a linear layer of the transformer: these are quantized.

    What comes after the pooling has one row for each picture, of which int8 products on CUDA want more than 16; it
    costs nearly nothing either way.
    """
    return isinstance(module, torch.nn.Linear) and ".encoder.layers." in name


def count_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights and buffers as they lie in memory."""
    return sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of one that is made of others, such as torchao's int8 values and scales, of those."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])


@torch.inference_mode()
def blank(checkpoint: Checkpoint, *, batch_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Pixels of the static shape, made as those of a batch are: an ordinary tensor would be compiled for anew."""
    height, width = checkpoint.spec.size
    return torch.zeros(batch_size, 3, height, width, device=device, dtype=dtype)
