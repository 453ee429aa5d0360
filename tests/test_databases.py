"""Conversion into databases: each row once, whatever happens, with the values and neighbours of the dataset."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import convert
from pipeline.core.errors import ConfigError, StorageError
from pipeline.dataset import databases, pg_types
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.qdrant import point_id
from pipeline.dataset.search import fetch, nearest
from pipeline.dataset.vectors import VectorFormat
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from pipeline.job.main import run_job
from tests.benchmarks import databases as benchmark
from tests.finished import FAILED, ROWS, everything, matrix_of, run_scenes
from tests.jobs import scenes_manifest
from tests.postgres import NO_SERVER, PASSWORD, binaries, postgres
from tests.processes import run_python
from tests.test_captions import captions, pairs_config, write_pairs

GOOD = ROWS - len(FAILED)
# Ids with quotes, markup, white space, and letters of every length.
STRANGE = ["it's", 'a "b"', "<b>&amp;</b>", "\\x00; drop table t; --", "日本\u202e", "\t\n\r", " ", "%s {}", "😀" * 40]
STRANGE += ["\ufeff"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets by name: of each dtype, with odd values, with ids that are numbers, and one of a single row."""
    made = tmp_path_factory.mktemp("databases")
    manifest = scenes_manifest(made / "m.parquet", ROWS)
    for name in ("float32", "float16", "int8", "binary"):
        run_scenes(made, name, manifest, output={"dtype": name})
    pictures = [jpeg(sample(5, row), 64, 64) for row in range(10)]
    pq.write_table(pa.table({"id": STRANGE, "image": pictures, **ODD}), made / "odd.parquet")
    odd = {"manifest": {"keep": list(ODD), "shard_rows": 4}, "labels": {"threshold": 1.0}}
    run_scenes(made, "odd", made / "odd.parquet", **odd)
    numbers = pa.array([7, 0, 2**62, *range(20, 27)], pa.int64())
    pq.write_table(pa.table({"id": numbers, "image": pictures}), made / "n.parquet")
    run_scenes(made, "numbers", made / "n.parquet", manifest={"keep": [], "shard_rows": 4})
    return made


ODD = {
    "text": pa.array([*STRANGE[:9], None]),
    "when": pa.array([datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)] * 9 + [None], pa.timestamp("ns", "UTC")),
    "local": pa.array([datetime(1969, 12, 31)] * 10, pa.timestamp("s")),
    "day": pa.array([date(2026, 2, 28)] * 10, pa.date32()),
    "took": pa.array([timedelta(seconds=1.5)] * 10, pa.duration("ms")),
    "price": pa.array([Decimal("12.30")] * 10, pa.decimal128(10, 2)),
    "huge": pa.array([2**64 - 1] * 10, pa.uint64()),
    "small": pa.array([-1] * 10, pa.int8()),
    "flag": pa.array([True, None] * 5),
    "ratio": pa.array([float("nan"), 0.5] * 5, pa.float64()),
    "raw": pa.array([b"\x00\xff"] * 10),
    "tags": pa.array([["a", None, "b'"], []] * 5),
    "meta": pa.array([{"n": 1, "when": datetime(2026, 1, 1), "deep": [{"x": float("inf")}]}, None] * 5),
    "pairs": pa.array([[("k", 1)]] * 10, pa.map_(pa.string(), pa.int32())),
}


# Without a database.


class Memory(dict[Any, Any]):
    """A table in memory, which may fail in the middle of a part."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.found: dict[str, Any] | None = None
        self.fail_at, self.writes = fail_at, 0

    def mark(self) -> dict[str, Any] | None:
        return self.found

    def create(self, mark: Any) -> None:
        self.clear()
        self.found = dict(mark)

    def write(self, rows: Iterator[pa.Table], mark: Any) -> None:
        for batch in rows:
            self.update((row["id"], row) for row in batch.to_pylist())
            self.writes += 1
            if self.writes == self.fail_at:
                raise StorageError("the database is gone")
        self.found = dict(mark)


def fill(folder: Path, name: str, table: Any, **more: Any) -> databases.Filled:
    return databases.fill(
        open_dataset(str(folder / name)), table, **{"replace": False, "on_rows": lambda rows: 0, **more}
    )


def test_a_table_that_was_filled_in_part_is_filled_up_and_then_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "ROWS", 10)
    table, counted = Memory(fail_at=5), list[int]()
    with pytest.raises(StorageError):
        fill(folder, "float16", table)
    assert table.found is not None
    assert (table.found["parts"], len(table)) == (1, 22 + 20)
    made = fill(folder, "float16", table, on_rows=counted.append)
    assert (made.rows, made.written, made.left_out) == (GOOD, GOOD - 22, 2)
    assert (counted[0], sum(counted)) == (22, GOOD)
    assert list(table) == [row["id"] for row in good(folder / "float16").to_pylist()]
    assert "status" not in table["scene/0000.jpg"]
    before = table.writes
    assert fill(folder, "float16", table).written == 0
    assert table.writes == before


def good(folder: Path) -> pa.Table:
    table = everything(open_dataset(str(folder)))
    return table.filter(table["embedding"].is_valid())


def test_a_table_of_something_else_is_replaced_on_demand_alone(folder: Path) -> None:
    table = Memory()
    fill(folder, "float16", table)
    with pytest.raises(ConfigError, match=r"holds another dataset \(.*float16, 128 numbers\).*--replace"):
        fill(folder, "float32", table)
    assert table.found is not None
    table.found["success"] = "of an earlier run"
    with pytest.raises(ConfigError, match="holds another state of this dataset"):
        fill(folder, "float16", table)
    assert fill(folder, "float16", table, replace=True).written == GOOD
    # A second run with the option does not begin anew.
    assert fill(folder, "float16", table, replace=True).written == 0
    table.found = {}
    with pytest.raises(ConfigError, match="was not made by this command"):
        fill(folder, "float16", table, replace=True)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (pa.string(), "text"),
        (pa.uint8(), "int2"),
        (pa.uint64(), "numeric"),
        (pa.float16(), "float4"),
        (pa.timestamp("ns"), "timestamp"),
        (pa.timestamp("ns", "UTC"), "timestamptz"),
        (pa.list_(pa.float32()), "float4[]"),
        (pa.list_(pa.list_(pa.int8())), "jsonb"),
        (pa.list_(pa.struct([("a", pa.int8())])), "jsonb"),
        (pa.struct([("a", pa.int8())]), "jsonb"),
        (pa.null(), "jsonb"),
    ],
)
def test_columns_have_types_of_postgresql(kind: pa.DataType, wanted: str) -> None:
    assert pg_types.sql_type(kind) == wanted


def test_what_postgresql_does_not_take_is_named() -> None:
    columns = pa.schema([("id", pa.string()), ("ä" * 32, pa.string())])
    form = VectorFormat("float32", 2001)

    def named(table: str, form: VectorFormat, *, index: bool = False) -> list[str]:
        return [problem.key for problem in pg_types.problems_of(table, columns, form, index=index)]

    assert named("a.b_1", form) == ["a column"]
    for bad in ("", "1a", "a b", 'a"b', "a.b.c", "a;b", "é", "a" * 64):
        assert named(bad, form) == ["--table", "a column"]
    assert named("t", form, index=True) == ["a column", "--index"]
    assert named("t", VectorFormat("float16", 4000), index=True) == ["a column"]
    assert named("t", VectorFormat("float16", 16_001)) == ["a column", "DATASET"]


def test_values_become_json_that_every_reader_takes() -> None:
    value = {"a": [float("nan"), 1.5, b"\x00", None], "b": (True, 2**64, Decimal("1.10"), timedelta(milliseconds=1500))}
    found = databases.json_value(value)
    assert found == {"a": [None, 1.5, "AA==", None], "b": [True, 2**64, "1.10", 1.5]}
    assert databases.json_value({"when": datetime(2026, 1, 1, tzinfo=UTC)}) == {"when": "2026-01-01T00:00:00+00:00"}


def test_ids_of_points_follow_from_those_of_the_rows() -> None:
    assert (point_id(0), point_id(2**63)) == (0, 2**63)
    assert point_id("0") == point_id("0") != 0
    assert len({point_id("a"), point_id("b"), point_id(-1), point_id("")}) == 4
    assert uuid.UUID(str(point_id(-1))).version == 5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["pgvector"], "--table"),
        (["qdrant"], "--table"),
        (["numpy", "--table", "t"], "goes with --to pgvector and qdrant"),
        (["numpy", "--replace"], "goes with --to pgvector and --to qdrant"),
        (["qdrant", "--table", "t", "--index"], "Qdrant builds its index itself"),
    ],
)
def test_options_of_databases_go_with_them_alone(
    folder: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(folder / "float16"), "--out", "x", "--to", *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("to", "module"), [("pgvector", "psycopg"), ("qdrant", "qdrant_client")])
def test_a_missing_client_is_named_with_its_extra(
    folder: Path, to: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert convert.main([str(folder / "float16"), "--to", to, "--out", "postgresql:///x", "--table", "t"]) == 2
    assert f".[{to}]" in capsys.readouterr().err


# With PostgreSQL, and with the embedded mode of Qdrant.


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    if binaries() is None:
        pytest.skip(NO_SERVER)
    with postgres() as found:
        yield found


class Place:
    """An empty database of one kind: where it is, and what is in it."""

    def __init__(self, to: str, out: str) -> None:
        self.to, self.out = to, out

    def convert(self, dataset: Path, *more: str, table: str = "t") -> int:
        return convert.main([str(dataset), "--to", self.to, "--out", self.out, "--table", table, *more])

    @contextmanager
    def client(self) -> Iterator[Any]:
        if self.to == "pgvector":
            import psycopg

            with psycopg.connect(self.out, autocommit=True) as connection:
                yield connection
        else:
            import qdrant_client

            with closing(qdrant_client.QdrantClient(path=self.out)) as found:
                yield found

    def rows(self, table: str = "t") -> dict[Any, dict[str, Any]]:
        """The rows by id, as JSON has them."""
        with self.client() as client:
            if self.to == "pgvector":
                found = client.execute(f"select to_jsonb({table}) from {table}").fetchall()
                return {row["id"]: row for (row,) in found}
            points, _ = client.scroll(table, limit=10_000, with_vectors=True)
            return {point.payload["id"]: {**point.payload, "embedding": point.vector} for point in points}

    def count(self) -> int:
        with self.client() as client:
            if self.to == "pgvector":
                return int(client.execute("select count(*) from t").fetchone()[0])
            return int(client.count("t").count)

    def nearest(self, dataset: Dataset, query: Any) -> list[Any]:
        """The ids of the ten rows nearest to a vector."""
        with self.client() as client:
            if self.to == "qdrant":
                return [point.payload["id"] for point in client.query_points("t", query=query.tolist()).points]
            form = dataset.form.dtype
            if form == "binary":
                bits = "".join("1" if each > 0 else "0" for each in query)
                return [id for (id,) in client.execute(f"select id from t order by embedding <~> B'{bits}' limit 10")]
            kind = "vector" if form == "float32" else "halfvec"
            text = json.dumps(query.astype(float).tolist())
            found = client.execute(f"select id from t order by embedding <=> %s::{kind} limit 10", [text])
            return [id for (id,) in found]


@pytest.fixture(
    params=[
        pytest.param("pgvector", marks=pytest.mark.compat("psycopg")),
        pytest.param("qdrant", marks=pytest.mark.compat("qdrant_client")),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "qdrant":
        yield Place("qdrant", str(tmp_path / "qdrant"))
        return
    import psycopg

    for name, value in request.getfixturevalue("server").items():
        monkeypatch.setenv(name, value)
    with psycopg.connect("postgresql:///postgres", autocommit=True) as connection:
        connection.execute("drop database if exists images with (force)")
        connection.execute("create database images")
    yield Place("pgvector", "postgresql:///images")


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "binary"])
def test_rows_and_their_nearest_are_those_of_the_dataset(
    folder: Path, place: Place, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.convert(folder / name) == 0
    said = capsys.readouterr().out
    assert f"{GOOD} embeddings of length 128, {GOOD} of them written now; 2 rows have no embedding" in said
    dataset, rows = open_dataset(str(folder / name)), place.rows()
    wanted = {row["id"]: row for row in good(folder / name).to_pylist()}
    assert set(rows) == set(wanted)
    for id, row in rows.items():
        assert (row["label"], row["top_labels"], row["truth"]) == tuple(
            wanted[id][column] for column in ("label", "top_labels", "truth")
        )
        assert row["meta"] == wanted[id]["meta"]
        assert np.allclose(row["top_scores"], wanted[id]["top_scores"], atol=1e-6)
    matrix = dataset.form.load(good(folder / name)["embedding"])[0]
    queries = matrix[[0, 17, 60]]
    for query, found in zip(queries, nearest(dataset, queries, 10), strict=True):
        # Of rows with the same score either order is right, so scores are compared.
        scores = {id: float(score) for id, score in zip(wanted, matrix @ query, strict=True)}
        ids = place.nearest(dataset, query)
        assert np.allclose([scores[id] for id in ids], found.scores, atol=1e-3)
        if name == "float32":
            assert ids == [hit.id for hit in fetch(dataset, found)]


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_embeddings_of_floats_are_those_of_the_dataset(folder: Path, place: Place, name: str) -> None:
    assert place.convert(folder / name) == 0
    rows = place.rows()
    found = [rows[id]["embedding"] for id in good(folder / name)["id"].to_pylist()]
    vectors = np.array([json.loads(each) if isinstance(each, str) else each for each in found], np.float32)
    # Qdrant normalises again, for the cosine.
    assert np.allclose(vectors, matrix_of(good(folder / name)), atol=0 if place.to == "pgvector" else 1e-3)


def test_odd_values_arrive(folder: Path, place: Place) -> None:
    assert place.convert(folder / "odd") == 0
    rows = place.rows()
    assert list(rows) == STRANGE or set(rows) == set(STRANGE)
    first, second, last = (rows[STRANGE[number]] for number in (0, 1, 9))
    assert [rows[id]["text"] for id in STRANGE] == ODD["text"].to_pylist()
    assert {row["label"] for row in rows.values()} == {None}
    assert datetime.fromisoformat(first["when"]) == datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
    assert datetime.fromisoformat(first["local"]) == datetime(1969, 12, 31)
    assert (first["day"], last["when"]) == ("2026-02-28", None)
    assert (first["huge"], first["small"], first["flag"], second["flag"]) == (2**64 - 1, -1, True, None)
    assert Decimal(str(first["price"])) == Decimal("12.30")
    assert (first["tags"], second["tags"], second["ratio"]) == (["a", None, "b'"], [], 0.5)
    assert first["meta"] == {"n": 1, "when": "2026-01-01T00:00:00", "deep": [{"x": None}]}
    assert second["meta"] is None
    assert first["pairs"] == [{"key": "k", "value": 1}]
    # JSON has no number for NaN, and no bytes.
    assert first["ratio"] in (None, "NaN")
    assert first["raw"] in (base64.b64encode(b"\x00\xff").decode(), "\\x00ff")
    assert first["took"] in (1.5, "00:00:01.5")


def test_images_and_texts_have_an_embedding_each(tmp_path: Path, place: Place) -> None:
    config = pairs_config(write_pairs(tmp_path / "m.parquet", captions(30)), tmp_path / "pairs")
    run_job(config)
    assert place.convert(tmp_path / "pairs") == 0
    wanted = {row["id"]: row for row in good(tmp_path / "pairs").to_pylist()}
    rows = place.rows()
    assert set(rows) == set(wanted)
    assert len(rows) == 29
    for id, row in rows.items():
        assert (row["similarity"] is None) == (wanted[id]["similarity"] is None)
        pair = {"embedding": row["embedding"], "text_embedding": row.get("text_embedding")}
        if place.to == "qdrant":
            pair = {"text_embedding": None, **row["embedding"]}
        for name, vector in pair.items():
            floats = json.loads(vector) if isinstance(vector, str) else vector
            assert (floats is None) == (wanted[id][name] is None)
            assert floats is None or np.allclose(floats, wanted[id][name], atol=1e-6)


def test_parts_without_any_embedding_are_no_obstacle(tmp_path: Path, place: Place) -> None:
    scenes_manifest(tmp_path / "m.parquet", 12, damaged=dict.fromkeys([*range(4), *range(8, 12)], b"no picture"))
    limits = {"manifest": {"shard_rows": 4}, "errors": {"max_fraction": 1.0}}
    run_scenes(tmp_path, "bad", tmp_path / "m.parquet", **limits)
    assert place.convert(tmp_path / "bad") == 0
    assert place.count() == 4


def test_ids_that_are_numbers_stay_numbers(folder: Path, place: Place) -> None:
    assert place.convert(folder / "numbers") == 0
    assert set(place.rows()) == {7, 0, 2**62, *range(20, 27)}
    if place.to == "qdrant":
        with place.client() as client:
            [point] = client.retrieve("t", [2**62])
            assert point.payload["id"] == 2**62


def test_a_command_that_is_killed_goes_on_and_writes_no_row_twice(
    folder: Path, tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    kill = (
        "import os, signal, sys; from pipeline import convert; from pipeline.dataset import databases; "
        "from pipeline.dataset import pgvector, qdrant; made = databases._batches\n"
        "def batches(rows, dim):\n"
        "    for number, batch in enumerate(made(rows, dim)):\n"
        "        yield batch\n"
        "        if batch['id'][0].as_py() >= 'scene/0048.jpg': os.kill(os.getpid(), signal.SIGKILL)\n"
        "databases._batches, databases.ROWS = batches, 10\n"
        "sys.exit(convert.main(sys.argv[1:]))"
    )
    arguments = [str(folder / "float16"), "--to", place.to, "--out", place.out, "--table", "t"]
    ended = run_python("-c", kill, *arguments)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    # PostgreSQL has whole parts; Qdrant the beginning of the third one too.
    before = place.count()
    assert before == 46 if place.to == "pgvector" else before >= 46
    # The same dataset at another place is the same.
    shutil.copytree(folder / "float16", tmp_path / "moved")
    assert place.convert(tmp_path / "moved") == 0
    assert f"{GOOD - 46} of them written now" in capsys.readouterr().out
    rows = place.rows()
    assert (place.count(), len(rows)) == (GOOD, GOOD)
    assert place.convert(folder / "float16") == 0
    assert "0 of them written now" in capsys.readouterr().out
    assert place.rows() == rows


def test_tables_of_others_are_refused(folder: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.convert(folder / "float16") == 0
    assert place.convert(folder / "numbers") == 2
    assert "holds another dataset" in capsys.readouterr().err
    assert place.convert(folder / "numbers", "--replace") == 0
    assert place.count() == 10
    with place.client() as client:
        if place.to == "pgvector":
            client.execute("create table mine (id text)")
        else:
            from qdrant_client import models

            client.create_collection("mine", models.VectorParams(size=2, distance=models.Distance.DOT))
    assert place.convert(folder / "numbers", "--replace", table="mine") == 2
    assert "was not made by this command" in capsys.readouterr().err


def test_names_of_tables_are_checked(folder: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../up", "a;b", 'a"b', "", "a b"):
        assert place.convert(folder / "float16", table=name) == 2
        assert "--table" in capsys.readouterr().err


@pytest.mark.compat("psycopg")
class TestPostgres:
    @pytest.fixture
    def place(self, request: pytest.FixtureRequest, server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Place:
        import psycopg

        for name, value in server.items():
            monkeypatch.setenv(name, value)
        with psycopg.connect("postgresql:///postgres", autocommit=True) as connection:
            connection.execute("drop database if exists images with (force)")
            connection.execute("create database images")
        return Place("pgvector", "postgresql:///images")

    def test_types_are_those_of_postgresql(self, folder: Path, place: Place) -> None:
        assert place.convert(folder / "odd", "--index", table="public.odd") == 0
        query = (
            "select attname, format_type(atttypid, atttypmod) from pg_attribute "
            "where attrelid = 'odd'::regclass and attnum > 0"
        )
        with place.client() as client:
            types = dict(client.execute(query).fetchall())
            [indices] = client.execute("select array_agg(indexdef) from pg_indexes where tablename = 'odd'").fetchone()
            row = client.execute('select raw, took, ratio, "local" from odd where id = %s', [STRANGE[0]]).fetchone()
        assert (types["embedding"], types["when"], types["took"]) == (
            "vector(128)",
            "timestamp with time zone",
            "interval",
        )
        assert (types["tags"], types["top_scores"], types["meta"]) == ("text[]", "real[]", "jsonb")
        assert any("USING hnsw (embedding vector_cosine_ops)" in each for each in indices)
        assert (row[0], row[1], row[3]) == (b"\x00\xff", timedelta(seconds=1.5), datetime(1969, 12, 31))
        assert np.isnan(row[2])
        assert place.convert(folder / "odd", "--index", table="public.odd") == 0

    def test_a_nul_is_an_error_that_names_the_row(
        self, tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures = [jpeg(sample(5, row), 64, 64) for row in range(6)]
        for column, value in (("text", "a\0b"), ("meta", {"a": ["\0"]}), ("tags", ["\0"])):
            values = [None] * 5 + [value]
            table = pa.table({"id": list("abcdef"), "image": pictures, column: values})
            pq.write_table(table, tmp_path / "m.parquet")
            run_scenes(tmp_path, column, tmp_path / "m.parquet", manifest={"keep": [column], "shard_rows": 4})
            assert place.convert(tmp_path / column, table=column) == 1
            assert f"id = 'f', column {column}: PostgreSQL cannot store the character NUL" in capsys.readouterr().err
            with place.client() as client:
                assert client.execute(f"select count(*) from {column}").fetchone() == (4,)

    def test_a_password_is_never_shown(
        self, folder: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from urllib.parse import quote

        monkeypatch.delenv("PGPASSWORD")
        host, wrong = os.environ["PGHOST"], "not-the-password"
        place.out = f"postgresql://me:{quote(PASSWORD, safe='')}@/images?host={host}"
        assert place.convert(folder / "numbers") == 0
        said = capsys.readouterr()
        assert PASSWORD not in said.out + said.err
        assert quote(PASSWORD, safe="") not in said.out + said.err
        for bad, code in (
            (f"postgresql://me:{wrong}@/images?host={host}", 1),
            (f"postgresql://me@localhost:{wrong}/images", 2),
            (f"postgresql://me:a@{wrong}@localhost/images", 2),
            (f"postgresql://me:{wrong}%zz@/images", 2),
            (f"host={host} user=me password='{wrong}", 2),
            (wrong, 2),
        ):
            place.out = bad
            assert place.convert(folder / "numbers") == code, bad
            said = capsys.readouterr()
            assert wrong not in said.out + said.err

    def test_a_second_command_does_not_write_into_the_table_of_a_first(
        self, folder: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        real: Callable[..., Any] = databases._batches
        once: list[int] = []

        def batches(rows: pa.Table, dim: int) -> Iterator[pa.Table]:
            if not once:
                once.append(-1)
                once[0] = place.convert(folder / "float16")
            return real(rows, dim)

        monkeypatch.setattr(databases, "_batches", batches)
        assert place.convert(folder / "float16") == 75
        assert once == [0]
        assert "another command writes into t" in capsys.readouterr().err
        assert place.count() == GOOD


@pytest.mark.compat("qdrant_client")
def test_the_benchmark_measures_a_conversion(folder: Path, tmp_path: Path) -> None:
    found = benchmark.measure(str(folder / "numbers"), 10, "--to", "qdrant", "--out", str(tmp_path / "out"))
    assert found["rows_per_second"] > 0
    assert found["peak_mib"] > 10


@pytest.mark.compat("qdrant_client")
def test_a_folder_of_qdrant_does_not_lie_in_the_dataset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(folder / "float16")
    place = Place("qdrant", str(tmp_path / "link" / "inside"))
    assert place.convert(folder / "float16") == 2
    assert "lies in the dataset" in capsys.readouterr().err
    place.out = "http://me:secret@localhost:6333"
    assert place.convert(folder / "float16") == 2
    assert "secret" not in capsys.readouterr().err


@pytest.mark.compat("qdrant_client")
def test_a_server_of_qdrant_that_is_not_there_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Place("qdrant", "http://127.0.0.1:9").convert(folder / "float16") == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err
