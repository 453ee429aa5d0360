"""Every accepted type of id, image and kept column works with every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline import convert, search, verify
from pipeline.config.schema import OUTPUT_COLUMNS, Config, ManifestConfig
from pipeline.core.plain import plain_array, plain_type
from pipeline.dataset import commits, plan
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.parts import format_of
from pipeline.engine.query import derive
from pipeline.job.main import run_job
from pipeline.job.relabel import relabel
from pipeline.manifest.manifest import open_manifest
from pipeline.nightly.content_keys import find_content, read_keys
from pipeline.report.__main__ import main as report
from pipeline.storage.factory import open_storage
from tests.encodings import IDS, IMAGES, NUMBERS, ROWS, TEXTS, dictionary, images, kept, runs
from tests.jobs import config_for
from tests.nights import healthy, night

FIRST, SECOND = "2026-11-01", "2026-11-02"
KEPT = kept()
# Packages that conversions are loaded with.
PACKAGES = {"numpy": "", "faiss": "faiss", "datasets": "datasets", "lance": "lance"}


def write(table: pa.Table, path: Path) -> None:
    """Write a manifest of two row groups, or of one where Arrow cannot divide views."""
    try:
        pq.write_table(table, path, row_group_size=7)
    except pa.ArrowNotImplementedError:
        pq.write_table(table, path)


def without(table: pa.Table, row: int) -> pa.Table:
    """The table without a row."""
    columns = []
    for column in table.columns:
        try:
            columns.append(column.take(pa.array([place for place in range(len(column)) if place != row])))
        except pa.ArrowNotImplementedError:
            values = column.to_pylist()
            columns.append(pa.array(values[:row] + values[row + 1 :], column.type))
    return pa.Table.from_arrays(columns, schema=table.schema)


def config_of(folder: Path, table: pa.Table, **groups: Any) -> Config:
    """The config of a small job over a table, whose file is written in two row groups."""
    write(table, folder / "m.parquet")
    names = [name for name in table.column_names if name not in ("id", "image")]
    settings: dict[str, Any] = {
        "manifest": {"keep": names, "shard_rows": 5, "root": str(folder / "photos")},
        **groups,
    }
    return config_for(folder / "m.parquet", folder / "out", **settings)


def table_of(folder: Path, *, id: pa.Array | None = None, image: pa.Array | None = None, **columns: Any) -> pa.Table:
    """Twelve rows, of which the last has no image."""
    given = images(folder / "photos")["string"] if image is None else image
    return pa.table({"id": pa.array(TEXTS) if id is None else id, "image": given, **columns})


class Case:
    """A finished dataset of a table, and every command on it."""

    def __init__(self, folder: Path, table: pa.Table) -> None:
        self.folder, self.table = folder, table
        self.config = config_of(folder, table)
        self.url = self.config.output.dir
        self.ids = table["id"].to_pylist()

    def run(self) -> None:
        run_job(self.config)
        self.check(self.url)

    def check(self, url: str, table: pa.Table | None = None) -> None:
        """The rows of a dataset are those of the table, in the types that the documentation names."""
        table = self.table if table is None else table
        for path in Path(url).glob("part-*"):
            for field in pq.read_schema(path):
                assert plain_type(field.type, kept=True) == field.type, field
        found = pa.concat_tables(pq.ParquetFile(path).read() for path in sorted(Path(url).glob("part-*")))
        assert found["status"].to_pylist() == ["ok"] * (table.num_rows - 1) + ["no_image"]
        for name in table.column_names:
            if name != "image":
                assert found[name].to_pylist() == table[name].to_pylist(), name

    def resume(self) -> None:
        place = Path(self.url)
        before = {path.name: path.read_bytes() for path in place.glob("part-*")}
        (place / "_SUCCESS").unlink()
        (place / "_commits" / "00001.json").unlink()
        next(place.glob("part-00001-*")).unlink()
        run_job(self.config)
        assert {path.name: path.read_bytes() for path in place.glob("part-*")} == before

    def verify(self) -> None:
        assert verify.main([self.url]) == 0

    def report(self) -> None:
        assert report([self.url, "--out", str(self.folder / "page.html")]) == 0
        page = (self.folder / "page.html").read_text()
        assert str(self.ids[0]) in page
        assert page.count("data:image/jpeg;base64,") >= 4

    def relabel(self) -> None:
        source, out = open_dataset(self.url), str(self.folder / "other")
        other = self.config.changed({"output.dir": out, "prompts.labels": ["a star", "a ring"]})
        relabel(source, derive(source, other, ["output.dir", "prompts.labels"]))
        self.check(str(self.folder / "other"))
        assert healthy(self.folder / "other")

    def search(self, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        for query in (["--id", str(self.ids[1])], ["a red circle"]):
            assert search.main([self.url, *query, "--json", "--top", "3"]) == 0
            hits = json.loads(capsys.readouterr().out)
            assert len(hits) == 3
            assert {hit["id"] for hit in hits} <= {*self.ids}
            assert search.main([self.url, *query]) == 0
            capsys.readouterr()

    def convert(self, to: str) -> None:
        out = self.folder / to
        assert convert.main([self.url, "--to", to, "--out", str(out)]) == 0
        LOADED[to](out, self.ids[: ROWS - 1])

    def api(self) -> None:
        with pipeline.open_dataset(self.url) as dataset:
            assert dataset.ids == self.ids
            assert dataset.table().num_rows == len(dataset.frame()) == ROWS
            assert dataset.failures["status"].tolist() == ["no_image"]
            hits = dataset.search(id=self.ids[2], top=2)
            assert {hit.id for hit in hits} < {*self.ids}
            dataset._repr_html_()

    def nights(self) -> None:
        """Two nights; in the second one, a row has left and another one is new."""
        store, config = self.folder / "nights", self.config
        for day, away in ((FIRST, 10), (SECOND, 4)):
            there = without(self.table, away)
            write(there, self.folder / "m.parquet")
            made = night(config, store, day)
            assert (made.anew, made.rows, made.counts["ok"]) == ("", ROWS - 1, ROWS - 2)
            self.check(f"{store}/date={day}", there)
            assert healthy(store / f"date={day}")
        # A row without an image is tried again.
        expected = {"carried": ROWS - 3, "new": 1, "retried": 1, "dropped": 1}
        assert {kind: count for kind, count in made.kinds.items() if count} == expected

    def partitions(self) -> None:
        """Two nights of which the second holds only what is new or is tried again."""
        store = self.folder / "partitions"
        for day, away in ((FIRST, 10), (SECOND, 4)):
            write(without(self.table, away), self.folder / "m.parquet")
            made = night(self.config, store, day, layout="partition")
            assert (made.anew, made.rows, made.counts["ok"]) == ("", ROWS - 1, ROWS - 2)
            assert healthy(store / f"date={day}")
        rows = self.table
        for _ in range(ROWS - 2):
            rows = without(rows, 0)
        self.check(made.dataset, rows)
        assert pq.read_table(store / f"date={SECOND}" / "_dropped.night")["id"].to_pylist() == [self.ids[4]]

    def commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.run()
        self.resume()
        self.verify()
        self.relabel()
        self.search(capsys)
        self.convert("numpy")
        self.api()

    def everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.commands(capsys)
        self.report()
        self.nights()


def numpy_loads(out: Path, ids: list[Any]) -> None:
    assert np.load(out / "ids.npy").tolist() == ids
    assert len(np.load(out / "embeddings.npy")) == len(ids)
    table = pq.read_table(out / "metadata.parquet")
    assert table["id"].to_pylist() == ids
    for name in {*KEPT} & {*table.column_names}:
        assert table[name].to_pylist() == KEPT[name].to_pylist()[: len(ids)], name


def faiss_loads(out: Path, ids: list[Any]) -> None:
    import faiss

    assert faiss.read_index(str(out / "vectors.faiss")).ntotal == len(ids)
    assert pq.read_table(out / "metadata.parquet")["id"].to_pylist() == ids


def datasets_loads(out: Path, ids: list[Any]) -> None:
    import datasets

    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache"))
    assert rows["id"][:] == ids
    assert len(rows.with_format("numpy")["embedding"][:]) == len(ids)
    assert len(list(rows)) == len(ids)
    for name in {*KEPT} & {*rows.column_names}:
        found, given = rows.data[name].to_pylist(), KEPT[name].to_pylist()[: len(ids)]
        if name.startswith("map"):
            given = [None if pairs is None else [{"key": a, "value": b} for a, b in pairs] for pairs in given]
        assert found == ([None if value is None else str(value) for value in given] if name == "uuid" else given), name


def lance_loads(out: Path, ids: list[Any]) -> None:
    import lance

    table = lance.dataset(str(out / "vectors.lance")).to_table()
    assert table["id"].to_pylist() == ids
    for name in {*KEPT} & {*table.column_names}:
        assert table[name].to_pylist() == KEPT[name].to_pylist()[: len(ids)], name


LOADED: dict[str, Callable[[Path, list[Any]], None]] = {
    "numpy": numpy_loads,
    "faiss": faiss_loads,
    "datasets": datasets_loads,
    "lance": lance_loads,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Finished datasets with every kept column, by the type of their ids."""
    cases = {}
    for name in ("string_view", "dictionary", "large_string", "uint8", "dictionary-int"):
        folder = tmp_path_factory.mktemp(name)
        cases[name] = Case(folder, table_of(folder, id=IDS[name], **KEPT))
        run_job(cases[name].config)
    return cases


@pytest.fixture
def mixed(tmp_path: Path) -> Case:
    """Views as ids, in structs of images, and every type of a kept column."""
    image = images(tmp_path / "photos")["struct-binary_view-string"]
    return Case(tmp_path, table_of(tmp_path, id=IDS["string_view"], image=image, **KEPT))


def test_views_dictionaries_and_every_kept_type_work_with_every_command(
    mixed: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed.commands(capsys)
    mixed.report()


@pytest.mark.slow
def test_views_dictionaries_and_every_kept_type_work_night_after_night(mixed: Case) -> None:
    mixed.nights()
    mixed.partitions()


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_ids_of_every_type_work_with_every_command(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, table_of(tmp_path, id=IDS[name]))
    case.commands(capsys)
    # Ids of other widths come to the page as the same texts, and its plots are half of the time.
    if name in ("string", "large_string", "dictionary", "int8", "uint64-large", "dictionary-int"):
        case.report()
    case.nights()


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_type_work_with_every_command(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Case(tmp_path, table_of(tmp_path, image=images(tmp_path / "photos")[name])).everything(capsys)


@pytest.mark.parametrize(
    ("to", "id"),
    [
        pytest.param(to, id, marks=[pytest.mark.compat(package)] if (package := PACKAGES[to]) else [], id=f"{to}-{id}")
        for to in LOADED
        for id in ("string_view", "dictionary", "large_string", "uint8", "dictionary-int")
    ],
)
def test_every_conversion_is_loaded_by_its_own_library(
    converted: dict[str, Case], to: str, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    converted[id].convert(to)


def earlier(source: str, out: Path) -> None:
    """A copy of a dataset as earlier versions wrote it from views and dictionaries with narrow indices."""
    given, storage = open_dataset(source), open_storage(str(out))
    plan.write_once(storage, given.plan)
    views = {pa.string(): pa.string_view(), pa.binary(): pa.binary_view()}
    narrow = pa.dictionary(pa.int8(), pa.string())
    for commit in given.commits:
        table = pq.ParquetFile(f"{source}/{commit.part}").read()
        for place, field in enumerate(table.schema):
            kept_column = field.name not in OUTPUT_COLUMNS
            kind = narrow if pa.types.is_dictionary(field.type) else views.get(field.type)
            if kept_column and kind is not None and "binary" not in str(field.type):
                table = table.set_column(place, field.with_type(kind), table.column(place).cast(kind))
        form = replace(format_of(given.plan, table.schema.remove_metadata(), given.dim), schema=table.schema)
        commits.commit_part(storage, commit.shard, table, form, commit.counts)
    commits.finalize(storage, given.plan, commits.read_commits(storage, given.plan), lambda: None)
    for name in ("_report.json", "_report.html"):
        if (Path(source) / name).exists():
            (out / name).write_bytes((Path(source) / name).read_bytes())


@pytest.mark.slow
def test_a_dataset_that_an_earlier_version_wrote_works_with_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {name: KEPT[name] for name in ("text_string", "text_dictionary", "text_dictionary_int8", "ordered")}
    case = Case(tmp_path, table_of(tmp_path, id=IDS["dictionary"], **columns))
    run_job(case.config)
    new = Path(case.url)
    earlier(str(new), tmp_path / "earlier")
    shutil.rmtree(new)
    (tmp_path / "earlier").rename(new)
    kinds = {str(field.type) for path in new.glob("part-*") for field in pq.read_schema(path)}
    assert {"string_view", "dictionary<values=string, indices=int8, ordered=0>"} <= kinds
    # The job has nothing left to do, and a lost part is made again.
    run_job(case.config)
    case.verify()
    case.report()
    case.relabel()
    case.search(capsys)
    case.convert("numpy")
    case.api()
    (new / "_SUCCESS").unlink()
    (new / "_commits" / "00001.json").unlink()
    next(new.glob("part-00001-*")).unlink()
    run_job(case.config)
    case.verify()
    case.search(capsys)
    case.api()


@pytest.mark.slow
def test_the_night_after_one_that_an_earlier_version_wrote_carries_its_rows_in_one_encoding(tmp_path: Path) -> None:
    case = Case(tmp_path, table_of(tmp_path, id=IDS["string_view"], text_dictionary_int8=KEPT["text_dictionary_int8"]))
    store, config = tmp_path / "nights", case.config
    night(config, store, FIRST)
    folder = store / f"date={FIRST}"
    earlier(str(folder), tmp_path / "earlier")
    for name in ("_night.json", "_rows.night", "_dropped.night"):
        (tmp_path / "earlier" / name).write_bytes((folder / name).read_bytes())
    shutil.rmtree(folder)
    (tmp_path / "earlier").rename(folder)
    second = night(config, store, SECOND)
    assert (second.anew, second.kinds["carried"], second.kinds["retried"]) == ("", ROWS - 1, 1)
    assert (second.shared, second.written) == (0, 3)
    case.check(second.dataset)
    third = night(config, store, "2026-11-03")
    assert (third.shared, third.written) == (3, 0)
    assert healthy(store / f"date={SECOND}")


@pytest.mark.parametrize("kind", ["ids", "paths", "kept"])
def test_the_api_takes_encodings_that_parquet_does_not_hold(tmp_path: Path, kind: str) -> None:
    image = images(tmp_path / "photos")["string"].to_pylist()
    table = pa.table(
        {
            "id": runs(TEXTS) if kind == "ids" else pa.array(TEXTS),
            "path": runs(image) if kind == "paths" else pa.array(image, pa.string_view()),
            "number": runs(list(range(ROWS))) if kind == "kept" else pa.array(range(ROWS)),
            "word": runs(TEXTS, pa.string_view()) if kind == "kept" else dictionary(TEXTS, pa.string_view()),
            "views": pa.array([[{"a": text}] for text in TEXTS], pa.list_(pa.struct([("a", pa.string_view())]))),
        }
    )
    keep = ["number", "word", "views"]
    with pipeline.embed(table, keep=keep, root=str(tmp_path / "photos"), progress=False) as made:
        assert made.counts == {"ok": ROWS - 1, "no_image": 1}
        assert made.ids == TEXTS
        found = made.table(keep)
        assert found["number"].to_pylist() == list(range(ROWS))
        assert found["word"].to_pylist() == TEXTS
        assert found["views"].to_pylist() == [[{"a": text}] for text in TEXTS]


def nested(depth: int, leaf: pa.DataType) -> pa.DataType:
    """Lists, list views and structs around a type."""
    makers: list[Callable[[pa.DataType], pa.DataType]] = [
        pa.list_, pa.list_view, pa.large_list, pa.large_list_view, lambda kind: pa.struct([("x", kind)]),
    ]  # fmt: skip
    for place in range(depth):
        leaf = makers[(place * 3 + depth) % len(makers)](leaf)
    return leaf


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("leaf", [pa.string_view(), pa.binary_view(), pa.int32(), pa.list_view(pa.float16())], ids=str)
def test_a_nested_column_keeps_its_values_in_every_slice(depth: int, leaf: pa.DataType) -> None:
    kind = nested(depth, leaf)
    values: list[Any] = {"string_view": ["a", None, "", "dd" * 20], "binary_view": [b"a", None, b"", b"d" * 40]}.get(
        str(leaf), [1, None, 3, 4] if leaf == pa.int32() else [[1.0, None], None, [], [2.0]]
    )
    for place in range(depth):
        struct = (place * 3 + depth) % 5 == 4
        values = [{"x": value} for value in values] if struct else [values[:2], None, [], values[2:]]
    array, plain = pa.array(values, kind), plain_type(kind)
    assert "view" not in str(plain)
    for start, length in ((0, 4), (1, 2), (3, 1), (4, 0)):
        part = plain_array(array.slice(start, length), plain)
        part.validate(full=True)
        assert part.type == plain
        assert part.to_pylist() == array.slice(start, length).to_pylist()
        # Arrow's own operations take it.
        assert pa.table({"x": part}).take(pa.array([*range(length)], pa.int64())).num_rows == length


DIGESTS = [bytes([number]) * 16 for number in range(ROWS)]
HEX = [digest.hex() for digest in DIGESTS]


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array(HEX, pa.string_view()), HEX),
        (dictionary(HEX, index=pa.int8()), HEX),
        (pa.array(HEX, pa.large_string()), HEX),
        (pa.array([text.encode() for text in HEX], pa.binary(32)), HEX),
        (pa.array(DIGESTS, pa.binary_view()), HEX),
        (pa.array(DIGESTS, pa.large_binary()), HEX),
        (dictionary(DIGESTS), HEX),
        (pa.array([b"\xff" + digest for digest in DIGESTS], pa.binary(17)), [f"ff{text}" for text in HEX]),
        (pa.array([b"\xff" * 15 + bytes([number]) for number in range(ROWS)], pa.uuid()),
         ["ff" * 15 + f"{number:02x}" for number in range(ROWS)]),
        (pa.array(NUMBERS, pa.uint8()), [str(number) for number in NUMBERS]),
    ],
    ids=lambda value: str(value.type)[:40] if isinstance(value, pa.Array) else "",
)  # fmt: skip
def test_a_digest_of_every_type_is_a_key_of_the_content(tmp_path: Path, column: pa.Array, wanted: list[str]) -> None:
    write(table_of(tmp_path, digest=column), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet"), image="image", root=str(tmp_path)))
    content = find_content(manifest, "auto")
    assert content.digest
    keys = pa.Table.from_batches(read_keys(manifest, content))
    assert keys["key"].to_pylist() == wanted
    assert keys["id"].to_pylist() == TEXTS
