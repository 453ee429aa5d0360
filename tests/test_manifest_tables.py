"""Folders that are no plain Parquet files: tables with a log of their own, hidden partitions, images; and hints."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError
from pipeline.manifest.files import find_files, holds_images
from pipeline.manifest.manifest import open_manifest

PATHS = pa.table({"id": ["a", "b", "c"], "path": ["1.jpg", "2.jpg", "3.jpg"]})


@pytest.fixture(params=["a disk", "a store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty folder, without its slash."""
    if request.param == "a disk":
        yield str(tmp_path / "lake")
        return
    name = uuid.uuid4().hex
    yield f"memory:///{name}"
    if fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def put(place: str, name: str, table: pa.Table | None = PATHS) -> str:
    url = f"{place}/{name}"
    fs, path = fsspec.url_to_fs(url)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    with fs.open(path, "wb") as file:
        if table is None:
            file.write(b"{}")
        else:
            pq.write_table(table, file)
    return url


def refused(path: str, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        open_manifest(ManifestConfig(path=path, **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


DELTA = ["_delta_log/00000000000000000000.json", "_delta_log/00000000000000000010.checkpoint.parquet"]
TABLES = [
    *(
        (name, part, "a Delta table", "delta_scan('{table}')")
        for name in DELTA
        for part in ("p.parquet", "d=1/p.parquet")
    ),
    ("metadata/v1.metadata.json", "data/p.parquet", "an Iceberg table", "iceberg_scan('{table}')"),
    ("metadata/00001-ab-cd.metadata.json", "data/day=1/p.parquet", "an Iceberg table", "iceberg_scan('{table}')"),
    ("metadata/snap-12-1-ab.avro", "data/p.parquet", "an Iceberg table", "iceberg_scan('{table}')"),
    (".hoodie/hoodie.properties", "p.parquet", "a Hudi table", "load('{table}')"),
    (".hoodie/20240101.commit", "2024/01/p.parquet", "a Hudi table", "load('{table}')"),
]


@pytest.mark.parametrize(("log", "part", "kind", "way_out"), TABLES, ids=lambda value: value)
@pytest.mark.parametrize("above", ["", "deeper/table/"], ids=["itself", "a folder of tables"])
def test_a_table_whose_log_says_which_files_count_is_refused(
    place: str, above: str, log: str, part: str, kind: str, way_out: str
) -> None:
    put(place, f"{above}{log}", None)
    put(place, f"{above}{part}")
    said = refused(place)
    assert said.startswith(f"manifest.path={place}: ")
    assert kind in said
    assert "rows that were removed" in said
    table = f"{fsspec.url_to_fs(place)[1]}/{above}".rstrip("/")
    assert way_out.format(table=table) in said


@pytest.mark.parametrize(("log", "part", "kind", "way_out"), TABLES, ids=lambda value: value)
@pytest.mark.parametrize("how", ["a file", "a glob", "a deep glob", "its folder"])
def test_files_of_a_table_are_refused_however_they_are_named(
    place: str, how: str, log: str, part: str, kind: str, way_out: str
) -> None:
    if log.startswith(".hoodie") and "/" in part:
        put(place, f"{part.rpartition('/')[0]}/.hoodie_partition_metadata", None)
    put(place, log, None)
    url = put(place, part)
    folder = url.rpartition("/")[0]
    path = {
        "a file": url,
        "a glob": f"{folder}/*.parquet",
        "a deep glob": f"{place}/**/p.parquet",
        "its folder": folder,
    }
    assert kind in refused(path[how])


@pytest.mark.parametrize(
    "names", [["metadata/notes.json"], ["metadata.json"], ["_delta_log/x.parquet"], ["data/a.parquet", "hoodie/x.json"]]
)
def test_a_folder_that_only_looks_like_a_table_is_read(place: str, names: list[str]) -> None:
    put(place, "p.parquet")
    for name in names:
        put(place, name, PATHS if name.endswith(".parquet") else None)
    wanted = ["data/a.parquet", "p.parquet"] if "data/a.parquet" in names else ["p.parquet"]
    assert find_files(place) == [f"{place}/{name}" for name in wanted]


@pytest.mark.compat("deltalake")
@pytest.mark.parametrize("partitions", [[], ["day"]], ids=["flat", "partitioned"])
def test_a_real_delta_table_with_removed_rows_is_never_embedded(tmp_path: Path, partitions: list[str]) -> None:
    import deltalake

    table = PATHS.append_column("day", [["1", "1", "2"]])
    folder = str(tmp_path / "table")
    deltalake.write_deltalake(folder, table, partition_by=partitions or None)
    deltalake.DeltaTable(folder).delete("id = 'b'")
    files = sorted(str(path) for path in (tmp_path / "table").rglob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in files) > 2
    for path in (folder, f"{folder}/**/*.parquet", *files):
        assert "a Delta table" in refused(path)


@pytest.mark.parametrize("name", ["_day=1", ".day=1", "x=1/_day=2", "_a=1/b=2"])
def test_partitions_that_readers_skip_are_refused_and_a_glob_names_them(place: str, name: str) -> None:
    put(place, "day=0/p.parquet", PATHS)
    put(place, f"{name}/p.parquet", PATHS)
    said = refused(place)
    hidden = next(part for part in name.split("/") if part[0] in "_.")
    assert f"some of its Parquet files (1) lie in partitions whose names begin with _ or . ({hidden})" in said
    assert f"'manifest.path=\"{place}/**/*.parquet\"'" in said
    assert len(find_files(f"{place}/**/*.parquet")) == 2


@pytest.mark.parametrize("name", ["_archive/p.parquet", ".hidden/p.parquet", "_p.parquet", "a/._p.parquet"])
def test_other_files_that_readers_skip_are_said(place: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    put(place, "p.parquet")
    put(place, name)
    assert find_files(place) == [f"{place}/p.parquet"]
    assert f"Parquet files whose names or folders begin with _ or . are left out (1): {name}" in caplog.text


def test_a_folder_of_skipped_files_only_says_so(place: str) -> None:
    put(place, "_private/p.parquet")
    assert "begin with _ or . (_private/p.parquet); name one of them" in refused(place)


def test_of_images_beside_parquet_files_those_are_taken_that_the_manifest_names(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    put(place, "a/1.jpg", None)
    put(place, "a/2.HEIC", None)
    put(place, "m.parquet")
    assert [name.rpartition("/")[2] for name in find_files(place)] == ["m.parquet"]
    assert "manifest (1, such as m.parquet); of the images beside them (2, such as a/1.jpg)" in caplog.text
    assert not holds_images(place)


@pytest.mark.parametrize(
    ("names", "images"),
    [
        (["a.jpg"], True),
        (["x/y/z.heic", "notes.txt"], True),
        (["a.parquet"], False),
        (["a.parquet", "@eaDir/a.jpg", "._b.jpg", "readme.txt"], False),
        (["a.pq", "b.parquet"], False),
        (["notes.txt"], False),
        (["__MACOSX/a.jpg"], False),
    ],
)
def test_a_folder_of_images_is_known_by_its_names(place: str, names: list[str], images: bool) -> None:
    for name in names:
        put(place, name, PATHS if name.endswith((".parquet", ".pq")) else None)
    assert holds_images(place) is images


@pytest.mark.parametrize("path", ["nowhere", "m.parquet", "*.parquet"])
def test_what_is_no_folder_holds_no_images(tmp_path: Path, path: str) -> None:
    put(str(tmp_path), "m.parquet")
    assert not holds_images(str(tmp_path / path))


# --- hints

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = [b"photos/1.jpg", None, b"https://example.com/x?size=2", "ü/ß.HEIC".encode()]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.binary()),
        pa.array(TEXTS, pa.large_binary()),
        pa.array(TEXTS, pa.binary_view()),
        pa.array([{"bytes": each, "path": None} for each in TEXTS], STRUCT),
    ],
    ids=lambda column: str(column.type)[:12],
)
def test_paths_in_a_binary_column_are_refused_with_the_cast(tmp_path: Path, column: pa.Array) -> None:
    path = put(str(tmp_path), "m.parquet", pa.table({"id": [*"abcd"], "image": column}))
    said = refused(path, image="image")
    assert "manifest.image=image is a column of bytes, but holds text such as 'photos/1.jpg'" in said
    assert "cast('string')" in said


@pytest.mark.parametrize(
    "cells",
    [[b"one", b"1.jpg"], [b"\x89PNG\r\n1.jpg"], [None, None], [b"<svg>\n</svg>.svg"], [b"", b""], [b"\xff\xd8.jpg"]],
)
def test_bytes_that_are_not_all_paths_are_images_to_look_at(tmp_path: Path, cells: list[bytes | None]) -> None:
    table = pa.table({"id": list(map(str, range(len(cells)))), "image": pa.array(cells, pa.binary())})
    assert open_manifest(ManifestConfig(path=put(str(tmp_path), "m.parquet", table), image="image")).rows == len(cells)


@pytest.mark.parametrize(
    ("table", "options", "parts"),
    [
        (PATHS.rename_columns(["sku", "path"]), {}, ["; the values of sku are unique in this file: manifest.id=sku"]),
        (pa.table({"n": [3, 1, 2], "path": ["x", "x", "y"]}), {}, ["the values of n are unique"]),
        (pa.table({"path": ["x", "z", "y"]}), {}, ["the values of path are unique in this file: manifest.id=path"]),
        (
            pa.table({"n": [1, 1], "path": ["x", "x"]}),
            {},
            ["no column of this file has unique values: number the rows"],
        ),
        (pa.table({"n": [1, None], "path": ["x", "x"]}), {}, ["no column of this file has unique values"]),
        (
            pa.table({"image": pa.array([None], STRUCT), "label": [1]}).replace_schema_metadata({"huggingface": "{}"}),
            {},
            [
                "files of Hugging Face datasets have no ids: number the rows",
                "image may hold the images: manifest.image=image",
            ],
        ),
        (PATHS.append_column("jpg", pa.array([None] * 3, pa.binary())), {"image": "img"}, ["manifest.image=jpg"]),
    ],
)
def test_a_missing_column_has_a_hint_that_helps(
    tmp_path: Path, table: pa.Table, options: dict[str, Any], parts: list[str]
) -> None:
    said = refused(put(str(tmp_path), "m.parquet", table), **options)
    assert [part for part in parts if part not in said] == []


def test_the_command_of_the_hint_numbers_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(put(str(tmp_path), "m.parquet", pa.table({"path": ["x", "x"]})))
    monkeypatch.chdir(tmp_path)
    exec(said.partition('python -c "')[2].rpartition('"')[0])
    assert pq.read_table(tmp_path / "manifest.parquet").to_pylist() == [{"id": 0, "path": "x"}, {"id": 1, "path": "x"}]


@pytest.mark.parametrize("options", [{"keep": ["day"]}, {"id": "day"}, {"image": "day"}])
def test_a_partition_that_is_named_as_a_column_is_explained(place: str, options: dict[str, Any]) -> None:
    for day in ("2024-01-01", "2024-01-02"):
        put(place, f"day={day}/p.parquet")
    said = refused(place, **options)
    assert "day is the name of a folder (day=2024-01-01), not a column of the files" in said
    assert f"read_parquet('{place}/**/*.parquet', hive_partitioning=true)" in said
