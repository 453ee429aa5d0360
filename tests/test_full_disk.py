"""A disk without room, a limit, a disk that may not be written: said with path and bytes, and a rerun finishes."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config, ManifestConfig
from pipeline.core.errors import StorageError
from pipeline.core.failpoints import armed
from pipeline.job.main import run_job
from pipeline.manifest import hash_files, ids
from pipeline.manifest.manifest import open_manifest
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import free_bytes
from pipeline.telemetry.logs import log_to
from tests.forks import forks, run_command
from tests.jobs import config_for, content, overrides_of, scenes_manifest
from tests.processes import wait_until

ROWS, SHARD_ROWS = 24, 6
# Bytes of each row that travel from the manifest into the parts, and do not compress.
BALLAST = 20_000
KEEP = ["truth", "meta", "ballast"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = scenes_manifest(tmp_path_factory.mktemp("full") / "m.parquet", ROWS)
    dice = random.Random(7)
    ballast = pa.array([dice.randbytes(BALLAST) for _ in range(ROWS)])
    pq.write_table(pq.read_table(path).append_column("ballast", ballast), path)
    return path


def config_of(manifest: Path, output: Path) -> Config:
    return config_for(manifest, output, manifest={"shard_rows": SHARD_ROWS, "keep": KEEP}, loader={"isolation": "none"})


@pytest.fixture(scope="module")
def unbroken(manifest: Path) -> dict[str, bytes]:
    run_job(config_of(manifest, manifest.parent / "unbroken"))
    return content(manifest.parent / "unbroken")


def check_broken(output: Path) -> set[int]:
    """Nothing half-done is in the way: no temporary file, no commit without its part. The shards that are done."""
    assert not list(output.rglob("_tmp-*"))
    assert not (output / "_SUCCESS").exists()
    done = [json.loads(path.read_text()) for path in output.glob("_commits/*.json")]
    for commit in done:
        assert (output / commit["part"]).stat().st_size == commit["size"]
    return {commit["shard"] for commit in done}


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 320 KB in memory, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root mounts a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_in_the_middle_of_a_part(
    manifest: Path, unbroken: dict[str, bytes], disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(manifest, disk / "out")
    with pytest.raises(StorageError) as caught:
        run_job(config)
    done, message = check_broken(disk / "out"), str(caught.value)
    failed = re.match(rf"{disk}/out/part-(\d+)-\*\.parquet: ", message)
    assert failed is not None, message
    assert 0 in done
    assert int(failed[1]) not in done
    assert "No space left on device (about 0.12 MB to be written, " in message
    assert " free); free some space and run the same command again, finished shards are kept" in message
    assert "Logging error" not in capfd.readouterr().err
    mount("-o", "remount,size=4m", str(disk))
    assert run_job(config).resumed_rows == SHARD_ROWS * len(done)
    assert content(disk / "out") == unbroken


def test_a_disk_that_is_full_from_the_start(
    manifest: Path, unbroken: dict[str, bytes], disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb") as file:
        file.write(bytes(1 << 20))
    config = config_of(manifest, disk / "out")
    with pytest.raises(
        StorageError, match=r"out/_\S+: No space left on device \(about .* bytes to be written, 0 bytes"
    ):
        run_job(config)
    told = capfd.readouterr().err
    assert "Logging error" not in told
    assert "Traceback" not in told
    assert check_broken(disk / "out") == set()
    ballast.unlink()
    mount("-o", "remount,size=4m", str(disk))
    run_job(config)
    assert content(disk / "out") == unbroken


def test_a_log_without_room_is_said_once_and_disturbs_nobody(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("pipeline.somewhere")

    def fail() -> None:
        log.info("one")
        log.info("two")
        raise StorageError("the reason")

    with pytest.raises(OSError, match="No space"), (disk / "ballast").open("wb") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(StorageError, match="the reason"), log_to(open_storage(str(disk / "out"))):
        fail()
    lost = f"warning: {disk}/out/_run.log: No space left on device; lines of the log are lost"
    assert capsys.readouterr().err.splitlines() == ["one", lost, "two"]


def test_a_disk_that_may_only_be_read(manifest: Path, unbroken: dict[str, bytes], disk: Path) -> None:
    mount("-o", "remount,size=4m", str(disk))
    config = config_of(manifest, disk / "out")
    with armed("storage.synced[_commits]=raise:EIO@3"), pytest.raises(StorageError):
        run_job(config)
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(StorageError, match=r"Read-only file system.*; choose another place, or have it mounted"):
        run_job(config)
    with pytest.raises(StorageError, match=r"out/a: Read-only|out/_tmp\S+: Read-only"):
        open_storage(str(disk / "out")).write("a", b"x")
    assert check_broken(disk / "out") >= {0, 1}
    mount("-o", "remount,rw", str(disk))
    run_job(config)
    assert content(disk / "out") == unbroken


def test_a_full_temporary_folder_before_an_object_store(
    manifest: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    mount("-o", "remount,size=100k", str(disk))
    url = f"memory:///{uuid.uuid4().hex}"
    config = config_of(manifest, Path("x"))
    config = replace(config, output=replace(config.output, dir=url))
    with pytest.raises(StorageError, match=rf"^{disk}/part-00000-\*.parquet: No space left .* free some space"):
        run_job(config)
    assert list(disk.iterdir()) == []
    assert open_storage(url).sizes("_commits") == {}
    mount("-o", "remount,size=4m", str(disk))
    run_job(config)
    assert len(open_storage(url).sizes("_commits")) == ROWS // SHARD_ROWS
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_tmpdir_without_room_for_the_hashes_of_the_ids(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    pq.write_table(pa.table({"id": range(100_000), "path": ["x.jpg"] * 100_000}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setattr(ids, "IN_MEMORY_ROWS", 50_000)
    if not known:
        # As where other processes fill the disk meanwhile.
        monkeypatch.setattr(hash_files, "free_bytes", lambda place: None)
    before = free_bytes(str(disk))
    with pytest.raises(StorageError) as caught:
        ids.check_ids(manifest)
    free = f" ({before:,} bytes free)" if known else ""
    assert str(caught.value).startswith(f"{disk}: No space left on device{free}; the check of the ids writes 800,000 b")
    assert "set TMPDIR to a folder on a larger disk" in str(caught.value)
    wait_until(lambda: free_bytes(str(disk)) == before)
    mount("-o", "remount,size=4m", str(disk))
    ids.check_ids(manifest)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold root up; a read-only disk does, above")
def test_a_folder_that_may_only_be_read(manifest: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path / "out")
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(StorageError, match="Permission denied; check the permissions, or choose another place"):
        run_job(config)
    (tmp_path / "out").chmod(0o755)
    run_job(config)
    assert content(tmp_path / "out") == unbroken


def limited_command(*overrides: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return run_command(*overrides)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(manifest: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    config = config_of(manifest, tmp_path / "out")
    # Decoders need files of some megabytes in memory.
    arguments = [*overrides_of(config), f"manifest.keep=[{','.join(KEEP)}]", "loader.isolation=none"]
    child = forks().start("tests.test_full_disk:limited_command", *arguments)
    assert child.wait() == 1, child.said()
    assert f"error: {tmp_path}/out/part-00000-*.parquet: " in child.said()
    assert (
        "File too large (about 0.12 MB to be written); raise the limit on the size of files (ulimit -f)" in child.said()
    )
    assert "Traceback" not in child.said()
    assert check_broken(tmp_path / "out") == set()
    run_job(config)
    assert content(tmp_path / "out") == unbroken


@pytest.mark.parametrize(
    ("failpoint", "place", "done", "undone"),
    [
        ("storage.synced[_plan]=raise:ENOSPC", "_plan.json", set(), {0, 1, 2, 3}),
        ("part.write=raise:ENOSPC@2", "part-00001-*.parquet", {0}, {1}),
        ("part.written=raise:EDQUOT@2", "part-00001-*.parquet", {0}, {1}),
        ("storage.synced[part-00001]=raise:ENOSPC", "part-00001-", {0}, {1}),
        ("storage.linked[part-00001]=raise:ENOSPC", "part-00001-", {0}, {1}),
        ("storage.synced[_commits]=raise:ENOSPC@2", "_commits/00001.json", {0}, {1}),
        ("storage.linked[_commits]=raise:ENOSPC@2", "_commits/00001.json", {0, 1}, set()),
        ("storage.synced[_SUCCESS]=raise:EDQUOT", "_SUCCESS", {0, 1, 2, 3}, set()),
    ],
)
def test_no_room_at_any_step(
    manifest: Path,
    unbroken: dict[str, bytes],
    tmp_path: Path,
    failpoint: str,
    place: str,
    done: set[int],
    undone: set[int],
) -> None:
    config = config_of(manifest, tmp_path / "out")
    with armed(failpoint), pytest.raises(StorageError) as caught:
        run_job(config)
    assert str(caught.value).startswith(f"{tmp_path}/out/{place}")
    assert "to be written, " in str(caught.value)
    assert " free); free some space and run the same command again" in str(caught.value)
    # Parts that waited behind the one that failed may still have found room.
    found = check_broken(tmp_path / "out")
    assert found >= done
    assert not found & undone
    assert "ERROR pipeline: " in (tmp_path / "out" / "_run.log").read_text()
    run_job(config)
    assert content(tmp_path / "out") == unbroken
