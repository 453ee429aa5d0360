"""TIFF files of any layout, written for tests from samples; nothing of Pillow or libtiff is used."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SHORT, LONG, LONG8 = 3, 4, 16
# Bits of a byte in the other order.
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]


@dataclass(frozen=True)
class Layout:
    """The tags that say how samples are stored; ``tags`` are further ones, or None for one that is left out.

    ``tile`` is the side of tiles, and ``strip`` the rows of a strip; 0 is none, and all rows.
    """

    bits: int = 8
    photometric: int = 1
    order: str = "<"
    form: int = 1
    planar: int = 1
    fill: int = 1
    deflate: bool = False
    tile: int = 0
    strip: int = 0
    big: bool = False
    extra: tuple[int, ...] = ()
    tags: Mapping[int, Sequence[int] | None] = field(default_factory=dict)


def tiff(samples: Array, layout: Layout) -> bytes:
    """A file of one picture from its samples, ``[H, W]`` or ``[H, W, S]``."""
    if samples.ndim == 2:
        samples = samples[:, :, None]
    height, width, count = samples.shape
    planes = [samples] if layout.planar == 1 else [samples[:, :, band : band + 1] for band in range(count)]
    pieces = [_packed(piece, layout) for plane in planes for piece in _pieces(plane, layout)]
    tags: dict[int, Sequence[int] | None] = {
        256: [width],
        257: [height],
        258: [layout.bits] * count,
        259: [8 if layout.deflate else 1],
        262: [layout.photometric],
        266: [layout.fill],
        277: [count],
        284: [layout.planar],
        339: [layout.form] * count,
    }
    if layout.tile:
        tags |= {322: [layout.tile], 323: [layout.tile]}
    else:
        tags |= {278: [layout.strip or height]}
    if layout.extra:
        tags[338] = layout.extra
    return assemble([tags | dict(layout.tags)], pieces, layout)


def assemble(pages: Sequence[Mapping[int, Sequence[int] | None]], pieces: Sequence[bytes], layout: Layout) -> bytes:
    """A file of directories, of which the first has the ``pieces`` of picture."""
    order, big = layout.order, layout.big
    start = 16 if big else 8
    places, body = [], b""
    for piece in pieces:
        places.append(start + len(body))
        body += piece + bytes(-len(piece) % 2)
    where, sizes = (324, 325) if layout.tile else (273, 279)
    pages = [{**pages[0], where: places, sizes: [len(piece) for piece in pieces]}, *pages[1:]]
    at = start + len(body)
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, at) if big else struct.pack(f"{order}HI", 42, at)
    for number, page in enumerate(pages):
        directory = _directory(page, at, order, big=big, last=number == len(pages) - 1)
        body += directory
        at += len(directory)
    return mark + head + body


def _directory(tags: Mapping[int, Sequence[int] | None], at: int, order: str, *, big: bool, last: bool) -> bytes:
    entries = sorted((tag, values) for tag, values in tags.items() if values is not None)
    count, size, number = ("Q", 20, "Q") if big else ("H", 12, "I")
    room = struct.calcsize(number)
    behind = at + struct.calcsize(f"{order}{count}") + size * len(entries) + room
    table, overflow = b"", b""
    for tag, values in entries:
        kind, letter = (SHORT, "H") if max(values, default=0) < 65_536 and tag not in (273, 324) else (LONG, "I")
        data = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(data) > room:
            data += bytes(len(data) % 2)
            place = struct.pack(f"{order}{number}", behind + len(overflow))
            overflow += data
        else:
            place = data.ljust(room, b"\0")
        table += struct.pack(f"{order}HH{number}", tag, kind, len(values)) + place
    following = 0 if last else behind + len(overflow)
    return struct.pack(f"{order}{count}", len(entries)) + table + struct.pack(f"{order}{number}", following) + overflow


def _pieces(plane: Array, layout: Layout) -> list[Array]:
    if not layout.tile:
        rows = layout.strip or len(plane)
        return [plane[row : row + rows] for row in range(0, len(plane), rows)]
    height, width = plane.shape[:2]
    side = layout.tile
    padded = np.pad(plane, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    rows, columns = range(0, len(padded), side), range(0, padded.shape[1], side)
    return [padded[row : row + side, column : column + side] for row in rows for column in columns]


def _packed(piece: Array, layout: Layout) -> bytes:
    rows = piece.reshape(len(piece), -1)
    if layout.form == 3:
        data = rows.astype(f"{layout.order}f{layout.bits // 8}").tobytes()
    elif layout.bits % 8 == 0 and layout.bits != 24:
        data = rows.astype(f"{layout.order}{'i' if layout.form == 2 else 'u'}{layout.bits // 8}").tobytes()
    else:
        shifts = np.arange(layout.bits - 1, -1, -1)
        bits = (rows.astype(np.uint64)[:, :, None] >> shifts.astype(np.uint64)) & 1
        data = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()
    data = zlib.compress(data) if layout.deflate else data
    return _REVERSED[np.frombuffer(data, np.uint8)].tobytes() if layout.fill == 2 else data
