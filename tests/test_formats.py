"""HEIC, AVIF of every brand and JPEG XL: decoded by the rules of all formats, or named with the way out."""

from __future__ import annotations

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.config.schema import FORMATS, PILLOW_FORMATS, ImagesConfig
from pipeline.core.records import Failure, Pixels, PreprocessSpec
from pipeline.images import versions
from pipeline.images.decode import Decoder
from pipeline.images.formats import family, jxl_size, open_image
from pipeline.images.pool.pool import Decoders
from pipeline.images.versions import fingerprint
from tests.heic import Boxes, heic
from tests.pictures import saved

Array = NDArray[Any]
SPEC = PreprocessSpec(resize=32, crop=(32, 32), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
KINDS = ("exact", "fast", "scaled")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture without any symmetry, in blocks of 2 x 2 pixels."""
    down, across = np.mgrid[: height // 2, : width // 2].astype(np.float64)
    planes = [across / width * 510, down / height * 510, (across + down) / (width + height) * 510]
    small = np.stack(planes, axis=2).clip(0, 255)
    return Image.fromarray(np.kron(small, np.ones((2, 2, 1))).astype(np.uint8))


def decoder(**rules: Any) -> Decoder:
    return Decoder(**{"formats": FORMATS, "max_pixels": 10**6, **rules})


def decode(data: bytes, **rules: Any) -> Array:
    result = decoder(**rules).decode(data)
    assert isinstance(result, Image.Image), result
    return np.asarray(result).astype(np.float64)


def failure(data: bytes, **rules: Any) -> Failure:
    result = decoder(**rules).decode(data)
    assert isinstance(result, Failure), result
    return result


def near(found: Array, wanted: Array, most: float = 2) -> bool:
    return found.shape == wanted.shape and float(np.abs(found - wanted).mean()) <= most


PHOTO = np.asarray(photo()).astype(np.float64)


# HEIC


@pytest.mark.parametrize(
    "brands",
    [
        (b"heic", b"mif1", b"heic"),
        (b"mif1", b"mif1", b"heic"),
        (b"mif1", b"miaf", b"MiHB", b"heic"),
        (b"heix", b"mif1", b"heix"),
        (b"msf1", b"hevc", b"heic"),
        (b"miaf", b"mif1", b"heic"),
        (b"mif1", b"mif1"),
    ],
    ids=str,
)
def test_a_photo_of_a_phone_is_decoded_whatever_its_brands(brands: tuple[bytes, ...]) -> None:
    data = heic(photo(), Boxes(brands=brands))
    assert family(data) == "HEIF"
    assert near(decode(data), PHOTO)


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_takes_heic(kind: str) -> None:
    result = decoder(kind=kind).pixels(heic(photo()), SPEC)
    exact = decoder().pixels(saved(photo(), "PNG"), SPEC)
    assert isinstance(result, Pixels)
    assert isinstance(exact, Pixels)
    assert near(result.rgb.astype(float), exact.rgb.astype(float))


def test_a_decoder_process_takes_heic_and_jpeg_xl_by_the_same_pixels() -> None:
    data = heic(photo())
    pool = Decoders(decoder(), processes=1, seconds=60, memory=2**28)
    try:
        [found, small] = pool.decode([data, heic(photo(32, 32))], SPEC)
    finally:
        pool.close()
    here = decoder().pixels(data, SPEC)
    assert isinstance(found, Pixels)
    assert isinstance(here, Pixels)
    assert isinstance(small, Pixels)
    assert np.array_equal(found.rgb, here.rgb)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("rule", ["apply", "ignore"])
@pytest.mark.parametrize(("turns", "orientation"), [(0, 1), (3, 6), (2, 3), (1, 8), (3, 1), (0, 6)])
def test_a_photo_is_turned_once(turns: int, orientation: int, rule: str) -> None:
    """The box of the rotation counts, as HEIF wants it; the orientation in the EXIF beside it says the same again."""
    data = heic(photo(), Boxes(rotation=turns, exif=exif_of(orientation)))
    assert near(decode(data, exif=rule), np.rot90(PHOTO, turns))


def test_a_heic_file_is_held_to_the_limit_before_it_is_decoded() -> None:
    data = heic(photo())
    assert decode(data, max_pixels=64 * 48).shape == (48, 64, 3)
    assert failure(data, max_pixels=64 * 48 - 1).status == "too_many_pixels"
    bomb = heic(photo(), Boxes(said=(60_000, 60_000)))
    assert failure(bomb).status == "too_many_pixels"


def test_a_header_cannot_hide_a_larger_picture() -> None:
    result = decoder(max_pixels=32 * 32).decode(heic(photo(), Boxes(said=(32, 32))))
    assert isinstance(result, Failure)


@pytest.mark.parametrize("kept", [0.02, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_half_a_heic_file_is_truncated(kept: float) -> None:
    data = heic(photo())
    assert failure(data[: int(len(data) * kept)]).status == "truncated"


def test_a_signature_alone_is_damage() -> None:
    assert failure(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)).status == "corrupt"


@pytest.mark.parametrize("seed", range(60))
def test_damaged_heic_files_raise_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(heic(photo()))
    for place in random.integers(8, 400, 4):
        data[place] = random.integers(256)
    result = decoder().decode(bytes(data))
    assert isinstance(result, Image.Image) or result.error


@pytest.mark.parametrize("codec", [b"av01", b"avc1", b"j2k1", b"jpeg", b"vvc1", b"unci"])
def test_another_codec_in_heif_is_no_heic(codec: bytes) -> None:
    brands = (b"mif1", b"mif1", b"miaf")
    assert failure(heic(photo(), Boxes(brands=brands, codec=codec))).status in ("unsupported", "corrupt")


@pytest.mark.parametrize("brand", [*HEIC_BRANDS, b"mif1", b"msf1"])
def test_without_its_package_heic_is_named_with_the_way_to_it(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    result = failure(heic(photo(), Boxes(brands=(brand, b"mif1", brand))))
    assert result.status == "unsupported"
    assert "HEIC" in result.error
    assert "pip install pi-heif" in result.error


@pytest.mark.parametrize(("data", "word"), [(heic(photo()), "HEIC"), (b"\xff\x0a" + bytes(99), "JPEG XL")])
def test_formats_that_are_not_listed_are_named(data: bytes, word: str) -> None:
    result = failure(data, formats=PILLOW_FORMATS)
    assert result.status == "format_not_allowed"
    assert word in result.error
    assert "images.formats" in result.error


@pytest.mark.parametrize("brand", [b"isom", b"mp42", b"qt  ", b"M4V "])
def test_a_film_is_no_picture(brand: bytes) -> None:
    assert failure(b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + b"avc1" + bytes(99)).status == "not_an_image"


def test_canon_s_raw_files_in_boxes_are_named() -> None:
    result = failure(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99))
    assert (result.status, "camera" in result.error) == ("unsupported", True)


# AVIF


@pytest.mark.parametrize("major", [b"avif", b"avis", b"mif1", b"msf1", b"miaf", b"MA1B", b"mif2", b"1pic"])
@pytest.mark.parametrize("rest", [(b"avif", b"mif1", b"miaf"), (b"mif1", b"miaf", b"MA1A", b"avif")], ids=str)
def test_avif_is_known_by_all_its_brands(major: bytes, rest: tuple[bytes, ...]) -> None:
    data = saved(photo(), "AVIF", quality=95)
    old = struct.unpack_from(">I", data)[0]
    head = struct.pack(">I", old)
    brands = b"".join(rest)[: old - 16].ljust(old - 16, b"\0")
    branded = head + b"ftyp" + major + bytes(4) + brands + data[old:]
    assert family(branded) == "AVIF"
    assert near(decode(branded), PHOTO, 4)


@pytest.mark.compat("imagecodecs")
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("alpha", [False, True])
def test_avif_of_every_depth_is_what_another_decoder_sees(bits: int, alpha: bool) -> None:
    import imagecodecs

    pixels = PHOTO if not alpha else np.dstack([PHOTO, np.where(PHOTO[:, :, :1] > 100, 255, 0)])
    samples = np.round(pixels / 255 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.avif_encode(samples, level=95, bitspersample=bits)
    theirs = imagecodecs.avif_decode(data).astype(float) / (2**bits - 1) * 255
    if alpha:
        theirs = theirs[:, :, :3] * theirs[:, :, 3:] / 255 + 255 - theirs[:, :, 3:]
    assert near(decode(data), theirs, 1.5)


def test_avif_that_is_not_listed_is_named() -> None:
    data = saved(photo(), "AVIF")
    result = failure(data[:8] + b"miaf" + data[12:], formats=("HEIF", "PNG"))
    assert (result.status, "AVIF" in result.error) == ("format_not_allowed", True)


# JPEG XL


def jxl(image: Image.Image, *, boxes: bool = False) -> bytes:
    from pillow_jxl import Encoder

    encoder = Encoder(
        mode=image.mode, lossless=True, quality=100, decoding_speed=0, effort=1, use_container=boxes,
        use_original_profile=False, num_threads=0,
    )  # fmt: skip
    nothing = {"exif": None, "jumb": None, "xmp": None, "compress": False}
    data: bytes = encoder(image.tobytes(), image.width, image.height, jpeg_encode=False, **nothing)
    return data


SIZES = [(1, 1), (8, 8), (256, 256), (300, 200), (640, 480), (192, 108), (1, 3000), (5000, 3), (257, 8), (1000, 1250)]


@pytest.mark.needs("pillow_jxl")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("boxes", [False, True])
def test_the_size_of_a_jpeg_xl_file_is_read_before_it_is_decoded(size: tuple[int, int], boxes: bool) -> None:
    data = jxl(Image.new("RGB", size), boxes=boxes)
    assert jxl_size(data) == size
    opened = open_image(data, FORMATS)
    assert isinstance(opened, Image.Image)
    assert opened.size == size
    if size != (1, 1):
        assert failure(data, max_pixels=size[0] * size[1] - 1).status == "too_many_pixels"


@pytest.mark.needs("pillow_jxl")
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_jpeg_xl_is_decoded_in_every_mode(mode: str) -> None:
    image = photo().convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert near(decode(jxl(image)), decode(saved(image, "PNG")), 0)


@pytest.mark.needs("pillow_jxl")
def test_half_a_jpeg_xl_file_is_no_half_picture() -> None:
    for boxes in (False, True):
        data = jxl(photo(), boxes=boxes)
        for kept in (13, 40, len(data) // 2, len(data) - 9):
            assert failure(data[:kept]).status in ("truncated", "corrupt")


@pytest.mark.needs("pillow_jxl")
def test_a_huge_header_of_jpeg_xl_is_refused_before_a_pixel_is_decoded() -> None:
    # Not a multiple of eight; 30 bits of height; a square.
    header = 3 << 1 | (2**30 - 1) << 3 | 1 << 33
    assert failure(b"\xff\x0a" + header.to_bytes(16, "little")).status == "too_many_pixels"


@pytest.mark.compat("imagecodecs", "pillow_jxl")
def test_jpeg_xl_of_another_encoder_is_decoded_and_an_animation_is_not() -> None:
    import imagecodecs

    pixels = np.asarray(photo())
    deep = pixels.astype(np.uint16) * 257
    assert near(decode(imagecodecs.jpegxl_encode(pixels, lossless=True)), PHOTO, 0)
    assert near(decode(imagecodecs.jpegxl_encode(deep, lossless=True)), PHOTO, 1)
    assert near(decode(imagecodecs.jpegxl_encode(deep[:, :, 0], lossless=True)), PHOTO[:, :, :1].repeat(3, 2), 1)
    frames = np.stack([pixels, 255 - pixels])
    assert failure(imagecodecs.jpegxl_encode(frames)).status == "unsupported"


def test_without_its_package_jpeg_xl_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    result = failure(b"\xff\x0a" + bytes(99))
    assert result.status == "unsupported"
    assert "JPEG XL" in result.error
    assert "jxl" in result.error


def test_pillow_stays_as_it_is() -> None:
    decode(heic(photo()))
    assert "HEIF" not in Image.OPEN
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(heic(photo())))


# Fingerprints


def test_the_default_formats_have_the_fingerprint_of_earlier_datasets() -> None:
    found = fingerprint(ImagesConfig())
    assert found["formats"] == list(PILLOW_FORMATS)
    assert found["library"].split(",")[0].startswith("Pillow ")
    named = fingerprint(ImagesConfig(formats=["JPEG", "HEIF"]))
    assert named["formats"] == ["JPEG", "HEIF"]


def test_another_version_of_what_decodes_heic_is_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImagesConfig(formats=["JPEG", "HEIF"])
    monkeypatch.setattr(versions, "_FURTHER", {"HEIF": ("pi-heif", "0.1")})
    assert ", pi-heif " in fingerprint(images)["library"]
    assert "pi-heif" not in fingerprint(ImagesConfig(formats=["JPEG"]))["library"]
