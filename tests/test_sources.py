"""Reading encoded bytes: where a reference leads, and what is refused."""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.core.errors import StorageError
from pipeline.core.records import Failure, ImageRef
from pipeline.images.sources import beneath, spans
from pipeline.images.sources import source as sources
from pipeline.images.sources.source import Source
from pipeline.images.sources.spans import Member, Spans
from tests.servers import answer, serve

BYTES = bytes(range(100))
LIMIT = 1000
PACKAGES = "site-packages"


@pytest.fixture(params=["by the kernel", "by its name"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with one file in it and one beside it; in both ways of keeping a path within it."""
    if request.param == "by its name":
        by_name(monkeypatch)
    return make_root(tmp_path)


def make_root(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "folder").mkdir(parents=True)
    (root / "a.jpg").write_bytes(BYTES)
    (root / "folder" / "b c.jpg").write_bytes(BYTES[::-1])
    (tmp_path / "secret.jpg").write_bytes(BYTES)
    (tmp_path / "photos-too").mkdir()
    (tmp_path / "photos-too" / "a.jpg").write_bytes(BYTES)
    return root


def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as on a system without openat2."""
    monkeypatch.setattr(beneath.Folder, "read", lambda *arguments: None)


def read(root: Path | str, path: str | None, data: bytes | None = None) -> bytes | Failure:
    return Source(root=str(root), max_bytes=LIMIT).read(ImageRef(id=1, path=path, data=data))


def status(root: Path | str, path: str | None, data: bytes | None = None) -> str:
    result = read(root, path, data)
    assert isinstance(result, Failure), f"{path!r} was read"
    assert result.error
    return result.status


def test_a_relative_path_starts_at_the_root(root: Path) -> None:
    assert read(root, "a.jpg") == BYTES
    assert read(root, "folder/b c.jpg") == BYTES[::-1]
    assert read(root, "folder/../a.jpg") == BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="openat2 is a call of Linux")
def test_the_kernel_keeps_ordinary_paths_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(tmp_path)
    (root / "inner.jpg").symlink_to("a.jpg")
    (root.parent / "alias").symlink_to(root)
    calls = []
    monkeypatch.setattr(Source, "_read_anywhere", lambda self, path, *range: calls.append(path) or b"slow")
    folder = beneath.Folder(str(root), str(root.parent / "alias"))
    inside = ["a.jpg", "./a.jpg", "folder/../a.jpg", "inner.jpg", f"{root}/a.jpg", f"{root.parent}/alias/a.jpg"]
    outside = [
        "../secret.jpg",
        "folder/../../secret.jpg",
        str(root.parent / "secret.jpg"),
        "file:a.jpg",
        "a\0.jpg",
        "no",
    ]
    if beneath.Folder.read.__name__ == "read":
        assert [folder.read(path, 0, None, LIMIT) for path in inside] == [BYTES] * len(inside)
        assert [folder.read("a.jpg", *piece, LIMIT) for piece in ((5, 9), (90, 200))] == [BYTES[5:9], BYTES[90:]]
        assert folder.read("a.jpg", 0, None, len(BYTES) - 1) is None
        assert folder.read("a.jpg", 0, 10**6, LIMIT) is None
    assert [folder.read(path, 0, None, LIMIT) for path in outside] == [None] * len(outside)
    assert read(root, "../secret.jpg") == b"slow"
    assert calls == ["../secret.jpg"]


def test_an_absolute_path_inside_the_root_is_fine(root: Path) -> None:
    assert read(root, str(root / "a.jpg")) == BYTES
    assert read(root, f"file://{root}/a.jpg") == BYTES
    assert read(root, f"FILE://{root}/a.jpg") == BYTES
    assert read(f"file://{root}", "a.jpg") == BYTES


def test_a_relative_root_is_one_of_the_working_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert read("photos", "a.jpg") == BYTES
    assert status("photos", "../secret.jpg") == "outside_root"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "folder/../../secret.jpg",
        "../photos-too/a.jpg",
        "{outside}/secret.jpg",
        "file://{outside}/secret.jpg",
        "/etc/hostname",
        "../does-not-exist.jpg",
    ],
)
def test_no_path_leaves_the_root(root: Path, path: str) -> None:
    assert status(root, path.format(outside=root.parent)) == "outside_root"


def test_no_symbolic_link_leaves_the_root(root: Path) -> None:
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "way-out").symlink_to(root.parent)
    (root / "round.jpg").symlink_to(root / "a.jpg")
    assert status(root, "link.jpg") == "outside_root"
    assert status(root, "way-out/secret.jpg") == "outside_root"
    assert read(root, "round.jpg") == BYTES


WATCHED: list[list[str] | None] = [None]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED[0] is not None and event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
        WATCHED[0].append(f"{event} {arguments[0]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Record files that Python opens, and connections; the hook stays for the life of the process."""
    if not hasattr(sys, "_clip_pipeline_watch"):
        sys.addaudithook(_watch)
        sys._clip_pipeline_watch = True  # type: ignore[attr-defined]
    WATCHED[0] = seen = []
    try:
        yield seen
    finally:
        WATCHED[0] = None


OUTSIDE = [
    "../secret.jpg", "{outside}/secret.jpg", "file://{outside}/secret.jpg", "FILE://{outside}/secret.jpg",
    "file://localhost{outside}/secret.jpg", "file:{outside}/secret.jpg", "local://{outside}/secret.jpg",
    "file://../secret.jpg", "file:///../{outside}/secret.jpg", "~/secret.jpg", "$HOME/secret.jpg", "%2e%2e/secret.jpg",
    "..\\secret.jpg", "link.jpg", "way-out/secret.jpg", "folder/../way-out/secret.jpg", "link.jpg#bytes=0-10",
    "../secret.jpg\0.jpg", "/proc/self/environ", "/proc/self/environ#bytes=0-100", "/dev/zero#bytes=0-100",
    "simplecache::file://{outside}/secret.jpg", "zip://secret.jpg::{outside}/photos.zip", "data:,secret",
    "simplecache::http://127.0.0.1:9/a.jpg", "zip://a.jpg::http://127.0.0.1:9/a.zip", "reference://::{outside}/x.json",
    "http://127.0.0.1:9/a.jpg", " http://127.0.0.1:9/a.jpg", "http:/127.0.0.1:9/a.jpg", "//127.0.0.1:9/a.jpg",
    "s3://127.0.0.1:9/a.jpg", "ftp://127.0.0.1:9/a.jpg", "github://me:x@/a.jpg", "hf://datasets/me/a.jpg",
]  # fmt: skip


@pytest.mark.parametrize("place", ["local", "memory://photos"])
@pytest.mark.parametrize("schemes", [("file",), ("file", "https"), ()])
def test_no_row_makes_python_open_a_file_outside_or_ask_the_network(
    root: Path, place: str, schemes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.chdir(root.parent)
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "way-out").symlink_to(root.parent)
    source = Source(root=str(root) if place == "local" else place, max_bytes=LIMIT, schemes=schemes)
    source.read(ImageRef(id=0, path="nothing.jpg"))
    with watched() as seen:
        results = [source.read(ImageRef(id=1, path=path.format(outside=root.parent))) for path in OUTSIDE]
    assert seen == []
    assert {result.status for result in results if isinstance(result, Failure)} <= {
        "outside_root", "scheme_not_allowed", "not_found", "unreadable",
    }  # fmt: skip
    assert not any(isinstance(result, bytes) for result in results)
    if place == "local":
        with watched() as seen:
            source.read(ImageRef(id=1, path="a.jpg"))
        assert {re.sub(r"/proc/self/fd/\d+", f"{root}/a.jpg", each) for each in seen} == {f"open {root}/a.jpg"}


@pytest.mark.parametrize("swapped", ["a.jpg", "folder"])
def test_a_link_that_appears_between_the_check_and_the_opening_leads_nowhere(
    root: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name(monkeypatch)
    (root.parent / "photos-too" / "b c.jpg").write_bytes(b"secret")
    opener = sources._open_exactly

    def swap(path: str, flags: int) -> int:
        (root / swapped).rename(root / "was-here")
        (root / swapped).symlink_to(root.parent / ("secret.jpg" if swapped == "a.jpg" else "photos-too"))
        return opener(path, flags)

    monkeypatch.setattr(sources, "_open_exactly", swap)
    found = status(root, "a.jpg" if swapped == "a.jpg" else "folder/b c.jpg")
    assert found == ("unreadable" if swapped == "a.jpg" else "outside_root")


def test_a_device_is_not_opened() -> None:
    with watched() as seen:
        assert status("/dev", "zero") == "unreadable"
        assert status("/dev", "zero#bytes=0-10") == "unreadable"
    # The root itself, to look below it.
    assert set(seen) <= {"open /dev"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_file_that_says_to_be_empty_is_not_read_on() -> None:
    assert status("/proc/self", "environ") == "empty"
    assert status("/proc/self", "environ#bytes=0-100") == "empty"


def test_a_root_that_is_a_symbolic_link_holds_its_files(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert read(link, "a.jpg") == BYTES
    assert read(link, str(link / "a.jpg")) == BYTES
    assert read(link, str(root / "a.jpg")) == BYTES


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("nothing.jpg", "not_found"),
        ("nowhere/nothing.jpg", "not_found"),
        ("a.jpg/b.jpg", "not_found"),
        ("~/a.jpg", "not_found"),
        ("folder", "unreadable"),
        (".", "unreadable"),
        ("a\0b.jpg", "unreadable"),
        ("x" * 5000, "unreadable"),
        (None, "no_image"),
        ("", "no_image"),
    ],
)
def test_a_path_that_gives_no_bytes_says_why(root: Path, path: str | None, wanted: str) -> None:
    assert status(root, path) == wanted


def test_an_empty_file_is_empty(root: Path) -> None:
    (root / "empty.jpg").touch()
    assert status(root, "empty.jpg") == "empty"
    assert status(root, None, b"") == "empty"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named_so(root: Path) -> None:
    (root / "a.jpg").chmod(0)
    assert status(root, "a.jpg") == "permission"


def test_a_loop_of_symbolic_links_ends(root: Path) -> None:
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    assert status(root, "one") == "unreadable"


def test_a_named_pipe_does_not_hang(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(status(root, "pipe.jpg")), daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert results == ["unreadable"]


def test_what_cannot_be_read_leaves_no_descriptor_open(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        for path in ("folder", "pipe.jpg", "nothing.jpg", "a.jpg"):
            read(root, path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_bytes_are_refused_before_they_are_read(root: Path) -> None:
    (root / "fits.jpg").write_bytes(bytes(LIMIT))
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 40)
    assert read(root, "fits.jpg") == bytes(LIMIT)
    assert status(root, "sparse.jpg") == "too_many_bytes"
    assert status(root, None, bytes(LIMIT + 1)) == "too_many_bytes"


def test_a_range_of_a_large_file_counts_by_its_own_length(root: Path) -> None:
    with (root / "photos.tar").open("wb") as file:
        file.seek(5_000_000)
        file.write(BYTES)
    assert read(root, "photos.tar#bytes=5000000-5000100") == BYTES
    assert status(root, "photos.tar") == "too_many_bytes"
    assert status(root, "photos.tar#bytes=0-1001") == "too_many_bytes"


@pytest.mark.parametrize(
    ("suffix", "wanted"),
    [
        ("#bytes=0-100", BYTES),
        ("#bytes=10-20", BYTES[10:20]),
        ("#bytes=99-100", BYTES[99:]),
        ("#bytes=90-200", BYTES[90:]),
        ("#bytes=10-10", "empty"),
        ("#bytes=200-300", "empty"),
        ("#bytes=20-10", "unreadable"),
        ("#bytes=-10", "not_found"),
        ("#bytes=0-", "not_found"),
        ("#bytes=100000000000000000000-100000000000000000001", "not_found"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_range_is_start_and_exclusive_stop(root: Path, *, remote: bool, suffix: str, wanted: bytes | str) -> None:
    place: Path | str = root
    if remote:
        place = "memory://ranges"
        fsspec.filesystem("memory").pipe_file("/ranges/a.jpg", BYTES)
    result = read(place, f"a.jpg{suffix}")
    assert (result.status if isinstance(result, Failure) else result) == wanted


def test_a_range_of_absurd_numbers_is_a_failure_and_no_error(root: Path) -> None:
    assert status(root, "a.jpg#bytes=" + "9" * 5000 + "-" + "9" * 5001) == "unreadable"
    assert status(root, "a.jpg#bytes=999999999999999990-999999999999999999") in ("empty", "unreadable")


def test_a_name_with_other_marks_is_a_name(root: Path) -> None:
    for name in ("a#b.jpg", "100%.jpg", "a?b.jpg", "photo #bytes=1-2.jpg", "фото.jpg"):
        (root / name).write_bytes(BYTES)
        assert read(root, name) == BYTES


def test_bytes_count_before_the_path(root: Path) -> None:
    assert read(root, None, b"cell") == b"cell"
    assert read(root, "../secret.jpg", b"cell") == b"cell"


@pytest.mark.parametrize("path", ["http://example.org/a.jpg", "s3://bucket/a.jpg", "memory://photos/a.jpg"])
def test_a_scheme_outside_the_list_is_refused(root: Path, path: str) -> None:
    assert status(root, path) == "scheme_not_allowed"


@pytest.mark.parametrize("place", ["memory://photos", "memory://photos/"])
def test_a_root_in_an_object_store_behaves_like_a_folder(root: Path, place: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/photos/a.jpg": BYTES, "/photos/folder/b.jpg": BYTES, "/photos/empty.jpg": b""})
    memory.pipe({"/photos/large.jpg": bytes(LIMIT + 1), "/photos-too/a.jpg": BYTES, "/secret.jpg": BYTES})
    assert read(place, "a.jpg") == BYTES
    assert read(place, "folder/b.jpg") == BYTES
    assert read(place, "memory://photos/a.jpg") == BYTES
    assert read(place, "a.jpg#bytes=10-20") == BYTES[10:20]
    assert status(place, "nothing.jpg") == "not_found"
    assert status(place, "folder") == "not_found"
    assert status(place, "empty.jpg") == "empty"
    assert status(place, "large.jpg") == "too_many_bytes"
    for path in ("../secret.jpg", "memory://secret.jpg", "memory://photos-too/a.jpg", "memory://photos/../secret.jpg"):
        assert status(place, path) == "outside_root"
    assert status(place, str(root / "a.jpg")) == "not_found"
    assert status(place, f"file://{root}/a.jpg") == "outside_root"
    assert status(place, "http://example.org/a.jpg") == "scheme_not_allowed"


def test_the_root_of_a_whole_store_holds_all_its_files() -> None:
    fsspec.filesystem("memory").pipe_file("/whole/a.jpg", BYTES)
    assert read("memory://", "whole/a.jpg") == BYTES


def test_another_scheme_is_read_when_it_is_listed(root: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/listed/a.jpg", BYTES)
    source = Source(root=str(root), max_bytes=LIMIT, schemes=("file", "memory"))
    assert source.read(ImageRef(id=1, path="memory://listed/a.jpg")) == BYTES
    assert source.read(ImageRef(id=2, path="a.jpg")) == BYTES


def test_a_row_never_chains_drivers_and_never_chooses_their_settings(root: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/listed/a.jpg", BYTES)
    schemes = ("file", "memory", "simplecache", "zip", "reference", "generic", "dir")
    source = Source(root=str(root), max_bytes=LIMIT, schemes=schemes)
    for path in (
        f"memory://x::file://{root}/a.jpg",
        f"simplecache://x::file://{root}/a.jpg",
        f"simplecache::file://{root}/a.jpg",
        f"zip://a.jpg::{root}/a.zip",
        "reference://a.jpg",
        "dir://a.jpg",
    ):
        with watched() as seen:
            result = source.read(ImageRef(id=1, path=path))
        assert isinstance(result, Failure), path
        assert result.status in ("scheme_not_allowed", "unreadable"), path
        # Python looks for a driver that it has not imported yet, in folders that something may have changed.
        looked = {f"os.listdir {Path(folder).absolute()}" for folder in sys.path}
        seen = [one for one in seen if one not in looked and not (one.startswith("os.listdir ") and PACKAGES in one)]
        assert [one for one in seen if not one.startswith("open ") or one.endswith((".jpg", ".zip"))] == [], path


def test_a_driver_that_is_not_installed_ends_the_job_instead_of_failing_every_row(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, scheme in (("gcsfs", "gs"), ("paramiko", "sftp")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
        source = Source(root=str(root), max_bytes=LIMIT, schemes=("file", scheme))
        with pytest.raises(StorageError, match=f"^{scheme}:// addresses cannot be read: .*install") as caught:
            source.read(ImageRef(id=1, path=f"{scheme}://me:secret@127.0.0.1/a.jpg"))
        assert "secret" not in str(caught.value)


def test_a_root_that_is_a_chain_is_the_config_s_choice_and_holds_its_rows(root: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/a.jpg", BYTES)
        archive.writestr("secret.jpg", BYTES)
    place = f"zip://photos::file://{tmp_path}/photos.zip"
    assert read(place, "a.jpg") == BYTES
    assert status(place, "../secret.jpg") == "outside_root"
    assert status(place, "%2e%2e/secret.jpg") == "outside_root"
    assert status(place, f"zip://secret.jpg::file://{tmp_path}/photos.zip") == "outside_root"


def test_a_root_at_a_web_address_holds_its_rows() -> None:
    with serve({"/photos/a.jpg": answer(200, BYTES), "/secret.jpg": answer(200, BYTES)}) as server:
        source = Source(root=f"{server.url}/photos", max_bytes=LIMIT, schemes=("file",), private_hosts=(server.place,))

        def ask(path: str) -> bytes | str:
            found = source.read(ImageRef(id=1, path=path))
            return found.status if isinstance(found, Failure) else found

        assert ask("a.jpg") == BYTES
        assert ask(f"{server.url}/photos/a.jpg") == BYTES
        for path in ("../secret.jpg", "%2e%2e/secret.jpg", "..%2fsecret.jpg", f"{server.url}/secret.jpg"):
            assert ask(path) == "outside_root"
        assert ask("https://example.org/a.jpg") == "scheme_not_allowed"
        assert set(server.asked) == {"/photos/a.jpg"}


def test_a_web_address_is_read_when_its_scheme_is_listed_and_its_host_is_public_or_named(root: Path) -> None:
    with serve({"/a.jpg": answer(200, BYTES)}) as server:
        ref = ImageRef(id=1, path=f"{server.url}/a.jpg#bytes=0-10")
        schemes = ("file", "http")
        refused = Source(root=str(root), max_bytes=LIMIT, schemes=schemes).read(ref)
        assert isinstance(refused, Failure)
        assert refused.status == "address_not_allowed"
        assert server.connections == 0
        named = Source(root=str(root), max_bytes=LIMIT, schemes=schemes, private_hosts=(server.place,))
        assert named.read(ref) == BYTES[:10]


# --- spans

MEMBER = 700


def members(count: int, file: str = "photos.tar", step: int = MEMBER) -> list[ImageRef]:
    """References to ranges that follow one another with 100 bytes between them."""
    return [ImageRef(id=row, path=f"{file}#bytes={row * step}-{row * step + step - 100}") for row in range(count)]


def outcome(source: Source, ref: ImageRef) -> object:
    try:
        return ref.read(source) if isinstance(ref, Member) else source.read(ref)
    except StorageError as error:
        return str(error)


def joined(source: Source, refs: Sequence[ImageRef]) -> tuple[Spans, list[ImageRef]]:
    made = Spans(source)
    return made, made.join(refs)


@contextmanager
def small_spans(**limits: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SPAN": 4000, "GAP": 200, "HELD": 12000, **limits}.items():
            patch.setattr(spans, name, value)
        yield


@contextmanager
def requests(place: str) -> Iterator[list[int]]:
    """The sizes of the reads of ranges, of local files by the kernel or in fsspec's memory."""
    seen: list[int] = []
    owner, name = (os, "pread") if place == "local" else (fsspec.filesystem("memory"), "cat_file")
    real = getattr(owner, name)

    def count(*arguments: Any, **options: Any) -> bytes:
        data: bytes = real(*arguments, **options)
        seen.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, count)
        yield seen


@pytest.fixture(params=["local", "memory"])
def tars(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Source]:
    """Three files of random bytes, and what reads them."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, size in enumerate((50_000, 20_000, 0)):
        data = random.Random(number).randbytes(size)
        (folder / f"{number}.tar").write_bytes(data)
        fsspec.filesystem("memory").pipe_file(f"/tars/{number}.tar", data)
    root = str(folder) if request.param == "local" else "memory://tars"
    return request.param, Source(root=root, max_bytes=LIMIT, schemes=("file", "memory"))


def some_range(dice: random.Random, size: int = 50_000) -> tuple[int, int]:
    start = dice.randrange(size)
    return dice.choice([
        (start, start + dice.randint(1, LIMIT)),
        (start // 500 * 500, start // 500 * 500 + 500),
        (start // 500 * 500, start // 500 * 500 + dice.randint(0, 3 * LIMIT)),
        (start, dice.randrange(size)),
        (size - dice.randint(1, 300), size + dice.randint(0, 500)),
        (dice.randrange(10**18), dice.randrange(10**18)),
        (0, 10**17), (10**17, 10**17 + 5),
    ])  # fmt: skip


def some_refs(dice: random.Random) -> list[ImageRef]:
    """Rows of several files, near one another and far apart, twice and out of order, sound and not."""
    others: list[tuple[str | None, bytes | None]] = [
        (None, None), ("", None), (None, b"cell"), ("0.tar#bytes=0-10", b"cell"), ("2.tar", None),
        ("../secret.jpg#bytes=0-10", None), ("no.tar#bytes=0-10", None), ("no.tar#bytes=10-20", None),
        ("http://a.example/0.tar#bytes=0-10", None), ("data:,x#bytes=0-5", None), ("data:,x#bytes=5-9", None),
        ("x" * 5000 + "#bytes=0-5", None), ("x" * 5000 + "#bytes=5-9", None), ("0.tar#bytes=0-5#bytes=5-9", None),
        ("0.tar#bytes=", None), ("zip://0.tar#bytes=0-10", None), ("zip://0.tar#bytes=10-20", None),
    ]  # fmt: skip
    refs = []
    for row in range(dice.choice([1, 5, 100, 400])):
        file = dice.choice(["0.tar"] * 6 + ["./0.tar", "1.tar", "2.tar", "no.tar", "memory://tars/1.tar"])
        path, data = f"{file}#bytes=%d-%d" % some_range(dice), None
        if dice.random() < 0.1:
            path, data = dice.choice(others)
        refs.append(ImageRef(id=row, path=path, data=data))
    refs += dice.choices(refs, k=len(refs) // 10)
    if dice.random() < 0.5:
        refs.sort(key=lambda ref: ref.path or "")
    return refs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kernel", [True, False])
def test_rows_of_spans_are_those_of_single_reads(
    tars: tuple[str, Source], seed: int, *, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        by_name(monkeypatch)
    dice, source = random.Random(seed), tars[1]
    with small_spans(HELD=dice.choice([3000, 12_000, 10**6])):
        batches = [some_refs(dice) for _ in range(3)]
        made = Spans(source)
        rows = [ref for batch in batches for ref in made.join(batch)]
        singly = [ref for batch in batches for ref in batch]
        assert [(ref.id, ref.path, ref.data) for ref in rows] == [(ref.id, ref.path, ref.data) for ref in singly]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda ref: outcome(source, ref), rows))
        made.close()
        assert found == [outcome(source, ref) for ref in singly]
        assert made._free == spans.HELD
        assert not any(ref.span._data for ref in rows if isinstance(ref, Member) and ref.span is not None)


def test_neighbours_of_a_file_are_read_at_once(tars: tuple[str, Source]) -> None:
    place, source = tars
    refs = members(60, "0.tar")
    with small_spans(), requests(place) as singly:
        wanted = [outcome(source, ref) for ref in refs]
    with small_spans(), requests(place) as together:
        made, rows = joined(source, refs)
        assert [outcome(source, ref) for ref in rows] == wanted
        made.close()
    assert len(singly) == 60
    assert together == [5 * MEMBER - 100] * 12


@pytest.mark.parametrize(
    ("ranges", "count"),
    [
        ([(0, 500), (700, 1200)], 1),
        ([(0, 500), (701, 1200)], 2),
        ([(700, 1200), (0, 500)], 1),
        ([(0, 500), (0, 500)], 1),
        ([(0, 900), (100, 200), (850, 950)], 1),
        ([(row, row + 1000) for row in (0, 1000, 2000, 3000)], 1),
        ([(row, row + 1000) for row in (0, 1000, 2000, 3001)], 2),
        ([(0, 1000)], 1),
    ],
)
def test_a_span_has_a_limit_and_few_bytes_between_its_rows(
    tars: tuple[str, Source], ranges: list[tuple[int, int]], count: int
) -> None:
    place, source = tars
    refs = [ImageRef(id=0, path=f"0.tar#bytes={start}-{stop}") for start, stop in ranges]
    with small_spans(), requests(place) as seen:
        made, rows = joined(source, refs)
        assert [outcome(source, ref) for ref in rows] == [outcome(source, ref) for ref in refs]
        made.close()
    assert len(seen) == count + len(refs)
    assert max(seen) <= 4000


def test_rows_of_several_files_in_turn_are_read_by_file(tars: tuple[str, Source]) -> None:
    place, source = tars
    pairs = zip(members(20, "0.tar"), members(20, "1.tar"), strict=True)
    refs = [ref for pair in pairs for ref in pair]
    with requests(place) as seen:
        made, rows = joined(source, refs)
        found = [outcome(source, ref) for ref in rows]
        made.close()
    assert seen == [20 * MEMBER - 100] * 2
    assert found == [outcome(source, ref) for ref in refs]


def test_spans_hold_no_more_than_their_limit(tars: tuple[str, Source]) -> None:
    place, source = tars
    with small_spans(), requests(place) as seen:
        # The other rows of each span are never read, as when a run ends early.
        made, rows = joined(source, members(50, "0.tar"))
        firsts = [ref for row, ref in enumerate(rows) if row % 5 == 0]
        assert all(isinstance(outcome(source, ref), bytes) for ref in firsts)
        made.close()
        assert made._free >= 0
    assert sum(size > MEMBER for size in seen) == 3
    assert sum(size < MEMBER for size in seen) == 7


def test_a_span_is_read_once_by_all_threads_and_the_next_one_ahead(
    tars: tuple[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read_span, asked = tars[1], Spans.read, []

    def slowly(self: Spans, path: str) -> bytes:
        asked.append(path)
        time.sleep(0.05)
        return read_span(self, path)

    monkeypatch.setattr(Spans, "read", slowly)
    with small_spans():
        made, rows = joined(source, members(20, "0.tar"))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda ref: outcome(source, ref), rows[:5]))
        made.close()
    assert found == [outcome(source, ref) for ref in members(5, "0.tar")]
    assert asked == ["0.tar#bytes=0-3400", "0.tar#bytes=3500-6900"]


@pytest.mark.parametrize(
    "error", [ConnectionError("cut"), OSError(5, "disk"), ValueError("driver"), KeyError("driver")]
)
@pytest.mark.parametrize("longest", [0, LIMIT])
def test_a_span_that_cannot_be_read_leaves_its_rows_to_be_read_alone(
    monkeypatch: pytest.MonkeyPatch, error: Exception, longest: int
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/broken/0.tar", bytes(50_000))
    real = memory.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        if end - start > longest:
            raise error
        data: bytes = real(path, start=start, end=end)
        return data

    monkeypatch.setattr(memory, "cat_file", cat_file)
    source, refs = Source(root="memory://broken", max_bytes=LIMIT), members(20, "0.tar")
    made, rows = joined(source, refs)
    for ref, row in zip(refs, rows, strict=True):
        if isinstance(error, KeyError) and not longest:
            with pytest.raises(KeyError):
                outcome(source, row)
        else:
            assert outcome(source, row) == outcome(source, ref)
            assert isinstance(outcome(source, ref), bytes) == bool(longest)
    made.close()
    assert made._free == spans.HELD


@pytest.mark.parametrize("change", ["shorter", "gone", "a link out", "a folder"])
def test_a_file_that_changed_gives_each_row_its_own_status(root: Path, change: str) -> None:
    source, refs = Source(root=str(root), max_bytes=LIMIT), members(20)
    (root.parent / "secret.tar").write_bytes(bytes(50_000))
    file = root / "photos.tar"
    file.write_bytes(random.Random(0).randbytes(50_000))
    made, rows = joined(source, refs)
    if change == "shorter":
        file.write_bytes(file.read_bytes()[: 7 * MEMBER + 50])
    else:
        file.unlink()
    if change == "a link out":
        file.symlink_to(root.parent / "secret.tar")
    if change == "a folder":
        file.mkdir()
    found = [outcome(source, ref) for ref in rows]
    made.close()
    assert found == [outcome(source, ref) for ref in refs]
    assert any(isinstance(one, bytes) for one in found) == (change == "shorter")
    assert isinstance(found[-1], Failure)


def test_a_store_that_answers_with_less_gives_each_row_all_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/short/0.tar", random.Random(0).randbytes(50_000))
    real = memory.cat_file
    monkeypatch.setattr(memory, "cat_file", lambda *place, **options: real(*place, **options)[: 3 * MEMBER - 150])
    source, refs = Source(root="memory://short", max_bytes=LIMIT), members(20, "0.tar")
    made, rows = joined(source, refs)
    assert [outcome(source, ref) for ref in rows] == [outcome(source, ref) for ref in refs]
    made.close()


@pytest.mark.parametrize("name", ["ffd8ffe0" * 28, "x" * 4070])
def test_a_text_that_is_no_path_is_none_as_part_of_a_span(name: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"/texts/{name}", BYTES)
    # With fewer digits, each would be a path.
    refs = [ImageRef(id=0, path=f"{name}#bytes={start:018}-{start + 5:018}") for start in (0, 5)]
    source = Source(root="memory://texts", max_bytes=LIMIT)
    made, rows = joined(source, refs)
    made.close()
    found = [outcome(source, ref) for ref in rows]
    assert found == [outcome(source, ref) for ref in refs]
    assert all(isinstance(one, Failure) for one in found)


def test_web_addresses_are_read_one_by_one() -> None:
    with serve({"/0.tar": answer(200, bytes(50_000))}) as server:
        source = Source(root=server.url, max_bytes=10**6, schemes=("http",), private_hosts=(server.place,))
        refs = [*members(3, "0.tar"), *members(3, f"{server.url}/0.tar")]
        made, rows = joined(source, refs)
        made.close()
    assert rows == refs
