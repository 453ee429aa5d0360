"""The towers of a checkpoint: modules that embed, with the sizes that runtimes and guesses of speed need."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.records import PreprocessSpec


class Normaliser:
    """Normalise uint8 pixels for a model: ``(pixels / 255 - mean) / std`` in float32, in the reference's order."""

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 ``[B, 3, H, W]``, contiguous, of uint8 pixels of the same shape in any layout."""
        return (pixels.contiguous().float() / 255 - self._mean) / self._std


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a tower: for guesses of its speed and memory, and for the fusion of its exported graph.

    Attributes:
        layers: blocks of attention and MLP, or what comes near to them.
        heads: of an attention; 0 for a tower without attention.
        width: values of a token.
        widest: values of a token in the MLP.
        tokens: of one input: the patches of a picture and its further tokens, or the most tokens of a text.
        fusion: the kind of graph for ONNX Runtime's transformer optimizer, ``clip`` (norms before the blocks) or
            ``bert`` (norms after them), every layer of which must be fused; None for a graph that it does not know.
    """

    layers: int
    heads: int
    width: int
    widest: int
    tokens: int
    fusion: str | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the layers."""
        return self.layers * (4 * self.width * self.width + 2 * self.width * self.widest)


class ImageTower(torch.nn.Module):
    """Normalised pixels float ``[N, 3, H, W]`` in, L2-normalised image embeddings ``[N, D]`` out.

    By default ``model(pixels)`` gives the features; families override :meth:`features`. All that open the tower of a
    checkpoint share its weights: take a ``copy.deepcopy`` before changing them.
    """

    def __init__(self, model: Any, sizes: Sizes) -> None:
        super().__init__()
        self.model, self.sizes = model, sizes

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The family's image features ``[N, D]``, not normalised."""
        features: torch.Tensor = self.model(pixel_values)
        return features

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed a batch."""
        return _unit(self.features(pixel_values))

    def separate_attention(self) -> None:
        """Compute attention by matrix products and softmax, as the optimizer of exported graphs detects it."""
        _separate_attention(self.model)


class TextTower(torch.nn.Module):
    """Token ids and attention mask, int64 ``[N, T]``, in, L2-normalised text embeddings ``[N, D]`` out.

    By default ``model(ids)`` gives the features; families override :meth:`features`. Families that were trained without
    a mask ignore it. A ``causal`` tower takes the features at the end of the text, which sees no padding behind it: it
    needs no mask.
    """

    causal = False

    def __init__(self, model: Any, sizes: Sizes) -> None:
        super().__init__()
        self.model, self.sizes = model, sizes

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The family's text features ``[N, D]``, not normalised."""
        features: torch.Tensor = self.model(input_ids)
        return features

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Embed a batch."""
        return _unit(self.features(input_ids, attention_mask))

    def separate_attention(self) -> None:
        """See :meth:`ImageTower.separate_attention`."""
        _separate_attention(self.model)


def without(model: Any, *names: str) -> Any:
    """The same model object without some children; the weights of the others are shared."""
    half = copy.copy(model)
    half._modules = {name: child for name, child in model._modules.items() if name not in names}
    return half


def _separate_attention(model: Any) -> None:
    # A setting of transformers; the modules of other libraries are exported as they are.
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in float32; a zero row becomes NaN, which every caller refuses."""
    wide = features.float()
    # Not vector_norm: it exports as ReduceL2, for which ONNX Runtime's optimizer infers no shapes.
    length: torch.Tensor = (wide * wide).sum(dim=1, keepdim=True).sqrt()
    return wide / length
