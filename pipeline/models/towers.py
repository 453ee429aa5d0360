"""The image and the text tower of a checkpoint as modules, for runtimes that take one graph."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pipeline.core.records import PreprocessSpec
from pipeline.models.checkpoint import Checkpoint

# The children of transformers' dual encoders that only one half uses.
TEXT_MODULES = ("text_model", "text_projection")
VISION_MODULES = ("vision_model", "visual_projection")


class Normaliser:
    """Normalise uint8 pixels for a model: ``(pixels / 255 - mean) / std`` in float32, in the reference's order."""

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 ``[B, 3, H, W]``, contiguous, of uint8 pixels of the same shape in any layout."""
        return (pixels.contiguous().float() / 255 - self._mean) / self._std


class ImageTower(torch.nn.Module):
    """Normalised pixels float ``[N, 3, H, W]`` in, L2-normalised image embeddings ``[N, D]`` out.

    Shares the checkpoint's weights: take a ``copy.deepcopy`` before changing them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = _without(checkpoint.model, TEXT_MODULES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed a batch."""
        return _unit(self.model.get_image_features(pixel_values=pixel_values).pooler_output)


class TextTower(torch.nn.Module):
    """Token ids and attention mask, int64 ``[N, T]``, in, L2-normalised text embeddings ``[N, D]`` out.

    Families that were trained without a mask (SigLIP) ignore it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = _without(checkpoint.model, VISION_MODULES)
        self.masked = "attention_mask" in checkpoint.tokenize(["a"])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch."""
        mask = {"attention_mask": attention_mask} if self.masked else {}
        return _unit(self.model.get_text_features(input_ids=input_ids, **mask).pooler_output)


def _without(model: Any, names: tuple[str, ...]) -> Any:
    """The same model object without some children; the weights of the others are shared."""
    half = copy.copy(model)
    half._modules = {name: child for name, child in model._modules.items() if name not in names}
    return half


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in float32; a zero row becomes NaN, which every caller refuses."""
    wide = features.float()
    # Not vector_norm: it exports as ReduceL2, for which ONNX Runtime's optimizer infers no shapes.
    length: torch.Tensor = (wide * wide).sum(dim=1, keepdim=True).sqrt()
    return wide / length
