"""BMP, ICO and TGA: headers that Pillow misunderstands, and the mask of an icon."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import Image

from pipeline.core.records import Failure

BMP, ICO = b"BM", b"\0\0\1\0"
# The sizes of the headers with which a DIB begins.
DIB = tuple(bytes((size, 0, 0, 0)) for size in (40, 52, 56, 64, 108, 124))
# Bytes of the header of the file, and of the smallest header of a bitmap that counts its colours.
_FILE_HEADER, _INFO_HEADER = 14, 40
_BLACK_AND_WHITE = (b"\0\0\0", b"\xff\xff\xff")
# Fields of it: its size, bits a pixel, colours in the palette.
_FIELDS = (("I", 0), ("H", 14), ("I", 32))
_TGA_HEADER, _TGA_FOOTER = 18, b"TRUEVISION-XFILE.\0"
# Colour-mapped, true-colour and grey, each plain and run-length encoded.
_TGA_KINDS, _TGA_RUNS, _TGA_DEPTHS = (1, 2, 3, 9, 10, 11), 8, (8, 15, 16, 24, 32)


def prepare(data: bytes) -> bytes | Failure:
    """A BMP, DIB or ICO file for Pillow, or the failure of one that it would scramble.

    Pillow reads 4 or 8 bits a pixel as one bit where the palette is black and white, and 4 bits as 8 where it is a ramp
    of the lowest greys. One more colour in the palette, which no pixel has, keeps it from that.
    """
    if not data.startswith(BMP):
        places = _frames(data) if data.startswith(ICO) else (0,)
        if any(_misread(data, place) for place in places):
            return Failure("unsupported", "an icon or DIB of black and white in 4 or 8 bits a pixel is not decoded")
        return data
    colours = _misread(data, _FILE_HEADER)
    if not colours:
        return data
    (pixels,) = struct.unpack_from("<I", data, 10)
    if pixels < _FILE_HEADER + _INFO_HEADER + 4 * colours:
        return Failure("unsupported", "a BMP file whose pixels overlap its palette is not decoded")
    return data[:46] + struct.pack("<I", colours + 1) + data[50:]


def holds_png(image: Image.Image, data: bytes) -> bool:
    """True if the picture of an icon is a PNG, whose alpha means what it says."""
    return data.startswith(b"\x89PNG", image.ico.entry[0].offset)  # type: ignore[attr-defined]


def icon_mask(image: Image.Image, data: bytes) -> Image.Image | None:
    """The mask of one bit behind the colours of an icon, which counts where all alpha is zero; None without one."""
    entry = image.ico.entry[0]  # type: ignore[attr-defined]
    width, height = image.size
    stride = (width + 31) // 32 * 4
    end = entry.offset + entry.size
    header = int.from_bytes(data[entry.offset : entry.offset + 4], "little")
    if header != _INFO_HEADER or entry.size < header + 4 * width * height + stride * height:
        return None
    return Image.frombytes("1", image.size, data[end - stride * height : end], "raw", ("1;I", stride, -1)).convert("L")


def has_attribute_bit(data: bytes) -> bool:
    """True for a TGA file whose colours have one bit beside 15, which decoders read in both ways."""
    return (data[7] if data[2] & 7 == 1 else data[16]) == 16 and data[2] & 7 in (1, 2)


def without_runs(data: bytes) -> bytes | None:
    """A run-length encoded TGA file as a plain one, for Pillow, whose decoder ends at a run that crosses rows.

    None if it is none, or its runs do not make up the picture, whose pixels were counted before.
    """
    if len(data) < _TGA_HEADER or data[2] not in (9, 10, 11) or data.endswith(_TGA_FOOTER):
        return None
    (width, height), step, at = struct.unpack_from("<HH", data, 12), (data[16] + 7) // 8, _tga_pixels(data)
    head, pixels = data[:2] + bytes((data[2] - _TGA_RUNS,)) + data[3:at], bytearray()
    while len(pixels) < width * height * step and at < len(data):
        count = (data[at] & 127) + 1
        if data[at] & 128:
            pixels += data[at + 1 : at + 1 + step] * count
            at += 1 + step
        else:
            pixels += data[at + 1 : at + 1 + step * count]
            at += 1 + step * count
    return head + bytes(pixels) if len(pixels) == width * height * step else None


def looks_like_tga(data: bytes) -> bool:
    """True for a header of TGA, which has no signature, with as many bytes behind it as it asks for."""
    if len(data) < _TGA_HEADER or data[1] > 1 or data[2] not in _TGA_KINDS or data[16] not in _TGA_DEPTHS:
        return False
    if data[2] & _TGA_RUNS:
        return data.endswith(_TGA_FOOTER)
    width, height = struct.unpack_from("<HH", data, 12)
    size: int = width * height * ((data[16] + 7) // 8)
    return 0 < size <= len(data) - _tga_pixels(data)


def _tga_pixels(data: bytes) -> int:
    """The place of the pixels of a TGA file: behind its header, its name and its colours."""
    (colours,) = struct.unpack_from("<H", data, 5)
    return _TGA_HEADER + data[0] + data[1] * int(colours) * ((data[7] + 7) // 8)


def _frames(data: bytes) -> Iterator[int]:
    count = min(int.from_bytes(data[4:6], "little"), 256)
    for entry in range(6, 6 + 16 * count, 16):
        yield int.from_bytes(data[entry + 12 : entry + 16], "little")


def _misread(data: bytes, place: int) -> int:
    """The number of colours of a bitmap whose palette Pillow misreads; 0 for all others."""
    try:
        header, bits, used = (struct.unpack_from("<" + form, data, place + at)[0] for form, at in _FIELDS)
    except struct.error:
        return 0
    if header < _INFO_HEADER or bits not in (4, 8):
        return 0
    colours = used or 2**bits
    start = place + header
    palette = [data[at : at + 3] for at in range(start, start + 4 * min(colours, 16), 4)]
    if colours <= 2:
        return colours if palette == list(_BLACK_AND_WHITE[:colours]) else 0
    ramp = bits == 4 and colours <= 16 and palette == [bytes((level,)) * 3 for level in range(colours)]
    return colours if ramp else 0
