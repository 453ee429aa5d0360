"""Every reader of Parquet folders sees the rows of a dataset and nothing else, whichever command wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import convert
from pipeline.dataset.dataset import open_dataset
from pipeline.engine.query import derive
from pipeline.job.main import run_job
from pipeline.job.relabel import relabel
from pipeline.nightly.records import DROPPED, EARLIER, PARTITION, ROWS, SNAPSHOT
from tests.encodings import IDS, TEXTS, images, kept
from tests.jobs import config_for
from tests.nights import Collection, healthy, night

FIRST, SECOND, THIRD = "2026-11-01", "2026-11-02", "2026-11-03"
# Every kind of dataset, with the ids that it holds.
ALL = [f"{number:04d}" for number in range(12)]
CHANGED = ["0001", "0012"]
LATER = sorted({*ALL, "0012"} - {"0004"})
KINDS = {
    "job": ALL,
    "relabelled": ALL,
    f"snapshot/date={FIRST}": ALL,
    f"snapshot/date={SECOND}": LATER,
    f"partition/date={FIRST}": ALL,
    f"partition/date={SECOND}": CHANGED,
    # With kept columns of every type but one: Polars has no decimals of more than 38 digits.
    "kept": TEXTS,
    "bytes": ALL,
    "bits": ALL,
}
Rows = list[tuple[str, Any]]


def collection(folder: Path) -> Collection:
    """Twelve images, of which number 3 is damaged."""
    photos = Collection(folder)
    photos.folder.mkdir(parents=True)
    for number in range(12):
        photos.draw(number, damaged=number == 3)
    photos.write()
    return photos


def next_day(photos: Collection) -> None:
    """One image changes, one leaves, one is new."""
    photos.draw(1, version=1)
    photos.drop(4)
    photos.draw(12)
    photos.write()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of each kind."""
    made = tmp_path_factory.mktemp("readers")
    photos = collection(made / "images")
    run_job(photos.config(output={"dir": str(made / "job")}, manifest={"shard_rows": 5}))
    columns = {name: column for name, column in kept().items() if name != "decimal256"}
    table = pa.table({"id": IDS["string_view"], "image": images(made / "photos")["dictionary"], **columns})
    pq.write_table(table, made / "kept.parquet")
    keep = {"keep": [*columns], "root": str(made / "photos"), "shard_rows": 5}
    run_job(config_for(made / "kept.parquet", made / "kept", manifest=keep))
    for name, stored in {"bytes": {"dtype": "int8", "vector": "list"}, "bits": {"dtype": "binary", "dims": 64}}.items():
        run_job(photos.config(output={"dir": str(made / name), **stored}, manifest={"shard_rows": 5}))
    source = open_dataset(str(made / "job"))
    labels = photos.config(output={"dir": str(made / "relabelled")}, prompts={"labels": ["a star", "a ring"]})
    relabel(source, derive(source, labels, ["output.dir", "prompts.labels"]))
    for layout in (SNAPSHOT, PARTITION):
        night(photos.config(manifest={"shard_rows": 5}), made / layout, FIRST, layout=layout)
    next_day(photos)
    for layout in (SNAPSHOT, PARTITION):
        night(photos.config(manifest={"shard_rows": 5}), made / layout, SECOND, layout=layout)
    return made


def by_pandas(folder: str) -> Rows:
    import pandas as pd

    frame = pd.read_parquet(folder)
    return list(zip(frame["id"].tolist(), frame["embedding"].tolist(), strict=True))


def by_pyarrow(folder: str) -> Rows:
    table = ds.dataset(folder, format="parquet").to_table(columns=["id", "embedding"])
    return list(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def by_duckdb(folder: str) -> Rows:
    import duckdb

    return duckdb.execute(f"select id, embedding from '{folder}/*.parquet'").fetchall()


def by_polars(folder: str) -> Rows:
    import polars as pl

    frame = pl.read_parquet(f"{folder}/*.parquet", hive_partitioning=False)
    return list(zip(frame["id"].to_list(), frame["embedding"].to_list(), strict=True))


def by_datafusion(folder: str) -> Rows:
    import datafusion

    context = datafusion.SessionContext()
    context.register_parquet("rows", folder)
    table = context.sql("select id, embedding from rows").to_arrow_table()
    return list(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def by_dask(folder: str) -> Rows:
    import dask.dataframe as dd

    frame = dd.read_parquet(folder).compute(scheduler="synchronous")
    return list(zip(frame["id"].tolist(), frame["embedding"].tolist(), strict=True))


READERS: dict[str, Callable[[str], Rows]] = {
    "pandas": by_pandas,
    "pyarrow": by_pyarrow,
    "duckdb": by_duckdb,
    "polars": by_polars,
    "datafusion": by_datafusion,
    "dask": by_dask,
}
# The others are there wherever the tests run.
SEVERAL = [
    pytest.param(name, marks=[pytest.mark.compat(name)] if name in ("polars", "datafusion") else [], id=name)
    for name in READERS
]


def written(folder: Path) -> dict[str, Any]:
    """Every row by its id, read file by file from what ``_SUCCESS`` names."""
    tables = [pq.ParquetFile(path).read(columns=["id", "embedding"]) for path in sorted(folder.glob("part-*"))]
    table = pa.concat_tables(tables)
    return dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def check(found: Rows, wanted: dict[str, Any]) -> None:
    assert sorted(id for id, _ in found) == sorted(wanted)
    for id, vector in found:
        if wanted[id] is None:
            assert vector is None or bool(np.all(np.isnan(np.asarray(vector, np.float64))))
        else:
            assert np.array_equal(np.asarray(vector, np.float32), np.asarray(wanted[id], np.float32))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask's, about pandas
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", SEVERAL)
def test_a_reader_of_a_folder_sees_the_rows_of_the_dataset(places: Path, kind: str, reader: str) -> None:
    wanted = written(places / kind)
    assert sorted(wanted) == KINDS[kind]
    check(READERS[reader](str(places / kind)), wanted)


@pytest.mark.parametrize("layout", [SNAPSHOT, PARTITION])
def test_two_nights_are_read_together_with_their_dates(places: Path, layout: str) -> None:
    import duckdb

    pattern = f"{places / layout}/date=*/*.parquet"
    rows = duckdb.execute(f"select cast(date as varchar), id from read_parquet('{pattern}', hive_partitioning=true)")
    wanted = [(day, id) for day in (FIRST, SECOND) for id in KINDS[f"{layout}/date={day}"]]
    assert sorted(rows.fetchall()) == wanted


@pytest.mark.compat("polars")
@pytest.mark.parametrize("layout", [SNAPSHOT, PARTITION])
def test_polars_reads_two_nights_together(places: Path, layout: str) -> None:
    import polars as pl

    frame = pl.read_parquet(f"{places / layout}/date=*/*.parquet", hive_partitioning=True)
    wanted = [(day, id) for day in (FIRST, SECOND) for id in KINDS[f"{layout}/date={day}"]]
    assert sorted((str(day), id) for day, id in frame.select("date", "id").iter_rows()) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_parquet_file_of_a_dataset_folder_holds_rows_of_it(places: Path, kind: str) -> None:
    assert all(re.fullmatch(r"part-\d{5}-[0-9a-f]{16}\.parquet", path.name)
               for path in (places / kind).rglob("*.p*q*t"))  # fmt: skip
    assert healthy(places / kind)


@pytest.mark.parametrize("layout", [SNAPSHOT, PARTITION])
def test_the_books_of_a_night_are_parquet_under_another_suffix(places: Path, layout: str) -> None:
    folder = places / layout / f"date={SECOND}"
    assert pq.read_table(folder / DROPPED)["id"].to_pylist() == ["0004"]
    rows = pq.read_table(folder / ROWS)
    assert rows.column_names == ["id", "key", "status"]
    assert rows["id"].to_pylist() == LATER


@pytest.fixture(params=[SNAPSHOT, PARTITION])
def older(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Collection, Path, str]:
    """A store with one night as earlier versions wrote it."""
    photos, store = collection(tmp_path / "images"), tmp_path / "nights"
    night(photos.config(), store, FIRST, layout=request.param)
    for new, old in EARLIER.items():
        (store / f"date={FIRST}" / new).rename(store / f"date={FIRST}" / old)
    return photos, store, request.param


def test_a_store_with_nights_of_an_earlier_version_goes_on(older: tuple[Collection, Path, str]) -> None:
    photos, store, layout = older
    assert healthy(store / f"date={FIRST}")
    next_day(photos)
    second = night(photos.config(), store, SECOND, layout=layout)
    assert (second.anew, second.kinds["carried"], second.embedded) == ("", 10, 2)
    names = {path.name for path in (store / f"date={SECOND}").iterdir()}
    assert {ROWS, DROPPED} <= names
    assert not {*EARLIER.values()} & names
    assert healthy(store / f"date={SECOND}")


def test_a_night_that_an_earlier_version_began_to_publish_is_finished(older: tuple[Collection, Path, str]) -> None:
    photos, store, layout = older
    folder = store / f"date={FIRST}"
    (folder / "_night.json").unlink()
    night(photos.config(), store, FIRST, layout=layout)
    assert {path.name for path in folder.glob("*.parquet")} == {path.name for path in folder.glob("part-*")}
    assert healthy(folder)


def test_a_night_is_converted_like_any_dataset(places: Path, tmp_path: Path) -> None:
    made = convert.convert(open_dataset(str(places / SNAPSHOT / f"date={SECOND}")), "numpy", tmp_path / "out")
    assert (made.rows, made.left_out) == (len(LATER) - 1, 1)
