"""Finished datasets of rendered scenes, for the tests of what is done with embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.dataset.dataset import Dataset
from pipeline.job.main import run_job
from tests.jobs import config_for

# Of tests.jobs.scenes_manifest: its rows, and those of them that have no embedding.
ROWS, FAILED = 120, (3, 20)


def run_scenes(folder: Path, name: str, scenes: Path, /, **groups: Any) -> Config:
    """Run a small job over the manifest ``scenes`` into ``folder/name``; returns its config."""
    config = config_for(scenes, folder / name, **groups)
    run_job(config)
    return config


def everything(dataset: Dataset) -> pa.Table:
    """All rows, read without the code under test."""
    return pa.concat_tables(pq.read_table(f"{dataset.url}/{commit.part}") for commit in dataset.commits)


def matrix_of(table: pa.Table) -> NDArray[np.float32]:
    """The embeddings of the rows that have one."""
    return np.stack([np.asarray(row, np.float32) for row in table["embedding"].to_pylist() if row is not None])
