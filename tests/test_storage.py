"""Files appear whole or not at all, and a name that is created once has one winner; on disks and in stores."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from pipeline.core.errors import StorageError
from pipeline.core.failpoints import armed
from pipeline.storage import retry
from pipeline.storage.base import Staged, Storage, sha256
from pipeline.storage.factory import open_storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.object_store import ObjectStorage
from pipeline.storage.retry import is_transient, retried
from pipeline.storage.urls import explained, is_local, local_path, open_arrow, open_file, scheme_of
from tests.forks import forks
from tests.processes import wait_until
from tests.s3 import BUCKET, moto_server, pointed_at

BIG = 1 << 20


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url, pointed_at(url):
        yield


@pytest.fixture(params=["disk", "store", pytest.param("s3", marks=pytest.mark.compat("moto"))])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "disk":
        yield open_storage(str(tmp_path / "out"))
        return
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield open_storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
        return
    url = f"memory:///{uuid.uuid4().hex}"
    yield open_storage(url)
    fs = fsspec.filesystem("memory")
    if fs.exists(url):
        fs.rm(url, recursive=True)


def publish(storage: Storage, name: str, data: bytes, *, replace: bool) -> None:
    with storage.staged() as staged:
        staged.path.write_bytes(data)
        staged.publish(name, replace=replace)


def test_a_file_that_was_written_is_read(storage: Storage) -> None:
    storage.write("a.bin", b"one")
    assert storage.read("a.bin") == b"one"
    storage.write("a.bin", b"two")
    assert storage.read("a.bin") == b"two"


def test_a_file_that_is_not_there_is_none(storage: Storage) -> None:
    assert storage.read("nothing") is None
    assert storage.read("folder/nothing") is None
    assert storage.sizes() == storage.sizes("folder") == {}


def test_what_is_staged_appears_with_publish_and_not_before(storage: Storage) -> None:
    with storage.staged() as staged:
        staged.path.write_bytes(b"part")
        assert storage.read("part.bin") is None
        staged.publish("part.bin")
        assert storage.read("part.bin") == b"part"
    assert not staged.path.exists()
    assert storage.sizes() == {"part.bin": 4}


def test_what_is_never_published_leaves_nothing_behind(storage: Storage) -> None:
    def fail(staged: Staged) -> None:
        staged.path.write_bytes(b"half")
        raise RuntimeError("the writer died")

    with pytest.raises(RuntimeError, match="died"), storage.staged() as staged:
        fail(staged)
    assert not staged.path.exists()
    assert storage.sizes() == {}


def test_a_stage_that_was_never_written_is_no_error(storage: Storage) -> None:
    with storage.staged() as staged:
        assert not staged.path.exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_of_other_content_is_replaced(storage: Storage, replace: bool) -> None:
    """Names may hold digests: other content under such a name is damage."""
    publish(storage, "part.bin", b"damaged", replace=replace)
    publish(storage, "part.bin", b"sound", replace=replace)
    assert storage.read("part.bin") == b"sound"
    assert storage.sizes() == {"part.bin": 5}


def test_a_file_of_the_same_content_stays(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, "part.bin", b"sound", replace=False)
    before = (tmp_path / "part.bin").stat().st_ino
    publish(storage, "part.bin", b"sound", replace=False)
    assert (tmp_path / "part.bin").stat().st_ino == before


def test_digests_are_those_of_the_bytes(storage: Storage) -> None:
    storage.write("a.bin", b"x" * 3_000_000)
    assert storage.digest("a.bin") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert storage.digest("b.bin") is None


def test_folders_come_into_being_with_their_files(storage: Storage) -> None:
    storage.write("a/b/c.bin", b"deep")
    publish(storage, "d/e.bin", b"published", replace=False)
    assert storage.create_once("f/g.json", b"created")
    assert storage.read("a/b/c.bin") == b"deep"
    assert [storage.sizes(folder) for folder in ("", "a", "a/b", "d", "f")] == [
        {}, {}, {"c.bin": 4}, {"e.bin": 9}, {"g.json": 7},
    ]  # fmt: skip


def test_sizes_hold_the_files_of_one_folder(storage: Storage) -> None:
    for name, size in (("a", 0), ("b", 5), ("sub/c", 7), ("spaced name ü", 2)):
        storage.write(name, b"x" * size)
    assert storage.sizes() == {"a": 0, "b": 5, "spaced name ü": 2}
    assert storage.sizes("sub") == {"c": 7}


def test_a_file_can_be_removed_twice(storage: Storage) -> None:
    storage.write("a", b"x")
    storage.remove("a")
    storage.remove("a")
    assert storage.read("a") is None


def test_a_name_is_created_once(storage: Storage) -> None:
    assert storage.create_once("_commits/0.json", b"mine")
    assert not storage.create_once("_commits/0.json", b"yours")
    assert not storage.create_once("_commits/0.json", b"mine")
    assert storage.read("_commits/0.json") == b"mine"
    assert storage.sizes("_commits") == {"0.json": 4}


def race(count: int, work: Callable[[int], bool]) -> list[bool]:
    """The results of ``count`` threads that begin at the same moment."""
    gate = threading.Barrier(count)

    def run(number: int) -> bool:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_of_16_threads_one_creates_a_file_and_its_bytes_are_whole(storage: Storage) -> None:
    trials = 5 if storage.url.startswith("s3") else 20
    for trial in range(trials):
        name = f"_commits/{trial}.json"
        won = race(16, lambda number, name=name: storage.create_once(name, bytes([number]) * 50_000))  # type: ignore[misc]
        assert won.count(True) == 1
        assert storage.read(name) == bytes([won.index(True)]) * 50_000
    assert storage.sizes() == {}
    assert len(storage.sizes("_commits")) == trials


def create_many(url: str, number: int, names: int, go: str) -> int:
    storage = open_storage(url)
    wait_until(Path(go).exists)
    won = [storage.create_once(str(n), bytes([number]) * 20_000) for n in range(names)]
    Path(f"{go}-{number}").write_text(json.dumps(won))
    return 0


def test_of_4_processes_one_creates_a_file_and_its_bytes_are_whole(tmp_path: Path) -> None:
    names, url, go = 40, str(tmp_path / "out"), tmp_path / "go"
    children = [forks().start("tests.test_storage:create_many", url, number, names, str(go)) for number in range(4)]
    go.touch()
    assert [child.wait() for child in children] == [0] * 4
    won = {number: json.loads(Path(f"{go}-{number}").read_text()) for number in range(4)}
    storage = open_storage(url)
    for n in range(names):
        (winner,) = [number for number in won if won[number][n]]
        assert storage.read(str(n)) == bytes([winner]) * 20_000
    assert set(storage.sizes()) == {str(n) for n in range(names)}


def test_a_reader_of_a_disk_never_sees_a_torn_file(tmp_path: Path) -> None:
    # Stores make an upload visible when it is whole; the one in memory, chunk by chunk.
    storage = open_storage(str(tmp_path))
    sizes = {number: BIG + number for number in range(8)}
    storage.write("report", bytes([0]) * sizes[0])
    stop = threading.Event()

    def write() -> bool:
        for number in sizes:
            storage.write("report", bytes([number]) * sizes[number])
        stop.set()
        return True

    def read() -> bool:
        while not stop.is_set():
            data = storage.read("report")
            if data is None or data != data[:1] * sizes[data[0]]:
                return False
        return True

    assert race(3, lambda number: write() if number == 0 else read()) == [True] * 3


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that this process may read and not write."""
    folder = Path(tempfile.mkdtemp())
    (folder / "there").write_bytes(b"data")
    (folder / "secret").write_bytes(b"data")
    (folder / "secret").chmod(0)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        # Permissions do not hold root up; the effective user is another one for as long as the test takes.
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "work",
    [
        lambda storage: storage.write("new", b"x"),
        lambda storage: storage.write("there", b"x"),
        lambda storage: storage.create_once("new", b"x"),
        lambda storage: storage.create_once("folder/new", b"x"),
        lambda storage: storage.remove("there"),
        lambda storage: storage.read("secret"),
        lambda storage: open_storage(f"{storage.url}/new/folder").write("x", b"x"),
        lambda storage: open_file(f"{storage.url}/secret"),
        lambda storage: open_arrow(f"{storage.url}/secret"),
    ],
    ids=["write", "replace", "create", "create below", "remove", "read", "make", "open", "open for Arrow"],
)
def test_a_missing_permission_is_named_with_the_place_and_a_way_out(
    locked: Path, work: Callable[[Storage], object]
) -> None:
    with pytest.raises(StorageError) as caught:
        work(open_storage(str(locked)))
    message = str(caught.value)
    assert message.startswith(str(locked))
    assert re.search(r"Permission denied( \(about .* to be written\))?; check the permissions, or choose", message)


def test_a_read_only_folder_can_still_be_read(locked: Path) -> None:
    storage = open_storage(str(locked))
    assert storage.read("there") == b"data"
    assert storage.sizes()["there"] == 4


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.EPERM, "may lack hard links, which the commits need; choose another disk"),
        (errno.ENOSPC, "free some space and run the same command again, finished shards are kept"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "; choose another place, or have it mounted for writing"),
        (errno.EOPNOTSUPP, "may lack hard links, which the commits need; choose another disk"),
        (errno.EFBIG, "raise the limit on the size of files (ulimit -f)"),
        (errno.EIO, "Input/output error"),
    ],
    ids=errno.errorcode.get,
)
def test_what_the_system_says_of_a_disk_comes_with_the_place_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, part: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    storage = open_storage(str(tmp_path / "out"))
    for work in (lambda: storage.create_once("a", b"x"), lambda: publish(storage, "a", b"x", replace=False)):
        with pytest.raises(StorageError) as caught:
            work()
        assert str(caught.value).startswith(str(tmp_path / "out" / "a"))
        assert part in str(caught.value)
    assert storage.sizes() == {}


def test_a_full_disk_while_a_file_is_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="free some space"):
        open_storage(str(tmp_path)).write("report", b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_bytes_that_are_needed_and_free(tmp_path: Path, number: int) -> None:
    text = r"not/there: .* \(about 12\.35 MB to be written, [\d,.]+ (MB|bytes) free\); free some space and run"
    with pytest.raises(StorageError, match=text), explained(str(tmp_path / "not" / "there"), needed=12_345_678):
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(StorageError, match=r"s3://a/b: .* \(about 9 bytes to be written\)"),
        explained("s3://a/b", needed=9),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EFBIG])
def test_whatever_keeps_a_file_from_being_written_is_told_with_its_size(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(StorageError, match=r" \(about 12\.35 MB to be written\); "),
        explained(str(tmp_path), needed=12_345_678),
    ):
        raise OSError(number, os.strerror(number))


def test_a_listing_is_whole_while_others_write(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "out"))
    for number in range(200):
        storage.write(f"{number}", b"x")
    over = threading.Event()

    def renew() -> None:
        while not over.is_set():
            storage.write("again", b"y")

    writer = threading.Thread(target=renew)
    writer.start()
    try:
        for _ in range(200):
            assert len([name for name in storage.sizes() if name.isdigit()]) == 200
    finally:
        over.set()
        writer.join()


def test_a_link_whose_reply_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lose(path: Path, target: Path) -> None:
        link(path, target)
        raise FileExistsError(errno.EEXIST, "exists")

    storage = open_storage(str(tmp_path))
    monkeypatch.setattr(os, "link", lose)
    assert storage.create_once("a", b"x")
    assert not storage.create_once("a", b"x")


def test_a_left_over_with_an_impossible_process_number_is_swept(tmp_path: Path) -> None:
    stray = tmp_path / f"_tmp-{socket.gethostname()}-{'9' * 30}-ab"
    stray.write_bytes(b"half")
    open_storage(str(tmp_path)).sweep()
    assert not stray.exists()


def test_folders_are_listed(storage: Storage) -> None:
    storage.write("a", b"x")
    storage.write("within/b", b"x")
    assert storage.folders() == ["within"]


def test_what_is_no_fault_of_a_store_stays_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), explained("a"):
        print(1 / 0)


class Answered(Exception):
    """A stand-in for ClientError of botocore."""

    def __init__(self, status: int, code: str) -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def answer(status: int, code: str) -> OSError:
    error = OSError(errno.EIO, code)
    error.__cause__ = Answered(status, code)
    return error


def tries_of(error: Exception) -> int:
    tries = []

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        retried("place", fail)
    return len(tries)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (answer(500, "InternalError"), True),
        (answer(503, "SlowDown"), True),
        (answer(503, "anything"), True),
        (answer(409, "ConditionalRequestConflict"), True),
        (answer(429, "TooManyRequests"), True),
        (answer(400, "RequestTimeout"), True),
        (answer(404, "NoSuchUpload"), True),
        (answer(400, "InvalidArgument"), False),
        (answer(403, "AccessDenied"), False),
        (answer(404, "NoSuchKey"), False),
        (answer(412, "PreconditionFailed"), False),
        (answer(501, "NotImplemented"), False),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EBUSY, "busy"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (FileNotFoundError(), False),
        (FileExistsError(), False),
        (PermissionError(), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_only_what_may_pass_is_tried_again(error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    assert is_transient(error) == passes
    assert tries_of(error) == (retry.TRIES if passes else 1)


@pytest.mark.compat("botocore")
def test_faults_of_boto_that_may_pass_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    assert tries_of(EndpointConnectionError(endpoint_url="http://a")) == retry.TRIES
    assert tries_of(ReadTimeoutError(endpoint_url="http://a")) == retry.TRIES
    assert tries_of(NoCredentialsError()) == 1
    said = Answered(503, "SlowDown")
    assert tries_of(ClientError(said.response, "Put")) == retry.TRIES
    assert tries_of(ClientError(Answered(403, "AccessDenied").response, "Put")) == 1


def test_any_store_is_asked_again_and_knows_its_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    storage = open_storage(f"memory:///{uuid.uuid4().hex}")
    with armed("object.put=raise:EBUSY@1; object.created=raise:ETIMEDOUT@1"):
        storage.write("a", b"1")
        assert storage.create_once("b", b"2")
        assert not storage.create_once("b", b"3")
    assert (storage.read("a"), storage.read("b")) == (b"1", b"2")


def test_a_file_where_a_folder_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StorageError, match="out: "):
        open_storage(str(tmp_path / "out")).write("a", b"x")


@pytest.mark.parametrize("open_it", [open_file, open_arrow])
def test_a_file_is_opened_at_a_path_or_an_address(tmp_path: Path, open_it: Callable[[str], object]) -> None:
    (tmp_path / "a").write_bytes(b"data")
    url = f"memory:///{uuid.uuid4().hex}/a"
    fsspec.filesystem("memory").pipe_file(url, b"data")
    for address in (str(tmp_path / "a"), f"file://{tmp_path}/a", url):
        with open_it(address) as file:  # type: ignore[attr-defined]
            assert file.seek(1) in (1, None)
            assert file.read() == b"ata"
    fsspec.filesystem("memory").rm(url)
    for address in (str(tmp_path / "b"), url):
        with pytest.raises(StorageError, match="no such file or folder"):
            open_it(address)


def test_a_local_file_is_opened_for_arrow_without_python_in_between(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    with open_arrow(str(tmp_path / "a")) as file:
        assert isinstance(file, pa.OSFile)


def test_an_address_without_its_driver_is_explained() -> None:
    with pytest.raises(StorageError, match="install the fsspec driver"):
        open_file("oss://bucket/file")


@pytest.mark.parametrize(
    ("url", "scheme", "local", "path"),
    [
        ("/a/b", "", True, "/a/b"),
        ("a/b", "", True, "a/b"),
        ("file:///a/b", "file", True, "/a/b"),
        ("local:///a/b", "local", True, "/a/b"),
        ("s3://bucket/a", "s3", False, "bucket/a"),
        ("S3://bucket/a", "s3", False, "bucket/a"),
        ("memory://a", "memory", False, "a"),
        ("/a:b/c", "", True, "/a:b/c"),
    ],
)
def test_addresses_are_taken_apart(url: str, scheme: str, local: bool, path: str) -> None:
    assert (scheme_of(url), is_local(url), local_path(url)) == (scheme, local, path)
    if scheme != "s3":
        assert isinstance(open_storage(url), LocalStorage if local else ObjectStorage)


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("out")
    monkeypatch.chdir("/")
    storage.write("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage("~/out").write("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_a_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
