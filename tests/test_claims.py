"""Shards that processes claim from one another (``cluster.part=auto``), and datasets that several of them make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ClusterConfig, Config
from pipeline.core.errors import LeaseLost, ShardsGivenUp, StorageError
from pipeline.core.processes import Process, this_process
from pipeline.core.records import Shard
from pipeline.dataset import lease
from pipeline.dataset.commits import Commit, commit_shared
from pipeline.dataset.verify import verify
from pipeline.job.cluster import claims
from pipeline.job.cluster.claims import FOLDER, TRIES, Claims
from pipeline.job.cluster.part import Part
from pipeline.job.main import run_job
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from tests.benchmarks import elastic
from tests.crashes import check_dataset, small_job
from tests.forks import forks
from tests.jobs import content

ELSEWHERE = Process(host="elsewhere", pid=1, user="", boot="b", space="s", started="1")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SHORTEST", 0.02)


def shards(count: int) -> list[Shard]:
    return [Shard(index=index, rows=2, pieces=()) for index in range(count)]


def commit(storage: Storage, shard: int) -> None:
    commit_shared(storage, Commit(shard=shard, part="part", rows=2, size=1, sha256="", counts={"ok": 2}))


def hold(
    storage: Storage, token: str, process: Process | None = None, renewed: str = "2026-01-01T00:00:00+00:00"
) -> str:
    """Write the lease of a process; return its folder."""
    holder = lease.Holder(token=token, process=process or this_process(), since=renewed, renewed=renewed, seconds=0.2)
    storage.write(f"_lease-auto-{token}/1.json", holder.to_json())
    return f"_lease-auto-{token}"


def opened(storage: Storage, token: str = "own", check: Callable[[], None] = lambda: None) -> Claims:
    return Claims(storage, hold(storage, token), 0.2, check)


class Renewing:
    """The ``check`` of a waiting process, at each call of which another one renews its lease; it ends at the last."""

    def __init__(self, storage: Storage, token: str, calls: int, ends: Callable[[], None]) -> None:
        self.storage, self.token, self.calls, self.ends = storage, token, calls, ends
        self.looked = 0

    def __call__(self) -> None:
        self.looked += 1
        hold(self.storage, self.token, ELSEWHERE, self.looked)
        if self.looked == self.calls:
            self.ends()


def numbers(round_: Iterator[Shard]) -> list[int]:
    return [shard.index for shard in round_]


def do(found: Claims, rounds: Iterator[Iterator[Shard]]) -> list[list[int]]:
    """Commit all that is left; return the shards of each round."""
    done = []
    for each in rounds:
        done.append([])
        for shard in each:
            commit(found.storage, shard.index)
            found.committed(shard.index)
            done[-1].append(shard.index)
    return done


def test_a_process_alone_does_every_shard_once(storage: Storage) -> None:
    with opened(storage) as found:
        assert [sorted(each) for each in do(found, found.rounds(shards(20)))] == [[*range(20)]]
    assert not storage.sizes(FOLDER)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_shards(storage: Storage, count: int) -> None:
    found = [opened(storage, f"process{number}") for number in range(count)]
    rounds = [each.rounds(shards(40)) for each in found]
    first = [next(each) for each in rounds]
    taken: list[list[int]] = [[] for _ in found]
    open_rounds = {*range(count)}
    while open_rounds:
        for number in sorted(open_rounds):
            shard = next(first[number], None)
            if shard is None:
                open_rounds.discard(number)
            else:
                taken[number].append(shard.index)
    assert sorted(chain(*taken)) == [*range(40)]
    assert all(len(each) > 1 for each in taken)
    for each, own in zip(found, taken, strict=True):
        for shard_number in own:
            commit(storage, shard_number)
            each.committed(shard_number)
    assert [list(each) for each in rounds] == [[]] * count
    assert not storage.sizes(FOLDER)


def test_the_first_round_may_be_empty(storage: Storage) -> None:
    for number in range(3):
        commit(storage, number)
    with opened(storage) as found:
        assert [numbers(each) for each in found.rounds(shards(3))] == [[]]


@pytest.mark.parametrize("state", ["released", "ended", "silent", "torn lease", "torn claim"])
def test_a_shard_of_a_process_that_is_gone_is_taken_over_alone(storage: Storage, state: str) -> None:
    gone = opened(storage, "gone")
    taken = next(gone.rounds(shards(8)))
    lost = {next(taken).index for _ in range(3)}
    if state == "released":
        lease.remove(storage, gone.lease)
    elif state == "ended":
        hold(storage, "gone", replace(this_process(), pid=2**22 + 1))
    elif state == "silent":
        hold(storage, "gone", ELSEWHERE)
    elif state == "torn lease":
        storage.write(f"{gone.lease}/1.json", b"{")
    else:
        for name in storage.sizes(FOLDER):
            storage.write(f"{FOLDER}/{name}", b"")
    with opened(storage) as found:
        done = do(found, found.rounds(shards(8)))
    assert sorted(done[0]) == sorted({*range(8)} - lost)
    assert sorted(chain(*done[1:])) == sorted(lost)
    assert all(len(each) == 1 for each in done[1:])
    assert not storage.sizes(FOLDER)


def test_a_shard_of_a_process_that_lives_is_left_to_it(storage: Storage) -> None:
    other = opened(storage, "other")
    held = next(next(other.rounds(shards(4)))).index

    def ends() -> None:
        commit(storage, held)
        other.committed(held)

    # It renews its lease while this one waits, and commits at last.
    renewing = Renewing(storage, "other", 60, ends)
    with opened(storage, check=renewing) as found:
        assert sorted(chain(*do(found, found.rounds(shards(4))))) == sorted({*range(4)} - {held})
    assert renewing.looked >= 60


def test_waiting_ends_when_the_run_must_stop(storage: Storage) -> None:
    other = opened(storage, "other")
    next(next(other.rounds(shards(1))))

    def lost() -> None:
        raise LeaseLost("taken over")

    found = opened(storage)
    rounds = found.rounds(shards(1))
    assert numbers(next(rounds)) == []
    found.check = lost
    with pytest.raises(LeaseLost):
        next(rounds)


def test_what_was_not_done_is_free_again_at_once(storage: Storage) -> None:
    with opened(storage, "interrupted") as interrupted:
        taken = next(interrupted.rounds(shards(6)))
        assert len({next(taken).index for _ in range(3)}) == 3
        assert len(storage.sizes(FOLDER)) == 3
    assert not storage.sizes(FOLDER)
    with opened(storage) as found:
        assert [sorted(each) for each in do(found, found.rounds(shards(6)))] == [[*range(6)]]


def test_a_shard_that_was_committed_meanwhile_is_not_done_again(storage: Storage) -> None:
    found = opened(storage)
    taken = next(found.rounds(shards(3)))
    first = next(taken).index
    for number in {*range(3)} - {first}:
        commit(storage, number)
    assert numbers(taken) == []
    assert [*storage.sizes(FOLDER)] == [f"{first:05d}-1.json"]


def test_a_shard_that_ends_every_process_is_given_up(storage: Storage) -> None:
    for number in range(TRIES):
        # A process that dies with the shard: it ends no claim.
        each = opened(storage, f"dies{number}")
        rounds = each.rounds(shards(2))
        if number == 0:
            taken = {shard.index: shard for shard in next(rounds)}
            assert {*taken} == {0, 1}
            commit(storage, 1)
            each.committed(1)
        else:
            assert numbers(next(rounds)) == []
            assert numbers(next(rounds)) == [0]
        lease.remove(storage, each.lease)
    with opened(storage) as found:
        assert do(found, found.rounds(shards(2))) == [[]]
        assert found.given_up == {0}
        found.clear()
    assert not storage.sizes(FOLDER)


def test_one_process_publishes_and_another_one_waits_for_it(storage: Storage) -> None:
    def ends() -> None:
        storage.write("_SUCCESS", b"{}")
        storage.remove(f"{FOLDER}/end-1.json")

    first = opened(storage, "first")
    assert first.end()
    renewing = Renewing(storage, "first", 20, ends)
    second = opened(storage, "second", renewing)
    assert not second.end()
    assert renewing.looked >= 20


@pytest.mark.parametrize("released", [True, False])
def test_another_process_publishes_if_the_first_one_is_gone(storage: Storage, released: bool) -> None:
    with opened(storage, "first") as first:
        assert first.end()
        if not released:
            # As a killed process leaves it.
            first._own.clear()
    lease.remove(storage, first.lease)
    second = opened(storage, "second")
    assert second.end()


def test_clearing_leaves_the_leases_of_live_processes(storage: Storage) -> None:
    found = opened(storage)
    hold(storage, "live")
    hold(storage, "dead", replace(this_process(), pid=2**22 + 1))
    storage.write(f"{FOLDER}/00003-1.json", b"")
    assert found.end()
    found.clear()
    assert {name for name in storage.folders() if name.startswith("_lease")} == {"_lease-auto-live", "_lease-auto-own"}
    assert [*storage.sizes(FOLDER)] == ["end-1.json"]


# Jobs.


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("claims")
    config = small_job(folder, report={"html": False}, output={"lease_seconds": 2.0})
    run_job(config)
    return config


def auto(config: Config, output: Path) -> Config:
    return replace(config.changed({"output.dir": str(output)}), cluster=ClusterConfig(part="auto"))


def rows_of(config: Config) -> list[str]:
    return list(pq.read_table(str(config.manifest.path))["id"].to_pylist())


def same(output: Path, config: Config) -> bool:
    def files(folder: Path) -> dict[str, bytes]:
        return {name: data for name, data in content(folder).items() if not name.startswith("_parts/")}

    return files(output) == files(Path(config.output.dir))


def test_one_process_makes_the_whole_dataset(job: Config, tmp_path: Path) -> None:
    report = run_job(auto(job, tmp_path / "out"))
    assert same(tmp_path / "out", job)
    assert (report.rows, report.exit_code) == (24, 0)
    again = run_job(auto(job, tmp_path / "out"))
    # The report is of all that the parts did.
    assert (again.rows, again.resumed_rows) == (24, 0)
    kept = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert (kept["rows"], kept["resumed_rows"]) == (24, 0)
    assert verify(open_storage(str(tmp_path / "out"))).state == "healthy"


def test_a_process_goes_on_where_a_killed_one_stopped(job: Config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed = forks().start("tests.forks:job", asdict(auto(job, output)), failpoints="part.published=kill@5")
    assert killed.wait() == -9
    rows = check_dataset(output, rows_of(job))
    assert 0 < rows < 24
    report = run_job(auto(job, output))
    assert same(output, job)
    # The killed one had written its figures behind each commit that the loop had seen.
    assert report.rows + report.resumed_rows == 24
    assert len(report.workers) == 2
    assert not [name for name in open_storage(str(output)).folders() if name.startswith("_lease")]


@pytest.mark.parametrize("moment", ["finalize.begin", "finalize.cleared", "report.written"])
def test_a_killed_publisher_leaves_the_end_to_the_next_process(job: Config, tmp_path: Path, moment: str) -> None:
    output = tmp_path / "out"
    killed = forks().start("tests.forks:job", asdict(auto(job, output)), failpoints=f"{moment}=kill")
    assert killed.wait() == -9
    assert (output / FOLDER / "end-1.json").exists()
    assert run_job(auto(job, output)).exit_code == 0
    assert same(output, job)
    assert verify(open_storage(str(output))).state == "healthy"


def test_shards_that_are_given_up_are_said(job: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    storage = open_storage(str(output))
    storage.write(f"{FOLDER}/00003-{TRIES}.json", json.dumps({"lease": "_lease-auto-gone"}).encode())
    with pytest.raises(ShardsGivenUp, match=r"all is committed but 1 of 12 shards.*: 3\.") as caught:
        run_job(auto(job, output))
    assert caught.value.exit_code == 3
    # The same command tries it again.
    assert run_job(auto(job, output)).exit_code == 0
    assert same(output, job)


@pytest.mark.parametrize("damage", ["torn commit", "short part", "no part"])
def test_a_damaged_shard_is_done_again_by_the_next_run(job: Config, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "out"
    run_job(auto(job, output))
    part = sorted(output.glob("part-*"))[4]
    if damage == "torn commit":
        (output / "_commits" / "00004.json").write_bytes(b"{")
    elif damage == "short part":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        part.unlink()
    with pytest.raises(StorageError, match="run the same command again"):
        run_job(auto(job, output))
    assert run_job(auto(job, output)).exit_code == 0
    assert same(output, job)


@pytest.mark.slow
def test_processes_side_by_side_make_the_whole_dataset(job: Config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    children = [
        forks().start("tests.forks:job", asdict(auto(job, output)), failpoints="encode=delay:0.2") for _ in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert same(output, job)
    assert sum("dataset:" in child.said() for child in children) >= 1
    report = json.loads((output / "_report.json").read_text())
    assert (report["rows"], report["resumed_rows"]) == (24, 0)
    assert sum(worker["shards"] for worker in report["workers"]) == 12


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], ["--s3"]])
def test_a_job_whose_machines_come_and_go_loses_nothing(where: list[str]) -> None:
    assert elastic.main(["--kills", "3", "--parts", "2", "--rows", "200", "--every", "2", *where]) == 0


def test_the_part_of_each_process_has_a_name_of_its_own(job: Config, tmp_path: Path) -> None:
    one, other = (Part.of(auto(job, tmp_path)) for _ in range(2))
    assert one.lease != other.lease
    assert one.log != other.log
    assert one.lease.startswith(claims.LEASE)
