"""The transparency that Pillow leaves out of an image, or finds where there is none."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from pipeline.core.records import Failure
from pipeline.images.bitmaps import has_attribute_bit, holds_png, icon_mask

Box = tuple[int, int, int, int]
# Formats whose writers left the fourth byte of a pixel empty, as a rule with zeros.
_OFTEN_EMPTY = ("BMP", "DIB", "ICO", "TGA")
_PNG_DEPTH = 24
# Factors from samples of so many bits to eight, as Pillow expands them.
_STEPS = {2: 85, 4: 17}


def frame_of(image: Image.Image) -> Box | None:
    """The part of a GIF's screen that its first frame fills; ``image`` is not loaded yet."""
    return image.tile[0].extents if isinstance(image, GifImageFile) and image.tile else None


def settled(image: Image.Image, data: bytes, frame: Box | None) -> Image.Image | Failure:
    """The loaded image with the transparency that its file means, or the failure of one that decoders disagree about.

    Args:
        image: as Pillow loaded it from ``data``.
        data: the file.
        frame: of :func:`frame_of`.
    """
    if image.mode in ("La", "RGBa"):
        return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.format == "PNG" and "transparency" in image.info:
        return _with_key(image, data)
    if frame is not None and frame != (0, 0, *image.size) and "transparency" not in image.info:
        return _on_screen(image, frame)
    reading = image.info.get("reading")
    if image.format in _OFTEN_EMPTY or (reading is not None and reading.vague_alpha):
        return _without_empty_alpha(image, data)
    return image


def _with_key(image: Image.Image, data: bytes) -> Image.Image:
    """Pillow compares the clear colour of 2, 4 and 16 bits with samples that it has brought to 8."""
    depth, key = data[_PNG_DEPTH], image.info["transparency"]
    if image.mode == "L" and depth in _STEPS and isinstance(key, int):
        image.info["transparency"] = (key & (2**depth - 1)) * _STEPS[depth]
    if image.mode != "RGB" or depth != 16:
        return image
    with Image.open(io.BytesIO(data), formats=("PNG",)) as low:
        # The low bytes of the samples, which stand where those of the other byte order have the high ones.
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
        planes = zip(image.split(), low.split(), key, strict=True)
        alike = [_equal(high, value >> 8) & _equal(rest, value & 255) for high, rest, value in planes]
    result = image.copy()
    del result.info["transparency"]
    result.putalpha(Image.fromarray(np.where(alike[0] & alike[1] & alike[2], 0, 255).astype(np.uint8)))
    return result


def _equal(plane: Image.Image, value: int) -> NDArray[np.bool_]:
    alike: NDArray[np.bool_] = np.asarray(plane) == value
    return alike


def _on_screen(image: Image.Image, frame: Box) -> Image.Image:
    """A frame on a screen without colour, as browsers show it; Pillow fills the screen with the first colour."""
    result = image.convert("RGBA")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, frame)
    result.putalpha(alpha)
    return result


def _without_empty_alpha(image: Image.Image, data: bytes) -> Image.Image | Failure:
    if not image.has_transparency_data or (image.format == "ICO" and holds_png(image, data)):
        return image
    rgba = image.convert("RGBA")
    extrema = rgba.getchannel("A").getextrema()
    if extrema == (0, 255) and image.format == "TGA" and has_attribute_bit(data):
        return Failure("unsupported", "a TGA file of 16 bits whose attribute bit varies: decoders disagree about it")
    if extrema != (0, 0):
        return image
    rgb = rgba.convert("RGB")
    rgb.info = {key: value for key, value in image.info.items() if key != "transparency"}
    mask = icon_mask(image, data) if image.format == "ICO" else None
    if mask is not None:
        rgb.putalpha(mask)
    return rgb
