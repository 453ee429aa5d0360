"""Samples that cover embeddings: every kind of row is in them, the same seed gives the same rows, and files say all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import sample
from pipeline.core.errors import ConfigError
from pipeline.dataset import coverage
from pipeline.dataset.analysis import analyses_of
from pipeline.dataset.coverage import Choice, Sample, draw_sample
from pipeline.dataset.dataset import Dataset
from tests.conftest import ROOT
from tests.finished import everything, write_vectors

METHODS = ("kmeans", "kcenter", "random")
ROWS, FAILED = 600, (5, 77, 300)
# Rows of each kind: the last is rare.
KINDS = (300, 200, 80, 17)


def kinds(seed: int = 0, dim: int = 32) -> tuple[NDArray[np.float32], list[str | None]]:
    """Rows around centres that are far apart, in random order; their label is the kind, or none. A few failed."""
    chance = np.random.default_rng(seed)
    centres = np.linalg.qr(chance.normal(size=(dim, dim)))[0][: len(KINDS)]
    kind = np.repeat(np.arange(len(KINDS)), KINDS)
    chance.shuffle(kind)
    vectors = np.full((ROWS, dim), np.nan, np.float32)
    there = np.setdiff1d(np.arange(ROWS), FAILED)
    noisy = centres[kind] + 0.05 * chance.normal(size=(len(kind), dim))
    vectors[there] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    labels: list[str | None] = [None] * ROWS
    for row, number in zip(there.tolist(), kind.tolist(), strict=True):
        # Rows of the most frequent kind have no label.
        labels[row] = f"kind {number}" if number else None
    return vectors, labels


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    vectors, labels = kinds()
    return write_vectors(str(tmp_path_factory.mktemp("coverage") / "d"), vectors, label=labels, shard_rows=70)


def unit(dataset: Dataset) -> NDArray[np.float64]:
    """The embeddings of all rows in float64, of length 1, NaN for those that failed."""
    form = dataset.form
    rows = [[np.nan] * form.dim if cell is None else form.decode(np.array([cell], form.element))[0]
            for cell in everything(dataset)["embedding"].to_pylist()]  # fmt: skip
    vectors = np.array(rows, np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def chosen(found: Sample) -> list[int]:
    return [int(name.removeprefix("row-")) for name in found.table["id"].to_pylist()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 4, 40, 597])
def test_a_sample_has_as_many_different_rows_as_were_wanted(dataset: Dataset, method: str, rows: int) -> None:
    found = draw_sample(dataset, Choice(method, rows))
    there = chosen(found)
    assert len(set(there)) == rows == found.counts["sampled"]
    assert there == sorted(there)
    assert not set(there) & set(FAILED)
    assert found.counts["left_out"] == len(FAILED)
    assert found.table.schema.names == ["id", "label", "cluster", "distance", "size"]
    labels = everything(dataset)["label"].to_pylist()
    assert found.table["label"].to_pylist() == [labels[row] for row in there]
    if method == "random":
        assert found.clusters is None
        assert found.table["cluster"].null_count == found.table["size"].null_count == rows


@pytest.mark.parametrize("seed", range(4))
def test_a_row_of_each_kind_is_taken(dataset: Dataset, seed: int) -> None:
    for method, rows in (("kcenter", len(KINDS)), ("kmeans", 24)):
        labels = draw_sample(dataset, Choice(method, rows, seed=seed)).table["label"].to_pylist()
        assert set(labels) == {None, "kind 1", "kind 2", "kind 3"}


def test_the_taken_rows_are_nearest_to_the_centres_of_their_clusters(dataset: Dataset) -> None:
    found = draw_sample(dataset, Choice("kmeans", 10))
    assert found.clusters is not None
    cluster, distance = found.clusters
    vectors = unit(dataset)[found.rows]
    lines = found.table.to_pylist()
    assert len({line["cluster"] for line in lines}) == 10
    for line in lines:
        members = np.flatnonzero(cluster == line["cluster"])
        assert line["size"] == len(members)
        assert line["distance"] == distance[members].min()
        row = int(line["id"].removeprefix("row-"))
        assert row in found.rows[members]
    # The centres are means of their rows but for the last round: rows are near to the mean of their cluster.
    means = np.stack([vectors[cluster == number].mean(axis=0) for number in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.mean((vectors @ means.T).argmax(axis=1) == cluster) > 0.97
    assert 1 - np.einsum("ij,ij->i", vectors, means[cluster]) == pytest.approx(distance, abs=0.01)


def test_the_farthest_row_comes_next(dataset: Dataset) -> None:
    found = draw_sample(dataset, Choice("kcenter", 30))
    assert found.clusters is not None
    cluster, distance = found.clusters
    there = chosen(found)
    vectors, centres = unit(dataset)[found.rows], unit(dataset)[there]
    cosines = vectors @ centres.T
    # Each row has the nearest taken one; no two taken ones are nearer than the worst covered row.
    assert distance == pytest.approx(1 - cosines.max(axis=1), abs=1e-5)
    between = centres @ centres.T - 2 * np.eye(30)
    assert 1 - between.max() >= distance.max() - 1e-5
    lines = found.table.to_pylist()
    assert [line["distance"] for line in lines] == pytest.approx([0] * 30, abs=1e-6)
    assert sorted(line["cluster"] for line in lines) == list(range(30))
    assert sum(line["size"] for line in lines) == 597
    assert np.bincount(cluster).tolist() == [line["size"] for line in sorted(lines, key=lambda line: line["cluster"])]


@pytest.mark.parametrize("method", METHODS)
def test_each_label_has_its_share(dataset: Dataset, method: str) -> None:
    found = draw_sample(dataset, Choice(method, per_label=20, seed=3))
    labels = found.table["label"].to_pylist()
    assert {label: labels.count(label) for label in set(labels)} == {None: 20, "kind 1": 20, "kind 2": 20, "kind 3": 17}
    assert found.counts["labels"] == 4
    assert found.parameters == {"method": method, "per_label": 20, "seed": 3}
    if method == "random":
        return
    assert found.clusters is not None
    # A cluster has rows of one label.
    every = everything(dataset)["label"].to_pylist()
    for number in range(77):
        members = found.rows[found.clusters[0] == number].tolist()
        assert len({every[row] for row in members}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_is_a_sample(dataset: Dataset, method: str, tmp_path: Path) -> None:
    one, again, other = (draw_sample(dataset, Choice(method, 50, seed=seed)) for seed in (1, 1, 2))
    assert one.table.equals(again.table)
    assert chosen(one) != chosen(other)
    # Shards of another size hold the same rows.
    vectors, labels = kinds()
    split = write_vectors(str(tmp_path / "d"), vectors, label=labels, shard_rows=250)
    assert draw_sample(split, Choice(method, 50, seed=1)).table.equals(one.table)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_the_number_of_threads_does_not_change_a_sample(dataset: Dataset, method: str, tmp_path: Path) -> None:
    tables = []
    for threads in ("1", "2"):
        out = tmp_path / f"{threads}.parquet"
        command = [sys.executable, "-m", "pipeline.sample", dataset.address, "--rows", "60", "--method", method]
        environment = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PATH": "/usr/bin"}
        subprocess.run([*command, "--output", str(out)], env=environment, cwd=ROOT, check=True)
        tables.append(pq.read_table(out))
    assert tables[0].equals(tables[1])


def test_a_rounding_of_a_product_changes_no_cluster(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bits have many equal cosines.
    vectors, _ = kinds()
    there = np.sign(vectors[~np.isnan(vectors).any(axis=1)]).astype(np.float32) / np.float32(np.sqrt(32))
    centres = there[:50]
    expected = coverage.closest(there, centres)
    order = np.random.default_rng(0).permutation(32)
    found = coverage.closest(there[:, order], centres[:, order])
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[0], np.argmax(np.round(there.astype(np.float64) @ centres.T, 9), axis=1))


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_every_form_of_embeddings_is_sampled(dataset: Dataset, tmp_path: Path, dtype: str) -> None:
    vectors, labels = kinds()
    stored = write_vectors(str(tmp_path / "d"), vectors, dtype=dtype, label=labels, id=list(range(ROWS)))
    found = draw_sample(stored, Choice("kcenter", 4))
    assert len(set(found.table["label"].to_pylist())) == 4
    assert found.table.schema.field("id").type == pa.int64()
    assert draw_sample(stored, Choice("kmeans", 100)).counts["sampled"] == 100


@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_are_sampled_too(tmp_path: Path, method: str) -> None:
    vectors = np.tile(np.eye(4, dtype=np.float32), (20, 1))
    found = draw_sample(write_vectors(str(tmp_path / "d"), vectors), Choice(method, 30))
    assert len(set(chosen(found))) == 30
    if method == "kcenter":
        # The first four are one of each.
        few = draw_sample(write_vectors(str(tmp_path / "e"), vectors), Choice(method, 4))
        assert {row % 4 for row in chosen(few)} == {0, 1, 2, 3}


def test_kmeans_is_trained_on_a_part_of_the_rows(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "TRAINED", 60)
    monkeypatch.setattr(coverage, "AT_ONCE", 64)
    found = draw_sample(dataset, Choice("kmeans", 20))
    assert found.counts["sampled"] == 20
    assert set(found.table["label"].to_pylist()) >= {None, "kind 1", "kind 2"}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice(rows=0), "--rows = 0: must give 1 to 597 rows"),
        (Choice(rows=598), "--rows = 598: must give 1 to 597 rows; 597 have an embedding"),
        (Choice(per_label=0), "--per-label = 0"),
    ],
)
def test_a_number_that_cannot_be_had_is_refused(dataset: Dataset, choice: Choice, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        draw_sample(dataset, choice)


def test_limits_are_named(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = write_vectors(str(tmp_path / "d"), np.full((3, 4), np.nan, np.float32))
    for choice in (Choice(rows=1), Choice(per_label=1)):
        with pytest.raises(ConfigError, match="0 have an embedding"):
            draw_sample(failed, choice)
    monkeypatch.setattr(coverage, "PRODUCTS", 597 * 20 - 1)
    with pytest.raises(ConfigError, match="take kmeans"):
        draw_sample(dataset, Choice("kcenter", 20))
    draw_sample(dataset, Choice("kcenter", 19))
    monkeypatch.setattr(coverage, "NUMBERS", 597 * 32 - 1)
    with pytest.raises(ConfigError, match="numbers into memory"):
        draw_sample(dataset, Choice("kcenter", 5))


def test_the_command_writes_a_sample_and_all_clusters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors, labels = kinds(1)
    made = write_vectors(str(tmp_path / "d"), vectors, label=labels)
    assert sample.main([made.url, "--rows", "12"]) == 0
    assert "12 rows of 597 with an embedding" in capsys.readouterr().out
    assert list(analyses_of(made)) == ["sample"]
    assert sample.main([made.url, "--rows", "12", "--clusters", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = analyses_of(made)
    assert told["outputs"] == {kind: found[kind].url for kind in ("sample", "clusters")}
    assert found["clusters"].counts == told["counts"] == found["sample"].counts
    assert found["clusters"].parameters == {"method": "kmeans", "rows": 12, "seed": 0}
    assert all(each.fits(made) for each in found.values())
    every, few = (pq.read_table(found[kind].url).to_pylist() for kind in ("clusters", "sample"))
    ids = everything(made)["id"].to_pylist()
    assert [line["id"] for line in every] == [ids[row] for row in range(ROWS) if row not in FAILED]
    by_id = {line["id"]: line for line in every}
    for line in few:
        assert by_id[line["id"]] == {name: line[name] for name in ("id", "cluster", "distance")}
        assert sum(each["cluster"] == line["cluster"] for each in every) == line["size"]
    assert pq.read_schema(found["clusters"].url).field("cluster").type == pa.int32()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "random", "--clusters"], "--clusters"),
        (["--rows", "9999"], "--rows = 9999"),
        (["--output", "INSIDE"], "lies in the dataset"),
        (["--clusters", "INSIDE"], "lies in the dataset"),
    ],
)
def test_wrong_options_are_named(
    dataset: Dataset, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = f"{dataset.url}/x.parquet"
    assert sample.main([dataset.url, *(inside if word == "INSIDE" else word for word in options)]) == 2
    assert said in capsys.readouterr().err
    assert analyses_of(dataset) == {}


def test_a_machine_without_a_method_is_told(capsys: pytest.CaptureFixture[Any], dataset: Dataset) -> None:
    with pytest.raises(SystemExit) as left:
        sample.main([dataset.url, "--rows", "3", "--per-label", "3"])
    assert left.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
