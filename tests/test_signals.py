"""SIGTERM and SIGINT: finished shards are written within the grace, a second signal ends at once, exit code 75."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.failpoints import VARIABLE
from pipeline.job import run_job
from tests.jobs import config_for, content, overrides_of, scenes_manifest, start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("signals")
    manifest = scenes_manifest(folder / "m.parquet", 64)
    config = config_for(manifest, folder / "unbroken", manifest={"shard_rows": 8}, loader={"batch_size": 4})
    run_job(config)
    return config


def begin(config: Config, output: Path, failpoints: str, grace: float) -> subprocess.Popen[str]:
    """Start the job and wait until its first part is at the armed failpoint."""
    overrides = [text for text in overrides_of(config) if not text.startswith("output.dir=")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, failpoints)
        process = start(*overrides, f"output.dir={output}", f"errors.grace_seconds={grace}")
    end = time.monotonic() + 60
    while not list(output.glob("_tmp-*")) and time.monotonic() < end:
        time.sleep(0.02)
    return process


def ended(process: subprocess.Popen[str], number: int) -> float:
    """Send the signal and wait for the end; seconds that it took."""
    began = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    return time.monotonic() - began


def finishes(config: Config, output: Path) -> None:
    process = start(
        *[text for text in overrides_of(config) if not text.startswith("output.dir=")], f"output.dir={output}"
    )
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert content(output) == content(Path(config.output.dir))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shard_that_is_finished_is_written_within_the_grace(unbroken: Config, tmp_path: Path, number: int) -> None:
    # The delay falls between the part's table and its file.
    process = begin(unbroken, tmp_path / "out", "part.written=delay:1.5", grace=30)
    assert not list((tmp_path / "out").glob("_commits/*.json"))
    assert ended(process, number) < 20
    assert list((tmp_path / "out").glob("_commits/*.json"))
    finishes(unbroken, tmp_path / "out")


def test_what_takes_longer_than_the_grace_is_dropped(unbroken: Config, tmp_path: Path) -> None:
    process = begin(unbroken, tmp_path / "out", "part.written=delay:300", grace=1)
    assert 0.9 < ended(process, signal.SIGTERM) < 10
    finishes(unbroken, tmp_path / "out")


def test_a_second_signal_ends_at_once(unbroken: Config, tmp_path: Path) -> None:
    process = begin(unbroken, tmp_path / "out", "part.written=delay:300", grace=300)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    assert ended(process, signal.SIGTERM) < 5
    assert not os.path.exists(tmp_path / "out" / "_SUCCESS")
