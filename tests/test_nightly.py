"""Nights: only what is new or changed is embedded, and each night equals a from-scratch run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import verify as verify_command
from pipeline.config.schema import Config
from pipeline.core.errors import OutputBusy, ShardsGivenUp, StorageError
from pipeline.dataset import lease
from pipeline.dataset.verify import verify
from pipeline.images.sources.source import Source
from pipeline.manifest.manifest import open_manifest
from pipeline.nightly import cli
from pipeline.nightly.content_keys import find_content
from pipeline.nightly.notify import Outcome, ping, write_textfile
from pipeline.nightly.records import PARTITION, NightError
from pipeline.nightly.rows import copy_rows, rechunk
from pipeline.storage.factory import open_storage
from tests.forks import forks
from tests.jobs import overrides_of, scenes_manifest
from tests.nights import Collection, differences, from_scratch, healthy, night, read
from tests.s3 import BUCKET, moto_server, pointed_at
from tests.servers import Server, answer, serve

FIRST, SECOND, THIRD = "2026-11-01", "2026-11-02", "2026-11-03"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all tests, one after another: what was made once is copied, and lies at the same place."""
    return tmp_path_factory.mktemp("nightly")


@pytest.fixture
def store(home: Path) -> Path:
    shutil.rmtree(home / "now", ignore_errors=True)
    return home / "now" / "nights"


@pytest.fixture
def photos(home: Path, store: Path) -> Collection:
    """Twenty images, of which number 3 is damaged and number 5 missing."""
    collection = Collection(store.parent / "images")
    collection.folder.mkdir(parents=True)
    for number in range(20):
        collection.draw(number, damaged=number == 3, missing=number == 5)
    collection.write()
    return collection


def publish_first(saved: Path, photos: Collection, store: Path) -> None:
    if saved.exists():
        shutil.copytree(saved, store)
    else:
        night(photos.config(), store, FIRST)
        shutil.copytree(store, saved)


@pytest.fixture
def _first_night(home: Path, photos: Collection, store: Path) -> None:
    """The first night is published."""
    publish_first(home / "first", photos, store)


@pytest.fixture
def _complete_first_night(home: Path, photos: Collection, store: Path) -> None:
    """The first night is published, and no image was missing."""
    photos.restore(5)
    publish_first(home / "complete", photos, store)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the images that were read, unordered."""
    ids: list[str] = []
    before = Source.read

    def noted(self: Source, ref: Any) -> Any:
        ids.append(ref.id)
        return before(self, ref)

    monkeypatch.setattr(Source, "read", noted)
    return ids


def same_as_from_scratch(config: Config, store: Path, day: str) -> None:
    output = store / f"date={day}"
    assert list(differences(read(output), from_scratch(config, store.parent / "scratch"))) == []
    assert healthy(output)


def test_a_night_embeds_what_is_new_changed_or_was_missing_and_carries_the_rest(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    config = photos.config()
    first = night(config, store, FIRST)
    assert first.kinds["new"] == first.embedded == 20
    assert first.counts == {"ok": 18, "not_an_image": 1, "not_found": 1}

    photos.draw(1, version=1)
    photos.restore(5)
    photos.drop(0)
    for number in (20, 21, 22):
        photos.draw(number)
    photos.write()
    seen.clear()
    second = night(config, store, SECOND)
    # The damaged image has not changed, and is not looked at again.
    assert sorted(set(seen)) == ["0001", "0005", "0020", "0021", "0022"]
    assert second.embedded == second.images == 5
    expected = {"new": 3, "changed": 1, "retried": 1, "carried": 17, "dropped": 1, "duplicate": 0, "anew": 0}
    assert second.kinds == expected
    assert second.counts == {"ok": 21, "not_an_image": 1}
    assert second.previous == FIRST
    dropped = pq.ParquetFile(store / f"date={SECOND}" / "_dropped.night").read()
    assert dropped["id"].to_pylist() == ["0000"]
    same_as_from_scratch(config, store, SECOND)
    assert not (store / "_work" / f"date={SECOND}").exists()


@pytest.mark.usefixtures("_complete_first_night")
def test_a_night_without_changes_reads_no_image_and_shares_every_part(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    config = photos.config()
    seen.clear()
    second = night(config, store, SECOND)
    assert not seen
    assert (second.embedded, second.shared, second.written) == (0, 3, 0)
    for part in (store / f"date={FIRST}").glob("part-*"):
        assert part.samefile(store / f"date={SECOND}" / part.name)
    same_as_from_scratch(config, store, SECOND)
    # A shared part keeps the manifest it was written for: the third night shares one of the first.
    photos.draw(20)
    photos.write()
    third = night(config, store, THIRD, keep=1)
    assert (third.shared, third.written) == (2, 1)
    assert not (store / f"date={FIRST}").exists()
    same_as_from_scratch(config, store, THIRD)


@pytest.mark.usefixtures("_complete_first_night")
def test_a_part_whose_kept_columns_changed_is_written_anew_without_reading_its_images(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    config = photos.config()
    photos.rows["0012"]["truth"] = "another word"
    photos.write()
    seen.clear()
    second = night(config, store, SECOND)
    assert not seen
    assert (second.shared, second.written) == (2, 1)
    same_as_from_scratch(config, store, SECOND)


@pytest.mark.usefixtures("_complete_first_night")
def test_a_manifest_in_another_order_is_carried_by_its_ids(photos: Collection, store: Path, seen: list[str]) -> None:
    config = photos.config()
    table = pq.read_table(photos.manifest)
    pq.write_table(table.take(list(reversed(range(len(table))))), photos.manifest)
    seen.clear()
    second = night(config, store, SECOND)
    assert not seen
    assert second.kinds["carried"] == 20
    same_as_from_scratch(config, store, SECOND)


@pytest.mark.slow
@pytest.mark.usefixtures("_complete_first_night")
def test_a_repair_keeps_shared_parts_and_makes_a_damaged_one_again(photos: Collection, store: Path) -> None:
    config = photos.config()
    photos.draw(20)
    photos.write()
    night(config, store, SECOND)
    output = store / f"date={SECOND}"
    parts = sorted(output.glob("part-*"))
    parts[2].unlink()
    parts[2].write_bytes(b"torn")
    assert verify_command.main([str(output), "--repair"]) == 0
    assert [part.samefile(store / f"date={FIRST}" / part.name) for part in parts[:2]] == [True, True]
    same_as_from_scratch(config, store, SECOND)


def test_the_same_date_again_does_nothing(photos: Collection, store: Path, seen: list[str]) -> None:
    config = photos.config()
    first = night(config, store, FIRST)
    photos.draw(30)
    photos.write()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    seen.clear()
    assert night(config, store, FIRST) == first
    assert not seen
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}.items() <= before.items()


def test_equal_digests_are_embedded_once_and_a_duplicate_is_tried_if_the_first_is_missing(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    config = photos.config()
    for number, other in ((7, 6), (9, 8), (5, 4), (10, 4)):
        (photos.folder / f"{number:04d}.jpg").write_bytes((photos.folder / f"{other:04d}.jpg").read_bytes())
    (photos.folder / "0008.jpg").unlink()
    same = {5: 4, 7: 6, 9: 8, 10: 4}
    digests = [f"d{same.get(number, number)}" for number in range(20)]
    photos.write({"sha256": digests})
    first = night(config, store, FIRST)
    assert first.content == "sha256"
    # 5, 7 and 10 share a result; 9 is the same as 8, which cannot be read, so it is read itself.
    assert first.kinds["duplicate"] == 4
    assert first.embedded == 17
    assert not {"0005", "0007", "0010"} & set(seen)
    same_as_from_scratch(config, store, FIRST)
    # A file that is known under another name, and one that was not.
    photos.draw(20)
    (photos.folder / "0020.jpg").write_bytes((photos.folder / "0002.jpg").read_bytes())
    photos.draw(21)
    photos.write({"sha256": [*digests, "d2", "d21"]})
    seen.clear()
    second = night(config, store, SECOND)
    assert set(seen) == {"0008", "0021"}
    assert (second.kinds["duplicate"], second.kinds["retried"], second.kinds["new"]) == (1, 1, 1)
    same_as_from_scratch(config, store, SECOND)


def test_images_within_the_manifest_are_compared_by_their_bytes(tmp_path: Path, seen: list[str]) -> None:
    manifest, store = tmp_path / "scenes.parquet", tmp_path / "nights"
    scenes_manifest(manifest, 20)
    collection = Collection(tmp_path)
    config = collection.config(
        manifest={"path": str(manifest), "image": "image", "keep": ["truth", "meta"], "root": None}
    )
    assert night(config, store, FIRST).content == "bytes"
    table = pq.read_table(manifest)
    cells = table["image"].to_pylist()
    cells[7] = cells[8]
    changed = table.set_column(table.schema.get_field_index("image"), "image", pa.array(cells))
    pq.write_table(changed, manifest, row_group_size=6)
    seen.clear()
    second = night(config, store, SECOND)
    # The bytes of row 7 are those of row 8, whose embedding is known.
    assert not seen
    assert second.kinds["duplicate"] == 1
    same_as_from_scratch(config, store, SECOND)


@pytest.mark.usefixtures("_complete_first_night")
def test_another_model_or_prompt_embeds_everything_anew(photos: Collection, store: Path) -> None:
    # Nothing changed in the manifest; only the config differs.
    other = photos.config(prompts={"templates": ["a picture of a {}"]})
    second = night(other, store, SECOND)
    assert "prompts" in second.anew
    assert (second.kinds["anew"], second.embedded, second.shared) == (20, 20, 0)
    same_as_from_scratch(other, store, SECOND)
    photos.draw(20)
    photos.write()
    third = night(photos.config(images={"decoder": "fast"}), store, THIRD)
    assert "images" in third.anew
    assert (third.kinds["anew"], third.kinds["new"]) == (20, 1)


@pytest.mark.slow
def test_another_prompt_is_found_though_all_that_is_new_are_copies(photos: Collection, store: Path) -> None:
    photos.restore(5)
    photos.write({"sha256": [f"d{number}" for number in range(20)]})
    night(photos.config(), store, FIRST)
    photos.draw(20)
    (photos.folder / "0020.jpg").write_bytes((photos.folder / "0002.jpg").read_bytes())
    photos.write({"sha256": [*(f"d{number}" for number in range(20)), "d2"]})
    other = photos.config(prompts={"templates": ["a picture of a {}"]})
    second = night(other, store, SECOND)
    assert "prompts" in second.anew
    same_as_from_scratch(other, store, SECOND)


def test_a_digest_without_text_is_no_digest(photos: Collection, store: Path) -> None:
    config = photos.config()
    photos.write({"sha256": [""] * 10 + [f"d{number}" for number in range(10, 20)]})
    assert night(config, store, FIRST).kinds["duplicate"] == 0
    second = night(config, store, SECOND)
    # The content of ten rows is unknown; the missing and the damaged image are among them.
    assert (second.kinds["carried"], second.kinds["changed"], second.kinds["retried"]) == (10, 8, 2)
    same_as_from_scratch(config, store, SECOND)


@pytest.mark.slow
@pytest.mark.usefixtures("_first_night")
def test_a_night_of_another_model_that_carries_nothing_anyway_embeds_once(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    for number in range(20):
        photos.drop(number)
    for number in range(20, 30):
        photos.draw(number)
    photos.write()
    seen.clear()
    other = photos.config(prompts={"templates": ["a picture of a {}"]})
    assert night(other, store, SECOND).embedded == 10
    assert len(seen) == 10
    same_as_from_scratch(other, store, SECOND)


@pytest.mark.usefixtures("_complete_first_night")
def test_rows_of_a_damaged_part_are_not_carried_into_a_sound_one(photos: Collection, store: Path) -> None:
    config = photos.config()
    part = min((store / f"date={FIRST}").glob("part-*"))
    vector = pq.ParquetFile(part).read()["embedding"][0].values.to_numpy().tobytes()
    data = part.read_bytes()
    assert data.count(vector) == 1
    part.write_bytes(data.replace(vector, vector[:8] + b"\x00\x00\x00\x3f" + vector[12:]))
    photos.drop(1)
    photos.write()
    with pytest.raises(StorageError, match="damaged"):
        night(config, store, SECOND)


def test_a_night_that_another_job_began_names_what_to_remove(
    photos: Collection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = photos.config()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.nightly.run.publish", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            night(config, store, FIRST)
    with pytest.raises(NightError, match=rf"prompts(?s:.*)remove \S+_work/date={FIRST} and \S+/date={FIRST}"):
        night(photos.config(prompts={"templates": ["a picture of a {}"]}), store, FIRST)
    assert night(config, store, FIRST).embedded == 20


def test_a_night_with_shards_given_up_is_not_reported_as_published(
    photos: Collection, store: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given_up(config: Config, *, run: str, recorded: object) -> None:
        raise ShardsGivenUp("shard 1")

    monkeypatch.setattr("pipeline.nightly.embed.run_main_job", given_up)
    assert command("--date", FIRST, "--store", str(store)) == 1


@pytest.mark.slow
def test_a_night_that_was_killed_before_its_row_gets_it_on_a_later_date(photos: Collection, store: Path) -> None:
    config = photos.config()
    arguments = (asdict(config), str(store), FIRST, "snapshot")
    point = "storage.durable[_night.json]=kill@1"
    child = forks().start("tests.nights:night_in_fork", *arguments, failpoints=point)
    assert child.wait() == -9, child.said()
    assert not (store / "runs.parquet").exists()
    night(config, store, SECOND)
    assert [str(day) for day in pq.ParquetFile(store / "runs.parquet").read()["date"].to_pylist()] == [FIRST, SECOND]
    assert list((store / "_work").iterdir()) == []
    # One that is removed and made again is one row, of the new night.
    shutil.rmtree(store / f"date={SECOND}")
    photos.draw(20)
    photos.write()
    night(config, store, SECOND)
    runs = pq.ParquetFile(store / "runs.parquet").read().to_pylist()
    assert [(str(run["date"]), run["rows"]) for run in runs] == [(FIRST, 20), (SECOND, 21)]


@pytest.mark.usefixtures("_first_night")
def test_nights_that_were_never_published_do_not_take_the_place_of_those_that_are_kept(
    photos: Collection, store: Path
) -> None:
    config = photos.config()
    (store / f"date={SECOND}").mkdir()
    night(config, store, THIRD, keep=2)
    assert (store / f"date={FIRST}" / "_night.json").exists()
    night(config, store, "2026-11-04", keep=2)
    assert sorted(path.name for path in store.glob("date=*")) == [f"date={THIRD}", "date=2026-11-04"]


@pytest.mark.usefixtures("_complete_first_night")
def test_another_batch_size_carries_rows_and_writes_the_parts_anew(photos: Collection, store: Path) -> None:
    photos.draw(20)
    photos.write()
    config = photos.config(loader={"batch_size": 4})
    second = night(config, store, SECOND)
    assert (second.kinds["carried"], second.shared) == (20, 0)
    same_as_from_scratch(config, store, SECOND)
    # auto takes what the nights before have.
    third = night(photos.config(loader={"batch_size": 0}), store, THIRD)
    assert (third.embedded, third.shared) == (0, 3)


def test_too_many_failures_are_counted_over_the_whole_night(photos: Collection, store: Path) -> None:
    config = photos.config(errors={"max_fraction": 0.2})
    photos.restore(5)
    assert night(config, store, FIRST).exit_code == 0
    for number in (20, 21):
        photos.draw(number, damaged=True)
    photos.write()
    # All of what is embedded fails, but three of 22 rows are few.
    assert night(config, store, SECOND).exit_code == 0
    for number in range(22, 26):
        photos.draw(number, missing=True)
    photos.write()
    third = night(config, store, THIRD)
    assert third.exit_code == 3
    assert "7 of 26 rows failed" in third.verdict
    assert healthy(store / f"date={THIRD}")
    assert night(config, store, THIRD).exit_code == 3


@pytest.mark.usefixtures("_first_night")
@pytest.mark.parametrize(
    "point",
    [
        *("storage.durable[begun.json]", "encoded", "storage.durable[_night.json]"),
        *(
            pytest.param(point, marks=pytest.mark.slow)
            for point in (
                *("storage.durable[rows.parquet]", "storage.durable[part-]@3", "commit.done@4"),
                "storage.staged[_night.json]",
            )
        ),
    ],
)
def test_a_night_that_is_killed_goes_on_with_the_same_command(photos: Collection, store: Path, point: str) -> None:
    config = photos.config()
    photos.draw(1, version=1)
    photos.restore(5)
    for number in range(20, 32):
        photos.draw(number)
    photos.write()
    name, _, times = point.partition("@")
    point = f"{name}=kill@{times or 1}"
    child = forks().start(
        "tests.nights:night_in_fork", asdict(config), str(store), SECOND, "snapshot", failpoints=point
    )
    assert child.wait() == -9, child.said()
    second = night(config, store, SECOND)
    assert second.kinds["new"] == 12
    assert second.embedded == 14
    same_as_from_scratch(config, store, SECOND)
    assert pq.ParquetFile(store / "runs.parquet").read()["date"].to_pylist() == sorted(
        pa.array([FIRST, SECOND]).cast(pa.date32()).to_pylist()
    )
    assert not (store / "_work" / f"date={SECOND}").exists()


@pytest.mark.usefixtures("_first_night")
def test_a_manifest_that_changed_since_a_night_was_begun_begins_it_again(
    photos: Collection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = photos.config()
    photos.draw(20)
    photos.write()

    def broken(*arguments: Any) -> None:
        raise OSError("the machine is gone")

    def assembled(*arguments: Any) -> None:
        raise InterruptedError("while assembling")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.nightly.run.assemble", broken)
        with pytest.raises(OSError, match="gone"):
            night(config, store, SECOND)
        # The ids are checked before a night is begun, and not again.
        patch.setattr("pipeline.nightly.prepare.check_ids", broken)
        patch.setattr("pipeline.nightly.run.assemble", assembled)
        with pytest.raises(InterruptedError, match="assembling"):
            night(config, store, SECOND)
        photos.draw(21)
        photos.write()
        with pytest.raises(OSError, match="gone"):
            night(config, store, SECOND)
    assert (store / "_work" / f"date={SECOND}" / "carry" / "delta-0").is_dir()
    assert night(config, store, SECOND).kinds["new"] == 2
    same_as_from_scratch(config, store, SECOND)


def test_partitions_hold_the_embedded_rows_and_the_dropped_ids(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    config = photos.config()
    night(config, store, FIRST, layout=PARTITION)
    photos.draw(1, version=1)
    photos.restore(5)
    photos.drop(2)
    photos.draw(20)
    photos.write()
    seen.clear()
    second = night(config, store, SECOND, layout=PARTITION)
    assert set(seen) == {"0001", "0005", "0020"}
    assert read(store / f"date={SECOND}")["id"].to_pylist() == ["0001", "0005", "0020"]
    # The damaged image is counted though it lies in another night.
    assert second.counts == {"ok": 19, "not_an_image": 1}
    assert healthy(store / f"date={SECOND}")
    third = night(config, store, THIRD, layout=PARTITION)
    assert (third.dataset, third.embedded, third.counts) == ("", 0, second.counts)
    photos.draw(21)
    photos.draw(22)
    (photos.folder / "0022.jpg").write_bytes((photos.folder / "0021.jpg").read_bytes())
    digests = {"md5": ["d21" if name >= "0021" else f"d{name}" for name in sorted(photos.rows)]}
    photos.write(digests)
    fourth = night(config, store, "2026-11-04", layout=PARTITION, content="md5")
    # Contents are compared by another column now, so nothing can be carried.
    assert (fourth.kinds["anew"], fourth.kinds["duplicate"], fourth.embedded) == (20, 1, 21)
    assert "md5" in fourth.anew
    same_as_from_scratch(config, store, "2026-11-04")
    # What the partitions come to together: the newest row of each id.
    newest = {row["id"]: row["truth"] for day in (FIRST, SECOND) for row in read(store / f"date={day}").to_pylist()}
    del newest["0002"]
    assert newest == {name: row["truth"] for name, row in photos.rows.items() if name < "0021"}


@pytest.mark.compat("moto")
def test_a_store_in_s3_shares_parts_by_copies_within_it(photos: Collection, tmp_path: Path, seen: list[str]) -> None:
    with moto_server(tmp_path / "log") as url, pointed_at(url):
        address, config = f"s3://{BUCKET}/nights", photos.config()
        first = night(config, address, FIRST)
        photos.draw(20)
        photos.write()
        seen.clear()
        second = night(config, address, SECOND, keep=1)
        assert set(seen) == {"0005", "0020"}
        assert (first.written, second.shared, second.written) == (3, 1, 2)
        store = open_storage(address)
        assert (store.folders(), sorted(store.sizes())) == ([f"date={SECOND}"], ["runs.parquet"])
        health = verify(open_storage(f"{address}/date={SECOND}"))
        assert (health.state, health.counts, health.findings) == ("healthy", second.counts, [])


@pytest.mark.usefixtures("_first_night")
def test_a_store_holds_one_layout_and_one_night_at_a_time(photos: Collection, store: Path) -> None:
    config = photos.config()
    with pytest.raises(NightError, match="--layout snapshot"):
        night(config, store, SECOND, layout=PARTITION)
    with lease.take(open_storage(str(store)), seconds=60), pytest.raises(OutputBusy):
        night(config, store, SECOND)


@pytest.mark.slow
def test_nights_are_kept_and_an_older_date_carries_from_its_own_past(photos: Collection, store: Path) -> None:
    config = photos.config()
    for day in (1, 2, 4):
        photos.draw(20 + day)
        photos.write()
        night(config, store, f"2026-11-0{day}")
    assert night(config, store, THIRD, keep=2).previous == SECOND
    # Later nights are not touched by an older one.
    assert sorted(path.name for path in store.glob("date=*")) == [
        "date=2026-11-02",
        "date=2026-11-03",
        "date=2026-11-04",
    ]
    same_as_from_scratch(config, store, THIRD)
    runs = pq.ParquetFile(store / "runs.parquet").read().to_pylist()
    assert [str(run["date"]) for run in runs] == [FIRST, SECOND, "2026-11-04", THIRD]
    assert runs[0]["new"] == runs[0]["rows"] == 21
    assert json.loads(runs[0]["counts"]) == {"ok": 19, "not_an_image": 1, "not_found": 1}
    assert (runs[0]["ok"], runs[0]["failed"], runs[0]["exit_code"]) == (19, 2, 0)


def test_content_is_compared_by_known_columns_and_a_missing_column_is_named(photos: Collection) -> None:
    def found(option: str = "auto") -> str:
        return str(find_content(open_manifest(photos.config().manifest), option))

    assert found() == "size,modified"
    photos.write({"etag": ["x"] * 20, "digest": ["y"] * 20})
    assert found() == "digest"
    assert found("etag,size") == "etag,size"
    assert found("stat") == "stat"
    with pytest.raises(NightError, match=r"--content names version, but its columns are: .*truth"):
        found("size,version")
    with pytest.raises(NightError, match="holds path"):
        found("bytes")
    table = pq.read_table(photos.manifest)
    pq.write_table(table.drop_columns(["etag", "digest", "modified"]), photos.manifest)
    assert found() == "stat"
    remote = photos.config(manifest={"root": "https://example.com/photos"})
    with pytest.raises(NightError, match="no column digest, or sha256, or md5, or etag, or size and modified"):
        find_content(open_manifest(remote.manifest), "auto")


def test_a_file_without_content_columns_is_compared_by_size_and_date(
    photos: Collection, store: Path, seen: list[str]
) -> None:
    table = pq.read_table(photos.manifest)
    pq.write_table(table.drop_columns(["size", "modified"]), photos.manifest)
    config = photos.config()
    night(config, store, FIRST)
    (photos.folder / "0004.jpg").write_bytes((photos.folder / "0006.jpg").read_bytes())
    seen.clear()
    second = night(config, store, SECOND)
    assert set(seen) == {"0004", "0005"}
    assert (second.kinds["changed"], second.kinds["retried"]) == (1, 1)
    same_as_from_scratch(config, store, SECOND)


def test_rows_are_copied_from_a_manifest_without_reading_other_row_groups(photos: Collection, tmp_path: Path) -> None:
    import numpy as np

    manifest = open_manifest(photos.config().manifest)
    storage = open_storage(str(tmp_path / "out"))
    copy_rows(manifest, np.array([3, 12, 13, 19]), ["id", "path"], storage, "some.parquet")
    table = pq.read_table(tmp_path / "out" / "some.parquet")
    assert table["id"].to_pylist() == ["0003", "0012", "0013", "0019"]
    batches = [pa.record_batch({"a": list(range(start, stop))}) for start, stop in ((0, 3), (3, 10), (10, 11))]
    assert [one["a"].to_pylist() for one in rechunk(batches, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def paths(server: Server) -> list[str]:
    return [path for path, _ in server.requests]


def test_a_health_check_that_does_not_answer_is_a_warning_without_its_address(caplog: pytest.LogCaptureFixture) -> None:
    for status in (301, 503):
        with serve({}, other=answer(status)) as server:
            url = f"{server.url}/uuid"
            assert not ping(url, "0")
            assert list(server.asked) == ["/uuid/0"]
    assert not ping(url, "start")
    assert not ping("http://[", "start")
    assert "127.0.0.1" in caplog.text
    assert "uuid" not in caplog.text


def metrics(path: Path) -> dict[str, float]:
    """Samples of a textfile, which must be well formed."""
    samples, typed = {}, set()
    for line in path.read_text().splitlines():
        words = line.split(None, 3)
        if words[:2] == ["#", "TYPE"]:
            assert words[3] == "gauge"
            typed.add(words[2])
        elif words[:2] != ["#", "HELP"]:
            name, _, value = line.rpartition(" ")
            assert name.partition("{")[0] in typed
            samples[name] = float(value)
    return samples


def test_labels_of_the_textfile_are_escaped(tmp_path: Path) -> None:
    place = tmp_path / "sub" / "nightly.prom"
    write_textfile(place, Outcome('a"b\\c\nd', exit_code=75, seconds=1.5, night=None, succeeded=None))
    samples = metrics(place)
    assert samples['clip_pipeline_nightly_exit_code{store="a\\"b\\\\c\\nd"}'] == 75
    assert not any("last_success" in name for name in samples)
    assert [path.name for path in place.parent.iterdir()] == ["nightly.prom"]


@pytest.fixture
def command(photos: Collection, tmp_path: Path) -> Callable[..., int]:
    """The command line, with the overrides of the collection."""

    def run(*arguments: str) -> int:
        config = photos.config()
        taken = [text for text in overrides_of(config) if not text.startswith(("output.dir", "manifest.", "errors"))]
        own = [f"manifest.path={photos.manifest}", f"manifest.root={photos.folder}", "manifest.keep=[truth]"]
        own += ["manifest.shard_rows=8", "loader.isolation=none", "report.progress=none", "errors.max_fraction=0.15"]
        if not any(text.startswith("report.html=") for text in arguments):
            own.append("report.html=false")
        return cli.main([*arguments, *taken, *own])

    return run


@pytest.mark.slow
def test_the_command_notifies_prometheus_and_the_health_check(
    photos: Collection, store: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "nightly.prom"
    with serve({}, other=answer(200)) as server:
        options = ("--store", str(store), "--ping", f"{server.url}/uuid", "--textfile", str(place))
        assert command("--date", FIRST, *options) == 0
        assert paths(server) == ["/uuid/start", "/uuid/0"]
        samples = metrics(place)
        label = f'store="{store}"'
        assert samples[f"clip_pipeline_nightly_exit_code{{{label}}}"] == 0
        assert samples[f'clip_pipeline_nightly_rows{{status="ok",{label}}}'] == 18
        assert samples[f'clip_pipeline_nightly_changes{{kind="new",{label}}}'] == 20
        success = samples[f"clip_pipeline_nightly_last_success_timestamp_seconds{{{label}}}"]
        assert command("--date", FIRST, *options) == 0
        assert "published already" in capsys.readouterr().err
        for number in (20, 21):
            photos.draw(number, damaged=True)
        photos.write()
        assert command("--date", SECOND, *options) == 3
        assert "4 of 22 rows failed" in capsys.readouterr().err
        photos.manifest.unlink()
        assert command("--date", THIRD, *options) == 2
        assert paths(server)[4:] == ["/uuid/start", "/uuid/3", "/uuid/start", "/uuid/2"]
        samples = metrics(place)
        assert samples[f"clip_pipeline_nightly_exit_code{{{label}}}"] == 2
        assert samples[f"clip_pipeline_nightly_last_success_timestamp_seconds{{{label}}}"] == success
        # A wrong command line does not open the store, but the last success is still exported for alarms.
        assert command("--date", "tomorrow", *options) == 2
        samples = metrics(place)
        assert samples[f"clip_pipeline_nightly_last_success_timestamp_seconds{{{label}}}"] == success
        runs = store / "runs.parquet"
        runs.write_bytes(runs.read_bytes()[:-9])
        capsys.readouterr()
        assert command("--date", FIRST, *options) == 1
        assert "runs.parquet: not readable" in capsys.readouterr().err
        assert metrics(place)[f"clip_pipeline_nightly_exit_code{{{label}}}"] == 1
        assert paths(server)[-1] == "/uuid/1"
        runs.unlink()
        assert command("--date", FIRST, *options) == 0
        assert len(pq.ParquetFile(runs).read()) == 2
    with lease.take(open_storage(str(store)), seconds=60):
        assert command("--date", THIRD, "--store", str(store)) == 75


@pytest.mark.slow
def test_a_range_of_dates_stops_at_the_first_night_that_fails(
    photos: Collection, store: Path, command: Callable[..., int]
) -> None:
    for day in (1, 2, 4):
        (photos.folder / f"m-2026-11-0{day}.parquet").write_bytes(photos.manifest.read_bytes())
        photos.draw(20 + day)
        photos.write()
    dated = f"manifest.path={photos.folder}/m-{{date}}.parquet"

    def run() -> int:
        options = ["--from", FIRST, "--to", "2026-11-04", "--store", str(store)]
        base = ["manifest.shard_rows=8", "loader.isolation=none", "report.progress=none", "backend.device=cpu",
                "loader.batch_size=8", "errors.max_fraction=0.5", "report.html=false"]  # fmt: skip
        return cli.main([*options, *base, dated])

    assert run() == 2
    assert sorted(path.name for path in store.glob("date=*")) == [f"date={FIRST}", f"date={SECOND}"]
    (photos.folder / f"m-{THIRD}.parquet").write_bytes((photos.folder / f"m-{SECOND}.parquet").read_bytes())
    assert run() == 0
    runs = pq.ParquetFile(store / "runs.parquet").read().to_pylist()
    assert [run["new"] for run in runs] == [20, 1, 0, 1]
    assert [run["shared"] for run in runs] == [0, 1, 3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "never taken from the clock"),
        (["--date", "22.11.2026"], "2026-11-22, today or yesterday"),
        (["--date", FIRST, "--to", SECOND], "both --from and --to"),
        (["--from", SECOND, "--to", FIRST], "must not be after"),
        (["--date", "today", "--timezone", "Mars/Olympus"], "time zone such as"),
        (["--date", "today", "--timezone", "Europe"], "time zone such as"),
        (["--date", FIRST, "--keep", "-1"], "number of nights"),
        (["--date", FIRST, "--layout", "partition", "--keep", "3"], "no other night holds"),
        (["--date", FIRST, "output.dir=elsewhere"], "made of --store"),
        (["--date", FIRST, "cluster.part=1/2"], "the nightly job cannot be split"),
        (["--date", FIRST], "must name the manifest"),
        (["--date", FIRST, "manifest.path=x.parquet", "loader.batch_sise=3"], "did you mean loader.batch_size"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--store", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_static_quantization_is_refused(photos: Collection, store: Path) -> None:
    config = photos.config(backend={"name": "onnx_int8", "quantization": "static"})
    with pytest.raises(NightError, match="every night would have another model"):
        night(config, store, FIRST)


@pytest.mark.slow
def test_a_night_has_a_page_that_compares_it_with_those_before(
    photos: Collection, store: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--store", str(store), "report.html=true", "log.format=json")
    assert command("--date", FIRST, *options) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len({line["run"] for line in lines}) == 1, "the night and its jobs"
    page = store / f"date={FIRST}" / "_report.html"
    assert lines[-1]["message"] == f"report: {page}"
    html = page.read_text()
    assert f"Night of {FIRST}: 20 of 20 rows embedded" in html
    assert html.count("data:image/jpeg;base64,") > 10
    assert "The run over time" in html
    photos.restore(5)
    photos.draw(20)
    photos.write()
    assert command("--date", SECOND, *options) == 0
    html = (store / f"date={SECOND}" / "_report.html").read_text()
    assert f"Night of {SECOND}: 2 of 21 rows embedded" in html
    assert f"<td>{FIRST}</td>" in html.partition("Compared with the nights before")[2]
    assert healthy(store / f"date={SECOND}")
    # A night that embeds nothing has a page all the same.
    assert command("--date", THIRD, *options, "report.examples=0") == 0
    html = (store / f"date={THIRD}" / "_report.html").read_text()
    assert "0 of 21 rows embedded" in html
    assert "base64" not in html
    capsys.readouterr()
    photos.manifest.unlink()
    assert command("--date", "2026-11-04", *options) == 2
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["level"], last["exit_code"]) == ("error", 2)
