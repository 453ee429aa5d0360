"""Memory does not grow with the rows of the manifest."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import ROOT
from tests.jobs import StubEncoder, config_for, stub_backend

# PIPELINE_TEST_ROWS=1000000 for the full size: about ten minutes.
ROWS = int(os.environ.get("PIPELINE_TEST_ROWS", "60000"))
FEW = 10_000
GROUP = 10_000


def tiny_images(path: Path, rows: int) -> Path:
    """A manifest with ``rows`` different PNG files of 12 x 12 pixels in a bytes column."""

    def png(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 12), (number % 251, number // 251 % 251, number // 63001 % 251)).save(buffer, "PNG")
        return buffer.getvalue()

    schema = pa.schema([("id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP):
            numbers = range(start, min(rows, start + GROUP))
            columns = {"id": [f"product/{n:09d}.png" for n in numbers], "image": [png(n) for n in numbers]}
            writer.write_table(pa.table(columns, schema=schema))
    return path


def peak_mib(manifest: Path, output: Path) -> tuple[float, int]:
    """Run the job in a process of its own; its peak resident memory in MiB, and the rows it reports."""
    command = [sys.executable, "-m", "tests.test_memory", str(manifest), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"peak (\S+) MiB, (\d+) rows, (\S+) rows/s", done.stdout)
    assert found is not None, done.stdout + done.stderr
    print(done.stdout)
    return float(found[1]), int(found[2])


def test_memory_stays_flat_as_rows_grow(tmp_path: Path) -> None:
    few, _ = peak_mib(tiny_images(tmp_path / "few.parquet", FEW), tmp_path / "few")
    many, rows = peak_mib(tiny_images(tmp_path / "many.parquet", ROWS), tmp_path / "many")
    assert rows == ROWS
    assert many <= few * 1.05, f"{few} MiB for {FEW} rows, {many} MiB for {ROWS}"


def _child(manifest: Path, output: Path) -> None:
    from pipeline.job import run_job
    from pipeline.models.hub import DEMO_FOLDER

    config = config_for(
        manifest,
        output,
        manifest={"shard_rows": 4096, "keep": []},
        loader={"batch_size": 256, "workers": 2},
        report={"progress": "plain", "examples": 4},
        model={"name": str(DEMO_FOLDER)},
    )
    with stub_backend(StubEncoder):
        report = run_job(config)
    print(f"peak {report.memory['peak_rss_mib']} MiB, {report.total_rows} rows, {report.images_per_second} rows/s")


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
