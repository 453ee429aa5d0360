"""Checks of a checkpoint's ``config.json`` before transformers opens it: errors that name the key."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from pipeline.core.errors import ModelError, short
from pipeline.models.files import first_line, is_number

_TOWERS = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "num_channels"),
)


# No model is larger: a size that is a slip of the pen would take all memory, and layers all time, before an error.
_MOST, _MOST_LAYERS, _MOST_TOKENS = 100_000, 1_000, 10_000_000


def open_config(path: Path, values: dict[str, Any]) -> Any:
    """The config of a ``config.json`` with these values, as transformers reads it.

    Raises:
        ModelError: with the key whose value it does not take.
    """
    _check_values(path, "", values)
    for name in _TOWERS:
        tower = values.get(name)
        if tower is None:
            continue
        if not isinstance(tower, dict):
            raise ModelError(f"{path}: {name} is {short(repr(tower))}; wanted an object with the sizes of the tower")
        _check_values(path, f"{name}.", tower)
    try:
        settings = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    # Values of the wrong type raise anything.
    except Exception as error:
        raise ModelError(f"{path}: {_culprit(values)}{first_line(error)}") from error
    return settings


def explain_model(path: Path, values: dict[str, Any]) -> None:
    """Find the key for which no model can be built, after that failed for any reason.

    Raises:
        ModelError: with the key; nothing is raised where the model can be built, so that the weights are at fault.
    """
    error = _problem(values)
    if error is not None:
        raise ModelError(f"{path}: {_culprit(values)}no model can be built from it ({first_line(error)})") from error


def _check_values(path: Path, prefix: str, values: dict[str, Any]) -> None:
    def refuse(name: str, wanted: str) -> ModelError:
        return ModelError(
            f"{path}: {prefix}{name} is {short(repr(values[name]))}; wanted {wanted}, as the weights were trained with"
        )

    for name in (*_COUNTS, "projection_dim", "projection_size"):
        value = values.get(name, 1)
        # A tower has no projection of its own in some families.
        optional = value is None and name.startswith("projection")
        most = {"num_hidden_layers": _MOST_LAYERS, "vocab_size": _MOST_TOKENS}.get(name, _MOST)
        if not optional and (type(value) is not int or not 1 <= value <= most):
            raise refuse(name, f"a positive whole number, up to {most}")
    if "layer_norm_eps" in values:
        epsilon = values["layer_norm_eps"]
        if type(epsilon) is not float or not is_number(epsilon) or not 0 < epsilon < 0.01:
            raise refuse("layer_norm_eps", "a small positive number with a point or an exponent, such as 1e-05")
    if "hidden_act" in values:
        act = values["hidden_act"]
        if not isinstance(act, str) or act not in ACT2FN:
            raise refuse("hidden_act", "the name of an activation, such as quick_gelu, gelu or gelu_pytorch_tanh")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if any(one is not None and (type(one) is not int or one < 0) for one in several):
            raise refuse(name, "the id of a token")


def _problem(values: dict[str, Any]) -> Exception | None:
    """The error of building a model without memory for its weights, if there is one."""
    try:
        settings = AutoConfig.for_model(**copy.deepcopy(values))
        with torch.device("meta"):
            AutoModel.from_config(settings)
    # As above.
    except Exception as error:
        return error
    return None


def _culprit(values: dict[str, Any]) -> str:
    """The first key without which a model can be built, and its value, for the beginning of a message."""
    for place, key in _keys(values):
        without = copy.deepcopy(values)
        inner = without if place is None else without[place]
        value = inner.pop(key)
        if _problem(without) is None:
            return f"{key if place is None else f'{place}.{key}'} is {short(repr(value))}: "
    return ""


def _keys(values: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    for key in values:
        if key != "model_type":
            yield None, key
    for name in _TOWERS:
        tower = values.get(name)
        for key in tower if isinstance(tower, dict) else ():
            yield name, key
