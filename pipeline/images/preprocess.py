"""An RGB image to the model's pixels: resize and centre crop, as CLIP's reference does, bit for bit."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from pipeline.records import Pixels, PreprocessSpec

# A strip this much longer than the crop is cut before it is resized: a picture of 1 x 100,000 pixels
# would otherwise grow to 224 x 22,400,000. What is cut is out of the reach of the filter.
LONGEST = 16


def preprocess(image: Image.Image, spec: PreprocessSpec) -> Pixels:
    """uint8 ``[H, W, 3]`` at ``spec.size``.

    The shorter edge becomes ``spec.resize`` and the longer one keeps the ratio, rounded down; the crop's
    corner is ``(length - crop) / 2`` rounded down; where the image is smaller than the crop, black is
    added. Source: openai/CLIP ``_transform`` and transformers' ``CLIPImageProcessorPil``.
    """
    resample = Image.Resampling(spec.resample)
    if isinstance(spec.resize, tuple):
        height, width = spec.resize
    else:
        image = _without_far_ends(image, spec)
        short, long = sorted(image.size)
        scaled = int(spec.resize * long / short)
        width, height = (spec.resize, scaled) if image.width <= image.height else (scaled, spec.resize)
    resized = image if image.size == (width, height) else image.resize((width, height), resample)
    return Pixels(rgb=_centre_crop(np.asarray(resized), spec.size))


def _without_far_ends(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    short, long = sorted(image.size)
    if spec.crop is None or long <= LONGEST * short:
        return image
    keep = math.ceil(LONGEST * short / 2) * 2
    start = (long - keep) // 2
    if image.width > image.height:
        return image.crop((start, 0, start + keep, image.height))
    return image.crop((0, start, image.width, start + keep))


def _centre_crop(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if rgb.shape[:2] == size:
        return rgb
    for axis, wanted in enumerate(size):
        have = rgb.shape[axis]
        if have >= wanted:
            start = (have - wanted) // 2
            rgb = rgb[start : start + wanted] if axis == 0 else rgb[:, start : start + wanted]
        else:
            before = math.ceil((wanted - have) / 2)
            margins = [(0, 0), (0, 0), (0, 0)]
            margins[axis] = (before, wanted - have - before)
            rgb = np.pad(rgb, margins)
    return rgb
