"""TIFF: the layouts of samples that Pillow decodes faithfully, and the tags that it reads wrongly.

Pillow opens some layouts and scrambles or inverts them. The rules below were measured on files of every layout (see
``tests/test_tiff.py``); what they do not name is ``unsupported``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.core.records import Failure

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, STRIPS = 256, 257, 258, 259, 262, 266, 273
SAMPLES, SIZES, PLANAR, COLOURS, TILES, SUBPAGES, INKS, EXTRA, FORM = 277, 279, 284, 320, 324, 330, 332, 338, 339
SUBFILE, PREDICTOR, SUBSAMPLING, REFERENCE, DNG_VERSION = 254, 317, 530, 532, 50_706
_MARKS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
# Types of whole numbers: format, and numbers in one value (a rational has two).
_TYPES = {1: ("B", 1), 3: ("H", 1), 4: ("I", 1), 5: ("I", 2), 13: ("I", 1), 16: ("Q", 1)}
# Values of one tag that are read: the colours of a palette of 16 bits.
_MOST_VALUES = 3 * 65_536
# Pages that are searched for sensor data; a camera writes up to eight.
_MOST_PAGES = 16
_SENSOR = (32_803, 34_892)

# Photometric interpretations: name, samples without alpha, and depths.
_KINDS: Mapping[int, tuple[str, int, tuple[int, ...]]] = {
    0: ("grey (white is zero)", 1, (1, 2, 4, 8, 12, 16)),
    1: ("grey", 1, (1, 2, 4, 8, 12, 16, 32)),
    2: ("RGB", 3, (8, 16)),
    3: ("palette", 1, (1, 2, 4, 8)),
    5: ("CMYK", 4, (8, 16)),
    6: ("YCbCr", 3, (8,)),
    8: ("CIE L*a*b*", 3, (8,)),
}
# Not compressed, fax, LZW, JPEG, Deflate, PackBits, ThunderScan, LZMA and Zstandard.
_RAW, _FAX, _OLD_JPEG, _JPEG = 1, (2, 3, 4), 6, 7
_COMPRESSIONS = (_RAW, *_FAX, 5, _OLD_JPEG, _JPEG, 8, 32_771, 32_773, 32_809, 32_946, 34_925, 50_000)
_NOT_PREDICTED = (32_771, 32_773, 32_809)
_FORMS = {1: "unsigned", 2: "signed", 3: "floating-point"}


@dataclass(frozen=True, slots=True)
class Reading:
    """A file for Pillow, and what its samples mean beyond what Pillow makes of them.

    ``bits`` is the depth of deep integer samples; ``negative`` says that their lowest value is white. ``palette``
    replaces that of Pillow. With ``vague_alpha`` no tag says what the fourth sample is.
    """

    data: bytes = field(repr=False)
    bits: int = 16
    negative: bool = False
    palette: bytes | None = None
    vague_alpha: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """The tags of one picture of a file; ``entries`` are type, count, and the place of the values of each tag."""

    data: bytes = field(repr=False)
    order: str
    entries: Mapping[int, tuple[int, int, int]]
    following: int

    def all(self, tag: int) -> tuple[int, ...]:
        """The numbers of a tag; empty where it is absent, or of a type without whole numbers."""
        kind, count, place = self.entries.get(tag, (0, 0, 0))
        if kind not in _TYPES or count > _MOST_VALUES:
            return ()
        letter, numbers = _TYPES[kind]
        return struct.unpack_from(f"{self.order}{count * numbers}{letter}", self.data, place)

    def one(self, tag: int, default: int) -> int:
        """The first number of a tag."""
        numbers = self.all(tag)
        return numbers[0] if numbers else default

    def with_zero_as_black(self) -> bytes:
        """The file, with its samples said to be grey of the usual kind."""
        return self._changed(PHOTOMETRIC, 1)

    def with_one_plane(self) -> bytes:
        """The file, with its samples said to be in one plane."""
        return self._changed(PLANAR, 1)

    def _changed(self, tag: int, value: int) -> bytes:
        kind, _, place = self.entries[tag]
        number = struct.pack(f"{self.order}{_TYPES[kind][0]}", value)
        return self.data[:place] + number + self.data[place + len(number) :]


def is_tiff(data: bytes) -> bool:
    """True for the first bytes of a TIFF file, and of the raw files of many cameras."""
    return data.startswith(_MARKS)


def prepare(data: bytes) -> Reading | Failure:
    """Return a file for Pillow, or the failure of a layout that it does not decode.

    A file whose tags cannot be read is given to Pillow, which names the damage.
    """
    if data.startswith(b"MM\0+"):
        return _unsupported("its tags as big-endian BigTIFF")
    try:
        page = _first(data)
        if page is None or not (page.all(WIDTH) and page.all(HEIGHT) and (page.all(STRIPS) or page.all(TILES))):
            return Reading(data)
        if raw := _raw(page):
            return Failure("unsupported", f"{raw} is not decoded; export the photo as JPEG or TIFF")
        reason = next(_problems(page), None)
        return _reading(page) if reason is None else _unsupported(reason)
    except (struct.error, LookupError):
        return Reading(data)


def described(data: bytes) -> str | None:
    """The layout of a file in words; None where its tags cannot be read."""
    try:
        page = _first(data)
        if page is None or not page.all(WIDTH) or not page.all(HEIGHT):
            return None
        bits, samples = "/".join(map(str, page.all(BITS)[:8])) or "1", page.one(SAMPLES, 1)
        order = "big" if page.order == ">" else "little"
        return (
            f"photometric interpretation {page.one(PHOTOMETRIC, 0)}, {samples} samples of {bits} bits, extra samples "
            f"{list(page.all(EXTRA)[:8])}, fill order {page.one(FILL, 1)}, {order}-endian"
        )
    except (struct.error, LookupError):
        return None


def _unsupported(reason: str) -> Failure:
    return Failure("unsupported", f"a TIFF file with {reason} is not decoded; convert it to RGB of 8 bits")


def _problems(page: Page) -> Iterator[str]:
    """Reasons why Pillow would not show what the file holds."""
    compression, photometric = page.one(COMPRESSION, _RAW), _photometric(page)
    if compression not in _COMPRESSIONS:
        yield f"compression {compression}"
    predictor = page.one(PREDICTOR, 1)
    if predictor not in (1, 2, 3) or (predictor != 1 and compression in _NOT_PREDICTED):
        # libtiff does not apply it, and other decoders do.
        yield f"predictor {predictor} and compression {compression}"
    if photometric is None:
        yield "no photometric interpretation"
    elif photometric not in _KINDS:
        yield f"photometric interpretation {photometric}"
    else:
        yield from _depth_problems(page, photometric)
        yield from _plane_problems(page, photometric)
    if photometric == 5 and page.one(INKS, 1) != 1:
        yield f"ink set {page.one(INKS, 1)}"
    if photometric == 6 and compression == _RAW:
        yield from _chroma_problems(page)


def _photometric(page: Page) -> int | None:
    compression = page.one(COMPRESSION, _RAW)
    if compression == _OLD_JPEG:
        return 6
    found = page.all(PHOTOMETRIC)
    if found:
        return found[0]
    # Pillow inverts it like a fax, whose zeros are white, unless its samples are deep; libtiff inverts a fax alone.
    if compression in _FAX:
        return 0
    return 1 if _bits(page) <= {16, 32} else None


def _bits(page: Page) -> set[int]:
    return set(page.all(BITS)[: page.one(SAMPLES, 1)] or (1,))


def _depth_problems(page: Page, photometric: int) -> Iterator[str]:
    name, base, depths = _KINDS[photometric]
    bits, forms, samples = _bits(page), set(page.all(FORM) or (1,)), page.one(SAMPLES, 1)
    compression = page.one(COMPRESSION, _RAW)
    if len(bits) > 1 or len(forms) > 1:
        yield "samples of different kinds"
        return
    (depth,), (form,) = bits, forms
    words = _FORMS.get(form, f"format-{form}")
    if form == 1 and depth not in depths:
        yield f"{name} of {depth} bits a sample"
    if form == 2 and (photometric, samples, depth) != (1, 1, 32):
        yield f"{words} {name} samples of {depth} bits"
    if form == 3 and (photometric not in (0, 1) or samples != 1 or depth != 32):
        yield f"{words} {name} samples of {depth} bits"
    if form not in _FORMS:
        yield f"{words} samples"
    if depth == 32 and page.order == ">" and compression != _RAW:
        # Pillow takes what libtiff has brought to this machine's order for the file's.
        yield "compressed big-endian samples of 32 bits"
    if compression in (_OLD_JPEG, _JPEG) and depth != 8:
        yield f"JPEG of {depth} bits"
    if samples - base > 1 and depth != 8:
        yield f"{samples} samples of {depth} bits"


def _plane_problems(page: Page, photometric: int) -> Iterator[str]:
    samples, extras = page.one(SAMPLES, 1), page.all(EXTRA)
    if page.one(PLANAR, 1) != 2 or samples == 1:
        return
    name, base, _ = _KINDS[photometric]
    # Pillow leaves unspecified samples out.
    kept = () if extras and not any(extras) else extras
    if samples != base + len(extras):
        yield f"{samples} samples in planes of their own, of which some are unnamed"
    elif page.one(COMPRESSION, _RAW) == _RAW:
        if _bits(page) != {8} or (photometric, kept) not in ((2, ()), (2, (2,)), (5, ())):
            yield f"{name} of {max(_bits(page))} bits in planes that are not compressed"
    elif (photometric, kept) not in ((2, ()), (2, (1,)), (2, (2,)), (5, ()), (6, ())) and (photometric > 1 or kept):
        yield f"{name} in planes with extra samples {list(extras)}"


def _chroma_problems(page: Page) -> Iterator[str]:
    pixels, sizes = page.one(WIDTH, 0) * page.one(HEIGHT, 0), page.all(SIZES)
    if page.all(SUBSAMPLING) != (1, 1) and (page.all(SUBSAMPLING) or sum(sizes) < 3 * pixels):
        yield "subsampled YCbCr that is not compressed"
    reference = page.all(REFERENCE)
    values = [above / below if below else 0 for above, below in zip(reference[::2], reference[1::2], strict=False)]
    if values and values != [0, 255, 128, 255, 128, 255]:
        yield f"YCbCr whose black and white are {values}"


def _reading(page: Page) -> Reading:
    data, photometric, (depth,) = page.data, _photometric(page), _bits(page)
    if page.one(SAMPLES, 1) == 1 and page.one(PLANAR, 1) == 2:
        page = _first(page.with_one_plane()) or page
        data = page.data
    negative = photometric == 0 and PHOTOMETRIC in page.entries and depth in (12, 16, 32)
    colours = page.all(COLOURS)
    return Reading(
        data=page.with_zero_as_black() if negative else data,
        bits=12 if depth == 12 else 16,
        negative=negative,
        # Old writers scale to 255, and Pillow takes the high byte.
        palette=bytes(colours) if photometric == 3 and colours and max(colours) < 256 else None,
        vague_alpha=photometric == 2 and page.one(SAMPLES, 1) == 4 and page.all(EXTRA) in ((), (999,)),
    )


def _raw(page: Page) -> str | None:
    """The raw file of a camera in words, whose first picture is often a thumbnail; None for all others."""
    others = list(_pages(page))
    sensor = any(other.one(PHOTOMETRIC, 0) in _SENSOR for other in (page, *others))
    if sensor or page.data[8:10] == b"CR" or DNG_VERSION in page.entries:
        return "the raw file of a camera"
    if others and page.one(SUBFILE, 0) & 1:
        return "a file whose first picture is the thumbnail of another one, as cameras write raw files,"
    return None


def _pages(page: Page) -> Iterator[Page]:
    """The other pictures of a file: those within the first page, and those that follow it."""
    places = [*page.all(SUBPAGES)[:_MOST_PAGES], page.following]
    for _ in range(_MOST_PAGES):
        if not places:
            return
        try:
            other = _page(page.data, places.pop(0))
        except (struct.error, LookupError):
            continue
        if other is not None:
            places.append(other.following)
            yield other


def _first(data: bytes) -> Page | None:
    order = "<" if data[:2] == b"II" else ">"
    return _page(
        data, struct.unpack_from(f"{order}Q" if data[2] == 43 else f"{order}I", data, 8 if data[2] == 43 else 4)[0]
    )


def _page(data: bytes, at: int) -> Page | None:
    if not 8 <= at < len(data):
        return None
    order, big = "<" if data[:2] == b"II" else ">", data[2] == 43
    head, number, step = (f"{order}Q", "Q", 20) if big else (f"{order}H", "I", 12)
    room, start = struct.calcsize(number), at + struct.calcsize(head)
    (count,) = struct.unpack_from(head, data, at)
    entries: dict[int, tuple[int, int, int]] = {}
    for place in range(start, start + step * min(count, 4096), step):
        tag, kind, length = struct.unpack_from(f"{order}HH{number}", data, place)
        value = place + step - room
        if kind in _TYPES and length * struct.calcsize(_TYPES[kind][0]) * _TYPES[kind][1] > room:
            (value,) = struct.unpack_from(f"{order}{number}", data, value)
        entries.setdefault(tag, (kind, length, value))
    end = start + step * count
    following = struct.unpack_from(f"{order}{number}", data, end)[0] if end + room <= len(data) else 0
    return Page(data, order, entries, following)
