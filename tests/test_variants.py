"""Variants of BMP, TGA, ICO, PNG, GIF and JPEG: each is what it shows, or unsupported."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import FORMATS
from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images.decode import Decoder
from tests.pictures import saved
from tests.test_decode import png

Array = NDArray[Any]
HEIGHT, WIDTH = 31, 45
DOWN, ACROSS = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
GREY = (ACROSS * 3 + DOWN * 2) / ((WIDTH - 1) * 3 + (HEIGHT - 1) * 2) * 255
RGB = np.stack([ACROSS / WIDTH * 255, DOWN / HEIGHT * 255, (ACROSS + DOWN) / (WIDTH + HEIGHT) * 255], axis=2)
COLOURS = np.round(RGB).astype(np.uint8)
DECODER = Decoder(formats=FORMATS, max_pixels=10**7)
SPEC = PreprocessSpec(resize=32, crop=(32, 32), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
KINDS = ("exact", "fast", "scaled")


def difference(data: bytes, wanted: Array, decoder: Decoder = DECODER) -> float:
    result = decoder.decode(data)
    assert isinstance(result, Image.Image), result
    wanted = wanted if wanted.ndim == 3 else np.repeat(wanted[:, :, None], 3, axis=2)
    found = np.asarray(result).astype(np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).mean())


def status(data: bytes) -> str:
    result = DECODER.decode(data)
    return result.status if isinstance(result, Failure) else "ok"


def packed(indices: Array, bits: int, pad: int = 4) -> bytes:
    """Rows of indices of so many bits, each row padded to a multiple of ``pad`` bytes."""
    split = (indices.astype(int)[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(split.reshape(len(indices), -1).astype(np.uint8), axis=1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % pad))).tobytes()


# BMP


def bmp(body: bytes, bits: int, palette: Any = (), used: int = 0, masks: bytes = b"", header: int = 40) -> bytes:
    """A bitmap that begins with its lowest row, unless it has masks."""
    entries = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    fields = struct.pack("<IiiHHIIiiII", header, WIDTH, -HEIGHT, 1, bits, 3 if masks else 0, len(body), 0, 0, used, 0)
    fields = (fields + masks).ljust(header, b"\0")
    start = 14 + len(fields) + len(entries)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + fields + entries + body


PALETTES = {
    "black and white": [(0, 0, 0), (255, 255, 255)],
    "white and black": [(255, 255, 255), (0, 0, 0)],
    "two colours": [(255, 0, 0), (0, 0, 255)],
    "black": [(0, 0, 0)],
    "the lowest greys": [(level, level, level) for level in range(16)],
    "a ramp of sixteen": [(17 * level,) * 3 for level in range(16)],
    "a ramp of 256": [(level,) * 3 for level in range(256)],
    "sixteen colours": [(17 * level, 255 - level, 40 * level % 256) for level in range(16)],
}


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("counted", [False, True])
def test_a_bitmap_shows_its_palette(name: str, bits: int, counted: bool) -> None:
    """``counted``: the header says how many colours there are; else there are as many as fit."""
    palette = PALETTES[name]
    if len(palette) > 2**bits:
        return
    indices = np.round(GREY / 255 * (len(palette) - 1)).astype(int)
    entries = palette if counted else palette + [(0, 0, 0)] * (2**bits - len(palette))
    data = bmp(packed(indices, bits), bits, entries, used=len(palette) if counted else 0)
    assert difference(data, np.array(palette)[indices].astype(float)) == 0


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_bitmap_without_a_file_header_shows_its_palette_or_is_unsupported(name: str, bits: int) -> None:
    palette = PALETTES[name]
    if len(palette) <= 2**bits:
        indices = np.round(GREY / 255 * (len(palette) - 1)).astype(int)
        data = bmp(packed(indices, bits), bits, palette, used=len(palette))[14:]
        if status(data) != "unsupported":
            assert difference(data, np.array(palette)[indices].astype(float)) == 0


MASKS = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("header", [40, 56, 108, 124])
def test_an_alpha_of_zeros_in_a_bitmap_is_none(header: int, alpha: int) -> None:
    body = np.dstack([COLOURS[:, :, ::-1], np.full((HEIGHT, WIDTH), alpha, np.uint8)]).tobytes()
    assert difference(bmp(body, 32, header=header), RGB.round()) == 0
    data = bmp(body, 32, masks=MASKS if header > 40 else MASKS[:12], header=header)
    has_alpha = header > 40 and alpha == 128
    assert difference(data, RGB.round() * alpha / 255 + 255 - alpha if has_alpha else RGB.round()) <= 0.5


# TGA


def tga(kind: int, depth: int, body: bytes, *, flags: int = 0x20, palette: bytes = b"", entry: int = 0) -> bytes:
    count = len(palette) // ((entry + 7) // 8) if entry else 0
    head = struct.pack("<BBBHHBHHHHBB", 0, int(entry > 0), kind, 0, count, entry, 0, 0, WIDTH, HEIGHT, depth, flags)
    return head + palette + body


@pytest.mark.parametrize("flags", [0x20, 0x28])
@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_an_alpha_of_zeros_in_a_targa_is_none(alpha: int, flags: int) -> None:
    body = np.dstack([COLOURS[:, :, ::-1], np.full((HEIGHT, WIDTH), alpha, np.uint8)]).tobytes()
    share = alpha / 255 if alpha else 1
    assert difference(tga(2, 32, body, flags=flags), RGB.round() * share + 255 * (1 - share)) <= 0.5
    grey = np.dstack([GREY.round(), np.full((HEIGHT, WIDTH), alpha)]).astype(np.uint8).tobytes()
    assert difference(tga(3, 16, grey, flags=flags), GREY.round() * share + 255 * (1 - share)) <= 0.5


@pytest.mark.parametrize("rule", ["white", "black", "drop"])
def test_the_rule_of_transparency_leaves_an_alpha_of_zeros_alone(rule: str) -> None:
    body = np.dstack([COLOURS[:, :, ::-1], np.zeros((HEIGHT, WIDTH), np.uint8)]).tobytes()
    decoder = Decoder(formats=FORMATS, max_pixels=10**7, transparency=rule)
    assert difference(tga(2, 32, body), RGB.round(), decoder) == 0


@pytest.mark.parametrize("high", [0, 0x8000])
def test_the_attribute_of_all_pixels_of_a_targa_of_16_bits_is_no_alpha(high: int) -> None:
    red, green, blue = (COLOURS[:, :, plane].astype(int) >> 3 for plane in range(3))
    body = (red << 10 | green << 5 | blue | high).astype("<u2").tobytes()
    assert difference(tga(2, 16, body), np.round((COLOURS >> 3) / 31 * 255)) <= 1


@pytest.mark.parametrize("length", [1, 7, 128])
@pytest.mark.parametrize("depth", [24, 32])
def test_the_runs_of_a_targa_may_cross_rows(length: int, depth: int) -> None:
    pixels = np.dstack([COLOURS[:, :, ::-1], np.full((HEIGHT, WIDTH), 255, np.uint8)])[:, :, : depth // 8]
    flat = pixels.reshape(HEIGHT * WIDTH, -1)
    runs = [flat[start : start + length] for start in range(0, len(flat), length)]
    # Every second packet is one colour, repeated.
    for number in range(0, len(runs), 2):
        runs[number] = np.repeat(runs[number][:1], len(runs[number]), axis=0)
    wanted = np.concatenate(runs).reshape(HEIGHT, WIDTH, -1)[:, :, 2::-1].astype(float)
    packets = [
        bytes([127 + len(run)]) + run[0].tobytes() if number % 2 == 0 else bytes([len(run) - 1]) + run.tobytes()
        for number, run in enumerate(runs)
    ]
    data = tga(10, depth, b"".join(packets))
    assert difference(data, wanted) == 0
    assert status(data[: len(data) // 2]) in ("truncated", "corrupt")


def test_an_attribute_that_varies_between_pixels_is_unsupported() -> None:
    body = np.where(ACROSS < 9, 0x8000, 0x1234).astype("<u2").tobytes()
    assert status(tga(2, 16, body, flags=0x21)) == "unsupported"


@pytest.mark.parametrize(("entry", "alpha"), [(24, 0), (32, 0), (32, 255)])
def test_a_targa_shows_its_palette(entry: int, alpha: int) -> None:
    palette = PALETTES["sixteen colours"]
    entries = b"".join(bytes([*colour[::-1], *([alpha] if entry == 32 else [])]) for colour in palette)
    indices = (GREY / 256 * 16).astype(np.uint8)
    data = tga(1, 8, indices.tobytes(), palette=entries, entry=entry)
    assert difference(data, np.array(palette)[indices].astype(float)) == 0


@pytest.mark.parametrize(
    "data",
    [
        tga(2, 15, bytes(2 * WIDTH * HEIGHT)),
        tga(1, 8, bytes(WIDTH * HEIGHT), palette=bytes(32), entry=15),
        tga(2, 24, bytes(3 * WIDTH * HEIGHT), palette=bytes(48), entry=24),
    ],
    ids=["15 bits", "a palette of 15 bits", "a palette beside colours"],
)
def test_a_targa_that_pillow_does_not_decode_is_unsupported(data: bytes) -> None:
    assert status(data) == "unsupported"


# PCX


@pytest.mark.parametrize(("bits", "planes"), [(2, 1), (4, 1), (8, 4), (8, 2)])
def test_a_pcx_file_of_another_layout_is_unsupported(bits: int, planes: int) -> None:
    data = bytearray(saved(Image.fromarray(COLOURS), "PCX"))
    data[3], data[65] = bits, planes
    assert status(bytes(data)) == "unsupported"


# ICO


def ico(alpha: int, hidden: Array, bits: int, *, has_mask: bool = True) -> bytes:
    """An icon of 32 x 32 pixels; ``bits`` are those of its directory, which may be wrong."""
    body = np.dstack([COLOURS[:31, :31, ::-1], np.full((31, 31), alpha, np.uint8)])
    body = np.pad(body, ((0, 1), (0, 1), (0, 0)), mode="edge")[::-1].tobytes()
    mask = np.packbits(hidden[::-1].astype(np.uint8), axis=1).tobytes() if has_mask else b""
    data = struct.pack("<IiiHHIIiiII", 40, 32, 64, 1, 32, 0, 0, 0, 0, 0, 0) + body + mask
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, bits, len(data), 22)
    return head + data


@pytest.mark.parametrize("bits", [0, 32])
@pytest.mark.parametrize("part", [0, 10, 32])
def test_where_all_alpha_of_an_icon_is_zero_its_mask_counts(part: int, bits: int) -> None:
    hidden = np.zeros((32, 32))
    hidden[:, :part] = 1
    wanted = np.pad(RGB[:31, :31].round(), ((0, 1), (0, 1), (0, 0)), mode="edge")
    wanted[:, :part] = 255
    assert difference(ico(0, hidden, bits), wanted) == 0
    if bits == 32:
        assert difference(ico(255, hidden, bits), np.pad(RGB[:31, :31].round(), ((0, 1), (0, 1), (0, 0)), "edge")) == 0


def test_an_icon_without_a_mask_is_opaque() -> None:
    wanted = np.pad(RGB[:31, :31].round(), ((0, 1), (0, 1), (0, 0)), mode="edge")
    assert difference(ico(0, np.zeros((32, 32)), 32, has_mask=False), wanted) == 0


def test_an_icon_with_a_clear_png_is_clear() -> None:
    data = saved(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "ICO", sizes=[(32, 32)])
    assert b"\x89PNG" in data
    assert difference(data, np.full((32, 32), 255.0)) == 0


# PNG


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rule", ["white", "black", "drop"])
def test_the_clear_grey_of_a_png_counts_at_every_depth(bits: int, rule: str) -> None:
    samples = np.round(GREY / 255 * (2**bits - 1)).astype(int)
    rows = packed(samples, bits, pad=1) if bits < 8 else samples.astype(f">u{bits // 8}").tobytes()
    key = int(samples[HEIGHT // 2, WIDTH // 2])
    data = png(WIDTH, HEIGHT, bits, 0, rows, (b"tRNS", struct.pack(">H", key)))
    grey = samples >> 8 if bits == 16 else samples * (255 // (2**bits - 1))
    hidden = {"white": 255, "black": 0}.get(rule)
    wanted = grey if hidden is None else np.where(samples == key, hidden, grey)
    decoder = Decoder(formats=FORMATS, max_pixels=10**7, transparency=rule)
    assert difference(data, wanted.astype(float), decoder) == 0


@pytest.mark.parametrize("apart", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (256, 0, 0)], ids=str)
def test_the_clear_colour_of_a_png_of_16_bits_is_that_colour_alone(apart: tuple[int, int, int]) -> None:
    key = (0x1234, 0x5678, 0x9ABC)
    samples = np.zeros((2, 3, 3), dtype=">u2")
    samples[0, 1] = key
    samples[1, 2] = np.array(key) + apart
    data = png(3, 2, 16, 2, samples.tobytes(), (b"tRNS", struct.pack(">3H", *key)))
    wanted = (samples.astype(int) >> 8).astype(float)
    wanted[0, 1] = 255
    if not any(apart):
        wanted[1, 2] = 255
    assert difference(data, wanted) == 0


def test_a_png_of_ios_is_named() -> None:
    data = png(4, 4, 8, 6, bytes(64))
    marked = data[:8] + struct.pack(">I", 4) + b"CgBI" + bytes(4) + struct.pack(">I", 0) + data[8:]
    result = DECODER.decode(marked)
    assert isinstance(result, Failure)
    assert (result.status, "CgBI" in result.error) == ("unsupported", True)


@pytest.mark.parametrize(
    "head", [b"P7\nWIDTH 4\nHEIGHT 4\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n", b"PF\n4 4\n-1.0\n"]
)
def test_pnm_files_of_other_kinds_are_named(head: bytes) -> None:
    assert status(head + bytes(4 * 4 * 12)) in ("unsupported", "ok")


# GIF


def gif(box: tuple[int, int, int, int], screen: tuple[int, int], clear: int | None = None) -> bytes:
    """A GIF of one frame, which fills ``box`` of its screen; its first colour is green, and the frame is red."""
    frame = Image.new("P", (box[2] - box[0], box[3] - box[1]), 1)
    frame.putpalette([0, 255, 0, 255, 0, 0, 0, 0, 255, 9, 9, 9])
    data = bytearray(saved(frame, "GIF", optimize=False, **({} if clear is None else {"transparency": clear})))
    data[6:10] = struct.pack("<HH", *screen)
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[at + 1 : at + 5] = struct.pack("<HH", *box[:2])
    return bytes(data)


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (2, 3, 8, 8), (0, 0, 4, 4), (1, 1, 7, 7), (0, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("clear", [None, 2])
@pytest.mark.parametrize("rule", ["white", "black"])
def test_the_screen_around_the_first_frame_of_a_gif_is_clear(
    box: tuple[int, int, int, int], clear: int | None, rule: str
) -> None:
    wanted = np.full((8, 8, 3), {"white": 255, "black": 0}[rule], np.uint8)
    wanted[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
    decoder = Decoder(formats=FORMATS, max_pixels=10**7, transparency=rule)
    assert difference(gif(box, (8, 8), clear), wanted, decoder) == 0


# JPEG

OPTIONS = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"subsampling": "4:4:4"},
    {"progressive": True, "subsampling": "4:2:0"},
]
JPEGS = [
    saved(Image.fromarray(np.tile(COLOURS, (times, times, 1))).convert(mode), "JPEG", quality=90, **options)
    for times, mode, options in itertools.product((1, 8), ("RGB", "L", "CMYK"), OPTIONS)
    if mode != "CMYK" or options.get("subsampling") != "4:2:0"
]


@pytest.mark.parametrize("number", range(len(JPEGS)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_without_its_end_is_whole_and_without_a_block_it_is_not(kind: str, number: int) -> None:
    decoder, data = Decoder(formats=FORMATS, max_pixels=10**7, kind=kind), JPEGS[number]
    whole = decoder.pixels(data, SPEC)
    assert isinstance(whole, Pixels)
    for cut in (1, 2):
        found = decoder.pixels(data[:-cut], SPEC)
        assert isinstance(found, Pixels), (cut, found)
        assert np.array_equal(found.rgb, whole.rgb)
    for cut in (4, 8, 20, 60, len(data) // 2):
        found = decoder.pixels(data[:-cut], SPEC)
        assert isinstance(found, Failure)
        assert found.status == "truncated"


def scans(data: bytes) -> list[int]:
    """The places of the scans of a file."""
    return [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]


@pytest.mark.parametrize("number", [number for number, data in enumerate(JPEGS) if len(scans(data)) > 1])
def test_a_progressive_jpeg_that_ends_between_two_scans_is_truncated(number: int) -> None:
    data = JPEGS[number]
    for at in scans(data)[1:]:
        assert status(data[:at]) == "truncated"


@pytest.mark.parametrize(
    ("marker", "depth", "parts"),
    [(0xC3, 8, 3), (0xC5, 8, 3), (0xC6, 8, 3), (0xC7, 8, 3), (0xCB, 8, 3), (0xCD, 8, 3), (0xC1, 12, 3), (0xC0, 8, 2)],
)
def test_a_jpeg_of_another_process_is_unsupported(marker: int, depth: int, parts: int) -> None:
    data = bytearray(JPEGS[0])
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4], data[at + 9] = marker, depth, parts
    assert status(bytes(data)) == "unsupported"


# Independent decoders.


@pytest.mark.compat("imagecodecs")
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_jpeg_of_deep_samples_is_unsupported(bits: int) -> None:
    import imagecodecs

    samples = np.round(GREY / 255 * (2**bits - 1)).astype(np.uint16)
    assert status(imagecodecs.ljpeg_encode(samples, bitspersample=bits)) == "unsupported"


@pytest.mark.compat("imagecodecs")
@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("colour", [False, True])
def test_jpeg_2000_of_every_depth(bits: int, colour: bool) -> None:
    import imagecodecs

    picture = RGB if colour else GREY
    samples = np.round(picture / 255 * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)
    data = imagecodecs.jpeg2k_encode(samples, bitspersample=bits, reversible=True, level=0)
    assert np.array_equal(imagecodecs.jpeg2k_decode(data), samples)
    if status(data) != "unsupported":
        assert difference(data, np.round(picture / 255 * (2**bits - 1)) / (2**bits - 1) * 255) <= 1


def without(data: bytes, marker: bytes) -> bytes:
    """A JPEG without its first segment of a kind."""
    at = data.index(marker)
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def coloured() -> dict[str, bytes]:
    """JPEG files of every way to say what their components are."""
    image = Image.fromarray(np.tile(COLOURS, (2, 2, 1)))
    plain, kept = (saved(image, "JPEG", quality=95, keep_rgb=keep) for keep in (False, True))
    inks = saved(image.convert("CMYK"), "JPEG", quality=95)

    def adobe(data: bytes, transform: int) -> bytes:
        return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + data[2:]

    return {
        "JFIF": plain,
        "no marker": without(plain, b"\xff\xe0"),
        "JFIF and Adobe's marker of RGB": adobe(plain, 0),
        "Adobe's marker of RGB": adobe(without(plain, b"\xff\xe0"), 0),
        "Adobe's marker of YCbCr": adobe(without(plain, b"\xff\xe0"), 1),
        "components named RGB": kept,
        "CMYK": inks,
        "CMYK without Adobe's marker": without(inks, b"\xff\xee"),
        "YCCK": inks.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
    }


@pytest.mark.compat("cv2")
@pytest.mark.parametrize("name", coloured())
def test_another_decoder_sees_the_same_colours_in_a_jpeg(name: str) -> None:
    import cv2

    data = coloured()[name]
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    # It has a rule of its own for inks.
    assert difference(data, theirs[:, :, ::-1].astype(float)) <= (1.5 if "C" in name.replace("YCb", "") else 0.5)


@pytest.mark.compat("cv2")
@pytest.mark.parametrize("name", [*(f"bmp {name}" for name in PALETTES), "png 2", "png 4", "png 16", "jpeg"])
def test_another_decoder_sees_the_same(name: str) -> None:
    import cv2

    kind, _, rest = name.partition(" ")
    if kind == "bmp":
        palette = PALETTES[rest]
        indices = np.round(GREY / 255 * (len(palette) - 1)).astype(int)
        data = bmp(packed(indices, 8), 8, palette + [(0, 0, 0)] * (256 - len(palette)))
    elif kind == "png":
        samples = np.round(GREY / 255 * (2 ** int(rest) - 1)).astype(int)
        rows = packed(samples, int(rest), pad=1) if int(rest) < 8 else samples.astype(">u2").tobytes()
        data = png(WIDTH, HEIGHT, int(rest), 0, rows)
    else:
        data = JPEGS[0]
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert difference(data, theirs[:, :, ::-1].astype(float)) <= 1
