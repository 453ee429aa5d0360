"""The ids of a dataset are checked once: a resume does not read them, and of parts that start together one does."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ClusterConfig, Config, ManifestConfig
from pipeline.core.concurrency import aside
from pipeline.core.errors import ManifestError, PlanMismatch
from pipeline.dataset import lease, plan
from pipeline.job import unique_ids
from pipeline.job.cluster.part import Part
from pipeline.job.main import run_job
from pipeline.job.unique_ids import UniqueIds
from pipeline.manifest import ids
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.models.hub import DEMO_FOLDER
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from tests.forks import Child, forks, job
from tests.jobs import StubEncoder, config_for, scenes_manifest, stub_backend
from tests.processes import wait_until
from tests.scale_data import plan_of

ROWS = 12


@pytest.fixture
def config(tmp_path: Path) -> Config:
    manifest = scenes_manifest(tmp_path / "m.parquet", ROWS)
    rows, model = {"shard_rows": 4}, {"name": str(DEMO_FOLDER)}
    return config_for(manifest, tmp_path / "out", manifest=rows, loader={"batch_size": 4}, model=model)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose ids are read."""
    found: list[str] = []
    batches = ids._batches

    def noted(manifest: Manifest, rows: int, position: int, file: Any) -> Any:
        found.append(file.url)
        return batches(manifest, rows, position, file)

    monkeypatch.setattr(ids, "_batches", noted)
    return found


def test_a_resume_does_not_read_the_ids_again(config: Config, tmp_path: Path, reads: list[str]) -> None:
    with stub_backend(StubEncoder):
        run_job(config)
        assert len(reads) == 1
        (tmp_path / "out" / "_SUCCESS").unlink()
        next((tmp_path / "out").glob("_commits/*")).unlink()
        assert run_job(config).rows == 4
    assert len(reads) == 1


def test_the_ids_of_a_changed_manifest_are_read(config: Config, tmp_path: Path, reads: list[str]) -> None:
    with stub_backend(StubEncoder):
        run_job(config)
        path = tmp_path / "m.parquet"
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
        with pytest.raises(PlanMismatch, match="what the manifest's files hold"):
            run_job(config)
        assert len(reads) == 2
        pq.write_table(table.take([*range(ROWS - 1), 0]), path)
        with pytest.raises(ManifestError, match="stands twice"):
            run_job(config)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"fingerprints": {"manifest": 7}}', b'{"fingerprints": {"mod'])
def test_a_plan_that_shows_nothing_is_no_check(
    config: Config, tmp_path: Path, reads: list[str], content: bytes
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_plan.json").write_bytes(content)
    with stub_backend(StubEncoder), pytest.raises(PlanMismatch):
        run_job(config)
    assert len(reads) == 1


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique_ids, "SHARED_ROWS", 0)
    monkeypatch.setattr(unique_ids, "INTERVAL", 0.01)


class Parts:
    """Parts of one job in threads, up to the plan; ``go`` lets the check end, with ``error`` if that is set."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storage: Storage = open_storage(config.output.dir)
        self.manifest = open_manifest(ManifestConfig(path=config.manifest.path, image="image"))
        self.checks: list[str] = []
        self.go, self.error = threading.Event(), list[Exception]()
        monkeypatch.setattr(unique_ids, "check_ids", self._check)

    def _check(self, manifest: Manifest) -> None:
        self.checks.append(threading.current_thread().name)
        assert self.go.wait(60)
        for error in self.error:
            raise error

    def begin(self, number: int) -> tuple[UniqueIds, Future[None]]:
        unique = UniqueIds(self.storage, Part(number, 3, whole=False), seconds=60)
        return unique, aside(lambda: unique.check(self.manifest), name=str(number))

    def write_plan(self) -> None:
        prints = {"manifest": self.manifest.fingerprint, "output": {}}
        plan.write_once(self.storage, plan_of(3, ROWS, 4, prints))


@pytest.fixture
def parts(config: Config, monkeypatch: pytest.MonkeyPatch, shared: None) -> Parts:
    return Parts(config, monkeypatch)


def test_of_three_parts_one_checks_and_the_others_wait_for_its_plan(
    parts: Parts, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO")
    begun = [parts.begin(number) for number in (1, 2, 3)]
    wait_until(lambda: caplog.text.count("the ids are checked by another part (process ") == 2)
    parts.go.set()
    wait_until(lambda: any(future.done() for _, future in begun))
    [(checking, _)] = [(unique, future) for unique, future in begun if future.done()]
    # Checked, but a gate may still refuse the job: nothing of it is in the output but the lease.
    assert {path.name for path in tmp_path.glob("out/*")} == {"_lease-ids"}
    parts.write_plan()
    for unique, future in begun:
        future.result(60)
        if unique is not checking:
            unique.release()
    assert len(parts.checks) == 1
    checking.release()
    assert {path.name for path in tmp_path.glob("out/*")} == {"_plan.json"}
    parts.begin(2)[1].result(60)
    assert len(parts.checks) == 1
    assert caplog.text.count("the ids are not read: they were checked before _plan.json was written") == 3


def test_parts_go_on_by_themselves_when_the_one_that_checks_is_refused(
    parts: Parts, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO")
    parts.error.append(ManifestError("an id stands twice"))
    begun = [parts.begin(number) for number in (1, 2, 3)]
    wait_until(lambda: caplog.text.count("the ids are checked by another part") == 2)
    parts.go.set()
    while begun:
        wait_until(lambda: any(future.done() for _, future in begun))
        unique, future = begun.pop([future.done() for _, future in begun].index(True))
        with unique, pytest.raises(ManifestError, match="an id stands twice"):
            future.result()
    assert sorted(parts.checks) == ["1", "2", "3"]
    assert not [*tmp_path.glob("out/*")]


def test_a_part_that_waits_ends_with_its_run(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with lease.take(parts.storage, seconds=60, folder=unique_ids.FOLDER):
        unique, future = parts.begin(1)
        wait_until(lambda: "the ids are checked by another part" in caplog.text)
        with unique:
            pass
        future.result(60)
    assert not parts.checks


@pytest.mark.parametrize("whole", [True, False])
def test_no_lease_is_taken_where_nobody_waits(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: bool
) -> None:
    parts.go.set()
    if not whole:
        monkeypatch.setattr(unique_ids, "SHARED_ROWS", ROWS)
    with lease.take(parts.storage, seconds=60, folder=unique_ids.FOLDER):
        UniqueIds(parts.storage, Part(1, 1 if whole else 2, whole=whole), seconds=60).check(parts.manifest)
    assert len(parts.checks) == 1


def part_of_job(groups: dict[str, dict[str, Any]]) -> int:
    """A part in a process of its own, for which every manifest is a large one."""
    unique_ids.SHARED_ROWS, unique_ids.INTERVAL, ids.IN_MEMORY_ROWS = 0, 0.05, 0
    return job(groups, stub=True)


def begin_parts(config: Config, first: str) -> list[Child]:
    """Two parts, of which the first one begins with the check; ``first`` are its failpoints."""
    groups = [asdict(replace(config, cluster=ClusterConfig(part=f"{number}/2"))) for number in (1, 2)]
    one = forks().start("tests.test_unique_ids:part_of_job", groups[0], failpoints=first)
    wait_until(lambda: list(Path(config.output.dir).glob("_lease-ids/*")))
    two = forks().start("tests.test_unique_ids:part_of_job", groups[1])
    wait_until(lambda: f"the ids are checked by another part (process {one.pid} of " in two.said())
    return [one, two]


def test_two_parts_that_start_together_check_the_ids_once(config: Config, tmp_path: Path) -> None:
    children = begin_parts(config, "ids.write=delay:3")
    assert [child.wait() for child in children] == [0, 0], [child.said() for child in children]
    assert ["sorting the hashes" in child.said() for child in children] == [True, False]
    assert ["the ids are not read" in child.said() for child in children] == [False, True]
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows"] == ROWS
    assert not [*tmp_path.glob("out/_lease*")]


def test_a_part_takes_the_check_over_from_one_that_was_killed(config: Config, tmp_path: Path) -> None:
    children = begin_parts(config, "ids.write=delay:3;ids.write=kill")
    assert [child.wait() for child in children] == [-9, 0], [child.said() for child in children]
    assert "the part that checked the ids is gone: process " in children[1].said()
    assert "sorting the hashes" in children[1].said()
    with stub_backend(StubEncoder):
        run_job(replace(config, cluster=ClusterConfig(part="1/2")))
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows"] == ROWS
    assert not [*tmp_path.glob("out/_lease*")]


def test_a_refused_job_leaves_nothing(config: Config, tmp_path: Path, shared: None) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pq.read_table(path).take([0, 1, 1]), path)
    with stub_backend(StubEncoder), pytest.raises(ManifestError, match="stands twice"):
        run_job(replace(config, cluster=ClusterConfig(part="1/2")))
    left = {str(each.relative_to(tmp_path / "out")) for each in tmp_path.glob("out/**/*") if each.is_file()}
    assert left == {"_parts/1-of-2.log"}
