"""Finished datasets of rendered scenes, for the tests of what is done with embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config.schema import Config
from pipeline.core.records import OK
from pipeline.dataset import plan
from pipeline.dataset.commits import commit_part, finalize, read_commits
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.parts import part_format
from pipeline.dataset.plan import Plan, count_shards
from pipeline.dataset.vectors import VectorFormat
from pipeline.job.main import run_job
from pipeline.storage.factory import open_storage
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


def write_vectors(
    url: str, vectors: NDArray[np.float32], *, dtype: str = "float32", shard_rows: int = 50, **columns: Any
) -> Dataset:
    """A finished dataset of embeddings ``[N, D]``; a row of NaN is one that failed.

    ``columns`` are ``id`` (default: a text with the number of the row), ``label``, ``score``,
    ``top_labels``, ``top_scores``, and columns kept from the manifest.
    """
    rows, dim = vectors.shape
    failed = np.isnan(vectors).any(axis=1)
    labels = pa.array(columns.pop("label", [None] * rows), pa.string())
    own = {name: columns.pop(name) for name in ("score", "top_labels", "top_scores") if name in columns}
    kept = pa.table({"id": columns.pop("id", [f"row-{row}" for row in range(rows)]), **columns})
    prints = {"manifest": {}, "output": {"dtype": dtype, "dim": dim, "compression": "zstd"}}
    form = part_format(kept.schema, dim=dim, dtype=dtype, compression="zstd", fingerprints=prints)
    made = Plan(rows, count_shards(rows, shard_rows), shard_rows, fingerprints=prints, about={})
    storage = open_storage(url)
    plan.write_once(storage, made)
    stored = VectorFormat(dtype, dim).encode(np.where(failed[:, None], 1 / np.sqrt(dim), vectors).astype(np.float32))
    for shard, start in enumerate(range(0, rows, shard_rows)):
        here = slice(start, min(rows, start + shard_rows))
        bad, count = failed[here], here.stop - start
        columns = {name: pa.nulls(count, form.schema.field(name).type) for name in form.schema.names}
        columns |= {name: kept[name].slice(start, count) for name in kept.column_names}
        columns |= {name: pa.array(values[here], form.schema.field(name).type) for name, values in own.items()}
        columns |= {
            "label": labels.slice(start, count),
            "embedding": form.stored.column(stored[here], bad),
            "status": pa.array(np.where(bad, "decode_error", OK)),
        }
        counts = {OK: int((~bad).sum()), "decode_error": int(bad.sum())}
        commit_part(storage, shard, pa.table(columns, schema=form.schema), form, counts)
    finalize(storage, made, read_commits(storage, made))
    return open_dataset(url)
