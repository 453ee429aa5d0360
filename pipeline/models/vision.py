"""Image towers of transformers alone: embeddings of pictures, and no texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ModelError
from pipeline.models.files import CheckpointFiles, check_side
from pipeline.models.fingerprint import digests as architecture_digests
from pipeline.models.record import Checkpoint
from pipeline.models.towers import ImageTower, Sizes
from pipeline.models.weights import PLAIN, Build


@dataclass(frozen=True, slots=True)
class Vision:
    """Properties of all image towers of one ``model_type``.

    Attributes:
        about: models of it, for the page.
        example: one of the hub.
        features: the image features in words.
        pooling: the values of an output that are the embedding: ``cls`` and ``mean`` of the last layer's tokens,
            ``pooler`` for the model's own.
        head: the end of the name of a tensor that some checkpoints have; with it the pooling is ``with_head``, made by
            the model that ``build`` names, and without it the one by ``bare``.
        resized: True if the model takes pictures of any size, so that the preprocessor alone decides.
        tokens: of a picture besides its patches and registers.
        fusion: of its exported graph, see :class:`~pipeline.models.towers.Sizes`.
    """

    about: str
    example: str
    features: str
    pooling: str
    head: str | None = None
    with_head: str = "pooler"
    build: Build = PLAIN
    bare: Build = PLAIN
    resized: bool = False
    tokens: int = 1
    fusion: str | None = None


# The class token after the last norm, x_norm_clstoken of facebookresearch/dinov2, whose linear classifiers and
# retrieval take it; transformers has it as pooler_output.
_CLASS_TOKEN = "class token after the last norm"
FAMILIES = {
    "dinov2": Vision("DINOv2", "facebook/dinov2-base", _CLASS_TOKEN, pooling="cls", resized=True),
    "dinov2_with_registers": Vision(
        "DINOv2 with registers", "facebook/dinov2-with-registers-base", _CLASS_TOKEN, pooling="cls", resized=True
    ),
    # The model card of facebook/dinov3-vitb16-pretrain-lvd1689m: outputs.pooler_output, which is the same token.
    "dinov3_vit": Vision(
        "DINOv3 with ViT towers", "facebook/dinov3-vitb16-pretrain-lvd1689m", _CLASS_TOKEN, pooling="cls", resized=True
    ),
    # google/vit-base-patch16-224-in21k has the pooler that it was trained with, "which can be used for downstream
    # tasks" (its card); classifiers, DINO's and others have none, and take the class token (ViTForImageClassification).
    "vit": Vision(
        "ViT: ImageNet-21k, DINO 1, the towers of classifiers",
        "google/vit-base-patch16-224-in21k",
        f"pooler where the checkpoint has one, else the {_CLASS_TOKEN}",
        pooling="cls",
        head="pooler.dense.weight",
        bare=Build(options={"add_pooling_layer": False}),
    ),
    # The model card of facebook/ijepa_vith14_1k: the mean of all tokens; there is no class token.
    "ijepa": Vision("I-JEPA", "facebook/ijepa_vith14_1k", "mean of the tokens", pooling="mean", tokens=0),
    # As CLIP itself: the class token after the norm, through the projection where the checkpoint has it.
    "clip_vision_model": Vision(
        "CLIP's image tower alone, CLIPVisionModelWithProjection among them",
        "openai/clip-vit-base-patch32 saved by CLIPVisionModel",
        "as CLIP's where the checkpoint has the projection, else the class token before it",
        pooling="pooler",
        head="visual_projection.weight",
        with_head="projection",
        build=Build("CLIPVisionModelWithProjection"),
        fusion="clip",
    ),
    # As SigLIP itself: attention pooling; without that head the mean (SiglipForImageClassification).
    "siglip_vision_model": Vision(
        "SigLIP's image tower alone, at a fixed resolution",
        "google/siglip2-base-patch16-224 saved by SiglipVisionModel",
        "attention pooling where the checkpoint has it, else the mean of the tokens",
        pooling="mean",
        head="head.probe",
        tokens=0,
        fusion="clip",
    ),
}
# The classes whose weights have the head, for random weights.
_HEADED = ("ViTModel", "CLIPVisionModelWithProjection")


class VisionTower(ImageTower):
    """An image tower of transformers with its pooling."""

    def __init__(self, model: Any, sizes: Sizes, *, pooling: str) -> None:
        super().__init__(model, sizes)
        self.pooling = pooling

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See :class:`ImageTower`."""
        output = self.model(pixel_values=pixel_values)
        if self.pooling == "cls":
            features: torch.Tensor = output.last_hidden_state[:, 0]
        elif self.pooling == "mean":
            features = output.last_hidden_state.mean(dim=1)
        else:
            features = output.image_embeds if self.pooling == "projection" else output.pooler_output
        return features


def build_of(settings: Any, tensors: Collection[str] | None) -> Build:
    """The way to the model of a config: with its head if ``tensors``, or its class without weights, have it."""
    row = FAMILIES[settings.model_type]
    if row.head is None:
        return PLAIN
    if tensors is None:
        headed = any(name in _HEADED for name in settings.architectures or ())
    else:
        headed = any(name.endswith(row.head) for name in tensors)
    return row.build if headed else row.bare


def assemble(config: ModelConfig, model: Any, read: CheckpointFiles) -> Checkpoint:
    """An image tower and what was read of its folder as a checkpoint.

    Raises:
        ModelError: they do not belong together.
    """
    settings, spec = model.config, read.spec
    family = settings.model_type
    row = FAMILIES[family]
    height, width = spec.size
    if not row.resized:
        check_side(config.name, spec, settings.image_size)
    elif height != width:
        raise ModelError(f"{config.name}: the preprocessor makes pictures of {height} x {width} pixels, not squares")
    if row.resized and hasattr(model.embeddings, "interpolate_pos_encoding"):
        _fix_positions(model, height)
    headed = row.head is not None and any(name.endswith(row.head) for name in model.state_dict())
    pooling = row.with_head if headed else row.pooling
    dim = settings.projection_dim if pooling == "projection" else settings.hidden_size
    if family == "vit" and headed:
        dim = getattr(settings, "pooler_output_size", None) or dim
    today, *earlier = architecture_digests(settings.to_dict(), read.values)
    return Checkpoint(
        name=config.name,
        family=family,
        image=VisionTower(model, _sizes(settings, height, row), pooling=pooling),
        text=None,
        tokenizer=None,
        spec=spec,
        dim=int(dim),
        scoring=None,
        scale=1.0,
        bias=0.0,
        revision=config.revision,
        fingerprint={
            "family": family,
            "weights": read.weights,
            "architecture": today,
            "pooling": pooling,
            "preprocess": dataclasses.asdict(spec),
        },
        earlier=tuple(earlier),
    )


def _fix_positions(model: Any, side: int) -> None:
    """Interpolate the positions for the one size of pictures, once and not for each batch; exports have no resize."""
    embeddings = model.embeddings
    patches = (side // int(model.config.patch_size)) ** 2
    blank = torch.zeros(1, patches + 1, model.config.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(blank, side, side).clone()
    embeddings.position_embeddings = torch.nn.Parameter(positions, requires_grad=False)


def _sizes(settings: Any, side: int, row: Vision) -> Sizes:
    width = int(settings.hidden_size)
    widest = getattr(settings, "intermediate_size", None) or width * settings.mlp_ratio
    registers = int(getattr(settings, "num_register_tokens", 0))
    return Sizes(
        layers=int(settings.num_hidden_layers),
        heads=int(settings.num_attention_heads),
        width=width,
        widest=int(widest),
        tokens=(side // int(settings.patch_size)) ** 2 + row.tokens + registers,
        fusion=row.fusion,
    )
