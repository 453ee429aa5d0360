"""The tensors of a checkpoint of open_clip, put into its model: exactly its own, each of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.core.errors import ModelError
from pipeline.models.files import OPEN_CLIP_CONFIG

# Children of CLIP that are those of a text tower where a model has one of its own.
_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# Positions that follow from the config; older releases of transformers saved them.
_FOLLOWS = ("position_ids", "token_type_ids")
# One number each, of which some files have a list.
_SCALARS = ("logit_scale", "logit_bias")


def fill(model: torch.nn.Module, weights: Path) -> None:
    """Copy the tensors of ``weights`` into ``model``, which has the same numbers afterwards as by open_clip's loading.

    Raises:
        ModelError: a tensor is missing, is left over, or has another shape.
    """
    wanted = model.state_dict()
    with safe_open(weights, framework="pt") as file:
        names = _names(list(file.keys()), wanted)
        _compare({own: file.get_slice(name).get_shape() for own, name in names.items()}, wanted, weights)
        with torch.no_grad():
            for own, name in names.items():
                wanted[own].copy_(file.get_tensor(name).reshape(wanted[own].shape))


def _names(found: list[str], wanted: Mapping[str, Any]) -> dict[str, str]:
    """The names in the file by those in the model, as open_clip translates them."""
    # Of models that were trained on several GPUs, and of CLIPs that became a model with a text tower of its own.
    bare = {name.removeprefix("module."): name for name in found}
    if "positional_embedding" in bare and "positional_embedding" not in wanted:
        bare = {f"text.{name}" if name.startswith(_TEXT) else name: file for name, file in bare.items()}
    return {own: name for own, name in bare.items() if own in wanted or not own.endswith(_FOLLOWS)}


def _compare(shapes: Mapping[str, list[int]], wanted: Mapping[str, Any], weights: Path) -> None:
    ends = f"{weights.name} and {OPEN_CLIP_CONFIG} belong to different checkpoints, or one of them was changed"
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing:
        raise ModelError(
            f"{weights}: lacks {len(missing)} tensors of the model, for example {', '.join(missing[:3])}; {ends}"
        )
    if extra:
        raise ModelError(
            f"{weights}: holds {len(extra)} tensors that the model does not have, for example "
            f"{', '.join(extra[:3])}; {ends}"
        )
    for name, shape in shapes.items():
        own = list(wanted[name].shape)
        if shape != own and not (name in _SCALARS and sorted([*shape, 1])[-1] == sorted([*own, 1])[-1] == 1):
            raise ModelError(f"{weights}: the tensor {name} has the shape {shape}, and the model {own}; {ends}")
