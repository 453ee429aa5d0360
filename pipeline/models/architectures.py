"""Full-size architectures by hub id, so that ``model.weights=random`` needs no download.

Values that differ from transformers' defaults, from each checkpoint's published ``config.json`` and
``preprocessor_config.json``.
"""

from __future__ import annotations

from typing import Any

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def _clip(patch: int, *, large: bool = False) -> dict[str, Any]:
    vision: dict[str, Any] = {"patch_size": patch}
    text: dict[str, Any] = {}
    projection = 512
    if large:
        projection = 768
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return {
        "model_type": "clip",
        "projection_dim": projection,
        "vision_config": {**vision, "projection_dim": projection},
        "text_config": {**text, "projection_dim": projection},
    }


def _siglip(patch: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "siglip",
        "vision_config": {"patch_size": patch, "image_size": 224},
        "text_config": {"vocab_size": vocabulary},
    }


CLIP_PREPROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
}
SIGLIP_PREPROCESSOR: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}

ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": (_clip(32), CLIP_PREPROCESSOR),
    "openai/clip-vit-base-patch16": (_clip(16), CLIP_PREPROCESSOR),
    "openai/clip-vit-large-patch14": (_clip(14, large=True), CLIP_PREPROCESSOR),
    "google/siglip2-base-patch16-224": (_siglip(16, 256_000), SIGLIP_PREPROCESSOR),
}
