"""The header and the structure of a baseline JPEG file, to select the files for a decoder on the GPU.

nvJPEG is less strict about damage than Pillow is. So only ordinary files pass here: complete from the first marker to
the last, one scan, no marker in it but restarts in their order. Damage within the entropy-coded data is not detected;
libjpeg-turbo, and with it Pillow, mostly decodes that without an error too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.images.orientation import upright

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DHT, _SOS, _DQT, _DRI, _APP0, _APP1, _APP14, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE
_RST0, _RESTARTS = 0xD0, 8
# Segments before the scan; a valid file has a dozen, one with a large colour profile some more.
_SEGMENTS = 256
# Sampling factors of Y (its colours are 1 x 1) that every decoder has: 4:4:4, 4:2:2, 4:4:0, 4:2:0.
_SAMPLINGS = (0x11, 0x21, 0x12, 0x22)
# With these numbers, and nothing else in the file about them, libjpeg takes the components for Y, Cb and Cr.
_YCBCR = (b"\1\2\3", b"\0\1\2")
# EXIF's tag of the orientation, in either byte order.
_TAGS = (b"\x01\x12", b"\x12\x01")
# A picture of four pixels 0 1 / 2 3, and how each EXIF orientation shows it.
_PROBE = b"\0\1\2\3"
_TURNED = {
    b"\0\1\2\3": 1,
    b"\1\0\3\2": 2,
    b"\3\2\1\0": 3,
    b"\2\3\0\1": 4,
    b"\0\2\1\3": 5,
    b"\2\0\3\1": 6,
    b"\3\1\2\0": 7,
    b"\1\3\0\2": 8,
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline JPEG as it is stored, in pixels, and the EXIF orientation (1 to 8) that it is to be turned by."""

    height: int
    width: int
    orientation: int


def baseline(data: bytes, *, exif: str) -> Baseline | None:
    """The header of a JPEG file that is baseline, whole and ordinary; None for all others.

    Ordinary: 8 bits, Huffman's code, one component or Y, Cb and Cr, all in one scan, and nothing behind it.
    ``exif`` is ``apply`` or ``ignore``, as for :class:`~pipeline.images.decode.Decoder`; the orientation is the one
    that decoder finds.
    """
    size = len(data)
    if data[:2] != _SOI or data[-2:] != _EOI:
        return None
    frame, tables, interval, transform = b"", set(), 0, 1
    metadata: dict[str, bytes] = {}
    at = 2
    for _ in range(_SEGMENTS):
        if at + 4 > size or data[at] != 0xFF:
            return None
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        segment, at = data[at + 4 : at + 2 + length], at + 2 + length
        if length < 2 or at > size:
            return None
        if marker == _SOS:
            break
        if marker == _SOF0 and not frame:
            frame = segment
        elif marker in (_DHT, _DQT):
            tables.add(marker)
        elif marker == _DRI and length == 4:
            interval = segment[0] << 8 | segment[1]
        elif marker == _APP1:
            _collect(segment, metadata)
        elif marker == _APP14:
            if segment.startswith(b"Adobe") and len(segment) >= 12:
                transform = segment[11]
        elif not (_APP0 <= marker < _APP14 or marker in (_APP14 + 1, _COM)):
            return None
    else:
        return None
    if len(tables) < 2 or not _ordinary(frame, segment, transform):
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if not _only_restarts(data, at, interval and -(-_units(frame, height, width) // interval)):
        return None
    orientation = _orientation(metadata) if exif == "apply" and metadata else 1
    return Baseline(height=height, width=width, orientation=orientation)


def _collect(segment: bytes, metadata: dict[str, bytes]) -> None:
    """Join metadata as Pillow's JPEG plugin does: EXIF segments are joined, and the last XMP segment counts."""
    if segment.startswith(b"Exif\0\0"):
        metadata["exif"] = metadata["exif"] + segment[6:] if "exif" in metadata else segment
    elif segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        metadata["xmp"] = segment.split(b"\0", 1)[1]


def _ordinary(frame: bytes, scan: bytes, transform: int) -> bool:
    if len(frame) < 9 or frame[0] != 8 or not any(frame[1:3]) or not any(frame[3:5]):
        return False
    count = frame[5]
    if len(frame) != 6 + 3 * count or len(scan) != 4 + 2 * count or scan[0] != count or scan[-3:] != b"\0\x3f\0":
        return False
    names, samplings = frame[6::3], frame[7::3]
    if scan[1:-3:2] != names:
        return False
    if count == 1:
        return samplings == b"\x11"
    return (
        count == 3
        and transform == 1
        and names in _YCBCR
        and samplings[0] in _SAMPLINGS
        and samplings[1:] == b"\x11\x11"
    )


def _units(frame: bytes, height: int, width: int) -> int:
    """Blocks, or groups of blocks, of a scan: what a restart interval counts."""
    across, down = 8 * (frame[7] >> 4), 8 * (frame[7] & 15)
    return -(-width // across) * -(-height // down)


def _only_restarts(data: bytes, start: int, stretches: int) -> bool:
    """True if a scan from ``start`` on has no marker but the restarts between its ``stretches`` (0: none)."""
    if start >= len(data) - 2:
        return False
    scan = np.frombuffer(data, dtype=np.uint8, offset=start)
    # Without the 0xFF of the end itself; a 0xFF before it is followed by one.
    after = scan[(scan[:-2] == 0xFF).nonzero()[0] + 1]
    if stretches < 2:
        return not after.any()
    restarts = after[after != 0]
    return np.array_equal(restarts, _RST0 + np.arange(stretches - 1) % _RESTARTS)


def _orientation(metadata: dict[str, bytes]) -> int:
    """Apply the orientation rule of all formats to this metadata, on an image of four pixels."""
    exif, xmp = metadata.get("exif", b""), metadata.get("xmp", b"")
    if not any(tag in exif for tag in _TAGS) and b"tiff:Orientation" not in xmp:
        return 1
    probe = Image.frombytes("L", (2, 2), _PROBE)
    probe.info.update(metadata)
    return _TURNED[upright(probe).tobytes()]
