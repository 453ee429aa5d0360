"""Feeders: batches of other processes give the dataset of a loader in the job's own, and end with it."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import DecoderUnavailable, ModelError, StorageError
from pipeline.engine import feeders
from pipeline.engine.engine import Engine
from pipeline.engine.feeder_pool import FeederPool, FeederProcess
from pipeline.images.factory import open_decoders
from pipeline.job.main import run_job
from pipeline.report.load import report_of
from pipeline.storage.factory import open_storage
from tests.crashes import at
from tests.forks import forks
from tests.jobs import config_for, content, scene

# Brought by distributed.
psutil = pytest.importorskip("psutil")
ROWS = 70


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, images that come again, damaged ones and cells without any; the rows of a shard that all fail."""
    path = tmp_path_factory.mktemp("manifest") / "m.parquet"
    images = [scene(number % 50)[0] for number in range(ROWS)]
    for row in (3, 17, 41, *range(20, 30)):
        images[row] = images[row][: 50 + row]
    images[44] = None
    table = pa.table({"id": [f"row {n}" for n in range(ROWS)], "image": pa.array(images, pa.binary())})
    pq.write_table(table, path)
    return path


def config_with(manifest: Path, output: Path, count: int | None, **loader: object) -> Config:
    return config_for(
        manifest,
        output,
        manifest={"shard_rows": 10, "image": "image", "keep": []},
        loader={"batch_size": 4, "workers": 2, "feeders": count, **loader},
        errors={"max_fraction": 0.9},
    )


@pytest.fixture(scope="module")
def alone(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("alone") / "out"
    run_job(config_with(manifest, output, 0))
    return content(output)


@pytest.mark.parametrize(
    ("count", "isolation"), [(1, "process"), (3, "none"), pytest.param(3, "process", marks=pytest.mark.slow)]
)
def test_the_dataset_is_that_of_a_loader_in_the_job(
    manifest: Path, tmp_path: Path, alone: dict[str, bytes], count: int, isolation: str
) -> None:
    run_job(config_with(manifest, tmp_path / "out", count, isolation=isolation))
    assert content(tmp_path / "out") == alone
    report = report_of(open_storage(str(tmp_path / "out")))
    assert {"read", "decode", "encode"} <= set(report["stages"])
    assert ("peak_decoder_mib" in report["memory"]) == (isolation == "process")
    [worker] = report["workers"]
    # Imports of the feeders, of a second and more, are no work of the job.
    assert (worker["child_core_seconds"] > 0) == (isolation == "process")
    assert worker["own_core_seconds"] >= sum(worker["clocks"]["cores"].values())


def test_a_feeder_that_is_killed_ends_the_job_and_the_same_command_goes_on(
    manifest: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    config = at(config_with(manifest, tmp_path / "out", 2, isolation="none"), tmp_path / "out")
    child = forks().start("tests.forks:job", config, failpoints="rows=kill@4")
    assert child.wait() == 2
    assert "a feeder process was killed by signal 9" in child.said()
    assert "loader.feeders" in child.said()
    child = forks().start("tests.forks:job", config)
    assert child.wait() == 0, child.said()
    assert content(tmp_path / "out") == alone


def test_an_error_of_a_feeder_is_that_of_the_job(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "image": ["gs://bucket/a.jpg"]}), tmp_path / "m.parquet")
    config = config_with(tmp_path / "m.parquet", tmp_path / "out", 1, isolation="none")
    config = config.changed({"images.schemes": ["gs"], "parity.images": 1})
    with pytest.raises(StorageError, match="gs:// addresses cannot be read"):
        run_job(config)
    assert not _feeders_of(os.getpid())


def test_no_feeder_is_left_when_the_model_cannot_be_opened(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    spawn = FeederPool._spawn

    def noted(pool: FeederPool) -> FeederProcess:
        started.append(spawn(pool))
        return started[-1]

    monkeypatch.setattr(FeederPool, "_spawn", noted)
    config = config_with(manifest, tmp_path / "out", 2).changed({"model.name": str(tmp_path / "no model")})
    with pytest.raises(ModelError):
        run_job(config)
    assert len(started) == 2
    assert not _feeders_of(os.getpid())


@pytest.mark.parametrize("count", [0, 2])
def test_feeders_start_with_the_config_alone_instead_of_the_decoders_of_the_job(
    manifest: Path, tmp_path: Path, count: int
) -> None:
    config = config_with(manifest, tmp_path / "out", count, isolation="process")
    decoders = open_decoders(config)
    assert decoders is not None
    with closing(decoders), Engine(config, decoders=decoders) as engine:
        engine.start()
        _until(lambda: len(_feeders_of(os.getpid())) == count)
        _until(lambda: len(_children_of(os.getpid(), "pipeline.images.pool.worker")) == (0 if count else 2))
        assert "manifest" not in vars(engine)
    assert not _feeders_of(os.getpid())


@pytest.mark.slow
def test_a_batch_size_is_measured_beside_feeders(manifest: Path, tmp_path: Path) -> None:
    config = config_with(manifest, tmp_path / "out", 2, batch_size=0, isolation="none")
    config = config.changed({"manifest.shard_rows": 20, "backend.artifacts": str(tmp_path / "store")})
    report = run_job(config)
    assert report.fingerprints["batch_size"] in (8, 16)
    assert not _feeders_of(os.getpid())


@pytest.mark.slow
def test_a_feeder_without_room_for_its_batches_is_named(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("pipeline.engine.feeders.os.ftruncate", refused)
    with pytest.raises(DecoderUnavailable, match=r"no room for the batches of a feeder, .*File too large.*ulimit -f"):
        run_job(config_with(manifest, tmp_path / "out", 1))
    assert _feeders_of(os.getpid()) == []


def test_an_error_that_nobody_foresaw_has_its_traceback(manifest: Path, tmp_path: Path) -> None:
    config = config_with(manifest, tmp_path / "out", 1, isolation="none")
    child = forks().start("tests.forks:job", at(config, tmp_path / "out"), failpoints="read=raise:EIO@5")
    assert child.wait() == 1
    assert "a feeder process failed" in child.said()
    assert "in read_all" in child.said()


@pytest.mark.parametrize(
    ("how", "place"),
    [
        (signal.SIGKILL, "read=delay:0.3"),
        pytest.param(signal.SIGKILL, "plan.settled=delay:60", id="before their work is known"),
        pytest.param(signal.SIGTERM, "read=delay:0.3", marks=pytest.mark.slow),
    ],
)
def test_feeders_end_with_their_job(manifest: Path, tmp_path: Path, how: int, place: str) -> None:
    config = at(config_with(manifest, tmp_path / "out", 2, isolation="none"), tmp_path / "out")
    child = forks().start("tests.forks:job", config, failpoints=place)
    _until(lambda: len(_feeders_of(child.pid)) == 2)
    found = _feeders_of(child.pid)
    child.send(how)
    child.wait()
    _until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in found))


def _feeders_of(pid: int) -> list[Any]:
    return _children_of(pid, "pipeline.engine.feeder_process")


def _children_of(pid: int, module: str) -> list[Any]:
    return [each for each in psutil.Process(pid).children() if module in each.cmdline()]


def _until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("device", "given", "decoder", "workers", "wanted"),
    [
        ("cpu", None, "exact", 16, 0),
        ("cuda", None, "fast", 16, 4),
        ("cuda", None, "exact", 2, 1),
        ("cuda", 0, "exact", 16, 0),
        ("cpu", 3, "exact", 2, 3),
        ("cuda", None, "gpu", 8, 2),
        ("cuda", None, "gpu", 64, 4),
        ("cuda", 6, "gpu", 16, 6),
    ],
)
def test_a_gpu_has_a_feeder_for_four_cores(
    device: str, given: int | None, decoder: str, workers: int, wanted: int
) -> None:
    config = Config().changed({"loader.feeders": given, "images.decoder": decoder, "loader.workers": workers})
    assert feeders.count_feeders(config, torch.device(device)) == wanted
    for key in ("manifest.path", "manifest.root"):
        # Another process has not what is in the memory of this one.
        assert feeders.count_feeders(config.changed({key: "memory://photos"}), torch.device(device)) == 0
