"""Jobs on several processes: the same dataset as of one, whoever dies, joins, differs or splits the work."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("distributed", reason="needs the extra dask")

import psutil
from distributed import Client

from pipeline.config.choices import CLUSTERS
from pipeline.config.schema import ClusterConfig, Config, LoaderConfig, ManifestConfig
from pipeline.config.validate import check, part_of
from pipeline.core import errors
from pipeline.core.errors import ClusterUnavailable, ManifestError, PipelineError, ShardsGivenUp, WorkerMismatch
from pipeline.core.machine import is_loopback
from pipeline.core.records import Shard
from pipeline.engine.loop import Job
from pipeline.job import unique_ids
from pipeline.job.cluster import cuda, dask_cluster, dask_worker, slurm
from pipeline.job.cluster.affinity import shares
from pipeline.job.cluster.dask_cluster import shards_at_once
from pipeline.job.cluster.dask_executor import DaskExecutor
from pipeline.job.cluster.kubernetes import pod_settings
from pipeline.job.cluster.part import Part
from pipeline.job.main import run_job
from pipeline.manifest.manifest import Manifest
from tests.conftest import ROOT
from tests.crashes import check_dataset
from tests.forks import forks
from tests.grid import ROWS, SHARDS, at, failpoints, grid, nine_shards, on, same, when_committed
from tests.jobs import config_for, overrides_of, scenes_manifest


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return nine_shards(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with grid(2) as client:
        yield client


def with_page(config: Config) -> Config:
    return replace(config, report=replace(config.report, html=True))


def ids_of(config: Config) -> list[str]:
    return pq.read_table(config.manifest.path)["id"].to_pylist()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(client: Client, single: Config, tmp_path: Path) -> None:
    report = run_job(on(client, with_page(at(single, tmp_path / "out"))))
    same(single, tmp_path / "out")
    assert (report.rows, report.images, report.counts["ok"]) == (ROWS, ROWS - 2, ROWS - 2)
    assert sum(member.rows for member in report.workers) == ROWS
    assert sum(member.shards for member in report.workers) == SHARDS
    assert all(member.pid != os.getpid() and member.cores == 1 for member in report.workers)
    assert {"read", "decode", "encode", "label", "write"} <= set(report.stages)
    stored = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert [row["pid"] for row in stored["workers"]] == [member.pid for member in report.workers]
    assert stored["machine"]["cores"] == len(report.workers)
    if len(report.workers) > 1:
        assert "Processes</h2>" in (tmp_path / "out" / "_report.html").read_text()


@pytest.mark.slow
def test_workers_take_the_backend_that_one_of_them_chose(client: Client, single: Config, tmp_path: Path) -> None:
    backend = replace(single.backend, name="auto", artifacts=str(tmp_path / "store"))
    report = run_job(on(client, replace(at(single, tmp_path / "out"), backend=backend)))
    assert (report.config["backend"]["name"], report.config["backend"]["precision"]) == ("torch", "fp32")
    made, wanted = (
        {path.name: path.read_bytes() for path in each.glob("*.parquet")}
        for each in (tmp_path / "out", Path(single.output.dir))
    )
    assert made == wanted


@pytest.mark.slow
def test_workers_report_every_size_of_batch_that_nobody_typed(client: Client, tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 520)
    config = config_for(manifest, tmp_path / "out", manifest={"shard_rows": 260})
    report = run_job(on(client, replace(config, loader=replace(Config().loader, isolation="none"))))
    assert (report.rows, report.batch_sizes) == (520, (64,))


@pytest.mark.slow
def test_workers_take_the_shards_that_the_driver_chose(client: Client, single: Config, tmp_path: Path) -> None:
    config = single.changed({"manifest.shard_rows": 0})
    run_job(at(config, tmp_path / "whole"))
    report = run_job(on(client, at(config, tmp_path / "out")))
    same(at(config, tmp_path / "whole"), tmp_path / "out")
    assert report.config["manifest"]["shard_rows"] == 4096


@pytest.mark.slow
def test_the_same_job_again_embeds_nothing(client: Client, single: Config, tmp_path: Path) -> None:
    config = on(client, at(single, tmp_path / "out"))
    run_job(config)
    report = run_job(config)
    assert (report.rows, report.resumed_rows, report.workers) == (0, ROWS, ())
    # A single process goes on with what a cluster began, and the other way round.
    (tmp_path / "out" / "_commits" / "00003.json").unlink()
    assert run_job(at(single, tmp_path / "out")).rows == 8
    same(single, tmp_path / "out")


@pytest.mark.slow
def test_the_plan_waits_for_ids_whose_check_takes_longer_than_the_workers(
    client: Client, single: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def late(manifest: Manifest) -> None:
        assert opened.wait(60)
        time.sleep(1)
        raise ManifestError("an id stands twice")

    def begin(executor: DaskExecutor, job: Job, write: Callable[[], None]) -> None:
        opened.set()
        begin_job(executor, job, write)

    begin_job = DaskExecutor.begin
    monkeypatch.setattr(DaskExecutor, "begin", begin)
    monkeypatch.setattr(unique_ids, "check_ids", late)
    with pytest.raises(ManifestError, match="an id stands twice"):
        run_job(on(client, at(single, tmp_path / "out")))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_run.log"}


@pytest.mark.slow
def test_all_ports_are_bound_to_loopback(client: Client) -> None:
    pids = [os.getpid(), *client.run(os.getpid).values()]
    found = {
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert found == {"127.0.0.1"}


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_job_as_it_is(client: Client, single: Config, tmp_path: Path) -> None:
    config = on(client, at(single, tmp_path / "out"))
    with (
        failpoints(client, "part.write=raise:ENOSPC"),
        pytest.raises(errors.StorageError, match="No space left") as caught,
    ):
        run_job(config)
    assert caught.value.exit_code == 1
    run_job(config)
    same(single, tmp_path / "out")


@pytest.mark.slow
def test_a_backend_that_is_too_far_from_fp32_leaves_nothing(client: Client, single: Config, tmp_path: Path) -> None:
    config = on(client, at(single, tmp_path / "out"))
    config = config.changed({"backend.precision": "bf16", "parity.lowest_cosine": {"bf16": 1.0}})
    with pytest.raises(errors.ParityError, match=r"parity\.lowest_cosine\.bf16 wants 1\.0") as caught:
        run_job(config)
    assert caught.value.exit_code == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_run.log"}


def spoil(version: str) -> str:
    """Let this process say that its decoder is of another version; what it was."""
    from pipeline.engine import prepare
    from pipeline.images.versions import fingerprint

    before = prepare.decoding
    prepare.decoding = lambda images, engine=None: {**fingerprint(images, engine), "library": version}  # type: ignore[assignment]
    return str(before)


def mend() -> None:
    from pipeline.engine import prepare
    from pipeline.images.versions import fingerprint

    prepare.decoding = fingerprint


@pytest.mark.slow
def test_a_worker_that_would_make_other_rows_is_refused(client: Client, single: Config, tmp_path: Path) -> None:
    config = on(client, at(single, tmp_path / "out"))
    run_job(config)
    for commit in (tmp_path / "out" / "_commits").iterdir():
        commit.unlink()
    odd = next(iter(client.nthreads()))
    client.run(spoil, "other 1.0", workers=[odd])
    try:
        with pytest.raises(PipelineError, match=r"images.library: there .*, now \"other 1.0\"") as caught:
            run_job(config)
    finally:
        client.run(mend, workers=[odd])
    # It may be the one that was asked first, and then it is the plan that differs.
    assert isinstance(caught.value, WorkerMismatch | errors.PlanMismatch)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_all_workers_die_and_the_next_ones_go_on(client: Client, single: Config, tmp_path: Path) -> None:
    output = tmp_path / "out"
    pids = set(client.run(os.getpid).values())

    def kill() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    with failpoints(client, "part.build=delay:0.2"):
        thread = when_committed(output, 2, kill)
        report = run_job(on(client, at(single, output)))
    thread.join()
    same(single, output)
    late = [member for member in report.workers if member.pid not in pids]
    assert late, "those that joined in mid-run got work"
    assert report.rows == ROWS


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_given_up_and_the_rest_is_done(
    client: Client, single: Config, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = on(client, with_page(at(single, output)), tries=1)
    with (
        failpoints(client, "storage.staged[part-00004]=kill"),
        pytest.raises(ShardsGivenUp, match=r"1 of 9 shards.*: 4\.") as caught,
    ):
        run_job(config)
    assert caught.value.exit_code == 3
    assert check_dataset(output, ids_of(single)) == ROWS - 8
    assert not (output / "_SUCCESS").exists()
    report = json.loads((output / "_report.json").read_text())
    assert (report["given_up"], report["exit_code"]) == ([4], 3)
    assert "4" in (output / "_report.html").read_text()
    client.wait_for_workers(1, timeout=300)
    again = run_job(config)
    assert (again.rows, again.given_up, again.exit_code) == (8, (), 0)
    same(single, output)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_make_the_whole(single: Config, tmp_path: Path, order: tuple[int, ...]) -> None:
    config = at(single, tmp_path / "out")
    for number in order:
        assert not (tmp_path / "out" / "_SUCCESS").exists()
        report = run_job(replace(config, cluster=ClusterConfig(part=f"{number}/3")))
    same(single, tmp_path / "out")
    assert report.rows == ROWS
    assert [member.name for member in report.workers] == ["1-of-3", "2-of-3", "3-of-3"]
    assert report.images == ROWS - 2
    assert json.loads((tmp_path / "out" / "_report.json").read_text())["rows"] == ROWS


@pytest.mark.slow
def test_parts_side_by_side_make_the_whole(single: Config, tmp_path: Path) -> None:
    config = at(single, tmp_path / "out")
    parts = [replace(config, cluster=ClusterConfig(part=f"{number}/3")) for number in (1, 2, 3)]
    children = [forks().start("tests.forks:job", asdict(part)) for part in parts]
    for child in children:
        assert child.wait() == 0, child.said()
    assert any("other parts do them" in child.said() for child in children) or all(
        "dataset:" in child.said() for child in children
    )
    same(single, tmp_path / "out")


@pytest.mark.slow
def test_no_process_outlives_a_cluster_that_was_told_to_end(single: Config, tmp_path: Path) -> None:
    overrides = [text for text in overrides_of(at(single, tmp_path / "out")) if "isolation" not in text]
    child = forks().start(
        "tests.forks:run_command",
        *overrides,
        *("cluster=local", "cluster.workers=1", f"prompts.cache={single.prompts.cache}"),
        failpoints="part.build=delay:0.3",
    )
    while not list((tmp_path / "out").glob("_commits/*.json")):
        assert child.alive(0.05), child.said()
    child.send(signal.SIGTERM)
    assert child.wait() == 75, child.said()
    assert "the same command goes on" in child.said()
    assert "Traceback" not in child.said()
    assert forks().strays() == []
    run_job(at(single, tmp_path / "out"))
    same(single, tmp_path / "out")


def test_every_error_survives_the_way_from_a_worker() -> None:
    problem = errors.Problem("a.b", 1, "must be 2")
    # The bench has kinds of its own, and so have tests beside this one; neither comes from a worker.
    for kind in [kind for kind in PipelineError.__subclasses__() if kind.__module__ == errors.__name__]:
        error = kind([problem]) if kind is errors.ConfigError else kind("what happened")
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), back.exit_code) == (kind, str(error), error.exit_code)


def test_every_cluster_has_a_module_and_a_config() -> None:
    for name in CLUSTERS:
        assert (ROOT / "conf" / "cluster" / f"{name}.yaml").is_file()
        if name != "inline":
            assert callable(import_module(f"pipeline.job.cluster.{name}").open_client)


def test_cores_are_shared_without_overlap_while_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 9})
    assert shares(2, 0) == [[4, 5], [6, 7]]
    assert shares(2, 1) == [[4], [5]]
    assert shares(3, 2) == [[4, 5], [6, 7], [9, 4]]
    assert shares(7, 0) == [[4], [5], [6], [7], [9], [4], [5]]


def test_short_shards_are_under_way_in_larger_numbers() -> None:
    config = Config(loader=LoaderConfig(batch_size=64, workers=2)).changed({"manifest.shard_rows": 4096})
    assert shards_at_once(config) == 3
    assert shards_at_once(replace(config, manifest=replace(config.manifest, shard_rows=16))) == 10
    assert shards_at_once(replace(config, manifest=replace(config.manifest, shard_rows=1))) == 32


def test_every_feeder_of_a_gpu_has_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "cores", lambda: 16)
    config = Config().changed({"cluster.name": "cuda", "manifest.shard_rows": 4096})
    assert shards_at_once(config) == 2 + 2 * 4
    assert shards_at_once(config, processes=2) == 2 + 2 * 2
    # Threads that are configured are those of each process.
    assert shards_at_once(config.changed({"loader.workers": 16}), processes=2) == 2 + 2 * 4
    assert shards_at_once(config.changed({"loader.feeders": 0})) == 3
    assert shards_at_once(config.changed({"loader.feeders": 3}), processes=2) == 2 + 2 * 3


@pytest.mark.parametrize("patience", [dask_worker.SHORTEST, dask_worker.STARTING])
def test_a_stream_does_not_end_while_feeders_start(patience: float) -> None:
    state = object.__new__(dask_worker.WorkerState)
    state._queue, state._closed, state.drained = queue.SimpleQueue(), False, False
    state._alive, state._patience = time.monotonic() - 2 * dask_worker.SHORTEST, patience
    first, second = (Shard(index=number, rows=1, pieces=()) for number in range(2))
    stream = state._stream(first)
    assert next(stream) == first
    timer = threading.Timer(0.1, lambda: state._queue.put(second))
    timer.start()
    assert next(stream, None) == (second if patience == dask_worker.STARTING else None)
    timer.join()
    state.drained = True
    assert list(stream) == []


@pytest.mark.parametrize(
    ("cluster", "other", "keys"),
    [
        ({"part": "17/16"}, {}, ["cluster.part"]),
        ({"part": "0/3"}, {}, ["cluster.part"]),
        ({"part": "half"}, {"batch_size": 0}, ["cluster.part", "loader.batch_size"]),
        ({"part": "1/2", "name": "local"}, {}, ["cluster.part"]),
        ({"part": "auto", "name": "local"}, {"batch_size": 0}, ["cluster.part", "loader.batch_size"]),
        ({"part": "automatic"}, {}, ["cluster.part"]),
        ({"name": "local", "max_workers": 4}, {}, ["cluster.max_workers"]),
        ({"name": "slurm", "host": "10.0.0.1", "workers": 8, "max_workers": 4}, {}, ["cluster.max_workers"]),
        ({"name": "address"}, {}, ["cluster.address"]),
        ({"address": "tcp://a:1"}, {}, ["cluster.address"]),
        ({"name": "address", "address": "tls://a:1"}, {}, ["cluster.address"]),
        ({"name": "local", "tls_ca": "a.pem"}, {}, ["cluster.tls_cert", "cluster.tls_key"]),
        ({"name": "slurm"}, {}, ["cluster.host"]),
        ({"name": "slurm", "host": "::1"}, {}, ["cluster.host"]),
        ({"name": "kubernetes", "kubernetes_env": ["A"]}, {}, ["cluster.kubernetes_env", "cluster.kubernetes_image"]),
        ({"name": "local", "tries": 0, "workers": -1}, {}, ["cluster.workers", "cluster.tries"]),
    ],
)
def test_everything_wrong_with_a_cluster_is_said_at_once(
    cluster: dict[str, object], other: dict[str, int], keys: list[str]
) -> None:
    config = Config(cluster=ClusterConfig(**cluster), loader=LoaderConfig(**other))  # type: ignore[arg-type]
    assert [problem.key for problem in check(config)] == keys


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("LOCALHOST", True), ("::1", True),
        ("[::1]", True), ("0.0.0.0", False), ("::", False), ("10.0.0.5", False), ("gpu-node-3", False), ("", False),
    ],
)  # fmt: skip
def test_an_address_of_this_machine_alone_is_known(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_a_part_has_every_nth_shard() -> None:
    share = Part.of(Config(cluster=ClusterConfig(part="3/16")))
    assert [shard for shard in range(40) if share.has(shard)] == [2, 18, 34]
    assert (share.lease, share.log) == ("_lease-3-of-16", "_parts/3-of-16.log")
    assert all(Part().has(shard) for shard in range(5))
    assert part_of("16/16") == (16, 16)


def test_visible_gpus_are_taken_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5d, 1")
    assert cuda.visible() == ["GPU-5d", "1"]
    with pytest.raises(ClusterUnavailable, match="3 GPUs are asked for, and 2 can be seen"):
        cuda.open_client(Config(cluster=ClusterConfig(name="cuda", workers=3)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cuda.visible() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7f,MIG-GPU-5d/1/0")
    assert cuda.chosen_gpus(0) == ["MIG-7f", "MIG-GPU-5d/1/0"]


def test_the_parts_of_a_divided_gpu_are_workers_instead_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        "#!/bin/sh\ncat <<END\n"
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1a)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-2b)\n"
        "  MIG 3g.40gb     Device  1: (UUID: MIG-3c)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-4d)\nEND\n"
    )
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda.chosen_gpus(0) == ["MIG-2b", "MIG-3c", "GPU-4d"]
    assert cuda.chosen_gpus(2) == ["MIG-2b", "MIG-3c"]


def test_a_slurm_job_is_asked_for_as_the_config_says() -> None:
    settings = ClusterConfig(
        name="slurm",
        host="127.0.0.1",
        cores=8,
        slurm_partition="gpu",
        slurm_account="lab",
        slurm_gpus=1,
        slurm_directives=["--qos=high"],
        slurm_prologue=["module load cuda"],
        slurm_python="/env/bin/python",
    )
    pytest.importorskip("dask_jobqueue")
    with slurm.make_cluster(Config(cluster=settings, manifest=ManifestConfig(shard_rows=4096))) as cluster:
        script = cluster.job_script()
    for line in ("-p gpu", "-A lab", "--cpus-per-task=8", "--gres=gpu:1", "--qos=high", "-t 04:00:00", "--mem=32G"):
        assert f"#SBATCH {line}" in script, script
    assert "module load cuda\n" in script
    assert "/env/bin/python -m distributed.cli.dask_worker tcp://127.0.0.1" in script
    # Two feeders of four cores with two shards each, one part that is written and one that is embedded.
    assert "--nthreads 6" in script
    assert "--memory-limit 0" in script


# The processes that dask-jobqueue's local jobs leave to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_the_number_of_jobs_of_a_queue_follows_the_work(
    single: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobqueue = pytest.importorskip("dask_jobqueue.local")
    adapted, asked = list[dict[str, int]](), list[int]()

    class Queue(jobqueue.LocalCluster):  # type: ignore[misc, name-defined]
        """Jobs are processes of this machine."""

        def __init__(self, **options: Any) -> None:
            for name in ("queue", "account", "job_cpu", "walltime"):
                options.pop(name)
            super().__init__(**options, interface=None)

        def adapt(self, **options: int) -> Any:
            adapted.append(options)
            return super().adapt(**options)

        def scale(self, n: int | None = None, jobs: int = 0) -> Any:
            asked.append(n or jobs)
            return super().scale(n, jobs)

    monkeypatch.setattr("dask_jobqueue.slurm.SLURMCluster", Queue)
    monkeypatch.setattr(slurm, "shards_at_once", lambda config: 2)
    monkeypatch.setenv("PIPELINE_FAILPOINTS", "part.build=delay:4")
    cluster = ClusterConfig(name="slurm", host="127.0.0.1", workers=1, max_workers=2)
    before = psutil.Process().children()
    report = run_job(replace(at(single, tmp_path / "out"), cluster=cluster))
    # Nobody else waits for the processes of these jobs.
    psutil.wait_procs([each for each in psutil.Process().children() if each not in before], timeout=20)
    same(single, tmp_path / "out")
    assert adapted == [{"minimum": 1, "maximum": 2}]
    # From one for the model to two for the shards.
    assert (asked[0], max(asked)) == (1, 2)
    assert report.rows == ROWS


def test_pods_are_asked_for_as_the_config_says() -> None:
    cluster = ClusterConfig(
        name="kubernetes", kubernetes_image="me/clip", workers=4, cores=8, kubernetes_gpus=1, kubernetes_env=["A=b=c"]
    )
    wanted = pod_settings(Config(cluster=cluster, manifest=ManifestConfig(shard_rows=4096)))
    assert (wanted["image"], wanted["n_workers"], wanted["env"]) == ("me/clip", 4, {"A": "b=c"})
    assert wanted["resources"]["limits"] == {"memory": "32Gi", "cpu": "8", "nvidia.com/gpu": "1"}


def test_an_address_without_a_scheduler_is_said(
    single: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ClusterConfig(name="address", address="tcp://127.0.0.1:1")
    monkeypatch.setattr("pipeline.job.cluster.address.TIMEOUT", 1)
    with pytest.raises(ClusterUnavailable, match=r"tcp://127\.0\.0\.1:1: no scheduler answers"):
        run_job(replace(at(single, tmp_path / "out"), cluster=cluster))
    with suppress(FileNotFoundError):
        assert not (tmp_path / "out" / "_plan.json").exists()
