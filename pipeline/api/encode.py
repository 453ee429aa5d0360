"""Encoding of images in memory to image files with the same pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import ManifestError

# Modes that PNG holds without conversion; TIFF holds the others: CMYK, LAB, YCbCr, floats.
_PNG = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_ORIENTATION = 0x0112


def encode(picture: object, name: str) -> bytes:
    """Encode a PIL image or a uint8 array ``[H, W, 3]`` (``[H, W]``, ``[H, W, 4]``) without loss; bytes are unchanged.

    The EXIF orientation of a PIL image is kept. ``name`` is the image in error messages.

    Raises:
        ManifestError: it is none of these.
    """
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, name)
    if not isinstance(picture, Image.Image):
        raise ManifestError(
            f"{name}: {type(picture).__name__} is not an image; give paths, encoded bytes, PIL images, or uint8 "
            "arrays [height, width, 3]"
        )
    buffer = io.BytesIO()
    if picture.mode in _PNG:
        options: dict[str, Any] = {"format": "PNG", "compress_level": 1}
    else:
        options = {"format": "TIFF"}
    try:
        orientation = picture.getexif().get(_ORIENTATION)
        if orientation is not None:
            options["exif"] = Image.Exif()
            options["exif"][_ORIENTATION] = orientation
        picture.save(buffer, **options)
    # Pillow raises any of these for damaged data that it reads only now.
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise ManifestError(f"{name}: a PIL image of mode {picture.mode} cannot be encoded ({error})") from error
    return buffer.getvalue()


def _from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    flat = array.ndim == 2
    if array.dtype != np.uint8 or not (flat or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ManifestError(
            f"{name}: an array of {array.dtype} {list(array.shape)} is not an image; wanted uint8 [height, width, 3], "
            "with values from 0 to 255 and the colours last"
        )
    return Image.fromarray(np.ascontiguousarray(array))
