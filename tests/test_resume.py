"""Kill the job anywhere, run the same command again: the dataset is that of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.dataset import commits
from pipeline.dataset.plan import Plan, read
from pipeline.job.main import run_job
from pipeline.storage.factory import open_storage
from tests.crashes import at
from tests.damage import commit_of, flip, part_of, truncate
from tests.forks import forks, run_command
from tests.jobs import config_for, content, overrides_of, scenes_manifest, start
from tests.processes import wait_until

# PIPELINE_TEST_KILLS=50 for a longer test.
KILLS = int(os.environ.get("PIPELINE_TEST_KILLS", "5"))
SHARDS = 8 * max(KILLS, 5)
ROWS = 4 * SHARDS


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("resume")
    manifest = scenes_manifest(folder / "m.parquet", ROWS)
    loader = {"batch_size": 4}
    config = config_for(manifest, folder / "unbroken", manifest={"shard_rows": 4}, loader=loader)
    run_job(config)
    return config


@pytest.fixture
def out(unbroken: Config, tmp_path: Path) -> Path:
    """A copy of the finished dataset, to be damaged."""
    return Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))


def plan_of(output: Path) -> Plan:
    plan = read(open_storage(str(output)))
    assert plan is not None
    return plan


def commits_in(output: Path) -> int:
    return len(list(output.glob("_commits/*.json")))


def catches_sigterm(process: int) -> bool:
    """Return true once the process has a handler; before, Python has hardly begun."""
    [line] = re.findall(r"^SigCgt:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(line, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again(unbroken: Config, tmp_path: Path) -> None:
    groups = at(unbroken, tmp_path / "out")
    groups["loader"]["isolation"] = "process"
    dice = random.Random(2026)
    kills = done = 0
    while kills < KILLS:
        child = forks().start("tests.forks:job", groups)
        # Somewhere within the next few shards, the writing of parts and commits included.
        wanted = min(done + 1, SHARDS)
        wait_until(lambda wanted=wanted: commits_in(tmp_path / "out") >= wanted)
        child.alive(dice.uniform(0, 0.06))
        child.send(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        found = commits_in(tmp_path / "out")
        assert found >= done, "a commit was lost"
        done = found
    child = forks().start("tests.forks:job", groups)
    assert child.wait() == 0, child.said()
    assert "are done already" in child.said()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


# The shard is done again, which the log says but where a commit is missing.
DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "torn commit": lambda out, n: commit_of(out, n).write_bytes(b'{"shard": 3, "pa'),
    "empty commit": lambda out, n: commit_of(out, n).write_bytes(b""),
    "missing part": lambda out, n: part_of(out, n).unlink(),
    "truncated part": lambda out, n: truncate(part_of(out, n)),
    "flipped bit": lambda out, n: flip(part_of(out, n)),
    "missing commit": lambda out, n: commit_of(out, n).unlink(),
    "damaged part, missing commit": lambda out, n: (flip(part_of(out, n)), commit_of(out, n).unlink()),
}


def test_damage_counts_as_not_done_and_is_mended(unbroken: Config, out: Path) -> None:
    for shard, damage in enumerate(DAMAGES.values(), 3):
        damage(out, shard)
    assert run_job(unbroken.changed({"output.dir": str(out)})).rows == 4 * len(DAMAGES)
    assert (out / "_run.log").read_text().count("the shard is done again") == len(DAMAGES) - 2
    assert content(out) == content(Path(unbroken.output.dir))


@pytest.mark.parametrize("marker", [None, '{"rows": 1}'], ids=["no success marker", "a stale one"])
def test_what_does_not_belong_is_removed_and_no_shard_is_done_again(
    unbroken: Config, out: Path, marker: str | None
) -> None:
    (out / commits.SUCCESS).unlink()
    if marker is not None:
        (out / commits.SUCCESS).write_text(marker)
    shutil.copy(commit_of(out, 3), commit_of(out, SHARDS))
    (out / f"part-00003-{'0' * 16}.parquet").write_bytes(b"old")
    (out / f"_tmp-{socket.gethostname()}-999999999-ab").write_bytes(b"half")
    assert run_job(unbroken.changed({"output.dir": str(out)})).rows == 0
    assert (out / "_run.log").read_text().count("the shard is done again") == 1
    assert content(out) == content(Path(unbroken.output.dir))


def test_a_dataset_that_lost_a_part_is_not_a_success_while_it_is_mended(out: Path) -> None:
    part_of(out, 3).unlink()
    assert len(commits.find_done(open_storage(str(out)), plan_of(out))) == SHARDS - 1
    assert not (out / commits.SUCCESS).exists()
    assert not commit_of(out, 3).exists()


def test_a_commit_that_points_out_of_the_dataset_removes_nothing_there(unbroken: Config, out: Path) -> None:
    (out.parent / "precious").write_text("mine")
    commit = commit_of(out, 3)
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "part": "../precious"}))
    run_job(unbroken.changed({"output.dir": str(out)}))
    assert (out.parent / "precious").read_text() == "mine"
    assert content(out) == content(Path(unbroken.output.dir))


def test_a_commit_that_is_known_is_not_read_again_and_one_that_went_away_is_missed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(str(out))
    done = commits.find_done(storage, plan_of(out))
    read, read_now = list[str](), storage.read

    def counted(name: str) -> bytes | None:
        read.append(name)
        return read_now(name)

    monkeypatch.setattr(storage, "read", counted)
    known = {shard: commit for shard, commit in done.items() if shard != 3}
    assert commits.read_commits(storage, plan_of(out), known=known) == [done[shard] for shard in range(SHARDS)]
    assert read == ["_commits/00003.json"]
    commit_of(out, 5).unlink()
    with pytest.raises(StorageError, match=r"00005\.json: missing or torn"):
        commits.read_commits(storage, plan_of(out), known=done)


def test_finalize_looks_at_the_parts(out: Path) -> None:
    storage = open_storage(str(out))
    settled = commits.read_commits(storage, plan_of(out))
    truncate(out / settled[5].part)
    with pytest.raises(StorageError, match="missing or torn"):
        commits.finalize(storage, plan_of(out), settled)


# Among the first imports, among those of PyTorch, and near the job's begin.
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.4), (signal.SIGINT, 0.9), (signal.SIGTERM, 1.6)]
)
def test_a_signal_during_start_up_ends_with_75(unbroken: Config, tmp_path: Path, number: int, seconds: float) -> None:
    process = start(*overrides_of(unbroken.changed({"output.dir": str(tmp_path / "out")})))
    wait_until(lambda: catches_sigterm(process.pid))
    time.sleep(seconds)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors
    assert "Traceback" not in errors


def run_without_a_reader(*overrides: str) -> int:
    """The command with a standard error that nobody reads; runs in a fork."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    return run_command(*overrides)


@pytest.mark.slow
def test_a_terminal_that_went_away_does_not_end_the_job(unbroken: Config, tmp_path: Path) -> None:
    overrides = overrides_of(unbroken.changed({"output.dir": str(tmp_path / "out")}))
    child = forks().start(
        "tests.test_resume:run_without_a_reader", *overrides, "loader.isolation=none", "report.html=false"
    )
    assert child.wait() == 0
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
