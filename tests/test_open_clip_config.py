"""The config of a checkpoint of open_clip: what is taken, what is refused by name, and what decides numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ModelError
from pipeline.core.records import PreprocessSpec
from pipeline.models.open_clip_config import check_model, facts, read_config, to_spec

MODEL: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        ({}, PreprocessSpec(224, (224, 224), 3, MEAN, STD, "round")),
        (
            {"interpolation": "random", "size": 999, "mean": None},
            PreprocessSpec(224, (224, 224), 3, MEAN, STD, "round"),
        ),
        (
            {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": 0.5, "fill_color": 0},
            PreprocessSpec((224, 224), None, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, PreprocessSpec(224, (224, 224), 3, (0, 0, 0), (1, 1, 1), "round")),
    ],
)
def test_pictures_are_those_of_open_clip_s_transform(values: dict[str, Any], spec: PreprocessSpec) -> None:
    assert to_spec(values, (224, 224), "here") == spec


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ({"resize_mode": "longest"}, (224, 224), "resize_mode=longest, pictures with bars"),
        ({"resize_mode": "crop"}, (224, 224), "resize_mode is 'crop'; wanted shortest or squash"),
        ({}, (224, 336), "resize_mode=shortest for 224 x 336 pixels"),
        ({"mode": "L"}, (224, 224), "mode is 'L'"),
        ({"interpolation": "nearest"}, (224, 224), "interpolation is 'nearest'; wanted bicubic"),
        ({"interpolation": ["bicubic"]}, (224, 224), "interpolation is"),
        ({"mean": [0.5, 0.5]}, (224, 224), r"mean is \[0.5, 0.5\]; wanted three numbers"),
        ({"mean": "0.5"}, (224, 224), "mean is '0.5'; wanted three numbers"),
        ({"std": [0.5, 0.5, 0]}, (224, 224), r"std is \(0.5, 0.5, 0.0\); wanted three positive numbers"),
    ],
)
def test_other_pictures_are_refused(values: dict[str, Any], size: tuple[int, int], message: str) -> None:
    with pytest.raises(ModelError, match=f"here: {message}"):
        to_spec(values, size, "here")


@pytest.mark.parametrize(
    ("key", "values", "wanted"),
    [
        ("embed_dim", [0, -1, 1.5, "512", True, 10**9], "a whole number from 1 to 100000"),
        ("quick_gelu", ["yes", 1], "true or false"),
        ("vision_cfg", [None, [], "ViT"], "an object with the sizes"),
        ("vision_cfg.layers", [0, "12", [3, 4, 6], [3, 4, 6, 0], 10**6], "a positive whole number, or four"),
        (
            "vision_cfg.timm_model_name",
            ["hf-hub:a/b", "local-dir:/tmp", "../x", 3],
            "a model of timm, without a prefix",
        ),
        ("vision_cfg.norm_kwargs", [{"eps": 1}, {"device": "cuda"}, []], "eps, a small positive number"),
        ("text_cfg.act_kwargs", [{"approximate": "sin"}, {"inplace": True}], "approximate, which is none or tanh"),
        ("text_cfg.pool_type", ["none", None, []], "one of 'first', 'last', 'argmax', 'eos'"),
        ("text_cfg.vocab_size", [0, 10**9, None], "a whole number from 1"),
        ("text_cfg.hf_pooler_type", ["_x", 1], "'mean_pooler'"),
        ("init_logit_bias", ["-10", float("nan")], "a number, or null"),
        ("trust_remote_code", [True], "is not known to open_clip"),
        ("text_cfg.hf_model_revision", ["main"], "is not known to open_clip"),
    ],
)
def test_a_value_that_open_clip_would_not_take_is_refused_with_its_key(
    key: str, values: list[Any], wanted: str, tmp_path: Path
) -> None:
    for value in values:
        whole = json.loads(json.dumps(MODEL))
        *places, last = key.split(".")
        inner = whole
        for place in places:
            inner = inner[place]
        inner[last] = value
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": whole}))
        with pytest.raises(ModelError) as caught:
            read_config(tmp_path)
        assert f"open_clip_config.json: model_cfg.{key}" in str(caught.value)
        assert wanted in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"model_cfg": []}', '{"model_cfg": {}, "preprocess_cfg": 3}'])
def test_a_file_that_is_no_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"open_clip_config\.json"):
        read_config(tmp_path)


def test_settings_of_training_decide_no_fingerprint_and_sizes_do() -> None:
    def changed(tower: str, **values: Any) -> dict[str, Any]:
        return facts({**MODEL, tower: {**MODEL[tower], **values}})

    plain = facts(MODEL)
    assert plain == changed("vision_cfg", timm_drop_path=0.1, patch_dropout=0.5, timm_model_pretrained=True)
    assert plain == changed("text_cfg", hf_tokenizer_name="x", tokenizer_kwargs={"clean": "lower"})
    assert plain == facts({**MODEL, "init_logit_scale": 1.0})
    assert (
        len({json.dumps(each) for each in (plain, changed("vision_cfg", layers=11), changed("text_cfg", eos_id=3))})
        == 3
    )
    assert facts({**MODEL, "init_logit_bias": -10}) != plain != facts({**MODEL, "quick_gelu": True})


@pytest.mark.compat("open_clip")
def test_every_config_that_comes_with_the_library_passes() -> None:
    found = find_spec("open_clip")
    assert found is not None
    paths = sorted(Path(str(found.origin)).parent.glob("model_configs/*.json"))
    assert len(paths) > 100
    for path in paths:
        check_model(path.name, json.loads(path.read_text()))
