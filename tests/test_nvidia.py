"""The decoder on the GPU: what it takes, how it resizes, and that it waits where the hardware engine does not."""

from __future__ import annotations

import io
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.config.schema import FORMATS, Config, ImagesConfig, ManifestConfig
from pipeline.core.errors import BackendUnavailable, PlanMismatch
from pipeline.core.records import Failure, ImageBatch, Pixels, PreprocessSpec
from pipeline.dataset import plan
from pipeline.engine.feeder_process import FeederSpec, GpuDecoding, open_reader
from pipeline.engine.loader import Loader, LoaderSpec
from pipeline.engine.padding import repeats
from pipeline.images.decode import Decoder
from pipeline.images.gpu import decoder as gpu_decoder
from pipeline.images.gpu import nvimgcodec
from pipeline.images.gpu.decoder import NvidiaDecoder, turned
from pipeline.images.gpu.jpeg_header import baseline
from pipeline.images.gpu.resize import resample
from pipeline.images.pool.pool import Decoders
from pipeline.images.preprocess import preprocess
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source
from pipeline.images.versions import fingerprint
from pipeline.job.main import run_job
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.shards import cut
from pipeline.report.load import report_of
from pipeline.report.thumbnails import THUMBNAIL, thumbnails
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage
from tests.host_codec import HostCodec, install
from tests.jobs import config_for, content
from tests.pictures import saved

CPU = torch.device("cpu")
RULES = Decoder(formats=("JPEG",), max_pixels=10**8)
CLIP = PreprocessSpec(resize=224, crop=(224, 224), resample=3, mean=(0.5,) * 3, std=(0.5,) * 3)  # type: ignore[arg-type]
SPECS = {
    "clip": CLIP,
    "openai": PreprocessSpec(resize=224, crop=(224, 224), resample=3, mean=CLIP.mean, std=CLIP.std, corner="round"),
    "siglip": PreprocessSpec(resize=(256, 256), crop=None, resample=2, mean=CLIP.mean, std=CLIP.std),
    "padded": PreprocessSpec(resize=40, crop=(50, 45), resample=1, mean=CLIP.mean, std=CLIP.std),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with an edge: no two alike, and not the same when turned."""
    dice = np.random.default_rng(seed)
    small = Image.fromarray(dice.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 0, 0), (0, 0, max(1, width // 4), max(1, height // 6)))
    return image


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return saved(image, "JPEG", **{"quality": 90, **options})


def exact(data: bytes, spec: PreprocessSpec, *, exif: str = "apply") -> np.ndarray:
    decoder = Decoder(formats=("JPEG",), max_pixels=10**8, exif=exif)
    found = decoder.apply(data, lambda image: preprocess(image, spec))
    assert isinstance(found, Pixels)
    return np.asarray(found.rgb)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = number
    return exif


class PillowCodec:
    """A codec on the CPU that writes down in which order it is used and its pictures are let go."""

    engine = nvimgcodec.HARDWARE

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.events: list[str] = []
        self.refuses = 0
        self.busy = threading.Lock()

    def active(self) -> nullcontext[None]:
        return nullcontext()

    def wait(self) -> None:
        self.events.append("wait")

    def decode(self, encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        assert self.busy.acquire(blocking=False), "used by two threads"
        self.events.append("decode")
        found: list[torch.Tensor | None] = []
        for data in encoded:
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
            weakref.finalize(image, self.events.append, "freed")
            found.append(image)
        for index in range(self.refuses):
            found[index] = None
        self.busy.release()
        return found


def decoder(
    spec: PreprocessSpec = CLIP, *, exif: str = "apply", share: float = 1.0, **options: Any
) -> tuple[NvidiaDecoder, PillowCodec]:
    codec = PillowCodec(CPU)
    rules = replace(RULES, exif=exif, **options)
    return NvidiaDecoder(spec, CPU, rules, share=share, lanes=1, open_codec=lambda device: codec), codec


def off(found: np.ndarray | torch.Tensor | None, reference: np.ndarray) -> int:
    assert found is not None
    found = np.asarray(found)
    assert found.dtype == np.uint8
    assert found.shape == reference.shape
    return int(np.abs(found.astype(int) - reference).max())


@pytest.mark.parametrize("name", SPECS)
def test_pictures_of_all_shapes_are_resampled_as_pillow_does(name: str) -> None:
    spec = SPECS[name]
    sizes = [(500, 375), (375, 500), (224, 224), (640, 33), (1, 1), (3, 7), (1, 2000), (3000, 5), (250, 251), (39, 41)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    dice = np.random.default_rng(9)
    images += [Image.fromarray(dice.integers(0, 256, (61, 97, 3), dtype=np.uint8))]
    found = resample([torch.from_numpy(np.array(image)) for image in images], spec)
    for image, pixels in zip(images, found, strict=True):
        assert pixels.is_contiguous()
        assert off(pixels, preprocess(image, spec).rgb) <= 1, image.size


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    pictures = [torch.from_numpy(np.array(picture(230 + i % 3, 200, seed=i))) for i in range(11)]
    together = resample(pictures, CLIP)
    for index in (0, 5, 10):
        [alone] = resample([pictures[index]], CLIP)
        assert torch.equal(together[index], alone)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_pictures_are_turned_as_the_decoder_for_all_formats_does(number: int, exif: str) -> None:
    data = jpeg(picture(90, 60), exif=orientation(number))
    gpu, _ = decoder(exif=exif)
    assert off(gpu.decode([data])[0], exact(data, CLIP, exif=exif)) <= 1


def test_every_turn_is_pillows() -> None:
    image = picture(5, 3)
    for number in range(1, 9):
        image.getexif()[274] = number
        found = turned(torch.from_numpy(np.array(image)), number)
        np.testing.assert_array_equal(found.numpy(), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1},
        {"comment": b"hello"},
        {"icc_profile": bytes(70_000)},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_baseline_files_are_taken(options: dict[str, Any], mode: str) -> None:
    if mode == "L":
        options = {**options, "subsampling": 0}
    data = jpeg(picture(123, 77).convert(mode), **options)
    header = baseline(data, exif="apply")
    assert header is not None
    assert (header.width, header.height, header.orientation) == (123, 77, 1)


def with_segment(data: bytes, marker: int, segment: bytes) -> bytes:
    return data[:2] + bytes([0xFF, marker]) + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


WHOLE = jpeg(picture(200, 160))
ADOBE = b"Adobe" + bytes(6)
ODD = {
    "empty": b"",
    "one byte": b"\xff",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "only its ends": b"\xff\xd8\xff\xd9",
    "progressive": jpeg(picture(50, 40), progressive=True),
    "grey with the sampling of colours": jpeg(picture(50, 40).convert("L"), subsampling=2),
    "CMYK": jpeg(picture(50, 40).convert("CMYK")),
    "RGB that was not converted": jpeg(picture(50, 40), keep_rgb=True),
    "Adobe says RGB": with_segment(WHOLE, 0xEE, ADOBE + b"\0"),
    "cut off": WHOLE[:-200],
    "cut off, with an end": WHOLE[:300] + b"\xff\xd9",
    "something behind it": WHOLE + b"\0",
    "another image behind it": WHOLE + WHOLE,
    "a marker within the scan": WHOLE[:-40] + b"\xff\xc4" + WHOLE[-38:],
    "a restart within the scan": WHOLE[:-40] + b"\xff\xd0" + WHOLE[-38:],
    "a restart too few": jpeg(picture(80, 80), restart_marker_rows=1).replace(b"\xff\xd0", b"\x7f\xd0", 1),
    "restarts out of order": jpeg(picture(80, 80), restart_marker_rows=1).replace(b"\xff\xd1", b"\xff\xd3", 1),
    "height of none": WHOLE.replace(b"\xff\xc0\0\x11\x08\0\xa0", b"\xff\xc0\0\x11\x08\0\0"),
    "12 bits": WHOLE.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "extended sequential": WHOLE.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11"),
    "arithmetic": WHOLE.replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11"),
    "no tables": b"\xff\xd8" + WHOLE[WHOLE.index(b"\xff\xc0") :],
    "a segment that never ends": with_segment(WHOLE, 0xE5, b"x").replace(b"\xff\xe5\0\x03", b"\xff\xe5\xff\xff"),
    "no end of segments": b"\xff\xd8" + b"\xff\xfe\0\x02" * 300 + WHOLE[2:],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_the_cpu(name: str) -> None:
    assert ODD[name] != WHOLE
    gpu, codec = decoder()
    assert gpu.decode([ODD[name]]) == [None]
    assert codec.events == []


def test_no_cut_or_changed_header_raises() -> None:
    data = jpeg(picture(40, 30), exif=orientation(6), restart_marker_rows=1)
    start = data.index(b"\xff\xda")
    for end in range(0, len(data), 3):
        assert baseline(data[:end], exif="apply") is None
    dice = np.random.default_rng(3)
    for _ in range(800):
        spoiled = bytearray(data)
        for place in dice.integers(0, start + 14, 3):
            spoiled[place] = dice.integers(0, 256)
        baseline(bytes(spoiled), exif="apply")


def test_the_orientation_is_found_wherever_pillow_finds_it() -> None:
    spec = PreprocessSpec(resize=(8, 8), crop=None, resample=3, mean=CLIP.mean, std=CLIP.std)
    plain = jpeg(picture(90, 60))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>'
    exif = jpeg(picture(90, 60), exif=orientation(5))
    cut = exif.index(b"Exif")
    files = [
        with_segment(plain, 0xE1, xmp),
        with_segment(exif, 0xE1, xmp),
        exif[: cut + 6] + b"XX" + exif[cut + 8 :],
        exif.replace(b"\x01\x12", b"\x01\x13"),
        with_segment(exif, 0xE1, b"Exif\0\0" + bytes(12)),
    ]
    gpu, _ = decoder(spec)
    for data, found in zip(files, gpu.decode(files), strict=True):
        assert off(found, exact(data, spec)) <= 1


def test_giants_and_formats_that_are_not_allowed_are_left_to_the_cpu() -> None:
    gpu, _ = decoder(max_pixels=200 * 160 - 1)
    assert gpu.decode([WHOLE]) == [None]
    gpu, _ = decoder(formats=("PNG",))
    assert gpu.decode([WHOLE]) == [None]


def test_a_batch_keeps_its_order_whoever_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decoder, "CALL_PIXELS", 70_000)
    sizes = [(200, 160), (160, 200), (64, 64), (300, 300), (200, 160), (10, 10)]
    files = [jpeg(picture(*size, seed=i)) for i, size in enumerate(sizes)]
    files.insert(2, ODD["progressive"])
    gpu, codec = decoder()
    found = gpu.decode(files)
    assert found[2] is None
    for index, data in enumerate(files):
        if index != 2:
            assert off(found[index], exact(data, CLIP)) <= 1
    assert codec.events.count("decode") == 3


def test_what_the_codec_refuses_or_leaves_blank_is_left_to_the_cpu() -> None:
    gpu, codec = decoder()
    codec.refuses = 1
    blank = jpeg(Image.new("RGB", (30, 20)))
    first, second, third = gpu.decode([WHOLE, blank, WHOLE])
    assert first is None
    assert second is None
    assert off(third, exact(WHOLE, CLIP)) <= 1


def test_a_picture_is_let_go_only_when_nothing_reads_it_and_the_engine_starts_on_an_empty_stream() -> None:
    gpu, codec = decoder()
    for _ in range(3):
        gpu.decode([WHOLE, WHOLE])
    once = ["wait", "decode", "wait", "wait", "freed", "freed"]
    assert codec.events == once * 3


def test_many_threads_share_the_lanes() -> None:
    codecs: list[PillowCodec] = []

    def opened(device: torch.device) -> PillowCodec:
        codecs.append(PillowCodec(device))
        return codecs[-1]

    gpu = NvidiaDecoder(CLIP, CPU, RULES, open_codec=opened)
    assert len(codecs) == gpu_decoder.LANES
    files = [jpeg(picture(100 + i, 90, seed=i)) for i in range(6)]
    references = [exact(data, CLIP) for data in files]
    with ThreadPoolExecutor(5) as pool:
        for found in pool.map(gpu.decode, [files] * 10):
            assert corrupted(found, references) == []


def test_a_full_device_is_told_as_such() -> None:
    gpu, codec = decoder()

    def full(encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    codec.decode = full  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable, match=r"no memory left to decode images.*loader\.batch_size"):
        gpu.decode([WHOLE])


def test_other_errors_of_the_device_are_not_swallowed() -> None:
    gpu, codec = decoder()

    def broken(encoded: Sequence[bytes]) -> list[torch.Tensor | None]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    codec.decode = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.decode([WHOLE])


def test_without_a_gpu_or_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match=r"needs a GPU.*backend\.device is cpu.*images=fast"):
        NvidiaDecoder(CLIP, CPU, RULES)
    monkeypatch.setitem(sys.modules, "nvidia", ModuleType("nvidia"))
    with pytest.raises(BackendUnavailable, match=r"nvImageCodec .*: pip install .*\[gpu\]'"):
        NvidiaDecoder(CLIP, torch.device("cuda", 0), RULES)
    box = PreprocessSpec(resize=224, crop=(224, 224), resample=4, mean=CLIP.mean, std=CLIP.std)
    with pytest.raises(BackendUnavailable, match=r"resampling filter 4.*images\.decoder=exact"):
        NvidiaDecoder(box, CPU, RULES)


def test_nvimagecodec_is_called_as_it_wants_to_be() -> None:
    codec = HostCodec(CPU)
    gpu = NvidiaDecoder(CLIP, CPU, RULES, lanes=1, open_codec=lambda device: codec)
    files = [
        WHOLE,
        jpeg(picture(90, 120).convert("L")),
        jpeg(picture(90, 120), exif=orientation(6)),
        jpeg(picture(333, 120), restart_marker_rows=1, subsampling=1),
        ODD["progressive"],
    ]
    found = gpu.decode(files)
    assert found[-1] is None
    for data, pixels in zip(files[:-1], found, strict=False):
        assert off(pixels, exact(data, CLIP)) <= 2
    assert codec.decode([b"\xff\xd8 nonsense"]) == [None]
    assert nvimgcodec.version() == codec.module.__version__


def test_halved_colours_are_interpolated_as_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(5)
    image = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((256, 192), Image.Resampling.BOX)
    data = jpeg(image, subsampling=2)
    wanted = np.asarray(Image.open(io.BytesIO(data)))
    [found] = HostCodec(CPU).decode([data])
    assert off(found, wanted) <= 2
    # Unless the option arrives: it is the default of some versions only.
    monkeypatch.setattr(nvimgcodec, "OPTIONS", ":fancy_upsampling=0")
    [other] = HostCodec(CPU).decode([data])
    assert off(other, wanted) > 20


def test_an_engine_that_is_not_there_is_found_to_be_absent() -> None:
    module = pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    kinds, device = module.BackendKind, module.NVIMGCODEC_DEVICE_CPU_ONLY
    assert nvimgcodec.takes_a_picture(module, kinds.CPU_ONLY, device)
    assert not nvimgcodec.takes_a_picture(module, kinds.HW_GPU_ONLY, device)


def test_a_machine_without_the_jpeg_engine_is_told_about_the_capability(caplog: pytest.LogCaptureFixture) -> None:
    gpu, codec = decoder()
    assert gpu.engine == nvimgcodec.HARDWARE
    assert caplog.messages == []
    codec.engine = nvimgcodec.KERNELS
    gpu = NvidiaDecoder(CLIP, CPU, RULES, open_codec=lambda device: codec)
    assert gpu.engine == nvimgcodec.KERNELS
    [message] = caplog.messages
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in message


def test_lanes_with_different_engines_are_refused() -> None:
    codecs = [PillowCodec(CPU), PillowCodec(CPU)]
    codecs[1].engine = nvimgcodec.KERNELS
    with pytest.raises(BackendUnavailable, match="answered only once"):
        NvidiaDecoder(CLIP, CPU, RULES, open_codec=lambda device: codecs.pop())


def test_a_share_of_the_files_goes_to_the_device_by_their_bytes_alone() -> None:
    files = [jpeg(picture(40, 30, seed=i)) for i in range(64)]

    def taken(share: float, some: Sequence[bytes]) -> list[bool]:
        gpu, _ = decoder(share=share)
        return [pixels is not None for pixels in gpu.decode(some)]

    half = taken(0.5, files)
    assert 16 < sum(half) < 48
    assert taken(0.5, files[::-1]) == half[::-1]
    assert [taken(0.5, [data])[0] for data in files[:8]] == half[:8]
    # Less goes to the device with a smaller share, and nothing else.
    fewer = taken(0.2, files)
    assert all(whole for whole, part in zip(half, fewer, strict=True) if part)
    assert (sum(taken(0, files)), sum(taken(1, files))) == (0, 64)


def test_the_fingerprint_names_what_decodes_on_a_gpu_alone() -> None:
    images = ImagesConfig()
    assert fingerprint(images).keys() == {*asdict(images), "library"} - {"gpu_share"}
    gpu = replace(images, decoder="gpu")
    assert fingerprint(gpu, nvimgcodec.KERNELS) == {**fingerprint(gpu), "engine": "kernels"}
    assert fingerprint(replace(gpu, gpu_share=0.5)) == {**fingerprint(gpu), "gpu_share": 0.5}
    assert fingerprint(replace(images, gpu_share=0.5)) == fingerprint(images)


def test_a_dataset_of_another_engine_is_refused_and_one_from_before_is_accepted(tmp_path: Path) -> None:
    config = Config(images=ImagesConfig(decoder="gpu"), manifest=ManifestConfig(shard_rows=4096))

    def plan_of(engine: str | None) -> plan.Plan:
        return plan.new_plan(config, {"images": fingerprint(config.images, engine)}, rows=5)

    old, new = LocalStorage(str(tmp_path / "old")), LocalStorage(str(tmp_path / "new"))
    plan.write_once(old, plan_of(None))
    # A resume keeps the fingerprints as they are there: all parts have the same.
    settled = plan.settle(old, plan_of(nvimgcodec.HARDWARE))
    assert settled.fingerprints == plan_of(None).fingerprints
    assert not plan.write_once(old, settled)
    plan.write_once(new, plan_of(nvimgcodec.HARDWARE))
    with pytest.raises(PlanMismatch, match=r'images\.engine: there "hardware", now "kernels"'):
        plan.settle(new, plan_of(nvimgcodec.KERNELS))


def corrupted(found: Sequence[np.ndarray | None], references: Sequence[np.ndarray], *, levels: int = 1) -> list[int]:
    """Which pictures are not those of their references."""
    return [
        index
        for index, (pixels, reference) in enumerate(zip(found, references, strict=True))
        if pixels is None or off(pixels, reference) > levels
    ]


def test_a_corrupted_picture_would_be_found() -> None:
    reference = exact(WHOLE, CLIP)
    assert corrupted([reference], [reference]) == []
    stripe = reference.copy()
    stripe[100:102] = 255 - stripe[100:102]
    other = exact(jpeg(picture(200, 160, seed=8)), CLIP)
    assert corrupted([reference, stripe, other, None], [reference] * 4) == [1, 2, 3]


def manifest_of(folder: Path, files: Sequence[bytes]) -> Manifest:
    table = pa.table({"id": list(range(len(files))), "image": pa.array(files, pa.binary())})
    pq.write_table(table, folder / "m.parquet", row_group_size=50)
    return open_manifest(ManifestConfig(path=str(folder / "m.parquet"), image="image"))


def batches_of(
    manifest: Manifest, reader: PixelReader, device: torch.device = CPU
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[int, Failure]]:
    """Rows and pixels of every batch, and the failures, of a manifest of one shard."""
    batches, failures = [], {}
    spec = LoaderSpec(batch_size=16, workers=2, prefetch=2)
    with Loader(manifest, reader, spec, device=device, timer=lambda stage, seconds: None) as loader:
        for item in loader.stream(cut(manifest, 4096)):
            if isinstance(item, ImageBatch):
                batches.append((item.rows.copy(), item.pixels.cpu().permute(0, 2, 3, 1).numpy().copy()))
                loader.release(item)
            else:
                failures.update(item.failures)
    return batches, failures


@pytest.mark.parametrize("isolation", ["process", "none"])
@pytest.mark.parametrize("every", [1, 3, 1000], ids=["one in ten on the device", "some", "nearly all"])
def test_a_batch_holds_what_both_sides_decoded(tmp_path: Path, every: int, isolation: str) -> None:
    files = [jpeg(picture(60 + i, 50, seed=i), progressive=i % every == 0 and i % 10 != 0) for i in range(70)]
    files[11], files[12] = b"nothing", files[12][:-50]
    manifest = manifest_of(tmp_path, files)
    spec = PreprocessSpec(resize=24, crop=(24, 24), resample=3, mean=CLIP.mean, std=CLIP.std)
    rules = Decoder(formats=FORMATS, max_pixels=10**8)
    decoders = Decoders(rules, processes=2, seconds=60, memory=2**31) if isolation == "process" else None
    with PixelReader(
        source=Source(root=str(tmp_path), max_bytes=10**9), decoder=rules, spec=spec, decoders=decoders
    ) as reader:
        expected, expected_failures = batches_of(manifest, reader)
        gpu, codec = decoder(spec)
        found, failures = batches_of(manifest, replace(reader, gpu=gpu))
    assert codec.events.count("decode") > 0
    assert failures == expected_failures
    assert sorted(failures) == [11, 12]
    assert len(found) == len(expected) == 5
    for (rows, pixels), (expected_rows, reference) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(rows, expected_rows)
        count = len(rows)
        assert np.abs(pixels[:count].astype(int) - reference[:count]).max() <= 1
        np.testing.assert_array_equal(pixels[count:], pixels[repeats(count, 16).numpy()])


def test_the_pictures_of_a_report_have_their_own_size(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [WHOLE, WHOLE])
    gpu, codec = decoder()
    reader = PixelReader(
        source=Source(root=str(tmp_path), max_bytes=10**9),
        decoder=Decoder(formats=FORMATS, max_pixels=10**8),
        spec=CLIP,
        gpu=gpu,
    )
    pictures = thumbnails(manifest, reader, {0: "0", 1: "1"})
    assert [Image.open(io.BytesIO(pictures[number])).size for number in (0, 1)] == [THUMBNAIL.size] * 2
    assert codec.events == []


def odd_files(count: int) -> list[bytes]:
    """Files for either side, damaged ones, and some that come again."""
    files = [jpeg(picture(60 + i, 50, seed=i % 50), progressive=i % 4 == 1) for i in range(count)]
    files[11], files[12], files[30] = b"nothing", files[12][:-50], files[2]
    return files


def gpu_config(folder: Path, feeders: int, *, decoder: str = "gpu", device: str = "cpu") -> Config:
    groups: dict[str, dict[str, Any]] = {
        "manifest": {"shard_rows": 25, "image": "image", "keep": []},
        "images": {"decoder": decoder},
        "backend": {"device": device},
        "loader": {"batch_size": 8, "workers": 2, "feeders": feeders},
    }
    return config_for(folder / "m.parquet", folder / f"out-{feeders}", **groups)


@pytest.mark.slow
def test_a_job_whose_feeders_decode_as_the_gpu_does_is_the_job_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path)
    manifest_of(tmp_path, odd_files(60))
    for feeders in (0, 1):
        run_job(gpu_config(tmp_path, feeders))
    assert content(tmp_path / "out-1") == content(tmp_path / "out-0")
    rows = pq.read_table(tmp_path / "out-1", columns=["id", "status"]).to_pylist()
    assert [row["id"] for row in rows if row["status"] != "ok"] == [11, 12]
    report = report_of(open_storage(str(tmp_path / "out-1")))
    assert report["fingerprints"]["images"]["engine"] == nvimgcodec.HARDWARE


@pytest.mark.slow
def test_a_feeder_whose_gpu_decodes_in_another_way_ends_the_job_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, feeders=nvimgcodec.KERNELS)
    manifest_of(tmp_path, odd_files(40))
    with pytest.raises(BackendUnavailable, match="a feeder process decodes by kernels and the job by hardware"):
        run_job(gpu_config(tmp_path, 1))


def test_a_feeder_opens_the_decoder_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PillowCodec, "engine", nvimgcodec.KERNELS)
    monkeypatch.setattr(gpu_decoder, "Nvimgcodec", PillowCodec)
    config = gpu_config(tmp_path, 1).changed({"images.gpu_share": 0.0})
    manifest = manifest_of(tmp_path, [WHOLE])
    loader = LoaderSpec(batch_size=8, workers=2, prefetch=2)
    spec = FeederSpec(config, manifest, CLIP, loader, buffers=3, gpu=GpuDecoding("cpu", nvimgcodec.KERNELS))
    with open_reader(spec) as reader:
        assert reader.gpu is not None
        assert reader.gpu.decode([WHOLE]) == [None]
    assert caplog.messages == []
    with pytest.raises(BackendUnavailable, match=r"decodes by kernels and the job by hardware.*loader\.feeders"):
        open_reader(replace(spec, gpu=GpuDecoding("cpu", nvimgcodec.HARDWARE)))
    with open_reader(replace(spec, gpu=None)) as reader:
        assert reader.gpu is None


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["exact", "gpu"])
def test_a_job_on_the_gpu_gives_the_same_bytes_with_and_without_feeders(tmp_path: Path, decoder: str) -> None:
    if decoder == "gpu":
        on_gpu()
    manifest_of(tmp_path, odd_files(80))
    for feeders in (0, 2):
        run_job(gpu_config(tmp_path, feeders, decoder=decoder, device="cuda"))
    assert content(tmp_path / "out-2") == content(tmp_path / "out-0")


@pytest.mark.gpu
def test_batches_on_the_gpu_hold_what_both_sides_decoded(tmp_path: Path) -> None:
    files = mixed(70)
    files[5], files[6], files[7] = ODD["progressive"], b"nothing", WHOLE[:-50]
    manifest = manifest_of(tmp_path, files)
    gpu = on_gpu()
    with PixelReader(
        source=Source(root=str(tmp_path), max_bytes=10**9),
        decoder=Decoder(formats=FORMATS, max_pixels=10**8),
        spec=CLIP,
    ) as reader:
        expected, expected_failures = batches_of(manifest, reader)
        for _ in range(20):
            found, failures = batches_of(manifest, replace(reader, gpu=gpu), torch.device("cuda", 0))
            assert failures == expected_failures
            for (rows, pixels), (expected_rows, reference) in zip(found, expected, strict=True):
                np.testing.assert_array_equal(rows, expected_rows)
                count = len(rows)
                assert np.abs(pixels[:count].astype(int) - reference[:count]).mean(axis=(1, 2, 3)).max() < 2
                np.testing.assert_array_equal(pixels[count:], pixels[repeats(count, 16).numpy()])


def mixed(count: int) -> list[bytes]:
    dice = np.random.default_rng(11)
    sizes = dice.integers(80, 900, (count, 2))
    options = [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"exif": orientation(6)}]
    return [
        jpeg(picture(int(width), int(height), seed=i), **options[i % len(options)])
        for i, (width, height) in enumerate(sizes)
    ]


def on_gpu(spec: PreprocessSpec = CLIP) -> NvidiaDecoder:
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    return NvidiaDecoder(spec, torch.device("cuda", 0), RULES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_the_gpu_decodes_nearly_as_pillow(name: str) -> None:
    files = mixed(24)
    for data, pixels in zip(files, on_gpu(SPECS[name]).decode(files), strict=True):
        assert pixels is not None
        # nvJPEG's inverse transform and its interpolation of colours differ a little from libjpeg-turbo's.
        assert np.abs(pixels.astype(int) - exact(data, SPECS[name])).mean() < 2


@pytest.mark.gpu
def test_200_rounds_beside_other_kernels_corrupt_no_picture_and_no_tensor() -> None:
    """On an H100 that is not waited for, two rounds of three are corrupt (pytorch/vision #9606)."""
    gpu, files = on_gpu(), mixed(48)
    alone = gpu.decode(files)
    references = [pixels for pixels in alone if pixels is not None]
    assert len(references) == len(files)
    for data, reference in zip(files, references, strict=True):
        assert np.abs(reference.astype(int) - exact(data, CLIP)).mean() < 2

    def rounds(seed: int) -> list[str]:
        dice, trouble = np.random.default_rng(seed), []
        stream = torch.cuda.Stream()
        for _ in range(50):
            chosen = dice.choice(len(files), 24, replace=False)
            with torch.cuda.stream(stream):
                # Reads that are still queued, behind a pause, when the decoder is handed memory.
                victims = [torch.full((int(size),), 3.0, device="cuda") for size in dice.integers(10**5, 10**6, 4)]
                torch.cuda._sleep(20_000_000)
                sums = [victim.double().sum() / victim.numel() for victim in victims]
                del victims
            found = gpu.decode([files[index] for index in chosen])
            bad = corrupted(found, [references[index] for index in chosen])
            trouble += [f"picture {chosen[index]}" for index in bad]
            trouble += [f"a sum of {float(value)}" for value in sums if float(value) != 3.0]
        return trouble

    with ThreadPoolExecutor(4) as pool:
        assert [line for lines in pool.map(rounds, range(4)) for line in lines] == []


@pytest.mark.gpu
def test_a_file_has_the_same_pixels_whatever_is_decoded_with_it() -> None:
    gpu, files = on_gpu(), mixed(48)
    together = gpu.decode(files)
    apart = [found for start in range(0, 48, 5) for found in gpu.decode(files[start : start + 5])]
    assert all(map(np.array_equal, together, apart))


@pytest.mark.gpu
def test_the_engine_of_this_gpu_is_named() -> None:
    engine, name = on_gpu().engine, torch.cuda.get_device_name()
    if engine == nvimgcodec.KERNELS and any(model in name for model in ("A100", "H100", "H200")):
        pytest.skip(f"the JPEG engine of {name} does not answer: the container needs the driver capability video")
    assert engine in nvimgcodec.WORDS


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_resampling_waits_for_no_device(name: str) -> None:
    pictures = [torch.full((300 + i, 400, 3), i, dtype=torch.uint8, device="cuda") for i in range(4)]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found = resample(pictures, SPECS[name])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(found) == len(pictures)


@pytest.mark.gpu
def test_damaged_files_never_come_from_the_gpu() -> None:
    found = on_gpu().decode([*ODD.values(), WHOLE])
    assert [pixels is None for pixels in found] == [True] * len(ODD) + [False]


def test_what_is_left_to_the_cpu_fails_there_as_ever() -> None:
    ordinary = Decoder(formats=("JPEG",), max_pixels=10**8)
    result = ordinary.decode(ODD["cut off"])
    assert isinstance(result, Failure)
    assert result.status == "truncated"
