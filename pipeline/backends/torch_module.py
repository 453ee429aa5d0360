"""Shared code of the backends that run a torch module: pixels to tensors, the compiler, the encoder."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from packaging.version import Version

from pipeline.backends.artifacts.exports import need_packages
from pipeline.backends.artifacts.onnx_export import quiet
from pipeline.backends.base import EncoderInfo, RuntimeEncoder
from pipeline.backends.devices import DTYPES, out_of_memory
from pipeline.backends.torch_attention import preferred
from pipeline.backends.torch_graph import Replay
from pipeline.core.errors import BackendUnavailable, install_hint
from pipeline.core.records import PreprocessSpec
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower, Normaliser

Forward = Callable[[torch.Tensor], torch.Tensor]
Tower = TypeVar("Tower", bound=torch.nn.Module)
# Entry of the fingerprint where the compiler chooses kernels by timing them.
TIMED = {"kernels": "chosen by timing"}
# The first version whose quantize_ leaves the precision of fp32 products as it is in this process.
TORCHAO = "0.18"
# A layer of a transformer, or a stage of another network, by its name in transformers, open_clip and timm.
_LAYER = re.compile(r"\.(layers?|resblocks|blocks|stages)\.[0-9]+\.")
log = logging.getLogger(__name__)


class ModuleEncoder(RuntimeEncoder):
    """An image tower that is a torch callable: normalised pixels in ``dtype`` to unit vectors in float32.

    ``dtype`` is that of the precision by default. With ``info.graph``, all of it is one CUDA graph.
    """

    def __init__(
        self, forward: Forward, checkpoint: Checkpoint, info: EncoderInfo, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(checkpoint, info, f"torch {torch.__version__}")
        self._forward = forward
        self._dtype = dtype or DTYPES[info.precision]
        half = info.device.type == "cuda" and self._dtype != torch.float32
        self._normalise = (QuickNormaliser if half else Normaliser)(checkpoint.spec, info.device)
        example = _noise(checkpoint.spec, info) if info.graph else None
        self._replay = None if example is None else Replay(self._embed, (example,))

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See :meth:`ImageEncoder.encode`."""
        if self._replay is None:
            return self._embed(pixels)[0]
        # The next batch is written over the results of the graph.
        return self._replay(pixels)[0].clone()

    def _embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        with preferred(self.device, self._dtype):
            return (self._forward(self._normalise(pixels).to(self._dtype)),)


class QuickNormaliser:
    """Normalise uint8 pixels in one multiplication and addition in float32, for towers of half precision.

    Memory bounds it on a GPU: the reference's order of operations reads and writes the pixels in float32 twice more.
    """

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        self._scale, self._shift = (value.to(device, torch.float32) for value in (1 / (255 * std), -mean / std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 ``[B, 3, H, W]``, contiguous, of uint8 pixels of the same shape in any layout."""
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return torch.addcmul(self._shift, values, self._scale)


def tower_on(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> ImageTower:
    """Copy the image tower of a checkpoint to a device in ``dtype``, see :func:`copied`."""
    return copied(checkpoint.image, device, dtype)


def copied(tower: Tower, device: torch.device, dtype: torch.dtype) -> Tower:
    """Copy a tower to a device in ``dtype``; each tensor is copied once."""
    # Copies of the tensors, which deepcopy takes for those that it would make on the CPU and in full precision.
    made: dict[int, Any] = {}
    for value in tower.parameters():
        moved = value.detach().to(device=device, dtype=dtype, copy=True)
        made[id(value)] = torch.nn.Parameter(moved, requires_grad=value.requires_grad)
    for buffer in tower.buffers():
        kind = dtype if buffer.is_floating_point() else buffer.dtype
        made[id(buffer)] = buffer.to(device=device, dtype=kind, copy=True)
    return copy.deepcopy(tower, made)


def need_torchao() -> str:
    """The version of torchao, which must be installed and new enough.

    Raises:
        BackendUnavailable: with the command that installs it.
    """
    need_packages("torchao", extra="int8")
    found = version("torchao")
    if Version(found) < Version(TORCHAO):
        raise BackendUnavailable(
            f"torchao {found} makes all fp32 products of the process less exact, those of the labels among them: "
            f"torchao {TORCHAO} or newer is needed; {install_hint('int8')}"
        )
    return found


def note_timed(setting: str) -> None:
    """Log that the kernels of a compiled tower depend on measurements."""
    log.info(
        "%s: kernels are chosen by timing them, so another worker may choose others, and its embeddings differ in the "
        "last digits; TORCHINDUCTOR_CACHE_DIR in a folder of all workers keeps a choice for those that start later",
        setting,
    )


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
        with quiet(), torch.inference_mode(), preferred(pixels.device, pixels.dtype):
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
    return isinstance(module, torch.nn.Linear) and _LAYER.search(name) is not None


def quantize_layers(tower: torch.nn.Module, backend: str, scheme: Any) -> None:
    """Quantize the layers that :func:`in_a_layer` finds, in place, by a config of torchao.

    Raises:
        BackendUnavailable: it finds none, so that nothing would be quantized.
    """
    if not any(in_a_layer(module, name) for name, module in tower.named_modules()):
        raise BackendUnavailable(
            f"backend={backend} finds no linear layers in this image tower that it could quantize; take backend=torch "
            "with precision=bf16, or backend=onnx_int8"
        )
    from torchao.quantization import quantize_

    module: Any
    for module in tower.modules():
        # timm's attention of EVA gives the weight as a keyword, which torchao's tensors do not take, unless it adds
        # the bias on its own.
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    quantize_(tower, scheme, filter_fn=in_a_layer)


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


@torch.inference_mode()
def _noise(spec: PreprocessSpec, info: EncoderInfo) -> torch.Tensor:
    """Pixels of the static shape in the loader's layout of memory, the same ones every time."""
    dice = torch.Generator(info.device).manual_seed(0)
    shape = (info.batch_size, *spec.size, 3)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, device=info.device, generator=dice)
    return noise.permute(0, 3, 1, 2)
