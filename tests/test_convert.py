"""Conversion: other tools load the rows of the dataset, and the folder is written completely or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import convert
from pipeline.config.schema import OUTPUT_COLUMNS
from pipeline.dataset import convert as conversion
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.engine.demo.folder import jpeg
from pipeline.engine.demo.scenes import sample
from tests.finished import FAILED, ROWS, everything, matrix_of, run_scenes
from tests.jobs import scenes_manifest
from tests.processes import loads, run_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("convert")
    manifest = scenes_manifest(made / "m.parquet", ROWS)
    run_scenes(made, "dataset", manifest)
    run_scenes(made, "half", manifest, output={"dtype": "float16"})
    return made


@pytest.fixture(scope="module", params=["dataset", "half"])
def dataset(folder: Path, request: pytest.FixtureRequest) -> Dataset:
    return open_dataset(str(folder / request.param))


def good(dataset: Dataset) -> pa.Table:
    table = everything(dataset)
    return table.filter(pc.field("status") == "ok")


def made(dataset: Dataset, to: str, out: Path, *more: str) -> dict[str, Any]:
    assert convert.main([dataset.url, "--to", to, "--out", str(out), *more]) == 0
    note: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    assert (note["rows"], note["left_out"]) == (ROWS - len(FAILED), len(FAILED))
    assert note["source"] == dataset.fingerprint
    assert not [path for path in out.parent.iterdir() if ".tmp-" in path.name]
    return note


def check_metadata(dataset: Dataset, path: Path) -> None:
    left = [name for name in dataset.schema.names if name not in ("embedding", "status", "error")]
    assert pq.read_table(path).equals(good(dataset).select(left))


def test_numpy_arrays_have_the_rows_of_the_dataset(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = made(dataset, "numpy", tmp_path / "out")
    assert note["files"] == ["embeddings.npy", "ids.npy", "metadata.parquet"]
    embeddings, ids = np.load(tmp_path / "out" / "embeddings.npy"), np.load(tmp_path / "out" / "ids.npy")
    assert embeddings.dtype == dataset.dtype
    assert np.array_equal(embeddings, matrix_of(everything(dataset)))
    assert ids.tolist() == good(dataset)["id"].to_pylist()
    check_metadata(dataset, tmp_path / "out" / "metadata.parquet")
    assert "2 rows have no embedding and are left out" in capsys.readouterr().out


def test_ids_that_are_numbers_stay_numbers(tmp_path: Path) -> None:
    pictures = [jpeg(sample(5, row), 64, 64) for row in range(10)]
    pq.write_table(pa.table({"id": pa.array(range(10), pa.int32()), "image": pictures}), tmp_path / "m.parquet")
    run_scenes(tmp_path, "numbers", tmp_path / "m.parquet", manifest={"keep": [], "shard_rows": 4})
    conversion.convert(open_dataset(str(tmp_path / "numbers")), "numpy", tmp_path / "out")
    ids = np.load(tmp_path / "out" / "ids.npy")
    assert (ids.dtype, ids.tolist()) == (np.int32, list(range(10)))


@pytest.mark.compat("faiss")
@pytest.mark.parametrize("more", [[], ["--ivf"]], ids=["flat", "ivf"])
def test_a_faiss_index_finds_the_rows_of_the_metadata(dataset: Dataset, tmp_path: Path, more: list[str]) -> None:
    import faiss

    made(dataset, "faiss", tmp_path / "out", *more)
    index = faiss.read_index(str(tmp_path / "out" / "vectors.faiss"))
    matrix: NDArray[np.float32] = matrix_of(everything(dataset))
    assert (index.ntotal, index.d, index.metric_type) == (*matrix.shape, faiss.METRIC_INNER_PRODUCT)
    scores, rows = index.search(matrix, 1)
    assert rows[:, 0].tolist() == list(range(len(matrix)))
    assert np.allclose(scores, 1, atol=2e-3)
    check_metadata(dataset, tmp_path / "out" / "metadata.parquet")


@pytest.mark.compat("datasets")
def test_hugging_face_s_datasets_load_it(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    made(dataset, "datasets", tmp_path / "out")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    wanted = good(dataset)
    assert rows.column_names == [name for name in dataset.schema.names if name not in ("status", "error")]
    assert rows["id"][:] == wanted["id"].to_pylist()
    assert rows["top_labels"][:] == wanted["top_labels"].to_pylist()
    assert rows["meta"][:] == wanted["meta"].to_pylist()
    assert rows.features["embedding"].length == dataset.dim
    assert np.array_equal(np.asarray(rows.with_format("numpy")["embedding"][:]), matrix_of(wanted))


@pytest.mark.compat("lance")
def test_a_lance_table_has_the_rows_of_the_dataset(dataset: Dataset, tmp_path: Path) -> None:
    import lance

    made(dataset, "lance", tmp_path / "out")
    table = lance.dataset(str(tmp_path / "out" / "vectors.lance")).to_table()
    names = [name for name in dataset.schema.names if name not in ("status", "error")]
    assert table.equals(good(dataset).select(names))


def test_a_folder_that_is_not_empty_is_left_unchanged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        assert convert.main([str(folder / "dataset"), "--to", "numpy", "--out", str(taken)]) == 2
        assert "must be a folder that is not there yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_conversion_does_not_lie_in_the_dataset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(folder / "dataset")
    assert convert.main([str(folder / "dataset"), "--to", "numpy", "--out", str(tmp_path / "link" / "numpy")]) == 2
    assert "lies in the dataset" in capsys.readouterr().err
    assert not (folder / "dataset" / "numpy").exists()


def test_a_full_disk_is_an_error_with_a_hint(folder: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pipeline import convert; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(convert.main(sys.argv[1:]))"
    )
    ended = run_python("-c", code, str(folder / "dataset"), "--to", "numpy", "--out", str(tmp_path / "out"))
    assert ended.returncode == 1
    assert "ulimit -f" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "to", ["numpy", "datasets", *(pytest.param(name, marks=pytest.mark.compat(name)) for name in ("faiss", "lance"))]
)
def test_a_conversion_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    dataset, original = open_dataset(str(folder / "dataset")), Dataset.read

    def torn(self: Dataset, commit: Any, columns: Any, **options: Any) -> pa.Table:
        if commit.shard == 3 and "embedding" in columns:
            raise KeyboardInterrupt
        return original(self, commit, columns, **options)

    monkeypatch.setattr(Dataset, "read", torn)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(dataset, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "module", "extra"), [("faiss", "faiss", "search"), ("lance", "lance", "lance")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    to: str, module: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    assert convert.main([str(folder / "dataset"), "--to", to, "--out", str(tmp_path / "out")]) == 2
    assert f".[{extra}]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_go_together_and_datasets_that_are_not_there_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert convert.main([str(folder / "dataset"), "--to", "numpy", "--ivf", *out]) == 2
    assert "goes with --to faiss" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "nothing"), "--to", "numpy", *out]) == 2
    assert "no dataset is here" in capsys.readouterr().err


def test_the_command_offers_every_format() -> None:
    assert tuple(conversion.FORMATS) == convert.FORMATS
    assert OUTPUT_COLUMNS[0] == "embedding"


def test_the_commands_start_without_torch() -> None:
    assert loads("import pipeline.convert, pipeline.relabel, pipeline.search", "torch", "pyarrow") == []


LOADERS = [
    "numpy",
    *(pytest.param(name, marks=pytest.mark.compat(package)) for name, package in
      (("faiss", "faiss"), ("datasets", "datasets"), ("lance", "lance"))),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets by name: the first, a middle and the last shard failed wholly; one row; one good row among bad ones."""
    folder = tmp_path_factory.mktemp("odd")
    for name, rows, bad in (
        ("first", 12, range(4)),
        ("middle", 12, range(4, 8)),
        ("last", 10, range(8, 10)),
        ("both", 12, [*range(4), *range(8, 12)]),
        ("one", 1, []),
        ("rest", 9, [row for row in range(9) if row != 5]),
    ):
        scenes_manifest(folder / f"{name}.parquet", rows, damaged=dict.fromkeys(bad, b"no picture"))
        limits = {"manifest": {"shard_rows": 4}, "errors": {"max_fraction": 1.0}}
        run_scenes(folder, name, folder / f"{name}.parquet", **limits)
    return folder


@pytest.mark.parametrize("name", ["first", "middle", "last", "both", "one", "rest"])
@pytest.mark.parametrize("to", LOADERS)
def test_shards_without_embeddings_and_single_rows_are_loaded(
    odd: Path, tmp_path: Path, to: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = open_dataset(str(odd / name))
    wanted = good(dataset)
    conversion.convert(dataset, to, tmp_path / "out")
    if to == "numpy":
        ids, matrix = (np.load(tmp_path / "out" / f"{part}.npy") for part in ("ids", "embeddings"))
        check_metadata(dataset, tmp_path / "out" / "metadata.parquet")
    elif to == "faiss":
        import faiss

        index = faiss.read_index(str(tmp_path / "out" / "vectors.faiss"))
        ids = pq.read_table(tmp_path / "out" / "metadata.parquet")["id"].to_numpy()
        matrix = index.reconstruct_n(0, index.ntotal)
    elif to == "datasets":
        import datasets

        rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        ids, matrix = np.array(rows["id"][:]), np.asarray(rows.with_format("numpy")["embedding"][:])
        files = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
        assert files == [f"train-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))]
    else:
        import lance

        table = lance.dataset(str(tmp_path / "out" / "vectors.lance")).to_table()
        ids, matrix = table["id"].to_numpy(), matrix_of(table)
    assert ids.tolist() == wanted["id"].to_pylist()
    assert np.array_equal(matrix, matrix_of(wanted))


@pytest.mark.parametrize("to", list(conversion.FORMATS))
def test_a_dataset_without_any_embedding_is_refused_in_every_format(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes_manifest(tmp_path / "m.parquet", 3, damaged=dict.fromkeys(range(3), b"no picture"))
    run_scenes(tmp_path, "none", tmp_path / "m.parquet", errors={"max_fraction": 1.0})
    assert convert.main([str(tmp_path / "none"), "--to", to, "--out", str(tmp_path / "out")]) == 2
    assert "no row has an embedding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
