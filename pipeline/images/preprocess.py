"""An RGB image to the model's pixels: resize and centre crop, as transformers does, bit for bit."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from pipeline.core.records import Pixels, PreprocessSpec

# Of a strip this much longer than it is wide, only what the crop shows is resized: a picture of
# 1 x 100,000 pixels would otherwise grow to 224 x 22,400,000.
LONGEST = 16
# Pillow's widest filter reaches 3 source pixels when it enlarges, and 3 times the scale when it reduces.
REACH = 3


def preprocess(image: Image.Image, spec: PreprocessSpec) -> Pixels:
    """uint8 ``[H, W, 3]`` at ``spec.size``.

    The shorter edge becomes ``spec.resize`` and the longer one keeps the ratio, rounded down; the crop
    begins at half of ``length - crop``; where the image is smaller than the crop, black is added.
    Sources: transformers' ``CLIPImageProcessorPil``, which rounds an odd margin's half down
    (``spec.corner`` is ``floor``), and openai/CLIP's ``_transform``, whose torchvision rounds it to the even
    number (``round``); they differ in nothing else.
    """
    resample = Image.Resampling(spec.resample)
    size = resized_size(image.size, spec)
    if is_strip(image.size, spec):
        resized = _resize_strip(image, size, spec, resample)
    else:
        resized = image if image.size == size else image.resize(size, resample)
    return centre_crop(np.asarray(resized), spec)


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Width and height that an image of ``size`` (width, height) is resized to, before the crop."""
    if isinstance(spec.resize, tuple):
        height, width = spec.resize
        return width, height
    short, long = sorted(size)
    scaled = int(spec.resize * long / short)
    return (spec.resize, scaled) if size[0] <= size[1] else (scaled, spec.resize)


def is_strip(size: tuple[int, int], spec: PreprocessSpec) -> bool:
    """True if an image of ``size`` is so long that only its cropped section is resized."""
    return not isinstance(spec.resize, tuple) and spec.crop is not None and max(size) > LONGEST * min(size)


def _corner(margin: int, rule: str) -> int:
    """First pixel of a crop that leaves ``margin`` pixels on both sides together."""
    return round(margin / 2) if rule == "round" else margin // 2


def _resize_strip(
    image: Image.Image, size: tuple[int, int], spec: PreprocessSpec, resample: Image.Resampling
) -> Image.Image:
    """The centre of ``image`` resized to ``size``, as long as the crop, without computing the rest.

    The same pixels, up to the rounding between Pillow's two passes: it chooses their order by the sizes.
    """
    axis = 0 if image.width > image.height else 1
    shown = min(size[axis], spec.size[1 - axis])
    scale = image.size[axis] / size[axis]
    first = _corner(size[axis] - shown, spec.corner) * scale
    last = first + shown * scale
    margin = REACH * max(1.0, scale) + 1
    start, stop = max(0, math.floor(first - margin)), min(image.size[axis], math.ceil(last + margin))
    if axis == 0:
        part = image.crop((start, 0, stop, image.height))
        return part.resize((shown, size[1]), resample, box=(first - start, 0, last - start, image.height))
    part = image.crop((0, start, image.width, stop))
    return part.resize((size[0], shown), resample, box=(0, first - start, image.width, last - start))


def centre_crop(rgb: np.ndarray, spec: PreprocessSpec) -> Pixels:
    """Centre crop of a resized image, uint8 ``[H, W, 3]``; black outside of the image."""
    for axis, wanted in enumerate(spec.size):
        have = rgb.shape[axis]
        if have >= wanted:
            start = _corner(have - wanted, spec.corner)
            rgb = rgb[start : start + wanted] if axis == 0 else rgb[:, start : start + wanted]
        else:
            before = math.ceil((wanted - have) / 2)
            margins = [(0, 0), (0, 0), (0, 0)]
            margins[axis] = (before, wanted - have - before)
            rgb = np.pad(rgb, margins)
    return Pixels(rgb=rgb)
