"""Manifests made from folders, CSVs and tars, and the command that makes them."""

from __future__ import annotations

import io
import os
import re
import tarfile
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError, PipelineError, StorageError
from pipeline.images.sources.source import Source
from pipeline.manifest import __main__ as command
from pipeline.manifest import build
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.manifest.shards import ShardReader, cut, refs
from tests.processes import run_python


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"bytes of {name}".encode())


def opened(out: Path | str, **options: str) -> Manifest:
    manifest = open_manifest(ManifestConfig(path=str(out), **options))  # type: ignore[arg-type]
    check_ids(manifest)
    return manifest


def images_of(manifest: Manifest) -> dict[str | int, object]:
    """The images that the job would read, by id."""
    source = Source(root=manifest.root, max_bytes=1 << 20)
    with ShardReader(manifest) as reader:
        found = [ref for shard in cut(manifest, 3) for batch in reader.read(shard) for ref in refs(manifest, batch)]
    return {ref.id: source.read(ref) for ref in found}


# --- a folder

NAMES = [
    "2.jpg", "10.JPG", "a b.png", "a/1.webp", "a.jpg", "a/b/c/deep.tiff", "über/ß 🐈.jpeg", "e\u0301.gif", "é.gif",
    "x#1?.bmp", "it's, \"quoted\".png",
]  # fmt: skip


def test_a_folder_gives_every_image_below_it_sorted_by_its_relative_path(tmp_path: Path) -> None:
    fill(tmp_path / "photos", [*NAMES, "notes.txt", "a/readme.md", "jpg", "a/b.jpg.part"])
    out = tmp_path / "m.parquet"
    assert build.from_folder(str(tmp_path / "photos"), str(out)) == len(NAMES)
    table = pq.read_table(out)
    assert table["id"].to_pylist() == table["path"].to_pylist() == sorted(NAMES)
    manifest = opened(out)
    assert manifest.root == str(tmp_path / "photos")
    assert images_of(manifest) == {name: f"bytes of {name}".encode() for name in NAMES}


def test_a_folder_records_sizes_and_dates(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"])
    moment = datetime(2024, 2, 29, 12, 30, 15, 250_000, tzinfo=UTC)
    os.utime(tmp_path / "a.jpg", (moment.timestamp(), moment.timestamp()))
    build.from_folder(str(tmp_path), str(tmp_path / "m.parquet"))
    assert pq.read_table(tmp_path / "m.parquet").to_pylist() == [
        {"id": "a.jpg", "path": "a.jpg", "size": len(b"bytes of a.jpg"), "modified": moment}
    ]


def test_a_relative_folder_records_its_absolute_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "photos", ["a/b.jpg"])
    monkeypatch.chdir(tmp_path)
    build.from_folder("photos", "m.parquet")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    manifest = opened("../m.parquet")
    assert images_of(manifest) == {"a/b.jpg": b"bytes of a/b.jpg"}


def test_links_to_folders_are_not_followed_and_links_to_images_are(tmp_path: Path) -> None:
    fill(tmp_path / "photos", ["real/a.jpg"])
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "photos" / "real")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "folder.jpg").symlink_to(tmp_path / "photos" / "real")
    (tmp_path / "photos" / "b.jpg").symlink_to(tmp_path / "photos" / "real" / "a.jpg")
    out = tmp_path / "m.parquet"
    build.from_folder(str(tmp_path / "photos"), str(out))
    assert images_of(opened(out)) == dict.fromkeys(["b.jpg", "real/a.jpg"], b"bytes of real/a.jpg")


def test_a_link_that_leads_nowhere_is_a_row_for_the_job_to_report(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"])
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    build.from_folder(str(tmp_path), str(tmp_path / "m.parquet"))
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["id"].to_pylist() == ["a.jpg", "gone.jpg"]
    assert table["size"].to_pylist() == [len(b"bytes of a.jpg"), None]
    assert "not_found" in repr(images_of(opened(tmp_path / "m.parquet"))["gone.jpg"])


def test_a_manifest_may_lie_among_its_images_and_be_built_again(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "b.jpg"])
    out = tmp_path / "m.parquet"
    assert [build.from_folder(str(tmp_path), str(out)) for _ in range(2)] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.jpg", "m.parquet"]


@pytest.mark.parametrize("name", ["nowhere", "file.jpg"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path, ["file.jpg"])
    with pytest.raises(ManifestError, match=f"{name}: no such folder"):
        build.from_folder(str(tmp_path / name), str(tmp_path / "m.parquet"))


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"caf.*not UTF-8; rename it"):
        build.from_folder(str(tmp_path), str(tmp_path / "m.parquet"))


# --- a CSV


def write_csv(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def built_csv(folder: Path, text: str, *, image: str = "path", id: str | None = None, name: str = "m.csv") -> pa.Table:
    out = folder / "m.parquet"
    rows = build.from_csv(write_csv(folder / name, text), str(out), image=image, id=id, root=None)
    table = pq.read_table(out)
    assert table.num_rows == rows
    return table


@pytest.mark.parametrize(
    ("id", "name"), [(None, "id"), ("id", "id"), ("sku", "sku")], ids=["by default", "named", "another"]
)
def test_ids_of_a_csv_keep_their_zeros(tmp_path: Path, id: str | None, name: str) -> None:
    table = built_csv(tmp_path, f"{name},path\n00123,1.jpg\n123,2.jpg\nNA,3.jpg\n1e3,4.jpg\n", id=id)
    assert table[name].to_pylist() == ["00123", "123", "NA", "1e3"]


def test_image_paths_of_a_csv_are_text_even_if_they_look_like_numbers(tmp_path: Path) -> None:
    assert built_csv(tmp_path, "id,file\na,001\nb,\n", image="file")["file"].to_pylist() == ["001", ""]


def test_without_an_id_column_the_paths_are_the_ids(tmp_path: Path) -> None:
    table = built_csv(tmp_path, "file,n\na/b.jpg,1\nc d.jpg,2\n", image="file")
    assert table.column_names == ["id", "file", "n"]
    assert table["id"].to_pylist() == ["a/b.jpg", "c d.jpg"]


def test_all_other_columns_are_kept_with_their_types(tmp_path: Path) -> None:
    table = built_csv(tmp_path, "n,id,x,day,ok,path,text,none\n1,a,0.5,2024-02-29,true,1.jpg,ü,\n,b,2,,,2.jpg,NA,\n")
    assert table.column_names == ["n", "id", "x", "day", "ok", "path", "text", "none"]
    assert table.drop_columns(["id", "path"]).to_pylist() == [
        {"n": 1, "x": 0.5, "day": date(2024, 2, 29), "ok": True, "text": "ü", "none": None},
        {"n": None, "x": 2.0, "day": None, "ok": None, "text": "NA", "none": None},
    ]


def test_quoted_cells_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    table = built_csv(tmp_path, 'id,path,text\r\n"a,1",1.jpg,"two\nlines, ""quoted"""\r\nb,2.jpg,\r\n')
    assert table["id"].to_pylist() == ["a,1", "b"]
    assert table["text"].to_pylist() == ['two\nlines, "quoted"', ""]


def test_a_large_csv_with_newlines_in_cells_and_a_late_fraction_is_read_whole(tmp_path: Path) -> None:
    count = 20_000
    cell = "a line\n" * 12
    rows = [f'{n:05},{n}.jpg,"{cell}",{n}\n' for n in range(count)]
    rows[-1] = f'last,last.jpg,"{cell}",0.5\n'
    table = built_csv(tmp_path, "id,path,text,score\n" + "".join(rows))
    assert table.num_rows == count
    assert set(table["text"].to_pylist()) == {cell}
    assert table["score"].to_pylist() == [*map(float, range(count - 1)), 0.5]


def test_tabs_separate_the_columns_of_a_tsv(tmp_path: Path) -> None:
    table = built_csv(tmp_path, "id\tpath\na,b\t1.jpg\n", name="m.tsv")
    assert table.to_pylist() == [{"id": "a,b", "path": "1.jpg"}]


@pytest.mark.parametrize(("image", "id"), [("file", None), ("path", "sku")])
def test_a_column_that_a_csv_does_not_have_is_refused_with_those_it_has(
    tmp_path: Path, image: str, id: str | None
) -> None:
    with pytest.raises(ManifestError, match=f"no column '{id or image}'; its columns are id, path"):
        built_csv(tmp_path, "id,path\na,1.jpg\n", image=image, id=id)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not readable as CSV"),
        ("id,path\n", "a header without rows"),
        ("id,path\na,b,c\n", "not readable as CSV: .*Expected 2 columns, got 3"),
    ],
)
def test_a_csv_that_holds_no_table_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ManifestError, match=part):
        built_csv(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_csv_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.csv: not readable as CSV"):
        build.from_csv(str(tmp_path / "nowhere.csv"), str(tmp_path / "m.parquet"), image="path", id=None, root=None)


def test_paths_of_a_csv_start_at_its_folder_or_at_the_root_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, ["lists/a.jpg", "photos/a.jpg"])
    path, out = write_csv(tmp_path / "lists" / "m.csv", "id,path\n1,a.jpg\n"), str(tmp_path / "m.parquet")
    monkeypatch.chdir(tmp_path)
    build.from_csv(path, out, image="path", id=None, root=None)
    assert images_of(opened(out)) == {"1": b"bytes of lists/a.jpg"}
    build.from_csv(path, out, image="path", id=None, root="photos")
    monkeypatch.chdir("/")
    assert images_of(opened(out)) == {"1": b"bytes of photos/a.jpg"}
    build.from_csv(path, out, image="path", id=None, root="s3://bucket/photos")
    assert opened(out).root == "s3://bucket/photos"


# --- tars


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w", kind: int = tarfile.GNU_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("given", ["{00..11}.tar", "*.tar", "[01]?.tar", "memory"])
def test_a_glob_or_a_range_of_tars_is_all_of_them_in_order(tmp_path: Path, given: str) -> None:
    for number in range(12):
        write_tar(tmp_path / "tars" / f"{number:02}.tar", {"1.jpg": b"x" * (number + 1)})
    if given == "memory":
        fsspec.filesystem("memory").put(str(tmp_path / "tars"), "/globs", recursive=True)
        given = "memory://globs/*.tar"
    else:
        given = str(tmp_path / "tars" / given)
    assert build.from_tars([given], str(tmp_path / "m.parquet")) == 12
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["id"].to_pylist() == [f"{number:02}/1" for number in range(12)]
    assert [len(data) for data in images_of(opened(tmp_path / "m.parquet")).values()] == [*range(1, 13)]


def test_a_tar_whose_name_looks_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / name, {"1.jpg": b"1"}) for name in ("a[1].tar", "{0..1}.tar")]
    assert build.from_tars(tars, str(tmp_path / "m.parquet")) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*.tar", "no tar is there"),
        ("{5..4}.tar", "no tar is there"),
        ("{0..1}.tar", "0.tar: no such file"),
        ("memory://nothing/*.tar", "no tar is there"),
    ],
)
def test_tars_that_are_not_there_are_named(tmp_path: Path, given: str, message: str) -> None:
    path = given if "://" in given else str(tmp_path / given)
    with pytest.raises(ManifestError, match=re.escape(message)):
        build.from_tars([path], str(tmp_path / "m.parquet"))


LONG = "folder/" * 30 + "0001"


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_ranges_of_a_tar_give_the_exact_bytes_of_its_members(tmp_path: Path, kind: int) -> None:
    long = LONG if kind != tarfile.USTAR_FORMAT else "folder/" * 15 + "0001"
    members = {"0001.jpg": os.urandom(1000), "sub/0002.png": os.urandom(513), "ü.webp": b"x", f"{long}.gif": b"long"}
    tar = write_tar(tmp_path / "train.tar", members, kind=kind)
    assert build.from_tars([tar], str(tmp_path / "m.parquet")) == 4
    found = images_of(opened(tmp_path / "m.parquet"))
    assert found == {f"train/{name.rpartition('.')[0]}": data for name, data in members.items()}


def test_texts_that_belong_to_an_image_stand_beside_it(tmp_path: Path) -> None:
    members = {
        "1.txt": "a cät\n".encode(), "1.JPG": b"one", "1.json": b'{"n": 1}', "1.cls": b"7", "1.npy": b"\0",
        "2.jpg": b"two", "3.txt": b"no image", "4.jpg": b"four", "4.txt": b"\xff",
    }  # fmt: skip
    build.from_tars([write_tar(tmp_path / "t.tar", members)], str(tmp_path / "m.parquet"))
    rows = pq.read_table(tmp_path / "m.parquet").drop_columns(["path"]).to_pylist()
    assert rows == [
        {"id": "t/1", "txt": "a cät\n", "json": '{"n": 1}', "cls": "7"},
        {"id": "t/2", "txt": None, "json": None, "cls": None},
        {"id": "t/4", "txt": "\ufffd", "json": None, "cls": None},
    ]


def test_a_key_ends_at_the_first_dot_and_several_images_of_one_key_are_told_apart(tmp_path: Path) -> None:
    members = {
        "v1.0/a.left.jpg": b"left", "v1.0/a.right.jpg": b"right", "v1.0/a.txt": b"both", "v1.0/b.seg.png": b"only",
        "v1.0/b.seg.txt": b"not a caption",
    }  # fmt: skip
    build.from_tars([write_tar(tmp_path / "t.tar", members)], str(tmp_path / "m.parquet"))
    assert images_of(opened(tmp_path / "m.parquet")) == {
        "t/v1.0/a.left.jpg": b"left", "t/v1.0/a.right.jpg": b"right", "t/v1.0/b": b"only",
    }  # fmt: skip
    assert pq.read_table(tmp_path / "m.parquet")["txt"].to_pylist() == ["both", "both", None]


def test_members_that_begin_with_a_dot_are_skipped_and_part_no_sample(tmp_path: Path) -> None:
    members = {"._1.jpg": b"book", "1.jpg": b"one", "._1.txt": b"book", "1.txt": b"caption", "d/.hidden.jpg": b"book"}
    build.from_tars([write_tar(tmp_path / "t.tar", members)], str(tmp_path / "m.parquet"))
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [(row["id"], row["txt"]) for row in rows] == [("t/1", "caption")]


def test_folders_links_and_empty_members_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("empty.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    build.from_tars([str(path)], str(tmp_path / "m.parquet"))
    found = images_of(opened(tmp_path / "m.parquet"))
    assert list(found) == ["t/empty"]
    assert "status='empty'" in repr(found["t/empty"])


def test_tars_of_several_folders_share_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x" / "a.tar", {"1.jpg": b"a1"})
    write_tar(tmp_path / "y" / "b.tar", {"1.jpg": b"b1"})
    monkeypatch.chdir(tmp_path)
    build.from_tars(["x/a.tar", "y/b.tar"], "m.parquet")
    manifest = opened("m.parquet")
    assert manifest.root == str(tmp_path)
    assert pq.read_table("m.parquet")["path"][0].as_py().startswith("x/a.tar#bytes=")
    assert images_of(manifest) == {"a/1": b"a1", "b/1": b"b1"}


def test_tars_of_an_object_store_are_addressed_where_they_are() -> None:
    fs, folder = fsspec.filesystem("memory"), f"memory:///{uuid.uuid4().hex}"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"one"))
    fs.pipe_file(f"{folder}/t.tar", buffer.getvalue())
    build.from_tars([f"{folder}/t.tar"], f"{folder}/m.parquet")
    manifest = opened(f"{folder}/m.parquet")
    assert manifest.root == folder
    assert images_of(manifest) == {"t/1": b"one"}
    fs.rm(folder, recursive=True)


def test_two_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / folder / "a.tar", {"1.jpg": b"x"}) for folder in "xy"]
    with pytest.raises(ManifestError, match="two tars have the same name"):
        build.from_tars(tars, str(tmp_path / "m.parquet"))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, mode: str) -> None:
    tar = write_tar(tmp_path / "t.tar", {"1.jpg": b"x"}, mode=mode)
    with pytest.raises(ManifestError, match="members of a compressed tar have no address, unzip it first"):
        build.from_tars([tar], str(tmp_path / "m.parquet"))


@pytest.mark.parametrize("damage", ["cut off", "a broken header", "no tar"])
def test_a_damaged_tar_is_refused_and_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    path = Path(write_tar(tmp_path / "t.tar", {f"{n}.jpg": b"x" * 2000 for n in range(5)}))
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        del data[3 * 2560 + 700 :]
    elif damage == "a broken header":
        data[2 * 2560 : 2 * 2560 + 200] = b"\x01" * 200
    else:
        data = bytearray(b"<html>" * 1000)
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"t\.tar: not a sound, plain tar"):
        build.from_tars([str(path)], str(tmp_path / "m.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


# --- what is written


def test_an_unfinished_build_leaves_the_earlier_manifest_as_it_was(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", {"1.jpg": b"x"})
    out = tmp_path / "out" / "m.parquet"
    build.from_tars([good], str(out))
    before = out.read_bytes()
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(ManifestError, match="bad"):
        build.from_tars([good, str(tmp_path / "bad.tar")], str(out))
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_a_manifest_can_be_written_to_a_new_folder(tmp_path: Path) -> None:
    fill(tmp_path / "photos", ["a.jpg"])
    out = tmp_path / "new" / "folder" / "m.parquet"
    assert build.from_folder(str(tmp_path / "photos"), f"file://{out}") == 1
    assert opened(out).rows == 1


def test_only_a_parquet_file_is_written_so_that_a_forgotten_output_destroys_no_tar(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", {"1.jpg": b"x"}) for n in range(2)]
    before = Path(tars[1]).read_bytes()
    assert command.main(["tar", *tars]) == 2
    assert Path(tars[1]).read_bytes() == before


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"])
    with pytest.raises(StorageError, match=r"a\.jpg"):
        build.from_folder(str(tmp_path), str(tmp_path / "a.jpg" / "m.parquet"))


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"])
    (tmp_path / "m.parquet").mkdir()
    with pytest.raises(PipelineError, match=r"m\.parquet"):
        build.from_folder(str(tmp_path), str(tmp_path / "m.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "m.parquet"]


# --- the command


def test_the_command_says_what_was_written_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, ["a.jpg", "b.jpg"])
    out = str(tmp_path / "m.parquet")
    assert command.main(["folder", str(tmp_path), out]) == 0
    assert (
        capsys.readouterr().out == f"{out}: 2 rows; next: python -m pipeline.run manifest.path={out} output.dir=...\n"
    )


def test_the_command_reads_csvs_with_named_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "m.csv", "sku,file\n007,a.jpg\n")
    out = str(tmp_path / "m.parquet")
    assert command.main(["csv", path, out, "--image", "file", "--id", "sku", "--root", "/photos"]) == 0
    manifest = opened(out, id="sku", image="file")
    assert (manifest.rows, manifest.root) == (1, "/photos")


def test_the_command_reads_several_tars(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", {"1.jpg": b"x"}) for n in range(3)]
    assert command.main(["tar", *tars, str(tmp_path / "m.parquet")]) == 0
    assert opened(tmp_path / "m.parquet").rows == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["folder", "nowhere", "m.parquet"], "nowhere: no such folder"),
        (["folder", "empty", "m.parquet"], "empty: no files that end in .avif, .bmp"),
        (["csv", "nowhere.csv", "m.parquet"], "nowhere.csv: not readable as CSV"),
        (["tar", "nowhere.tar", "m.parquet"], "nowhere.tar: no such file"),
        (["tar", "texts.tar", "m.parquet"], "texts.tar: no images; a WebDataset tar holds members such as"),
        (["folder", "empty", "m.csv"], "m.csv: the last argument is the manifest to write, and ends in .parquet"),
    ],
)
def test_a_wrong_command_ends_with_code_2_one_plain_message_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "texts.tar", {"1.txt": b"x"})
    assert command.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert part in message
    assert sorted(os.listdir()) == ["empty", "texts.tar"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--help"], 0, "python -m pipeline.manifest csv products.csv products.parquet --image file --id sku"),
        ([], 2, "arguments are required"),
        (["zip", "a", "b"], 2, "invalid choice: 'zip'"),
    ],
)
def test_the_parser_answers(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == code
    assert part in "".join(capsys.readouterr())


def test_a_process_ends_with_the_code_of_the_command() -> None:
    done = run_python("-m", "pipeline.manifest", "folder", "nowhere", "m.parquet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: no such folder")
