"""Kill the job anywhere, run the same command again: the dataset is that of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.dataset import commits
from pipeline.dataset.plan import Plan, read
from pipeline.job.main import run_job
from pipeline.storage.factory import open_storage
from tests.forks import forks
from tests.jobs import config_for, content, overrides_of, scenes_manifest, start
from tests.siege import at

# PIPELINE_TEST_KILLS=50 for a longer siege.
KILLS = int(os.environ.get("PIPELINE_TEST_KILLS", "5"))
SHARDS = 12 * max(KILLS, 5)
ROWS = 4 * SHARDS


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("resume")
    manifest = scenes_manifest(folder / "m.parquet", ROWS)
    # The jobs in processes of their own decode in further ones, as is the default.
    loader = {"batch_size": 4, "isolation": "none"}
    config = config_for(manifest, folder / "unbroken", manifest={"shard_rows": 4}, loader=loader)
    run_job(config)
    return config


def other_output(config: Config, output: Path) -> Config:
    manifest, loader = vars(config.manifest), vars(config.loader)
    return config_for(Path(str(config.manifest.path)), output, manifest=dict(manifest), loader=dict(loader))


def plan_of(output: Path) -> Plan:
    plan = read(open_storage(str(output)))
    assert plan is not None
    return plan


def wait_for_commits(output: Path, count: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(list(output.glob("_commits/*.json"))) >= count:
            return
        time.sleep(0.005)
    raise TimeoutError(f"no {count} commits in {output}")


def wait_for_handlers(process: int, seconds: float = 60) -> None:
    """Until the process catches SIGTERM: before, Python has hardly begun."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
                return
        time.sleep(0.005)
    raise TimeoutError(f"process {process} catches no SIGTERM")


def test_killed_at_random_moments_and_run_again(unbroken: Config, tmp_path: Path) -> None:
    groups = at(unbroken, tmp_path / "out")
    groups["loader"]["isolation"] = "process"
    dice = random.Random(2026)
    kills = done = 0
    while kills < KILLS:
        child = forks().start("tests.forks:job", groups)
        # Somewhere within the next few shards, the writing of parts and commits included.
        wait_for_commits(tmp_path / "out", min(done + 1, SHARDS))
        child.alive(dice.uniform(0, 0.06))
        child.send(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        found = len(list((tmp_path / "out" / "_commits").glob("*.json")))
        assert found >= done, "a commit was lost"
        done = found
    child = forks().start("tests.forks:job", groups)
    assert child.wait() == 0, child.said()
    assert "are done already" in child.said()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


def test_a_signal_ends_with_75_and_the_next_run_goes_on(unbroken: Config, tmp_path: Path) -> None:
    config = other_output(unbroken, tmp_path / "out")
    process = start(*overrides_of(config))
    wait_for_commits(tmp_path / "out", 3)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    run_job(config)
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))


DAMAGES = {
    "a torn commit": lambda out: (out / "_commits" / "00003.json").write_bytes(b'{"shard": 3, "pa'),
    "an empty commit": lambda out: (out / "_commits" / "00003.json").write_bytes(b""),
    "a foreign commit": lambda out: (out / "_commits" / f"{SHARDS:05d}.json").write_bytes(
        (out / "_commits" / "00003.json").read_bytes()
    ),
    "a missing part": lambda out: next(out.glob("part-00003-*")).unlink(),
    "a truncated part": lambda out: truncate(next(out.glob("part-00003-*"))),
    "a flipped bit": lambda out: flip(next(out.glob("part-00003-*"))),
    "a missing commit": lambda out: (out / "_commits" / "00003.json").unlink(),
    "a left-over part": lambda out: (out / f"part-00003-{'0' * 16}.parquet").write_bytes(b"old"),
    "a left-over temporary file": lambda out: (out / f"_tmp-{socket.gethostname()}-999999999-ab").write_bytes(b"half"),
    "a damaged part whose commit is missing": lambda out: (
        flip(next(out.glob("part-00003-*"))),
        (out / "_commits" / "00003.json").unlink(),
    ),
    "no success marker": lambda out: (out / commits.SUCCESS).unlink(),
    "a stale success marker": lambda out: (out / commits.SUCCESS).write_text('{"rows": 1}'),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_counts_as_not_done_and_is_mended(unbroken: Config, tmp_path: Path, damage: str) -> None:
    import shutil

    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    DAMAGES[damage](out)
    report = run_job(other_output(unbroken, out))
    again = any(word in damage for word in ("torn", "empty", "missing", "truncated", "flipped"))
    assert report.rows == (4 if again else 0)
    said = "the shard is done again" in (out / "_run.log").read_text()
    assert said == (
        (again and "commit is missing" not in damage and damage != "a missing commit") or "foreign" in damage
    )
    assert content(out) == content(Path(unbroken.output.dir))


def test_a_dataset_that_lost_a_part_is_not_a_success_while_it_is_mended(unbroken: Config, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    next(out.glob("part-00003-*")).unlink()
    assert len(commits.find_done(open_storage(str(out)), plan_of(out))) == SHARDS - 1
    assert not (out / commits.SUCCESS).exists()
    assert not (out / "_commits" / "00003.json").exists()


def test_a_commit_that_points_out_of_the_dataset_removes_nothing_there(unbroken: Config, tmp_path: Path) -> None:
    import json
    import shutil

    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    (tmp_path / "precious").write_text("mine")
    commit = out / "_commits" / "00003.json"
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "part": "../precious"}))
    run_job(other_output(unbroken, out))
    assert (tmp_path / "precious").read_text() == "mine"
    assert content(out) == content(Path(unbroken.output.dir))


def test_a_commit_that_is_known_is_not_read_again_and_one_that_went_away_is_missed(
    unbroken: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
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
    (out / "_commits" / "00005.json").unlink()
    with pytest.raises(StorageError, match=r"00005\.json: missing or torn"):
        commits.read_commits(storage, plan_of(out), known=done)


def test_finalize_looks_at_the_parts(unbroken: Config, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
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
    process = start(*overrides_of(other_output(unbroken, tmp_path / "out")))
    wait_for_handlers(process.pid)
    time.sleep(seconds)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors
    assert "Traceback" not in errors


def test_a_terminal_that_went_away_does_not_end_the_job(unbroken: Config, tmp_path: Path) -> None:
    process = start(*overrides_of(other_output(unbroken, tmp_path / "out")))
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
