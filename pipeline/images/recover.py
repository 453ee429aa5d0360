"""Files that Pillow refuses though their pixels are there: a JPEG without its end, a PNG with much text, some TGA."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from pipeline.core.records import Failure
from pipeline.images.bitmaps import without_runs
from pipeline.images.jpeg_frame import has_all_scans
from pipeline.images.orientation import DAMAGE

_PNG, _JPEG, _END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
# Text and colour profiles, none of which changes a pixel here.
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# The least header of a PNG chunk, and its checksum.
_HEAD, _CHECKSUM = 8, 4


def recover(data: bytes, failure: Failure) -> bytes | None:
    """The file without what it was refused for; None if the failure has another cause.

    Raises:
        MemoryError: there is no memory to find out.
    """
    if failure.status == "truncated" and data.startswith(_JPEG):
        return _with_end(data)
    if failure.status == "corrupt" and data.startswith(_PNG):
        return _without_metadata(data)
    if failure.error.startswith("buffer overrun"):
        return without_runs(data)
    return None


def _with_end(data: bytes) -> bytes | None:
    """A JPEG with the marker of its end, where that alone is missing: every block was there."""
    if data.endswith(_END) or not has_all_scans(data):
        return None
    from pipeline.images import jpeg

    whole = data + (_END[1:] if data.endswith(_END[:1]) else _END)
    try:
        with Image.open(io.BytesIO(whole), formats=("JPEG",)) as image:
            # libjpeg-turbo tells of a block that was not there, which Pillow does not pass on.
            found = jpeg.is_whole(whole, image)
    except (UnidentifiedImageError, Image.DecompressionBombError, *DAMAGE):
        return None
    return whole if found else None


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG without text and colour profile; Pillow refuses those that unpack to more than a mebibyte."""
    kept, position = [_PNG], len(_PNG)
    while position + _HEAD + _CHECKSUM <= len(data):
        end = position + _HEAD + int.from_bytes(data[position : position + 4], "big") + _CHECKSUM
        if data[position + 4 : position + _HEAD] not in _METADATA:
            kept.append(data[position:end])
        position = end
    lean = b"".join(kept)
    return lean if len(lean) < len(data) else None
