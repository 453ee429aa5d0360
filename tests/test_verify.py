"""The command verify: it and a rerun find all damage, and a repair computes only the damaged shard again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, LeaseLost, NoDataset, PlanMismatch, StorageError
from pipeline.dataset import plan
from pipeline.dataset.commits import find_done
from pipeline.dataset.lease import take
from pipeline.dataset.parts import METADATA_KEY
from pipeline.dataset.saved_config import config_of, recipe_of
from pipeline.dataset.verify import Health, collect, verify
from pipeline.job.main import run_job
from pipeline.storage.base import sha256
from pipeline.storage.factory import open_storage
from pipeline.verify import main
from tests.damage import commit_of, flip, part_of, truncate
from tests.jobs import config_for, content, scenes_manifest
from tests.processes import loads, run_python

SHARD_ROWS, SHARDS = 4, 19
ROWS, LAST = SHARD_ROWS * SHARDS, SHARDS - 1
DAY = 86_400


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished job of small shards, a failed row in the first, in this process alone."""
    folder = tmp_path_factory.mktemp("verify")
    manifest = scenes_manifest(folder / "m.parquet", ROWS, damaged={3: b""})
    loader = {"batch_size": 4}
    config = config_for(manifest, folder / "whole", manifest={"shard_rows": SHARD_ROWS}, loader=loader)
    run_job(config)
    return config


@pytest.fixture
def out(whole: Config, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    return Path(shutil.copytree(whole.output.dir, tmp_path / "out"))


def look(out: Path) -> Health:
    return verify(open_storage(str(out)))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def forge(out: Path, shard: int, table: pa.Table) -> None:
    """Replace a part by another file, and its commit by one of that file."""
    old = part_of(out, shard)
    pq.write_table(table, out / "forged")
    old.unlink()
    digest = sha256(out / "forged")
    new = out / f"part-{shard:05d}-{digest[:16]}.parquet"
    (out / "forged").rename(new)
    change(commit_of(out, shard), part=new.name, size=new.stat().st_size, sha256=digest)


def without_metadata(out: Path, shard: int) -> None:
    forge(out, shard, pq.read_table(part_of(out, shard)).replace_schema_metadata({}))


def of_another_job(out: Path, shard: int) -> None:
    table = pq.read_table(part_of(out, shard))
    prints = json.loads(table.schema.metadata[METADATA_KEY])
    prints["model"] = {**prints["model"], "name": "another"}
    forge(out, shard, table.replace_schema_metadata({METADATA_KEY: json.dumps(prints).encode()}))


def with_fewer_rows(out: Path, shard: int) -> None:
    forge(out, shard, pq.read_table(part_of(out, shard)).slice(1))


def with_another_dtype(out: Path, shard: int) -> None:
    table = pq.read_table(part_of(out, shard))
    place, length = table.schema.get_field_index("embedding"), table.schema.field("embedding").type.list_size
    narrow = table["embedding"].combine_chunks().cast(pa.list_(pa.float16(), length))
    forge(out, shard, table.set_column(place, "embedding", narrow))


def no_parquet(out: Path, shard: int) -> None:
    old, data = part_of(out, shard), b"no Parquet"
    old.unlink()
    new = out / f"part-{shard:05d}-{'f' * 16}.parquet"
    new.write_bytes(data)
    change(commit_of(out, shard), part=new.name, size=len(data), sha256=sha256(new))


# Each does something to one shard, and is known by what stands before the colon.
DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "wrong size: truncated": lambda out, n: truncate(part_of(out, n)),
    "wrong digest: a bit flipped": lambda out, n: flip(part_of(out, n)),
    "missing part: deleted": lambda out, n: part_of(out, n).unlink(),
    "torn commit": lambda out, n: truncate(commit_of(out, n), 20),
    "torn commit: empty": lambda out, n: commit_of(out, n).write_bytes(b""),
    "torn commit: of other types": lambda out, n: change(commit_of(out, n), part=["x"]),
    "foreign commit": lambda out, n: shutil.copy(commit_of(out, LAST), commit_of(out, n)),
    "missing commit": lambda out, n: commit_of(out, n).unlink(),
    "wrong part: of another shard": lambda out, n: change(commit_of(out, n), part=part_of(out, LAST).name),
    "wrong rows: in the commit": lambda out, n: change(commit_of(out, n), rows=3, counts={"ok": 3}),
    "wrong rows: in the part": with_fewer_rows,
    "wrong counts: by status": lambda out, n: change(commit_of(out, n), counts={"ok": 3, "empty": 1}),
    "wrong counts: in sum": lambda out, n: change(commit_of(out, n), counts={"ok": 3}),
    "wrong fingerprints: none": without_metadata,
    "wrong fingerprints: of another job": of_another_job,
    "wrong schema: of another dtype": with_another_dtype,
    "unreadable part: no Parquet": no_parquet,
}


def test_a_whole_dataset_is_healthy(whole: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(whole.output.dir).rglob("*")}
    assert main([whole.output.dir]) == 0
    said = capsys.readouterr().out
    assert said == (
        f"healthy: {whole.output.dir}: 19 of 19 shards, 76 rows (empty 1, ok 75); "
        "every byte was read, nothing is wrong\n"
    )
    assert {path: path.stat().st_mtime_ns for path in Path(whole.output.dir).rglob("*")} == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found(out: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGES[damage](out, 3)
    assert main([str(out)]) == 1
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith(f"DAMAGE  {damage.split(':')[0]}: _commits/00003.json: ")
    assert found[0].endswith(f"; python -m pipeline.verify {out} --repair")
    assert found[1].startswith(f"damaged: {out}: {SHARDS - 1} of {SHARDS} shards, {ROWS - SHARD_ROWS} rows (")
    assert found[1].endswith("1 thing is wrong")
    assert len(found) == 2


@pytest.mark.parametrize("way", ["the same command again", "--repair"])
def test_only_the_damaged_shards_are_done_again(
    whole: Config, out: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, damage in enumerate(DAMAGES.values(), 1):
        damage(out, number)
    sound = [path for n in (0, LAST) for path in (part_of(out, n), commit_of(out, n))]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sound}
    kinds = [finding.kind for finding in look(out).findings if finding.damage]
    assert sorted(kinds) == sorted(damage.split(":")[0] for damage in DAMAGES)
    if way == "--repair":
        assert main([str(out), way]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("healthy: ")
        report = json.loads((out / "_report.json").read_text())
        assert (report["rows"], report["resumed_rows"]) == (SHARD_ROWS * len(DAMAGES), 2 * SHARD_ROWS)
    else:
        report = run_job(whole.changed({"output.dir": str(out)}))
        assert (report.rows, report.resumed_rows) == (SHARD_ROWS * len(DAMAGES), 2 * SHARD_ROWS)
        assert (out / "_run.log").read_text().count("the shard is done again") == len(DAMAGES) - 1
    assert content(out) == content(Path(whole.output.dir))
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sound} == before


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda out: (out / "_SUCCESS").write_text('{"rows": 1'), "wrong marker"),
        (lambda out: change(out / "_SUCCESS", counts={"ok": 76}), "wrong marker"),
        (lambda out: shutil.copy(part_of(out, 2), out / "part-00002-aaaaaaaaaaaaaaaa.parquet"), "stray part"),
    ],
)
def test_what_lies_beside_the_commits_is_repaired_without_a_shard(
    whole: Config, out: Path, damage: Callable[[Path], object], kind: str
) -> None:
    damage(out)
    health = look(out)
    assert [finding.kind for finding in health.findings] == [kind]
    assert health.state == "damaged"
    before = {path: path.stat().st_mtime_ns for path in out.glob("_commits/*")}
    assert main([str(out), "--repair"]) == 0
    assert content(out) == content(Path(whole.output.dir))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_unfinished_dataset_is_no_damage(whole: Config, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_SUCCESS").unlink()
    commit_of(out, 3).unlink()
    assert main([str(out)]) == 75
    said = capsys.readouterr().out
    assert f"note  stray part: {part_of(out, 3).name}: no commit names it; " in said
    assert f"unfinished: {out}: 18 of 19 shards" in said
    assert main([str(out), "--repair"]) == 0
    assert content(out) == content(Path(whole.output.dir))


def test_files_that_do_not_belong_are_told(out: Path) -> None:
    (out / "mine.parquet").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    (out / "_tmp-elsewhere-1-ab").write_bytes(b"half")
    (out / "_commits" / "readme").write_text("mine")
    found = {(finding.place, finding.kind, finding.damage) for finding in look(out).findings}
    assert found == {
        ("mine.parquet", "foreign file", True),
        ("notes.txt", "unknown file", False),
        ("_tmp-elsewhere-1-ab", "temporary file", False),
        ("_commits/readme", "unknown file", False),
    }


def test_a_run_at_work_is_told_and_a_stale_lease_too(out: Path) -> None:
    storage = open_storage(str(out))
    with take(storage, seconds=60):
        assert [(finding.kind, finding.damage) for finding in look(out).findings] == [("lease", False)]
        assert main([str(out), "--collect", "1d"]) == 75
    (out / "_lease").mkdir()
    (out / "_lease" / "1.json").write_text("torn")
    assert [(finding.kind, finding.damage) for finding in look(out).findings] == [("stale lease", False)]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9}', '{"version": 1, "rows": "x"}'])
def test_a_damaged_plan_is_told(out: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_plan.json").write_text(text)
    assert main([str(out)]) == 1
    assert "damaged plan: _plan.json: " in capsys.readouterr().out
    assert main([str(out), "--repair"]) == 2


def test_a_missing_plan_is_told(out: Path) -> None:
    (out / "_plan.json").unlink()
    assert [finding.kind for finding in look(out).findings] == ["damaged plan"]
    assert main([str(out), "--repair"]) == 2


def test_no_dataset_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoDataset):
        look(tmp_path)
    assert main([str(tmp_path / "gone")]) == 2
    assert "no dataset is here" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_json_holds_every_finding(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(part_of(out, 3))
    assert main([str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["done"], told["shards"], told["collected"]) == ("damaged", 18, 19, None)
    assert [finding["kind"] for finding in told["findings"]] == ["wrong digest"]
    assert main([str(out), "--json", "--repair"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows"], told["findings"]) == ("healthy", ROWS, [])
    assert [finding["kind"] for finding in told["repaired"]] == ["wrong digest"]


def test_collect_removes_what_is_old_and_nobody_needs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_SUCCESS").unlink()
    old = [out / "part-00003-aaaaaaaaaaaaaaaa.parquet", out / "_tmp-elsewhere-1-ab"]
    young = [out / "part-00004-bbbbbbbbbbbbbbbb.parquet", out / "_tmp-elsewhere-2-cd"]
    for path in (*old, *young):
        path.write_bytes(b"12345")
    commit_of(out, 5).write_text("torn")
    keep = [part_of(out, 5), out / "mine.txt"]
    keep[1].write_text("mine")
    named = sorted(out.glob("part-*"))
    for path in (*named, *keep, *old):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    for path in young:
        os.utime(path, (time.time() - DAY / 2,) * 2)
    before = set(out.rglob("*"))
    assert main([str(out), "--collect", "24h"]) == 1
    assert before - set(out.rglob("*")) == set(old)
    assert "2 files removed, 10 bytes freed" in capsys.readouterr().err


def test_nothing_is_collected_by_default_or_with_an_odd_age(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_tmp-elsewhere-1-ab").write_bytes(b"half")
    assert main([str(out)]) == 0
    assert (out / "_tmp-elsewhere-1-ab").exists()
    for age in ("1", "x", "-1h", "1w", "nanh"):
        with pytest.raises(SystemExit):
            main([str(out), f"--collect={age}"])
    assert "write 30m, 24h or 7d" in capsys.readouterr().err


def test_a_file_of_unknown_age_stays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage.base import Entry
    from pipeline.storage.local import LocalStorage

    (out / "_tmp-elsewhere-1-ab").write_bytes(b"half")
    entries = {"_tmp-elsewhere-1-ab": Entry(size=4, modified=0.0)}
    monkeypatch.setattr(LocalStorage, "entries", lambda self, folder="": {} if folder else entries)
    assert collect(open_storage(str(out)), age=0, confirm=lambda: None) == {}


def aged(out: Path) -> None:
    for path in out.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)


@pytest.mark.parametrize("lost", ["one commit", "all commits"])
def test_parts_of_a_finished_dataset_whose_commits_are_lost_are_not_collected(out: Path, lost: str) -> None:
    for path in (out / "_commits").iterdir() if lost == "all commits" else [commit_of(out, 3)]:
        path.unlink()
    aged(out)
    parts = sorted(out.glob("part-*"))
    assert main([str(out), "--collect", "0s"]) == 1
    assert sorted(out.glob("part-*")) == parts


def test_nothing_is_collected_without_a_plan(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "_plan.json").unlink()
    aged(out)
    before = sorted(out.iterdir())
    assert main([str(out), "--collect", "0s"]) == 2
    assert "nothing tells which files are wanted" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_a_holder_that_was_overtaken_collects_nothing(out: Path) -> None:
    def overtaken() -> None:
        raise LeaseLost("somebody else's")

    (out / "_SUCCESS").unlink()
    (out / f"part-00003-{'0' * 16}.parquet").write_bytes(b"old")
    aged(out)
    with pytest.raises(LeaseLost):
        collect(open_storage(str(out)), age=0, confirm=overtaken)
    assert (out / f"part-00003-{'0' * 16}.parquet").exists()


def test_files_that_others_named_like_parts_are_left_alone(whole: Config, out: Path) -> None:
    for name in ("part-00000-6cb3-c000.snappy.parquet", "part-0.parquet"):
        (out / name).write_bytes(b"mine")
    run_job(whole.changed({"output.dir": str(out)}))
    assert (out / "part-0.parquet").exists()
    assert (out / "part-00000-6cb3-c000.snappy.parquet").exists()
    assert {finding.kind for finding in look(out).findings} == {"foreign file"}


def test_a_folder_of_parquet_files_within_is_told(out: Path) -> None:
    (out / "old").mkdir()
    shutil.copy(part_of(out, 0), out / "old" / "x.parquet")
    assert [(finding.kind, finding.damage) for finding in look(out).findings] == [("foreign folder", True)]


def test_a_dataset_that_is_finished_while_it_is_looked_at_is_no_damage(whole: Config, out: Path) -> None:
    (out / "_SUCCESS").unlink()
    kept = commit_of(out, 18).read_bytes()
    commit_of(out, 18).unlink()

    def finish(done: int, total: int) -> None:
        commit_of(out, 18).write_bytes(kept)
        (out / "_SUCCESS").write_bytes((Path(whole.output.dir) / "_SUCCESS").read_bytes())

    assert verify(open_storage(str(out)), on_shard=finish).state == "unfinished"


@pytest.mark.parametrize("fault", [TimeoutError(), PermissionError(), pa.ArrowMemoryError("no memory")])
def test_a_fault_of_the_machine_is_no_damage(out: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr("pipeline.dataset.problems.pq.ParquetFile", fail)
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT", 0.001)
    plan_of = plan.read(open_storage(str(out)))
    assert plan_of is not None
    with pytest.raises((StorageError, pa.ArrowMemoryError)):
        find_done(open_storage(str(out)), plan_of)
    monkeypatch.undo()
    assert look(out).state == "healthy"


def test_a_storage_that_does_not_answer_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main([str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_an_overtaken_holder_clears_nothing_that_was_mended(whole: Config, out: Path) -> None:
    flip(part_of(out, 3))
    storage = open_storage(str(out))
    plan_of = plan.read(storage)
    assert plan_of is not None

    def mended_meanwhile() -> None:
        shutil.copy(part_of(Path(whole.output.dir), 3), part_of(out, 3))

    assert len(find_done(storage, plan_of, mended_meanwhile)) == 18
    assert part_of(out, 3).exists()
    assert commit_of(out, 3).exists()


@pytest.mark.slow
def test_an_object_store_is_verified_and_repaired_too(whole: Config) -> None:
    import fsspec

    url = "memory://verify/dataset"
    fs = fsspec.filesystem("memory")
    run_job(whole.changed({"output.dir": url}))
    assert main([url]) == 0
    name = next(name for name in fs.find("/verify/dataset") if "part-00003" in name)
    fs.pipe_file(name, fs.cat_file(name)[:-1] + b"?")
    assert main([url]) == 1
    assert main([url, "--repair"]) == 0
    assert Path(whole.output.dir, name.rsplit("/", 1)[1]).read_bytes() == fs.cat_file(name)


def test_a_repair_needs_the_manifest_where_it_was(
    whole: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(str(whole.manifest.path), tmp_path / "m.parquet")
    config = whole.changed({"manifest.path": str(tmp_path / "m.parquet")})
    run_job(config.changed({"output.dir": str(tmp_path / "out")}))
    flip(part_of(tmp_path / "out", 3))
    (tmp_path / "m.parquet").unlink()
    assert main([str(tmp_path / "out"), "--repair"]) == 2
    assert "no such file, folder or match" in capsys.readouterr().err
    scenes_manifest(tmp_path / "m.parquet", ROWS, damaged={})
    assert main([str(tmp_path / "out"), "--repair"]) == 2
    assert "manifest.digest" in capsys.readouterr().err


def test_the_plan_keeps_what_the_rows_follow_from(whole: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads((Path(whole.output.dir) / "_plan.json").read_text())["config"]
    assert kept["manifest"]["path"] == whole.manifest.path
    assert not {"cluster", "report"} & set(kept)
    assert "dir" not in kept["output"]
    assert "workers" not in kept["loader"]
    again = config_of(kept, whole.output.dir)
    assert recipe_of(again) == kept
    assert (again.loader.batch_size, again.errors.max_fraction) == (4, 0.5)
    folder = Path(str(whole.manifest.path)).parent
    monkeypatch.chdir(folder)
    relative = whole.changed({"manifest.path": "m.parquet"})
    assert recipe_of(relative)["manifest"]["path"] == str(folder / "m.parquet")


def test_a_plan_without_a_config_or_with_a_strange_one_is_told() -> None:
    with pytest.raises(PlanMismatch, match="keeps no config to repair with"):
        config_of({}, "out")
    for strange in ({"loader": {"batches": 3}}, {"engine": {"name": "x"}}, {"loader": 3}):
        with pytest.raises(PlanMismatch, match="not one of this version"):
            config_of(strange, "out")
    with pytest.raises(ConfigError, match=r"loader\.batch_size"):
        config_of({"loader": {"batch_size": -1}}, "out")


def test_a_plan_of_before_is_read_without_a_config(out: Path, whole: Config) -> None:
    values = json.loads((out / "_plan.json").read_text())
    del values["config"]
    (out / "_plan.json").write_text(json.dumps(values))
    wanted = plan.read(open_storage(str(out)))
    assert wanted is not None
    assert wanted.config == {}
    assert run_job(whole.changed({"output.dir": str(out)})).rows == 0


def test_the_command_imports_no_torch_and_its_help_has_the_exit_codes() -> None:
    assert loads("import pipeline.verify, pipeline.dataset.verify", "torch") == []
    told = run_python("-m", "pipeline.verify", "--help").stdout
    assert "exit codes: 0 healthy, 1 damaged, 2 no dataset" in told
