"""Relabelling: equal to a full run with the new prompts, resumable, and refused where it would not be."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import convert, relabel, search, verify
from pipeline.core.errors import StorageError, UnfinishedDataset
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.vectors import vectors_of
from pipeline.storage.factory import open_storage
from tests.damage import flip, part_of
from tests.finished import FAILED, ROWS, everything, run_scenes
from tests.forks import forks
from tests.jobs import content, scenes_manifest
from tests.s3 import BUCKET, moto_server, pointed_at

LABELS = ["a cat", "red circle", "blue square", "green star", "pink cross", "triangle"]
PROMPTS = {"labels": LABELS, "templates": ["{}", "a photo of a {}"]}
TYPED = [f"prompts.labels={json.dumps(LABELS)}", 'prompts.templates=["{}","a photo of a {}"]', "report.progress=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``, and ``full``: a whole run with the new prompts; the manifest is gone, and with it every image."""
    made = tmp_path_factory.mktemp("relabel")
    manifest = scenes_manifest(made / "m.parquet", ROWS)
    run_scenes(made, "source", manifest)
    run_scenes(made, "half", manifest, output={"dtype": "float16"})
    run_scenes(made, "full", manifest, prompts=PROMPTS, labels={"top_k": 3, "threshold": 0.5})
    manifest.unlink()
    return made


def new(folder: Path, output: Path, *typed: str, source: str = "source") -> int:
    return relabel.main([str(folder / source), f"output.dir={output}", *TYPED, *typed])


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    assert new(folder, folder / "new", "labels.top_k=3", "labels.threshold=0.5") == 0
    return folder / "new"


def job(source: str, output: str) -> int:
    """Relabel, for a process of its own."""
    return new(Path(source).parent, Path(output), "labels.top_k=3", "labels.threshold=0.5")


def test_a_relabelled_dataset_equals_a_full_run_with_the_new_prompts(folder: Path, done: Path) -> None:
    ours, full = open_dataset(str(done)), open_dataset(str(folder / "full"))
    assert len(ours.commits) == len(full.commits) == 5
    for mine, other in zip(ours.commits, full.commits, strict=True):
        assert (mine.rows, mine.counts) == (other.rows, other.counts)
        # Bit for bit, the scores too; and the same schema but for the fingerprints.
        one, two = pq.read_table(f"{ours.url}/{mine.part}"), pq.read_table(f"{full.url}/{other.part}")
        assert one.equals(two)
        assert one.schema.equals(two.schema)
    table = everything(ours)
    assert [row for row, status in enumerate(table["status"].to_pylist()) if status != "ok"] == list(FAILED)
    assert set(table["label"].to_pylist()) <= {*LABELS, None}


def test_the_fingerprints_are_the_source_s_with_new_prompts_and_a_pointer_back(folder: Path, done: Path) -> None:
    ours, source, full = (open_dataset(str(each)) for each in (done, folder / "source", folder / "full"))
    prints = dict(ours.plan.fingerprints)
    assert prints.pop("source") == source.fingerprint
    assert prints == full.plan.fingerprints
    assert ours.plan.about["source"] == str(folder / "source")
    assert verify.main([str(done)]) == 0


def test_a_report_says_what_was_done(folder: Path, done: Path) -> None:
    report = json.loads((done / "_report.json").read_text())
    assert (report["rows"], report["vectors"], report["total_rows"]) == (ROWS, ROWS - len(FAILED), ROWS)
    assert report["source"]["dataset"] == str(folder / "source")
    before, after = (everything(open_dataset(str(each)))["label"].to_pylist() for each in (folder / "source", done))
    assert report["changed"] == sum(one != two for one, two in zip(before, after, strict=True))
    assert report["labels"] == dict(sorted(report["labels"].items(), key=lambda item: -item[1]))
    assert sum(report["labels"].values()) == sum(label is not None for label in after)
    assert set(report["stages"]) == {"read", "label", "write"}


def test_a_second_run_finds_nothing_to_do(folder: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = content(done), (done / "_report.json").read_bytes()
    assert job(str(folder / "source"), str(done)) == 0
    assert "nothing to do" in capfd.readouterr().err
    assert (content(done), (done / "_report.json").read_bytes()) == before


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("part.published=kill@2", marks=pytest.mark.slow),
        "commit.done=kill@3",
        pytest.param("finalize.checked=kill", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    folder: Path, done: Path, tmp_path: Path, point: str
) -> None:
    arguments = str(folder / "source"), str(tmp_path / "out")
    child = forks().start("tests.test_relabel:job", *arguments, failpoints=point)
    assert child.wait() == -signal.SIGKILL, child.said()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    child = forks().start("tests.test_relabel:job", *arguments)
    assert child.wait() == 0, child.said()
    assert content(tmp_path / "out") == content(done)


def test_float16_embeddings_give_the_same_labels_and_nearly_the_same_scores(folder: Path, tmp_path: Path) -> None:
    assert new(folder, tmp_path / "out", "labels.top_k=3", "labels.threshold=0.5", source="half") == 0
    ours, full = (everything(open_dataset(str(each))) for each in (tmp_path / "out", folder / "full"))
    assert ours["embedding"].type.value_type == pa.float16()
    one, two = ours["score"].to_numpy(zero_copy_only=False), full["score"].to_numpy(zero_copy_only=False)
    assert np.nanmax(np.abs(one - two)) < 0.02
    same = [a == b for a, b in zip(ours["label"].to_pylist(), full["label"].to_pylist(), strict=True)]
    assert np.mean(same) > 0.97


def test_what_is_not_given_is_as_in_the_source(folder: Path, tmp_path: Path) -> None:
    typed = [str(folder / "full"), f"output.dir={tmp_path / 'out'}", "labels.threshold=null", "report.progress=none"]
    assert relabel.main(typed) == 0
    ours, full = (everything(open_dataset(str(each))) for each in (tmp_path / "out", folder / "full"))
    assert ours["top_labels"].equals(full["top_labels"])
    assert ours["label"].null_count == len(FAILED) < full["label"].null_count


def test_labels_from_a_file_take_the_place_of_those_in_the_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,prompt\nround,a circle\nedgy,a square\n")
    typed = [str(folder / "full"), f"output.dir={tmp_path / 'out'}", f"prompts.path={tmp_path / 'labels.csv'}"]
    assert relabel.main([*typed, "report.progress=none", "labels.threshold=null"]) == 0
    labels = set(everything(open_dataset(str(tmp_path / "out")))["label"].to_pylist())
    assert labels == {"round", "edgy", None}


def test_repair_of_a_relabelled_dataset_reads_its_source(folder: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "copy")
    part_of(tmp_path / "copy", 2).unlink()
    assert verify.main([str(tmp_path / "copy")]) == 1
    assert verify.main([str(tmp_path / "copy"), "--repair"]) == 0
    assert content(tmp_path / "copy") == content(done)


# Refusals.


def test_an_unfinished_source_is_refused_with_75(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "source", tmp_path / "source")
    (tmp_path / "source" / "_SUCCESS").unlink()
    with pytest.raises(UnfinishedDataset, match="run the command that began it"):
        open_dataset(str(tmp_path / "source"))
    assert new(tmp_path, tmp_path / "out") == 75
    assert "is not finished" in capsys.readouterr().err
    assert new(tmp_path, tmp_path / "out", source="nothing") == 2
    assert "no dataset is here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(folder, tmp_path / "out", "model.weights=random") == 2
    assert "is not the model that made" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert not (tmp_path / "out" / "_plan.json").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["output.dir=x", "loader.batch_size=3"], "loader.batch_size=3': must be as in the source"),
        (["output.dir=x", "output.dtype=float16"], "must be as in the source"),
        (["prompts.labels=[a]"], "must name the new dataset's folder"),
        (["output.dir=SOURCE", "prompts.labels=[a]"], "is the source itself"),
        (["output.dir=SOURCE/../source", "prompts.labels=[a]"], "is the source itself"),
        (["output.dir=SOURCE/new", "prompts.labels=[a]"], "lies in the source"),
        (["output.dir=SOURCE/..", "prompts.labels=[a]"], "holds the source"),
        (["output.dir=x", "prompts.labels=[a,a]"], "is given twice"),
        (["output.dir=x", "labels.topk=3"], "top_k"),
    ],
)
def test_what_cannot_differ_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    typed: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    source = folder / "source"
    assert relabel.main([str(source), *(text.replace("SOURCE", str(source)) for text in typed)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_dataset_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(folder / "full")
    assert new(folder, folder / "full") == 2
    assert "holds a dataset of another job" in capsys.readouterr().err
    assert content(folder / "full") == before


def test_a_damaged_part_of_the_source_ends_it_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "source", tmp_path / "source")
    part = part_of(tmp_path / "source", 2)
    flip(part)
    assert new(tmp_path, tmp_path / "out") == 1
    assert f"{part.name}: damaged; python -m pipeline.verify" in capsys.readouterr().err
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    part.write_bytes(b"")
    dataset = open_dataset(str(tmp_path / "source"))
    with pytest.raises(StorageError, match="not readable as Parquet"):
        list(dataset.stream(["id"]))


def test_parts_come_in_order_with_the_columns_asked_for(folder: Path) -> None:
    dataset = open_dataset(str(folder / "source"))
    tables = list(dataset.stream(["status", "id"]))
    assert [table.column_names for table in tables] == [["status", "id"]] * 5
    assert pa.concat_tables(tables)["id"].to_pylist() == [f"scene/{row:04d}.jpg" for row in range(ROWS)]
    assert dataset.kept == ["truth", "meta"]
    assert (dataset.vectors, dataset.dim, dataset.starts.tolist()) == (118, 128, [0, 24, 48, 72, 96])


def test_vectors_are_those_of_the_rows_that_have_one() -> None:
    kind = pa.list_(pa.float16(), 2)
    chunks = [pa.array([[1, 2], None, [3, 4]], kind), pa.array([None], kind), pa.array([[5, 6]], kind)]
    stored, rows = vectors_of(pa.chunked_array(chunks))
    assert (stored.dtype, stored.tolist(), rows.tolist()) == (np.float16, [[1, 2], [3, 4], [5, 6]], [0, 2, 4])
    stored, rows = vectors_of(pa.chunked_array([chunks[1]]))
    assert (stored.shape, rows.tolist()) == ((0, 2), [])
    stored, rows = vectors_of(pa.chunked_array([chunks[0].slice(1)]))
    assert (stored.tolist(), rows.tolist()) == ([[3, 4]], [1])


@pytest.mark.compat("moto")
def test_in_s3_it_is_read_relabelled_searched_and_converted_as_on_a_disk(
    folder: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with moto_server(tmp_path / "log") as url, pointed_at(url):
        source, output = (f"s3://{BUCKET}/{name}" for name in ("source", "out"))
        storage = open_storage(source)
        for name, data in content(folder / "source").items():
            storage.write(name, data)
        assert relabel.main([source, f"output.dir={output}", *TYPED, "labels.top_k=3", "labels.threshold=0.5"]) == 0
        names = [name for name in content(done) if name.startswith(("part-", "_commits", "_SUCCESS"))]
        assert {name: open_storage(output).read(name) for name in names} == {
            name: (done / name).read_bytes() for name in names
        }
        found = []
        for place in (output, str(done)):
            assert search.main([place, "--id", "scene/0007.jpg", "--json"]) == 0
            found.append(capsys.readouterr().out)
        assert found[0] == found[1]
        assert search.main([output, "--build-index"]) == 0
        capsys.readouterr()
        assert search.main([output, "--id", "scene/0007.jpg", "--json", "--index", "--top", "3"]) == 0
        assert json.loads(capsys.readouterr().out)[0] == json.loads(found[0])[0]
        assert convert.main([output, "--to", "numpy", "--out", str(tmp_path / "numpy")]) == 0
        assert len(np.load(tmp_path / "numpy" / "embeddings.npy")) == ROWS - len(FAILED)
