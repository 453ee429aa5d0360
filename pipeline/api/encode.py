"""Pictures in memory as the bytes of a file that holds the same pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import ManifestError

# What PNG holds as it is; TIFF holds the rest: CMYK, LAB, YCbCr, floats.
_PNG = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_ORIENTATION = 0x0112


def encode(picture: object, place: str) -> bytes:
    """Bytes as they are; a PIL image or a uint8 array ``[H, W, 3]`` (``[H, W]``, ``[H, W, 4]``) without loss.

    An EXIF rotation that a PIL image still carries travels with it. ``place`` is for the message.

    Raises:
        ManifestError: it is nothing of the kind.
    """
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, place)
    if not isinstance(picture, Image.Image):
        raise ManifestError(
            f"{place}: {type(picture).__name__} is no image; hand over paths, encoded bytes, PIL images, or uint8 "
            "arrays [height, width, 3]"
        )
    buffer = io.BytesIO()
    if picture.mode in _PNG:
        options: dict[str, Any] = {"format": "PNG", "compress_level": 1}
    else:
        options = {"format": "TIFF"}
    try:
        turned = picture.getexif().get(_ORIENTATION)
        if turned is not None:
            kept = Image.Exif()
            kept[_ORIENTATION] = turned
            options["exif"] = kept
        picture.save(buffer, **options)
    # Pillow raises all of these for damage that it meets late.
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise ManifestError(f"{place}: a PIL image of mode {picture.mode} cannot be kept ({error})") from error
    return buffer.getvalue()


def _from_array(array: np.ndarray[Any, Any], place: str) -> Image.Image:
    flat = array.ndim == 2
    if array.dtype != np.uint8 or not (flat or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ManifestError(
            f"{place}: an array of {array.dtype} {list(array.shape)} is no image; wanted uint8 [height, width, 3], "
            "with values from 0 to 255 and the colours last"
        )
    return Image.fromarray(np.ascontiguousarray(array))
