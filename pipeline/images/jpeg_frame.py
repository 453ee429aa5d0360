"""The frame and the scans of a JPEG file, read from its markers."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Markers of a frame: baseline, extended and progressive, all by Huffman's code. Whether lossless and arithmetic
# ones are decoded depends on the build of a library.
ORDINARY = (0xC0, 0xC1, 0xC2)
PROGRESSIVE = 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NAMES = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "hierarchical"),
    **dict.fromkeys((0xC9, 0xCA), "arithmetically coded"),
}
# The most segments that are read before the frame; one with a large colour profile and metadata has some dozens.
_SEGMENTS = 1024
# A marker within or behind the data of a scan.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_START_OF_SCAN = 0xDA
# A progressive file has some dozens of scans at most.
_SCANS = 1024


def frame(data: bytes) -> tuple[int, bytes]:
    """The marker of the first frame and its header; 0 if anything but segments comes before it."""
    position = 2
    for _ in range(_SEGMENTS):
        if data[position : position + 1] != b"\xff" or position + 4 > len(data):
            return 0, b""
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _FRAMES:
            return marker, data[position + 4 : position + 2 + length]
        position += 2 + length
    return 0, b""


def undecoded(data: bytes) -> str | None:
    """The variant of a file that libraries do not decode; None for an ordinary file."""
    marker, header = frame(data)
    if len(header) < 6:
        return None
    depth, parts = header[0], header[5]
    if marker in _NAMES:
        return f"a {_NAMES[marker]} JPEG file is not decoded"
    if depth != 8:
        return f"a JPEG file of {depth} bits a sample is not decoded"
    return None if parts in (1, 3, 4) else f"a JPEG file of {parts} components is not decoded"


def has_all_scans(data: bytes) -> bool:
    """True if the scans of a file without an end are all that it needs: each coefficient of each component."""
    marker, header = frame(data)
    if marker not in ORDINARY or len(header) < 6:
        return False
    left = {part: set(range(64)) for part in header[6 : 6 + 3 * header[5] : 3]}
    for parts, first, last, low in _scans(data):
        for part in parts:
            if marker != PROGRESSIVE:
                left.pop(part, None)
            elif part in left and low == 0:
                left[part] -= set(range(first, last + 1))
    return not any(left.values())


def _scans(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Components, first and last coefficient, and the lowest bit of each scan."""
    position = 2
    for _ in range(_SEGMENTS + _SCANS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        segment = data[found.end() + 2 : found.end() + length]
        if found[1][0] == _START_OF_SCAN and segment and len(segment) >= 4 + 2 * segment[0]:
            first, last, bits = segment[1 + 2 * segment[0] : 4 + 2 * segment[0]]
            yield segment[1 : 1 + 2 * segment[0] : 2], first, last, bits & 15
        position = found.end() + max(length, 2)
