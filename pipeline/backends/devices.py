"""The device and precision of a backend, proved to be available."""

from __future__ import annotations

import gc

import torch

from pipeline.config.choices import BACKENDS
from pipeline.config.schema import BackendConfig
from pipeline.core.errors import BackendUnavailable

# Texts of torch, CUDA, cuBLAS, cuDNN and ONNX Runtime when the memory is full, besides torch.OutOfMemoryError:
# TorchScript's interpreter raises every error as a RuntimeError, and ONNX Runtime has no class of its own for it.
_FULL = ("out of memory", "failed to allocate memory", "can't allocate memory", "_status_alloc_failed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def free_memory(*, compiled: bool) -> None:
    """Free the memory of encoders that nobody holds any more; of ``compiled`` ones, torch's compiler holds parts."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """True if an error of a runtime means that the device's memory is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # ONNX Runtime's errors are Exceptions without a common base.
    runtime = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return runtime and any(words in str(error).lower() for words in _FULL)


def choose(config: BackendConfig) -> tuple[torch.device, str]:
    """The device and the precision of a config.

    Raises:
        BackendUnavailable: see :func:`choose_device` and :func:`choose_precision`.
    """
    device = choose_device(config.device)
    if device.type == "cuda":
        # Pinned memory, streams and memory figures belong to the current device.
        torch.cuda.set_device(device)
    precision = choose_precision(config, device)
    if precision == "fp32":
        # fp32 is what every other backend is compared with: no TF32 in its convolution, nor in its products.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    return device, precision


def choose_device(name: str) -> torch.device:
    """The device that was asked for, proved to be there; ``auto`` is CUDA where there is one.

    Raises:
        BackendUnavailable: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = f"torch {torch.__version__}"
            why = (
                "was built without CUDA; install its CUDA build, as pytorch.org says"
                if torch.version.cuda is None
                else "sees no GPU or driver; nvidia-smi tells whether there is one"
            )
            raise BackendUnavailable(f"backend.device={name}: {build} {why}; or take backend.device=cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendUnavailable(
                f"backend.device={name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0; take "
                f"cuda:{torch.cuda.device_count() - 1} or lower"
            )
        return torch.device("cuda", device.index or 0)
    return device


def choose_precision(config: BackendConfig, device: torch.device) -> str:
    """The precision that was asked for; ``auto`` is fp32 on the CPU, bf16 or else fp16 on CUDA.

    Raises:
        BackendUnavailable: fp16 was asked for on the CPU, where it is slower than fp32, or a precision that is
            not the backend's.
    """
    name, able = config.precision, BACKENDS[config.name].precisions
    if name == "auto":
        if len(able) == 1:
            return able[0]
        if device.type == "cpu":
            return "fp32"
        return "bf16" if "bf16" in able and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in able:
        raise BackendUnavailable(f"backend={config.name} computes in {', '.join(able)}, not in {name}")
    if name == "fp16" and device.type != "cuda":
        raise BackendUnavailable(
            f"backend.precision=fp16 needs CUDA, and the device is {device.type}: there fp16 is slower than fp32; "
            "take bf16 (backend=torch), int8 or fp32"
        )
    return name
