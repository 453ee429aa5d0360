"""A checkpoint's ``preprocessor_config.json`` as a :class:`~pipeline.core.records.PreprocessSpec`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import ModelError
from pipeline.core.records import PreprocessSpec
from pipeline.models.architectures import CLIP_PREPROCESSOR, SIGLIP_PREPROCESSOR

# The defaults of transformers' image processors.
_DEFAULTS = {"clip": CLIP_PREPROCESSOR, "chinese_clip": CLIP_PREPROCESSOR, "siglip": SIGLIP_PREPROCESSOR}
# Families whose processors crop by default, and read a bare size as the shorter edge.
_CROPPED = ("clip", "chinese_clip")


def read_spec(folder: Path, family: str) -> PreprocessSpec:
    """The spec of the checkpoint in ``folder``.

    Raises:
        ModelError: no such file, or a step in it is not supported.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            values = json.loads(path.read_text())
            nested = values.get("image_processor")
            if nested is not None or name == "preprocessor_config.json":
                return to_spec(nested or values, family, str(path))
    raise ModelError(
        f"{folder}: no preprocessor_config.json; without it the size and the colours are unknown that the "
        "model was trained on; copy it from the original checkpoint"
    )


def to_spec(values: Mapping[str, Any], family: str, place: str) -> PreprocessSpec:
    """Interpret the values as transformers does, legacy spellings included."""
    merged = {**_DEFAULTS[family], **{key: value for key, value in values.items() if value is not None}}
    for step, wanted in (("do_resize", True), ("do_rescale", True), ("do_pad", False)):
        if merged.get(step, wanted) is not wanted:
            raise ModelError(f"{place}: {step}={merged[step]} is not supported")
    if abs(merged.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ModelError(f"{place}: rescale_factor={merged['rescale_factor']} is not supported, only 1/255")
    normalised = merged.get("do_normalize", True)
    cropped = merged.get("do_center_crop", family in _CROPPED)
    resize = _resize(merged["size"], family, place)
    crop = _pair(merged["crop_size"], place) if cropped else None
    if isinstance(resize, int) and crop is None:
        raise ModelError(f"{place}: a resize of the shorter edge needs a centre crop to give one fixed size")
    return PreprocessSpec(
        resize=resize,
        crop=crop,
        resample=int(merged["resample"]),
        mean=_triple(merged["image_mean"], place) if normalised else (0.0, 0.0, 0.0),
        std=_triple(merged["image_std"], place) if normalised else (1.0, 1.0, 1.0),
    )


def _resize(size: Any, family: str, place: str) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size if family in _CROPPED else (size, size)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _pair(size, place)


def _pair(size: Any, place: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    raise ModelError(f"{place}: cannot read the size {size!r}")


def _triple(values: Any, place: str) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 3:
        raise ModelError(f"{place}: wanted three numbers for mean and std, got {values!r}")
    return numbers[0], numbers[1], numbers[2]
