"""The contract that every backend keeps; a backend that this machine cannot run skips with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.backends import TABLE, factory
from pipeline.backends.base import ImageEncoder
from pipeline.config import CHOICES, BackendConfig, ModelConfig
from pipeline.errors import BackendUnavailable
from pipeline.models.checkpoint import open_checkpoint

BATCH = 8
# Lowest cosine to fp32 that a precision must keep on the demo model.
COSINE = {"fp32": 0.99999, "bf16": 0.995, "fp16": 0.999}
CASES = [
    pytest.param(
        BackendConfig(name=name, precision=precision, device=device),
        id=f"{name}-{precision}-{device}",
        marks=[pytest.mark.gpu] if device == "cuda" else [],
    )
    for name, precision, device in [
        ("torch", "fp32", "cpu"),
        ("torch", "bf16", "cpu"),
        ("torch", "fp32", "cuda"),
        ("torch", "bf16", "cuda"),
        ("torch", "fp16", "cuda"),
    ]
]


def opened(config: BackendConfig) -> ImageEncoder:
    return factory(config.name)(open_checkpoint(ModelConfig()), config, batch_size=BATCH)


def scenes(count: int = BATCH) -> torch.Tensor:
    """Pixels as the loader lays them out: a view of [B, H, W, 3] memory."""
    import numpy as np

    from pipeline.demo.scenes import render, sample

    stack = np.stack([np.asarray(render(sample(77, i), 48, 48)) for i in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """What transformers itself gives, in fp32, from pixels that were normalised by its own processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    checkpoint = open_checkpoint(ModelConfig())
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    images = [image.permute(1, 2, 0).numpy() for image in scenes()]
    values = processor(images, return_tensors="pt", input_data_format="channels_last").pixel_values
    features = checkpoint.model.get_image_features(pixel_values=values).pooler_output
    return torch.nn.functional.normalize(features, dim=1)


@pytest.mark.parametrize("config", CASES)
def test_embeddings_keep_the_contract(config: BackendConfig, reference: torch.Tensor) -> None:
    encoder = opened(config)
    assert encoder.precision == config.precision
    assert encoder.device.type == config.device
    pixels = scenes().to(encoder.device)
    before = pixels.clone()
    vectors = encoder.encode(pixels)
    assert vectors.shape == (BATCH, encoder.dim)
    assert vectors.dtype == torch.float32
    assert vectors.device.type == config.device
    assert torch.equal(pixels, before), "the pixels belong to the loader"
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(BATCH, device=vectors.device))
    cosine = (vectors.cpu() * reference).sum(dim=1)
    assert cosine.min() >= COSINE[config.precision]


@pytest.mark.parametrize("config", CASES)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(config: BackendConfig) -> None:
    encoder = opened(config)
    pixels = scenes().to(encoder.device)
    vectors = encoder.encode(pixels)
    shuffled = pixels.clone()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    shuffled[:] = pixels[order]
    shuffled[-2:] = 0
    again = encoder.encode(shuffled)
    tolerance = 1e-6 if config.precision == "fp32" else 5e-3
    torch.testing.assert_close(again[:-2], vectors[order][:-2], atol=tolerance, rtol=0)


@pytest.mark.parametrize("config", CASES)
def test_the_same_batch_gives_the_same_bits(config: BackendConfig) -> None:
    encoder, other = opened(config), opened(config)
    pixels = scenes().to(encoder.device)
    assert torch.equal(encoder.encode(pixels), encoder.encode(pixels))
    assert torch.equal(encoder.encode(pixels), other.encode(pixels))


@pytest.mark.parametrize("config", CASES)
def test_the_fingerprint_tells_precision_device_and_version(config: BackendConfig) -> None:
    prints = opened(config).fingerprint
    assert prints["name"] == config.name
    assert (prints["precision"], prints["device"]) == (config.precision, config.device)
    assert torch.__version__ in prints["runtime"]


def test_the_table_and_the_config_name_the_same_backends() -> None:
    assert tuple(TABLE) == CHOICES["backend.name"]
    assert {case.values[0].name for case in CASES} == set(TABLE)  # type: ignore[union-attr]


def test_auto_is_fp32_on_the_cpu() -> None:
    assert opened(BackendConfig(device="cpu")).precision == "fp32"


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="fp16 needs CUDA"):
        opened(BackendConfig(precision="fp16", device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_never_replaced_in_silence(device: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend\.device=cuda"):
        opened(replace(BackendConfig(), device=device))
