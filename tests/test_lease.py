"""The lease: one run works on an output; whoever is gone or silent is taken over; nobody replaces a commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import LeaseLost, OutputBusy, PipelineError, StorageError
from pipeline.core.processes import Process, is_gone, this_process
from pipeline.dataset import commits, plan
from pipeline.dataset.lease import Holder, Lease, leases, parse, take
from pipeline.job.main import run_job
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from tests.conftest import ROOT
from tests.forks import config_from, forks
from tests.jobs import config_for, content, overrides_of, scenes_manifest
from tests.processes import wait_until

# PIPELINE_TEST_ROUNDS=20 for a longer siege.
ROUNDS = int(os.environ.get("PIPELINE_TEST_ROUNDS", "1"))
ROWS, EMBEDDED = 160, 158
GONE = replace(this_process(), pid=2**22 + 1)
ELSEWHERE = replace(this_process(), host="elsewhere")


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out")


def plant(storage: Storage, process: Process, *, age: float = 0, seconds: float = 60, number: int = 1) -> Holder:
    """A lease as another process would hold it, renewed ``age`` seconds ago."""
    then = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="milliseconds")
    holder = Holder(token=f"theirs-{number}", process=process, since=then, renewed=then, seconds=seconds)
    storage.write(f"_lease/{number}.json", holder.to_json())
    return holder


def test_one_holds_the_other_is_told_who_and_since_when(storage: Storage) -> None:
    with take(storage, seconds=60):
        holder = parse(storage.read("_lease/1.json"))
        assert holder is not None
        with pytest.raises(OutputBusy) as caught:
            take(storage, seconds=60)
    said = str(caught.value)
    assert caught.value.exit_code == 75
    assert f"process {os.getpid()} of " in said
    assert f" on {this_process().host} since {holder.since}" in said
    assert "Wait until it ends, or stop it" in said
    assert not storage.sizes("_lease")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with take(storage, seconds=60):
        assert leases(storage) == {1: "_lease/1.json"}
    assert not list(tmp_path.iterdir())


def test_it_is_released_when_the_block_fails(storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), take(storage, seconds=60):
        raise KeyboardInterrupt
    take(storage, seconds=60)


def test_leases_of_two_places_keep_nobody_out(storage: Storage) -> None:
    with take(storage, seconds=60, folder="_lease-3-of-16"), take(storage, seconds=60, folder="_lease-4-of-16"):
        pass


def test_a_process_that_is_gone_is_taken_over_at_once(storage: Storage) -> None:
    plant(storage, GONE)
    with take(storage, seconds=60) as held:
        assert f"process {GONE.pid}" in held.taken_over
        assert "no more" in held.taken_over
        held.confirm()
    assert not storage.sizes("_lease")


def test_a_number_that_another_process_has_by_now_is_gone() -> None:
    here = this_process()
    assert not is_gone(here)
    assert is_gone(replace(here, started="1"))
    assert is_gone(GONE)
    for other in ("host", "boot", "space"):
        assert not is_gone(replace(GONE, **{other: "another"}))


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        process = replace(this_process(), pid=child.pid, started=started)
        assert not is_gone(process)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(process)
    finally:
        child.communicate()


def test_a_holder_elsewhere_is_believed_until_it_falls_silent(storage: Storage) -> None:
    plant(storage, ELSEWHERE, age=30)
    with pytest.raises(OutputBusy, match="on elsewhere since"):
        take(storage, seconds=60)


@pytest.mark.parametrize("age", [100, -100])
def test_a_silent_holder_is_taken_over(storage: Storage, age: float) -> None:
    plant(storage, ELSEWHERE, age=age, seconds=0.4)
    with take(storage, seconds=60) as held:
        assert "silent since" in held.taken_over


def test_a_holder_whose_clock_goes_wrong_is_not_taken_over(storage: Storage) -> None:
    plant(storage, ELSEWHERE, age=1000, seconds=1)
    later = threading.Timer(0.2, plant, [storage, ELSEWHERE], {"age": 999, "seconds": 1})
    later.start()
    with pytest.raises(OutputBusy):
        take(storage, seconds=60)
    later.join()


def test_a_torn_lease_is_watched_and_taken_over(storage: Storage) -> None:
    storage.write("_lease/4.json", b'{"token": "x", "proc')
    with take(storage, seconds=0.4) as held:
        assert "torn" in held.taken_over
        assert max(leases(storage)) == 5


def test_it_is_renewed(storage: Storage) -> None:
    with take(storage, seconds=0.3):
        first = parse(storage.read("_lease/1.json"))
        time.sleep(0.4)
        second = parse(storage.read("_lease/1.json"))
    assert first is not None
    assert second is not None
    assert first.since == second.since
    assert first.renewed < second.renewed


def test_who_lost_it_is_told_by_whom_and_does_not_renew_or_release(storage: Storage) -> None:
    with take(storage, seconds=0.3) as held:
        held.check()
        plant(storage, ELSEWHERE, number=2)
        time.sleep(0.3)
        with pytest.raises(LeaseLost, match=r"taken over by process \d+ of .* on elsewhere") as caught:
            held.check()
        with pytest.raises(LeaseLost):
            held.confirm()
    assert caught.value.exit_code == 75
    assert list(leases(storage)) == [2]


def test_a_lease_that_ended_and_began_anew_is_lost(storage: Storage) -> None:
    with take(storage, seconds=60) as held:
        plant(storage, ELSEWHERE, number=1)
        with pytest.raises(LeaseLost, match="elsewhere"):
            held.confirm()
        storage.remove("_lease/1.json")
        with pytest.raises(LeaseLost):
            held.confirm()


def test_a_storage_that_is_away_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    with take(storage, seconds=0.1) as held:

        def away(self: object, folder: str = "") -> dict[str, object]:
            raise StorageError("the disk is away")

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.storage.local.LocalStorage.entries", away)
            time.sleep(0.3)
            held.confirm()
        held.confirm()
    assert not list(tmp_path.iterdir())


def race(storage: Storage, count: int) -> tuple[list[Lease], int]:
    """``count`` threads take the lease at once; those who have it, and how many were refused."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Lease | None:
        barrier.wait()
        try:
            return take(storage, seconds=60)
        except OutputBusy:
            return None

    with ThreadPoolExecutor(count) as pool:
        taken = [held for held in pool.map(one, range(count)) if held is not None]
    return taken, count - len(taken)


@pytest.mark.parametrize("stale", [False, True])
def test_of_twenty_threads_one_takes_it(storage: Storage, stale: bool) -> None:
    if stale:
        plant(storage, GONE, number=7)
    taken, refused = race(storage, 20)
    assert (len(taken), refused) == (1, 19)
    assert list(leases(storage)) == ([7, 8] if stale else [1])


TAKER = """
import pathlib, sys, time
from pipeline.dataset.lease import take
from pipeline.core.errors import OutputBusy
from pipeline.storage.factory import open_storage
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{number}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
try:
    with take(open_storage(str(folder / "out")), seconds=60):
        print("took", flush=True)
        input()
except OutputBusy as error:
    print("busy", error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_one_takes_it(tmp_path: Path, stale: bool) -> None:
    count = 20 if ROUNDS > 2 else 6
    if stale:
        plant(open_storage(str(tmp_path / "out")), GONE)
    command = [sys.executable, "-c", TAKER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(count)]  # type: ignore[call-overload]
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == count)
    (tmp_path / "go").touch()
    first = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate("\n", timeout=30)
    assert sorted(line.split()[0] for line in first) == ["busy"] * (count - 1) + ["took"]
    assert not (tmp_path / "out" / "_lease").exists()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("lease")
    manifest = scenes_manifest(folder / "m.parquet", ROWS)
    config = config_for(manifest, folder / "unbroken", manifest={"shard_rows": 4}, loader={"batch_size": 4})
    run_job(config)
    return config


def overrides(config: Config) -> list[str]:
    return [*overrides_of(config), "loader.isolation=none", "report.html=false"]


def other_output(config: Config, output: Path) -> Config:
    return replace(config, output=replace(config.output, dir=str(output)))


def test_of_two_runs_at_once_one_works_and_one_says_who_holds_it(unbroken: Config, tmp_path: Path) -> None:
    config = other_output(unbroken, tmp_path / "out")
    # Both are there before the first is done.
    delay = "lease.taken=delay:2"
    processes = [forks().start("tests.forks:run_command", *overrides(config), failpoints=delay) for _ in range(2)]
    codes = [process.wait() for process in processes]
    errors = [process.said() for process in processes]
    assert sorted(codes) == [0, 75], errors
    holder, refused = processes[codes.index(0)], errors[codes.index(75)]
    assert f"held by process {holder.pid} of " in refused
    assert f"on {this_process().host} since {datetime.now(UTC):%Y-%m-}" in refused
    assert "Traceback" not in refused
    assert "held by" not in (tmp_path / "out" / "_run.log").read_text()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
    assert not (tmp_path / "out" / "_lease").exists()


def one_of_a_pair(groups: dict[str, dict[str, Any]], folder: str, number: int, rounds: int, alone: bool) -> int:
    """One of two processes that run the same job at the same time, again and again, and note what they say.

    With ``alone`` its lease keeps nobody out.
    """
    from pipeline.dataset import lease

    config = config_from(groups)
    if alone:
        lease.take = lambda storage, *, seconds, folder: take(storage, seconds=seconds, folder=f"_lease-{number}")  # type: ignore[assignment,misc]
    with (Path(folder) / f"said-{number}").open("w") as said:
        for turn in range(rounds):
            (Path(folder) / f"ready-{turn}-{number}").touch()
            wait_until(lambda turn=turn: (Path(folder) / f"ready-{turn}-{1 - number}").exists())  # type: ignore[misc]
            try:
                report = run_job(other_output(config, Path(folder) / f"out-{turn}"))
                line = [0, report.rows, report.images]
            except PipelineError as error:
                line = [error.exit_code, str(error), type(error).__name__]
            said.write(json.dumps(line) + "\n")
    return 0


def pairs(config: Config, folder: Path, *, alone: bool, failpoints: str = "") -> list[tuple[list[Any], list[Any]]]:
    """What both processes say of every round."""
    processes = [
        forks().start(
            "tests.test_lease:one_of_a_pair", asdict(config), str(folder), n, ROUNDS, alone, failpoints=failpoints
        )
        for n in range(2)
    ]
    for process in processes:
        assert process.wait(60 + 30 * ROUNDS) == 0, process.said()
    first, second = ([json.loads(line) for line in (folder / f"said-{n}").read_text().splitlines()] for n in range(2))
    assert len(first) == len(second) == ROUNDS
    return list(zip(first, second, strict=True))


@pytest.mark.skipif(ROUNDS < 2, reason="PIPELINE_TEST_ROUNDS=20 runs the job twice at once 20 times")
def test_again_and_again_one_of_two_runs_is_refused(unbroken: Config, tmp_path: Path) -> None:
    for turn, pair in enumerate(pairs(unbroken, tmp_path, alone=False)):
        done, refused = sorted(pair, key=lambda said: int(said[0]))
        assert done[:2] == [0, ROWS], pair
        assert (refused[0], refused[2]) == (75, "OutputBusy"), pair
        assert "held by process " in refused[1]
        assert content(tmp_path / f"out-{turn}") == content(Path(unbroken.output.dir))


def test_a_shard_that_two_runs_do_at_once_has_one_commit(unbroken: Config, tmp_path: Path) -> None:
    # Between a part and its commit there is time for the other's.
    rounds = pairs(unbroken, tmp_path, alone=True, failpoints="part.published=delay:0.02")
    twice = 0
    for turn, (first, second) in enumerate(rounds):
        assert (first[0], second[0]) == (0, 0), (first, second)
        # Every row was committed by one of them, though many were embedded by both.
        assert first[1] + second[1] == ROWS, (first, second)
        twice += first[2] + second[2] - EMBEDDED
        assert content(tmp_path / f"out-{turn}") == content(Path(unbroken.output.dir))
    print(f"{twice} images were embedded twice in {ROUNDS} rounds")
    assert twice > 0, "they never met"


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(max(1, ROUNDS // 5)))
def test_a_paused_run_that_was_taken_over_replaces_no_commit(unbroken: Config, tmp_path: Path, turn: int) -> None:
    config = other_output(unbroken, tmp_path / "out")
    commits = tmp_path / "out" / "_commits"
    slow = "part.published=delay:0.02"
    paused = forks().start("tests.forks:run_command", *overrides(config), "output.lease_seconds=1", failpoints=slow)
    try:
        wait_until(lambda: len(list(commits.glob("*.json"))) >= 3 + turn)
        paused.send(signal.SIGSTOP)
        done = len(list(commits.glob("*.json")))
        # The next one starts in less than the second for which the lease lasts.
        wait_until(lambda: time.time() - (tmp_path / "out" / "_lease").stat().st_mtime > 1.1)
        second = forks().start("tests.forks:run_command", *overrides(config), "output.lease_seconds=1")
        assert second.wait() == 0, second.said()
        assert f"took over from process {paused.pid} of" in second.said()
        before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in commits.iterdir()}
    finally:
        paused.send(signal.SIGCONT)
    code, errors = paused.wait(60), paused.said()
    assert done < 40, "it was paused too late"
    assert code == 75, errors
    assert "the lease that this run held since" in errors
    assert "Traceback" not in errors
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in commits.iterdir()} == before
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
    assert not (tmp_path / "out" / "_lease").exists()


def test_a_run_that_lost_its_lease_clears_nothing(unbroken: Config, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    (out / "_commits" / "00003.json").write_bytes(b"torn")
    (out / "part-00004-0000000000000000.parquet").write_bytes(b"not committed yet")
    storage = open_storage(str(out))
    wanted = plan.read(storage)
    assert wanted is not None
    before = content(out)
    with take(storage, seconds=60) as held:
        plant(storage, ELSEWHERE, number=2)
        with pytest.raises(LeaseLost):
            commits.find_done(storage, wanted, held.confirm)
        settled = commits.read_commits(open_storage(unbroken.output.dir), wanted)
        with pytest.raises(LeaseLost):
            commits.finalize(storage, wanted, settled, held.confirm)
    storage.remove("_lease/2.json")
    assert content(out) == before


def test_a_commit_that_was_mended_meanwhile_is_not_cleared(unbroken: Config, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    commit = out / "_commits" / "00003.json"
    good = commit.read_bytes()
    part = out / json.loads(good)["part"]
    part.rename(tmp_path / "part")
    wanted = plan.read(open_storage(str(out)))
    assert wanted is not None
    commit.write_bytes(b"torn")

    def mend() -> None:
        """What a run does that took the output over after this one had judged the commit."""
        if not part.exists():
            (tmp_path / "part").rename(part)
            commit.write_bytes(good)

    commits.find_done(open_storage(str(out)), wanted, mend)
    assert commit.read_bytes() == good
    assert part.exists()


def test_a_part_of_a_shard_without_a_commit_is_no_left_over(unbroken: Config, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken.output.dir, tmp_path / "out"))
    storage = open_storage(str(out))
    wanted = plan.read(storage)
    assert wanted is not None
    settled = commits.read_commits(storage, wanted)
    new, old, foreign = (out / f"part-{shard:05d}-{'0' * 16}.parquet" for shard in (3, 4, 99))
    for path in (new, old, foreign):
        path.write_bytes(b"x")
    commits.finalize(storage, wanted, settled, lambda: (out / "_commits" / "00003.json").unlink(missing_ok=True))
    assert new.exists()
    assert not old.exists()
    assert not foreign.exists()


def test_a_killed_run_is_taken_over_at_once_by_the_next(unbroken: Config, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "out"))
    plant(storage, GONE)
    run_job(other_output(unbroken, tmp_path / "out"))
    assert "took over from process" in (tmp_path / "out" / "_run.log").read_text()
    assert content(tmp_path / "out") == content(Path(unbroken.output.dir))
