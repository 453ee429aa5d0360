"""The failure of a row whose image has no pixels, from Pillow's error and the bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image

from pipeline.core.records import Failure
from pipeline.images.bitmaps import looks_like_tga
from pipeline.images.formats import boxes, family
from pipeline.images.jpeg_frame import undecoded
from pipeline.images.tiff import described, is_tiff

_REFUSED = (b"%!PS", b"%PDF", b"SIMPLE  =", b"\xd7\xcd\xc6\x9a", b"\xc5\xd0\xd3\xc6", b"<svg", b"<?xml", b"\x89HDF")
# Raw files of cameras that are no TIFF files: Olympus, Panasonic, Fujifilm, Canon, Sigma, Minolta.
_RAW = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"II\x1a\0\0\0HEAPCCDR", b"FOVb", b"\0MRM")
_KNOWN = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\1\0", b"\0\0\0\x0cjP  ", b"qoif")
# In errors of plugins about variants that they do not decode.
_UNSUPPORTED = (
    *("unknown raw mode", "invalid palette size", "has not been built in", "not supported", "unrecognized image mode"),
    "unknown pcx mode",
)


def too_large(error: Image.DecompressionBombError, most: int) -> Failure:
    """The failure of an image of more pixels than ``most``; Pillow's own message names another limit."""
    found = re.search(r"\((\d+) pixels\)", str(error))
    pixels = f"{int(found[1]):,} pixels" if found else "too many pixels"
    return Failure("too_many_pixels", f"{pixels}, over images.max_pixels={most:,}")


def unidentified(data: bytes, formats: Sequence[str]) -> Failure:
    """The failure of bytes that Pillow does not know, or may not open."""
    head = data[:512].lstrip()
    if data.startswith(_RAW) or data[4:12] == b"ftypcrx ":
        return Failure("unsupported", "the raw file of a camera; export the photo as JPEG or TIFF")
    if head.startswith(_REFUSED):
        return Failure("format_not_allowed", f"starts with {head[:8]!r}; images.formats holds {', '.join(formats)}")
    if "TGA" in formats and looks_like_tga(data):
        return Failure("unsupported", f"a TGA file of kind {data[2]} and {data[16]} bits is not decoded")
    # Pillow's own tests of the first bytes; the plugins themselves do not read the data.
    for name, (_, accept) in Image.OPEN.items():
        with suppress(IndexError, struct.error):
            if name not in formats and accept is not None and accept(data[:16]) is True:
                return Failure("format_not_allowed", f"{name} is not among images.formats")
    if _ends_early(data):
        return Failure("truncated", "shorter than its header says")
    if reason := _variant(data):
        return Failure("unsupported", reason)
    if head.startswith(_KNOWN) or family(data) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return Failure("corrupt", "the header is damaged")
    return Failure("not_an_image", f"no known image format; starts with {data[:8]!r}")


def _variant(data: bytes) -> str | None:
    """The variant of a file that is sound for all that is known, and that is not decoded."""
    if is_tiff(data):
        layout = described(data)
        return f"a TIFF file of this layout is not decoded: {layout}" if layout else None
    if data[12:16] == b"CgBI":
        return "a PNG file as iOS packs it (CgBI) is not decoded"
    if data[:2] in (b"P7", b"PF", b"Pf"):
        return f"the format {data[:2].decode()} of PNM files is not decoded"
    return undecoded(data) if data.startswith(b"\xff\xd8") else None


def _ends_early(data: bytes) -> bool:
    """True if a PNG, WebP or TIFF file or one of boxes is shorter than its header says; Pillow does not check this."""
    if data[:4] == b"\x89PNG":
        return b"IEND" not in data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data[:4] in (b"II*\0", b"MM\0*"):
        return len(data) <= int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
    if data[:4] == b"\xff\x4f\xff\x51":
        return b"\xff\xd9" not in data[-64:]
    if data[4:8] not in (b"ftyp", b"jP  ", b"JXL "):
        return False
    return any(end > len(data) for _, _, end in boxes(data))


def damaged(error: Exception, data: bytes) -> Failure:
    """The failure of a file for which a plugin of Pillow raised ``error``."""
    text = str(error).strip() or type(error).__name__
    lowered = text.lower()
    # The last two are torch's.
    if any(words in lowered for words in ("out of memory", "can't allocate memory", "bad_alloc")):
        return Failure("out_of_memory", text)
    if (
        "truncated" in lowered
        or "not enough image data" in lowered
        or "premature" in lowered
        or "unexpected end of file" in lowered
        or isinstance(error, EOFError)
        or _ends_early(data)
    ):
        return Failure("truncated", text)
    # Not of the file, but of what Pillow, libheif and libtiff make of it.
    if lowered.startswith("unsupported") or any(words in lowered for words in _UNSUPPORTED):
        return Failure("unsupported", text)
    if reason := None if is_tiff(data) else _variant(data):
        return Failure("unsupported", reason)
    return Failure("corrupt", text)
