"""The demo model on images or labels of others: every command says that it knows rendered shapes only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import embed
from pipeline.config.schema import Config, ManifestConfig, ModelConfig, PromptsConfig
from pipeline.dataset.dataset import open_dataset
from pipeline.doctor import hub
from pipeline.doctor.check import Status, Subject
from pipeline.engine.demo.folder import label_names, manifest_in
from pipeline.engine.demo.notes import NOTICE, notes_of
from pipeline.engine.query import derive
from pipeline.job.estimate.estimate import estimate_job
from pipeline.job.main import run_job
from pipeline.job.relabel import relabel
from pipeline.nightly import cli
from tests.jobs import config_for, overrides_of, scene, scenes_manifest

CLOTHES = ["a dress", "a shirt"]


@pytest.mark.parametrize(
    ("path", "prompts"),
    [
        (None, {}),
        (None, {"labels": ["red circle", "blue star"]}),
        (str(manifest_in(Path("/somewhere"), 1000)), {}),
        (str(manifest_in(Path("/somewhere"), 20, width=64, height=64)), {"labels": label_names()}),
    ],
)
def test_the_demo_itself_has_no_notice(path: str | None, prompts: dict[str, Any]) -> None:
    assert notes_of(Config(manifest=ManifestConfig(path=path), prompts=PromptsConfig(**prompts))) == ()


@pytest.mark.parametrize(
    ("path", "prompts"),
    [
        ("photos.parquet", {}),
        ("s3://bucket/photos", {}),
        ("scenes", {}),
        ("photos/scenes.parquet", {"labels": ["red circle"]}),
        (None, {"labels": CLOTHES}),
        (None, {"labels": ["red circle", "a dress"]}),
        (None, {"path": "labels.csv"}),
    ],
)
def test_other_images_or_labels_have_one(path: str | None, prompts: dict[str, Any]) -> None:
    config = Config(manifest=ManifestConfig(path=path), prompts=PromptsConfig(**prompts))
    assert notes_of(config) == (NOTICE,)
    assert notes_of(config.changed({"model": ModelConfig(name="openai/clip-vit-base-patch32")})) == ()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished job of the demo model on a manifest of someone."""
    folder = tmp_path_factory.mktemp("notes")
    manifest = scenes_manifest(folder / "photos.parquet", 12, damaged={})
    config = config_for(manifest, folder / "out", prompts={"labels": CLOTHES}, report={"html": True})
    run_job(config)
    return config


def warned(said: str) -> int:
    return said.count("model=demo, the default, knows rendered shapes only")


def test_a_job_says_so_first_and_in_its_report_and_on_its_page(job: Config) -> None:
    output = Path(job.output.dir)
    first = (output / "_run.log").read_text().splitlines()[1]
    assert warned(first) == 1
    assert "warning" in first.lower()
    assert json.loads((output / "_report.json").read_text())["notes"] == [NOTICE]
    page = (output / "_report.html").read_text()
    assert warned(page) == 1
    assert "model=clip_vit_b32" in page


def test_an_estimate_says_so_first(job: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    estimate = estimate_job(job.changed({"output.dir": str(tmp_path / "dry"), "run.json": True}))
    assert estimate.notes == (NOTICE,)
    said = capfd.readouterr()
    assert warned(said.err.splitlines()[0]) == warned(said.err) == 1
    assert json.loads(said.out)["notes"] == [NOTICE]


def test_a_relabelling_says_so(job: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_dataset(job.output.dir)
    given = Config().changed({"prompts.labels": ["a hat"], "output.dir": str(tmp_path / "hats")})
    report = relabel(source, derive(source, given, ["prompts.labels", "output.dir"]))
    assert report.notes == (NOTICE,)
    assert warned(capfd.readouterr().err) == 1


def test_a_night_says_so_once(job: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    taken = [text for text in overrides_of(job) if not text.startswith("output.dir")]
    store = tmp_path / "nights"
    arguments = ["--store", str(store), *taken, "prompts.labels=[a dress]", "report.html=false", "report.progress=none"]
    for day, embedded in (("2026-11-01", 12), ("2026-11-02", 0)):
        assert cli.main(["--date", day, *arguments]) == 0
        assert warned(capfd.readouterr().err) == 1
        night = json.loads((store / f"date={day}" / "_night.json").read_text())
        assert (night["embedded"], night["report"]["notes"]) == (embedded, [NOTICE])


def test_the_python_api_warns_the_caller(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(scene(1)[0])
    settings = {"loader.isolation": "none", "backend.device": "cpu"}
    with pytest.warns(UserWarning, match="rendered shapes only.*model=clip_vit_b32") as found:
        dataset = embed([tmp_path / "a.jpg"], labels=CLOTHES, settings=settings, progress=False)
    with dataset:
        assert dataset.report["notes"] == [NOTICE]
    assert [each.filename for each in found] == [__file__]
    assert capfd.readouterr().err == ""


def test_the_doctor_warns_of_it(job: Config, tmp_path: Path) -> None:
    def checks(config: Config) -> dict[str, Any]:
        return {each.name: each for each in hub.look(Subject(config, True, str(tmp_path), None))}

    found = checks(job)["demo model"]
    assert (found.status, "rendered shapes only" in found.fact) == (Status.WARN, True)
    assert "model=clip_vit_b32" in found.way_out
    assert "demo model" not in checks(Config())
