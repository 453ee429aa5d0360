"""Preprocessing against published tensors, and against transformers' own processors, bit for bit."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import load_image

from pipeline.config.schema import FORMATS
from pipeline.core.records import PreprocessSpec
from pipeline.images.decode import Decoder
from pipeline.images.preprocess import LONGEST, preprocess
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.preprocessor import to_spec
from tests.conftest import data_folder

Array = NDArray[np.uint8]
DECODER = Decoder(formats=FORMATS, max_pixels=100_000_000)
CLIP_VALUES = ARCHITECTURES["openai/clip-vit-base-patch32"][1]
SIGLIP_VALUES = ARCHITECTURES["google/siglip2-base-patch16-224"][1]
CLIP = to_spec(CLIP_VALUES, "clip", "a test")
SIGLIP = to_spec(SIGLIP_VALUES, "siglip", "a test")


def decoded(data: bytes) -> Image.Image:
    image = DECODER.decode(data)
    assert isinstance(image, Image.Image), image
    return image


def reference(processor: Any, image: Image.Image) -> Array:
    """The result of transformers, as uint8 ``[H, W, 3]``."""
    pixels: Array = processor(image, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def clip_processor(**values: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(**{**CLIP_VALUES, **values, "do_rescale": False, "do_normalize": False})


def picture(width: int, height: int) -> Image.Image:
    """Noise at two scales, so that a shift of a fraction of a pixel shows."""
    noise = np.random.default_rng(width * 7919 + height)
    fine = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = noise.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    return Image.blend(Image.fromarray(fine), Image.fromarray(coarse).resize((width, height)), 0.7)


def published() -> dict[str, NDArray[np.float32]]:
    """Tensors that openai/CLIP's own preprocessing gave, by the name of the photo."""
    tensors = np.load(data_folder("preprocess_parity") / "clip_retrieval_vitb32.npz")
    return dict(zip(tensors["names"].tolist(), tensors["pixel_values"], strict=True))


def normalised(rgb: Array) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP.mean, CLIP.std))
    return (torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["123_456", "208_495", "321_421", "389_535", "416_264", "456_123", "524_316"])
def test_the_published_tensors_are_reproduced_exactly(name: str) -> None:
    image = decoded((data_folder("preprocess_parity") / f"{name}.jpg").read_bytes())
    difference = normalised(preprocess(image, replace(CLIP, corner="round")).rgb) - torch.from_numpy(published()[name])
    assert float(difference.abs().max()) == 0.0


def test_the_two_references_differ_only_in_the_corner_of_an_odd_margin() -> None:
    image = decoded((data_folder("preprocess_parity") / "524_316.jpg").read_bytes())
    # 371 - 224 is odd: transformers begins at column 73, torchvision at round(73.5) = 74.
    down, even = preprocess(image, CLIP).rgb, preprocess(image, replace(CLIP, corner="round")).rgb
    assert np.array_equal(down, reference(clip_processor(), image))
    assert np.array_equal(down[:, 1:], even[:, :-1])


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_photo_equals_what_transformers_makes_of_it(every: int) -> None:
    folder = data_folder("clothing")
    clip = clip_processor()
    siglip = SiglipImageProcessorPil(**{**SIGLIP_VALUES, "do_rescale": False, "do_normalize": False})
    paths = sorted(folder.rglob("*.jpg"))
    assert len(paths) == 372
    different = []
    for number, path in enumerate(paths[::every]):
        image = decoded(path.read_bytes())
        equal = np.array_equal(preprocess(image, CLIP).rgb, reference(clip, image))
        if number % 4 == 0:
            equal &= np.array_equal(preprocess(image, SIGLIP).rgb, reference(siglip, image))
            equal &= np.array_equal(np.asarray(image), np.asarray(load_image(str(path))))
        if not equal:
            different.append(path.name)
    assert different == []


SIZES = [
    (224, 224), (225, 224), (224, 225), (223, 223), (640, 480), (480, 640), (481, 641), (333, 1000), (1000, 333),
    (1, 1), (1, 2), (3, 5), (5, 3), (100, 1600), (1600, 100), (17, 19), (1023, 257),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_shape_equals_what_transformers_makes_of_it(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert np.array_equal(preprocess(image, CLIP).rgb, reference(clip_processor(), image))


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (3, 5), (1, 1000), (1000, 1)], ids=str)
@pytest.mark.parametrize("shape", [(224, 224), (256, 192), (31, 64)], ids=str)
@pytest.mark.parametrize("resample", [2, 3])
def test_a_resize_to_height_and_width_equals_what_transformers_makes_of_it(
    size: tuple[int, int], shape: tuple[int, int], resample: int
) -> None:
    values = {"size": {"height": shape[0], "width": shape[1]}, "resample": resample}
    processor = SiglipImageProcessorPil(**values, do_rescale=False, do_normalize=False)
    got = preprocess(picture(*size), to_spec({**SIGLIP_VALUES, **values}, "siglip", "a test"))
    assert got.rgb.shape == (*shape, 3)
    assert np.array_equal(got.rgb, reference(processor, picture(*size)))


@pytest.mark.parametrize(
    ("resize", "crop"),
    [
        (256, (224, 224)),
        (224, (200, 160)),
        (8, (8, 3)),
        (100, (101, 101)),
        (100, (121, 121)),
        (9, (20, 13)),
        (10, (7, 40)),
        (10, (40, 7)),
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 51), (12, 90)], ids=str)
def test_any_crop_equals_what_transformers_makes_of_it(
    size: tuple[int, int], resize: int, crop: tuple[int, int]
) -> None:
    values = {"size": {"shortest_edge": resize}, "crop_size": {"height": crop[0], "width": crop[1]}}
    got = preprocess(picture(*size), to_spec({**CLIP_VALUES, **values}, "clip", "a test"))
    assert got.rgb.shape == (*crop, 3)
    assert np.array_equal(got.rgb, reference(clip_processor(**values), picture(*size)))


def test_an_image_smaller_than_the_crop_stands_in_black() -> None:
    spec = PreprocessSpec(resize=2, crop=(4, 5), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
    grey = preprocess(Image.new("RGB", (2, 2), (9, 9, 9)), spec).rgb[:, :, 0]
    assert grey.tolist() == [[0, 0, 0, 0, 0], [0, 0, 9, 9, 0], [0, 0, 9, 9, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "size",
    [(10, 161), (10, 1001), (7, 2001), (20, 501), (33, 1000), (101, 4000), (300, 6001), (1001, 20), (4001, 201)],
    ids=str,
)
def test_a_strip_differs_from_what_transformers_makes_of_it_by_rounding_only(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert max(size) > LONGEST * min(size)
    wanted = reference(clip_processor(), image).astype(int)
    difference = np.abs(preprocess(image, CLIP).rgb - wanted)
    # The order of Pillow's two passes depends on the sizes, and each pass rounds.
    assert difference.max() <= 4
    assert difference.mean() < 0.3


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 200_000), (200, 50_000)], ids=str)
def test_a_strip_stays_small_in_memory(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = preprocess(image, CLIP)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB
    assert pixels.rgb.shape == (224, 224, 3)
    assert (pixels.rgb == (10, 20, 30)).all()


@pytest.mark.parametrize("long", [50_000, 50_001])
def test_a_strip_shows_its_middle(long: int) -> None:
    strip = Image.new("RGB", (1, long))
    for row in ((long - 1) // 2, long // 2):
        strip.putpixel((0, row), (255, 255, 255))
    rows = preprocess(strip, CLIP).rgb[:, 0, 0]
    assert rows.max() == 255
    assert np.array_equal(rows, rows[::-1])
    across = preprocess(strip.transpose(Image.Transpose.TRANSPOSE), CLIP).rgb[0, :, 0]
    assert np.array_equal(across, rows)
