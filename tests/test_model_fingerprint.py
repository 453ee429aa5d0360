"""The fingerprint of a model holds what decides numbers: another release of transformers makes no other model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import CLIPTextConfig, SiglipVisionConfig

from pipeline import relabel, verify
from pipeline.config.schema import Config, ModelConfig
from pipeline.core.errors import ModelError, PlanMismatch
from pipeline.dataset.dataset import open_dataset
from pipeline.engine.query import config_of_dataset, open_model
from pipeline.job.main import run_job
from pipeline.models import fingerprint
from pipeline.models.checkpoint import as_recorded, open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from tests.jobs import config_for, content, scenes_manifest
from tests.nights import Collection, night
from tests.test_checkpoint import small_siglip

LABELS = ["red circle", "blue star", "green cross"]
Release = Callable[[pytest.MonkeyPatch], None]


def earlier(patch: pytest.MonkeyPatch) -> None:
    """As the pipeline wrote digests with a release that did not know ``vision_use_head`` yet."""

    def digests(dump: dict[str, Any], given: dict[str, Any]) -> tuple[str, ...]:
        raw = {key: value for key, value in dump.items() if key not in fingerprint._LEFT_OUT}
        tower = {key: value for key, value in raw["vision_config"].items() if key != "vision_use_head"}
        return (fingerprint.digest({**raw, "vision_config": tower}),)

    patch.setattr("pipeline.models.dual.architecture_digests", digests)


def adds(*classes: Any) -> Release:
    """A release that adds a key to what it writes of a config."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for each in classes:
            write = each.to_dict
            patch.setattr(each, "to_dict", lambda self, write=write: {**write(self), "a_new_key": [1, None]})

    return apply


def drops(patch: pytest.MonkeyPatch) -> None:
    """A release that no longer writes keys that say nothing here."""
    write = SiglipVisionConfig.to_dict
    gone = ("problem_type", "label2id", "vision_use_head")
    patch.setattr(
        SiglipVisionConfig, "to_dict", lambda self: {key: each for key, each in write(self).items() if key not in gone}
    )


RELEASES: dict[str, Release] = {"earlier": earlier, "adds a key": adds(SiglipVisionConfig), "drops keys": drops}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_siglip(tmp_path_factory.mktemp("siglip"))
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"].pop("vision_use_head", None)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("manifest") / "m.parquet", 60)


def job(siglip: Path, manifest: Path, output: Path) -> Config:
    return config_for(manifest, output, model={"name": str(siglip)}, prompts={"labels": LABELS})


@pytest.mark.parametrize("release", RELEASES)
def test_a_dataset_of_another_release_is_resumed_searched_and_relabelled(
    siglip: Path, manifest: Path, tmp_path: Path, release: str
) -> None:
    config = job(siglip, manifest, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        RELEASES[release](patch)
        run_job(config)
    before = content(tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "_commits" / "00001.json").unlink()
    run_job(config)
    assert content(tmp_path / "out") == before, "what is embedded now has the fingerprints of the rest"
    assert verify.main([str(tmp_path / "out")]) == 0
    dataset = open_dataset(str(tmp_path / "out"))
    open_model(dataset, config_of_dataset(dataset).model)
    typed = ["prompts.labels=[a cat,a dog]", "report.progress=none"]
    assert relabel.main([str(tmp_path / "out"), f"output.dir={tmp_path / 'new'}", *typed]) == 0


@pytest.mark.parametrize("release", ["earlier", "adds a key", pytest.param("drops keys", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["snapshot", pytest.param("partition", marks=pytest.mark.slow)])
def test_a_night_after_another_release_carries_the_rows(
    siglip: Path, tmp_path: Path, release: str, layout: str
) -> None:
    photos = Collection(tmp_path / "images")
    photos.folder.mkdir()
    for number in range(12):
        photos.draw(number)
    photos.write()
    config = photos.config(model={"name": str(siglip)}, prompts={"labels": LABELS})
    with pytest.MonkeyPatch.context() as patch:
        RELEASES[release](patch)
        assert night(config, tmp_path / "nights", "2026-11-01", layout=layout).embedded == 12
    photos.draw(12)
    photos.write()
    assert night(config, tmp_path / "nights", "2026-11-02", layout=layout).embedded == 1
    assert night(config, tmp_path / "nights", "2026-11-03", layout=layout).embedded == 0


def test_the_digest_of_today_is_that_of_before(siglip: Path) -> None:
    for name in (str(DEMO_FOLDER), str(siglip)):
        checkpoint = open_checkpoint(ModelConfig(name=name))
        dump = checkpoint.image.model.config.to_dict()
        raw = {key: value for key, value in dump.items() if key not in fingerprint._LEFT_OUT}
        assert checkpoint.fingerprint["architecture"] == fingerprint.digest(raw)


@pytest.mark.parametrize("release", [adds(CLIPTextConfig), adds(CLIPTextConfig, SiglipVisionConfig)])
def test_a_key_that_a_release_adds_is_no_other_model(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_checkpoint(ModelConfig(name=str(DEMO_FOLDER))).fingerprint
    release(monkeypatch)
    assert open_checkpoint(ModelConfig(name=str(DEMO_FOLDER))).fingerprint == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_config.layer_norm_eps", 1e-6), ("vision_config.hidden_act", "gelu"), ("vision_config.a_new_key", True)],
)
def test_a_fact_of_the_checkpoint_s_own_config_is_another_model(tmp_path: Path, key: str, value: Any) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))
    before = open_checkpoint(ModelConfig(name=str(folder)))
    tower, name = key.split(".")
    values = json.loads((folder / "config.json").read_text())
    values[tower][name] = value
    (folder / "config.json").write_text(json.dumps(values))
    after = open_checkpoint(ModelConfig(name=str(folder)))
    assert after.fingerprint != before.fingerprint
    assert as_recorded(after, before.fingerprint).fingerprint == after.fingerprint


def test_another_architecture_is_refused_as_before(siglip: Path, manifest: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(siglip, tmp_path / "other"))
    values = json.loads((other / "config.json").read_text())
    values["vision_config"]["layer_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(values))
    run_job(job(siglip, manifest, tmp_path / "out"))
    with pytest.raises(PlanMismatch, match="the model's config"):
        run_job(job(other, manifest, tmp_path / "out"))
    with pytest.raises(ModelError, match="what differs: architecture"):
        open_model(open_dataset(str(tmp_path / "out")), ModelConfig(name=str(other)))


def test_weights_that_are_not_loaded_are_no_part_of_the_model(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))
    alone = open_checkpoint(ModelConfig(name=str(folder)))
    for name in ("model.fp16.safetensors", "open_clip_model.safetensors", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"never read")
    both = open_checkpoint(ModelConfig(name=str(folder)))
    assert both.fingerprint == alone.fingerprint
    # Datasets of before name all files.
    recorded = json.loads(json.dumps(alone.fingerprint))
    recorded["weights"]["model.fp16.safetensors"] = "0" * 64
    assert json.loads(json.dumps(as_recorded(both, recorded).fingerprint)) == recorded
    for wrong in ({"model.safetensors": "0" * 64}, {"other.safetensors": "0" * 64}, None):
        assert as_recorded(both, {**recorded, "weights": wrong}).fingerprint == both.fingerprint
    assert as_recorded(both, {**recorded, "tokenizer": "0" * 64}).fingerprint == both.fingerprint
    assert as_recorded(both, None) is both


def test_a_dataset_that_names_weights_that_were_not_loaded_is_resumed(manifest: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))
    extra = folder / "model.fp16.safetensors"
    shutil.copyfile(folder / "model.safetensors", extra)
    config = config_for(manifest, tmp_path / "out", model={"name": str(folder)}, prompts={"labels": LABELS})
    with pytest.MonkeyPatch.context() as patch:
        every = [folder / "model.safetensors", extra]
        patch.setattr("pipeline.models.transformers_form.loaded_weights", lambda place: every)
        run_job(config)
    before = content(tmp_path / "out")
    extra.unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "_commits" / "00000.json").unlink()
    run_job(config)
    assert content(tmp_path / "out") == before
    assert pq.read_table(tmp_path / "out").num_rows == 60
