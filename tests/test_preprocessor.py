from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ModelError
from pipeline.models.architectures import ARCHITECTURES, CLIP_PREPROCESSOR, OPENAI_MEAN
from pipeline.models.preprocessor import read_spec, to_spec


@pytest.mark.parametrize(
    ("values", "family", "resize", "crop"),
    [
        ({"size": 224, "crop_size": 224}, "clip", 224, (224, 224)),
        ({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, "clip", 336, (336, 336)),
        ({"size": {"height": 256, "width": 256}}, "siglip", (256, 256), None),
        ({"size": 384}, "siglip", (384, 384), None),
        ({"size": {"height": 224, "width": 200}, "do_center_crop": False}, "clip", (224, 200), None),
        ({}, "clip", 224, (224, 224)),
        ({}, "siglip", (224, 224), None),
        ({}, "chinese_clip", 224, (224, 224)),
        ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, "chinese_clip", (224, 224), None),
        ({"size": 336, "crop_size": 336}, "chinese_clip", 336, (336, 336)),
    ],
)
def test_sizes_are_read_in_every_spelling(
    values: dict[str, Any], family: str, resize: int | tuple[int, int], crop: tuple[int, int] | None
) -> None:
    spec = to_spec(values, family, "here")
    assert (spec.resize, spec.crop) == (resize, crop)
    assert spec.size == (crop or resize)


def test_defaults_are_those_of_transformers() -> None:
    from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    for family, processor in (
        ("clip", CLIPImageProcessorPil()),
        ("chinese_clip", ChineseCLIPImageProcessorPil()),
        ("siglip", SiglipImageProcessorPil()),
    ):
        spec = to_spec({}, family, "here")
        assert spec.resample == int(processor.resample)
        assert spec.mean == tuple(processor.image_mean)
        assert spec.std == tuple(processor.image_std)


def test_no_normalisation_means_zero_and_one() -> None:
    spec = to_spec({"do_normalize": False}, "clip", "here")
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert to_spec(CLIP_PREPROCESSOR, "clip", "here").mean == OPENAI_MEAN


def test_siglip_2_dinov3_and_vit_resize_bilinearly_and_all_others_bicubically() -> None:
    for name, (values, preprocessor) in ARCHITECTURES.items():
        spec = to_spec(preprocessor, values["model_type"], name)
        bilinear = any(part in name for part in ("siglip2", "dinov3", "google/vit-"))
        assert spec.resample == (2 if bilinear else 3), name


@pytest.mark.parametrize(
    "values",
    [
        {"do_resize": False},
        {"do_pad": True},
        {"rescale_factor": 1 / 127.5},
        {"size": {"longest_edge": 5}},
        {"do_center_crop": False},
        {"image_mean": [0.5]},
    ],
)
def test_a_step_that_is_not_done_here_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="here"):
        to_spec(values, "clip", "here")


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def test_both_file_names_are_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no preprocessor_config"):
        read_spec(tmp_path, "clip")
    write(tmp_path / "preprocessor_config.json", size=80, crop_size=70)
    assert read_spec(tmp_path, "clip").size == (70, 70)
    # A processor_config.json of another time names classes only.
    write(tmp_path / "processor_config.json", processor_class="CLIPProcessor")
    assert read_spec(tmp_path, "clip").size == (70, 70)


NEW = {"size": {"shortest_edge": 96}, "crop_size": {"height": 90, "width": 90}, "resample": 3}


@pytest.mark.parametrize(
    ("stale", "said"),
    [
        ({"size": 80, "crop_size": 70}, True),
        ({**NEW, "resample": 2}, True),
        ({**NEW, "image_mean": [0.5, 0.5, 0.5]}, True),
        ({**NEW, "do_normalize": False}, True),
        ({"size": "rubbish"}, True),
        (NEW, False),
        ({"size": 96, "crop_size": 90}, False),
        (None, False),
    ],
)
def test_a_nested_processor_is_read_before_a_stale_file_as_transformers_does(
    stale: dict[str, Any] | None, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    write(tmp_path / "processor_config.json", image_processor=NEW, processor_class="CLIPProcessor")
    if stale is not None:
        write(tmp_path / "preprocessor_config.json", **stale)
    spec, theirs = read_spec(tmp_path, "clip"), CLIPImageProcessorPil.from_pretrained(tmp_path)
    assert (spec.crop, spec.resize, spec.resample) == ((90, 90), 96, 3)
    assert (theirs.crop_size["height"], theirs.size["shortest_edge"], theirs.resample) == (90, 96, 3)
    assert spec.mean == tuple(theirs.image_mean)
    assert ("is not read, since" in caplog.text) == said


WRONG = ["48", [48, 48], {"shortest_edge": "48"}, {"height": 48}, 48.0, True, 0, -48, {}, {"shortest_edge": 10**9}]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", WRONG),
        ("crop_size", [*WRONG, {"shortest_edge": 48}]),
        ("image_mean", [0.5, "0.5", ["0.5"] * 3, [0.5, 0.5], [None] * 3, [float("nan")] * 3, [True] * 3, {}]),
        ("image_std", [0.5, [0.5, 0.5, 0.0], [-0.5] * 3, [float("inf")] * 3, []]),
        ("resample", ["bicubic", 3.0, 9, -1, True, [3]]),
        ("rescale_factor", ["1/255", 0, [1 / 255], float("nan"), True]),
        ("do_resize", [1, "true", []]),
        ("do_normalize", [0, 1, "no", {}]),
        ("do_center_crop", [1, "yes", []]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ModelError, match=rf"here: .*{key}"):
            to_spec({key: value}, "clip", "here")


@pytest.mark.parametrize("content", [b"[]", b"{", b"null", b"\xef\xbb\xbf{}", '{"size": 48}'.encode("utf-16"), b"\xff"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_file_that_is_no_json_object_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        read_spec(tmp_path, "clip")
