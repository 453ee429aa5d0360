"""Which files a manifest is made of, what its columns mean, and what is refused before any work."""

from __future__ import annotations

import datetime
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ManifestError
from pipeline.manifest import manifest as source
from pipeline.manifest.ids import check_ids
from pipeline.manifest.manifest import ROOT_KEY, Manifest, find_files, open_manifest
from pipeline.manifest.shards import ShardReader, cut, refs

PATHS = pa.table({"id": ["a", "b", "c"], "path": ["1.jpg", "2.jpg", "3.jpg"]})


def write(path: Path, table: pa.Table = PATHS, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def opened(path: str | Path, *, keep: Sequence[str] = (), **options: Any) -> Manifest:
    return open_manifest(ManifestConfig(path=str(path), keep=list(keep), **options))


def rows_of(manifest: Manifest) -> pa.Table:
    with ShardReader(manifest) as reader:
        return pa.Table.from_batches([batch for shard in cut(manifest, 2) for batch in reader.read(shard)])


def message_of(path: str | Path, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        check_ids(opened(path, **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in an object store that lives in memory."""
    folder = f"/{uuid.uuid4().hex}"
    yield f"memory://{folder}"
    fsspec.filesystem("memory").rm(folder, recursive=True)


def put(url: str, table: pa.Table = PATHS) -> None:
    with fsspec.open(url, "wb") as file:
        pq.write_table(table, file)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_one_file_is_a_manifest(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "m.parquet")
    manifest = opened(prefix + path)
    assert [file.url for file in manifest.files] == [path]
    assert manifest.rows == 3
    assert manifest.root == str(tmp_path)
    assert rows_of(manifest).equals(PATHS)


def test_a_file_of_any_name_is_taken_when_it_is_named(tmp_path: Path) -> None:
    assert opened(write(tmp_path / "_manifest")).rows == 3


def test_a_folder_gives_its_parquet_files_sorted_and_skips_the_books_of_other_tools(tmp_path: Path) -> None:
    wanted = ["a.parquet", "b/1.parquet", "b/c/2.pq", "z.parquet"]
    others = ["_delta_log/0.parquet", ".hidden.parquet", "b/_tmp-1.parquet", "b/.trash/x.parquet"]
    for name in [*reversed(wanted), *others]:
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a manifest")
    assert find_files(str(tmp_path)) == [str(tmp_path / name) for name in wanted]


def test_a_folder_below_an_underscore_is_read_when_it_is_named_itself(tmp_path: Path) -> None:
    write(tmp_path / "_private" / "a.parquet")
    assert len(find_files(str(tmp_path / "_private"))) == 1


def test_relative_paths_of_a_folder_of_manifests_start_at_the_folder_that_holds_them_all(tmp_path: Path) -> None:
    for name in ("day1/a.parquet", "day2/b.parquet"):
        write(tmp_path / name, pa.table({"id": [name], "path": ["x.jpg"]}))
    assert opened(tmp_path).root == str(tmp_path)


def test_a_glob_gives_the_files_that_match(tmp_path: Path) -> None:
    for name in ("a-1.parquet", "a-2.parquet", "b-1.parquet", "a-dir/x.txt"):
        write(tmp_path / name)
    assert find_files(str(tmp_path / "a-*")) == [str(tmp_path / f"a-{n}.parquet") for n in (1, 2)]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "run1.parquet")
    wanted = write(tmp_path / "run[1].parquet")
    assert find_files(wanted) == [wanted]


def test_an_object_store_is_read_like_a_disk(memory: str) -> None:
    put(f"{memory}/b.parquet", pa.table({"id": ["d"], "path": ["4.jpg"]}))
    put(f"{memory}/a.parquet")
    put(f"{memory}/_skipped/a.parquet")
    for path in (memory, f"{memory}/*.parquet"):
        manifest = opened(path)
        assert [file.url for file in manifest.files] == [f"{memory}/a.parquet", f"{memory}/b.parquet"]
        assert manifest.root == memory
        assert rows_of(manifest)["id"].to_pylist() == ["a", "b", "c", "d"]
        check_ids(manifest)


BYTES = [b"one", b"two", None]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("path", pa.array(["1", "2", None], pa.string())),
        ("path", pa.array(["1", "2", None], pa.large_string())),
        ("path", pa.array(["1", "2", None], pa.string_view())),
        ("path", pa.array(["1", "2", None]).dictionary_encode()),
        ("bytes", pa.array(BYTES, pa.binary())),
        ("bytes", pa.array(BYTES, pa.large_binary())),
        ("bytes", pa.array(BYTES, pa.binary_view())),
        ("struct", pa.array([{"bytes": b"one", "path": None}, {"bytes": None, "path": "2"}, None], STRUCT)),
        ("struct", pa.array([{"bytes": b"one"}, {"bytes": None}, None], pa.struct([("bytes", pa.binary())]))),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type)[:30],
)
def test_images_may_be_paths_bytes_or_structs(tmp_path: Path, kind: str, column: pa.Array) -> None:
    manifest = opened(write(tmp_path / "m.parquet", pa.table({"id": [1, 2, 3], "image": column})), image="image")
    assert manifest.image_kind == kind
    found = [ref for batch in rows_of(manifest).to_batches() for ref in refs(manifest, batch)]
    assert [ref.id for ref in found] == [1, 2, 3]
    for ref, cell in zip(found, column.to_pylist(), strict=True):
        whole = cell if isinstance(cell, dict) else {kind: cell}
        assert ref.path == whole.get("path")
        assert ref.data == whole.get("bytes")


TEXTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(TEXTS, pa.string()),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        *(pa.array([0, 1, 127], getattr(pa, f"{sign}int{bits}")()) for sign in ("", "u") for bits in (8, 16, 32, 64)),
        pa.array([-(2**63), 0, 2**63 - 1], pa.int64()),
        pa.array([0, 2**63, 2**64 - 1], pa.uint64()),
        pa.array(["a/b.jpg", "a//b.jpg", " a/b.jpg"]),
        pa.array(["é", "e\u0301", "🐈 #1?"]),
        pa.array(["00123", "123", ""]),
    ],
    ids=lambda ids: f"{str(ids.type)[:30]}-{ids[2]}",
)
def test_ids_of_any_width_travel_unchanged(tmp_path: Path, ids: pa.Array) -> None:
    manifest = opened(write(tmp_path / "m.parquet", pa.table({"id": ids, "path": TEXTS})))
    check_ids(manifest)
    found = rows_of(manifest)["id"].combine_chunks()
    # Views and dictionaries are other encodings of the same texts.
    plain = ids.type if pa.types.is_integer(ids.type) or pa.types.is_large_string(ids.type) else pa.string()
    assert found.type == plain == manifest.schema.field("id").type
    assert found.to_pylist() == ids.to_pylist()


NESTED = pa.table(
    {
        "id": TEXTS,
        "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
        "box": pa.array([{"x": 1, "y": [0.5]}, None, {"x": None, "y": []}]),
        "facts": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        "kind": pa.array(["cat", "dog", "cat"]).dictionary_encode(),
        "price": pa.array([Decimal("1.10"), None, Decimal("-3.00")], pa.decimal128(9, 2)),
        "seen": pa.array(
            [datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)] * 3, pa.timestamp("us", "Asia/Tokyo")
        ),
        "vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
        "empty": pa.nulls(3),
        "dotted.name": [1, 2, 3],
        "path": TEXTS,
    }
)


@pytest.mark.parametrize("name", [name for name in NESTED.column_names if name not in ("id", "path")])
def test_kept_columns_of_any_type_travel_unchanged(tmp_path: Path, name: str) -> None:
    manifest = opened(write(tmp_path / "m.parquet", NESTED), keep=[name])
    assert manifest.schema.names == ["id", name]
    found = rows_of(manifest)
    assert found.schema.field(name).type == NESTED.schema.field(name).type == manifest.schema.field(name).type
    assert found[name].to_pylist() == NESTED[name].to_pylist()


@pytest.mark.parametrize("place", range(5))
def test_files_of_one_manifest_may_encode_the_same_type_differently(tmp_path: Path, place: int) -> None:
    encodings = [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array(TEXTS[::-1]).dictionary_encode(),
    ]
    (tmp_path / "many").mkdir()
    wanted = []
    for number, column in enumerate(encodings[place:] + encodings[:place]):
        ids = pa.array([f"{number}{text}" for text in column.to_pylist()]).cast(column.type)
        write(tmp_path / "many" / f"{number}.parquet", pa.table({"id": ids, "kind": column, "path": column}))
        wanted += [{"id": id, "kind": kind} for id, kind in zip(ids.to_pylist(), column.to_pylist(), strict=True)]
    manifest = opened(tmp_path / "many", keep=["kind"])
    check_ids(manifest)
    assert manifest.schema.types == [pa.string(), pa.string()]
    found = rows_of(manifest)
    assert found.select(["id", "kind"]).to_pylist() == wanted
    assert [ref.path for batch in found.to_batches() for ref in refs(manifest, batch)] == [
        row["kind"] for row in wanted
    ]


def test_kept_columns_come_in_the_order_of_the_config_and_may_hold_the_image(tmp_path: Path) -> None:
    manifest = opened(write(tmp_path / "m.parquet", NESTED), keep=["price", "path", "tags"])
    assert manifest.schema.names == ["id", "price", "path", "tags"]
    assert rows_of(manifest).select(manifest.schema.names).equals(NESTED.select(manifest.schema.names))


def test_a_column_whose_name_begins_like_the_id_is_not_taken_for_it(tmp_path: Path) -> None:
    table = pa.table({"id.source": ["same", "same"], "id": ["a", "b"], "path": ["1", "2"]})
    manifest = opened(write(tmp_path / "m.parquet", table))
    check_ids(manifest)
    found = [ref.id for batch in rows_of(manifest).to_batches() for ref in refs(manifest, batch)]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"id": "idd"}, ["manifest.id=idd", "did you mean id?"]),
        ({"image": "paths"}, ["manifest.image=paths", "did you mean path?"]),
        ({"keep": ["captoin"]}, ["manifest.keep=captoin", "did you mean caption?"]),
        ({"id": "xyz", "keep": ["qqq"]}, ["manifest.id=xyz", "manifest.keep=qqq"]),
    ],
)
def test_a_missing_column_is_named_with_the_nearest_one_all_columns_and_a_row(
    tmp_path: Path, options: dict[str, Any], parts: list[str]
) -> None:
    path = write(tmp_path / "m.parquet", PATHS.append_column("caption", [["x" * 200, "y", "z"]]))
    message = message_of(path, **options)
    for part in [path, "id (string), path (string), caption (string)", "id='a', path='1.jpg', caption='xxx", *parts]:
        assert part in message
    assert "x" * 100 not in message


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(TEXTS)] * 3, names=["id", "id", "path"])
    assert "two columns 'id'" in message_of(write(tmp_path / "m.parquet", table))


@pytest.mark.parametrize("ids", [[1.0, 2.0, 3.0], [True, False, None], [b"a", b"b", b"c"], [{"a": 1}] * 3])
def test_ids_that_are_neither_text_nor_integers_are_refused(tmp_path: Path, ids: list[Any]) -> None:
    column = pa.array(ids)
    message = message_of(write(tmp_path / "m.parquet", pa.table({"id": column, "path": TEXTS})))
    assert f"manifest.id=id is {column.type}; ids are strings or integers" in message
    assert "path (string)" in message
    assert "path='a'" in message


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, 3]),
        pa.array([["1.jpg"]] * 3, pa.list_(pa.field("element", pa.string()))),
        pa.array([{"path": "1.jpg"}] * 3),
        pa.array([{"bytes": "text"}] * 3),
        pa.array([{"bytes": b"x", "path": 7}] * 3),
        pa.nulls(3),
    ],
    ids=lambda column: str(column.type),
)
def test_an_image_column_of_the_wrong_type_is_refused(tmp_path: Path, column: pa.Array) -> None:
    path = write(tmp_path / "m.parquet", pa.table({"id": TEXTS, "path": column}))
    message = message_of(path)
    assert f"manifest.image=path is {column.type}; wanted a string" in message
    assert "id (string)" in message
    assert "the row: id='a'" in message


@pytest.mark.parametrize("name", ["id", "path", "caption"])
def test_files_of_one_manifest_must_agree_on_the_columns_that_are_used(tmp_path: Path, name: str) -> None:
    first = PATHS.append_column("caption", [TEXTS])
    index = first.column_names.index(name)
    second = first.set_column(index, name, first[name].cast(pa.large_string()))
    write(tmp_path / "a.parquet", first)
    other = write(tmp_path / "b.parquet", second)
    message = message_of(tmp_path, keep=["caption"])
    for part in (other, f"column '{name}' is large_string, but string in", "a.parquet"):
        assert part in message


def test_files_may_differ_in_columns_that_are_not_used(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", PATHS.append_column("extra", [[1, 2, 3]]))
    write(tmp_path / "b.parquet", pa.table({"path": ["x"], "id": ["d"]}))
    manifest = opened(tmp_path)
    check_ids(manifest)
    with ShardReader(manifest) as reader:
        found = [ref.id for shard in cut(manifest, 2) for batch in reader.read(shard) for ref in refs(manifest, batch)]
    assert found == ["a", "b", "c", "d"]


def test_a_missing_column_is_found_in_any_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    path = write(tmp_path / "b.parquet", PATHS.rename_columns(["id", "file"]))
    assert message_of(tmp_path).startswith(f"{path}: no column for manifest.image=path")


def test_a_manifest_without_rows_is_refused(tmp_path: Path) -> None:
    assert "no rows" in message_of(write(tmp_path / "m.parquet", PATHS.slice(0, 0)))


def test_an_empty_file_among_others_does_no_harm(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", PATHS.slice(0, 0))
    write(tmp_path / "b.parquet", PATHS)
    manifest = opened(tmp_path)
    check_ids(manifest)
    assert rows_of(manifest).equals(PATHS)


def test_without_a_path_there_is_no_manifest() -> None:
    with pytest.raises(ManifestError, match=r"manifest\.path is null"):
        open_manifest(ManifestConfig())


@pytest.mark.parametrize("name", ["nowhere.parquet", "nowhere-*.parquet", "nowhere/"])
def test_an_address_where_nothing_is_gets_a_plain_answer(tmp_path: Path, name: str) -> None:
    message = message_of(tmp_path / name)
    assert str(tmp_path / name) in message
    assert "no such file, folder or match" in message


def test_an_unknown_scheme_is_named() -> None:
    assert "nosuch" in message_of("nosuch://bucket/m.parquet")


def test_a_csv_in_place_of_parquet_is_told_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "photos.CSV"
    path.write_text("id,path\na,1.jpg\n")
    assert f"python -m pipeline.manifest csv {path} manifest.parquet" in message_of(path)


def test_a_folder_of_images_in_place_of_parquet_is_told_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    assert f"python -m pipeline.manifest folder {tmp_path} manifest.parquet" in message_of(tmp_path)


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_a_footer(data: bytes) -> bytes:
    size = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - size] + b"\xff" * size + data[-8:]


@pytest.mark.parametrize("damage", [cut_short, without_a_footer, lambda data: b"", lambda data: b"PAR1" * 5])
def test_a_damaged_file_is_said_to_be_unreadable(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = Path(write(tmp_path / "m.parquet"))
    path.write_bytes(damage(path.read_bytes()))
    message = message_of(path)
    assert str(path) in message
    assert "not a readable Parquet file" in message


def test_the_fingerprint_stays_when_the_files_are_copied_elsewhere(tmp_path: Path, memory: str) -> None:
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / "here" / name)
        put(f"{memory}/{name}")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    places = [tmp_path / "here", tmp_path / "there", f"file://{tmp_path}/there/*.parquet", memory]
    prints = [opened(place).fingerprint for place in places]
    # Where the images are is another matter: relative paths of two places are two sets of images.
    roots = [found.pop("root") for found in prints]
    assert prints == [prints[0]] * 4
    assert roots[0] != roots[1] == roots[2] != roots[3]


@pytest.mark.parametrize("column", ["id", "path", "caption"])
def test_the_fingerprint_changes_when_a_cell_changes(tmp_path: Path, column: str) -> None:
    table = PATHS.append_column("caption", [TEXTS])
    cells = table[column].to_pylist()
    changed = table.set_column(table.column_names.index(column), column, [[*cells[:-1], "other"]])
    path = tmp_path / "m.parquet"
    before = opened(write(path, table)).fingerprint
    after = opened(write(path, changed)).fingerprint
    assert before["digest"] != after["digest"]
    assert {**before, "digest": ""} == {**after, "digest": ""}


def test_the_fingerprint_names_the_columns_that_are_used(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", PATHS.append_column("caption", [TEXTS]))
    plain, kept, swapped = opened(path), opened(path, keep=["caption"]), opened(path, image="caption")
    assert plain.fingerprint["columns"] == ["id", "path"]
    assert kept.fingerprint["columns"] == ["id", "path", "caption"]
    assert swapped.fingerprint != plain.fingerprint


def test_the_order_of_the_files_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    other = PATHS.set_column(0, "id", [["d", "e", "f"]])
    for folder, tables in (("x", (PATHS, other)), ("y", (other, PATHS))):
        for name, table in zip("ab", tables, strict=True):
            write(tmp_path / folder / f"{name}.parquet", table)
    assert opened(tmp_path / "x").fingerprint != opened(tmp_path / "y").fingerprint


def test_a_huge_file_is_known_by_its_footer_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WHOLE_DIGEST_BYTES", 10)
    path = tmp_path / "m.parquet"
    before = opened(write(path)).fingerprint
    assert opened(path).files[0].digest.startswith("footer:")
    assert opened(path).fingerprint == before
    write(path, PATHS.set_column(1, "path", [["1.jpg", "2.jpg", "4.jpg"]]))
    assert opened(path).fingerprint != before


def built_in(folder: str) -> pa.Table:
    return PATHS.replace_schema_metadata({ROOT_KEY: folder.encode()})


def test_the_recorded_root_is_used_unless_the_config_names_one(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", built_in("/photos"))
    assert opened(path).root == "/photos"
    assert opened(path, root="/elsewhere").root == "/elsewhere"
    assert opened(path, root="~/elsewhere").root == str(Path.home() / "elsewhere")


def test_files_that_were_built_in_different_folders_need_a_root(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", built_in("/cats"))
    write(tmp_path / "b.parquet", built_in("/dogs"))
    with pytest.raises(ManifestError, match=r"different roots \(/cats, /dogs\).*manifest\.root"):
        opened(tmp_path)
    assert opened(tmp_path, root="/pets").root == "/pets"
