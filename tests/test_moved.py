"""A project folder that was renamed, copied, linked to or mounted elsewhere: every command goes on in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import relabel, search, verify
from pipeline.api.embed import open_dataset
from pipeline.config.schema import Config
from pipeline.core.errors import ManifestError, PlanMismatch
from pipeline.dataset.places import moved_root
from pipeline.dataset.saved_config import config_of, recipe_of
from pipeline.job.main import run_job
from pipeline.manifest.build import from_folder
from pipeline.models.hub import DEMO_FOLDER
from pipeline.report.render import redraw
from pipeline.storage.moved import find_again, moved_with
from tests.damage import commit_of, flip, part_of
from tests.jobs import config_for, content, scene
from tests.nights import differences, from_scratch, healthy, night, read

ROWS, SHARD_ROWS = 24, 4
# Where the root of the relative paths comes from: the manifest's metadata, the config, or the manifest's folder.
RECORDED, GIVEN, NEITHER = "recorded in the manifest", "given", "the manifest's folder"


def rename(old: Path, new: Path) -> Path:
    new.parent.mkdir(parents=True, exist_ok=True)
    return old.rename(new)


def link(old: Path, new: Path) -> Path:
    """Move the folder away, and reach it through a link."""
    new.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(old.rename(old.with_name("real place")), target_is_directory=True)
    return new


def link_beside(old: Path, new: Path) -> Path:
    """Leave the folder where it is, and reach it through a link."""
    new.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(old, target_is_directory=True)
    return new


def copy(old: Path, new: Path) -> Path:
    """The same files at two places, as with a bind mount."""
    return Path(shutil.copytree(old, new))


MOVES: list[tuple[str, Callable[[Path, Path], Path]]] = [
    ("renamed", rename),
    ("mounted/else/where", rename),
    ("with a space", rename),
    ("linked", link),
    ("another way", link_beside),
    ("copied", copy),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a model and labels, from which each test makes its own project."""
    folder = tmp_path_factory.mktemp("moved") / "made"
    photos = folder / "data" / "photos"
    photos.mkdir(parents=True)
    for number in range(ROWS):
        (photos / f"{number:04d}.jpg").write_bytes(scene(number)[0])
    shutil.copytree(DEMO_FOLDER, folder / "model")
    (folder / "labels.yaml").write_text("[red circle, blue square, green star]\n")
    return folder


def begin(made: Path, tmp_path: Path, root: str = RECORDED) -> Path:
    """A project in a folder of its own; without a recorded root the manifest lies beside the photos."""
    project = Path(shutil.copytree(made, tmp_path / "project"))
    from_folder(str(project / "data" / "photos"), str(project / "data" / "manifest.parquet"))
    if root != RECORDED:
        table = pq.read_table(project / "data" / "manifest.parquet").replace_schema_metadata(None)
        place = project / "data" / ("manifest.parquet" if root == GIVEN else "photos/manifest.parquet")
        pq.write_table(table, place)
    return project


def config_in(project: Path, root: str = RECORDED, output: str = "outputs/run") -> Config:
    manifest = project / "data" / ("photos/manifest.parquet" if root == NEITHER else "manifest.parquet")
    given = str(project / "data" / "photos") if root == GIVEN else None
    settings = {"image": "path", "keep": ["size"], "shard_rows": SHARD_ROWS, "root": given}
    return config_for(
        manifest,
        project / output,
        manifest=settings,
        loader={"batch_size": 4},
        model={"name": str(project / "model")},
        prompts={"path": str(project / "labels.yaml")},
    )


def lose_half(output: Path) -> None:
    """Leave what a run that was killed in its middle leaves."""
    (output / "_SUCCESS").unlink()
    for shard in range(ROWS // SHARD_ROWS // 2, ROWS // SHARD_ROWS):
        part_of(output, shard).unlink()
        commit_of(output, shard).unlink()


def _variants() -> list[Any]:
    """Every move with every kind of root; a rename, a link and a copy with one kind each are fast."""
    fast = [("renamed", RECORDED), ("linked", GIVEN), ("copied", NEITHER)]
    return [
        pytest.param(place, move, root, id=f"{place}-{root}", marks=() if (place, root) in fast else pytest.mark.slow)
        for place, move in MOVES
        for root in (RECORDED, GIVEN, NEITHER)
    ]


VARIANTS = _variants()


@pytest.mark.parametrize(("place", "move", "root"), VARIANTS)
def test_a_half_done_job_goes_on_in_a_folder_that_moved_and_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, place: str, move: Callable[[Path, Path], Path], root: str
) -> None:
    project = begin(made, tmp_path, root)
    output = project / "outputs" / "run"
    run_job(config_in(project, root))
    whole = content(output)
    lose_half(output)
    new = move(project, tmp_path / place)
    report = run_job(config_in(new, root))
    assert (report.rows, report.resumed_rows, report.counts) == (ROWS // 2, ROWS // 2, {"ok": ROWS})
    assert content(new / "outputs" / "run") == whole
    assert verify.main([str(new / "outputs" / "run")]) == 0


@pytest.mark.parametrize(("place", "move", "root"), VARIANTS)
def test_a_repair_finds_what_it_needs_beside_the_dataset(
    made: Path, tmp_path: Path, place: str, move: Callable[[Path, Path], Path], root: str
) -> None:
    project = begin(made, tmp_path, root)
    run_job(config_in(project, root))
    whole = content(project / "outputs" / "run")
    flip(part_of(project / "outputs" / "run", 2))
    output = move(project, tmp_path / place) / "outputs" / "run"
    assert verify.main([str(output)]) == 1
    assert verify.main([str(output), "--repair"]) == 0
    assert content(output) == whole


@pytest.mark.slow
def test_in_the_new_folder_labels_search_and_report_work_as_in_the_old_one(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = begin(made, tmp_path)
    run_job(config_in(project))
    monkeypatch.chdir(project)
    assert relabel.main(["outputs/run", "output.dir=outputs/other", "prompts.labels=[a ring,a heart]"]) == 0
    others = content(project / "outputs" / "other")
    monkeypatch.chdir(tmp_path)
    new = rename(project, tmp_path / "elsewhere")
    monkeypatch.chdir(new)

    # The labels of the source are in a file that moved too.
    assert relabel.main(["outputs/run", "output.dir=outputs/sure", "labels.threshold=0.5"]) == 0
    assert relabel.main(["outputs/run", "output.dir=outputs/other", "prompts.labels=[a ring,a heart]"]) == 0
    assert content(new / "outputs" / "other") == others
    flip(part_of(new / "outputs" / "other", 1))
    assert verify.main(["outputs/other", "--repair"]) == 0
    assert content(new / "outputs" / "other") == others
    capsys.readouterr()
    assert search.main(["outputs/run", "a red circle", "--top", "3"]) == 0
    assert search.main(["outputs/run", "--image", "data/photos/0003.jpg", "--top", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    with open_dataset("outputs/run") as dataset:
        assert len(dataset.search("a red circle", top=2)) == 2
    assert b"data:image/jpeg" in redraw("outputs/run", examples=4)


def test_nights_go_on_in_a_store_that_moved_and_carry_every_row(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = begin(made, tmp_path)
    first = night(config_in(project), project / "nights", "2026-11-01")
    assert first.kinds["new"] == ROWS
    new = rename(project, tmp_path / "elsewhere")
    store = new / "nights"
    embedded: list[str] = []
    job = run_job
    monkeypatch.setattr("pipeline.job.main.run_job", lambda *given: embedded.append("job") or job(*given))
    second = night(config_in(new), store, "2026-11-02")
    # No image is embedded to see that model and labels are the same ones.
    assert (second.kinds["carried"], second.embedded, second.shared, embedded) == (ROWS, 0, ROWS // SHARD_ROWS, [])
    (new / "data" / "photos" / "0099.jpg").write_bytes(scene(99)[0])
    from_folder(str(new / "data" / "photos"), str(new / "data" / "manifest.parquet"))
    third = night(config_in(new), store, "2026-11-03")
    assert (third.kinds["carried"], third.kinds["new"], third.anew) == (ROWS, 1, "")
    assert list(differences(read(store / "date=2026-11-03"), from_scratch(config_in(new), new / "scratch"))) == []
    assert all(healthy(store / f"date=2026-11-0{day}") for day in (1, 2, 3))
    capfd.readouterr()
    night(config_in(new), store, "2026-11-01")
    said = capfd.readouterr().err
    assert f"published already, in {store}/date=2026-11-01" in said
    assert f"{project}/" not in said


def test_a_night_that_was_begun_goes_on_after_the_move(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = begin(made, tmp_path)

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.nightly.run.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            night(config_in(project), project / "nights", "2026-11-01")
    new = rename(project, tmp_path / "elsewhere")
    night(config_in(new), new / "nights", "2026-11-01")
    said = capfd.readouterr().err
    assert "begins again" not in said
    assert "6 of 6 shards (24 rows) are done already" in said
    assert healthy(new / "nights" / "date=2026-11-01")


@pytest.mark.slow
def test_photos_alone_that_moved_are_named_in_the_next_run_or_the_repair(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = begin(made, tmp_path, GIVEN)
    output = project / "outputs" / "run"
    run_job(config_in(project, GIVEN))
    whole = content(output)
    photos = rename(project / "data" / "photos", tmp_path / "disk" / "pictures")
    flip(part_of(output, 0))
    assert verify.main([str(output), "--repair"]) == 2
    said = capfd.readouterr().err
    assert f"manifest.root={project}/data/photos: no such folder" in said
    assert f"python -m pipeline.verify {output} --repair manifest.root=NEW" in said
    assert "Traceback" not in said
    assert verify.main([str(output), "--repair", f"manifest.root={photos}"]) == 0
    assert content(output) == whole
    flip(part_of(output, 1))
    config = config_in(project, GIVEN).changed({"manifest.root": str(photos)})
    assert run_job(config).rows == SHARD_ROWS
    assert content(output) == whole
    assert (
        f"its images were in {project}/data/photos when it was begun, and are in {photos} now" in capfd.readouterr().err
    )


@pytest.mark.parametrize("given", ["output.dir=x", "loader.batch_size=3", "manifest.root"])
def test_a_repair_takes_places_and_no_other_settings(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(tmp_path), "--repair", given]) == 2
    assert given.partition("=")[0] in capsys.readouterr().err


def test_places_without_a_repair_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path), "manifest.root=x"]) == 2
    assert "manifest.root" in capsys.readouterr().err


def test_other_images_under_a_folder_that_is_still_there_are_another_job(made: Path, tmp_path: Path) -> None:
    project = begin(made, tmp_path, GIVEN)
    run_job(config_in(project, GIVEN))
    others = copy(project / "data" / "photos", tmp_path / "other photos")
    with pytest.raises(PlanMismatch, match=r"manifest\.root: there"):
        run_job(config_in(project, GIVEN).changed({"manifest.root": str(others)}))


def test_what_is_found_beside_a_dataset_is_still_compared_with_its_plan(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = begin(made, tmp_path)
    run_job(config_in(project))
    flip(part_of(project / "outputs" / "run", 0))
    new = rename(project, tmp_path / "elsewhere")
    (new / "data" / "photos" / "0000.jpg").unlink()
    from_folder(str(new / "data" / "photos"), str(new / "data" / "manifest.parquet"))
    assert verify.main([str(new / "outputs" / "run"), "--repair"]) == 2
    assert "manifest.digest" in capsys.readouterr().err


def test_a_recorded_root_is_not_replaced_by_a_folder_of_its_name_without_the_images(made: Path, tmp_path: Path) -> None:
    project = begin(made, tmp_path)
    new = rename(project, tmp_path / "elsewhere")
    for path in (new / "data" / "photos").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(ManifestError, match=f"manifest.root={project}/data/photos: no such folder"):
        run_job(config_in(new))


@pytest.mark.slow
def test_a_model_that_is_gone_is_named_with_the_way_to_give_its_new_place(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = begin(made, tmp_path)
    run_job(config_in(project))
    model = rename(project / "model", tmp_path / "models" / "clip")
    output = str(project / "outputs" / "run")
    assert search.main([output, "a red circle"]) == 2
    said = capsys.readouterr().err
    assert f"model.name={project}/model: no such folder" in said
    assert "--model FOLDER" in said
    assert search.main([output, "a red circle", "--model", str(model)]) == 0
    flip(part_of(Path(output), 0))
    assert verify.main([output, "--repair"]) == 2
    assert "--repair model.name=NEW" in capsys.readouterr().err
    assert verify.main([output, "--repair", f"model.name={model}"]) == 0


@pytest.mark.slow
def test_a_relabelled_dataset_whose_source_is_gone_says_how_it_is_repaired(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = begin(made, tmp_path)
    run_job(config_in(project))
    monkeypatch.chdir(project)
    assert relabel.main(["outputs/run", "output.dir=outputs/other", "prompts.labels=[a ring]"]) == 0
    rename(project / "outputs" / "run", tmp_path / "archive" / "old run")
    flip(part_of(project / "outputs" / "other", 1))
    assert verify.main(["outputs/other", "--repair"]) == 2
    said = capsys.readouterr().err
    assert f"come from {project}/outputs/run, which is gone" in said
    assert "python -m pipeline.relabel SOURCE" in said
    again = [str(tmp_path / "archive" / "old run"), "output.dir=outputs/other", "prompts.labels=[a ring]"]
    assert relabel.main(again) == 0
    assert verify.main(["outputs/other"]) == 0


def test_a_plan_keeps_its_places_where_they_still_are(made: Path, tmp_path: Path) -> None:
    project = begin(made, tmp_path, GIVEN)
    run_job(config_in(project, GIVEN))
    output = project / "outputs" / "run"
    kept = json.loads((output / "_plan.json").read_text())["config"]
    config = config_of(kept, str(output))
    assert config.manifest.path == str(project / "data" / "manifest.parquet")
    assert config.manifest.root == str(project / "data" / "photos")
    new = rename(project, tmp_path / "elsewhere")
    config = config_of(kept, str(new / "outputs" / "run"))
    assert config.manifest.path == str(new / "data" / "manifest.parquet")
    assert config.manifest.root == str(new / "data" / "photos")
    assert (config.model.name, config.prompts.path) == (str(new / "model"), str(new / "labels.yaml"))


def test_the_longest_common_ending_is_found_first(tmp_path: Path) -> None:
    for place in ("project/data/m.parquet", "project/outputs/m.parquet", "m.parquet"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    near = str(tmp_path / "project" / "outputs" / "run")
    wanted = [str(tmp_path / place) for place in ("project/data/m.parquet", "project/outputs/m.parquet", "m.parquet")]
    assert list(find_again("/gone/old/data/m.parquet", near)) == wanted
    assert next(find_again("/gone/old/data/*.parquet", near)) == str(tmp_path / "project/data/*.parquet")
    assert list(find_again("/gone/nothing.parquet", near)) == []
    assert list(find_again("s3://bucket/m.parquet", near)) == list(find_again("/m.parquet", "s3://bucket/run")) == []


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("/old/project/photos", "/new/place/photos"),
        ("/old/project", "/new/place"),
        ("/old/other", None),
        ("/mnt/photos", None),
    ],
)
def test_what_moved_with_a_file_is_where_that_move_brought_it(address: str, wanted: str | None) -> None:
    assert moved_with(address, "/old/project/data/m.parquet", "/new/place/data/m.parquet") == wanted


@pytest.mark.parametrize(
    ("content", "wanted"),
    [({}, None), ({"fingerprints": 3}, None), ({"fingerprints": {"manifest": {"root": None}}}, None)],
)
def test_a_plan_without_a_root_has_none_that_moved(content: dict[str, object], wanted: str | None) -> None:
    now = {"fingerprints": {"manifest": {"root": "/photos"}}, "config": {"manifest": {"path": "/m.parquet"}}}
    assert moved_root(content, now) == moved_root(now, content) == wanted


@pytest.mark.parametrize("file", ["config.json", "open_clip_config.json", "modules.json"])
def test_a_model_of_any_form_is_found_from_another_folder_and_where_its_project_moved(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / file).write_text("{}")
    monkeypatch.chdir(tmp_path / "project")
    recipe = recipe_of(Config().changed({"model.name": "model"}))
    monkeypatch.chdir(tmp_path)
    for place in ("project", "moved"):
        if place == "moved":
            (tmp_path / "project").rename(tmp_path / "moved")
        found = config_of(recipe, str(tmp_path / place / "outputs" / "run"))
        assert found.model.name == str(tmp_path / place / "model")
