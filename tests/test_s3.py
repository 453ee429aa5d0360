"""The dataset in S3: a real server process behind a proxy that cuts, delays and refuses requests."""

from __future__ import annotations

import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("moto", reason="needs the extra compat")
pytest.importorskip("s3fs", reason="needs the extra s3")

import s3fs

from pipeline.config.schema import Config
from pipeline.core.errors import LeaseLost, OutputBusy, StorageError
from pipeline.core.failpoints import armed
from pipeline.dataset import commits, lease, plan
from pipeline.job.main import run_job
from pipeline.storage import retry
from pipeline.storage.base import Storage
from pipeline.storage.factory import open_storage
from pipeline.storage.object_store import ObjectStorage
from pipeline.storage.urls import open_file
from pipeline.telemetry.logs import log_to
from pipeline.verify import main as verify
from tests.forks import forks
from tests.jobs import config_for, content, overrides_of, scenes_manifest
from tests.s3 import BUCKET, PASSING, Proxy, environment, moto_server, objects, pointed_at, proxy_to

pytestmark = pytest.mark.slow
OWN = {"_report.json", "_report.html", "_run.log"}
DATA = bytes(range(256)) * 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def module_proxy(server: str) -> Iterator[Proxy]:
    with proxy_to(server) as proxy, pointed_at(proxy.url):
        yield proxy


@pytest.fixture
def proxy(module_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.003)
    module_proxy.reset()
    return module_proxy


@pytest.fixture
def storage(proxy: Proxy) -> Storage:
    return open_storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def adopt(storage: Storage, name: str, data: bytes, *, replace: bool = False) -> None:
    with storage.staged() as staged:
        staged.path.write_bytes(data)
        staged.publish(name, replace=replace)


# Each leaves the storage with the object "there" and says what it got; the last is what it should get.
WORK: dict[str, tuple[str, Callable[[Storage], object], object]] = {
    "write": ("PUT", lambda s: s.write("there", DATA), None),
    "publish": ("PUT", lambda s: adopt(s, "part", DATA), None),
    "look before publishing": ("HEAD", lambda s: adopt(s, "part", DATA), None),
    "create": ("PUT", lambda s: s.create_once("new", DATA), True),
    "lose": ("PUT", lambda s: s.create_once("there", DATA), False),
    "read": ("GET", lambda s: s.read("there"), DATA),
    "digest": ("GET", lambda s: len(s.digest("there") or ""), 64),
    "list": ("GET", lambda s: s.sizes(), {"there": len(DATA)}),
    "remove": ("DELETE", lambda s: s.remove("there"), None),
}


# A reply without a body cannot be cut in its middle.
FAULTY = [(work, fault) for work in WORK for fault in PASSING if fault != "half" or WORK[work][0] == "GET"]


@pytest.mark.parametrize(("work", "fault"), FAULTY)
def test_a_fault_that_passes_is_tried_again(storage: Storage, proxy: Proxy, work: str, fault: str) -> None:
    method, run, wanted = WORK[work]
    storage.write("there", DATA)
    proxy.reset()
    proxy.inject(fault, method)
    assert run(storage) == wanted
    assert proxy.seen(method)[:2] == [fault, ""]
    proxy.reset()
    expected = {"there": DATA, "part": DATA, "new": DATA}
    for name in storage.sizes():
        assert storage.read(name) == expected[name]
    assert ("there" in storage.sizes()) == (work != "remove")


def test_the_writer_whose_reply_was_lost_knows_its_object_again(storage: Storage, proxy: Proxy) -> None:
    proxy.inject("lost", "PUT")
    assert storage.create_once("_commits/0.json", b"same")
    assert proxy.seen("PUT") == ["lost", ""]
    # Another writer of the same bytes whose first request never arrived is not the one.
    proxy.inject("cut", "PUT")
    assert not storage.create_once("_commits/0.json", b"same")
    assert storage.read("_commits/0.json") == b"same"


def test_two_writers_that_meet_are_asked_to_come_again(storage: Storage, proxy: Proxy) -> None:
    proxy.inject("409", "PUT", times=3)
    assert storage.create_once("a", b"x")
    assert proxy.seen("PUT") == ["409", "409", "409", ""]


def test_a_refusal_that_does_not_name_its_condition_is_a_lost_race(storage: Storage, proxy: Proxy) -> None:
    proxy.inject("412", "PUT")
    assert not storage.create_once("a", b"x")
    assert proxy.seen("PUT") == ["412"]


@pytest.mark.parametrize("work", [name for name, (_, _, wanted) in WORK.items() if wanted is not False])
def test_a_missing_permission_is_said_at_once(storage: Storage, proxy: Proxy, work: str) -> None:
    method, run, _ = WORK[work]
    storage.write("there", DATA)
    proxy.reset()
    proxy.inject("403", method, times=99)
    with pytest.raises(StorageError, match="check the permissions") as caught:
        run(storage)
    assert str(caught.value).startswith(storage.url)
    assert proxy.seen(method) == ["403"]


def test_a_store_that_stays_away_is_given_up_after_a_few_tries(
    storage: Storage, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.inject("503", "PUT", times=99)
    with caplog.at_level("INFO"), pytest.raises(StorageError, match="run the same command again"):
        storage.write("a", b"x")
    assert proxy.seen("PUT") == ["503"] * retry.TRIES
    assert len(caplog.messages) == retry.TRIES - 1
    assert f"{storage.url}/a: [Errno" in caplog.messages[0]


def test_nothing_is_tried_again_when_the_time_is_up(
    storage: Storage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "SECONDS", 0.0)
    proxy.inject("503", "GET", times=99)
    with pytest.raises(StorageError):
        storage.read("a")
    assert proxy.seen("GET") == ["503"]


def test_a_reply_that_never_comes_is_not_waited_for(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "READ_SECONDS", 0.3)
    storage = open_storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    storage.write("there", DATA)
    for work in ("write", "create", "read", "list"):
        method, run, wanted = WORK[work]
        proxy.inject("slow", method, seconds=1.5)
        began = time.monotonic()
        if work != "list":
            assert run(storage) == wanted
        else:
            assert set(run(storage)) == {"there", "new"}  # type: ignore[call-overload]
        assert time.monotonic() - began < 1.4


def test_a_slow_reply_is_waited_for(storage: Storage, proxy: Proxy) -> None:
    proxy.inject("slow", "PUT", seconds=0.5)
    assert storage.create_once("a", b"x")
    assert proxy.seen("PUT") == ["slow"]


def test_nobody_at_the_address_is_explained(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "TRIES", 2)
    with pointed_at("http://127.0.0.1:9"), pytest.raises(StorageError, match=r"Could not connect.*check the address"):
        open_storage(f"s3://{BUCKET}/a").read("b")


def test_a_bucket_that_is_not_there_is_named(proxy: Proxy) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/a/b: The specified bucket does not exist"):
        open_storage("s3://no-such-bucket/a").write("b", b"x")


def test_missing_credentials_are_explained(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"[Cc]redentials"):
        open_storage(f"s3://{BUCKET}/a").read("b")
    s3fs.S3FileSystem.clear_instance_cache()


def test_of_two_writers_one_creates_each_name_whatever_happens(proxy: Proxy) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    writers = [open_storage(url), open_storage(url)]
    proxy.throw_dice(0.3, seed=5)
    with ThreadPoolExecutor(2) as pool:
        for number in range(15):
            name = f"_commits/{number:05d}.json"
            # Two runs of one shard write the same bytes.
            won = list(pool.map(lambda storage, name=name: storage.create_once(name, b"same"), writers))  # type: ignore[misc]
            assert won.count(True) == 1
    proxy.reset()
    assert set(writers[0].sizes("_commits").values()) == {4}


def test_names_may_hold_any_characters(proxy: Proxy, server: str) -> None:
    prefix = f"{uuid.uuid4().hex}/a b+c%20d#e&f=ü'()"
    storage = open_storage(f"s3://{BUCKET}/{prefix}")
    storage.write("_report é+%41#.json", b"1")
    assert storage.create_once("_commits/00 0.json", b"2")
    assert storage.sizes() == {"_report é+%41#.json": 1}
    assert storage.read("_report é+%41#.json") == b"1"
    assert objects(server, prefix) == {"_report é+%41#.json": b"1", "_commits/00 0.json": b"2"}
    storage.remove("_report é+%41#.json")
    assert storage.sizes() == {}


def test_what_others_wrote_is_seen_at_once(storage: Storage, server: str) -> None:
    other = s3fs.S3FileSystem(endpoint_url=server, key="test", secret="test")
    root = storage.url.removeprefix("s3://")
    assert storage.sizes() == {}
    other.pipe_file(f"{root}/a", b"1")
    assert storage.sizes() == {"a": 1}
    other.pipe_file(f"{root}/a", b"22")
    with open_file(f"{storage.url}/a") as file:
        assert file.read() == b"22"
    other.pipe_file(f"{root}/a", b"333")
    assert storage.sizes() == {"a": 3}
    with open_file(f"{storage.url}/a") as file:
        assert file.read() == b"333"
    other.rm_file(f"{root}/a")
    assert storage.sizes() == {}
    assert storage.read("a") is None


def test_an_object_that_stands_for_a_folder_is_no_file(storage: Storage, server: str) -> None:
    other = s3fs.S3FileSystem(endpoint_url=server, key="test", secret="test")
    other.call_s3("put_object", Bucket=BUCKET, Key=storage.url.removeprefix(f"s3://{BUCKET}/") + "/", Body=b"")
    storage.write("a", b"1")
    assert storage.sizes() == {"a": 1}


def test_a_store_that_takes_no_log_hides_neither_the_error_nor_the_dataset(
    storage: Storage, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.inject("403", "PUT", "_run.log", times=2)
    with log_to(storage):
        storage.write("a", b"x")
    with pytest.raises(ZeroDivisionError), log_to(storage):
        print(1 / 0)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith(f"warning: {storage.url}/_run.log: ") for line in told)
    assert all(line.endswith("the log of this run is lost") for line in told)


def test_a_part_that_is_there_is_not_sent_again_and_a_damaged_one_is(storage: Storage, proxy: Proxy) -> None:
    adopt(storage, "part", DATA)
    adopt(storage, "part", DATA)
    assert proxy.seen("PUT") == [""]
    assert storage.proven("part") == hashlib.sha256(DATA).hexdigest()
    for damage in (b"short", DATA[:-1] + b"?"):
        storage.write("part", damage)
        adopt(storage, "part", DATA)
        assert storage.read("part") == DATA


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("uploads", "500"),
        ("uploads", "lost"),
        ("partNumber=2", "cut"),
        ("partNumber=2", "lost"),
        ("uploadId", "500"),
        ("uploadId", "lost"),
    ],
)
def test_a_large_file_is_visible_when_it_is_whole(
    storage: Storage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, step: str
) -> None:
    chunk = 5 << 20
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: chunk)
    monkeypatch.setattr("pipeline.storage.object_store.SINGLE_BYTES", chunk)
    data = random.Random(1).randbytes(2 * chunk + 100)
    proxy.inject(fault, "PUT" if step.startswith("part") else "POST", step)
    adopt(storage, "part", data)
    assert fault in proxy.seen("PUT" if step.startswith("part") else "POST", step)
    assert storage.sizes() == {"part": len(data)}
    monkeypatch.setattr("pipeline.storage.object_store.BLOCK", 1 << 20)
    proxy.inject("half", "GET")
    adopt(storage, "part", data)
    assert not proxy.rules[-1].times


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_forked_opens_its_own_connection(storage: Storage) -> None:
    storage.write("parent", b"1")
    child = os.fork()
    if child == 0:
        try:
            storage.write("child", b"2")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    started = time.monotonic()
    assert storage.sizes() == {"parent": 1, "child": 1}
    # The parent's connection still hears: it would time out after 30 s.
    assert time.monotonic() - started < 15


def test_the_users_own_settings_of_fsspec_stay(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 7, "user_agent_extra": "own"}})
    storage = open_storage(f"s3://{BUCKET}/a")
    assert isinstance(storage, ObjectStorage)
    assert storage.fs.config_kwargs["read_timeout"] == 7
    assert storage.fs.config_kwargs["user_agent_extra"] == "own"
    assert storage.fs.config_kwargs["retries"] == {"total_max_attempts": 1}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("s3") / "m.parquet", 30)


def job_of(manifest: Path, output: str) -> Config:
    return config_for(manifest, Path("x"), manifest={"shard_rows": 6}, output={"dir": output})


@pytest.fixture(scope="module")
def local(manifest: Path) -> dict[str, bytes]:
    run_job(job_of(manifest, str(manifest.parent / "local")))
    return content(manifest.parent / "local")


def stored(server: str, prefix: str) -> dict[str, bytes]:
    return {name: data for name, data in objects(server, prefix).items() if name not in OWN}


def test_with_one_request_of_five_failing_the_dataset_is_the_local_one(
    proxy: Proxy, server: str, manifest: Path, local: dict[str, bytes]
) -> None:
    prefix = uuid.uuid4().hex
    config = job_of(manifest, f"s3://{BUCKET}/{prefix}")
    proxy.throw_dice(0.2, seed=20)
    assert run_job(config).rows == 30
    assert stored(server, prefix) == local
    # Run again, there is nothing to do, and nothing changes.
    assert run_job(config).rows == 0
    assert stored(server, prefix) == local
    faults = [fault for _, _, fault in proxy.requests if fault]
    assert len(faults) > 0.1 * len(proxy.requests)
    assert set(faults) >= {*PASSING}


def test_a_run_that_broke_off_goes_on_in_s3(proxy: Proxy, server: str, manifest: Path, local: dict[str, bytes]) -> None:
    prefix = uuid.uuid4().hex
    config = job_of(manifest, f"s3://{BUCKET}/{prefix}")
    for place in (
        "part.write=raise:ENOSPC@3",
        "object.created[_commits]=raise:EIO@1",
        "object.put[_SUCCESS]=raise:EIO",
    ):
        with armed(place), pytest.raises(StorageError):
            run_job(config)
        assert "_SUCCESS" not in stored(server, prefix)
    run_job(config)
    assert stored(server, prefix) == local


def test_damage_in_s3_is_found_and_repaired(
    proxy: Proxy, server: str, manifest: Path, local: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = uuid.uuid4().hex
    output = f"s3://{BUCKET}/{prefix}"
    run_job(job_of(manifest, output))
    fs = s3fs.S3FileSystem(endpoint_url=server, key="test", secret="test", use_listings_cache=False)
    parts = sorted(name for name in stored(server, prefix) if name.startswith("part-"))
    fs.rm_file(f"{BUCKET}/{prefix}/{parts[1]}")
    fs.pipe_file(f"{BUCKET}/{prefix}/{parts[2]}", local[parts[2]][:-10])
    fs.pipe_file(f"{BUCKET}/{prefix}/{parts[3]}", bytes([*local[parts[3]][:-1], local[parts[3]][-1] ^ 1]))
    fs.pipe_file(f"{BUCKET}/{prefix}/_commits/00004.json", b'{"shard": 4, "pa')
    proxy.throw_dice(0.2, seed=4)
    assert verify([output]) == 1
    said = capsys.readouterr().out
    for kind in ("missing part", "wrong size", "wrong digest", "torn commit", "0 of 5", "1 of 5"):
        assert (kind in said) == (kind != "0 of 5"), said
    assert verify([output, "--repair"]) == 0
    assert stored(server, prefix) == local
    assert verify([output]) == 0


def test_a_resume_in_s3_reads_no_part_that_the_store_can_prove(
    proxy: Proxy, server: str, manifest: Path, local: dict[str, bytes]
) -> None:
    prefix = uuid.uuid4().hex
    storage = open_storage(f"s3://{BUCKET}/{prefix}")
    run_job(job_of(manifest, storage.url))
    wanted = plan.read(storage)
    assert wanted is not None
    proxy.reset()
    done = commits.find_done(storage, wanted, every_byte=False)
    assert len(done) == 5
    # Each part was written before its commit, as the listing shows.
    assert not [fault for verb in ("GET", "HEAD") for fault in proxy.seen(verb, "part-")]
    # The commits, the plan, and two lists.
    assert len(proxy.requests) == 5 + 3
    proxy.reset()
    assert commits.read_commits(storage, wanted, known=done) == [done[shard] for shard in range(5)]
    assert len(proxy.requests) == 1
    # What another tool wrote has no proof, and is read, whatever it holds.
    fs = s3fs.S3FileSystem(endpoint_url=server, key="test", secret="test")
    parts = sorted(name for name in local if name.startswith("part-"))
    # A listing shows whole seconds.
    time.sleep(1.1)
    # One that was sent again has the store's digest.
    with storage.staged() as staged:
        staged.path.write_bytes(local[parts[0]])
        staged.publish(parts[0], replace=True)
    fs.pipe_file(f"{BUCKET}/{prefix}/{parts[1]}", local[parts[1]])
    fs.pipe_file(f"{BUCKET}/{prefix}/{parts[3]}", bytes([*local[parts[3]][:-1], local[parts[3]][-1] ^ 1]))
    proxy.reset()
    assert set(commits.find_done(storage, wanted, every_byte=False)) == {0, 1, 2, 4}
    assert len(proxy.seen("HEAD", parts[0])) == 1
    assert {path.rsplit("/", 1)[1] for verb, path, _ in proxy.requests if verb == "GET" and "/part-" in path} == {
        parts[1],
        parts[3],
    }


def test_a_store_that_must_not_be_given_checksums_is_given_none(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    s3fs.S3FileSystem.clear_instance_cache()
    storage = open_storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    adopt(storage, "part", DATA)
    assert storage.proven("part") is None
    assert storage.digest("part") == hashlib.sha256(DATA).hexdigest()
    s3fs.S3FileSystem.clear_instance_cache()


def test_of_many_runs_in_s3_one_gets_the_lease_and_a_silent_one_is_taken_over(storage: Storage, proxy: Proxy) -> None:
    def attempt(_: int) -> lease.Lease | None:
        try:
            return lease.take(storage, seconds=60)
        except OutputBusy:
            return None

    proxy.throw_dice(0.2, seed=7)
    with ThreadPoolExecutor(8) as pool:
        held = [found for found in pool.map(attempt, range(8)) if found is not None]
    assert len(held) == 1
    with held[0]:
        held[0].confirm()
        (name,) = lease.leases(storage).values()
        holder = lease.parse(storage.read(name))
        assert holder is not None
        # A run on a machine that went silent a while ago.
        gone = replace(holder, process=replace(holder.process, host="elsewhere"), renewed=holder.since, seconds=0.2)
        storage.write(name, gone.to_json())
        time.sleep(0.3)
        with ThreadPoolExecutor(8) as pool:
            new = [found for found in pool.map(attempt, range(8)) if found is not None]
        assert len(new) == 1
        assert "elsewhere" in new[0].taken_over
        with pytest.raises(LeaseLost, match="was taken over by"):
            held[0].confirm()
        with new[0]:
            new[0].confirm()
    assert not lease.leases(storage)


def test_the_command_reads_its_manifest_from_s3_and_writes_there(proxy: Proxy, server: str, manifest: Path) -> None:
    prefix = uuid.uuid4().hex
    fs = s3fs.S3FileSystem(endpoint_url=server, key="test", secret="test")
    fs.put_file(str(manifest), f"{BUCKET}/{prefix}/m.parquet")
    config = config_for(
        manifest,
        Path("x"),
        manifest={"path": f"s3://{BUCKET}/{prefix}/m.parquet"},
        output={"dir": f"s3://{BUCKET}/{prefix}/out"},
    )
    proxy.inject("503", "GET", "m.parquet")
    proxy.inject("half", "GET", "part-00000")
    proxy.inject("lost", "PUT", "_plan.json")
    proxy.inject("cut", "PUT", "_commits")
    child = forks().start("tests.forks:run_command", *overrides_of(config), environment=environment(proxy.url))
    assert child.wait() == 0, child.said()
    found = objects(server, f"{prefix}/out")
    assert {"_plan.json", "_SUCCESS", "_report.json", "_report.html", "_run.log"} <= set(found)
    assert not any(rule.times for rule in proxy.rules)
    parts = [pq.read_table(pa.BufferReader(found[name])) for name in sorted(found) if name.startswith("part-")]
    ids = pa.concat_tables(parts)["id"].to_pylist()
    assert ids == pq.read_table(manifest)["id"].to_pylist()
