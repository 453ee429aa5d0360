"""Reading encoded bytes: where a reference leads, and what is refused."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest

from pipeline.images.sources import Source
from pipeline.records import Failure, ImageRef

BYTES = bytes(range(100))
LIMIT = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one file in it and one beside it."""
    root = tmp_path / "photos"
    (root / "folder").mkdir(parents=True)
    (root / "a.jpg").write_bytes(BYTES)
    (root / "folder" / "b c.jpg").write_bytes(BYTES[::-1])
    (tmp_path / "secret.jpg").write_bytes(BYTES)
    (tmp_path / "photos-too").mkdir()
    (tmp_path / "photos-too" / "a.jpg").write_bytes(BYTES)
    return root


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
