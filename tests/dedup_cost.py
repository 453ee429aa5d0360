"""The cost of ``pipeline.dedup`` and ``pipeline.sample``: ``python -m tests.dedup_cost --rows 1000000 -- dedup``.

A dataset of random embeddings around ten thousand kinds is written by the pipeline's own protocol. A tenth of the
second half of its rows are near copies of rows of the first half, at cosines of 0.95 to 1. What follows ``--`` is the
command with its options; ``sample`` may be given instead of ``dedup``. Printed are its seconds, start-up included, its
peak of memory, and for ``dedup`` the recall: the share of the copies that it drops.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import similarity
from tests.finished import write_vectors

KINDS = 10_000


def with_copies(rows: int, dim: int, kinds: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings, and the rows that are copies of the row half a dataset before; the other rows have none."""
    chance = np.random.default_rng(0)
    centres = chance.standard_normal((kinds, dim), dtype=np.float32)
    vectors = np.empty((rows, dim), np.float32)
    half = rows // 2
    copies = np.sort(half + chance.permutation(rows - half)[: rows // 20])
    for start in range(0, rows, 10_000):
        here = slice(start, min(rows, start + 10_000))
        noise = chance.standard_normal((here.stop - start, dim), dtype=np.float32)
        vectors[here] = centres[chance.integers(kinds, size=len(noise))] + np.float32(0.8) * noise
        copied = copies[(copies >= start) & (copies < here.stop)]
        if len(copied):
            moved = chance.standard_normal((len(copied), dim), dtype=np.float32) / np.float32(np.sqrt(dim))
            originals = vectors[copied - half]
            vectors[copied] = originals + chance.uniform(0, 0.32, (len(copied), 1)).astype(np.float32) * moved
        vectors[here] /= np.linalg.norm(vectors[here], axis=1, keepdims=True)
    near = similarity(vectors, vectors, (copies, copies - half)) >= 0.9501
    return vectors, copies[near]


def measure(dataset: Dataset, words: list[str]) -> dict[str, object]:
    """Run a command over a dataset in a process of its own, and return its seconds and peak of memory."""
    code = f"""
import sys
from pipeline.{words[0]} import main
from pipeline.core.machine import peak_rss
code = main(sys.argv[1:])
print(peak_rss() >> 20, file=sys.stderr)
raise SystemExit(code)
"""
    began = time.monotonic()
    command = [sys.executable, "-c", code, dataset.url, *words[1:]]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib": int(done.stderr.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("words", nargs="+", help="the command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vectors, copies = with_copies(options.rows, options.dim, min(KINDS, options.rows // 50))
        dataset = write_vectors(str(Path(folder) / "dataset"), vectors, dtype=options.dtype, shard_rows=16_384)
        del vectors
        figures = measure(dataset, options.words)
        if options.words[0] == "dedup":
            table = pq.read_table(f"{dataset.url}.duplicates.parquet", columns=["id", "keep"])
            dropped = {line["id"] for line in table.to_pylist() if not line["keep"]}
            found = sum(f"row-{row}" in dropped for row in copies.tolist())
            figures |= {"copies": len(copies), "dropped": len(dropped), "recall": round(found / len(copies), 4)}
        print(json.dumps({"rows": options.rows, "dim": options.dim, "dtype": options.dtype, **figures}))


if __name__ == "__main__":
    main()
