"""Files of analyses: beside their dataset, of one of its states, and never in place of another program's file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.dataset.analysis import Analysis, analyses_of, analysis_url, check_output, read_analysis, writing
from pipeline.dataset.dataset import Dataset, open_dataset
from tests.finished import write_vectors

SCHEMA = pa.schema([("id", pa.string()), ("keep", pa.bool_())])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_vectors(str(tmp_path / "photos"), np.eye(8, dtype=np.float32))


def write(dataset: Dataset, url: str, kind: str = "duplicates", rows: int = 2) -> None:
    parameters = {"threshold": 0.95}
    with writing(url, kind, dataset, SCHEMA, parameters=parameters, counts={"groups": 1}) as writer:
        writer.write_table(pa.table({"id": ["a"] * rows, "keep": [True] * rows}, schema=SCHEMA))


def test_a_file_says_what_it_is_of(dataset: Dataset, tmp_path: Path) -> None:
    url = check_output(dataset, "duplicates", None)
    assert url == analysis_url(dataset, "duplicates") == str(tmp_path / "photos.duplicates.parquet")
    write(dataset, url)
    found = read_analysis(url)
    assert found == Analysis(
        kind="duplicates",
        url=url,
        dataset=dataset.address,
        fingerprint=dataset.fingerprint,
        parameters={"threshold": 0.95},
        counts={"groups": 1},
        schema=SCHEMA,
        rows=2,
    )
    assert pq.read_table(url)["id"].to_pylist() == ["a", "a"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("_tmp")] == []


def test_the_analyses_of_a_dataset_are_those_beside_it(dataset: Dataset, tmp_path: Path) -> None:
    assert analyses_of(dataset) == {}
    write(dataset, analysis_url(dataset, "duplicates"))
    (tmp_path / "photos.sample.parquet").write_bytes(b"no Parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "photos.clusters.parquet")
    found = analyses_of(dataset)
    assert list(found) == ["duplicates"]
    assert found["duplicates"].fits(dataset)
    # A file under the name of another kind.
    write(dataset, analysis_url(dataset, "sample"), kind="clusters")
    assert list(analyses_of(dataset)) == ["duplicates"]


def test_a_file_of_another_state_of_the_dataset_says_so(dataset: Dataset, tmp_path: Path) -> None:
    write(dataset, analysis_url(dataset, "duplicates"))
    shutil.rmtree(tmp_path / "photos")
    other = write_vectors(str(tmp_path / "photos"), -np.eye(8, dtype=np.float32))
    assert not analyses_of(other)["duplicates"].fits(other)
    # One that was moved with its dataset is of it.
    (tmp_path / "elsewhere").mkdir()
    write(other, analysis_url(other, "duplicates"))
    for path in [*tmp_path.glob("photos*")]:
        path.rename(tmp_path / "elsewhere" / path.name)
    moved = open_dataset(str(tmp_path / "elsewhere" / "photos"))
    assert analyses_of(moved)["duplicates"].fits(moved)


def test_a_trailing_slash_changes_nothing(dataset: Dataset) -> None:
    slashed = open_dataset(f"{dataset.url}/")
    assert analysis_url(slashed, "sample") == analysis_url(dataset, "sample")


@pytest.mark.parametrize("name", ["x.parquet", "deeper/x.parquet"])
def test_a_file_in_the_dataset_is_refused(dataset: Dataset, name: str) -> None:
    with pytest.raises(ConfigError, match="lies in the dataset"):
        check_output(dataset, "duplicates", f"{dataset.url}/{name}")


def test_only_a_file_of_the_same_kind_is_replaced(dataset: Dataset, tmp_path: Path) -> None:
    for name, kind in (("a.parquet", "clusters"), ("b.parquet", ""), ("c.parquet", "")):
        if kind:
            write(dataset, str(tmp_path / name), kind=kind)
        elif name == "b.parquet":
            pq.write_table(pa.table({"id": [1]}), tmp_path / name)
        else:
            (tmp_path / name).write_text("a text")
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ConfigError, match=f"of {kind or 'another program'}, not of duplicates"):
            check_output(dataset, "duplicates", str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == before
    url = str(tmp_path / "d.parquet")
    for rows in (2, 3):
        write(dataset, check_output(dataset, "duplicates", url), rows=rows)
        assert read_analysis(url).rows == rows


def test_a_write_that_fails_leaves_the_older_file(dataset: Dataset, tmp_path: Path) -> None:
    url = analysis_url(dataset, "duplicates")
    write(dataset, url)
    before = Path(url).read_bytes()
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        writing(url, "duplicates", dataset, SCHEMA, parameters={}, counts={}),
    ):
        raise RuntimeError("in the middle")
    assert Path(url).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.duplicates.parquet"}


def test_what_is_no_analysis_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.parquet: no such file"):
        read_analysis(str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ArtifactError, match=r"other\.parquet: not a file of"):
        read_analysis(str(tmp_path / "other.parquet"))


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket.parquet", "memory://x.parquet"])
def test_a_place_without_a_folder_is_refused(dataset: Dataset, url: str) -> None:
    with pytest.raises(ConfigError, match="names no file in a folder"):
        check_output(dataset, "duplicates", url)


def test_other_file_systems_keep_files_too() -> None:
    there = write_vectors("memory://analyses/photos", np.eye(8, dtype=np.float32))
    write(there, check_output(there, "duplicates", None))
    assert analyses_of(there)["duplicates"].url == "memory://analyses/photos.duplicates.parquet"
    assert analyses_of(there)["duplicates"].fits(there)
