"""Small image towers of transformers alone, rows of the contract as those of ``tests.families``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import open_checkpoint
from tests.families import TEXT, VISION, Case, Open, save


class Dinov3Reference:
    """The processor of DINOv3, which needs torchvision: rescaled, resized in float32, then normalised."""

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        rows = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
        # As torchvision.transforms.v2.functional.resize of floating-point tensors.
        sized = [interpolate(row, (32, 32), mode="bilinear", antialias=True)[0] for row in rows]
        return {"pixel_values": torch.stack([(row - mean) / std for row in sized])}


def vision(model: Any, preprocessor: dict[str, Any], processor: Any, features: Any, **more: Any) -> Open:
    """A row of an image tower alone; ``model`` makes it, and ``features`` reads them from its output."""

    def opened(folder: Path) -> Case:
        torch.manual_seed(0)
        own = model().eval()
        save(own, folder, preprocessor)
        # The tower of a classifier.
        own = getattr(own, "vit", own)
        read = processor() if processor is Dinov3Reference else processor.from_pretrained(folder)
        return Case(open_checkpoint(ModelConfig(name=str(folder))), own, read, [], {}, features, **more)

    return opened


def cls(output: Any) -> torch.Tensor:
    token: torch.Tensor = output.last_hidden_state[:, 0]
    return token


def pooled(output: Any) -> torch.Tensor:
    features: torch.Tensor = output.pooler_output
    return features


SQUARE, CROP = {"height": 32, "width": 32}, {"shortest_edge": 36}
DINOV2 = {"size": CROP, "crop_size": SQUARE, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Trained on larger pictures than the processor makes, as the published ones are.
LARGER = {**TEXT, "image_size": 56, "patch_size": 8, "mlp_ratio": 2}
CLIP_PIXELS = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
TOWERS: dict[str, Open] = {
    "dinov2": vision(lambda: Dinov2Model(Dinov2Config(**LARGER)), DINOV2, BitImageProcessorPil, pooled),
    "dinov2-swiglu": vision(
        lambda: Dinov2Model(Dinov2Config(**LARGER, use_swiglu_ffn=True)), DINOV2, BitImageProcessorPil, pooled
    ),
    "dinov2_with_registers": vision(
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**LARGER, num_register_tokens=3)),
        DINOV2,
        BitImageProcessorPil,
        pooled,
    ),
    "dinov3_vit": vision(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2)),
        {"size": SQUARE, "resample": 2},
        Dinov3Reference,
        pooled,
        # Pixels are rounded to 8 bits here between the steps.
        levels=1.01,
    ),
    "vit": vision(lambda: ViTModel(ViTConfig(**VISION)), {"size": SQUARE}, ViTImageProcessorPil, pooled),
    "vit-classifier": vision(
        lambda: ViTForImageClassification(ViTConfig(**VISION, num_labels=7)),
        {"size": 32},
        ViTImageProcessorPil,
        cls,
    ),
    "ijepa": vision(
        lambda: IJepaModel(IJepaConfig(**VISION)),
        {"size": SQUARE},
        ViTImageProcessorPil,
        lambda output: output.last_hidden_state.mean(dim=1),
    ),
    "clip_vision_model": vision(
        lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), CLIP_PIXELS, CLIPImageProcessorPil, pooled
    ),
    "clip_vision_model-projection": vision(
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=24)),
        CLIP_PIXELS,
        CLIPImageProcessorPil,
        lambda output: output.image_embeds,
    ),
    "siglip_vision_model": vision(
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)), {"size": SQUARE}, SiglipImageProcessorPil, pooled
    ),
    "siglip_vision_model-mean": vision(
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)),
        {"size": SQUARE},
        SiglipImageProcessorPil,
        lambda output: output.last_hidden_state.mean(dim=1),
    ),
}
