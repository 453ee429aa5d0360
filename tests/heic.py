"""HEIC files, written for tests: HEVC whose every block holds its samples as they are (PCM), in the boxes of HEIF."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Side of a block, in luma samples.
BLOCK = 16
# rangeTabLps[state][3] of ITU-T H.265, 9.3.4.3.2: all that is needed if the most probable bin comes each time.
_RANGES = (240, 227, 216, 205, 195, 185, 175, 166, 158, 150, 142, 135, 128, 122, 116, 110, 104, 99, 94, 89, 85, 80, 76)
_LEVEL, _COMPATIBLE, _CONSTRAINTS = 93, 0x60000000, 0x900000000000
_VPS, _SPS, _PPS, _IDR = 32, 33, 34, 20


@dataclass(frozen=True)
class Boxes:
    """The boxes around a picture."""

    brands: Sequence[bytes] = (b"heic", b"mif1", b"heic")
    rotation: int = 0
    """Quarter turns, anticlockwise."""
    exif: bytes = b""
    codec: bytes = b"hvc1"
    said: tuple[int, int] | None = None
    """Width and height of the header; those of the picture, if None."""


def heic(image: Image.Image, boxes: Boxes = Boxes()) -> bytes:
    """A file of an RGB image, whose sides are multiples of 16; colours are kept for every 2 x 2 pixels."""
    planes = image.convert("YCbCr").split()
    luma = np.asarray(planes[0])
    chroma = [np.asarray(plane)[::2, ::2] for plane in planes[1:]]
    width, height = image.size
    parameters = [(_VPS, _video()), (_SPS, _sequence(width, height)), (_PPS, _picture())]
    slice_ = _nal(_IDR, _slice(luma, chroma))
    return _file(struct.pack(">I", len(slice_)) + slice_, parameters, boxes.said or image.size, boxes)


class _Bits:
    def __init__(self) -> None:
        self.bits: list[int] = []

    def u(self, count: int, value: int) -> _Bits:
        self.bits += [value >> (count - 1 - at) & 1 for at in range(count)]
        return self

    def ue(self, *values: int) -> _Bits:
        for value in values:
            length = (value + 1).bit_length()
            self.u(2 * length - 1, value + 1)
        return self

    def align(self) -> _Bits:
        return self.u(-len(self.bits) % 8, 0)

    def samples(self, values: NDArray[np.uint8]) -> None:
        self.bits += np.unpackbits(values.reshape(-1)).tolist()

    def ended(self) -> bytes:
        return bytes(np.packbits(self.u(1, 1).align().bits))


def _profile(bits: _Bits) -> _Bits:
    return bits.u(8, 1).u(32, _COMPATIBLE).u(48, _CONSTRAINTS).u(8, _LEVEL)


def _video() -> bytes:
    bits = _Bits().u(4, 0).u(2, 3).u(6, 0).u(3, 0).u(1, 1).u(16, 0xFFFF)
    return _profile(bits).u(1, 1).ue(0, 0, 0).u(6, 0).ue(0).u(2, 0).ended()


def _sequence(width: int, height: int) -> bytes:
    bits = _profile(_Bits().u(4, 0).u(3, 0).u(1, 1)).ue(0, 1, width, height).u(1, 0).ue(0, 0, 4)
    # Blocks of 16, transforms of 4 to 16; no scaling lists, asymmetric blocks or offsets; then PCM, 8 bits, unfiltered.
    bits.u(1, 1).ue(0, 0, 0).ue(1, 0, 0, 2, 0, 0).u(3, 0).u(1, 1).u(4, 7).u(4, 7).ue(1, 0).u(1, 1)
    return bits.ue(0).u(5, 0).ended()


def _picture() -> bytes:
    bits = _Bits().ue(0, 0).u(1, 0).u(1, 0).u(3, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0).u(1, 0).u(2, 0).u(1, 0).u(2, 0)
    # No filter across slices, and none within them.
    return bits.u(1, 0).u(1, 1).u(1, 0).u(1, 1).u(2, 0).ue(0).u(2, 0).ended()


def _slice(luma: NDArray[np.uint8], chroma: Sequence[NDArray[np.uint8]]) -> bytes:
    bits = _Bits().u(1, 1).u(1, 0).ue(0, 2, 0).u(1, 1).align()
    height, width = luma.shape
    blocks = [(row, column) for row in range(0, height, BLOCK) for column in range(0, width, BLOCK)]
    assert len(blocks) <= len(_RANGES)
    for number, (row, column) in enumerate(blocks):
        # The coder starts anew in each block: behind samples, the flag that the slice goes on, then one whole part.
        _terminate((510 if number == 0 else 508) - _RANGES[number], bits)
        bits.align()
        bits.samples(luma[row : row + BLOCK, column : column + BLOCK])
        half = BLOCK // 2
        for plane in chroma:
            bits.samples(plane[row // 2 : row // 2 + half, column // 2 : column // 2 + half])
    _terminate(510, bits)
    # The last bit of the coder is the one that ends the data.
    return bytes(np.packbits(bits.align().bits))


def _terminate(width: int, bits: _Bits) -> None:
    """Encode a terminating bin with the range ``width`` and nothing before it, and flush (9.3.4.5 of H.265)."""
    low, width, first, outstanding = width - 2, 2, True, 0

    def put(bit: int) -> None:
        nonlocal first, outstanding
        if not first:
            bits.u(1, bit)
        first = False
        bits.bits += [1 - bit] * outstanding
        outstanding = 0

    while width < 256:
        if low < 256:
            put(0)
        elif low >= 512:
            low -= 512
            put(1)
        else:
            low -= 256
            outstanding += 1
        width, low = width << 1, low << 1
    put(low >> 9 & 1)
    bits.u(2, low >> 7 & 3 | 1)


def _nal(kind: int, payload: bytes) -> bytes:
    """A unit of the stream; no three bytes in it look like the start of another."""
    escaped, zeros = bytearray(), 0
    for byte in payload:
        if zeros >= 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return struct.pack(">H", kind << 9 | 1) + bytes(escaped)


def box(kind: bytes, *parts: bytes, version: int | None = None) -> bytes:
    """A box of the file; one with a version has flags, too."""
    body = (b"" if version is None else struct.pack(">I", version << 24)) + b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def _file(stream: bytes, parameters: Sequence[tuple[int, bytes]], size: tuple[int, int], boxes: Boxes) -> bytes:
    items = [(1, boxes.codec, stream)]
    if boxes.exif:
        items.append((2, b"Exif", struct.pack(">I", 0) + boxes.exif))
    properties = [
        box(b"hvcC", _configuration(parameters)),
        box(b"ispe", struct.pack(">II", *size), version=0),
        # sRGB; matrix and full range of JPEG.
        box(b"colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 0x80)),
    ]
    if boxes.rotation:
        properties.append(box(b"irot", bytes([boxes.rotation])))
    numbers = bytes([0x81, *range(2, len(properties)), *([0x80 | len(properties)] if boxes.rotation else [3])])
    infos = [box(b"infe", struct.pack(">HH", number, 0), kind, b"\0", version=2) for number, kind, _ in items]
    links = box(b"iref", box(b"cdsc", struct.pack(">HHH", 2, 1, 1)), version=0) if boxes.exif else b""
    head = box(b"ftyp", boxes.brands[0], bytes(4), *boxes.brands[1:])

    def meta(start: int) -> bytes:
        places = b""
        for number, _, data in items:
            places += struct.pack(">HHHII", number, 0, 1, start, len(data))
            start += len(data)
        return box(
            b"meta",
            box(b"hdlr", bytes(4), b"pict", bytes(13), version=0),
            box(b"pitm", struct.pack(">H", 1), version=0),
            box(b"iinf", struct.pack(">H", len(items)), *infos, version=0),
            links,
            box(
                b"iprp",
                box(b"ipco", *properties),
                box(b"ipma", struct.pack(">IHB", 1, 1, len(numbers)), numbers, version=0),
            ),
            box(b"iloc", b"\x44\0", struct.pack(">H", len(items)), places, version=0),
            version=0,
        )

    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + box(b"mdat", *(data for _, _, data in items))


def _configuration(parameters: Sequence[tuple[int, bytes]]) -> bytes:
    body = struct.pack(">BBI", 1, 1, _COMPATIBLE) + _CONSTRAINTS.to_bytes(6, "big") + bytes([_LEVEL])
    body += struct.pack(">HBBBBHB", 0xF000, 0xFC, 0xFC | 1, 0xF8, 0xF8, 0, 0x0F) + bytes([len(parameters)])
    for kind, payload in parameters:
        unit = _nal(kind, payload)
        body += struct.pack(">BHH", 0x80 | kind, 1, len(unit)) + unit
    return body
