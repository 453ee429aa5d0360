"""PyTorch, eager or compiled: fp32, bf16 and fp16."""

from __future__ import annotations

import copy

import torch

from pipeline.backends.base import Draw
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.modules import Forward, ModuleEncoder, blank, compiled, count_bytes
from pipeline.config import BackendConfig, ParityConfig
from pipeline.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

# Modes of torch.compile that replay CUDA graphs.
GRAPHS = ("reduce-overhead", "max-autotune")


def open_encoder(
    checkpoint: Checkpoint, config: BackendConfig, *, batch_size: int, sample: Draw, limits: ParityConfig
) -> ModuleEncoder:
    """See :class:`~pipeline.backends.base.BackendFactory`."""
    device, precision = choose(config)
    dtype = DTYPES[precision]
    tower = ImageTower(checkpoint)
    if device.type != "cpu" or precision != "fp32":
        tower = copy.deepcopy(tower).to(device=device, dtype=dtype)
    if device.type == "cuda":
        # fp32 is what every other backend is compared with: no TF32 in the patch embedding's convolution.
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        if precision != "fp32":
            assert_flash(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
    forward: Forward = tower
    if config.compile != "none":
        pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
        forward = compiled(tower, mode=config.compile, pixels=pixels)
    return ModuleEncoder(
        forward,
        checkpoint,
        name="torch",
        precision=precision,
        device=device,
        batch_size=batch_size,
        weight_bytes=count_bytes(tower),
        options={} if config.compile == "none" else {"compile": config.compile},
        reuses_memory=device.type == "cuda" and config.compile in GRAPHS,
    )


def reference(checkpoint: Checkpoint, device: torch.device, *, batch_size: int, sample: Draw) -> ModuleEncoder:
    """Eager fp32 on ``device``: what every other backend is compared with."""
    config = BackendConfig(precision="fp32", device=str(device))
    return open_encoder(checkpoint, config, batch_size=batch_size, sample=sample, limits=ParityConfig())


def assert_flash(checkpoint: Checkpoint, *, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Prove that attention runs in the flash kernel at the tower's shape; the others are several times slower.

    Raises:
        BackendUnavailable: the kernel does not take the shape on this GPU.
    """
    vision = checkpoint.model.config.vision_config
    heads = vision.num_attention_heads
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    query = torch.zeros(batch_size, heads, tokens, vision.hidden_size // heads, device=device, dtype=dtype)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)}: no flash attention for {heads} heads of {query.shape[-1]} in "
            f"{dtype} ({error}); take backend.precision=fp32, or a GPU of compute capability 8.0 or newer"
        ) from error
