"""Every rule of the decoder, each on an image that the test makes, and a folder of odd files."""

from __future__ import annotations

import csv
import io
import resource
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from pipeline.config.schema import FORMATS, PILLOW_FORMATS
from pipeline.core.records import Failure
from pipeline.images.decode import Decoder, limit_pixels
from tests.conftest import data_folder
from tests.pictures import saved

Array = NDArray[Any]
MAX_PIXELS = 100_000_000
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
# What a format's own rounding may change in a smooth photo.
LOSSY = {"AVIF": 4.0, "GIF": 4.0, "JPEG": 4.0, "WEBP": 4.0}


@pytest.fixture(autouse=True)
def _limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_pixels(MAX_PIXELS)


def decoder(**settings: Any) -> Decoder:
    return Decoder(**{"formats": FORMATS, "max_pixels": MAX_PIXELS, **settings})


def decode(data: bytes, **settings: Any) -> Array:
    image = decoder(**settings).decode(data)
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return np.asarray(image)


def failure(data: bytes, **settings: Any) -> Failure:
    result = decoder(**settings).decode(data)
    assert isinstance(result, Failure), result
    assert result.error
    return result


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with any header; ``rows`` are the samples without filter bytes."""
    stride = len(rows) // height if height else 0
    raw = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride or 1))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture without any symmetry."""
    down, across = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [across / width * 255, down / height * 255, 255 * (across / width) ** 2 * (down / height)]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def colours(array: Array) -> list[tuple[int, ...]]:
    """The pixels of the first row."""
    return [tuple(int(value) for value in pixel) for pixel in array[0]]


# Formats


@pytest.mark.parametrize("name", PILLOW_FORMATS)
def test_every_format_of_the_list_decodes(name: str) -> None:
    image = photo(48, 48)
    difference = np.abs(decode(saved(image, name)).astype(float) - np.asarray(image))
    assert difference.mean() <= LOSSY.get(name, 0)


@pytest.mark.parametrize("name", PILLOW_FORMATS)
def test_every_format_is_refused_when_it_is_not_listed(name: str) -> None:
    # TGA and DIB have no signature: other plugins get the first look at those bytes.
    others = tuple(other for other in FORMATS if other not in (name, "TGA", "DIB", "BMP"))
    result = failure(saved(photo(), name), formats=others)
    assert result.status == "format_not_allowed"
    assert name in result.error or name == "TGA"


def test_a_format_is_known_by_its_content_alone() -> None:
    assert decoder(formats=("PNG",)).decode(saved(photo(), "JPEG")) != photo()
    assert failure(saved(photo(), "JPEG"), formats=("PNG",)).status == "format_not_allowed"


FOREIGN = {
    "EPS": saved(photo(), "EPS"),
    "PDF": saved(photo(), "PDF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="5"/></svg>',
    "SVG with a declaration": b'\n<?xml version="1.0"?>\n<svg/>',
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "FITS": b"SIMPLE  =                    T" + b" " * 3000,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "DDS": saved(photo(), "DDS"),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(100),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_format_is_named_as_one(name: str) -> None:
    assert failure(FOREIGN[name]).status == "format_not_allowed"


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\0" * 1000,
        b"<!DOCTYPE html><html>404</html>",
        b'{"error": "gone"}',
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        b"ID3\3\0" + bytes(100),
        b"PK\3\4" + bytes(100),
        np.random.default_rng(0).bytes(5000),
    ],
)
def test_what_is_no_image_is_named_as_none(data: bytes) -> None:
    assert failure(data).status == "not_an_image"


# Size


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_the_limit_counts_pixels_exactly(name: str) -> None:
    data = saved(photo(20, 10), name)
    assert decode(data, max_pixels=200).shape == (10, 20, 3)
    assert failure(data, max_pixels=199).status == "too_many_pixels"


def test_a_huge_header_is_refused_before_a_pixel_is_decoded() -> None:
    header = png(60_000, 60_000, 8, 2, b"")
    started = time.perf_counter()
    assert failure(header).status == "too_many_pixels"
    assert failure(header, max_pixels=2_000_000_000).status == "too_many_pixels"
    assert time.perf_counter() - started < 1


def test_a_small_icon_cannot_hide_a_large_picture() -> None:
    limit_pixels(10_000)
    large = saved(Image.new("RGB", (300, 300)), "PNG")
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(large), 22)
    assert failure(directory + large, max_pixels=10_000).status == "too_many_pixels"


def test_giants_decode_one_after_the_other_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.decode.LARGE_PIXELS", 1000)
    data = saved(photo(), "PNG")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(decode, [data] * 16))
    assert all(np.array_equal(result, np.asarray(photo())) for result in results)


# EXIF


def upright(stored: Array, orientation: int) -> Array:
    """EXIF 2.32, 4.6.4: where the stored first row and first column belong."""
    turns = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }
    return turns[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_the_exif_orientation_is_applied_or_ignored(name: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.asarray(photo()).astype(float)
    data = saved(photo(), name, exif=exif.tobytes() if name != "TIFF" else exif, **options)
    for rule, wanted in (("apply", upright(stored, orientation)), ("ignore", stored)):
        got = decode(data, exif=rule)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).mean() <= (3 if name in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(decode(saved(photo(), "PNG", exif=exif.tobytes())), np.asarray(photo()))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_metadata_does_not_cost_the_picture(name: str, exif: bytes) -> None:
    assert np.array_equal(decode(saved(photo(), name, exif=exif)), decode(saved(photo(), name)))


# The first frame


@pytest.mark.parametrize(
    ("name", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {"quality": 100}), ("AVIF", {})],
)
def test_of_an_animation_the_first_frame_counts(name: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(decode(data).astype(int) - RED).max() <= (4 if name in ("MPO", "AVIF") else 0)


def test_of_an_icon_the_largest_size_counts() -> None:
    sizes = [(16, 16), (48, 48), (32, 32)]
    data = saved(photo(48, 48), "ICO", sizes=sizes)
    assert np.array_equal(decode(data), np.asarray(photo(48, 48)))


# Transparency: a pixel that is half there, one that is not there at all, and one that is.


def with_alpha(mode: str) -> tuple[bytes, list[tuple[int, ...]], list[int]]:
    """An encoded 3 x 1 picture, its colours and its alphas."""
    if mode == "RGBA":
        image = Image.new("RGBA", (3, 1))
        image.putdata([(*RED, 128), (*GREEN, 0), (*BLUE, 255)])
        return saved(image, "PNG"), [RED, GREEN, BLUE], [128, 0, 255]
    if mode == "LA":
        image = Image.new("LA", (3, 1))
        image.putdata([(200, 128), (100, 0), (50, 255)])
        return saved(image, "PNG"), [(200,) * 3, (100,) * 3, (50,) * 3], [128, 0, 255]
    if mode in ("P", "P with one clear colour"):
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        alphas = [128, 0, 255] if mode == "P" else [255, 0, 255]
        clear: bytes | int = bytes(alphas) if mode == "P" else 1
        return saved(image, "PNG", transparency=clear), [RED, GREEN, BLUE], alphas
    if mode == "GIF":
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        return saved(image, "GIF", transparency=1), [RED, GREEN, BLUE], [255, 0, 255]
    if mode == "PA":
        image = Image.new("PA", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([(0, 128), (1, 0), (2, 255)])
        return saved(image, "TIFF"), [RED, GREEN, BLUE], [128, 0, 255]
    if mode == "RGB with tRNS":
        image = Image.new("RGB", (3, 1))
        image.putdata([RED, GREEN, BLUE])
        return saved(image, "PNG", transparency=GREEN), [RED, GREEN, BLUE], [255, 0, 255]
    if mode == "L with tRNS":
        image = Image.new("L", (3, 1))
        image.putdata([200, 100, 50])
        return saved(image, "PNG", transparency=100), [(200,) * 3, (100,) * 3, (50,) * 3], [255, 0, 255]
    if mode == "1 with tRNS":
        return png(3, 1, 1, 0, b"\xa0", (b"tRNS", b"\0\0")), [WHITE, BLACK, WHITE], [255, 0, 255]
    if mode == "RGB with tRNS, 16 bits":
        rows = struct.pack(">9H", 0xFFFF, 0, 0, 0, 0xFFFF, 0, 0, 0, 0xFFFF)
        return png(3, 1, 16, 2, rows, (b"tRNS", struct.pack(">3H", 0, 0xFFFF, 0))), [RED, GREEN, BLUE], [255, 0, 255]
    if mode == "WebP":
        image = Image.new("RGBA", (3, 1))
        image.putdata([(*RED, 128), (*GREEN, 0), (*BLUE, 255)])
        return saved(image, "WEBP", lossless=True, exact=True), [RED, GREEN, BLUE], [128, 0, 255]
    raise ValueError(mode)


ALPHA_MODES = [
    "RGBA", "LA", "P", "P with one clear colour", "GIF", "PA", "RGB with tRNS", "L with tRNS", "1 with tRNS",
    "RGB with tRNS, 16 bits", "WebP",
]  # fmt: skip


@pytest.mark.parametrize("mode", ALPHA_MODES)
@pytest.mark.parametrize(("rule", "background"), [("white", 255), ("black", 0), ("drop", None)])
def test_transparent_pixels_show_the_background(mode: str, rule: str, background: int | None) -> None:
    data, stored, alphas = with_alpha(mode)
    for got, colour, alpha in zip(colours(decode(data, transparency=rule)), stored, alphas, strict=True):
        if background is None:
            assert got == colour
        else:
            wanted = [value * alpha / 255 + background * (1 - alpha / 255) for value in colour]
            assert got == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("rule", ["white", "black", "drop"])
def test_an_opaque_alpha_channel_changes_nothing(rule: str) -> None:
    image = photo()
    image.putalpha(255)
    assert np.array_equal(decode(saved(image, "PNG"), transparency=rule), np.asarray(photo()))


# Deep samples

STEPS = [0, 255, 256, 0x1234, 0x8000, 0xFFFF]
HIGH = [0, 0, 1, 0x12, 0x80, 0xFF]


def deep(kind: str) -> bytes:
    """Six grey pixels of 16 bits."""
    if kind == "PNG":
        return png(6, 1, 16, 0, struct.pack(">6H", *STEPS))
    if kind == "PGM":
        return b"P5 6 1 65535\n" + struct.pack(">6H", *STEPS)
    if kind == "TIFF, mode I":
        return saved(Image.fromarray(np.asarray([STEPS], dtype=np.int32)), "TIFF")
    if kind == "JPEG 2000":
        return saved(Image.fromarray(np.asarray([STEPS], dtype=np.uint16)), "JPEG2000", irreversible=False)
    mode, order = ("I;16B", ">u2") if "big" in kind else ("I;16", "<u2")
    image = Image.frombytes(mode, (6, 1), np.asarray(STEPS, dtype=order).tobytes())
    return saved(image, "TIFF", **({"compression": "tiff_lzw"} if "LZW" in kind else {}))


@pytest.mark.parametrize(
    "kind",
    ["PNG", "PGM", "TIFF", "TIFF, LZW", "TIFF, big-endian", "TIFF, big-endian, LZW", "TIFF, mode I", "JPEG 2000"],
)
def test_of_sixteen_bits_the_high_byte_counts(kind: str) -> None:
    assert colours(decode(deep(kind))) == [(value,) * 3 for value in HIGH]


def test_of_sixteen_bits_in_colour_the_high_byte_counts() -> None:
    rows = struct.pack(">6H", 0, 255, 256, 0x1234, 0x8000, 0xFFFF)
    assert colours(decode(png(2, 1, 16, 2, rows))) == [(0, 0, 1), (0x12, 0x80, 0xFF)]
    rows = struct.pack(">4H", 0x1234, 0x8000, 0xFFFF, 0xFFFF)
    assert colours(decode(png(1, 1, 16, 6, rows))) == [(0x12, 0x80, 0xFF)]


@pytest.mark.parametrize("value", [-5, 65_536, 2**31 - 1])
def test_integers_beyond_sixteen_bits_have_no_black_and_white(value: int) -> None:
    values = np.asarray([[0, 65_535, value]], dtype=np.int32)
    assert colours(decode(saved(Image.fromarray(values[:, :2]), "TIFF"))) == [BLACK, WHITE]
    assert failure(saved(Image.fromarray(values), "TIFF")).status == "unsupported"


def test_floats_are_scaled_from_their_lowest_to_their_highest() -> None:
    values = np.asarray([[-1.0, 0.0, 1.0, np.nan, np.inf]], dtype=np.float32)
    grey = [pixel[0] for pixel in colours(decode(saved(Image.fromarray(values), "TIFF")))]
    assert grey == [0, 128, 255, 128, 128]
    flat = Image.fromarray(np.full((2, 2), 3.5, dtype=np.float32))
    assert set(colours(decode(saved(flat, "TIFF")))) == {BLACK}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_turn_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3) * 256 * 40
    data = saved(Image.fromarray(stored), "PNG", exif=exif.tobytes())
    grey = np.repeat((stored >> 8)[:, :, None], 3, axis=2)
    assert np.array_equal(decode(data), upright(grey, orientation))


# Colour


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    for name in ("PNG", "TIFF", "BMP", "PPM"):
        assert colours(decode(saved(image, name))) == [BLACK, WHITE]


def test_a_palette_is_expanded() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*BLUE, *RED, *GREEN])
    image.putdata([1, 2, 0])
    for name in ("PNG", "GIF", "BMP", "TIFF", "TGA"):
        assert colours(decode(saved(image, name))) == [RED, GREEN, BLUE]


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_inks_become_light(name: str) -> None:
    ink = {RED: (0, 255, 255, 0), WHITE: (0, 0, 0, 0), BLACK: (0, 0, 0, 255), (0, 255, 255): (255, 0, 0, 0)}
    for colour, inks in ink.items():
        got = decode(saved(Image.new("CMYK", (8, 8), inks), name))
        assert np.abs(got.astype(int) - colour).max() <= 3


def test_luma_and_chroma_become_colours() -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 50)).convert("YCbCr")
    assert np.abs(decode(saved(image, "TIFF")).astype(int) - (200, 100, 50)).max() <= 2


def test_lab_becomes_colours() -> None:
    lab = ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    for colour in (WHITE, BLACK, (128, 128, 128), (200, 100, 50)):
        image = ImageCms.applyTransform(Image.new("RGB", (4, 4), colour), transform)
        assert image is not None
        assert np.abs(decode(saved(image, "TIFF")).astype(int) - colour).max() <= 3


def test_a_colour_profile_is_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert np.array_equal(decode(saved(photo(), "PNG", icc_profile=profile)), np.asarray(photo()))


# Damage


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", [name for name in PILLOW_FORMATS if name != "ICO"])
def test_a_truncated_image_is_no_half_picture(name: str, kept: float) -> None:
    data = saved(photo(), name)
    assert failure(data[: int(len(data) * kept)]).status == "truncated"


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"])
def test_a_truncated_compressed_tiff_is_truncated(compression: str) -> None:
    data = saved(photo(), "TIFF", compression=compression)
    assert failure(data[: len(data) // 2]).status == "truncated"


def test_a_truncated_animation_is_truncated() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert failure(data[: len(data) // 2]).status == "truncated"


def test_a_progressive_jpeg_without_its_last_scans_is_truncated() -> None:
    data = saved(photo(640, 480), "JPEG", progressive=True)
    assert failure(data[: int(len(data) * 0.9)]).status == "truncated"


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO"])
def test_a_signature_without_an_image_is_damage(name: str) -> None:
    data = saved(photo(), name)
    assert failure(data[:12] + b"\xee" * (len(data) - 12)).status in ("corrupt", "truncated")


def test_a_png_with_damaged_pixels_is_corrupt() -> None:
    data = bytearray(saved(photo(), "PNG"))
    at = data.index(b"IDAT") + 20
    data[at : at + 40] = b"\xaa" * 40
    assert failure(bytes(data)).status == "corrupt"


def test_a_variant_that_pillow_does_not_decode_is_unsupported() -> None:
    data = bytearray(saved(photo(), "BMP"))
    data[30:34] = struct.pack("<I", 4)  # biCompression: a JPEG inside
    assert failure(bytes(data)).status == "unsupported"


@pytest.mark.parametrize("behind", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("name", "head"), [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"Profile\0\0")]
)
def test_a_text_bomb_in_a_png_costs_the_text_alone(name: bytes, head: bytes, behind: bool) -> None:
    bomb = name, head + zlib.compress(bytes(200_000_000))
    data = png(2, 1, 8, 0, b"\x10\x20", *([] if behind else [bomb]))
    if behind:
        data = data[:-12] + chunk(*bomb) + data[-12:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert colours(decode(data)) == [(16,) * 3, (32,) * 3]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_much_text_in_a_png_costs_the_text_alone() -> None:
    texts = [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000)))] * 70
    assert colours(decode(png(1, 1, 8, 0, b"\x10", *texts))) == [(16,) * 3]


def test_a_damaged_png_with_text_stays_corrupt() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "words")
    data = bytearray(saved(photo(), "PNG", pnginfo=info))
    at = data.index(b"IDAT") + 20
    data[at : at + 40] = b"\xaa" * 40
    assert failure(bytes(data)).status == "corrupt"


def test_the_picture_stands_alone() -> None:
    image = decoder().decode(saved(photo(), "PNG"))
    assert isinstance(image, Image.Image)
    assert not hasattr(image, "fp")
    assert np.array_equal(np.asarray(image.rotate(180).rotate(180)), np.asarray(photo()))


def test_tiff_tags_of_the_wrong_type_do_not_stop_the_run() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[ExifTags.Base.Orientation] = 6
    data = bytearray(saved(photo(), "TIFF", tiffinfo=info))
    at = data.index(struct.pack("<HHI", ExifTags.Base.Orientation, 3, 1))
    data[at + 2 : at + 4] = struct.pack("<H", 2)
    decoder().decode(bytes(data))


# The folder of odd files: what each one that gives no picture is called.

ODD = {
    "corrupt": """
        image-rs/regression/jpg/oss-fuzz-36829.jpeg
        pillow/apng/chunk_no_fctl.png
        pillow/apng/syntax_num_frames_zero.png
        pillow/balloon_eciRGBv2_aware.jp2
        pillow/crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif
        pillow/crash-2020-10-test.tif
        pillow/crash-4fb027452e6988530aa5dabee76eecacb3b79f8a.j2k
        pillow/crash-d2c93af851d3ab9a19e34503626368b2ecde9c03.j2k
        pillow/expected_to_read.jp2
        pillow/seek_too_large.tif
    """,
    "too_many_pixels": """
        image-rs/bad/bmp/Bad_height.bmp
        image-rs/bad/bmp/Bad_reallybig.bmp
        pillow/bmp/b/badwidth.bmp
        pillow/decompression_bomb.gif
        pillow/decompression_bomb.ico
    """,
    "truncated": """
        image-rs/bad/bmp/Bad_shortfile.bmp
        image-rs/images/bmp/images/pal4rlecut.bmp
        image-rs/regression/ico/crash-981fee302fe0fc543ee48292cc3d6ace7e97e633.ico
        image-rs/regression/tga/overfull-image.tga
        image-rs/regression/tga/slice-copy-length.tga
        pillow/00r0_gray_l.jp2
        pillow/broken_data_stream.png
        pillow/cross_scan_line_truncated.tga
        pillow/truncated_image.png
        pillow/ultrahdr.jpg
    """,
    "unsupported": """
        image-rs/bad/bmp/Bad_badbitcount.bmp
        image-rs/bad/bmp/Bad_clrsUsed.bmp
        image-rs/images/bmp/images/V3_X4_R4_G4_B4.bmp
        image-rs/images/bmp/images/lenient/badpalettesize.bmp
        image-rs/images/bmp/images/rgb24rle24.bmp
        image-rs/reference/hdr/images/old-rle.hdr.tiff
        pillow/16bit.s.tif
        pillow/8bit.s.tif
        pillow/bmp/b/badheadersize.bmp
        pillow/bmp/q/pal2.bmp
        pillow/bmp/q/pal8oversizepal.bmp
        pillow/bmp/q/pal8os2v2-16.bmp
        pillow/bmp/q/rgb24jpeg.bmp
        pillow/bmp/q/rgba32abf.bmp
        pillow/hopper_webp.tif
    """,
}


def test_every_odd_file_gives_a_picture_or_says_why_not(capfd: pytest.CaptureFixture[str]) -> None:
    folder = data_folder("odd")
    with (folder / "inventory.csv").open(newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert len(names) == 150
    failures = {}
    for name in names:
        data = (folder / name).read_bytes()
        started = time.perf_counter()
        result = decoder().decode(data)
        assert time.perf_counter() - started < 5, name
        if isinstance(result, Failure):
            failures[name] = result.status
        else:
            assert result.mode == "RGB"
            assert result.width * result.height > 0
    assert failures == {name: status for status, listed in ODD.items() for name in listed.split()}
    capfd.readouterr()  # libtiff complains on stderr
