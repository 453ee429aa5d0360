"""The scripts that a person would copy: what they say of a small store of nights is so, and they draw it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.vectors import VectorFormat
from pipeline.engine.demo.scenes import SHAPES
from pipeline.job.main import run_job
from pipeline.models.heads import read_head
from pipeline.nightly.store import RUN_SCHEMA
from tests.conftest import ROOT
from tests.jobs import config_for, scenes_manifest
from tests.processes import run_python

ANALYTICS = ROOT / "jobs" / "analytics"
SCRIPTS = sorted(path.stem for path in ANALYTICS.glob("*.py") if path.stem != "common")
ROWS, FAILED = 60, 2
# Rows of the second night: one label moved, a near copy of another row, one turned round.
MOVED, COPY, ORIGINAL, ODD = "scene/0010.jpg", "scene/0011.jpg", "scene/0012.jpg", "scene/0013.jpg"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    """Imports a script, as it would be started; matplotlib's settings are put back afterwards."""
    with pytest.MonkeyPatch.context() as patch, mpl.rc_context():
        patch.syspath_prepend(str(ANALYTICS))
        before = set(sys.modules)
        yield importlib.import_module
        for name in {"common", *SCRIPTS} - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights, the first by a job, the second in float16 with rows changed by hand, and one that is not finished."""
    folder = tmp_path_factory.mktemp("analytics")
    manifest = scenes_manifest(folder / "manifest.parquet", ROWS)
    first = folder / "nights" / "date=2026-01-01"
    run_job(config_for(manifest, first, prompts={"labels": list(SHAPES), "templates": ["a {}"]}))
    table = pq.read_table(first).to_pandas().set_index("id")
    table.at[MOVED, "label"] = "star" if table.at[MOVED, "label"] != "star" else "ring"
    table.at[COPY, "embedding"] = table.at[ORIGINAL, "embedding"] + np.float32(1e-3)
    table.at[ODD, "embedding"] = -table.at[ODD, "embedding"]
    table = table.drop("scene/0059.jpg").reset_index()
    halves = pa.array([None if row is None else row.astype(np.float16) for row in table.pop("embedding")])
    second = folder / "nights" / "date=2026-01-02"
    second.mkdir()
    columns = pa.Table.from_pandas(table).append_column("embedding", halves.cast(pa.list_(pa.float16(), 128)))
    pq.write_table(columns, second / "part-00000-x.parquet")
    shutil.copytree(first, folder / "nights" / "date=2026-01-03")
    (folder / "nights" / "date=2026-01-03" / "_SUCCESS").unlink()
    return folder / "nights"


def night(store: Path, number: int) -> str:
    return str(store / f"date=2026-01-0{number}")


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(image.width * image.height) or []
        return min(image.size) > 200 and len(colours) > 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_a_script_wants_and_how_it_is_called(
    load: Callable[[str], Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        load(name).main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"python jobs/analytics/{name}.py" in said
    # A head is looked at where it is used: search, sort and plot its column.
    assert "--picture" in said or name == "train_head"


@pytest.mark.slow
def test_a_script_runs_from_a_shell(store: Path) -> None:
    done = run_python("jobs/analytics/label_counts.py", str(store))
    assert done.returncode == 0, done.stderr
    assert "2026-01-02" in done.stdout


def test_label_counts_are_those_of_the_rows_and_an_unfinished_night_is_left_out(
    store: Path, load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = load("label_counts").main([str(store), "--picture", str(tmp_path / "counts.png")])
    for number in (1, 2):
        frame = pq.read_table(night(store, number), columns=["label", "status"], partitioning=None).to_pandas()
        expected = frame["label"].value_counts().to_dict()
        expected |= ("failed: " + frame.loc[frame["status"] != "ok", "status"]).value_counts().to_dict()
        of_night = counts[counts["night"] == f"2026-01-0{number}"]
        assert dict(zip(of_night["label"], of_night["rows"], strict=True)) == expected
    assert counts["rows"].sum() == 2 * ROWS - 1
    assert "2026-01-03" in capsys.readouterr().err
    assert is_a_picture(tmp_path / "counts.png")


def test_one_dataset_is_drawn_by_label(store: Path, load: Callable[[str], Any], tmp_path: Path) -> None:
    counts = load("label_counts").main([night(store, 1), "--picture", str(tmp_path / "counts.svg")])
    assert counts["night"].unique().tolist() == ["2026-01-01"]
    assert "</svg>" in (tmp_path / "counts.svg").read_text()


def test_drift_between_equal_nights_is_nothing(store: Path, load: Callable[[str], Any]) -> None:
    figures = load("drift").main([night(store, 1), night(store, 1)])
    assert figures.pop("ids in both") == ROWS
    assert figures.pop("embeddings: MMD^2 by chance (95 %)") > 0
    assert set(figures.values()) == {0}


def test_drift_names_the_labels_that_moved_and_the_embeddings_that_did(
    store: Path, load: Callable[[str], Any], tmp_path: Path
) -> None:
    pictures, moves = tmp_path / "drift.png", tmp_path / "moves.parquet"
    figures = load("drift").main([night(store, 1), night(store, 2), "--picture", str(pictures), "--moves", str(moves)])
    assert (figures["ids in both"], figures["ids only in A"], figures["ids only in B"]) == (ROWS - 1, 1, 0)
    assert figures["ids whose label moved"] == 1
    assert figures["ids whose embedding moved (cosine < 0.99)"] == 2
    assert 0 < figures["labels: Jensen-Shannon distance"] < 0.2
    assert figures["embeddings: MMD^2"] > 0
    before, after = (
        pq.read_table(night(store, n), partitioning=None).to_pandas().set_index("id")["label"] for n in (1, 2)
    )
    assert pd.read_parquet(moves)[["from", "to", "rows"]].to_numpy().tolist() == [[before[MOVED], after[MOVED], 1]]
    assert is_a_picture(pictures)


def test_distances_of_distributions_are_those_of_their_definitions(load: Callable[[str], Any]) -> None:
    drift = load("drift")
    half = np.array([0.5, 0.5, 0.0])
    assert drift.jensen_shannon(half, half) == 0
    assert drift.jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1)
    # Halves of log2(4/3), and of log2(2/3) / 2 + log2(2) / 2.
    assert drift.jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(0.3113**0.5, abs=1e-4)
    assert drift.kolmogorov_smirnov(np.arange(10.0), np.arange(5.0, 15.0)) == pytest.approx(0.5)
    chance = np.random.default_rng(0)
    squared, usual = drift.mmd(chance.normal(size=(200, 8)), chance.normal(size=(150, 8)))
    assert squared < usual
    squared, usual = drift.mmd(chance.normal(size=(200, 8)), chance.normal(0.5, size=(150, 8)))
    assert squared > 2 * usual


@pytest.mark.slow
def test_a_script_whose_reader_has_gone_ends_without_a_word(store: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "jobs/analytics/label_counts.py", str(store)]
    ended = subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(theirs)
    assert ended.returncode == 141
    assert "Error" not in ended.stderr


def test_nothing_in_a_row_controls_the_terminal(load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    load("common").show("rows", pd.DataFrame({"id": ["a\x1b[31mb", "é"]}))
    said = capsys.readouterr().out
    assert "a\\x1b[31mb" in said
    assert "é" in said


@pytest.mark.parametrize("method", ["centroid", "knn", "mahalanobis"])
def test_a_planted_outlier_comes_first(store: Path, load: Callable[[str], Any], method: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    arguments = [night(store, 2), "--method", method, "--min-rows", "3", "--k", "2", "--out", str(out)]
    found = load("outliers").main(arguments)
    assert found["id"].iloc[0] == ODD
    assert pd.read_parquet(out)["id"].tolist() == found["id"].tolist()
    assert found["distance"].notna().all()


@pytest.mark.compat("distributed")
@pytest.mark.parametrize("by_address", [False, True])
def test_outliers_on_a_cluster_are_those_of_one_process(
    store: Path, load: Callable[[str], Any], tmp_path: Path, by_address: bool
) -> None:
    table = pq.read_table(night(store, 2), partitioning=None)
    (tmp_path / "parts").mkdir()
    # The second part has no embedding at all.
    failed = table.filter(table["embedding"].is_null())
    for number, part in enumerate((table.slice(0, 25), failed, table.slice(25))):
        pq.write_table(part, tmp_path / "parts" / f"part-{number}.parquet")
    outliers = load("outliers")
    arguments = [str(tmp_path / "parts"), "--min-rows", "3"]
    here = outliers.main(arguments)
    assert here["id"].iloc[0] == ODD
    if by_address:
        from distributed import LocalCluster

        with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
            there = outliers.main([*arguments, "--cluster", cluster.scheduler_address])
    else:
        there = outliers.main([*arguments, "--cluster", "local"])
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    # One part or several, up to the order of additions.
    pd.testing.assert_frame_equal(here, outliers.main([night(store, 2), "--min-rows", "3"]), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "knn", "--cluster", "local"], "goes with --method centroid"),
        (["--cluster", "tcp://x"], "--cluster tcp://x"),
    ],
)
def test_a_cluster_that_cannot_work_is_named(
    store: Path, load: Callable[[str], Any], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        load("outliers").main([night(store, 1), *options])
    assert said in f"{left.value.code}{capsys.readouterr().err}"


def test_files_of_analyses_beside_the_nights_are_no_nights(
    store: Path, load: Callable[[str], Any], tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "nights")
    table = pa.table({"id": ["a"], "group": [0]})
    pq.write_table(table, tmp_path / "nights" / "date=2026-01-09.duplicates.parquet")
    common = load("common")
    names = [[Path(file).parts[-2:] for file in common.parts(str(each))] for each in (store, tmp_path / "nights")]
    assert names[0] == names[1]


def test_contact_sheets_show_images_of_bytes_and_of_paths_below_their_root(
    store: Path, load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(store.parent / "manifest.parquet")
    sheets = [tmp_path / "plan.png", tmp_path / "outliers.png", tmp_path / "none.png"]
    # The plan names the manifest too.
    load("outliers").main([night(store, 2), "--min-rows", "3", "--picture", str(sheets[0])])
    load("outliers").main([night(store, 2), "--min-rows", "3", "--manifest", manifest, "--picture", str(sheets[1])])
    load("outliers").main([night(store, 2), "--manifest", "nowhere.parquet", "--picture", str(sheets[2])])
    assert all(is_a_picture(sheet) for sheet in sheets[:2])
    assert "no images" in capsys.readouterr().err
    rows = pq.read_table(manifest).slice(0, 2).to_pylist()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "in.jpg").write_bytes(rows[0]["image"])
    (tmp_path / "out.jpg").write_bytes(rows[1]["image"])
    names = {"a": "in.jpg", "b": "../out.jpg", "c": str(tmp_path / "out.jpg"), "d": None, "e": "not-there.jpg"}
    paths = pa.table({"id": list(names), "path": list(names.values())})
    pq.write_table(paths, tmp_path / "paths.parquet")
    common = load("common")
    args = argparse.Namespace(manifest=str(tmp_path / "paths.parquet"), image=None, root=str(tmp_path / "root"))
    assert list(common.thumbnails(list(names), [str(tmp_path / "paths.parquet")], args)) == ["a"]


def test_the_map_is_that_of_the_principal_components(
    store: Path, load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "map.png", tmp_path / "map.parquet"
    manifest = str(store.parent / "manifest.parquet")
    script = load("map")
    arguments = ["--method", "pca", "--thumbnails", "9", "--manifest", manifest]
    rows = script.main([night(store, 1), *arguments, "--picture", str(picture), "--out", str(out)])
    matrix = load("common").vectors(load("common").parts(night(store, 1)), ["id"])[1].astype(float)
    left, values, _ = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(rows[["x", "y"]]), np.abs(left[:, :2] * values[:2]), atol=1e-4)
    assert f"{np.sum(values[:2] ** 2) / np.sum(values**2):.0%} of the variance" in capsys.readouterr().out
    assert is_a_picture(picture)
    assert pd.read_parquet(out).shape == (ROWS - FAILED, 4)
    assert len(script.main([night(store, 1), "--method", "pca", "--sample", "20", "--by", "truth"])) == 20


def test_a_layout_that_is_not_installed_is_named(
    store: Path, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("map")
    monkeypatch.setattr(script, "_installed", lambda package: False)
    with pytest.raises(SystemExit, match="umap-learn is not installed"):
        script.main([night(store, 1), "--method", "umap"])
    script.main([night(store, 1)])
    assert "PCA alone" in capsys.readouterr().out


def test_runs_are_drawn_with_failures_and_missing_dates_whatever_columns_there_are(
    load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("runs")
    assert set(script.SHOWN) <= set(RUN_SCHEMA.names)
    rows = {name: [None] * 4 for name in RUN_SCHEMA.names}
    rows |= {"date": pd.to_datetime(["2026-01-04", "2026-01-01", "2026-01-02", "2026-01-06"]).date.tolist()}
    rows |= {"new": [10, 5000, 8, 12], "rows": [5030, 5000, 5008, 5042], "exit_code": [3, 0, 0, 0]}
    table = pa.table(rows, schema=RUN_SCHEMA)
    pq.write_table(table, tmp_path / "runs.parquet")
    runs = script.main([str(tmp_path), "--picture", str(tmp_path / "runs.png")])
    assert runs["new"].tolist() == [5000, 8, 10, 12]
    assert "4 nights, 1 with an exit code other than 0, 2 dates without one" in capsys.readouterr().out
    assert is_a_picture(tmp_path / "runs.png")
    pq.write_table(table.select(["date", "rows"]), tmp_path / "few.parquet")
    script.main([str(tmp_path / "few.parquet"), "--picture", str(tmp_path / "few.png")])
    with pytest.raises(SystemExit, match="after its first night"):
        script.main([str(tmp_path / "elsewhere")])


def test_another_file_system_reads_the_same(store: Path, load: Callable[[str], Any]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(store), "/nights", recursive=True)
    try:
        here, there = load("label_counts").main([str(store)]), load("label_counts").main(["memory://nights"])
        pd.testing.assert_frame_equal(here, there)
        figures = load("drift").main(["memory://nights/date=2026-01-01", night(store, 2)])
        assert figures == load("drift").main([night(store, 1), night(store, 2)])
    finally:
        memory.rm("/nights", recursive=True)


@pytest.mark.slow
def test_a_dataset_without_labels_is_counted_and_mapped(
    store: Path, load: Callable[[str], Any], tmp_path: Path
) -> None:
    table = pq.read_table(night(store, 1), partitioning=None)
    for name in ("label", "score"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.nulls(ROWS, table.schema.field(name).type))
    for number in (1, 2):
        (tmp_path / f"date=2026-02-0{number}").mkdir()
        pq.write_table(table, tmp_path / f"date=2026-02-0{number}" / "part.parquet")
    counts = load("label_counts").main([str(tmp_path), "--picture", str(tmp_path / "counts.png")])
    assert counts.loc[counts["label"] == "no label", "rows"].tolist() == [ROWS - FAILED] * 2
    nights = [str(tmp_path / f"date=2026-02-0{number}") for number in (1, 2)]
    figures = load("drift").main([*nights, "--picture", str(tmp_path / "drift.png")])
    assert figures["labels: Jensen-Shannon distance"] == 0
    assert np.isnan(figures["scores: Kolmogorov-Smirnov distance"])
    load("map").main([str(tmp_path), "--method", "pca", "--picture", str(tmp_path / "map.png")])


@pytest.mark.parametrize("name", ["label_counts", "outliers", "map"])
def test_a_place_without_a_dataset_is_named(load: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    for place in (tmp_path, tmp_path / "not-there"):
        with pytest.raises(SystemExit, match=str(place)):
            load(name).main([str(place)])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("package", ["duckdb", "matplotlib"])
def test_a_machine_without_a_package_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, script: str, package: str
) -> None:
    monkeypatch.syspath_prepend(str(ANALYTICS))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ANALYTICS / f"{script}.py"), run_name="__main__")
    assert left.value.code == (
        f"{package} is not installed; these scripts need: pip install -c constraints.txt -e '.[analytics]'"
    )


@pytest.mark.compat("sklearn")
def test_a_head_is_trained_on_kept_truth(
    load: Callable[[str], Any], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, first = load("train_head"), str(store / "date=2026-01-01")
    out = tmp_path / "circle.json"
    accuracy = script.main([first, "--truth", "truth", "--contains", "circle", "--out", str(out), "--held-out", "0.5"])
    assert accuracy > 0.9
    assert "held-out rows" in capsys.readouterr().out
    found = read_head(str(out))
    assert found.columns == ("head_circle",)
    assert found.model is not None
    with pytest.raises(SystemExit, match="one value"):
        script.main([first, "--truth", "truth", "--contains", "no such", "--out", str(out)])


@pytest.mark.parametrize(("dtype", "fixed"), [("int8", True), ("int8", False), ("binary", True)])
def test_bytes_and_bits_are_read_as_numbers(
    load: Callable[[str], Any], tmp_path: Path, dtype: str, fixed: bool
) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    form = VectorFormat(dtype, 16, fixed=fixed)
    output = {"dtype": dtype, "dim": 16, "vector": "fixed" if fixed else "list"}
    column = form.column(form.encode(vectors), np.array([False, True, False, False, False]))
    table = pa.table({"id": range(5), "embedding": column})
    table = table.replace_schema_metadata({"pipeline": json.dumps({"output": output})})
    pq.write_table(table, tmp_path / "part.parquet")
    rows, matrix, left_out = load("common").vectors([str(tmp_path / "part.parquet")], ["id"])
    wanted = form.decode(form.encode(vectors))[[0, 2, 3, 4]]
    assert (rows["id"].tolist(), left_out) == ([0, 2, 3, 4], 1)
    assert np.array_equal(matrix, wanted)
    stored = load("common").vectors([str(tmp_path / "part.parquet")], ["id"], dtype=None)[1].astype(np.float32)
    assert np.allclose(stored / np.linalg.norm(stored, axis=1, keepdims=True), wanted)
