"""TIFF files of every layout of samples: each is what it shows, or unsupported, and never something else."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.core.records import Failure
from pipeline.images.decode import Decoder
from pipeline.images.tiff import Reading, prepare
from tests.pictures import saved
from tests.tiffs import Layout, assemble, tiff

Array = NDArray[Any]
HEIGHT, WIDTH = 37, 53
DOWN, ACROSS = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
# The lowest and the highest level are there, for floats.
GREY = (ACROSS * 3 + DOWN * 2) / ((WIDTH - 1) * 3 + (HEIGHT - 1) * 2) * 255
RGB = np.stack([ACROSS / WIDTH * 255, DOWN / HEIGHT * 255, (ACROSS + DOWN) / (WIDTH + HEIGHT) * 255], axis=2)
ALPHA = np.where(ACROSS < WIDTH // 2, 255.0, 128.0)
# Byte order, compression, pieces, planes.
PIECES: dict[str, dict[str, int]] = {"one strip": {}, "strips": {"strip": 10}, "tiles": {"tile": 16}}
STORED = tuple(itertools.product("<>", (False, True), PIECES, (1, 2)))
LITTLE, PACKED, RAW, ONE_PLANE = (
    frozenset(stored for stored in STORED if stored[index] == value)
    for index, value in ((0, "<"), (1, True), (1, False), (3, 1))
)
ALL, NONE = frozenset(STORED), frozenset[Any]()
DECODER = Decoder(formats=("TIFF",), max_pixels=10**8)


def on_white(colours: Array, alpha: Array = ALPHA) -> Array:
    share = alpha[:, :, None] / 255 if colours.ndim == 3 else alpha / 255
    return colours * share + 255 * (1 - share)


def levels(picture: Array, bits: int) -> Array:
    """The picture as samples of so many bits."""
    return np.round(picture / 255 * (2**bits - 1))


def shown(picture: Array, bits: int) -> Array:
    """The picture with as few levels as so many bits have."""
    return levels(picture, bits) / (2**bits - 1) * 255


def difference(data: bytes, wanted: Array) -> float | str:
    """The mean difference of the levels, or why the file is unsupported."""
    result = DECODER.decode(data)
    if isinstance(result, Failure):
        assert result.status == "unsupported", result
        assert result.error.startswith("a TIFF file") or "raw mode" in result.error or "32 bits" in result.error
        return result.error
    if wanted.ndim == 2:
        wanted = np.repeat(wanted[:, :, None], 3, axis=2)
    pixels = np.asarray(result).astype(np.float64)
    assert pixels.shape == wanted.shape
    return float(np.abs(pixels - wanted).mean())


def check(samples: Array, wanted: Array, faithful: frozenset[Any], near: float = 1.0, **layout: Any) -> None:
    """In each way in which the samples can be stored, the file is near ``wanted``, or unsupported."""
    for stored in STORED:
        order, deflate, pieces, planar = stored
        data = tiff(samples, Layout(order=order, deflate=deflate, planar=planar, **PIECES[pieces], **layout))
        found = difference(data, wanted)
        if stored in faithful:
            assert isinstance(found, float), (stored, layout, found)
        if isinstance(found, float):
            assert found <= near, (stored, layout)


@pytest.mark.parametrize("fill", [1, 2])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32])
def test_grey_of_every_depth(bits: int, white_is_zero: bool, fill: int) -> None:
    # Of 32 bits the white is known as far as 16 bits go.
    samples = levels(GREY, 16 if bits == 32 else bits)
    if white_is_zero:
        samples = 2.0**bits - 1 - samples
    faithful = {12: LITTLE, 32: LITTLE if not white_is_zero else NONE}.get(bits, ALL) if bits in DEPTHS else NONE
    if fill == 2:
        faithful = {8: PACKED if white_is_zero else ALL, 12: NONE, 16: LITTLE, 32: NONE}.get(bits, faithful)
    wanted = shown(GREY, bits) if bits != 32 else GREY
    check(samples, wanted, faithful, bits=bits, photometric=int(not white_is_zero), fill=fill)


DEPTHS = (1, 2, 4, 8, 12, 16, 32)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_floats(bits: int, white_is_zero: bool) -> None:
    faithful = (LITTLE | RAW) if bits == 32 else NONE
    samples = (255 - GREY if white_is_zero else GREY) / 255
    check(samples, GREY, faithful, bits=bits, form=3, photometric=int(not white_is_zero))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("lowest", [0, -1])
def test_signed_samples_and_deep_integers_have_no_known_black_and_white(bits: int, lowest: int) -> None:
    span = 2.0 ** (bits - 1)
    samples = np.round(GREY / 255 * (span - 1)) if lowest == 0 else np.round(GREY / 255 * (2 * span - 1) - span)
    check(np.clip(samples, -span, span - 1024 if bits == 64 else span - 1), GREY, NONE, bits=bits, form=2)


def test_unsigned_integers_beyond_sixteen_bits_have_no_known_white() -> None:
    check(levels(GREY, 32), GREY, NONE, bits=32)
    check(levels(GREY, 20), GREY, NONE, bits=32)


@pytest.mark.parametrize("form", [4, 5, 6])
def test_samples_of_no_known_kind(form: int) -> None:
    check(levels(GREY, 8), GREY, NONE, form=form)


@pytest.mark.parametrize("bits", [2, 4, 5, 8, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize(("photometric", "samples"), [(2, RGB), (5, np.dstack([255 - RGB, 0 * GREY]))])
def test_colours_and_inks(bits: int, photometric: int, samples: Array) -> None:
    faithful = {8: ALL, 16: ONE_PLANE | PACKED}.get(bits, NONE)
    check(levels(samples, bits), RGB, faithful, bits=bits, photometric=photometric)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floats_in_colour(bits: int) -> None:
    check(RGB / 255, RGB, NONE, bits=bits, form=3, photometric=2)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,), (2, 0), (0, 0), (1, 0)], ids=str)
def test_colours_with_alpha_and_other_samples(bits: int, extra: tuple[int, ...]) -> None:
    """Extra samples: 0 is unspecified, 1 premultiplied alpha, 2 alpha."""
    has_alpha = not extra or extra[0] > 0
    colours = RGB * ALPHA[:, :, None] / 255 if extra[:1] == (1,) else RGB
    samples = np.dstack([colours, ALPHA, *([ALPHA] if len(extra) == 2 else [])])
    faithful = NONE if len(extra) == 2 and bits == 16 else ONE_PLANE
    if extra == (2,):
        faithful |= PACKED | (RAW if bits == 8 else NONE)
    check(levels(samples, bits), on_white(RGB) if has_alpha else RGB, faithful, bits=bits, photometric=2, extra=extra)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)], ids=str)
def test_grey_with_alpha(bits: int, extra: tuple[int, ...], photometric: int) -> None:
    grey = GREY * ALPHA / 255 if extra == (1,) else GREY
    samples = np.dstack([grey if photometric else 255 - grey, ALPHA])
    wanted = GREY if extra in ((), (0,)) else on_white(GREY)
    faithful = ONE_PLANE if bits == 8 and extra and photometric else NONE
    check(levels(samples, bits), wanted, faithful, bits=bits, photometric=photometric, extra=extra)


def test_a_fourth_sample_that_no_tag_names_and_that_is_zero_is_no_alpha() -> None:
    samples = levels(np.dstack([RGB, 0 * GREY]), 8)
    assert difference(tiff(samples, Layout(photometric=2)), RGB) <= 1
    assert difference(tiff(samples, Layout(photometric=2, extra=(2,))), 0 * RGB + 255) == 0


@pytest.mark.parametrize("extra", [(0,), (2,)], ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_inks_with_other_samples(bits: int, extra: tuple[int, ...]) -> None:
    samples = np.dstack([255 - RGB, 0 * GREY, ALPHA])
    faithful = ONE_PLANE if bits == 8 and extra == (0,) else NONE
    check(
        levels(samples, bits), RGB if extra == (0,) else on_white(RGB), faithful, bits=bits, photometric=5, extra=extra
    )


def test_inks_of_another_kind_are_no_cmyk() -> None:
    check(levels(np.dstack([255 - RGB, 0 * GREY]), 8), RGB, NONE, photometric=5, tags={332: [2]})


@pytest.mark.parametrize("highest", [255, 65_535])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_palettes_of_both_scales(bits: int, highest: int) -> None:
    count = 2**bits
    ramp = np.arange(count) / (count - 1)
    table = np.round(np.stack([ramp, 1 - ramp, np.roll(ramp, 1)]) * highest).astype(int)
    samples = levels(GREY, bits).astype(int)
    wanted = table[:, samples].transpose(1, 2, 0) / highest * 255
    check(samples, wanted, ALL if bits < 16 else NONE, bits=bits, photometric=3, tags={320: table.ravel().tolist()})


def test_a_palette_with_alpha() -> None:
    ramp = np.arange(256) * 257
    table = np.stack([ramp, ramp[::-1], np.roll(ramp, 1)])
    samples = np.dstack([levels(GREY, 8), ALPHA]).astype(int)
    wanted = on_white(table[:, samples[:, :, 0]].transpose(1, 2, 0) / 257)
    check(samples, wanted, ONE_PLANE, photometric=3, extra=(2,), tags={320: table.ravel().tolist()})


def chroma() -> Array:
    return np.asarray(Image.fromarray(RGB.astype(np.uint8)).convert("YCbCr")).astype(np.float64)


def test_luma_and_chroma() -> None:
    check(chroma(), RGB, (ONE_PLANE | PACKED), near=2, photometric=6, tags={530: [1, 1]})
    # Broadcast levels: black is 16, white 235.
    reference = {530: [1, 1], 532: [16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1]}
    assert "black and white" in str(difference(tiff(chroma(), Layout(photometric=6, tags=reference)), RGB))


@pytest.mark.parametrize("order", "<>")
def test_subsampled_chroma_is_decoded_with_compression_alone(order: str) -> None:
    """Units of 2 x 2 pixels: four of luma, one of each chroma."""
    full = chroma()[:36, :52]
    means = full[:, :, 1:].reshape(18, 2, 26, 2, 2).mean(axis=(1, 3))
    luma = full[:, :, 0].reshape(18, 2, 26, 2).transpose(0, 2, 1, 3).reshape(18, 26, 4)
    units = np.concatenate([luma, means], axis=2).round().astype(np.uint8)
    for deflate in (False, True):
        layout = Layout(photometric=6, order=order, deflate=deflate)
        size = {256: [52], 257: [36], 277: [3], 278: [36]}
        tags = {**size, 258: [8] * 3, 259: [8 if deflate else 1], 262: [6], 530: [2, 2]}
        body = units.tobytes()
        data = assemble([tags], [zlib.compress(body) if deflate else body], layout)
        found = difference(data, RGB[:36, :52])
        assert (isinstance(found, float) and found < 3) if deflate else isinstance(found, str)


def test_lab_is_decoded_in_one_plane() -> None:
    lab = ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    image = ImageCms.applyTransform(Image.fromarray(RGB.astype(np.uint8)), transform)
    assert image is not None
    signed = np.frombuffer(image.tobytes(), np.uint8).reshape(HEIGHT, WIDTH, 3)
    check(signed, RGB, ONE_PLANE, near=3, photometric=8)
    check(signed ^ np.array([0, 128, 128], np.uint8), RGB, NONE, near=3, photometric=9)


@pytest.mark.parametrize("photometric", [4, 9, 10, 32_844, 32_845, 51_177])
def test_photometric_kinds_without_a_rule(photometric: int) -> None:
    check(levels(GREY, 8), GREY, NONE, photometric=photometric)


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_a_file_that_does_not_say_what_zero_is(bits: int) -> None:
    faithful = LITTLE if bits == 16 else NONE
    check(levels(GREY, bits), shown(GREY, bits), faithful, bits=bits, tags={262: None})


@pytest.mark.parametrize("bands", [4, 5, 7, 13])
@pytest.mark.parametrize("bits", [8, 16])
def test_bands_of_satellites(bits: int, bands: int) -> None:
    check(np.dstack([levels(GREY, bits)] * bands), GREY, NONE, bits=bits, extra=(0,) * (bands - 1))


@pytest.mark.parametrize(("predictor", "compression"), [(2, 32_773), (3, 32_773), (34_892, 8), (7, 5)])
def test_predictors_that_decoders_disagree_about_are_named(predictor: int, compression: int) -> None:
    found = difference(tiff(levels(GREY, 8), Layout(tags={259: [compression], 317: [predictor]})), GREY)
    assert f"predictor {predictor}" in str(found)


@pytest.mark.parametrize("compression", [9, 34_661, 34_712, 34_887, 50_001, 50_002, 65_000])
def test_compressions_that_are_not_decoded_are_named(compression: int) -> None:
    found = difference(tiff(levels(GREY, 8), Layout(tags={259: [compression]})), GREY)
    assert f"compression {compression}" in str(found)


@pytest.mark.parametrize("order", "<>")
def test_large_files_of_both_byte_orders(order: str) -> None:
    found = difference(tiff(levels(RGB, 8), Layout(photometric=2, order=order, big=True)), RGB)
    assert isinstance(found, float) == (order == "<")


# Raw files of cameras.


def thumbnail(**more: Any) -> bytes:
    """A file whose first picture is small, with another page as ``more`` says."""
    layout = Layout(photometric=2, order=more.get("order", "<"))
    small = np.zeros((8, 8, 3))
    body = small.astype(np.uint8).tobytes()
    first = {256: [8], 257: [8], 258: [8] * 3, 259: [1], 262: [2], 277: [3], 278: [8], **more.get("first", {})}
    return assemble([first, *more.get("pages", [])], [body], layout)


SENSOR = {254: [0], 256: [4000], 257: [3000], 258: [14], 259: [1], 262: [32_803], 277: [1]}
RAW_FILES = {
    "a thumbnail before the sensor's page": thumbnail(first={254: [1]}, pages=[SENSOR]),
    "a thumbnail that is not said to be one": thumbnail(pages=[SENSOR]),
    "a thumbnail of another page": thumbnail(first={254: [1]}, pages=[{256: [4000], 257: [3000], 262: [2]}]),
    "big-endian": thumbnail(order=">", first={254: [1]}, pages=[SENSOR]),
    "linear samples": thumbnail(pages=[{**SENSOR, 262: [34_892]}]),
    "DNG": thumbnail(first={50_706: [1, 4, 0, 0]}),
    "the sensor alone": thumbnail(first={262: [32_803]}),
}


@pytest.mark.parametrize("name", RAW_FILES)
def test_the_thumbnail_of_a_raw_file_is_never_the_photo(name: str) -> None:
    result = DECODER.decode(RAW_FILES[name])
    assert isinstance(result, Failure)
    assert result.status == "unsupported"
    assert "camera" in result.error


def test_a_sub_page_with_sensor_data_is_found() -> None:
    data = thumbnail(pages=[SENSOR])
    # The page is moved from behind the first one to within it.
    at = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, at)[0]
    following = at + 2 + 12 * count
    (page,) = struct.unpack_from("<I", data, following)
    moved = thumbnail(first={330: [page + 12]}, pages=[SENSOR])
    at = struct.unpack_from("<I", moved, 4)[0] + 2 + 12 * (count + 1)
    moved = moved[:at] + bytes(4) + moved[at + 4 :]
    result = DECODER.decode(moved)
    assert isinstance(result, Failure)
    assert "camera" in result.error


@pytest.mark.parametrize(
    "head", [b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW ", b"II\x1a\0\0\0HEAPCCDR", b"FOVb", b"\0MRM"]
)
def test_raw_files_that_are_no_tiff_are_named(head: bytes) -> None:
    result = DECODER.decode(head + bytes(500))
    assert isinstance(result, Failure)
    assert (result.status, "camera" in result.error) == ("unsupported", True)


def test_a_page_that_is_reduced_and_alone_is_the_picture() -> None:
    assert isinstance(DECODER.decode(thumbnail(first={254: [1]})), Image.Image)


def test_further_pages_of_a_scan_change_nothing() -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    result = DECODER.decode(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert isinstance(result, Image.Image)
    assert result.getpixel((0, 0)) == (255, 0, 0)


# Damage.


@pytest.mark.parametrize("seed", range(200))
def test_damaged_tags_raise_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(tiff(levels(RGB, 8), Layout(photometric=2, order="<>"[seed % 2], big=seed % 3 == 0)))
    (start,) = struct.unpack_from("<>"[seed % 2] + ("Q" if seed % 3 == 0 else "I"), data, 8 if seed % 3 == 0 else 4)
    for place in random.integers(4, len(data) - start, 6):
        data[start + place if place % 4 else place % 16] = random.integers(256)
    prepared = prepare(bytes(data))
    assert isinstance(prepared, Reading) or prepared.status == "unsupported"
    result = DECODER.decode(bytes(data))
    assert isinstance(result, Image.Image) or result.error


def test_a_truncated_file_of_an_unsupported_layout_is_no_picture() -> None:
    data = tiff(levels(RGB, 16), Layout(bits=16, photometric=2, planar=2))
    assert isinstance(DECODER.decode(data[: len(data) // 2]), Failure)


# Files of an independent writer, which reads them back too.

COMPRESSIONS = [
    "packbits",
    "lzw",
    "adobe_deflate",
    "deflate",
    "lzma",
    "zstd",
    "jpeg",
    "webp",
    "lerc",
    "jpeg2000",
    "png",
]
WRITTEN: dict[str, tuple[Array, Array, dict[str, Any]]] = {
    "grey": (levels(GREY, 8).astype(np.uint8), GREY, {"photometric": "minisblack"}),
    "grey, white is zero": (levels(255 - GREY, 8).astype(np.uint8), GREY, {"photometric": "miniswhite"}),
    "16 bits": (levels(GREY, 16).astype(np.uint16), GREY, {"photometric": "minisblack"}),
    "16 bits, white is zero": (levels(255 - GREY, 16).astype(np.uint16), GREY, {"photometric": "miniswhite"}),
    "floats": ((GREY / 255).astype(np.float32), GREY, {"photometric": "minisblack"}),
    "32 bits": (levels(GREY, 16).astype(np.uint32), GREY, {"photometric": "minisblack"}),
    "RGB": (levels(RGB, 8).astype(np.uint8), RGB, {"photometric": "rgb"}),
    "RGB of 16 bits": (levels(RGB, 16).astype(np.uint16), RGB, {"photometric": "rgb"}),
    "CMYK": (levels(np.dstack([255 - RGB, 0 * GREY]), 8).astype(np.uint8), RGB, {"photometric": "separated"}),
    "RGBA": (
        levels(np.dstack([RGB, ALPHA]), 8).astype(np.uint8),
        on_white(RGB),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    ),
    "one bit": (GREY > 127, np.where(GREY > 127, 255.0, 0.0), {"photometric": "minisblack"}),
}


@pytest.mark.compat("tifffile", "imagecodecs")
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_another_writer_are_what_its_reader_sees_or_unsupported(name: str, compression: str) -> None:
    import tifffile

    samples, wanted, options = WRITTEN[name]
    count = 0
    for order, tile, planar, predictor in itertools.product(
        "<>", (None, (16, 16)), ("contig", "separate"), (None, True)
    ):
        if samples.ndim == 2 and planar == "separate":
            continue
        file = io.BytesIO()
        stored = samples.transpose(2, 0, 1) if planar == "separate" else samples
        layout = {"tile": tile, "planarconfig": planar if samples.ndim == 3 else None, "predictor": predictor}
        try:
            tifffile.imwrite(file, stored, byteorder=order, compression=compression, metadata=None, **layout, **options)
            tifffile.imread(io.BytesIO(file.getvalue()))
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
            # Not every writer combines all of these.
            continue
        found = difference(file.getvalue(), wanted)
        count += isinstance(found, float)
        assert isinstance(found, str) or found <= 2.5, (order, tile, planar, predictor)
    assert count or compression in ("jpeg", "webp", "lerc", "jpeg2000", "png")


@pytest.mark.compat("cv2")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [1, 2])
def test_another_decoder_sees_the_same(photometric: int, bits: int) -> None:
    import cv2

    samples = levels(RGB if photometric == 2 else GREY, bits)
    data = tiff(samples, Layout(bits=bits, photometric=photometric, tags={339: None}))
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    found = difference(data, theirs[:, :, ::-1].astype(np.float64))
    assert isinstance(found, float)
    assert found <= 1
