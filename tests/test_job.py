"""The main job end to end: demo model, real files, every row accounted for."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.config.schema import Config, ModelConfig
from pipeline.core.errors import (
    ManifestError,
    NumericalError,
    ParityError,
    PipelineError,
    PlanMismatch,
    StorageError,
    TooManyFailures,
)
from pipeline.dataset.parts import LAYOUT, METADATA_KEY
from pipeline.images.sources.beneath import Folder
from pipeline.images.sources.spans import Spans
from pipeline.job.main import RunOptions, run_job
from pipeline.manifest.build import from_tars
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.hub import DEMO_FOLDER
from tests.jobs import StubEncoder, config_for, content, scene, scenes_manifest, stub_backend

ROWS = 70


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished job of 70 rows in 3 shards, two of them damaged."""
    folder = tmp_path_factory.mktemp("job")
    manifest = scenes_manifest(folder / "m.parquet", ROWS)
    config = config_for(
        manifest,
        folder / "out",
        prompts={"cache": str(folder / "cache")},
        loader={"isolation": "process"},
        report={"html": True},
    )
    run_job(config)
    return config


def output(config: Config) -> Path:
    return Path(config.output.dir)


def test_every_row_comes_out_once_and_in_order(finished: Config) -> None:
    table = pq.read_table(output(finished))
    source = pq.read_table(finished.manifest.path)
    assert table["id"].to_pylist() == source["id"].to_pylist()
    assert table["truth"].to_pylist() == source["truth"].to_pylist()
    assert table["meta"].to_pylist() == source["meta"].to_pylist()
    assert table.column_names == [
        "id", "truth", "meta", "embedding", "label", "score", "top_labels", "top_scores", "status", "error",
    ]  # fmt: skip


def test_a_failed_row_has_a_status_and_nothing_else(finished: Config) -> None:
    rows = pq.read_table(output(finished)).to_pylist()
    failed = {i: row for i, row in enumerate(rows) if row["status"] != "ok"}
    assert {i: row["status"] for i, row in failed.items()} == {3: "not_an_image", 20: "empty"}
    for row in failed.values():
        assert row["error"]
        assert [row[name] for name in ("embedding", "label", "score", "top_labels", "top_scores")] == [None] * 5
    for row in rows:
        if row["status"] == "ok":
            assert row["error"] is None
            assert len(row["embedding"]) == 128
            assert len(row["top_labels"]) == len(row["top_scores"]) == 5
            assert row["label"] == row["top_labels"][0]
            assert row["score"] == row["top_scores"][0]
            assert row["top_scores"] == sorted(row["top_scores"], reverse=True)


def test_the_labels_are_right(finished: Config) -> None:
    rows = [row for row in pq.read_table(output(finished)).to_pylist() if row["status"] == "ok"]
    assert np.mean([row["label"] == row["truth"] for row in rows]) >= 0.9


def test_embeddings_are_those_of_the_model_on_the_reference_pixels(finished: Config) -> None:
    checkpoint = open_checkpoint(ModelConfig())
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    source = pq.read_table(finished.manifest.path)["image"]
    rows = pq.read_table(output(finished)).to_pylist()
    for index in (0, 4, 33, 69):
        image = Image.open(io.BytesIO(source[index].as_py())).convert("RGB")
        values = processor(image, return_tensors="pt").pixel_values
        expected = torch.nn.functional.normalize(checkpoint.image_features(values), dim=1)[0].numpy()
        np.testing.assert_allclose(np.asarray(rows[index]["embedding"]), expected, atol=2e-6)


def test_all_readers_see_the_rows_and_nothing_else(finished: Config) -> None:
    folder = finished.output.dir
    frame = pd.read_parquet(folder)
    matrix = np.stack(frame.loc[frame["status"] == "ok", "embedding"])
    assert matrix.shape == (ROWS - 2, 128)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    duckdb = pytest.importorskip("duckdb", reason="needs the extra nightly")
    ducks = duckdb.sql(f"select count(*), count(embedding), count(distinct id) from '{folder}/*.parquet'").fetchall()
    assert ducks == [(ROWS, ROWS - 2, ROWS)]


@pytest.mark.needs("dask")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask's, about pandas
def test_dask_sees_the_rows_and_nothing_else(finished: Config) -> None:
    import dask.dataframe as dd

    lazy = dd.read_parquet(finished.output.dir)
    assert len(lazy) == ROWS
    assert lazy[lazy["status"] == "ok"]["label"].count().compute() == ROWS - 2


def test_a_single_part_explains_itself(finished: Config) -> None:
    part = next(output(finished).glob("part-*.parquet"))
    prints = json.loads(pq.read_schema(part).metadata[METADATA_KEY])
    assert {"model", "images", "backend", "prompts", "manifest"} <= set(prints)
    assert prints == json.loads((output(finished) / "_plan.json").read_text())["fingerprints"]


def test_success_names_every_part_and_its_counts_add_up(finished: Config) -> None:
    success = json.loads((output(finished) / "_SUCCESS").read_text())
    assert success["rows"] == sum(success["counts"].values()) == ROWS
    assert success["parts"] == sorted(path.name for path in output(finished).glob("*.parquet"))
    assert len(success["parts"]) == 3


def test_the_report_says_where_the_time_went(finished: Config) -> None:
    report = json.loads((output(finished) / "_report.json").read_text())
    assert report["rows"] == report["total_rows"] == ROWS
    assert report["counts"] == {"ok": ROWS - 2, "empty": 1, "not_an_image": 1}
    assert {"read", "decode", "copy", "encode", "label", "write"} <= set(report["stages"])
    assert all(seconds >= 0 for seconds in report["stages"].values())
    assert report["images_per_second"] > 0
    assert report["prompts"] == {"labels": 100, "cached": False}
    assert {row["status"] for row in report["failures"]} == {"not_an_image", "empty"}
    page = (output(finished) / "_report.html").read_text()
    assert "scene/0003.jpg" in page
    # Four examples, the odd ones, and both ends of twelve labels.
    assert page.count("data:image/jpeg;base64,") > 20
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", "")
    line = report["timeline"]
    assert sum(line["amounts"]["images"]) == report["images"]
    assert sum(line["amounts"]["decode"]) == pytest.approx(report["stages"]["decode"], abs=0.05)
    assert sum(report["scores"]) == ROWS - 2
    assert report["history"] == []


def test_the_same_job_again_changes_nothing(finished: Config) -> None:
    before = {path: path.read_bytes() for path in output(finished).iterdir() if path.is_file()}
    report = run_job(finished)
    assert (report.rows, report.resumed_rows, report.counts["ok"]) == (0, ROWS, ROWS - 2)
    assert report.prompts["cached"]
    after = {path: path.read_bytes() for path in output(finished).iterdir() if path.is_file()}
    del before[output(finished) / "_run.log"], after[output(finished) / "_run.log"]
    assert after == before


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_threads_changes_no_byte(finished: Config, tmp_path: Path, workers: int) -> None:
    config = config_for(Path(finished.manifest.path or ""), tmp_path / "out", loader={"workers": workers})
    run_job(config)
    assert content(tmp_path / "out") == content(output(finished))


CHANGES = {
    "model": ({"model": {"weights": "random", "name": "DEMO"}}, 'model: there "demo", now "/'),
    "prompts": ({"prompts": {"labels": ["cat", "dog"]}}, "prompts.text"),
    "templates": ({"prompts": {"templates": ["one {}"]}}, "prompts.text"),
    "top_k": ({"labels": {"top_k": 2}}, "prompts.top_k: there 5, now 2"),
    "exif": ({"images": {"exif": "ignore"}}, 'images.exif: there "apply", now "ignore"'),
    "precision": ({"backend": {"precision": "bf16"}}, 'backend.precision: there "fp32", now "bf16"'),
    "batch": ({"loader": {"batch_size": 16}}, "batch_size: there 8, now 16"),
    "shards": ({"manifest": {"shard_rows": 10}}, "shard_rows: there 24, now 10"),
    "keep": ({"manifest": {"keep": ["truth"]}}, "manifest.columns"),
    "dtype": ({"output": {"dtype": "float16"}}, 'output.dtype: there "float32", now "float16"'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_dataset_never_mixes_two_jobs(finished: Config, change: str) -> None:
    groups, message = CHANGES[change]
    groups = {g: {k: str(DEMO_FOLDER) if v == "DEMO" else v for k, v in values.items()} for g, values in groups.items()}
    before = content(output(finished))
    with pytest.raises(PlanMismatch) as caught:
        run_job(config_for(Path(finished.manifest.path or ""), output(finished), **groups))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert content(output(finished)) == before


def test_a_changed_manifest_is_another_job(finished: Config, tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", ROWS, damaged={3: b"other damage", 20: b""})
    with pytest.raises(PlanMismatch, match=r"manifest\.digest"):
        run_job(config_for(manifest, output(finished)))


def test_a_dataset_whose_parts_are_laid_out_as_they_once_were_is_another_job(finished: Config, tmp_path: Path) -> None:
    copied = shutil.copytree(output(finished), tmp_path / "old")
    plan = json.loads((copied / "_plan.json").read_text())
    assert plan["fingerprints"]["output"].pop("layout") == LAYOUT
    (copied / "_plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanMismatch, match=rf"output\.layout: there none, now {LAYOUT}"):
        run_job(config_for(Path(finished.manifest.path or ""), copied))


def test_start_up_counts_from_the_command(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "m.parquet", 20), tmp_path / "a")
    report = run_job(config, RunOptions(began=time.time() - 100))
    assert 100 < report.startup_seconds <= report.wall_seconds < 130
    assert report.bound == "start-up"
    assert sum(report.startup.values()) == pytest.approx(report.startup_seconds, abs=0.01)
    assert [*report.startup][-1] == "first batch"
    assert {"output", "manifest", "model", "prompts", "gates"} <= {*report.startup}
    assert {*report.ending} == {"last parts", "marker", "summary"}
    assert "start-up took" in report.advice
    assert "number of images: output 100" in report.advice
    again = run_job(replace(config, output=replace(config.output, dir=str(tmp_path / "b"))))
    assert again.wall_seconds < 30


def test_a_small_job_pads_no_batch(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "m.parquet", 5), tmp_path / "out", loader={"batch_size": 64})
    assert run_job(config).fingerprints["batch_size"] == 5
    assert pq.read_table(tmp_path / "out")["embedding"].null_count == 1


def files_manifest(folder: Path, rows: int, colour: str) -> Path:
    """A manifest of paths that lie under its own folder."""
    folder.mkdir()
    for i in range(rows):
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    names = [f"{i}.png" for i in range(rows)]
    pq.write_table(pa.table({"id": names, "image": names}), folder.parent / "m.parquet")
    return folder.parent / "m.parquet"


def scenes_tars(folder: Path, rows: int) -> Path:
    """Two tars of scenes, one of which is damaged, and their manifest."""
    folder.mkdir()
    for start in (0, rows // 2):
        with tarfile.open(folder / f"{start}.tar", "w") as tar:
            for row in range(start, start + rows // 2):
                data = scene(row)[0] if row != 3 else b"no image"
                info = tarfile.TarInfo(f"{row:04}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    from_tars([str(folder / "0.tar"), str(folder / f"{rows // 2}.tar")], str(folder / "m.parquet"))
    return folder / "m.parquet"


@pytest.mark.parametrize(
    "loader",
    [
        {"isolation": "none"},
        pytest.param({"isolation": "process"}, marks=pytest.mark.slow),
        pytest.param({"isolation": "process", "feeders": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_dataset_of_tars_is_that_of_single_reads_and_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: dict[str, Any]
) -> None:
    table = pq.read_table(scenes_tars(tmp_path / "tars", 60))
    (tmp_path / "files").mkdir()
    for row, name in enumerate(table["id"].to_pylist()):
        file = tmp_path / "files" / f"{name}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(scene(row)[0] if row != 3 else b"no image")
    names = pa.array([f"{name}.jpg" for name in table["id"].to_pylist()])
    pq.write_table(table.set_column(1, "path", names), tmp_path / "files" / "m.parquet")

    def job(manifest: str, out: str, **settings: Any) -> Path:
        rows = {"root": str(tmp_path / manifest), "image": "path", "keep": ["txt"]}
        run_job(config_for(tmp_path / manifest / "m.parquet", tmp_path / out, manifest=rows, loader=settings))
        return tmp_path / out

    reads: list[str] = []
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, path, *most: reads.append(path) or read(self, path, *most))
    together = job("tars", "together", **loader)
    if loader["isolation"] == "none":
        assert 0 < len(reads) < 20
    monkeypatch.setattr(Spans, "join", lambda self, refs: refs)
    assert content(together) == content(job("tars", "singly"))
    found, wanted = pq.read_table(together), pq.read_table(job("files", "whole"))
    assert found.drop_columns(["error"]).equals(wanted.drop_columns(["error"]))
    assert found["status"].to_pylist().count("ok") == 59


def test_the_same_paths_under_another_root_are_another_job(tmp_path: Path) -> None:
    files_manifest(tmp_path / "red", 3, "red")
    manifest = files_manifest(tmp_path / "blue", 3, "blue")
    run_job(config_for(manifest, tmp_path / "out", manifest={"root": str(tmp_path / "red"), "keep": []}))
    with pytest.raises(PlanMismatch, match=r"manifest\.root: there \".*red\", now \".*blue\""):
        run_job(config_for(manifest, tmp_path / "out", manifest={"root": str(tmp_path / "blue"), "keep": []}))


def test_a_root_that_is_not_mounted_is_no_set_of_bad_images(tmp_path: Path) -> None:
    manifest = files_manifest(tmp_path / "red", 3, "red")
    with pytest.raises(ManifestError, match="is a disk not mounted"):
        run_job(config_for(manifest, tmp_path / "out", manifest={"root": str(tmp_path / "gone"), "keep": []}))


def test_a_broken_machine_is_no_set_of_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = files_manifest(tmp_path / "red", 3, "red")

    def read(self: object, path: str, start: int, stop: int | None) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pipeline.images.sources.source.Source._read_local", read)
    with pytest.raises(StorageError, match="not the image"):
        run_job(config_for(manifest, tmp_path / "out", manifest={"root": str(tmp_path / "red"), "keep": []}))
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("output", ["data", "data/out", "."])
def test_an_output_within_or_around_the_manifest_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "data").mkdir()
    scenes_manifest(tmp_path / "data" / "m.parquet", 5)
    with pytest.raises(ManifestError, match="lie in one another"):
        run_job(config_for(tmp_path / "data", tmp_path / output))
    assert not (tmp_path / output / "_plan.json").exists()


def test_files_that_differ_in_nullability_are_one_manifest(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    table = pq.read_table(scenes_manifest(tmp_path / "m" / "a.parquet", 10))
    strict = pa.schema([field.with_nullable(False) if field.name == "id" else field for field in table.schema])
    ids = pa.array([f"b{i}" for i in range(10)])
    pq.write_table(table.set_column(0, "id", ids).cast(strict), tmp_path / "m" / "b.parquet")
    assert run_job(config_for(tmp_path / "m", tmp_path / "out")).total_rows == 20
    assert pq.read_table(tmp_path / "out").num_rows == 20


def test_paths_need_not_be_utf8(tmp_path: Path) -> None:
    files_manifest(tmp_path / "red", 2, "red")
    os.rename(tmp_path / "red" / "1.png", os.fsencode(tmp_path / "red") + b"/\xff.png")
    paths = pa.array([b"0.png", b"\xff.png", b"\xfe.png"]).view(pa.string())
    pq.write_table(pa.table({"id": [0, 1, 2], "image": paths}), tmp_path / "m.parquet")
    report = run_job(
        config_for(tmp_path / "m.parquet", tmp_path / "out", manifest={"root": str(tmp_path / "red"), "keep": []})
    )
    assert report.counts == {"ok": 2, "not_found": 1}
    assert "?.png" in pq.read_table(tmp_path / "out")["error"][2].as_py()


def test_many_labels_and_one(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 6, damaged={})
    many = {"labels": [f"thing {i} 🎈" for i in range(1500)]}
    run_job(config_for(manifest, tmp_path / "many", prompts=many, labels={"top_k": 7}))
    assert pq.read_table(tmp_path / "many")["top_labels"].to_pylist()[0][0].startswith("thing ")
    run_job(config_for(manifest, tmp_path / "one", prompts={"labels": ["shape"]}))
    assert pq.read_table(tmp_path / "one")["top_scores"].to_pylist() == [[1.0]] * 6


def test_too_many_failures_is_said_after_the_dataset_is_complete(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "m.parquet", 30), tmp_path / "out", errors={"max_fraction": 0.01})
    with pytest.raises(TooManyFailures, match=r"2 of 30 rows failed \(6\.7%: empty 1, not_an_image 1\)") as caught:
        run_job(config)
    assert caught.value.exit_code == 3
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert json.loads((tmp_path / "out" / "_report.json").read_text())["exit_code"] == 3


def test_without_labels_the_columns_are_null(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "m.parquet", 5), tmp_path / "out", model={"name": str(DEMO_FOLDER)})
    run_job(config)
    table = pq.read_table(tmp_path / "out")
    assert table["label"].null_count == table["top_labels"].null_count == 5
    assert table["embedding"].null_count == 1


def test_a_low_score_gives_no_label_under_a_threshold(tmp_path: Path) -> None:
    labels = {"threshold": 0.9, "top_k": 2}
    run_job(config_for(scenes_manifest(tmp_path / "m.parquet", 60), tmp_path / "out", labels=labels))
    rows = [row for row in pq.read_table(tmp_path / "out").to_pylist() if row["status"] == "ok"]
    unsure = [row for row in rows if row["label"] is None]
    assert 0 < len(unsure) < len(rows)
    assert all(row["score"] < 0.9 and len(row["top_labels"]) == 2 for row in unsure)
    assert all(row["score"] >= 0.9 for row in rows if row["label"] is not None)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", np.float16), ("float32", np.float32)])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_every_storage_format_reads_back(tmp_path: Path, dtype: str, bits: type, compression: str) -> None:
    settings = {"dtype": dtype, "compression": compression}
    run_job(config_for(scenes_manifest(tmp_path / "m.parquet", 9), tmp_path / "out", output=settings))
    frame = pd.read_parquet(tmp_path / "out")
    matrix = np.stack(frame.loc[frame["status"] == "ok", "embedding"])
    assert matrix.dtype == bits
    group = pq.ParquetFile(next((tmp_path / "out").glob("*.parquet"))).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    asked = {"zstd": "ZSTD", "snappy": "SNAPPY", "none": "UNCOMPRESSED"}[compression]
    # Embeddings of float32 are not worth it.
    plain = {"embedding"} if dtype == "float32" else set()
    for column in columns:
        plainly = column.path_in_schema.split(".")[0] in plain
        assert column.compression == ("UNCOMPRESSED" if plainly else asked), column.path_in_schema
    length = "array_inner_product(embedding::float[128], embedding::float[128])"
    duckdb = pytest.importorskip("duckdb", reason="needs the extra nightly")
    query = f"select sum({length}) from '{tmp_path}/out/*.parquet' where status = 'ok'"
    assert duckdb.sql(query).fetchall()[0][0] == pytest.approx(8, abs=1e-2)


def test_nothing_starts_on_a_manifest_with_a_repeated_id(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 6)
    table = pq.read_table(manifest)
    pq.write_table(table.set_column(0, "id", [["a", "b", "c", "d", "b", "f"]]), manifest)
    with pytest.raises(ManifestError, match="'b' stands twice"):
        run_job(config_for(manifest, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert not (tmp_path / "out" / "_plan.json").exists()


def test_an_output_with_strange_parquet_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(PlanMismatch, match=r"holds mine\.parquet but no _plan\.json"):
        run_job(config_for(scenes_manifest(tmp_path / "m.parquet", 6), tmp_path / "out"))
    assert (tmp_path / "out" / "mine.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, 2.0])
def test_numbers_that_are_no_embedding_are_never_committed(tmp_path: Path, bad: float) -> None:
    class Spoiled(StubEncoder):
        calls = 0

        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            Spoiled.calls += 1
            # The first shard takes four: its first batch is encoded twice.
            if Spoiled.calls == 6:
                vectors[1] *= bad
            return vectors

    config = config_for(scenes_manifest(tmp_path / "m.parquet", 60), tmp_path / "out", prompts={"labels": []})
    config = replace(config, model=replace(config.model, name=str(DEMO_FOLDER)))
    # One batch after the other, so that the calls can be counted.
    config = replace(config, backend=replace(config.backend, streams=1))
    with stub_backend(Spoiled), pytest.raises(NumericalError, match="shard 1, batch 1, row 9"):
        run_job(config)
    assert [path.name for path in (tmp_path / "out" / "_commits").iterdir()] == ["00000.json"]


@pytest.mark.parametrize("shape", [(7, 4), (8, 3)])
def test_an_encoder_that_returns_another_shape_is_stopped(tmp_path: Path, shape: tuple[int, int]) -> None:
    class Wrong(StubEncoder):
        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return torch.ones(shape)

    config = config_for(scenes_manifest(tmp_path / "m.parquet", 10), tmp_path / "out", model={"name": str(DEMO_FOLDER)})
    with stub_backend(Wrong), pytest.raises(NumericalError, match="wanted float32"):
        run_job(config)


@pytest.mark.slow
def test_an_object_store_holds_the_same_dataset(finished: Config) -> None:
    url = "memory://bucket/dataset"
    config = replace(finished, output=replace(finished.output, dir=url))
    run_job(config)
    fs = fsspec.filesystem("memory")
    found = {name.removeprefix("/bucket/dataset/"): fs.cat_file(name) for name in fs.find("/bucket/dataset")}
    assert {"_report.json", "_report.html", "_run.log"} <= set(found)
    local = content(output(finished))
    assert {name: found.get(name) for name in local} == local
    assert run_job(config).rows == 0


def test_errors_know_their_exit_codes() -> None:
    errors = [error for error in PipelineError.__subclasses__() if error.__module__ == "pipeline.core.errors"]
    codes = {error.__name__: error.exit_code for error in errors}
    assert codes == {
        "ShardsGivenUp": 3, "WorkerMismatch": 2, "ClusterUnavailable": 2, "ClusterLost": 75,
        "ConfigError": 2, "ManifestError": 2, "ModelError": 2, "PromptsError": 2, "BackendUnavailable": 2,
        "PlanMismatch": 2, "DecoderUnavailable": 2, "StorageError": 1, "NumericalError": 1, "TooManyFailures": 3,
        "UnfinishedDataset": 75, "Interrupted": 75, "OutputBusy": 75, "LeaseLost": 75, "NoDataset": 2,
        "ArtifactError": 2, "ParityError": 4,
    }  # fmt: skip


@pytest.mark.slow
def test_a_batch_size_that_was_found_is_in_the_plan_and_kept(tmp_path: Path) -> None:
    config = config_for(
        scenes_manifest(tmp_path / "m.parquet", 60),
        tmp_path / "out",
        manifest={"shard_rows": 20},
        loader={"batch_size": 0},
        backend={"artifacts": str(tmp_path / "store")},
    )
    first = run_job(config)
    found = first.fingerprints["batch_size"]
    assert first.config["loader"]["batch_size"] == found > 0  # type: ignore[index]
    commit = tmp_path / "out" / "_commits" / "00001.json"
    before = commit.read_bytes()
    commit.unlink()
    # Another machine's store knows another number; the plan's counts.
    again = run_job(replace(config, backend=replace(config.backend, artifacts=str(tmp_path / "other"))))
    assert again.fingerprints["batch_size"] == found
    assert commit.read_bytes() == before


@pytest.mark.slow
def test_a_decoder_is_compared_with_the_exact_one_and_part_of_the_dataset(tmp_path: Path) -> None:
    config = config_for(scenes_manifest(tmp_path / "m.parquet", 30), tmp_path / "out", images={"decoder": "fast"})
    report = run_job(config)
    assert report.decoder_parity is not None
    assert report.decoder_parity.lowest_cosine >= config.parity.decoder["fast"]
    assert "simplejpeg" in report.fingerprints["images"]["library"]  # type: ignore[index]
    exact = replace(config, images=replace(config.images, decoder="exact"))
    with pytest.raises(PlanMismatch, match=r"images\.decoder: there \"fast\", now \"exact\""):
        run_job(exact)
    limits = replace(config.parity, decoder={**config.parity.decoder, "fast": 1.01})
    with pytest.raises(ParityError, match=r"parity\.decoder\.fast"):
        run_job(replace(config, parity=limits, output=replace(config.output, dir=str(tmp_path / "other"))))
    assert not (tmp_path / "other" / "_plan.json").exists()


def test_a_decoder_that_decoded_nothing_is_not_said_to_be_near(tmp_path: Path) -> None:
    unreadable = dict.fromkeys(range(4), b"no picture")
    config = config_for(
        scenes_manifest(tmp_path / "m.parquet", 4, damaged=unreadable),
        tmp_path / "out",
        images={"decoder": "fast"},
        errors={"max_fraction": 1.0},
    )
    report = run_job(config)
    assert report.counts == {"ok": 0, "not_an_image": 4}
    assert report.decoder_parity is None
    assert not (tmp_path / "out" / "_decoder_parity.json").exists()
