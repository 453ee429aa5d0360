"""The attention kernel of an image tower on CUDA: an order of preference, and the kernels that the tower calls."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.core.errors import BackendUnavailable

# The first GPUs with a flash attention kernel in torch, and the first on which cuDNN's is the faster one.
AMPERE, HOPPER = (8, 0), (9, 0)
# Up to this version of cuDNN torch itself does not prefer its attention.
OLD_CUDNN = 91500
FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
# Names of the kernels by the operators that scaled_dot_product_attention is made of.
KERNELS = {
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_flash_attention_for_cpu": "cpu",
}
NO_ATTENTION = "no attention"
FAST = ("cudnn", "flash", NO_ATTENTION)


def preferred(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Prefer the fast kernels in the body, on CUDA in half precision; elsewhere the body runs as it is.

    The order of torch's own choice is set, and no kernel is switched off: these switches count for all threads, and
    another one may be embedding the prompts.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return nullcontext()
    order = preference(torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0)
    return sdpa_kernel(order, set_priority=True)


def preference(capability: tuple[int, int], cudnn: int) -> list[SDPBackend]:
    """Kernels of attention for a compute capability and a version of cuDNN, the fastest first."""
    fast = CUDNN_FIRST if capability >= HOPPER and cudnn > OLD_CUDNN else FLASH_FIRST
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def kernels(tower: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> list[str]:
    """Run the tower once, and return the attention kernels that it called, each once, by name.

    Attention that is put together from products and a softmax is no kernel; a convolutional tower has no attention.

    Args:
        tower: the image tower, neither compiled nor captured.
        pixels: normalised pixels of the static shape, in the dtype and on the device of the tower.
    """
    sizes = getattr(tower, "sizes", None)
    if sizes is not None and sizes.heads == 0:
        return [NO_ATTENTION]
    # In inference mode, which the caller may be in, operators arrive here before they are taken apart.
    with preferred(pixels.device, pixels.dtype), torch.inference_mode(False), torch.no_grad(), _Calls() as calls:
        tower(torch.zeros_like(pixels))
    return sorted({KERNELS[name] for name in calls.names if name in KERNELS})


def prove(found: Collection[str], device: torch.device, dtype: torch.dtype) -> str:
    """Names of the kernels ``found`` in a tower, if they are the fast ones; GPUs before Ampere have none, and pass.

    Raises:
        BackendUnavailable: this GPU should run attention in a fast kernel, and the tower calls another.
    """
    names = ", ".join(found) or "none"
    if torch.cuda.get_device_capability(device) >= AMPERE and (not found or not set(found) <= set(FAST)):
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)}: attention of this model in {dtype} runs in the kernel {names}, "
            f"which is several times slower than {' or '.join(FAST[:2])}; take backend.precision=fp32, or another "
            f"build of torch {torch.__version__}"
        )
    return names


class _Calls(TorchDispatchMode):
    """Names of the operators that the body calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
