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


def test_siglip_2_resizes_bilinearly_and_siglip_bicubically() -> None:
    for name, (values, preprocessor) in ARCHITECTURES.items():
        spec = to_spec(preprocessor, values["model_type"], name)
        assert spec.resample == (2 if "siglip2" in name else 3), name


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


def test_both_file_names_are_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no preprocessor_config"):
        read_spec(tmp_path, "clip")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 100, "crop_size": 90}}))
    assert read_spec(tmp_path, "clip").size == (90, 90)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 80, "crop_size": 70}))
    assert read_spec(tmp_path, "clip").size == (70, 70)
