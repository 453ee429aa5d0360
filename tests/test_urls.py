"""Local addresses in every form that people write, in paths of images, manifests, roots and outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.records import Failure, ImageRef
from pipeline.images.sources.source import Source
from pipeline.manifest.files import find_files
from pipeline.manifest.manifest import ROOT_KEY, open_manifest
from pipeline.nightly.content_keys import Content, read_keys
from pipeline.storage.factory import open_storage
from pipeline.storage.urls import filesystem, is_local, local_path, open_arrow, open_file, scheme_of, within

NAMES = [
    "a b.jpg", "plain.jpg", "ü é.jpg", "100%.jpg", "100% off.jpg", "50%25.jpg", "a%20b.jpg", "a%2Fb.jpg", "%41.jpg",
    "x#1.jpg", "x?y=1.jpg", "it's \"q\".jpg", "a+b&c.jpg", "[1].jpg", "a::b.jpg", "back\\slash.jpg",
    os.fsdecode(b"\xe9.jpg"),
]  # fmt: skip
FORMS: dict[str, Callable[[Path], str]] = {
    "a path": str,
    "as_uri": Path.as_uri,
    "file: and a path": lambda path: f"file:{path}",
    "file:// and a path": lambda path: f"file://{path}",
    "localhost": lambda path: path.as_uri().replace("file://", "file://localhost"),
    "one slash": lambda path: path.as_uri().replace("file://", "file:"),
    "upper case": lambda path: path.as_uri().replace("file", "FILE", 1),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return FORMS[request.param]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_address_of_any_form_leads_to_the_file(tmp_path: Path, form: Callable[[Path], str], name: str) -> None:
    path = tmp_path / "my photos" / name
    path.parent.mkdir()
    path.write_bytes(os.fsencode(name))
    address = form(path)
    assert is_local(address)
    assert local_path(address) == str(path)
    source = Source(root=str(tmp_path / "my photos"), max_bytes=1000)
    assert source.read(ImageRef(id=0, path=address)) == os.fsencode(name)
    with open_file(address) as file:
        assert file.read() == os.fsencode(name)
    if name.isprintable():
        # Arrow opens no name that is not UTF-8.
        with open_arrow(address) as file:
            assert file.read() == os.fsencode(name)


@pytest.mark.parametrize("name", ["a b.jpg", "a%20b.jpg", "a%2520b.jpg"])
def test_of_files_whose_names_are_one_anothers_encoding_the_right_one_is_read(tmp_path: Path, name: str) -> None:
    for each in ("a b.jpg", "a%20b.jpg", "a%2520b.jpg"):
        (tmp_path / each).write_bytes(each.encode())
    source = Source(root=str(tmp_path), max_bytes=1000)
    for address in (name, str(tmp_path / name), (tmp_path / name).as_uri()):
        assert source.read(ImageRef(id=0, path=address)) == name.encode()


def test_a_relative_path_that_begins_like_an_address_is_that_file(tmp_path: Path) -> None:
    for name in ("file:a.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    source = Source(root=str(tmp_path), max_bytes=1000)
    assert source.read(ImageRef(id=0, path="file:a.jpg")) == b"file:a.jpg"
    assert source.read(ImageRef(id=0, path="a.jpg")) == b"a.jpg"
    assert source.read(ImageRef(id=0, path=f"file:{tmp_path}/a.jpg")) == b"a.jpg"


def test_a_percent_sign_of_a_plain_path_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"another")
    source = Source(root=str(tmp_path), max_bytes=1000)
    for path in ("a%20b.jpg", str(tmp_path / "a%20b.jpg")):
        found = source.read(ImageRef(id=0, path=path))
        assert isinstance(found, Failure)
        assert found.status == "not_found"


@pytest.mark.parametrize(
    ("url", "scheme", "path"),
    [
        ("file:///a/b", "file", "/a/b"),
        ("file:/a/b", "file", "/a/b"),
        ("file://localhost/a/b", "file", "/a/b"),
        ("file://LOCALHOST/a", "file", "/a"),
        ("FILE:///a", "file", "/a"),
        ("file:a b/c%20d", "file", "a b/c%20d"),
        ("file://photos/x%20.jpg", "file", "photos/x%20.jpg"),
        ("file:///nowhere/a%20b", "file", "/nowhere/a b"),
        ("file:///nowhere/a b%20c", "file", "/nowhere/a b%20c"),
        ("file:///nowhere/100%", "file", "/nowhere/100%"),
        ("file:///nowhere/%00", "file", "/nowhere/%00"),
        ("/a%20b", "", "/a%20b"),
        ("a/file:b", "", "a/file:b"),
        ("profile:/a", "", "profile:/a"),
    ],
)
def test_a_local_address_is_taken_apart(url: str, scheme: str, path: str) -> None:
    assert (scheme_of(url), local_path(url)) == (scheme, path)
    assert is_local(url)


@pytest.mark.parametrize(
    "address",
    [
        "file://{root}/../secret.jpg",
        "file:{root}/../secret.jpg",
        "file://{root}/%2e%2e/secret.jpg",
        "file://{root}/%2E%2E%2Fsecret.jpg",
        "file://localhost{root}/x/..%2f..%2Fsecret.jpg",
        "file:../secret.jpg",
        "file://../secret.jpg",
        "file:%2e%2e/secret.jpg",
        "file:/etc/hostname",
        "file:///etc/host%6eame",
        "file:{root}/link.jpg",
        "file://{root}/li%6Ek.jpg",
    ],
)
def test_no_form_of_an_address_leaves_the_root(tmp_path: Path, address: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    found = Source(root=str(root), max_bytes=1000).read(ImageRef(id=0, path=address.format(root=root)))
    assert isinstance(found, Failure)
    assert found.status in ("outside_root", "not_found")
    if "%2e%2e/" not in address or address.startswith("file://"):
        assert found.status == "outside_root"


def test_a_local_address_is_not_read_below_a_root_in_a_store(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    for address in (f"file:{tmp_path}/a.jpg", (tmp_path / "a.jpg").as_uri()):
        found = Source(root="memory://photos", max_bytes=1000).read(ImageRef(id=0, path=address))
        assert isinstance(found, Failure)
        assert found.status == "outside_root"


def test_a_manifest_and_its_root_may_be_addresses(tmp_path: Path, form: Callable[[Path], str]) -> None:
    folder = tmp_path / "my manifests 100%"
    folder.mkdir()
    pq.write_table(pa.table({"id": ["a"], "path": ["1.jpg"]}), folder / "m 1.parquet")
    for address in (form(folder / "m 1.parquet"), form(folder), f"{form(folder)}/*.parquet"):
        assert find_files(address) == [str(folder / "m 1.parquet")]
    manifest = open_manifest(ManifestConfig(path=form(folder / "m 1.parquet"), root=form(tmp_path)))
    assert (manifest.rows, manifest.root) == (1, str(tmp_path))
    recorded = pa.table({"id": ["a"], "path": ["1.jpg"]}).replace_schema_metadata({ROOT_KEY: form(folder).encode()})
    pq.write_table(recorded, folder / "m 2.parquet")
    root = open_manifest(ManifestConfig(path=str(folder / "m 2.parquet"))).root
    (folder / "1.jpg").write_bytes(b"x")
    assert Source(root=root, max_bytes=10).read(ImageRef(id=0, path="1.jpg")) == b"x"


def test_an_output_may_be_an_address(tmp_path: Path, form: Callable[[Path], str]) -> None:
    folder = tmp_path / "my outputs" / "a b"
    storage = open_storage(form(folder))
    storage.write("a", b"x")
    assert (folder / "a").read_bytes() == b"x"
    assert storage.url == str(folder)
    assert within(form(folder / "x"), str(folder))
    assert filesystem(form(folder))[1] == str(folder)


def test_an_output_that_an_earlier_version_made_of_an_encoded_address_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "a%20b").mkdir()
    assert local_path(f"file://{tmp_path}/a%20b") == str(tmp_path / "a%20b")


def test_the_content_key_of_an_address_is_that_of_its_file(tmp_path: Path, form: Callable[[Path], str]) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"12345")
    address = form(tmp_path / "a b.jpg")
    pq.write_table(pa.table({"id": ["a", "b"], "path": [address, f"{address}#bytes=1-2"]}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    keys = [key for batch in read_keys(manifest, Content("stat", (), digest=False)) for key in batch["key"].to_pylist()]
    assert all(key.startswith("5|") for key in keys)
