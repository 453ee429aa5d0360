"""The decoders ``fast`` and ``scaled``: JPEG by simplejpeg, resizing by torch, everything else as ``exact`` does.

An image is brought to the size that the model's preprocessing resizes it to, as it is stored; turning and cropping the
small picture is left to the code of ``exact``.

- ``fast``: the pixels of Pillow's decoder, resized to within 2 levels of Pillow's.
- ``scaled``: JPEG files are decoded at a half, a quarter or an eighth of their size where both sides stay at twice the
  wanted length or more, and the picture is not small already.

Pillow resizes strips, images over ``LARGE_PIXELS`` that it has decoded itself (a copy of one would take more memory
than ``exact``), and all images where the model wants another filter than bilinear or bicubic, which it then decodes
too. torch resizes in the calling thread, where the processor has AVX2.

Importing this imports torch.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from pipeline.core.records import Pixels, PreprocessSpec
from pipeline.images import jpeg
from pipeline.images.orientation import LARGE_PIXELS, upright
from pipeline.images.preprocess import centre_crop, is_strip, preprocess, resized_size

# Filters of Pillow that torch has too.
_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
# A scaled decode keeps both sides at this many times the wanted length.
OVERSAMPLED = 2
# Pictures of fewer pixels are decoded whole, in about a millisecond. They could be scaled for small models only, which
# lose most by it: the demo model's cosines of photos of 0.2 megapixels, a quarter scale, went down to 0.987.
LEAST_PIXELS = 500_000
# Keeps a product that should be a whole number from falling short of it, and moves no pixel by a hundredth.
_UPWARD = 1 + 1e-6


def read(data: bytes, image: Image.Image, spec: PreprocessSpec, *, scaled: bool, turned: bool) -> Pixels | None:
    """The pixels of a JPEG file; None where Pillow has to decode it, as all other files.

    Args:
        data: the file.
        image: the same, opened by Pillow and not loaded yet.
        spec: what the model wants.
        scaled: decode at a smaller scale where that is large enough.
        turned: turn it as its metadata says.

    Raises:
        MemoryError, RuntimeError: there is no memory for it.
    """
    if not (_takes(image.size, spec) and jpeg.takes(data, image)):
        return None
    # Not before: reading the metadata of a damaged PNG loads it, and the damage is reported once.
    size = resized_size(image.size, spec)
    sideways = turned and _swaps_sides(image)
    if sideways:
        width, height = resized_size((image.height, image.width), spec)
        size = height, width
    scaled = scaled and image.width * image.height >= LEAST_PIXELS
    scale = jpeg.scale_for(image.size, (OVERSAMPLED * size[0], OVERSAMPLED * size[1])) if scaled else 1
    rgb = jpeg.decode(data, image.size, scale=scale)
    if rgb is None:
        return None
    extent = image.width / scale, image.height / scale
    small = resize(rgb, size, spec.resample, extent=extent, sideways=sideways)
    if turned and _orientation(image) != 1:
        stored = Image.fromarray(small)
        stored.info = image.info
        small = np.asarray(upright(stored))
    return centre_crop(small, spec)


def shrink(image: Image.Image, spec: PreprocessSpec) -> Pixels:
    """The pixels of an RGB image that Pillow decoded, and resizes too where torch does not.

    Raises:
        MemoryError, RuntimeError: there is no memory for it.
    """
    size = resized_size(image.size, spec)
    if image.size == size or image.width * image.height > LARGE_PIXELS or not _takes(image.size, spec):
        return preprocess(image, spec)
    return centre_crop(resize(np.array(image), size, spec.resample, extent=image.size), spec)


def resize(
    rgb: NDArray[np.uint8],
    size: tuple[int, int],
    resample: int,
    *,
    extent: tuple[float, float],
    sideways: bool = False,
) -> NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` to ``size`` (width, height), antialiased as Pillow does it.

    Args:
        rgb: the pixels.
        size: what they become.
        resample: Pillow's number of the filter.
        extent: width and height of the picture in pixels of ``rgb``: a scaled decode is rounded up, so that its last
            column and row may stand for less than a whole pixel.
        sideways: the rows of the upright picture are columns of ``rgb``.

    Raises:
        RuntimeError: there is no memory for it.
    """
    height, width = rgb.shape[:2]
    if (width, height) == size:
        return rgb
    mode = _MODES[Image.Resampling(resample)]
    # The new axis goes first: torch would take the strides of [None] behind a permute for those of planes.
    pixels = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)
    if sideways:
        vertical_first = not _vertical_first((height, width), size[::-1])
    else:
        vertical_first = _vertical_first((width, height), size)
    if vertical_first:
        pixels = _interpolate(pixels, (width, size[1]), (width, extent[1]), mode)
        extent = extent[0], size[1]
    resized: NDArray[np.uint8] = _interpolate(pixels, size, extent, mode)[0].permute(1, 2, 0).numpy()
    return resized


def _vertical_first(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """True if Pillow 13 begins with the columns; torch always begins with the rows.

    Each pass rounds and cuts off what is darker than black, so that the order shows where there are sharp edges.
    """
    (width, height), (new_width, new_height) = size, wanted
    return new_height < height and height - new_height > 2 * (width - new_width)


def _interpolate(pixels: torch.Tensor, size: tuple[int, int], extent: tuple[float, float], mode: str) -> torch.Tensor:
    have = pixels.shape[:1:-1]
    if extent == have:
        return interpolate(pixels, size=size[::-1], mode=mode, antialias=True)
    # torch makes as many pixels as there are in the product, rounded down.
    factors = [1.0 if w == h else _UPWARD * w / e for w, h, e in zip(size, have, extent, strict=True)]
    return interpolate(pixels, scale_factor=factors[::-1], mode=mode, antialias=True)


def warm_up() -> None:
    """Call every function of the libraries once, so that nothing is loaded later.

    Raises:
        RuntimeError, ValueError: simplejpeg or torch does not work here.
    """
    grey = np.full((32, 48, 3), 128, dtype=np.uint8)
    rgb = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey), "RGB")
    for mode in _MODES:
        for size in ((12, 8), (60, 40)):
            resize(rgb, size, mode, extent=(48, 32))


def _takes(size: tuple[int, int], spec: PreprocessSpec) -> bool:
    return spec.resample in _MODES and not is_strip(size, spec)


def _swaps_sides(image: Image.Image) -> bool:
    """True if the orientation of ``image`` swaps width and height; tried on an image of two pixels."""
    if _orientation(image) == 1:
        return False
    probe = Image.new("L", (2, 1))
    probe.info = image.info.copy()
    return upright(probe).size == (1, 2)


def _orientation(image: Image.Image) -> object:
    """1 if the image is upright as it is stored; other values are interpreted by :func:`upright`."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Damaged metadata raises errors of many types, and is ignored.
        return None
