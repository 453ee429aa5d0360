"""The decoders ``fast`` and ``scaled``: the pixels of ``exact`` or nearly so, as strict, and held against it."""

from __future__ import annotations

import csv
import dataclasses
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pipeline.backends import decoder_parity as gate
from pipeline.backends.compare import in_words
from pipeline.backends.parity import Gate, embed_sample
from pipeline.config.schema import FORMATS, BackendConfig, ModelConfig, ParityConfig
from pipeline.core.errors import ParityError
from pipeline.core.records import Failure, Pixels, PreprocessSpec, Sample
from pipeline.engine.sample import draw_sample
from pipeline.images import fast, jpeg
from pipeline.images.decode import Decoder, limit_pixels
from pipeline.images.orientation import LARGE_PIXELS
from pipeline.images.pool.pool import Decoders
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source
from pipeline.images.versions import library
from pipeline.models.checkpoint import open_checkpoint
from pipeline.storage.factory import open_storage
from tests.conftest import data_folder
from tests.jobs import StubEncoder
from tests.mutations import mutant
from tests.pictures import saved
from tests.test_loader import SPEC, opened, write
from tests.test_preprocess import picture

MIB = 2**20
Result = Pixels | Failure
KINDS = ("fast", "scaled")


@pytest.fixture(autouse=True)
def _limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_pixels(100_000_000)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether simplejpeg gave the pixels, for each file that it was asked for."""
    found: list[bool] = []
    decode = jpeg.decode

    def noted(*given: Any, **named: Any) -> Any:
        pixels = decode(*given, **named)
        found.append(pixels is not None)
        return pixels

    monkeypatch.setattr(jpeg, "decode", noted)
    return found


def spec(resize: int | tuple[int, int], crop: tuple[int, int] | None = None, resample: int = 3) -> PreprocessSpec:
    return PreprocessSpec(resize=resize, crop=crop, resample=resample, mean=(0, 0, 0), std=(1, 1, 1))


CLIP, SMALL = spec(224, (224, 224)), spec(32, (32, 32))


def decoder(kind: str, **rules: Any) -> Decoder:
    return Decoder(**{"formats": FORMATS, "max_pixels": 100_000_000, "kind": kind, **rules})


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    return saved(image, form, **({"quality": 92} if form == "JPEG" else {}), **options)


def apart(one: Result, other: Result) -> int:
    """The largest difference of two pictures' levels."""
    assert isinstance(one, Pixels), one
    assert isinstance(other, Pixels), other
    assert one.rgb.shape == other.rgb.shape
    return int(np.abs(one.rgb.astype(int) - other.rgb).max())


def check_alike(data: bytes, wanted: PreprocessSpec, name: str = "") -> None:
    """As strict as ``exact``, and ``fast`` within 2 levels of it."""
    exact, *others = [decoder(kind).pixels(data, wanted) for kind in ("exact", *KINDS)]
    if isinstance(exact, Failure):
        assert others == [exact, exact], name
    else:
        assert apart(others[0], exact) <= 2, name
        assert isinstance(others[1], Pixels), name


# As strict as exact


def test_every_odd_file_is_judged_as_by_exact(capfd: pytest.CaptureFixture[str], taken: list[bool]) -> None:
    folder = data_folder("odd")
    with (folder / "inventory.csv").open(newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    for name in names:
        check_alike((folder / name).read_bytes(), SMALL, name)
    assert sum(taken) > 20
    capfd.readouterr()  # libtiff complains on stderr


def test_every_mutant_of_a_jpeg_is_judged_as_by_exact(capfd: pytest.CaptureFixture[str], taken: list[bool]) -> None:
    for number in range(800):
        data = mutant(4, number)
        if data.startswith(b"\xff\xd8"):
            check_alike(data, SMALL, str(number))
    assert 50 < sum(taken) < len(taken)
    capfd.readouterr()


def two_frames(data: bytes) -> bytes:
    """A second frame of a quarter of the width, before the scan: Pillow believes the last, libjpeg none."""
    at = data.index(b"\xff\xc0")
    length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    frame = bytearray(data[at : at + length])
    frame[7:9] = (int.from_bytes(frame[7:9], "big") // 4).to_bytes(2, "big")
    return data[: at + length] + bytes(frame) + data[at + length :]


PLAIN = encoded(picture(120, 90))
DAMAGE = {
    "no end": PLAIN[:-2],
    "no last bytes": PLAIN[:-40],
    "half": PLAIN[: len(PLAIN) // 2],
    "headers alone": PLAIN[: PLAIN.index(b"\xff\xda")],
    "garbage behind": PLAIN + b"garbage" * 50,
    "another behind": PLAIN + encoded(picture(60, 60)),
    "garbage before the frame": PLAIN[:2] + b"junk" + PLAIN[2:],
    "padding before the frame": PLAIN[:2] + b"\xff" * 5 + PLAIN[2:],
    "garbage in the scan": PLAIN[:-600] + b"\xff\x00" * 100 + PLAIN[-400:],
    "a marker in the scan": PLAIN[:-600] + b"\xff\xd3" + PLAIN[-600:],
    "two frames": two_frames(PLAIN),
    "arithmetic": PLAIN.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc9\0\x11\x08"),
    "lossless": PLAIN.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x08"),
    "12 bits": PLAIN.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "no rows": PLAIN.replace(b"\xff\xc0\0\x11\x08\0\x5a", b"\xff\xc0\0\x11\x08\0\0"),
    "more rows": PLAIN.replace(b"\xff\xc0\0\x11\x08\0\x5a", b"\xff\xc0\0\x11\x08\1\x5a"),
    "no last scans": encoded(picture(120, 90), progressive=True)[:-800],
    "no last scans but an end": encoded(picture(120, 90), progressive=True)[:-800] + b"\xff\xd9",
    "a block of restarts": encoded(picture(120, 90), restart_marker_blocks=3)[:-300] + b"\xff\xd9",
    "inks": encoded(picture(120, 90).convert("CMYK")),
    "colours as they are": encoded(picture(120, 90), keep_rgb=True),
    "a transform that is none": PLAIN[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + PLAIN[2:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_jpeg_with_an_oddity_is_judged_as_by_exact(name: str) -> None:
    assert DAMAGE[name] != PLAIN
    check_alike(DAMAGE[name], SMALL)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 5}], ids=str)
def test_a_large_jpeg_with_an_oddity_is_judged_as_by_exact(options: dict[str, Any], taken: list[bool]) -> None:
    large = encoded(picture(900, 700), **options)
    half = len(large) // 2
    spoiled = [
        large[:-2],
        large[:half],
        large[:half] + b"\xff\xd9",
        large[:half] + b"\xff\x00" * 50 + large[half + 100 :],
        large[:half] + large[half + 40 :],
        large + b"garbage" * 50,
    ]
    for data in spoiled:
        check_alike(data, SMALL)
    # The one without an end is read again with one.
    assert len(taken) == 2 * (len(spoiled) + 1)
    # A picture of this size is scaled indeed.
    assert apart(decoder("scaled").pixels(large, SMALL), decoder("fast").pixels(large, SMALL)) > 0


def test_limits_are_those_of_exact() -> None:
    for kind in KINDS:
        for rules in ({"max_pixels": 10_799}, {"formats": ("PNG",)}):
            result = decoder(kind, **rules).pixels(PLAIN, SMALL)
            assert result == decoder("exact", **rules).pixels(PLAIN, SMALL)
            assert isinstance(result, Failure)


# The same geometry


SIZES = [
    (224, 224), (640, 480), (481, 641), (333, 1000), (1000, 333), (1, 1), (2, 1), (3, 5), (7, 5), (17, 19),
    (225, 223), (1023, 257), (100, 1600), (1, 20_000), (20_000, 1), (3, 60),
]  # fmt: skip
SPECS = [CLIP, spec(224, (224, 224), 2), spec((224, 160)), spec((31, 64), None, 2), spec(20, (31, 24)), spec(64, None)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_shape_is_within_two_levels_of_exact(size: tuple[int, int]) -> None:
    image = picture(*size)
    files = [encoded(image), encoded(image.convert("L")), encoded(image, "PNG"), encoded(image, subsampling="4:4:4")]
    for wanted in SPECS[: 5 if max(size) > 16 * min(size) else 6]:
        for data in files:
            check_alike(data, wanted, str(wanted))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
@pytest.mark.parametrize("size", [(301, 200), (200, 333), (90, 700)], ids=str)
def test_every_orientation_is_within_two_levels_of_exact(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture(*size), exif=exif)
    for wanted in (CLIP, spec(101, (101, 64)), spec((64, 160))):
        for rule in ("apply", "ignore"):
            exact = decoder("exact", exif=rule).pixels(data, wanted)
            assert apart(decoder("fast", exif=rule).pixels(data, wanted), exact) <= 2


@pytest.mark.parametrize("spoil", ["type", "count", "end", "other tag"])
def test_an_orientation_in_damaged_metadata_counts_as_for_exact(spoil: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.0
    data = encoded(picture(301, 200), exif=exif)
    orientation, resolution = data.index(b"\x01\x12\0\x03"), data.index(b"\x01\x1a\0\x05")
    place, value = {
        "type": (orientation + 3, 2),
        "count": (orientation + 7, 9),
        "end": (orientation - 1, 40),
        "other tag": (resolution + 10, 200),
    }[spoil]
    spoiled = data[:place] + bytes([value]) + data[place + 1 :]
    for wanted in (CLIP, spec((64, 160))):
        check_alike(spoiled, wanted)


def test_the_filters_that_torch_lacks_are_left_to_pillow() -> None:
    for resample in (0, 1, 4, 5):
        wanted = spec(64, (64, 64), resample)
        assert apart(decoder("fast").pixels(PLAIN, wanted), decoder("exact").pixels(PLAIN, wanted)) == 0


def test_a_scaled_decode_keeps_twice_what_is_wanted() -> None:
    for size, wanted, scale in [
        ((4000, 3000), (298, 224), 4),
        ((4000, 3583), (250, 224), 4),
        ((3600, 3584), (225, 224), 8),
        ((900, 896), (225, 224), 2),
        ((899, 895), (224, 224), 1),
        ((10_000, 500), (224, 224), 1),
    ]:
        assert jpeg.scale_for(size, (2 * wanted[0], 2 * wanted[1])) == scale


@pytest.mark.parametrize("size", [(1801, 1203), (1203, 1801), (905, 897), (1795, 1793)], ids=str)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_scaled_decode_shows_the_same_part_of_the_picture(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    down, across = np.mgrid[: size[1], : size[0]]
    smooth = np.stack([across * 255 // size[0], down * 255 // size[1], (across + down) % 256 // 2], axis=2)
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), exif=exif, subsampling="4:4:4")
    for wanted in (CLIP, spec((224, 224))):
        exact, scaled = (decoder(kind).pixels(data, wanted) for kind in ("exact", "scaled"))
        assert isinstance(exact, Pixels)
        assert isinstance(scaled, Pixels)
        difference = scaled.rgb[..., :2].astype(int) - exact.rgb[..., :2]
        # A shift of half a pixel would be half a level everywhere.
        assert abs(difference.mean(axis=(0, 1))).max() < 0.25
        assert np.abs(difference).max() <= 4


def test_one_decode_takes_one_thread() -> None:
    data, fast_decoder = encoded(picture(1500, 1000)), decoder("fast")
    fast_decoder.pixels(data, CLIP)
    process, thread = time.process_time(), time.thread_time()
    for _ in range(5):
        fast_decoder.pixels(data, CLIP)
    thread, process = time.thread_time() - thread, time.process_time() - process
    assert process < 1.3 * thread + 0.02


def test_a_giant_that_pillow_decoded_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "resize", None)
    assert LARGE_PIXELS < 4100 * 4100
    assert isinstance(decoder("fast").pixels(encoded(Image.new("L", (4100, 4100)), "PNG"), SMALL), Pixels)


def test_memory_that_torch_does_not_get_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> Any:
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(fast, "interpolate", full)
    result = decoder("fast").pixels(PLAIN, SMALL)
    assert isinstance(result, Failure)
    assert result.status == "out_of_memory"


def test_the_libraries_are_named() -> None:
    assert library("exact") == f"Pillow {Image.__version__}"
    assert library("fast") == f"Pillow {Image.__version__}, simplejpeg 1.9.0, torch {torch.__version__.split('+')[0]}"


# In processes


@pytest.mark.slow
def test_a_process_gives_the_same_pixels_and_outlives_a_want_of_memory() -> None:
    large = encoded(Image.radial_gradient("L").resize((3950, 3950)).convert("RGB"), progressive=True)
    side = Image.Exif()
    side[ExifTags.Base.Orientation] = 6
    images = [PLAIN, encoded(picture(99, 70), "PNG"), PLAIN[:300], encoded(picture(70, 99), exif=side), large]
    pool = Decoders(decoder("fast"), processes=1, seconds=60, memory=64 * MIB)
    try:
        found = pool.decode(list(images), CLIP)
        (other,) = pool.decode([PLAIN], spec((20, 30), None, 2))
    finally:
        pool.close()
    statuses = [result.status if isinstance(result, Failure) else "ok" for result in found]
    assert statuses == ["ok", "ok", "truncated", "ok", "out_of_memory"]
    wanted = [decoder("fast").pixels(data, CLIP) for data in images]
    assert [apart(found[i], wanted[i]) for i in (0, 1, 3)] == [0, 0, 0]
    assert apart(other, decoder("exact").pixels(PLAIN, spec((20, 30), None, 2))) <= 2


# The gate


class Rough(StubEncoder):
    """Embeds the first pixels, so that every difference shows."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels[:, :, 5, 5:8].flatten(1)[:, :4].float() + 1, dim=1)


def samples(spoiled: bool = False) -> tuple[Sample, Sample]:
    noise = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    other = noise.clone()
    if spoiled:
        other[3] = 255 - other[3]
    ids = tuple("abcde")
    return Sample(ids=ids, pixels=other), Sample(ids=ids, pixels=noise)


def pass_gate(tmp_path: Path, limits: ParityConfig, *, spoiled: bool = False, kind: str = "fast") -> Any:
    sample, exact = samples(spoiled)
    storage, encoder = open_storage(str(tmp_path)), Rough(2)
    limited = Gate(limits=limits, fingerprints={"images": kind}, storage=storage)
    parity = gate.pass_gate(encoder, kind, lambda: sample, lambda: exact, limited)
    if parity is not None:
        gate.record(parity, encoder, limited)
    return parity


def test_pixels_that_are_equal_pass(tmp_path: Path) -> None:
    parity = pass_gate(tmp_path, ParityConfig())
    assert (parity.images, parity.lowest_cosine, parity.mean_cosine, parity.top1) == (5, 1, 1, None)
    assert pass_gate(tmp_path, ParityConfig(), kind="exact") is None


def test_pixels_that_are_broken_miss_and_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"images\.decoder=fast .* over 5 images: parity\.decoder\.fast .* cosine: d \("
    ):
        pass_gate(tmp_path, ParityConfig(), spoiled=True)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_nothing_reaches_is_missed(tmp_path: Path) -> None:
    limits = dataclasses.replace(ParityConfig(), decoder={"fast": 1.1})
    with pytest.raises(ParityError, match=r"wants 1\.1, measured 1\.0"):
        pass_gate(tmp_path, limits)


def test_figures_are_remembered_and_held_against_the_limits_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = dataclasses.replace(ParityConfig(), decoder={"fast": 0.1})
    first = pass_gate(tmp_path, loose, spoiled=True)
    assert first.worst[0][0] == "d"
    monkeypatch.setattr(gate, "measure", None)
    assert pass_gate(tmp_path, loose) == first
    with pytest.raises(ParityError):
        pass_gate(tmp_path, ParityConfig())


def test_pictures_of_one_sample_alone_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    sample, exact = samples()
    part = Sample(ids=exact.ids[1:], pixels=exact.pixels[1:])
    parity = gate.measure(Rough(2), sample, part, None)
    assert parity is not None
    assert (parity.images, parity.lowest_cosine) == (4, 1)
    assert "1 pictures" in caplog.text
    assert gate.measure(Rough(2), sample, dataclasses.replace(part, ids=tuple("wxyz")), None) is None


def test_the_exact_sample_is_drawn_beside_the_other(tmp_path: Path) -> None:
    write(tmp_path, range(20), kind="bytes", bad=(2,))
    manifest = opened(tmp_path)
    source = Source(root=manifest.root, max_bytes=1_000_000)
    with PixelReader(source, decoder("fast"), SPEC) as reader, reader.exact() as exact:
        assert (reader.decoder.kind, exact.decoder.kind) == ("fast", "exact")
        ours, theirs = draw_sample(manifest, reader, 8), draw_sample(manifest, exact, 8)
    assert ours is not None
    assert theirs is not None
    assert ours.ids == theirs.ids


def mosaic(paths: list[Path]) -> bytes:
    """Twelve photos beside one another, about 2 megapixels."""
    whole = Image.new("RGB", (1600, 1200))
    for number in range(12):
        with Image.open(paths[number % len(paths)]) as photo:
            whole.paste(photo, (number % 4 * 400, number // 4 * 400))
    return encoded(whole, subsampling="4:2:0")


@pytest.mark.parametrize(
    ("model", "step"),
    [
        pytest.param(ModelConfig(), 12, id="demo"),
        pytest.param(
            ModelConfig(name="openai/clip-vit-base-patch32", weights="random"), 6, id="vit_b32", marks=pytest.mark.slow
        ),
    ],
)
def test_embeddings_of_real_photos_are_near_those_of_exact(model: ModelConfig, step: int) -> None:
    from pipeline.backends.torch import open_encoder

    paths = sorted(data_folder("clothing").rglob("*.jpg"))[::step]
    # Large pictures with the detail of real ones.
    files = [*(path.read_bytes() for path in paths), *(mosaic(paths[start:]) for start in range(0, len(paths), 8))]
    checkpoint = open_checkpoint(model)

    @cache
    def sample(kind: str) -> Sample:
        pixels = [decoder(kind).pixels(data, checkpoint.spec) for data in files]
        planes = torch.from_numpy(np.stack([p.rgb for p in pixels if isinstance(p, Pixels)])).permute(0, 3, 1, 2)
        return Sample(ids=tuple(str(number) for number in range(len(files))), pixels=planes)

    exact = sample("exact")
    encoder = open_encoder(
        checkpoint, BackendConfig(device="cpu"), batch_size=16, sample=lambda: exact, limits=ParityConfig()
    )
    assert embed_sample(encoder, exact).shape == (len(files), encoder.dim)
    assert (sample("scaled").pixels != exact.pixels)[-1].sum() > 1000
    for kind, limit in (("fast", 0.999), ("scaled", 0.995)):
        parity = gate.measure(encoder, sample(kind), exact, None)
        assert parity is not None
        print(model.name, kind, in_words(parity, than="exact"))
        assert parity.lowest_cosine >= limit
