"""Columns whose names readers mix up with others are refused before any work, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import OUTPUT_COLUMNS
from pipeline.core.errors import ConfigError
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.names import differing_in_case, named_like_folders
from pipeline.engine.query import derive
from pipeline.job.main import run_job
from pipeline.job.relabel import relabel
from tests.jobs import config_for, scene
from tests.nights import night


def manifest(folder: Path, *names: str, id: str = "id") -> Path:
    """Three images with columns of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {id: ["a", "b", "c"], "image": [scene(number)[0] for number in range(3)]}
    pq.write_table(pa.table({**columns, **{name: [1, 2, 3] for name in names}}), folder / "m.parquet")
    return folder / "m.parquet"


@pytest.mark.parametrize("name", OUTPUT_COLUMNS)
@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: name[:-1] + name[-1].upper()])
def test_a_column_that_differs_from_one_of_the_output_in_case_only_is_named(name: str, change: Any) -> None:
    (problem,) = differing_in_case(["id", "caption", change(name)])
    assert (problem.key, problem.value) == ("manifest.keep", change(name))
    assert f"the column {name} of the output" in str(problem)
    (problem,) = differing_in_case([change(name)])
    assert (problem.key, problem.value) == ("manifest.id", change(name))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (["id", "ID"], ["ID"]),
        (["Id", "iD", "id"], ["iD", "id"]),
        (["id", "Size", "size"], ["size"]),
        (["id", "GRÖSSE", "größe"], ["größe"]),
        (["id", "Label", "STATUS", "id2"], ["Label", "STATUS"]),
        (["id", "labels", "score_", "caption"], []),
    ],
)
def test_columns_that_differ_from_one_another_in_case_only_are_named(columns: list[str], named: list[str]) -> None:
    assert [problem.value for problem in differing_in_case(columns)] == named


@pytest.mark.parametrize(
    ("address", "columns", "named"),
    [
        ("/data/date=2026-11-22", ["id", "date"], ["date"]),
        ("/data/Date=2026-11-22/out", ["id", "date"], ["date"]),
        ("/data/date=2026-11-22", ["date", "size"], ["date"]),
        ("s3://bucket/model=a/date=2026-11-22", ["id", "date", "model", "size"], ["date", "model"]),
        ("/data/taken%20on=1/out", ["id", "taken on"], ["taken on"]),
        ("/data/label=cat/out", ["id"], ["/data/label=cat/out"]),
        ("/data/date=2026-11-22", ["id", "dates", "day"], []),
        ("/data/date", ["id", "date"], []),
    ],
)
def test_columns_named_like_a_partition_of_the_address_are_named(
    address: str, columns: list[str], named: list[str]
) -> None:
    assert [problem.value for problem in named_like_folders(columns, address)] == named


@pytest.mark.parametrize(
    ("names", "output"),
    [(["Label", "ID", "Status", "SCORE"], "out"), (["Size", "size"], "out"), (["date"], "date=2026-11-22")],
)
def test_a_job_ends_with_two_names_every_column_and_writes_nothing(
    tmp_path: Path, names: list[str], output: str
) -> None:
    config = config_for(manifest(tmp_path, *names), tmp_path / output, manifest={"keep": names})
    with pytest.raises(ConfigError) as caught:
        run_job(config)
    assert caught.value.exit_code == 2
    said = str(caught.value)
    assert all(f"'{name}'" in said for name in names if name != "Size")
    assert "rename the column in the manifest" in said
    assert not [*(tmp_path / output).glob("*.parquet"), *(tmp_path / output).glob("_plan.json")]


def test_a_night_refuses_a_column_named_date(tmp_path: Path) -> None:
    config = config_for(manifest(tmp_path, "date"), tmp_path / "unused", manifest={"keep": ["date"]})
    with pytest.raises(ConfigError, match="date=2026-11-22"):
        night(config, tmp_path / "nights", "2026-11-22")


def test_a_relabelling_is_refused_in_a_folder_named_like_a_column(tmp_path: Path) -> None:
    config = config_for(manifest(tmp_path, "date"), tmp_path / "out", manifest={"keep": ["date"]})
    run_job(config)
    source = open_dataset(str(tmp_path / "out"))

    def relabelled(name: str) -> None:
        other = config.changed({"output.dir": str(tmp_path / name), "prompts.labels": ["a star", "a ring"]})
        relabel(source, derive(source, other, ["output.dir", "prompts.labels"]))

    with pytest.raises(ConfigError, match=r"manifest\.keep = 'date'"):
        relabelled("date=1")
    relabelled("other")


def test_a_dataset_that_an_earlier_version_began_is_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = config_for(manifest(tmp_path, "date"), tmp_path / "out", manifest={"keep": ["date"]})
    run_job(plain)
    (tmp_path / "out").rename(tmp_path / "date=2026-11-22")
    (tmp_path / "date=2026-11-22" / "_SUCCESS").unlink()
    run_job(plain.changed({"output.dir": str(tmp_path / "date=2026-11-22")}))
    assert (tmp_path / "date=2026-11-22" / "_SUCCESS").exists()
