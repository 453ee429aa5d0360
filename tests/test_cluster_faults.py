"""What may go wrong around a cluster: no worker for a moment, a scheduler that dies, a driver that is killed."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("distributed", reason="needs the extra dask")

from distributed import Client, KilledWorker
from distributed.security import Security

from pipeline import verify as verify_command
from pipeline.config.schema import ClusterConfig, Config
from pipeline.core.errors import ClusterUnavailable, OutputBusy, StorageError
from pipeline.core.failpoints import armed
from pipeline.dataset import lease
from pipeline.dataset.verify import verify
from pipeline.engine.engine import Engine
from pipeline.job.cluster import dask_executor, dask_worker
from pipeline.job.cluster.dask_cluster import open_cluster
from pipeline.job.cluster.job_spec import JobSpec
from pipeline.job.cluster.part import Part
from pipeline.job.main import run_job
from pipeline.storage.factory import open_storage
from tests.conftest import ROOT
from tests.forks import forks
from tests.grid import ROWS, at, failpoints, grid, nine_shards, on, same, when_committed
from tests.servers import self_signed


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return nine_shards(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with grid(1) as client:
        yield client


@pytest.mark.slow
def test_no_shard_is_lost_while_there_is_no_worker(
    client: Client, single: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver sees at once that the only worker is gone, before the next one is there.
    monkeypatch.setattr(dask_executor, "COUNTED", 0.0)
    [pid] = client.run(os.getpid).values()
    with failpoints(client, "part.build=delay:0.2"):
        thread = when_committed(tmp_path / "out", 2, lambda: os.kill(pid, signal.SIGKILL))
        report = run_job(on(client, at(single, tmp_path / "out")))
    thread.join()
    same(single, tmp_path / "out")
    # What the dead one had embedded and not committed is not counted.
    assert (report.rows, report.images) == (ROWS, ROWS - 2)


@pytest.mark.slow
def test_the_next_job_takes_back_what_a_killed_driver_left(client: Client, single: Config, tmp_path: Path) -> None:
    client.wait_for_workers(1, timeout=300)
    config = on(client, at(single, tmp_path / "killed"))
    with failpoints(client, "part.build=delay:0.3"):
        child = forks().start("tests.forks:job", asdict(config))
        while not list((tmp_path / "killed").glob("_commits/*.json")):
            assert child.alive(0.05), child.said()
        child.send(signal.SIGKILL)
        child.wait()
    assert client.run(residents) != {worker: 0 for worker in client.nthreads()}
    run_job(on(client, at(single, tmp_path / "out")))
    assert client.run(residents) == {worker: 0 for worker in client.nthreads()}
    same(single, tmp_path / "out")


def residents() -> int:
    from pipeline.job.cluster import dask_worker

    return len(dask_worker._STATES)


class Foreign:
    """A scheduler and workers as people start them."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._log = f"tcp://127.0.0.1:{port}", (folder / "dask.txt").open("w")
        self.started: list[subprocess.Popen[bytes]] = []
        self._start("dask_scheduler", "--host", "127.0.0.1", "--port", str(port))

    def join(self, failpoints: str = "", *options: str) -> None:
        """One more worker."""
        options = ("--nthreads", "2", "--memory-limit", "0", *(options or ("--no-nanny",)))
        self._start("dask_worker", self.address, *options, failpoints=failpoints)

    def _start(self, name: str, *options: str, failpoints: str = "") -> None:
        command = [sys.executable, "-m", f"distributed.cli.{name}", "--no-dashboard", *options]
        environment = {**os.environ, "PIPELINE_FAILPOINTS": failpoints}
        self.started.append(subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log, env=environment))

    def close(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._log.close()


@contextmanager
def foreign(folder: Path, failpoints: str = "") -> Iterator[Foreign]:
    """A cluster with one worker."""
    found = Foreign(folder)
    try:
        found.join(failpoints)
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_a_worker_that_joins_late_gets_its_share(single: Config, tmp_path: Path) -> None:
    # Slow enough to be caught up with.
    with foreign(tmp_path, "part.build=delay:3") as cluster:
        config = replace(at(single, tmp_path / "out"), cluster=ClusterConfig(name="address", address=cluster.address))
        thread = when_committed(tmp_path / "out", 1, cluster.join)
        report = run_job(config)
        thread.join()
    same(single, tmp_path / "out")
    shards = [member.shards for member in report.workers]
    assert (len(shards), sum(shards)) == (2, 9)
    assert min(shards) > 0


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--no-nanny", "--nanny"])
def test_a_worker_that_is_told_to_end_gives_its_shards_back(
    single: Config, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with foreign(tmp_path, "part.build=delay:0.5") as cluster:
        cluster.join("encode=delay:1", option)
        preempted = cluster.started[-1]
        config = replace(at(single, tmp_path / "out"), cluster=ClusterConfig(name="address", address=cluster.address))
        thread = when_committed(tmp_path / "out", 3, lambda: preempted.send_signal(signal.SIGTERM))
        report = run_job(config)
        thread.join()
        assert preempted.wait(30) is not None
    same(single, tmp_path / "out")
    assert (report.counts["ok"], report.given_up) == (ROWS - 2, ())
    # The report of its last shard may be lost, but not the shard.
    assert report.rows in (ROWS, ROWS - 8)
    assert "died" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while the model opens", "in mid-run"])
def test_a_job_whose_scheduler_is_killed_goes_on_with_the_same_command(
    single: Config, tmp_path: Path, moment: str
) -> None:
    output = tmp_path / "out"
    with foreign(tmp_path) as cluster:
        config = replace(at(single, output), cluster=ClusterConfig(name="address", address=cluster.address))
        # Else Dask looks for the scheduler that is gone for half a minute.
        soon = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s"}
        child = forks().start("tests.forks:job", asdict(config), environment=soon)
        while not (output / "_plan.json").exists() if moment == "in mid-run" else "scheduler at" not in child.said():
            assert child.alive(0.02), child.said()
        cluster.started[0].kill()
        assert child.wait() == 75, child.said()
    assert "the scheduler of the cluster is gone" in child.said()
    run_job(at(single, output))
    same(single, output)


def test_workers_that_another_scheduler_lost_with_a_shard_are_counted() -> None:
    assert dask_executor._deaths(KilledWorker("shard", None, 0)) == 1
    assert dask_executor._deaths(KilledWorker("shard", None, 3)) == 4
    assert dask_executor._deaths(ValueError()) == 1


def test_a_model_whose_job_ends_while_it_opens_is_closed_again(single: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(single) as engine:
        spec = JobSpec("token", single, engine.manifest, engine.checkpoint.fingerprint)
    go, closed = threading.Event(), threading.Event()
    monkeypatch.setattr(Engine, "open", lambda *_: go.wait(60))
    monkeypatch.setattr(Engine, "close", lambda _: closed.set())
    found = dask_worker.WorkerState(SimpleNamespace(name="w", address="", log_event=lambda *_: None), spec)
    found.close()
    go.set()
    assert closed.wait(60)


@pytest.mark.slow
def test_a_run_that_misses_a_shard_of_its_own_does_not_end_well(single: Config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    thread = when_committed(output, 3, (output / "_commits" / "00000.json").unlink)
    with armed("part.build=delay:0.05"), pytest.raises(StorageError, match="shard 0 has no commit any more"):
        run_job(at(single, output))
    thread.join()
    assert not (output / "_SUCCESS").exists()
    run_job(at(single, output))
    same(single, output)


@pytest.mark.parametrize(("name", "extra"), [("local", "dask"), ("slurm", "slurm")])
def test_a_machine_without_dask_is_told_what_to_install(
    single: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.job.cluster.dask_executor", None)
    config = replace(at(single, tmp_path / "out"), cluster=ClusterConfig(name=name))
    with pytest.raises(ClusterUnavailable, match=rf"cluster={name} needs Dask .*'\.\[{extra}\]'") as caught:
        run_job(config)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "_plan.json").exists()


# Dask leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_port_that_is_taken_is_said(single: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cluster = ClusterConfig(name="local", workers=1, port=taken.getsockname()[1])
        with pytest.raises(ClusterUnavailable, match="in use") as caught:
            run_job(replace(at(single, tmp_path / "out"), cluster=cluster))
    assert caught.value.exit_code == 2
    assert "died while it began" not in capsys.readouterr().err
    del caught
    gc.collect()


@pytest.mark.slow
def test_what_parts_did_is_told_once(single: Config, tmp_path: Path) -> None:
    config = at(single, tmp_path / "out")
    # The second finds nothing left to do, and the others' rows come from no earlier run.
    for number in (1, 1, 2, 3):
        report = run_job(replace(config, cluster=ClusterConfig(part=f"{number}/3")))
    assert (report.rows, report.resumed_rows, report.images) == (ROWS, 0, ROWS - 2)
    assert [member.shards for member in report.workers] == [3, 3, 3]


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        *((None, "1/2"), ("1/2", None), ("1/2", "2/3"), ("1/2", "1/2")),
        *((None, "auto"), ("auto", None), ("1/2", "auto"), ("auto", "1/2")),
    ],
)
def test_runs_that_split_the_work_otherwise_keep_one_another_out(
    single: Config, tmp_path: Path, held: str | None, wanted: str | None
) -> None:
    config = at(single, tmp_path / "out")
    storage = open_storage(config.output.dir)
    first, second = (replace(config, cluster=ClusterConfig(part=part)) for part in (held, wanted))
    with (
        lease.take(storage, seconds=60, folder=Part.of(first).lease),
        pytest.raises(OutputBusy, match="held by process") as caught,
    ):
        run_job(second)
    assert caught.value.exit_code == 75
    assert not (tmp_path / "out" / "_plan.json").exists()
    Part.of(second).refuse_others(storage)


def test_verify_sees_a_part_at_work_and_collects_nothing(
    single: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run_job(at(single, output))
    storage = open_storage(str(output))
    with lease.take(storage, seconds=60, folder=Part(1, 2, whole=False).lease):
        assert [(one.kind, one.damage) for one in verify(storage).findings] == [("lease", False)]
        assert verify_command.main([str(output), "--collect", "7d"]) == OutputBusy.exit_code
        assert "part 1/2 is held by process" in capsys.readouterr().err
    assert not verify(storage).findings


def test_parts_of_one_count_do_not_keep_one_another_out(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with lease.take(storage, seconds=60, folder=Part(1, 2, whole=False).lease):
        Part(2, 2, whole=False).refuse_others(storage)


@pytest.mark.slow
def test_over_tls_a_cluster_does_the_same_and_lets_nobody_else_in(single: Config, tmp_path: Path) -> None:
    own, other = (str(self_signed(tmp_path / f"{name}.pem", "localhost")) for name in ("own", "other"))
    cluster = ClusterConfig(name="local", workers=1, tls_ca=own, tls_cert=own, tls_key=own)
    config = replace(at(single, tmp_path / "out"), cluster=cluster)
    run_job(config)
    same(single, tmp_path / "out")
    stranger = Security(require_encryption=True, tls_ca_file=own, tls_client_cert=other, tls_client_key=other)
    with open_cluster(config) as client:
        address = client.scheduler.address
        assert {text.partition(":")[0] for text in (address, *client.nthreads())} == {"tls"}
        for security in (None, stranger):
            with pytest.raises((OSError, TypeError)):
                Client(address.replace("tls", "tls" if security else "tcp"), security=security, timeout="2s")
