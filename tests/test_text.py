from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.schema import LabelsConfig, ModelConfig, PromptsConfig
from pipeline.core.errors import PromptsError
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from pipeline.models.label_files import LabelSet, read_labels
from pipeline.models.text import bank_fingerprint, build_bank, embed_prompts
from tests.conftest import data_folder

TEMPLATES = ["a photo of a {}", "a {}"]


def in_file(path: Path, content: str) -> PromptsConfig:
    path.write_text(content, encoding="utf-8")
    return PromptsConfig(path=str(path), templates=TEMPLATES)


def parquet(path: Path, columns: dict[str, list[str | None]]) -> PromptsConfig:
    pq.write_table(pa.table(columns), path)
    return PromptsConfig(path=str(path), templates=TEMPLATES)


OWN = LabelSet(("Katze", "犬"), (("a photo of a cat", "a kitten"), ("a photo of a 犬", "a 犬")))


@pytest.mark.parametrize(
    "config",
    [
        lambda p: in_file(p / "l.yaml", "Katze: [a photo of a cat, a kitten]\n犬:\n"),
        lambda p: in_file(p / "l.csv", "label,prompt\nKatze,a photo of a cat\nKatze,a kitten\n犬,\n"),
        lambda p: parquet(
            p / "l.parquet", {"label": ["Katze", "Katze", "犬"], "prompt": ["a photo of a cat", "a kitten", None]}
        ),
    ],
    ids=["yaml", "csv", "parquet"],
)
def test_every_file_format_gives_the_same_label_set(config: Callable[[Path], PromptsConfig], tmp_path: Path) -> None:
    assert read_labels(config(tmp_path)) == OWN


@pytest.mark.parametrize(
    "config",
    [
        lambda p: PromptsConfig(labels=["cat", "dog"], templates=TEMPLATES),
        lambda p: in_file(p / "l.yml", "- cat\n- dog\n"),
        lambda p: in_file(p / "l.csv", "\ufefflabel\ncat\ndog\n"),
        lambda p: parquet(p / "l.pq", {"label": ["cat", "dog"]}),
    ],
    ids=["config", "yaml", "csv with a byte order mark", "parquet"],
)
def test_labels_without_prompts_take_every_template(config: Callable[[Path], PromptsConfig], tmp_path: Path) -> None:
    labels = read_labels(config(tmp_path))
    assert labels == LabelSet(("cat", "dog"), (("a photo of a cat", "a cat"), ("a photo of a dog", "a dog")))


def test_braces_in_templates_and_labels_are_text() -> None:
    labels = read_labels(PromptsConfig(labels=["{x}"], templates=["a {} {", "{{}}"]))
    assert labels.prompts == (("a {x} {", "{{x}}"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.yaml", "- yes\n", "label 1 is True"),
        ("l.yaml", "cat: 3\n", "the prompt of 'cat' is 3"),
        ("l.yaml", "just text\n", "wanted a list"),
        ("l.yaml", "a: [", "not YAML"),
        ("l.yaml", "!!python/object/apply:os.system [echo]\n", "not YAML"),
        ("l.yaml", "[]\n", "no labels"),
        ("l.csv", "name\ncat\n", "no column 'label'; its columns are name"),
        ("l.csv", "label\ncat\ncat\n", "twice"),
        ("l.csv", "label\n", "no labels"),
        ("l.parquet", "not parquet", "prompts.path"),
        ("l.txt", "cat\n", "ends in .yaml"),
    ],
)
def test_a_bad_label_file_is_explained(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=message):
        read_labels(in_file(tmp_path / name, content))


def test_a_missing_label_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="no such file"):
        read_labels(PromptsConfig(path=str(tmp_path / "none.csv")))


def test_features_are_normalised_averaged_and_normalised_again(demo: Checkpoint) -> None:
    prompts = [("a red circle", "a photo of a red circle"), ("a blue star",)]
    every = [demo.text_features(demo.tokenize([t]))[0] for group in prompts for t in group]
    units = [torch.nn.functional.normalize(v, dim=0) for v in every]
    expected = [torch.nn.functional.normalize(units[0] + units[1], dim=0), units[2]]
    np.testing.assert_allclose(embed_prompts(demo, prompts), torch.stack(expected).numpy(), atol=2e-6)


def test_the_second_bank_comes_from_the_cache_and_is_the_same(demo: Checkpoint, tmp_path: Path) -> None:
    config = PromptsConfig(labels=["red circle", "blue star"], cache=str(tmp_path))
    labels = read_labels(config)
    first, second = (build_bank(demo, labels, config, LabelsConfig()) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    np.testing.assert_array_equal(first.features, second.features)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_cache_is_embedded_again(demo: Checkpoint, tmp_path: Path, damage: bytes | None) -> None:
    config = PromptsConfig(labels=["red circle"], cache=str(tmp_path))
    labels = read_labels(config)
    first = build_bank(demo, labels, config, LabelsConfig())
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    again = build_bank(demo, labels, config, LabelsConfig())
    assert not again.cached
    np.testing.assert_array_equal(first.features, again.features)


def test_the_cache_key_follows_labels_templates_and_model(demo: Checkpoint) -> None:
    other = open_checkpoint(ModelConfig(weights="random", name=str(DEMO_FOLDER)))
    sets = [
        LabelSet(("a",), (("x",),)),
        LabelSet(("b",), (("x",),)),
        LabelSet(("a",), (("y",),)),
        LabelSet(("a",), (("x", "x"),)),
    ]
    keys = {bank_fingerprint(checkpoint, labels) for checkpoint in (demo, other) for labels in sets}
    assert len(keys) == 8


def test_an_unwritable_cache_is_a_warning_not_an_end(
    demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = PromptsConfig(labels=["red circle"], cache=str(tmp_path / "file" / "cache"))
    assert build_bank(demo, read_labels(config), config, LabelsConfig()).names == ("red circle",)
    assert "not cached" in caplog.text


def test_prompts_that_are_too_long_are_said(demo: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        embed_prompts(demo, [["a red circle"], ["word " * 100]])
    assert "1 prompts are longer than 32 tokens" in caplog.text


def test_names_of_imagenet_in_eighty_templates(demo: Checkpoint) -> None:
    folder = data_folder("imagenet_meta")
    names = json.loads((folder / "clip_imagenet_classnames.json").read_text())
    templates = json.loads((folder / "clip_imagenet_templates80.json").read_text())
    assert (len(names), len(templates)) == (1000, 80)
    names = [f"{name} ({i})" for i, name in enumerate(names[:10])]
    labels = read_labels(PromptsConfig(labels=names, templates=templates))
    features = embed_prompts(demo, labels.prompts)
    assert features.shape == (10, 128)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("asked", "given"), [("auto", "softmax"), ("sigmoid", "sigmoid"), ("softmax", "softmax")])
def test_scoring_is_the_model_s_unless_asked_otherwise(
    demo: Checkpoint, tmp_path: Path, asked: str, given: str
) -> None:
    config = PromptsConfig(labels=["a"], cache=str(tmp_path))
    assert build_bank(demo, read_labels(config), config, LabelsConfig(scoring=asked)).scoring == given
