"""The ``open_clip_config.json`` of a checkpoint: its values, checked before open_clip sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError, short
from pipeline.core.records import PreprocessSpec
from pipeline.models.architectures import BICUBIC, BILINEAR, OPENAI_MEAN, OPENAI_STD
from pipeline.models.files import OPEN_CLIP_CONFIG, is_number, read_json

# No model is larger: a slip of the pen would take all memory, and layers all time, before an error.
_MOST, _MOST_LAYERS, _MOST_TOKENS = 100_000, 1_000, 10_000_000
# Models of timm go by plain names; one with a prefix (hf-hub:, local-dir:) reads other files.
_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
# The filters of pictures that are not in training; open_clip takes the bicubic one for "random".
_FILTERS = {"bicubic": BICUBIC, "random": BICUBIC, "bilinear": BILINEAR}
# Keys for loading other weights and for training, which decide no embedding.
TRAINING = (
    *("timm_model_pretrained", "hf_model_pretrained", "timm_drop", "timm_drop_path", "patch_dropout"),
    *("output_tokens", "init_logit_scale"),
)
Check = tuple[str, Callable[[Any], bool]]


def _whole(most: int, least: int = 1) -> Check:
    return (
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _one_of(*names: Any) -> Check:
    return f"one of {', '.join(map(repr, names))}", lambda value: any(value is name or value == name for name in names)


def _layers(value: Any) -> bool:
    several = value if isinstance(value, list) and len(value) == 4 else [value]
    return all(type(one) is int and 1 <= one <= _MOST_LAYERS for one in several)


def _options(name: str, right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and set(value) <= {name} and all(map(right, value.values())))
    )


_SIZE, _FLAG = _whole(_MOST), ("true or false", lambda value: isinstance(value, bool))
_NUMBER: Check = ("a number", is_number)
_POSITIVE: Check = ("a positive number", lambda value: is_number(value) and 0 < value <= _MOST)
_SHARE: Check = ("a number from 0 to 1, or null", lambda value: value is None or (is_number(value) and 0 <= value <= 1))
_LAYERSCALE: Check = ("a number, or null", lambda value: value is None or is_number(value))
_BLOCKS: dict[str, Check] = {
    "mlp_ratio": _POSITIVE,
    "ls_init_value": _LAYERSCALE,
    "norm_kwargs": (
        "null, or an object with eps, a small positive number",
        _options("eps", lambda value: is_number(value) and 0 < value < 0.01),
    ),
    "act_kwargs": (
        "null, or an object with approximate, which is none or tanh",
        _options("approximate", lambda value: value in ("none", "tanh")),
    ),
    "block_type": _one_of(None, "default", "custom"),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), _FLAG
    ),
}
_TEXT: dict[str, Check] = {
    **_BLOCKS,
    **dict.fromkeys(("context_length", "width", "heads"), _SIZE),
    "layers": _whole(_MOST_LAYERS),
    "vocab_size": _whole(_MOST_TOKENS),
    "hf_tokenizer_name": ("a name, or null", lambda value: value is None or isinstance(value, str)),
    "tokenizer_mode": _one_of(None, "", "clips"),
    "tokenizer_kwargs": ("an object, or null", lambda value: value is None or isinstance(value, dict)),
    **dict.fromkeys(
        ("embed_cls", "no_causal_mask", "final_ln_after_pool", "proj_bias", "output_tokens", "hf_model_pretrained"),
        _FLAG,
    ),
    **dict.fromkeys(("pad_id", "eos_id"), _whole(_MOST_TOKENS, least=0)),
    "pool_type": _one_of("first", "last", "argmax", "eos"),
    "proj_type": _one_of("linear", "none"),
    "hf_model_name": ("a name, or null", lambda value: value is None or isinstance(value, str)),
    "hf_proj_type": _one_of(None, "linear", "mlp"),
    "hf_pooler_type": _one_of(None, "mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"),
}
_VISION: dict[str, Check] = {
    **_BLOCKS,
    "layers": ("a positive whole number, or four of a ResNet", _layers),
    **dict.fromkeys(("width", "head_width", "image_size", "attn_pooler_queries", "attn_pooler_heads"), _SIZE),
    # Of no use to a ResNet.
    "patch_size": (f"{_SIZE[0]}, or null", lambda value: value is None or _SIZE[1](value)),
    "patch_dropout": _SHARE,
    "attentional_pool": _one_of(True, False, "parallel", "cascade"),
    **dict.fromkeys(("no_ln_pre", "final_ln_after_pool", "output_tokens", "timm_proj_bias"), _FLAG),
    "timm_model_pretrained": _FLAG,
    "pos_embed_type": _one_of("learnable", "sin_cos_2d"),
    "pool_type": _one_of("tok", "avg"),
    "timm_model_name": (
        "the name of a model of timm, without a prefix",
        lambda value: value is None or (isinstance(value, str) and _TIMM_NAME.fullmatch(value) is not None),
    ),
    "timm_pool": ("a name, or an empty text", lambda value: isinstance(value, str)),
    "timm_proj": _one_of(None, "", "linear", "mlp", "none"),
    **dict.fromkeys(("timm_drop", "timm_drop_path"), _SHARE),
}
_MODEL: dict[str, Check] = {
    "embed_dim": _SIZE,
    **dict.fromkeys(("quick_gelu", "custom_text", "nonscalar_logit_scale"), _FLAG),
    "init_logit_scale": _NUMBER,
    "init_logit_bias": ("a number, or null", lambda value: value is None or is_number(value)),
}
_TOWERS = {"vision_cfg": _VISION, "text_cfg": _TEXT}
# A decoder of captions, which embeds nothing.
_DECODER = {**_TEXT, "dim_head": _SIZE, "n_queries": _SIZE, "attn_pooler_heads": _SIZE}


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model_cfg`` and ``preprocess_cfg`` of the config in ``folder``.

    Raises:
        ModelError: with the key whose value open_clip would not take, or that reads other files or runs code.
    """
    path = folder / OPEN_CLIP_CONFIG
    whole = read_json(path)
    model, pictures = whole.get("model_cfg"), whole.get("preprocess_cfg")
    if not isinstance(model, dict):
        raise ModelError(
            f"{path}: model_cfg is {short(repr(model))}; wanted an object with embed_dim, vision_cfg and text_cfg, as "
            "open_clip's push_to_hf_hub writes it; copy the file from the original checkpoint"
        )
    if pictures is not None and not isinstance(pictures, dict):
        raise ModelError(f"{path}: preprocess_cfg is {short(repr(pictures))}; wanted an object")
    check_model(f"{path}: model_cfg", model)
    return model, pictures or {}


def check_model(place: str, model: Mapping[str, Any]) -> None:
    """Check the values of a ``model_cfg``.

    Raises:
        ModelError: with the key.
    """
    towers = {**_TOWERS, **({"multimodal_cfg": _DECODER} if "multimodal_cfg" in model else {})}
    for name, checks in towers.items():
        tower = model.get(name)
        if not isinstance(tower, dict):
            raise ModelError(f"{place}.{name} is {short(repr(tower))}; wanted an object with the sizes of the tower")
        _check(f"{place}.{name}", tower, checks)
    if "embed_dim" not in model:
        raise ModelError(f"{place}: no embed_dim, the length of an embedding; copy it from the original checkpoint")
    _check(place, {key: value for key, value in model.items() if key not in towers}, _MODEL)


def _check(place: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for key, value in values.items():
        if key not in checks:
            raise ModelError(
                f"{place}.{key}={short(repr(value))} is not known to open_clip 3.3; a newer release may know it: "
                "take the entry out of a copy of the checkpoint if it only concerns training"
            )
        wanted, right = checks[key]
        if not right(value):
            raise ModelError(
                f"{place}.{key} is {short(repr(value))}; wanted {wanted}, as the weights were trained with"
            )


def to_spec(values: Mapping[str, Any], size: tuple[int, int], place: str) -> PreprocessSpec:
    """The preprocessing of a ``preprocess_cfg`` for pictures of ``size`` (height, width), which the model decides.

    As open_clip does it with torchvision: by Pillow's filters, and half of an odd margin rounded to the even number.

    Raises:
        ModelError: with a value that is not supported.
    """
    mode = values.get("resize_mode") or "shortest"
    if mode == "longest":
        raise ModelError(
            f"{place}: resize_mode=longest, pictures with bars at two sides, is not supported; of published "
            "checkpoints none was trained so: shortest (a crop) and squash are"
        )
    if mode not in ("shortest", "squash"):
        raise ModelError(f"{place}: resize_mode is {short(repr(mode))}; wanted shortest or squash")
    if mode == "shortest" and size[0] != size[1]:
        raise ModelError(
            f"{place}: resize_mode=shortest for {size[0]} x {size[1]} pixels is not supported, only for squares; "
            "resize_mode=squash is, if the model was trained so"
        )
    if values.get("mode", "RGB") != "RGB":
        raise ModelError(f"{place}: mode is {short(repr(values['mode']))}; open_clip has RGB alone")
    name = values.get("interpolation") or "bicubic"
    if not isinstance(name, str) or name not in _FILTERS:
        raise ModelError(f"{place}: interpolation is {short(repr(name))}; wanted {' or '.join(_FILTERS)}")
    mean, std = (
        _colours(values.get(key) or default, f"{place}: {key}")
        for key, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD))
    )
    if not all(value > 0 for value in std):
        raise ModelError(f"{place}: std is {std}; wanted three positive numbers")
    square = mode == "shortest"
    return PreprocessSpec(
        resize=size[0] if square else size,
        crop=size if square else None,
        resample=_FILTERS[name],
        mean=mean,
        std=std,
        corner="round" if square else "floor",
    )


def _colours(values: Any, place: str) -> tuple[float, float, float]:
    several = [values] * 3 if is_number(values) else values
    if not isinstance(several, list | tuple) or len(several) != 3 or not all(map(is_number, several)):
        raise ModelError(f"{place} is {short(repr(values))}; wanted three numbers, one for each colour")
    return float(several[0]), float(several[1]), float(several[2])


def facts(model: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a ``model_cfg`` on which embeddings and scores depend."""
    found: dict[str, Any] = {}
    for key, value in sorted(model.items()):
        if isinstance(value, dict) and key in _TOWERS:
            left_out = (*TRAINING, "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
            found[key] = {name: one for name, one in sorted(value.items()) if name not in left_out}
        elif key not in (*TRAINING, "multimodal_cfg", "init_logit_bias"):
            found[key] = value
    found["logit_bias"] = model.get("init_logit_bias") is not None
    return found
