"""Jobs over a folder of images: the first run, and updates of its dataset after the folder changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, ManifestError, OutputBusy, PipelineError, PlanMismatch, TooManyFailures
from pipeline.dataset import lease
from pipeline.dataset.dataset import open_dataset
from pipeline.job.main import run_job
from pipeline.manifest.build import from_folder
from pipeline.nightly import folder as nightly_folder
from pipeline.nightly.folder import folder_job
from pipeline.report.load import report_of
from pipeline.storage.factory import open_storage
from tests.forks import forks
from tests.jobs import config_for, scene
from tests.nights import differences, from_scratch, healthy, read


class Album:
    """A folder of images and the config of a job over it."""

    def __init__(self, place: Path, count: int = 20) -> None:
        self.folder, self.output, self.scratch = place / "my photos", place / "out" / "album", place / "scratch"
        self.scratch.mkdir(parents=True)
        for number in range(count):
            self.draw(number)

    @property
    def manifest(self) -> Path:
        return self.output.parent / "album.manifest.parquet"

    @property
    def store(self) -> Path:
        return self.output.parent / "album.update"

    def draw(self, number: int, version: int = 0) -> None:
        path = self.folder / f"{number // 10}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene(number + 1000 * version)[0])
        moment = 1_700_000_000 + 100 * number + version
        os.utime(path, (moment, moment))

    def drop(self, number: int) -> None:
        (self.folder / f"{number // 10}" / f"{number:03}.jpg").unlink()

    def config(self, **groups: dict[str, Any]) -> Config:
        manifest = {
            "path": str(self.folder),
            "image": "path",
            "keep": [],
            "shard_rows": 4,
            **groups.pop("manifest", {}),
        }
        return config_for(self.folder, self.output, manifest=manifest, **groups)

    def run(self, **groups: dict[str, Any]) -> Config:
        """Run the command's job; return the config that it ran with."""
        config = folder_job(self.config(**groups), self.scratch, run="")
        run_job(config)
        return config

    def change(self) -> None:
        """Add two images, change one, remove one."""
        self.draw(20)
        self.draw(21)
        self.draw(5, version=1)
        self.drop(9)


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path)


def parts(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in output.glob("part-*")}


def is_like_a_new_one(album: Album, config: Config) -> bool:
    """True if the dataset is what a job over the same manifest makes, is healthy, and has no files of a night."""
    made, scratch = read(album.output), from_scratch(config, album.output.parent / "scratch")
    names = {path.name for path in album.output.iterdir() if not path.name.startswith("part-")}
    assert list(differences(made, scratch)) == []
    assert names <= {"_plan.json", "_commits", "_SUCCESS", "_report.json", "_run.log"}
    assert not album.store.exists()
    return healthy(album.output)


def test_a_folder_of_images_is_a_job_and_its_manifest_lies_beside_the_output(
    album: Album, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (album.folder / "notes.txt").touch()
    config = album.run()
    assert config.manifest.path == str(album.manifest)
    assert read(album.output)["id"].to_pylist() == [f"{n // 10}/{n:03}.jpg" for n in range(20)]
    assert {path.name for path in album.output.parent.iterdir()} == {"album", "album.manifest.parquet"}
    said = capsys.readouterr().err + caplog.text
    assert f"{album.folder}: 20 images, listed in {album.manifest}; left out: files whose" in said
    assert healthy(album.output)


def test_the_same_command_finds_an_unchanged_folder_done(album: Album) -> None:
    album.run()
    before, manifest = parts(album.output), album.manifest.stat()
    album.run()
    assert parts(album.output) == before
    assert album.manifest.stat().st_ino == manifest.st_ino


def test_a_changed_folder_embeds_only_what_is_new_and_says_so(
    album: Album, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    album.run()
    before = parts(album.output)
    album.change()
    config = album.run()
    said = capsys.readouterr().err + caplog.text
    assert f"has changed since {album.output} was made: 2 new, 1 changed, 1 removed" in said
    assert f"{album.output}: updated: 18 carried, 2 new, 1 changed, 1 removed" in said
    assert is_like_a_new_one(album, config)
    assert len({*parts(album.output).values()} & {*before.values()}) >= 1
    report = report_of(open_dataset(str(album.output)).storage)
    assert (report["total_rows"], report["images"]) == (21, 3)
    assert report["counts"] == {"ok": 21}
    assert len(report["history"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        "added",
        "removed",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("changed", "all changed", "added at the front")),
    ],
)
def test_any_change_gives_what_a_new_job_would(album: Album, change: str) -> None:
    album.run()
    if change == "added":
        album.draw(30)
    elif change == "added at the front":
        (album.folder / "0" / "000a.jpg").write_bytes(scene(77)[0])
    elif change == "changed":
        album.draw(0, version=1)
    elif change == "removed":
        album.drop(0)
    else:
        for number in range(20):
            album.draw(number, version=2)
    assert is_like_a_new_one(album, album.run())


def test_updates_follow_one_another(album: Album) -> None:
    album.run()
    album.change()
    album.run()
    album.draw(40)
    album.drop(20)
    album.run()
    album.drop(40)
    assert is_like_a_new_one(album, album.run())


def test_an_image_that_could_not_be_read_is_tried_again_with_the_next_change(album: Album) -> None:
    (album.folder / "gone.jpg").symlink_to(album.folder / "nowhere.jpg")
    album.run()
    assert read(album.output)["status"].to_pylist().count("not_found") == 1
    (album.folder / "nowhere.jpg").write_bytes(scene(3)[0])
    config = album.run()
    assert read(album.output)["status"].to_pylist() == ["ok"] * 22
    assert is_like_a_new_one(album, config)


def test_what_a_user_put_beside_the_parts_stays(album: Album) -> None:
    album.run()
    (album.output / "notes").mkdir()
    (album.output / "notes" / "a.txt").write_text("mine")
    album.change()
    album.run()
    assert (album.output / "notes" / "a.txt").read_text() == "mine"


def test_a_link_to_the_dataset_stays_a_link(album: Album, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    album.output.parent.mkdir()
    album.output.symlink_to(tmp_path / "disk" / "real")
    album.run()
    album.change()
    album.run()
    assert album.output.is_symlink()
    assert len(read(album.output)) == 21
    assert not (tmp_path / "disk" / "real.update" / "replaced").exists()


def test_a_job_that_did_not_end_ends_before_its_update(album: Album) -> None:
    config = album.run()
    (album.output / "_SUCCESS").unlink()
    commit = sorted((album.output / "_commits").iterdir())[-1]
    commit.unlink()
    album.change()
    assert is_like_a_new_one(album, album.run())
    assert config.manifest.path == str(album.manifest)


STEPS = [
    pytest.param(
        step, after, id=f"{'after' if after else 'before'} {step.strip('_')}", marks=[] if fast else pytest.mark.slow
    )
    for step in ("_seed", "publish_manifest", "_make_night", "_swap", "_write_report", "_end")
    for after in (False, True)
    for fast in [(step, after) == ("_write_report", True)]
]


@pytest.mark.parametrize(("step", "after"), STEPS)
def test_an_update_that_was_killed_anywhere_is_continued(
    album: Album, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    album.run()
    (album.output / "mine.txt").write_text("mine")
    album.change()
    work: Callable[..., Any] = getattr(nightly_folder, step)

    def killed(*arguments: Any) -> None:
        if after:
            work(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nightly_folder, step, killed)
        with pytest.raises(KeyboardInterrupt):
            album.run()
    # The folder goes on changing.
    album.draw(50)
    config = album.run()
    assert (album.output / "mine.txt").read_text() == "mine"
    (album.output / "mine.txt").unlink()
    assert is_like_a_new_one(album, config)


def test_a_manifest_is_not_replaced_while_another_run_holds_the_output(album: Album) -> None:
    storage = open_storage(str(album.output))
    with lease.take(storage, seconds=60):
        with pytest.raises(OutputBusy):
            album.run()
        assert not album.manifest.exists()
        # Another part of the same job has listed the same folder.
        from_folder(str(album.folder), str(album.manifest))
        assert folder_job(album.config(), album.scratch, run="").manifest.path == str(album.manifest)


def test_an_update_of_another_job_is_refused_and_changes_nothing(album: Album) -> None:
    album.run()
    before = parts(album.output)
    album.change()
    with pytest.raises(PlanMismatch, match=r"holds a dataset of another job.*another prompts"):
        album.run(prompts={"labels": ["a cat", "a dog"]})
    assert parts(album.output) == before
    assert is_like_a_new_one(album, album.run())


@pytest.mark.slow
def test_an_update_of_another_job_in_which_nothing_is_carried_is_refused_too(album: Album) -> None:
    album.run()
    for number in range(20):
        album.drop(number)
        album.draw(100 + number)
    with pytest.raises(PlanMismatch, match="holds a dataset of another job"):
        album.run(prompts={"labels": ["a cat", "a dog"]})
    assert read(album.output)["id"].to_pylist()[0] == "0/000.jpg"
    assert is_like_a_new_one(album, album.run())


def test_more_failures_than_allowed_end_an_update_as_they_end_a_job(album: Album) -> None:
    album.run(errors={"max_fraction": 0.0})
    (album.folder / "bad.jpg").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(TooManyFailures):
            album.run(errors={"max_fraction": 0.0})
        assert len(read(album.output)) == 21


def test_another_folder_is_refused(album: Album, tmp_path: Path) -> None:
    album.run()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a.jpg").write_bytes(scene(1)[0])
    with pytest.raises(ManifestError, match=r"is of the images in .*my photos.*, not of those in .*others"):
        album.run(manifest={"path": str(tmp_path / "others")})


def test_a_folder_that_was_moved_is_the_same_one(album: Album) -> None:
    album.run()
    before = parts(album.output)
    album.folder = album.folder.rename(album.folder.with_name("moved"))
    assert is_like_a_new_one(album, album.run())
    assert {*parts(album.output).values()} == {*before.values()}


def test_another_folder_is_refused_while_the_first_one_is_not_there(album: Album, tmp_path: Path) -> None:
    album.run()
    album.folder.rename(tmp_path / "away")
    (tmp_path / "others" / "0").mkdir(parents=True)
    (tmp_path / "others" / "0" / "000.jpg").write_bytes(scene(0)[0])
    with pytest.raises(ManifestError, match=r"choose another output\.dir"):
        album.run(manifest={"path": str(tmp_path / "others")})


def test_a_manifest_of_another_command_in_its_place_is_refused(album: Album) -> None:
    album.run()
    table = pq.read_table(album.manifest)
    pq.write_table(table.append_column("label", [["x"] * 20]), album.manifest)
    with pytest.raises(ManifestError, match="is of the images in"):
        album.run()


@pytest.mark.parametrize("inside", ["{folder}/out", "{folder}", "{folder}/0/../out", "{parent}"])
def test_an_output_among_the_images_is_refused(album: Album, inside: str) -> None:
    place = inside.format(folder=album.folder, parent=album.folder.parent)
    with pytest.raises(ManifestError, match="lie in one another"):
        album.run(output={"dir": place})
    assert not list(album.folder.rglob("*.parquet"))


def test_a_root_is_no_setting_of_a_folder(album: Album) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        album.run(manifest={"root": "/photos"})


def test_an_estimate_of_a_folder_writes_nothing(album: Album) -> None:
    config = folder_job(replace(album.config(), run=replace(Config().run, dry=True)), album.scratch, run="")
    assert config.manifest.path == str(album.scratch / "manifest.parquet")
    assert not album.output.parent.exists()


def test_a_folder_in_a_store_is_a_job_and_a_changed_one_names_the_way_out(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for number in range(3):
        fs.pipe_file(f"/shots/{number}.jpg", scene(number)[0])
    config = config_for(
        Path("unused"), tmp_path / "out", manifest={"path": "memory:///shots", "image": "path", "keep": []}
    )
    for place in (str(tmp_path / "out"), "memory:///made"):
        run_job(folder_job(config.changed({"output.dir": place}), tmp_path, run=""))
        assert open_dataset(place).vectors == 3
    fs.pipe_file("/shots/3.jpg", scene(3)[0])
    run_job(folder_job(config, tmp_path, run=""))
    assert open_dataset(str(tmp_path / "out")).vectors == 4
    with pytest.raises(
        ManifestError, match=r"has changed since memory:/+made was made \(1 new\), and a dataset that lies"
    ):
        folder_job(config.changed({"output.dir": "memory:///made"}), tmp_path, run="")
    for name in ("/shots", "/made"):
        fs.rm(name, recursive=True)


def test_parts_of_a_job_do_not_update(album: Album) -> None:
    album.run()
    album.change()
    with pytest.raises(PipelineError, match=r"is made in parts \(cluster.part\)"):
        album.run(cluster={"part": "1/2"})
    shutil.rmtree(album.store, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["storage.staged[_plan.json]", "commit.done", "storage.replaced[_SUCCESS]"])
def test_a_process_that_was_killed_during_an_update_is_continued(album: Album, place: str) -> None:
    command = [
        *(str(album.folder), f"output.dir={album.output}", "backend.device=cpu", "manifest.shard_rows=4"),
        *("report.html=false", "loader.batch_size=8", "report.progress=none", "loader.isolation=none"),
    ]

    def ended(failpoints: str = "") -> int:
        child = forks().start("tests.forks:run_command", *command, failpoints=failpoints)
        code = child.wait()
        assert "Traceback" not in child.said()
        return code

    assert ended() == 0
    album.change()
    assert ended(f"{place}=kill") == -9
    album.draw(50)
    assert ended() == 0
    assert ended() == 0
    assert len(read(album.output)) == 22
    assert healthy(album.output)
    assert not album.store.exists()
