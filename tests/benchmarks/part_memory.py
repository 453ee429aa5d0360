"""Memory of one part of a job by the rows of its manifest: what grows with them must not.

    python -m tests.benchmarks.part_memory [--rows 1000000 10000000 100000000 1000000000] [--folder FOLDER]

Writes a manifest of so many integer ids, whose files are small as the ids count up, and measures in processes of their
own, as peak resident memory: to open it, to cut all shards and write the plan, to read a shard from the middle, and to
check that no id comes twice. Prints JSON; seconds are of the processor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.scale import measured

FILES, SHARDS, GROUP_ROWS = 100, 50_000, 1_000_000


def write_manifest(folder: Path, rows: int) -> None:
    """``FILES`` files of equal size."""
    folder.mkdir(parents=True, exist_ok=True)
    each = rows // FILES
    path = pa.DictionaryArray.from_arrays(pa.array(np.zeros(each, np.int32)), pa.array(["photos/one.jpg"]))
    for file in range(FILES):
        ids = pa.array(np.arange(file * each, (file + 1) * each))
        pq.write_table(
            pa.table({"id": ids, "path": path}), folder / f"{file:05d}.parquet", compression="zstd",
            use_dictionary=["path"], column_encoding={"id": "DELTA_BINARY_PACKED"}, row_group_size=GROUP_ROWS,
        )  # fmt: skip


def _opened(folder: str) -> Any:
    from pipeline.config.schema import ManifestConfig
    from pipeline.manifest.manifest import open_manifest

    return open_manifest(ManifestConfig(path=folder, id="id", image="path"))


def _cut(folder: str) -> Any:
    """Cut every shard, write the plan, and return the manifest and the shard in the middle."""
    from pipeline.dataset import plan
    from pipeline.manifest.shards import cut
    from pipeline.storage.factory import open_storage
    from tests.scale_data import plan_of

    manifest = _opened(folder)
    shard_rows = max(4096, -(-manifest.rows // SHARDS))
    middle = manifest.rows // shard_rows // 2
    count, chosen = 0, None
    for shard in cut(manifest, shard_rows):
        count, chosen = count + 1, shard if shard.index == middle else chosen
    with tempfile.TemporaryDirectory() as output:
        wanted = plan_of(count, manifest.rows, shard_rows, {"manifest": manifest.fingerprint})
        assert plan.write_once(open_storage(output), wanted)
    return manifest, chosen


def read_shard(folder: str) -> int:
    """Read the shard in the middle; returns its rows."""
    from pipeline.manifest.shards import ShardReader

    manifest, shard = _cut(folder)
    with ShardReader(manifest) as reader:
        return sum(batch.num_rows for batch in reader.read(shard))


def check(folder: str) -> None:
    """Check that no id comes twice."""
    from pipeline.manifest.ids import check_ids

    check_ids(_opened(folder))


WORK: dict[str, Callable[[str], Any]] = {"open": _opened, "plan": _cut, "read a shard": read_shard, "ids": check}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.part_memory", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder = options.child
        with measured() as figures:
            WORK[name](folder)
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for rows in options.rows:
            manifest = Path(scratch) / f"rows-{rows}"
            write_manifest(manifest, rows)
            for name in WORK:
                command = [sys.executable, "-m", "tests.benchmarks.part_memory", "--child", name, str(manifest)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                print(json.dumps({"rows": rows, "work": name, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
