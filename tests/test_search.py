"""Search: results equal brute force, and an index is valid for one state of its dataset."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import search, verify
from pipeline.config.schema import ModelConfig
from pipeline.core.errors import ArtifactError, ConfigError, NumericalError
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.index import NEIGHBOURS, RECALL, build_index, read_card, search_index
from pipeline.dataset.search import Found, fetch, find_row, merge, nearest, score
from pipeline.engine.query import embed_text
from pipeline.models.checkpoint import open_checkpoint
from tests.finished import FAILED, ROWS, everything, matrix_of, run_scenes
from tests.jobs import scenes_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    manifest = scenes_manifest(made / "m.parquet", ROWS)
    run_scenes(made, "dataset", manifest)
    run_scenes(made, "half", manifest, output={"dtype": "float16"})
    return made


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(str(folder / "dataset"))


@pytest.fixture(scope="module")
def indexed(folder: Path) -> Dataset:
    shutil.copytree(folder / "dataset", folder / "indexed")
    assert search.main([str(folder / "indexed"), "--build-index"]) == 0
    return open_dataset(str(folder / "indexed"))


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert search.main([*arguments, "--json"]) == 0
    hits: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return hits


def test_the_scene_that_a_text_describes_comes_first(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    truths = sorted(set(everything(dataset)["truth"].to_pylist()))
    texts = embed_text(open_checkpoint(ModelConfig()), [f"a {truth}" for truth in truths])
    first = [fetch(dataset, best)[0] for best in nearest(dataset, texts, 1)]
    right = [hit.kept["truth"] == truth for hit, truth in zip(first, truths, strict=True)]
    assert np.mean(right) >= 0.95
    hits = found(capsys, dataset.url, f"a {truths[0]}", "--top", "3")
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["kept"]["truth"] == truths[0]  # type: ignore[index]
    assert hits[0]["id"] == first[0].id


@pytest.mark.parametrize("name", ["dataset", "half"])
def test_the_nearest_are_those_of_brute_force(folder: Path, name: str) -> None:
    data = open_dataset(str(folder / name))
    matrix = matrix_of(everything(data)).astype(np.float64)
    rows = np.delete(np.arange(ROWS), FAILED)
    queries = np.random.default_rng(0).standard_normal((5, data.dim)).astype(np.float32)
    for query, best in zip(queries, nearest(data, queries, 30), strict=True):
        order = np.argsort(-(matrix @ query.astype(np.float64)), kind="stable")[:30]
        assert best.rows.tolist() == rows[order].tolist()
        assert np.allclose(best.scores, matrix[order] @ query.astype(np.float64), atol=1e-9)
    assert len(nearest(data, queries[:1], 1000)[0].rows) == ROWS - len(FAILED)
    with pytest.raises(NumericalError, match="queries must be finite"):
        nearest(data, queries[:, 1:], 3)


def test_equal_rows_have_equal_scores_and_keep_their_order() -> None:
    dice = np.random.default_rng(1)
    row, query = dice.standard_normal((2, 515)).astype(np.float32)
    matrix = np.tile(row, (37, 1))
    assert len(set(score(matrix, query).tolist())) == 1
    parts = [Found(np.array([5, 1]), np.array([0.5, 0.5])), Found(np.array([9, 0]), np.array([0.7, 0.5]))]
    assert merge(parts, 3).rows.tolist() == [9, 0, 1]


def test_a_row_s_neighbours_leave_itself_out(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    hits = found(capsys, dataset.url, "--id", "scene/0050.jpg", "--top", "4")
    row, query = find_row(dataset, "scene/0050.jpg")
    wanted = fetch(dataset, nearest(dataset, query[None], 5)[0])
    assert (row, wanted[0].id) == (50, "scene/0050.jpg")
    assert [hit["id"] for hit in hits] == [hit.id for hit in wanted[1:]]
    for id, message in (("scene/9999.jpg", "no row of .* has this id"), ("scene/0003.jpg", "not_an_image")):
        with pytest.raises(ConfigError, match=message):
            find_row(dataset, id)


def test_an_image_finds_itself(folder: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder / "one of them.jpg"
    picture.write_bytes(pq.read_table(folder / "m.parquet")["image"][77].as_py())
    hits = found(capsys, dataset.url, "--image", str(picture), "--top", "2")
    assert hits[0]["id"] == "scene/0077.jpg"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    picture.write_bytes(b"no picture")
    assert search.main([dataset.url, "--image", str(picture)]) == 2
    assert "one of them.jpg': not_an_image" in capsys.readouterr().err
    assert search.main([dataset.url, "--image", str(folder / "nothing.jpg")]) == 2
    assert "not_found" in capsys.readouterr().err


def test_a_table_shows_ids_labels_and_plain_columns(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([dataset.url, "a red circle", "--top", "2"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "score", "id", "label", "truth"]
    assert first.startswith("1 ")
    assert second.startswith("2 ")


def test_nothing_in_a_row_controls_the_terminal() -> None:
    assert search._shown("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert search._shown("x" * 100 + "end").endswith("xend")
    assert len(search._shown("x" * 100)) == search.WIDTH


def test_ids_out_of_range_and_texts_that_are_not_utf_8_are_refused(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(dataset.url.replace("dataset", "m.parquet")).slice(0, 3)
    pq.write_table(rows.set_column(0, "id", pa.array([5, 6, 2**63], pa.uint64())), tmp_path / "m.parquet")
    run_scenes(tmp_path, "numbers", tmp_path / "m.parquet", manifest={"keep": []})
    numbers = open_dataset(str(tmp_path / "numbers"))
    assert find_row(numbers, str(2**63))[0] == 2
    for id in (str(10**30), "-1", "x"):
        with pytest.raises(ConfigError, match="are uint64"):
            find_row(numbers, id)
    assert search.main([dataset.url, "a \udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert search.main([dataset.url, "--image", "~nobody at all/x.jpg"]) == 2
    assert "not_found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one of a text"),
        (["a", "--id", "b"], "needs one of a text"),
        ([" "], "is empty"),
        (["a", "--top", "0"], "from 1 to"),
        (["a", "--build-index"], "takes no query"),
        (["a", "--model", "/no/such/folder"], "no such folder"),
    ],
)
def test_a_wrong_query_is_refused(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert search.main([dataset.url, *arguments]) == 2
    assert message in capsys.readouterr().err


# The index.


@pytest.mark.compat("faiss")
def test_an_index_is_measured_against_brute_force_when_it_is_built(indexed: Dataset) -> None:
    card = read_card(indexed)
    assert card.vectors == ROWS - len(FAILED)
    assert set(card.recall) == {"rows", "texts"}
    assert min(card.recall.values()) >= RECALL
    assert card.dataset == indexed.fingerprint
    queries = embed_text(open_checkpoint(ModelConfig()), ["a red circle", "a blue square", "a star", "something pink"])
    hits = 0
    for query, truth in zip(queries, nearest(indexed, queries, NEIGHBOURS), strict=True):
        best = search_index(indexed, query, NEIGHBOURS)
        assert (np.diff(best.scores) <= 0).all()
        hits += len(np.intersect1d(best.rows, truth.rows))
    assert hits / (4 * NEIGHBOURS) >= 0.8


@pytest.mark.compat("faiss")
def test_the_index_answers_as_the_exact_search_does(indexed: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    exact = found(capsys, indexed.url, "--id", "scene/0050.jpg", "--top", "3")
    assert found(capsys, indexed.url, "--id", "scene/0050.jpg", "--top", "3", "--index")[0] == exact[0]


@pytest.mark.compat("faiss")
def test_readers_and_verify_ignore_the_index(indexed: Dataset) -> None:
    assert len(pd.read_parquet(indexed.url)) == ROWS
    assert verify.main([indexed.url]) == 0


@pytest.mark.compat("faiss")
def test_an_index_of_another_state_is_refused_with_a_hint(
    indexed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(indexed.url, copy)
    (copy / "_SUCCESS").write_bytes((copy / "_SUCCESS").read_bytes() + b" ")
    assert search.main([str(copy), "a star", "--index"]) == 2
    assert "of another state" in (message := capsys.readouterr().err)
    assert f"python -m pipeline.search {copy} --build-index" in message
    assert build_index(open_dataset(str(copy)), lambda: None).recall.keys() == {"rows"}
    assert len(list((copy / "_index").glob("*.faiss"))) == 1
    assert search.main([str(copy), "a star", "--index"]) == 0
    index = next((copy / "_index").glob("*.faiss"))
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="missing or torn"):
        read_card(open_dataset(str(copy)))
    (copy / "_index" / "index.json").write_text("[")
    with pytest.raises(ArtifactError, match="not readable"):
        read_card(open_dataset(str(copy)))


@pytest.mark.needs("faiss")
def test_without_an_index_the_message_has_a_hint(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([dataset.url, "a star", "--index"]) == 2
    assert "has no index; python -m pipeline.search" in capsys.readouterr().err


def test_without_the_library_of_indexes_the_message_has_a_hint(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert search.main([dataset.url, "a star", "--index"]) == 2
    assert ".[search]" in capsys.readouterr().err


def test_a_search_waits_for_a_library_that_another_thread_imports(folder: Path) -> None:
    code = f"""
import threading, numpy as np
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.search import nearest
dataset = open_dataset({str(folder / "half")!r})
query = np.full((1, dataset.dim), dataset.dim ** -0.5, np.float32)
wanted = nearest(dataset, query, 5)[0].rows.tolist()
importing = threading.Thread(target=__import__, args=("torch",))
importing.start()
while importing.is_alive():
    assert nearest(dataset, query, 5)[0].rows.tolist() == wanted
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
