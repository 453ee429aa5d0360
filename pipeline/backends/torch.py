"""PyTorch, eager or compiled: fp32, bf16 and fp16."""

from __future__ import annotations

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.backends.base import Draw, EncoderInfo
from pipeline.backends.devices import DTYPES, choose
from pipeline.backends.torch_module import Forward, ModuleEncoder, blank, compiled, count_bytes
from pipeline.config.schema import BackendConfig, ParityConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.towers import ImageTower

# The first GPUs with a flash attention kernel in torch.
AMPERE = (8, 0)
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
    if device.type == "cuda" and precision != "fp32":
        assert_flash(checkpoint, device=device, dtype=dtype)
    forward: Forward = tower
    if config.compile != "none":
        pixels = blank(checkpoint, batch_size=batch_size, device=device, dtype=dtype)
        forward = compiled(tower, mode=config.compile, pixels=pixels)
    info = EncoderInfo(
        "torch",
        precision,
        device,
        batch_size,
        weight_bytes=count_bytes(tower),
        options={} if config.compile == "none" else {"compile": config.compile},
    )
    reuses_memory = device.type == "cuda" and config.compile in GRAPHS
    return ModuleEncoder(forward, checkpoint, info, reuses_memory=reuses_memory)


def reference(checkpoint: Checkpoint, device: torch.device, *, batch_size: int, sample: Draw) -> ModuleEncoder:
    """Eager fp32 on ``device``: what every other backend is compared with."""
    config = BackendConfig(precision="fp32", device=str(device))
    return open_encoder(checkpoint, config, batch_size=batch_size, sample=sample, limits=ParityConfig())


def assert_flash(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
    """Prove that attention runs in the flash kernel at the tower's shape; the others are several times slower.

    GPUs before Ampere have no such kernel, and pass.

    Raises:
        BackendUnavailable: this GPU should have the kernel, and it does not take the shape.
    """
    if torch.cuda.get_device_capability(device) < AMPERE:
        return
    vision = checkpoint.model.config.vision_config
    heads, tokens = vision.num_attention_heads, (vision.image_size // vision.patch_size) ** 2 + 1
    query = torch.zeros(1, heads, tokens, vision.hidden_size // heads, device=device, dtype=dtype)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)}: no flash attention for {heads} heads of {query.shape[-1]} in "
            f"{dtype} ({error}); take backend.precision=fp32, or another build of torch {torch.__version__}"
        ) from error
