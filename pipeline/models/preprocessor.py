"""A checkpoint's ``preprocessor_config.json`` as a :class:`~pipeline.core.records.PreprocessSpec`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.core.records import PreprocessSpec
from pipeline.models.architectures import (
    CLIP_PREPROCESSOR,
    DINOV3_PREPROCESSOR,
    SIGLIP_PREPROCESSOR,
    VIT_PREPROCESSOR,
)
from pipeline.models.files import is_number, read_json

# Families whose processors crop by default, and read a bare size as the shorter edge. DINOv2's is BiT's, with the
# defaults of CLIP's.
_CROPPED = ("clip", "chinese_clip", "metaclip_2", "clip_vision_model", "dinov2", "dinov2_with_registers")
# The defaults of transformers' image processors.
_DEFAULTS = {
    **dict.fromkeys(_CROPPED, CLIP_PREPROCESSOR),
    **dict.fromkeys(("siglip", "siglip_vision_model"), SIGLIP_PREPROCESSOR),
    **dict.fromkeys(("vit", "ijepa"), VIT_PREPROCESSOR),
    "dinov3_vit": DINOV3_PREPROCESSOR,
}
# The filters of Pillow by number: nearest, Lanczos, bilinear, bicubic, box, Hamming.
_FILTERS = range(6)
# No picture of a model is larger.
_MOST_PIXELS = 16_384
log = logging.getLogger(__name__)


def read_spec(folder: Path, family: str) -> PreprocessSpec:
    """The spec of the checkpoint in ``folder``: from ``image_processor`` of ``processor_config.json``, if it is there.

    transformers reads the files in this order, since it writes the nested one today, beside one of another time.

    Raises:
        ModelError: no such file, or a step in it is not supported.
    """
    found: dict[str, Mapping[str, Any]] = {}
    nested, single = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.is_file():
        values = read_json(nested).get("image_processor")
        if values is not None and not isinstance(values, Mapping):
            raise ModelError(f"{nested}: image_processor is {values!r:.80}; wanted an object")
        if values is not None:
            found[f"{nested}: image_processor"] = values
    if single.is_file():
        found[str(single)] = read_json(single)
    if not found:
        raise ModelError(
            f"{folder}: no preprocessor_config.json; without it the size and the colours are unknown that the "
            "model was trained on; copy it from the original checkpoint"
        )
    (place, values), *others = found.items()
    spec = to_spec(values, family, place)
    for other, stale in others:
        if _differs(spec, stale, family, other):
            log.warning("%s: is not read, since %s says something else, and transformers reads that", other, place)
    return spec


def _differs(spec: PreprocessSpec, values: Mapping[str, Any], family: str, place: str) -> bool:
    try:
        return to_spec(values, family, place) != spec
    except ModelError:
        return True


def to_spec(values: Mapping[str, Any], family: str, place: str) -> PreprocessSpec:
    """Interpret the values as transformers does, legacy spellings included."""
    merged = {**_DEFAULTS[family], **{key: value for key, value in values.items() if value is not None}}
    for step, wanted in (("do_resize", True), ("do_rescale", True), ("do_pad", False)):
        if merged.get(step, wanted) is not wanted:
            raise ModelError(f"{place}: {step}={merged[step]} is not supported")
    factor = merged.get("rescale_factor", 1 / 255)
    if not is_number(factor) or abs(factor - 1 / 255) > 1e-9:
        raise ModelError(f"{place}: rescale_factor={factor!r} is not supported, only 1/255")
    normalised = _flag(merged, "do_normalize", True, place)
    cropped = _flag(merged, "do_center_crop", family in _CROPPED, place)
    resize = _resize(merged["size"], family, place)
    crop = _pair(merged["crop_size"], "crop_size", place) if cropped else None
    if isinstance(resize, int) and crop is None:
        raise ModelError(f"{place}: a resize of the shorter edge needs a centre crop to give one fixed size")
    resample = merged["resample"]
    if type(resample) is not int or resample not in _FILTERS:
        raise ModelError(f"{place}: resample is {resample!r:.80}; wanted a filter of Pillow's, such as 3 (bicubic)")
    mean, std = (_triple(merged[name], name, place) for name in ("image_mean", "image_std"))
    if not all(value > 0 for value in std):
        raise ModelError(f"{place}: image_std is {std}; wanted three positive numbers")
    return PreprocessSpec(
        resize=resize,
        crop=crop,
        resample=resample,
        mean=mean if normalised else (0.0, 0.0, 0.0),
        std=std if normalised else (1.0, 1.0, 1.0),
    )


def _flag(values: Mapping[str, Any], name: str, default: bool, place: str) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ModelError(f"{place}: {name} is {value!r:.80}; wanted true or false")
    return value


def _resize(size: Any, family: str, place: str) -> int | tuple[int, int]:
    if isinstance(size, int) and family in _CROPPED:
        return _side(size, "size", place)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return _side(size["shortest_edge"], "size.shortest_edge", place)
    return _pair(size, "size", place)


def _pair(size: Any, name: str, place: str) -> tuple[int, int]:
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return _side(size["height"], f"{name}.height", place), _side(size["width"], f"{name}.width", place)
    if not isinstance(size, int):
        raise ModelError(f"{place}: cannot read the size {name}={size!r:.80}; wanted height and width")
    return _side(size, name, place), _side(size, name, place)


def _side(value: Any, name: str, place: str) -> int:
    if type(value) is not int or not 0 < value <= _MOST_PIXELS:
        raise ModelError(f"{place}: {name} is {value!r:.80}; wanted a positive whole number of pixels")
    return value


def _triple(values: Any, name: str, place: str) -> tuple[float, float, float]:
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(is_number, values)):
        raise ModelError(f"{place}: {name} is {values!r:.80}; wanted three numbers, one for each colour")
    return float(values[0]), float(values[1]), float(values[2])
