"""Inputs of :mod:`tests.scale`: manifests of any size, and datasets of tiny parts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SHARD_ROWS = 4096
# Rows of the tiny parts that stand for the real ones.
TINY_ROWS = 4
PRINTS = {"manifest": {"columns": ["id", "path"]}, "output": {"dtype": "float32", "compression": "zstd"}}


def write_manifest(folder: Path, rows: int, files: int) -> None:
    """``files`` files of equal size: an id of 20 characters, the same as a number, a path of about 60."""
    folder.mkdir(parents=True)
    each = rows // files
    for file in range(files):
        # Modulo a prime: no number comes twice, and neighbours are far apart.
        numbers = pa.array((np.arange(file * each, (file + 1) * each) * 618_033_989) % 1_000_000_007)
        digits = pc.utf8_lpad(numbers.cast(pa.string()), 16, "0")
        ids = pc.binary_join_element_wise("img-", digits, "")
        paths = pc.binary_join_element_wise(f"photos/2026/11/camera-{file % 97:02d}/", ids, ".front.original.jpg", "")
        table = pa.table({"id": ids, "number": numbers, "path": paths})
        pq.write_table(table, folder / f"{file:05d}.parquet", compression="zstd", use_dictionary=False)


def write_dataset(folder: Path, shards: int) -> None:
    """A whole dataset but for ``_SUCCESS``: plan, commits, and parts of a few rows."""
    from pipeline.dataset.commits import Commit
    from pipeline.dataset.parts import part_format, write_part

    (folder / "_commits").mkdir(parents=True)
    form = part_format(
        pa.schema([("id", pa.string())]), dim=4, dtype="float32", compression="zstd", fingerprints=PRINTS
    )
    columns: dict[str, list[Any]] = {name: [None] * TINY_ROWS for name in form.schema.names}
    columns |= {"id": list("abcd"), "status": ["ok"] * TINY_ROWS, "embedding": [[1.0, 0.0, 0.0, 0.0]] * TINY_ROWS}
    write_part(pa.table(columns, schema=form.schema), folder / "_tiny", form)
    data = (folder / "_tiny").read_bytes()
    (folder / "_tiny").unlink()
    digest = hashlib.sha256(data).hexdigest()
    for shard in range(shards):
        part = f"part-{shard:05d}-{digest[:16]}.parquet"
        (folder / part).write_bytes(data)
        commit = Commit(shard=shard, part=part, rows=TINY_ROWS, size=len(data), sha256=digest, counts={"ok": TINY_ROWS})
        (folder / "_commits" / f"{shard:05d}.json").write_bytes(commit.to_json())
    (folder / "_plan.json").write_bytes(plan_of(shards, TINY_ROWS * shards, TINY_ROWS).to_json())


def plan_of(shards: int, rows: int, shard_rows: int, fingerprints: dict[str, Any] | None = None) -> Any:
    """A plan of so many shards."""
    from pipeline.dataset.plan import Plan

    return Plan(
        rows=rows, shards=shards, shard_rows=shard_rows, fingerprints=fingerprints or PRINTS, about={}, config={}
    )
