"""SIGTERM and SIGINT: finished shards are written within the grace, a second signal ends at once, exit code 75."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.job.main import run_job
from tests.forks import Child, forks
from tests.jobs import config_for, content, overrides_of, scenes_manifest


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("signals")
    manifest = scenes_manifest(folder / "m.parquet", 64)
    loader = {"batch_size": 4}
    config = config_for(manifest, folder / "unbroken", manifest={"shard_rows": 8}, loader=loader)
    run_job(config)
    return config


def begin(config: Config, output: Path, failpoints: str, grace: float, isolation: str = "none") -> Child:
    """Start the job and wait until its first part is at the armed failpoint."""
    overrides = [text for text in overrides_of(config) if not text.startswith("output.dir=")]
    overrides += [f"output.dir={output}", f"errors.grace_seconds={grace}", f"loader.isolation={isolation}"]
    overrides.append("report.html=false")
    child = forks().start("tests.forks:run_command", *overrides, failpoints=failpoints)
    end = time.monotonic() + 60
    while not is_at_a_part(output):
        assert child.alive(0.01), child.said()
        assert time.monotonic() < end
    return child


def is_at_a_part(output: Path) -> bool:
    """Return true if there is a temporary file of Parquet, not only those of the lease and the plan."""
    for path in output.glob("_tmp-*"):
        with suppress(FileNotFoundError):
            if path.read_bytes().startswith(b"PAR1"):
                return True
    return False


def ended(child: Child, number: int) -> float:
    """Send the signal and wait for the end; seconds that it took."""
    began = time.monotonic()
    child.send(number)
    assert child.wait(60) == 75, child.said()
    assert "the same command goes on" in child.said()
    assert "Traceback" not in child.said()
    return time.monotonic() - began


def finishes(config: Config, output: Path) -> None:
    run_job(config.changed({"output.dir": str(output)}))
    assert content(output) == content(Path(config.output.dir))


@pytest.mark.parametrize(
    ("number", "isolation"), [(signal.SIGTERM, "process"), pytest.param(signal.SIGINT, "none", marks=pytest.mark.slow)]
)
def test_a_shard_that_is_finished_is_written_within_the_grace(
    unbroken: Config, tmp_path: Path, number: int, isolation: str
) -> None:
    # The delay falls between the part's table and its file.
    child = begin(unbroken, tmp_path / "out", "part.written=delay:1", grace=30, isolation=isolation)
    assert not list((tmp_path / "out").glob("_commits/*.json"))
    assert ended(child, number) < 20
    assert list((tmp_path / "out").glob("_commits/*.json"))
    finishes(unbroken, tmp_path / "out")


def test_what_takes_longer_than_the_grace_is_dropped(unbroken: Config, tmp_path: Path) -> None:
    child = begin(unbroken, tmp_path / "out", "part.written=delay:300", grace=1)
    assert 0.9 < ended(child, signal.SIGTERM) < 10
    finishes(unbroken, tmp_path / "out")


def test_a_second_signal_ends_at_once(unbroken: Config, tmp_path: Path) -> None:
    child = begin(unbroken, tmp_path / "out", "part.written=delay:300", grace=300)
    child.send(signal.SIGINT)
    assert child.alive(0.5)
    assert ended(child, signal.SIGTERM) < 5
    assert not os.path.exists(tmp_path / "out" / "_SUCCESS")
