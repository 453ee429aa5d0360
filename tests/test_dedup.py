"""Near duplicates: groups are those of a plain loop, every dropped row is near to its kept one, and files say all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import dedup
from pipeline.core.errors import ConfigError
from pipeline.dataset import kept
from pipeline.dataset.analysis import analyses_of, read_analysis
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.near_duplicates import Duplicates, find_duplicates
from tests.finished import everything, write_vectors
from tests.s3 import BUCKET, moto_server, pointed_at

DTYPES = ("float32", "float16", "int8", "binary")


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def planted(seed: int, rows: int = 230, dim: int = 24) -> NDArray[np.float32]:
    """Random rows, some of them copies, near copies, or steps of a chain whose ends are far apart; a few failed."""
    chance = np.random.default_rng(seed)
    vectors = unit(chance.normal(size=(rows, dim)))
    for row in chance.permutation(rows)[: rows // 2].tolist():
        other = vectors[chance.integers(rows)]
        noise = chance.normal(size=dim) / np.sqrt(dim) * chance.choice([0, 1e-3, 0.1, 0.3, 0.6])
        vectors[row] = unit((other + noise)[None])[0]
    # Without ties.
    angles = np.cumsum(chance.uniform(0.15, 0.25, size=12))
    chain = np.zeros((12, dim))
    chain[:, 0], chain[:, 1] = np.cos(angles), np.sin(angles)
    vectors[chance.permutation(rows)[:12]] = chain
    vectors[chance.permutation(rows)[:7]] = np.nan
    return vectors


def reference(dataset: Dataset, threshold: float, order: list[int] | None = None) -> dict[int, tuple[int, float]]:
    """The kept row of every row with an embedding, and the cosine, by a loop over all rows in float64."""
    form, chosen = dataset.form, []
    vectors: dict[int, NDArray[np.float64]] = {}
    cells = everything(dataset)["embedding"].to_pylist()
    for row, cell in enumerate(cells):
        if cell is not None:
            decoded = form.decode(np.array([cell], form.element))[0].astype(np.float64)
            vectors[row] = decoded / np.linalg.norm(decoded)
    answer: dict[int, tuple[int, float]] = {}
    copies: dict[bytes, int] = {}
    for row in order or sorted(vectors):
        first = copies.setdefault(vectors[row].tobytes(), row)
        if first != row:
            answer[row] = answer[first]
            continue
        best, cosine = -1, -1.0
        for other in chosen:
            value = np.float32(min(1.0, vectors[row] @ vectors[other]))
            if value >= np.float32(threshold) and value > cosine:
                best, cosine = other, float(value)
        if best < 0:
            chosen.append(row)
            best, cosine = row, 1.0
        answer[row] = (best, cosine)
    return answer


def rows_of(dataset: Dataset) -> list[Any]:
    found: list[Any] = everything(dataset)[dataset.id].to_pylist()
    return found


def check(dataset: Dataset, found: Duplicates, expected: dict[int, tuple[int, float]]) -> None:
    """The table says what the reference found, and is in the order that the format promises."""
    ids = rows_of(dataset)
    sizes: dict[int, int] = {}
    for owner, _ in expected.values():
        sizes[owner] = sizes.get(owner, 0) + 1
    lines = found.table.to_pylist()
    wanted = {ids[row]: (ids[owner], sizes[owner]) for row, (owner, _) in expected.items() if sizes[owner] > 1}
    assert {line["id"]: (line["kept_id"], line["size"]) for line in lines} == wanted
    cosines = {ids[row]: cosine for row, (_, cosine) in expected.items()}
    assert [line["similarity"] for line in lines] == pytest.approx([cosines[line["id"]] for line in lines], abs=1e-6)
    assert all(line["keep"] == (line["id"] == line["kept_id"]) for line in lines)
    groups = [line["group"] for line in lines]
    assert sorted(set(groups)) == list(range(len(set(groups))))
    assert groups == sorted(groups)
    first = [line for place, line in enumerate(lines) if place == 0 or groups[place - 1] != line["group"]]
    assert all(line["keep"] for line in first)
    assert [line["size"] for line in first] == sorted((line["size"] for line in first), reverse=True)
    assert found.counts["groups"] == len(first)
    assert found.counts["dropped"] == len(lines) - len(first)


@pytest.mark.parametrize("threshold", [0.999999, 0.98, 0.9, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threshold: float
) -> None:
    dataset = write_vectors(str(tmp_path / "d"), planted(seed))
    monkeypatch.setattr(kept, "BLOCK", 1 + 17 * seed)
    monkeypatch.setattr(kept, "KEYS", 5 + seed)
    found = find_duplicates(dataset, threshold)
    check(dataset, found, reference(dataset, threshold))
    assert found.counts["groups"] > 0
    assert found.counts["left_out"] == 7
    assert found.counts["rows"] == 230 == found.counts["embeddings"] + 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.95, 0.75])
def test_every_form_of_embeddings_is_compared_as_it_is_read(tmp_path: Path, dtype: str, threshold: float) -> None:
    dataset = write_vectors(str(tmp_path / "d"), planted(3, dim=40), dtype=dtype, id=list(range(500, 730)))
    found = find_duplicates(dataset, threshold)
    # Of 40 bits, 1 and 5 that differ are a cosine of just the threshold.
    check(dataset, found, reference(dataset, threshold))
    assert found.counts["dropped"] > 20
    assert found.table.schema.field("id").type == found.table.schema.field("kept_id").type == pa.int64()


@pytest.mark.compat("faiss")
@pytest.mark.parametrize("dtype", ["float32", "binary"])
def test_the_inverted_file_finds_the_same_when_it_reads_every_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    dataset = write_vectors(str(tmp_path / "d"), planted(4, dim=32), dtype=dtype)
    monkeypatch.setattr(kept, "EXACT_ROWS", 100)
    monkeypatch.setattr(kept, "BLOCK", 50)
    monkeypatch.setattr(kept, "RECALL", 1.0)
    monkeypatch.setattr("pipeline.dataset.near_duplicates.EXACT_ROWS", 100)
    found = find_duplicates(dataset, 0.9)
    assert found.parameters["search"]["recall"] == 1
    check(dataset, found, reference(dataset, 0.9))
    assert find_duplicates(dataset, 0.9, exact=True).parameters["search"] == "exact"


def test_without_faiss_many_rows_are_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_vectors(str(tmp_path / "d"), planted(4))
    monkeypatch.setattr("pipeline.dataset.near_duplicates.EXACT_ROWS", 100)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"without --exact.*search"):
        find_duplicates(dataset, 0.9)
    assert find_duplicates(dataset, 0.9, exact=True).counts["groups"] > 0
    assert find_duplicates(dataset, 1).counts["groups"] > 0


def test_the_ends_of_a_chain_are_not_taken_for_duplicates(tmp_path: Path) -> None:
    angles = np.array([0, 0.3, 0.6, 0.9])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = find_duplicates(write_vectors(str(tmp_path / "d"), vectors), 0.95).table.to_pylist()
    # 0.3 is within the threshold of 0 and of 0.6, and belongs to the first of them.
    assert [(line["id"], line["kept_id"]) for line in found] == [
        ("row-0", "row-0"),
        ("row-1", "row-0"),
        ("row-2", "row-2"),
        ("row-3", "row-2"),
    ]
    assert found[1]["similarity"] == pytest.approx(np.cos(0.3))
    assert [line["reason"] for line in found[:2]] == ["first row of its group", "cosine 0.955337 with the kept row"]


def test_a_row_is_a_duplicate_of_the_nearest_kept_one(tmp_path: Path) -> None:
    angles = np.array([0, 0.5, 0.3])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = find_duplicates(write_vectors(str(tmp_path / "d"), vectors), 0.95).table.to_pylist()
    assert [(line["id"], line["kept_id"]) for line in found] == [("row-1", "row-1"), ("row-2", "row-1")]


@pytest.mark.parametrize("threshold", [1.0, 0.95])
def test_copies_of_one_picture_are_one_group(tmp_path: Path, threshold: float) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20_000, 16)))
    vectors[1:18_001] = vectors[0]
    vectors[-1] = vectors[-2] + np.float32(1e-5)
    found = find_duplicates(write_vectors(str(tmp_path / "d"), vectors, shard_rows=3000), threshold)
    assert found.counts["different"] == 2000
    assert found.table["size"][0].as_py() == 18_001
    assert set(found.table["reason"].to_pylist()[:18_001]) == {
        "first row of its group",
        "same embedding as the kept row",
    }
    # A difference in a later digit is one.
    assert ("row-19999" in found.table["id"].to_pylist()) == (threshold < 1)


def test_many_rows_that_are_nearly_the_same_take_no_pairs(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    vectors = unit(np.ones(64) + 1e-3 * chance.normal(size=(20_000, 64)))
    found = find_duplicates(write_vectors(str(tmp_path / "d"), vectors, shard_rows=5000), 0.99)
    assert found.counts == {
        "rows": 20_000,
        "left_out": 0,
        "embeddings": 20_000,
        "different": 20_000,
        "groups": 1,
        "dropped": 19_999,
    }


def test_the_preferred_row_of_a_group_is_kept(tmp_path: Path) -> None:
    base = unit(np.random.default_rng(2).normal(size=(3, 16)))
    vectors = base[[0, 1, 0, 0, 1, 2, 2]]
    widths = [10, 7, 30, 30, None, None, None]
    taken = pa.array([5, 4, 3, 2, 1, 0, 0], pa.timestamp("s"))
    dataset = write_vectors(str(tmp_path / "d"), vectors, shard_rows=3, width=widths, taken=taken)

    def kept_by(rule: str) -> set[str]:
        return set(find_duplicates(dataset, 0.95, rule).table["kept_id"].to_pylist())

    assert kept_by("first") == {"row-0", "row-1", "row-5"}
    assert kept_by("max:width") == {"row-2", "row-1", "row-5"}
    assert kept_by("min:width") == {"row-0", "row-1", "row-5"}
    assert kept_by("min:taken") == {"row-3", "row-4", "row-5"}
    reasons = find_duplicates(dataset, 0.95, "max:width").table["reason"].to_pylist()
    assert reasons[0] == "highest width of its group, then the first row"


@pytest.mark.parametrize("seed", range(3))
def test_groups_by_preference_are_those_of_a_plain_loop(tmp_path: Path, seed: int) -> None:
    widths = np.random.default_rng(seed).integers(0, 20, size=230)
    vectors = planted(seed)
    dataset = write_vectors(str(tmp_path / "d"), vectors, width=widths)
    there = [row for row in range(230) if not np.isnan(vectors[row]).any()]
    order = sorted(there, key=lambda row: (-widths[row], row))
    expected = reference(dataset, 0.9, order)
    found = find_duplicates(dataset, 0.9, "max:width")
    ids = rows_of(dataset)
    assert {line["id"]: line["kept_id"] for line in found.table.to_pylist()}.items() <= {
        ids[row]: ids[owner] for row, (owner, _) in expected.items()
    }.items()
    assert found.counts["dropped"] == sum(row != owner for row, (owner, _) in expected.items())


def test_a_dataset_without_duplicates_or_embeddings_has_no_group(tmp_path: Path) -> None:
    for name, vectors in (("none", np.eye(9)), ("failed", np.full((9, 4), np.nan))):
        dataset = write_vectors(str(tmp_path / name), vectors.astype(np.float32))
        found = find_duplicates(dataset, 0.95)
        assert (found.counts["groups"], found.counts["dropped"], len(found.table)) == (0, 0, 0)
        assert dedup.main([dataset.url]) == 0
        assert read_analysis(f"{dataset.url}.duplicates.parquet").rows == 0


@pytest.mark.parametrize("threshold", [1.01, 0, -0.5, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(tmp_path: Path, threshold: float) -> None:
    dataset = write_vectors(str(tmp_path / "d"), np.eye(4, dtype=np.float32))
    with pytest.raises(ConfigError, match="--threshold"):
        find_duplicates(dataset, threshold)


@pytest.mark.parametrize(
    ("rule", "said"),
    [("last", "must be first, max:COLUMN"), ("max:", "a column of numbers"), ("max:name", "numbers or times: width")],
)
def test_a_rule_that_cannot_be_followed_is_refused(tmp_path: Path, rule: str, said: str) -> None:
    dataset = write_vectors(str(tmp_path / "d"), np.eye(2, dtype=np.float32), width=[1, 2], name=["a", "b"])
    with pytest.raises(ConfigError, match=said):
        find_duplicates(dataset, 0.9, rule)


def test_the_command_writes_a_file_beside_the_dataset_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_vectors(str(tmp_path / "d"), planted(5))
    before = sorted((tmp_path / "d").rglob("*"))
    assert dedup.main([dataset.url, "--threshold", "0.9"]) == 0
    said = capsys.readouterr().out
    found = find_duplicates(dataset, 0.9)
    assert (
        f"{found.counts['groups']:,} groups; keeping one row of each drops {found.counts['dropped']:,} of 230" in said
    )
    analysis = analyses_of(dataset)["duplicates"]
    assert analysis.fits(dataset)
    assert analysis.parameters == {"threshold": 0.9, "keep": "first", "search": "exact"}
    assert analysis.counts == found.counts
    assert pq.read_table(analysis.url).equals(found.table)
    assert analysis.schema.names == ["id", "group", "size", "keep", "kept_id", "similarity", "reason"]
    assert sorted((tmp_path / "d").rglob("*")) == before
    assert dedup.main([dataset.url, "--output", str(tmp_path / "other.parquet"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["output"] == str(tmp_path / "other.parquet")
    assert summary["largest"][0]["size"] == pq.read_table(summary["output"])["size"][0].as_py()
    assert dedup.main([dataset.url, "--output", f"{dataset.url}/x.parquet"]) == 2
    assert "lies in the dataset" in capsys.readouterr().err
    assert dedup.main([str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("size", [7, 50])
def test_duckdb_makes_a_manifest_without_the_duplicates(tmp_path: Path, size: int) -> None:
    duckdb = pytest.importorskip("duckdb")
    dataset = write_vectors(str(tmp_path / "d"), planted(6), shard_rows=size)
    pq.write_table(pa.table({"id": rows_of(dataset), "path": rows_of(dataset)}), tmp_path / "m.parquet")
    dedup.main([dataset.url])
    unwanted = f"(from '{tmp_path}/d.duplicates.parquet' where not keep)"
    unique = f"from '{tmp_path}/m.parquet' anti join {unwanted} using (id)"
    duckdb.sql(f"copy ({unique}) to '{tmp_path}/unique.parquet'")
    dropped = find_duplicates(dataset, 0.95).counts["dropped"]
    assert dropped > 0
    assert pq.read_metadata(tmp_path / "unique.parquet").num_rows == 230 - dropped


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url, pointed_at(url):
        yield


@pytest.mark.slow
def test_a_dataset_in_s3_has_its_file_beside_it(store: None, tmp_path: Path) -> None:
    here = write_vectors(str(tmp_path / "d"), planted(0))
    there = write_vectors(f"s3://{BUCKET}/sets/d", planted(0))
    for _ in range(2):
        assert dedup.main([there.url]) == 0
    found = analyses_of(there)["duplicates"]
    assert found.url == f"s3://{BUCKET}/sets/d.duplicates.parquet"
    assert found.counts == find_duplicates(here, 0.95).counts
    assert dedup.main([here.url, "--output", f"s3://{BUCKET}/here.parquet"]) == 0
    assert read_analysis(f"s3://{BUCKET}/here.parquet").fits(here)


def clustered(rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of a few thousand kinds, a tenth of them near copies of earlier rows, at cosines around 0.95 to 1."""
    chance = np.random.default_rng(seed)
    kinds = chance.normal(size=(rows // 100, dim))
    vectors = unit(kinds[chance.integers(len(kinds), size=rows)] + 0.8 * chance.normal(size=(rows, dim)))
    copies = chance.permutation(np.arange(rows // 2, rows))[: rows // 10]
    spread = chance.uniform(0, 0.32, size=(len(copies), 1)) / np.sqrt(dim)
    vectors[copies] = unit(vectors[copies - rows // 2] + spread * chance.normal(size=(len(copies), dim)))
    return vectors


@pytest.mark.slow
@pytest.mark.compat("faiss")
def test_faiss_finds_nearly_all_that_the_exact_search_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "EXACT_ROWS", 10_000)
    monkeypatch.setattr("pipeline.dataset.near_duplicates.EXACT_ROWS", 10_000)
    dataset = write_vectors(str(tmp_path / "d"), clustered(40_000, 64), dtype="float16", shard_rows=8192)
    exact, faiss = (find_duplicates(dataset, 0.95, exact=each) for each in (True, False))
    assert exact.parameters["search"] == "exact"
    assert faiss.parameters["search"]["recall"] >= 0.99
    dropped = [
        set(each.table.filter(pa.compute.invert(each.table["keep"]))["id"].to_pylist()) for each in (exact, faiss)
    ]
    recall = len(dropped[0] & dropped[1]) / len(dropped[0])
    assert len(dropped[0]) > 3_333
    assert recall > 0.985
    assert min(faiss.table["similarity"].to_pylist()) >= np.float32(0.95)
