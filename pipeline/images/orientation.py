"""The orientation of an image, and two facts of decoding that all decoders share."""

from __future__ import annotations

import struct
import zlib

from PIL import ExifTags, Image, ImageOps

# An image above this is decoded alone, so that several threads cannot hold several of them at once.
LARGE_PIXELS = 16_000_000
# The exceptions of Pillow's plugins on damaged files.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, or as it is where that cannot be read."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image
