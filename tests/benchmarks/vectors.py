"""Finished datasets of random embeddings, written part by part, so that they may be larger than memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.records import OK
from pipeline.dataset import plan
from pipeline.dataset.commits import commit_part, finalize, read_commits
from pipeline.dataset.parts import part_format
from pipeline.dataset.plan import Plan, count_shards
from pipeline.dataset.vectors import VectorFormat
from pipeline.storage.factory import open_storage

SHARD_ROWS, CENTRES = 131_072, 1000


def write_dataset(folder: Path, rows: int, dim: int, *, dtype: str = "float16", labels: int = 100) -> None:
    """Vectors around :data:`CENTRES` random centres, float16, with an id, a label, a score and a kept column."""
    prints = {"manifest": {}, "output": {"dtype": dtype, "dim": dim, "compression": "zstd"}}
    kept = pa.schema([("id", pa.string()), ("width", pa.int64())])
    form = part_format(kept, dim=dim, dtype=dtype, compression="zstd", fingerprints=prints)
    made = Plan(rows, count_shards(rows, SHARD_ROWS), SHARD_ROWS, fingerprints=prints, about={})
    storage = open_storage(str(folder))
    plan.write_once(storage, made)
    centres = np.random.default_rng(0).normal(size=(CENTRES, dim)).astype(np.float32)
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        count, dice = min(SHARD_ROWS, rows - start), np.random.default_rng(shard + 1)
        drawn = centres[dice.integers(0, CENTRES, count)] + dice.normal(size=(count, dim), scale=1.5).astype(np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        columns = {name: pa.nulls(count, form.schema.field(name).type) for name in form.schema.names}
        columns |= {
            "id": pa.array(
                [f"photos/{number // 1000:06d}/{number:010d}.jpg" for number in range(start, start + count)]
            ),
            "width": pa.array(dice.integers(64, 4096, count)),
            "label": pa.array(np.char.add("label-", dice.integers(0, labels, count).astype(str))),
            "score": pa.array(dice.random(count).astype(np.float32)),
            "embedding": form.stored.column(VectorFormat(dtype, dim).encode(drawn), np.zeros(count, bool)),
            "status": pa.array([OK] * count),
        }
        commit_part(storage, shard, pa.table(columns, schema=form.schema), form, {OK: count})
    finalize(storage, made, read_commits(storage, made))
