"""Manifests of folders: what is taken for an image, what is left out and said, on a disk and in a store."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline.config.extensions import BY_FORMAT, EXTENSIONS, extension_of
from pipeline.config.schema import FORMATS
from pipeline.core.errors import ManifestError
from pipeline.images.sources.source import Source
from pipeline.manifest import __main__ as command
from pipeline.manifest import build
from pipeline.manifest.folder import LeftOut

JUNK_FILES = ("._a.jpg", ".hidden.jpg", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "ehthumbs.db", "Icon\r")
JUNK_FOLDERS = (
    "__MACOSX", "@eaDir", ".Trash", ".Trash-1000", ".Trashes", "$RECYCLE.BIN", "$Recycle.Bin", "#recycle", "@Recycle",
    ".thumbnails", ".git", "System Volume Information", "lost+found", "RECYCLER", "#snapshot",
)  # fmt: skip


@pytest.fixture(params=["a disk", "file://", "file:", "a store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a folder."""
    if request.param == "a store":
        name = uuid.uuid4().hex
        yield f"memory:///{name}"
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    else:
        (tmp_path / "my photos").mkdir()
        prefix = {"a disk": "", "file://": "file://", "file:": "file:"}[request.param]
        yield f"{prefix}{tmp_path / 'my photos'}"


def fill(place: str, names: list[str]) -> None:
    fs = fsspec.filesystem("memory" if place.startswith("memory") else "file")
    root = place.removeprefix("memory://").removeprefix("file://").removeprefix("file:")
    for name in names:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", f"bytes of {name}".encode())


def ids_of(place: str, out: Path, **options: object) -> list[str]:
    build.from_folder(place, str(out), **options)  # type: ignore[arg-type]
    return pq.read_table(out)["id"].to_pylist()  # type: ignore[no-any-return]


def test_every_format_that_is_decoded_has_extensions() -> None:
    assert {*FORMATS} <= {*BY_FORMAT}
    assert {".heic", ".heif", ".avif", ".jxl", ".jpg", ".mpo", ".apng", ".pnm", ".sgi"} <= EXTENSIONS
    assert all(extension == extension.lower() == extension_of(f"a{extension.upper()}") for extension in EXTENSIONS)


def test_every_extension_of_a_decoded_format_is_taken_in_any_case(place: str, tmp_path: Path) -> None:
    names = [f"{number:02}{each}" for number, each in enumerate(sorted(EXTENSIONS))]
    names += [f"a/b/{number:02}{each.upper()}" for number, each in enumerate(sorted(EXTENSIONS))]
    fill(place, names)
    assert ids_of(place, tmp_path / "m.parquet") == sorted(names)


def test_what_systems_hide_and_throw_away_is_no_image(place: str, tmp_path: Path) -> None:
    fill(place, ["a.jpg", "d/b.jpg", *JUNK_FILES, *(f"d/{name}" for name in JUNK_FILES)])
    fill(place, [f"{above}{name}/x.jpg" for name in JUNK_FOLDERS for above in ("", "d/e/")])
    left_out = LeftOut()
    assert ids_of(place, tmp_path / "m.parquet", left_out=left_out) == ["a.jpg", "d/b.jpg"]
    assert sum(left_out.reasons.values()) == 2 * len(JUNK_FILES) + 2 * len(JUNK_FOLDERS)
    for part in ("folders __MACOSX (2)", "macOS's metadata (._*) (2)", "hidden files", "Thumbs.db and the like"):
        assert part in str(left_out)


def test_a_folder_below_a_hidden_one_is_read_when_it_is_named_itself(tmp_path: Path) -> None:
    fill(str(tmp_path / ".photos" / "@eaDir"), ["a.jpg"])
    assert ids_of(str(tmp_path / ".photos" / "@eaDir"), tmp_path / "m.parquet") == ["a.jpg"]


def test_what_is_left_out_is_counted_by_extension_and_all_takes_it(place: str, tmp_path: Path) -> None:
    names = ["a.jpg", "b.HEIC", *(f"{n}.dng" for n in range(3)), "x.MOV", "noextension", ".hidden", "c.jpg.part"]
    fill(place, names)
    left_out = LeftOut()
    assert ids_of(place, tmp_path / "m.parquet", left_out=left_out) == ["a.jpg", "b.HEIC"]
    assert left_out.extensions == {".dng": 3, ".part": 1, "without an extension": 1, ".mov": 1}
    assert str(left_out).startswith("left out: files whose names are not those of images (6: 3 .dng, 1 ")
    assert str(left_out).endswith("; hidden files (1); --all takes every file")
    assert ids_of(place, tmp_path / "m.parquet", every=True) == sorted(names)


def test_the_images_of_a_store_are_read_where_they_are(place: str, tmp_path: Path) -> None:
    names = ["a b.jpg", "ü/é 100%25.png", "x/y/z.webp"]
    fill(place, names)
    build.from_folder(place, str(tmp_path / "m.parquet"))
    table = pq.read_table(tmp_path / "m.parquet")
    source = Source(root=table.schema.metadata[b"pipeline.root"].decode(), max_bytes=1 << 20)
    from pipeline.core.records import ImageRef

    read = {path: source.read(ImageRef(id=path, path=path)) for path in table["path"].to_pylist()}
    assert read == {name: f"bytes of {name}".encode() for name in names}
    assert table["size"].to_pylist() == [len(f"bytes of {name}".encode()) for name in sorted(names)]
    assert table["modified"].null_count == 0


def test_an_image_whose_name_looks_like_an_address_is_that_file(tmp_path: Path) -> None:
    from pipeline.core.records import ImageRef

    fill(str(tmp_path / "photos"), ["file:x.jpg", "x.jpg", "file%3Ax.jpg"])
    build.from_folder(str(tmp_path / "photos"), str(tmp_path / "m.parquet"))
    source = Source(root=str(tmp_path / "photos"), max_bytes=1 << 20)
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert {row["id"]: source.read(ImageRef(id=0, path=row["path"])) for row in rows} == {
        name: f"bytes of {name}".encode() for name in ("file:x.jpg", "x.jpg", "file%3Ax.jpg")
    }


def test_all_does_not_take_the_manifest_that_is_written(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg", "b.txt"])
    out, left_out = tmp_path / "m.parquet", LeftOut()
    assert [ids_of(str(tmp_path), out, every=True) for _ in range(2)] == [["a.jpg", "b.txt"]] * 2
    build.from_folder(str(tmp_path), str(out), left_out=left_out)
    assert dict(left_out.extensions) == {".txt": 1}


@pytest.mark.parametrize("address", ["memory:///nowhere", "nosuch://bucket/photos", "file:///nowhere/at/all"])
def test_an_address_that_is_no_folder_is_refused(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["folder", address, str(tmp_path / "m.parquet")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {address}: ")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    fill(str(tmp_path / "photos"), ["a.dng", "__MACOSX/b.jpg"])
    with pytest.raises(ManifestError, match=r"no files that end in .*1 \.dng.*folders __MACOSX \(1\); --all takes"):
        build.from_folder(str(tmp_path / "photos"), str(tmp_path / "m.parquet"))


def test_the_command_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(str(tmp_path / "photos"), ["a.jpg", "b.dng", "._a.jpg"])
    out = str(tmp_path / "m.parquet")
    assert command.main(["folder", str(tmp_path / "photos"), out]) == 0
    said = capsys.readouterr().out
    assert "files whose names are not those of images (1: 1 .dng)" in said
    assert f"{out}: 1 rows; next" in said
    assert command.main(["folder", "--all", str(tmp_path / "photos"), out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 3 rows; next")
