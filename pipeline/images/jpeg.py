"""JPEG files to pixels by simplejpeg (libjpeg-turbo), where it decodes without a warning.

A file that Pillow would refuse is never read here: Pillow has read the header before, a file is accepted only if its
pixels have the size in the header, and the first warning of libjpeg-turbo leaves the file to Pillow, which then
decides. For a file that ends early, or whose data is damaged, simplejpeg warns where Pillow raises an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.images.jpeg_frame import ORDINARY, frame

# Scales of the inverse DCT that have vector code; the eighths between them take longer than the next larger one.
_SCALES = (8, 4, 2)


def takes(data: bytes, image: Image.Image) -> bool:
    """True if a file is an ordinary JPEG; ``image`` is the same file, opened by Pillow and not loaded yet."""
    return image.mode in ("RGB", "L") and _is_ordinary(data, image)


def _is_ordinary(data: bytes, image: Image.Image) -> bool:
    if not isinstance(image, JpegImageFile):
        return False
    return [tile.offset for tile in image.tile] == [0] and frame(data)[0] in ORDINARY


def decode(data: bytes, size: tuple[int, int], *, scale: int = 1) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG file as it is stored, uint8 ``[H, W, 3]``; None where Pillow has to decode it.

    Args:
        data: the file, for which :func:`takes` is true.
        size: the width and height that Pillow found.
        scale: what width and height are divided by, and then rounded up: 1, 2, 4 or 8.

    Raises:
        MemoryError: there is no memory for the pixels.
    """
    width, height = size
    wanted = (-(-height // scale), -(-width // scale), 3)
    # Without a scale no minimum: of a picture of a few pixels seven eighths are, rounded up, as many.
    least = {"min_height": wanted[0], "min_width": wanted[1]} if scale > 1 else {}
    try:
        # A file may hold a second frame, of another size than the one that was checked.
        if tuple(simplejpeg.decode_jpeg_header(data, strict=True)[:2]) != (height, width):
            return None
        pixels: Any = simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape == wanted else None


def is_whole(data: bytes, image: Image.Image) -> bool:
    """True if every block of a file was there, for all that libjpeg-turbo says.

    CMYK with subsampled inks, which simplejpeg does not decode, is not whole. ``image`` is as for :func:`takes`.

    Raises:
        MemoryError: there is no memory for the pixels.
    """
    try:
        if not _is_ordinary(data, image) or simplejpeg.decode_jpeg_header(data, strict=True)[:2] != image.size[::-1]:
            return False
        # At an eighth of the size: the data of the scans is read all the same.
        colours = "CMYK" if image.mode == "CMYK" else "RGB"
        simplejpeg.decode_jpeg(data, colours, strict=True, min_height=1, min_width=1)
    except (ValueError, RuntimeError):
        return False
    return True


def scale_for(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The largest of 8, 4, 2 and 1 that divides ``size`` into no less than ``least`` on either axis."""
    fits = (scale for scale in _SCALES if all(have >= scale * want for have, want in zip(size, least, strict=True)))
    return next(fits, 1)
