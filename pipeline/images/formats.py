"""The format of encoded bytes, and the decoder that opens it: Pillow, pi-heif (HEIF) or pillow-jxl-plugin (JPEG XL).

The last two are called directly and not registered, so that Pillow stays as it is for whoever runs this.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from PIL import Image, ImageFile, ImagePalette

from pipeline.core.errors import install_hint
from pipeline.core.records import Failure
from pipeline.images import bitmaps, tiff

HEIF, JXL = "HEIF", "JXL"
# Formats that a package besides Pillow decodes: the package, what it is for, and how to install it.
PACKAGES = {
    HEIF: ("pi-heif", "HEIC and HEIF photos", "pip install pi-heif"),
    JXL: ("pillow-jxl-plugin", "JPEG XL pictures", install_hint("jxl")),
}
_MODULES = {HEIF: "pi_heif", JXL: "pillow_jxl"}
# Brands of files of boxes (ISO/IEC 23008-12) by the codec of the picture.
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEVC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
# Brands of a picture of any codec; what decodes them has to find out.
_HEIF_BRANDS = _HEVC_BRANDS | {b"mif1", b"mif2", b"msf1", b"miaf", b"1pic", b"jpeg", b"avci", b"j2ki", b"vvic", b"unif"}
# Major brands that Pillow opens as AVIF; it looks at no other ones.
_PILLOW_AVIF = (b"avif", b"avis", b"mif1", b"msf1")
# The most brands, and boxes, that are read of a file; a valid one has a handful.
_MOST_BRANDS = _MOST_BOXES = 64
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_FULL_DEPTH = 8
_JXL_CODESTREAM, _JXL_BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"


def open_image(data: bytes, formats: Sequence[str]) -> Image.Image | Failure:
    """An image whose header was read and whose pixels were not, or the failure of a variant that is not decoded.

    Raises:
        UnidentifiedImageError, and the errors of Pillow's plugins: the file is damaged or unknown.
    """
    kind = family(data)
    if kind in PACKAGES or kind == "AVIF":
        if kind not in formats:
            return not_allowed(kind, formats)
        if failure := _missing(kind):
            return failure
        if kind == HEIF:
            return _open_heif(data)
        if kind == JXL:
            return JxlImage(io.BytesIO(data))
        # A still picture that is said to be a sequence has no track that libavif could open.
        if data[8:12] not in _PILLOW_AVIF or (data[8:12] == b"avis" and b"moov" not in data):
            data = data[:8] + b"avif" + data[12:]
    if (name := _by_signature(data)) is not None and name not in formats:
        return not_allowed(name, formats)
    reading = _prepared(data)
    if isinstance(reading, Failure):
        return reading
    image = Image.open(io.BytesIO(reading.data), formats=[name for name in formats if name not in PACKAGES])
    if image.format == "TIFF":
        image.info["reading"] = reading
        if reading.palette is not None:
            image.palette = ImagePalette.raw("RGB;L", reading.palette)
    return image


def _prepared(data: bytes) -> tiff.Reading | Failure:
    """A file for Pillow, without what it would misread."""
    if tiff.is_tiff(data):
        return tiff.prepare(data)
    if data.startswith(_JPEG_2000) and (depth := _jpeg_2000_depth(data)) < _FULL_DEPTH:
        # Pillow leaves their white at 128 to 254.
        return Failure("unsupported", f"a JPEG 2000 file of {depth} bits a sample is not decoded")
    if not data.startswith((bitmaps.BMP, bitmaps.ICO, *bitmaps.DIB)):
        return tiff.Reading(data)
    sound = bitmaps.prepare(data)
    return sound if isinstance(sound, Failure) else tiff.Reading(sound)


def _jpeg_2000_depth(data: bytes) -> int:
    """The least number of bits of a component; 8 where that cannot be read."""
    at = data.find(_JPEG_2000[1]) + 2
    components = data[at + 40 : at + 40 + 3 * int.from_bytes(data[at + 38 : at + 40], "big") : 3] if at > 1 else b""
    return min(((byte & 127) + 1 for byte in components), default=_FULL_DEPTH)


def family(data: bytes) -> str | None:
    """``AVIF``, ``HEIF`` or ``JXL`` by the first bytes; None for all that Pillow recognises."""
    if data.startswith((_JXL_CODESTREAM, _JXL_BOXES)):
        return JXL
    found = brands(data)
    if not found:
        return None
    # The major brand tells most; where it names no codec, the compatible ones do.
    for named in (found[:1], found):
        if _AVIF_BRANDS.intersection(named):
            return "AVIF"
        if _HEVC_BRANDS.intersection(named):
            return HEIF
    return HEIF if _HEIF_BRANDS.intersection(found) else None


def _by_signature(data: bytes) -> str | None:
    """The format of the files whose headers are looked at before Pillow does."""
    if tiff.is_tiff(data):
        return "TIFF"
    return next((name for mark, name in ((bitmaps.BMP, "BMP"), (bitmaps.ICO, "ICO")) if data.startswith(mark)), None)


def brands(data: bytes) -> list[bytes]:
    """The brands of a file of boxes, the major one first; empty for other files."""
    if data[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MOST_BRANDS)
    return [data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))]


def boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of a file (ISO/IEC 14496-12, 4.2): kind, and begin and end of the content.

    The end of a truncated file's last box lies behind the file. A box without a size reaches up to the end of the file.
    """
    position = 0
    for _ in range(_MOST_BOXES):
        size, kind, head = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        end = position + size if size >= 8 else len(data)
        yield kind, position + head, end
        position = end
        if position >= len(data):
            return


def not_allowed(name: str, formats: Sequence[str]) -> Failure:
    """The failure of a format that is not listed."""
    words = {HEIF: "HEIF (HEIC) is", JXL: "JXL (JPEG XL) is"}.get(name, f"{name} is")
    return Failure("format_not_allowed", f"{words} not among images.formats, which holds {', '.join(formats)}")


def installed(name: str) -> bool:
    """True if the package that decodes a format is there."""
    return name not in _MODULES or find_spec(_MODULES[name]) is not None


def load(formats: Sequence[str]) -> None:
    """Import the packages behind ``formats``, and have them use one thread and decode the picture alone."""
    if HEIF in formats and installed(HEIF):
        from pi_heif import options
        from pi_heif.as_plugin import HeifImageFile  # noqa: F401

        options.DECODE_THREADS = 1
        options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    if JXL in formats and installed(JXL):
        from pillow_jxl import JpegXLImagePlugin

        JpegXLImagePlugin.DECODE_THREADS = 0


def _missing(kind: str) -> Failure | None:
    if installed(kind):
        return None
    package, what, way_out = PACKAGES[kind]
    return Failure("unsupported", f"{what} are decoded by the package {package}, which is not installed: {way_out}")


def _open_heif(data: bytes) -> Image.Image | Failure:
    from pi_heif.as_plugin import HeifImageFile

    # libheif turns the picture as the file says, and pi-heif takes the orientation out of its EXIF.
    image: Image.Image = HeifImageFile(io.BytesIO(data))
    return image


class JxlImage(ImageFile.ImageFile):
    """JPEG XL of which the header alone was read; the plugin of Pillow decodes when it opens a file."""

    format = JXL
    format_description = "JPEG XL"

    def _open(self) -> None:
        assert self.fp is not None
        self._encoded = self.fp.read()
        self._size, self._mode, self.tile = jxl_size(self._encoded), "RGB", []

    def load(self) -> Any:
        """Decode the picture."""
        if self._encoded:
            from pillow_jxl.JpegXLImagePlugin import JXLImageFile

            try:
                image = JXLImageFile(io.BytesIO(self._encoded))
            except RuntimeError as error:
                # Its own message is about how libjxl was built.
                raise OSError("libjxl cannot decode it: the data ends early or is damaged") from error
            with image:
                image.load()  # type: ignore[no-untyped-call]
                self._mode, self._size, self.im = image.mode, image.size, image.im
                # libjxl has turned the picture; a JPEG that was packed losslessly is turned by its EXIF.
                self.info = image.info if image.jpeg else {}
            self._encoded = b""
        return super().load()


class _Bits:
    """Bits of a codestream, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._at = int.from_bytes(data[:64], "little"), 0

    def take(self, count: int) -> int:
        value = self._value >> self._at & ((1 << count) - 1)
        self._at += count
        return value

    def number(self, *widths: int) -> int:
        return self.take(widths[self.take(2)])


def jxl_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header of a JPEG XL file (ISO/IEC 18181-1, annex D).

    Raises:
        ValueError: it has none, or is an animation, whose frames the plugin does not tell apart.
    """
    bits = _Bits(_codestream(data))
    width, height = _jxl_extent(bits)
    orientation = 1
    if not bits.take(1) and bits.take(1):
        orientation = 1 + bits.take(3)
        if bits.take(1):
            _jxl_extent(bits)
        if bits.take(1) or bits.take(1):
            raise ValueError("unsupported: JPEG XL with a preview or an animation")
    return (height, width) if orientation > 4 else (width, height)


def _jxl_extent(bits: _Bits) -> tuple[int, int]:
    small = bits.take(1)

    def side() -> int:
        return 8 * (1 + bits.take(5)) if small else 1 + bits.number(9, 13, 18, 30)

    height = side()
    ratio = bits.take(3)
    across, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (height * across // down if ratio else side()), height


def _codestream(data: bytes) -> bytes:
    """The first bytes behind the signature of the codestream."""
    position = 0
    if data.startswith(_JXL_BOXES):
        # A part of a codestream begins with its number.
        begins = (begin + 4 * (kind == b"jxlp") for kind, begin, _ in boxes(data) if kind in (b"jxlc", b"jxlp"))
        position = next(begins, 0)
    if data[position : position + 2] != _JXL_CODESTREAM or len(data) < position + 12:
        raise ValueError("truncated: no JPEG XL codestream")
    return data[position + 2 : position + 66]
