"""The cost of a relabelled row: ``python -m tests.relabel_cost --rows 100000 --labels 1000``.

A dataset of random embeddings at the length of CLIP ViT-B/32 (512) is written by the pipeline's own protocol and
relabelled; the model has random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.config.schema import Config, LabelsConfig, ModelConfig, PromptsConfig
from pipeline.core.concurrency import in_order
from pipeline.core.records import Embeddings, Shard, ShardRows, TextBank
from pipeline.dataset import commits, plan
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.parts import ShardResult, build_table, count_statuses, part_format
from pipeline.dataset.saved_config import recipe_of
from pipeline.models.checkpoint import open_checkpoint
from pipeline.storage.factory import open_storage

MODEL = ModelConfig(name="openai/clip-vit-base-patch32", weights="random")


def made_dataset(folder: Path, rows: int, *, shard_rows: int = 4096, dtype: str = "float32", dim: int = 512) -> Dataset:
    """A finished dataset of random unit vectors, as if ViT-B/32 with random weights had made it."""
    config = Config(model=MODEL)
    config = replace(config, output=replace(config.output, dir=str(folder), dtype=dtype))
    config = replace(config, manifest=replace(config.manifest, path="none.parquet", shard_rows=shard_rows))
    prints = {
        "model": open_checkpoint(MODEL).fingerprint,
        "batch_size": 64,
        "prompts": None,
        "manifest": {"columns": ["id", "path"]},
        "output": {"dtype": dtype, "compression": "zstd"},
    }
    form = part_format(
        pa.schema([pa.field("id", pa.string())]), dim=dim, dtype=dtype, compression="zstd", fingerprints=prints
    )
    storage, shards = open_storage(str(folder)), -(-rows // shard_rows)
    wanted = plan.Plan(
        rows=rows, shards=shards, shard_rows=shard_rows, fingerprints=prints, about={}, config=recipe_of(config)
    )
    plan.write_once(storage, wanted)

    def make(index: int) -> None:
        start, count = index * shard_rows, min(shard_rows, rows - index * shard_rows)
        vectors = np.random.default_rng(index).standard_normal((count, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids = pa.table({"id": [f"image-{start + row:09d}" for row in range(count)]})
        shard = Shard(index=index, rows=count, pieces=())
        none = np.zeros((count, 0))
        result = ShardResult(
            rows=ShardRows(shard=shard, table=ids, failures={}),
            vectors=vectors.astype(dtype),
            top=none.astype(np.int64),
            scores=none.astype(np.float32),
            names=(),
            threshold=None,
        )
        commits.commit_part(storage, index, build_table(result, form), form, count_statuses(result.rows))

    list(in_order(make, range(shards), threads=2))
    commits.finalize(storage, wanted, commits.read_commits(storage, wanted))
    return open_dataset(str(folder))


def floor(labels: int, dim: int, batch: int) -> dict[str, float]:
    """Microseconds of one core a row: the matrix product alone, and with scores and the best five."""
    from pipeline.models.labels import label

    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(batch, dim, generator=dice), dim=1)
    features = torch.nn.functional.normalize(torch.randn(labels, dim, generator=dice), dim=1)
    bank = TextBank(tuple(map(str, range(labels))), features.numpy(), "softmax", 100.0, 0.0, "")
    works = {
        "matmul": lambda: vectors @ features.T,
        "softmax": lambda: torch.softmax(vectors @ features.T, dim=1),
        "label": lambda: label(Embeddings(vectors), bank, features, top_k=5),
    }
    found = {}
    for name, work in works.items():
        for _ in range(20):
            work()
        best = 1e9
        for _ in range(10):
            began = time.thread_time()
            for _ in range(30):
                work()
            best = min(best, (time.thread_time() - began) / 30 / batch * 1e6)
        found[name] = round(best, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    from pipeline.job.relabel import relabel

    print(json.dumps({"microseconds a row, labelling alone": floor(options.labels, 512, 64)}))
    with tempfile.TemporaryDirectory() as folder:
        source = made_dataset(Path(folder) / "source", options.rows, dtype=options.dtype)
        config = Config(
            model=MODEL,
            prompts=PromptsConfig(labels=[f"thing {n}" for n in range(options.labels)], cache=f"{folder}/text"),
            labels=LabelsConfig(),
        )
        config = replace(config, output=replace(config.output, dir=f"{folder}/out"))
        config = replace(config, report=replace(config.report, progress="none"))
        told = asdict(relabel(source, config))
    wanted = ("rows", "core_seconds", "rows_per_core_second", "stages", "memory")
    print(json.dumps({name: told[name] for name in wanted}))


if __name__ == "__main__":
    main()
