"""Full-size architectures by hub id, so that ``model.weights=random`` needs no download.

Values that differ from transformers' defaults, from each checkpoint's published ``config.json`` and
``preprocessor_config.json``. SigLIP's sizes are those of the authors' conversion to transformers; Chinese-CLIP's
of ``cn_clip/clip/model_configs`` in OFA-Sys/Chinese-CLIP.
DINOv2's pictures are smaller than those that its positions were trained on.
"""

from __future__ import annotations

from typing import Any

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
BILINEAR, BICUBIC = 2, 3

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SMALL = {"hidden_size": 384, "num_attention_heads": 6}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
# RoBERTa-wwm-ext-base-chinese: BERT's base size with the vocabulary of Chinese BERT.
CHINESE_TEXT = {"vocab_size": 21_128}


def _clip(patch: int, *, large: bool = False, side: int = 224) -> dict[str, Any]:
    vision: dict[str, Any] = {"patch_size": patch, "image_size": side}
    text: dict[str, Any] = {}
    projection = 512
    if large:
        projection = 768
        vision |= LARGE
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return {
        "model_type": "clip",
        "projection_dim": projection,
        "vision_config": {**vision, "projection_dim": projection},
        "text_config": {**text, "projection_dim": projection},
    }


def _huge(family: str, **text: Any) -> dict[str, Any]:
    """CLIP ViT-H/14, with a large text tower."""
    return {
        "model_type": family,
        "projection_dim": 1024,
        "vision_config": {**HUGE, "patch_size": 14, "projection_dim": 1024, **text.pop("vision", {})},
        "text_config": {**LARGE, "projection_dim": 1024, **text},
    }


def _dinov2(sizes: dict[str, int]) -> dict[str, Any]:
    return {"model_type": "dinov2", "image_size": 518, "patch_size": 14, **sizes}


def _dinov3(sizes: dict[str, int]) -> dict[str, Any]:
    return {"model_type": "dinov3_vit", "num_register_tokens": 4, **sizes}


def _siglip(patch: int, vocabulary: int, *, side: int = 224, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    return {
        "model_type": "siglip",
        "vision_config": {**(sizes or {}), "patch_size": patch, "image_size": side},
        "text_config": {**(sizes or {}), "vocab_size": vocabulary},
    }


def _chinese_clip(patch: int, *, large: bool = False) -> dict[str, Any]:
    projection = 768 if large else 512
    vision = {"patch_size": patch, "projection_dim": projection, **(LARGE if large else {})}
    return {
        "model_type": "chinese_clip",
        "projection_dim": projection,
        "vision_config": vision,
        "text_config": CHINESE_TEXT,
    }


def _cropped(side: int) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "resample": BICUBIC,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    }


def _squeezed(side: int, resample: int) -> dict[str, Any]:
    return {
        "size": {"height": side, "width": side},
        "resample": resample,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }


def _imagenet(preprocessor: dict[str, Any]) -> dict[str, Any]:
    return {**preprocessor, "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


CLIP_PREPROCESSOR = _cropped(224)
SIGLIP_PREPROCESSOR = _squeezed(224, BICUBIC)
VIT_PREPROCESSOR = _squeezed(224, BILINEAR)
DINOV3_PREPROCESSOR = _imagenet(VIT_PREPROCESSOR)
# The shorter edge to 256, then the centre.
DINOV2_PREPROCESSOR = _imagenet({**CLIP_PREPROCESSOR, "size": {"shortest_edge": 256}})
# The whole picture, squeezed into a square: image_transform in OFA-Sys/Chinese-CLIP.
CHINESE_CLIP_PREPROCESSOR: dict[str, Any] = {
    **CLIP_PREPROCESSOR,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
}

ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": (_clip(32), CLIP_PREPROCESSOR),
    "openai/clip-vit-base-patch16": (_clip(16), CLIP_PREPROCESSOR),
    "openai/clip-vit-large-patch14": (_clip(14, large=True), CLIP_PREPROCESSOR),
    "openai/clip-vit-large-patch14-336": (_clip(14, large=True, side=336), _cropped(336)),
    # LAION's have the exact GELU.
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        _huge("clip", hidden_act="gelu", vision={"hidden_act": "gelu"}),
        CLIP_PREPROCESSOR,
    ),
    # XLM-V's vocabulary.
    "facebook/metaclip-2-worldwide-huge-quickgelu": (
        _huge("metaclip_2", vocab_size=901_629, eos_token_id=2),
        CLIP_PREPROCESSOR,
    ),
    "google/siglip-base-patch16-224": (_siglip(16, 32_000), SIGLIP_PREPROCESSOR),
    "google/siglip-so400m-patch14-384": (_siglip(14, 32_000, side=384, sizes=SO400M), _squeezed(384, BICUBIC)),
    # SigLIP 2 resizes bilinearly.
    "google/siglip2-base-patch16-224": (_siglip(16, 256_000), _squeezed(224, BILINEAR)),
    "google/siglip2-large-patch16-256": (_siglip(16, 256_000, side=256, sizes=LARGE), _squeezed(256, BILINEAR)),
    "google/siglip2-so400m-patch14-384": (_siglip(14, 256_000, side=384, sizes=SO400M), _squeezed(384, BILINEAR)),
    "OFA-Sys/chinese-clip-vit-base-patch16": (_chinese_clip(16), CHINESE_CLIP_PREPROCESSOR),
    "OFA-Sys/chinese-clip-vit-large-patch14": (_chinese_clip(14, large=True), CHINESE_CLIP_PREPROCESSOR),
    "facebook/dinov2-small": (_dinov2(SMALL), DINOV2_PREPROCESSOR),
    "facebook/dinov2-base": (_dinov2({}), DINOV2_PREPROCESSOR),
    "facebook/dinov2-large": (
        _dinov2({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
        DINOV2_PREPROCESSOR,
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (_dinov3({}), DINOV3_PREPROCESSOR),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (_dinov3(BASE), DINOV3_PREPROCESSOR),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (_dinov3(LARGE), DINOV3_PREPROCESSOR),
    "google/vit-base-patch16-224-in21k": ({"model_type": "vit", "architectures": ["ViTModel"]}, VIT_PREPROCESSOR),
}
