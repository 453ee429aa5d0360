"""Broken images without end: real files of every format and kind, damaged in every way, by a seed and a number."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from PIL import Image, TiffImagePlugin

from tests.conftest import DATA
from tests.pictures import saved

PHOTOS = 6


@cache
def bases() -> tuple[bytes, ...]:
    """Whole files: every writer of Pillow that matters, in its modes and variants, and a few real photos."""
    found = [data for make in (_jpegs, _pngs, _webps, _gifs, _tiffs, _others) for data in make()]
    photos = sorted((DATA / "clothing").rglob("*.jpg"))[:: max(1, 372 // PHOTOS)][:PHOTOS]
    return (*found, *(path.read_bytes() for path in photos))


def mutant(seed: int, index: int) -> bytes:
    """The file of that number: the same bytes for the same seed, on every machine with the same Pillow."""
    dice = random.Random(f"{seed}/{index}")
    data = dice.choice(bases())
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        data = dice.choice(MUTATIONS)(dice, data)
    return data


def _picture(mode: str, size: tuple[int, int] = (96, 80), shift: int = 0) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width]
    planes = [(x * 2 + shift) % 256, (y * 3) % 256, (x * y + shift) % 256, np.where((x + y) % 7 < 5, 255, 40)]
    rgba = Image.fromarray(np.stack(planes, axis=2).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray((x * 600 + y).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((x / 3 - y).astype(np.float32))
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    return rgba.convert("RGB").convert(mode)


def _jpegs() -> Iterator[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    profile = b"\0" * 36 + b"acsp" + b"\0" * 200
    for mode in ("RGB", "L", "CMYK"):
        for progressive in (False, True):
            yield saved(_picture(mode), "JPEG", progressive=progressive, quality=80)
    yield saved(_picture("RGB"), "JPEG", exif=exif, icc_profile=profile, comment=b"hello")
    yield saved(_picture("RGB"), "JPEG", subsampling=0, optimize=True, restart_marker_blocks=4)
    yield saved(_picture("RGB"), "MPO", save_all=True, append_images=[_picture("RGB", shift=9)])


def _pngs() -> Iterator[bytes]:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"):
        yield saved(_picture(mode), "PNG")
    yield saved(_picture("P"), "PNG", bits=4, transparency=3)
    yield saved(_picture("RGBA"), "PNG", save_all=True, append_images=[_picture("RGBA", shift=9)], duration=50)
    yield interlaced_png()


def interlaced_png() -> bytes:
    """Adam7, which Pillow reads but does not write: 8 x 8 grey pixels in seven passes."""
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join((b"\0" + bytes(range(width))) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    pieces = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in pieces)


def _webps() -> Iterator[bytes]:
    frames = [_picture("RGBA", shift=shift) for shift in (9, 18)]
    for mode in ("RGB", "RGBA"):
        yield saved(_picture(mode), "WEBP", quality=60)
        yield saved(_picture(mode), "WEBP", lossless=True)
        yield saved(_picture(mode), "WEBP", save_all=True, append_images=frames, duration=40)


def _gifs() -> Iterator[bytes]:
    frames = [_picture("P", shift=shift) for shift in (9, 18)]
    yield saved(_picture("P"), "GIF", interlace=0)
    yield saved(_picture("L"), "GIF", interlace=1)
    yield saved(_picture("P"), "GIF", save_all=True, append_images=frames, duration=40, transparency=2)


def _tiffs() -> Iterator[bytes]:
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield saved(_picture("RGB"), "TIFF", compression=compression)
    tiles = TiffImagePlugin.ImageFileDirectory_v2()
    tiles[278] = 16  # RowsPerStrip
    yield saved(_picture("L"), "TIFF", compression="tiff_lzw", tiffinfo=tiles)
    yield saved(_picture("1"), "TIFF", compression="group4")
    for mode in ("I;16", "F", "CMYK", "P", "LAB", "RGBA"):
        image = _picture("RGB").convert("YCbCr") if mode == "LAB" else _picture(mode)
        yield saved(image, "TIFF")
    yield saved(_picture("RGB"), "TIFF", big_tiff=True)
    yield saved(_picture("RGB"), "TIFF", save_all=True, append_images=[_picture("L"), _picture("RGBA")])
    yield tiled_tiff()


def tiled_tiff() -> bytes:
    """Tiles, which Pillow reads but does not write: four of 16 x 16 grey pixels."""
    values = {256: 32, 257: 32, 258: 8, 259: 1, 262: 1, 277: 1, 322: 16, 323: 16}
    count = len(values) + 2
    tables = 8 + 2 + 12 * count + 4
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in values.items()]
    entries.append(struct.pack("<HHII", 324, 4, 4, tables))  # TileOffsets
    entries.append(struct.pack("<HHII", 325, 4, 4, tables + 16))  # TileByteCounts
    offsets = [tables + 32 + 256 * tile for tile in range(4)]
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + b"".join(entries) + struct.pack("<I", 0)
    return head + struct.pack("<8I", *offsets, *([256] * 4)) + bytes(range(256)) * 4


def _others() -> Iterator[bytes]:
    for kind, mode in (("BMP", "RGB"), ("BMP", "P"), ("ICO", "RGBA"), ("TGA", "RGBA"), ("PPM", "RGB"), ("PCX", "P")):
        yield saved(_picture(mode), kind)
    for kind in ("JPEG2000", "AVIF", "SGI", "QOI"):
        yield saved(_picture("RGB"), kind)


def _flip_bits(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 4, 32))):
        if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _change_bytes(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    # Headers decide most, so half of the blows fall there.
    reach = len(changed) if dice.random() < 0.5 else min(len(changed), 128)
    for _ in range(dice.choice((1, 3, 10))):
        if reach:
            changed[dice.randrange(reach)] = dice.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, dice.randrange(256)))
    return bytes(changed)


def _truncate(dice: random.Random, data: bytes) -> bytes:
    return data[: dice.randint(0, len(data))]


def _insert(dice: random.Random, data: bytes) -> bytes:
    at = dice.randint(0, len(data))
    return data[:at] + dice.randbytes(dice.choice((1, 2, 16, 400))) + data[at:]


def _delete(dice: random.Random, data: bytes) -> bytes:
    at = dice.randint(0, len(data))
    return data[:at] + data[at + dice.choice((1, 2, 16, 400)) :]


def _swap_blocks(dice: random.Random, data: bytes) -> bytes:
    size = dice.choice((4, 32, 256))
    if len(data) < 2 * size:
        return data[::-1]
    first, second = sorted(dice.randrange(len(data) - size + 1) for _ in range(2))
    if second < first + size:
        return data
    block, other = data[first : first + size], data[second : second + size]
    return data[:first] + other + data[first + size : second] + block + data[second + size :]


def _splice(dice: random.Random, data: bytes) -> bytes:
    other = dice.choice(bases())
    return data[: dice.randint(0, len(data))] + other[dice.randint(0, len(other)) :]


def _concatenate(dice: random.Random, data: bytes) -> bytes:
    return data + dice.choice(bases()) if dice.random() < 0.5 else data * 2


def _swap_header(dice: random.Random, data: bytes) -> bytes:
    size = dice.choice((4, 8, 16, 64))
    return dice.choice(bases())[:size] + data[size:]


def _attack_number(dice: random.Random, data: bytes) -> bytes:
    """A length, a size or an offset somewhere becomes none, one too many, or huge."""
    width = dice.choice((2, 4, 4, 8))
    if len(data) < width:
        return data
    reach = len(data) if dice.random() < 0.3 else min(len(data), 256)
    at = dice.randrange(max(1, reach - width + 1))
    top = 1 << 8 * width
    value = dice.choice((0, 1, top - 1, top // 2, top // 2 - 1, len(data), len(data) + 1, 65_535, 20_000, 100_001))
    return data[:at] + (value % top).to_bytes(width, dice.choice(("big", "little"))) + data[at + width :]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _attack_png(dice: random.Random, data: bytes) -> bytes:
    """Damage within the chunks of a PNG, with checksums that hold, so that the decoder gets to see it."""
    if data[:4] != b"\x89PNG":
        return _attack_number(dice, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return data
    number = dice.randrange(len(chunks))
    name, body = chunks[number]
    deed = dice.randrange(5)
    if deed == 0:
        chunks.insert(number, chunks[dice.randrange(len(chunks))])
    elif deed == 1:
        del chunks[number]
    elif name == b"IDAT" and deed == 2:
        try:
            rows = zlib.decompress(body)
        except zlib.error:
            rows = body
        chunks[number] = (name, zlib.compress(_change_bytes(dice, rows)))
    else:
        chunks[number] = (name, (_attack_number if deed == 3 else _flip_bits)(dice, body))
    return data[:8] + b"".join(_chunk(name, body) for name, body in chunks)


def _attack_jpeg(dice: random.Random, data: bytes) -> bytes:
    """Damage to the segments of a JPEG: their lengths, their order, the size and the components in the frame."""
    if data[:2] != b"\xff\xd8":
        return _attack_number(dice, data)
    starts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        starts.append(at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not starts:
        return data
    at = dice.choice(starts)
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    deed = dice.randrange(4)
    if deed == 0:
        value = dice.choice((0, 1, 2, 3, size - 1, size + 1, 0xFFFF))
        return data[: at + 2] + struct.pack(">H", value % 65_536) + data[at + 4 :]
    if deed == 1:
        return data[:at] + data[at : at + 2 + size] * 2 + data[at + 2 + size :]
    if deed == 2:
        return data[:at] + data[at + 2 + size :]
    changed = bytearray(data)
    place = at + 4 + dice.randrange(max(1, min(size, 16)))
    if place < len(changed):
        changed[place] = dice.choice((0, 1, 3, 4, 17, 64, 255))
    return bytes(changed)


def _attack_tiff(dice: random.Random, data: bytes) -> bytes:
    """Damage to a field of a TIFF's first directory: its tag, type, count or value."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return _attack_number(dice, data)
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack(order + "I", data[4:8])[0] if len(data) >= 8 else 0
    if start + 14 > len(data):
        return data
    count = struct.unpack(order + "H", data[start : start + 2])[0]
    entry = start + 2 + 12 * dice.randrange(max(1, count))
    at, kind = entry + dice.choice((0, 2, 4, 8)), "H"
    if at - entry >= 4:
        kind = "I"
    wide = (0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 8, start, len(data), len(data) - 1, 1 << 20)
    value = dice.choice(wide) if kind == "I" else dice.choice((0, 1, 2, 3, 4, 5, 7, 12, 16, 256, 257, 259, 273, 322))
    return data[:at] + struct.pack(order + kind, value) + data[at + struct.calcsize(kind) :]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip_bits, _change_bytes, _truncate, _insert, _delete, _swap_blocks, _splice, _concatenate, _swap_header),
    *(_attack_number, _attack_png, _attack_jpeg, _attack_tiff),
)
