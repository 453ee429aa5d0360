"""Memory does not grow with the rows of the manifest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import ROOT, data_folder
from tests.jobs import StubEncoder, config_for, stub_backend
from tests.pictures import saved
from tests.test_decoder_pool import children

pytestmark = pytest.mark.slow
# PIPELINE_TEST_ROWS=1000000 for the full size: about ten minutes.
ROWS = int(os.environ.get("PIPELINE_TEST_ROWS", "30000"))
FEW = 10_000
GROUP = 10_000


def tiny_images(path: Path, rows: int) -> Path:
    """A manifest with ``rows`` different PNG files of 12 x 12 pixels in a bytes column."""

    def png(number: int) -> bytes:
        return saved(Image.new("RGB", (12, 12), (number % 251, number // 251 % 251, number // 63001 % 251)), "PNG")

    schema = pa.schema([("id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP):
            numbers = range(start, min(rows, start + GROUP))
            columns = {"id": [f"product/{n:09d}.png" for n in numbers], "image": [png(n) for n in numbers]}
            writer.write_table(pa.table(columns, schema=schema))
    return path


def peak_mib(manifest: Path, output: Path) -> tuple[float, int]:
    """Run the job in a process of its own; peak resident memory in MiB with its decoders, and the rows it reports."""
    command = [sys.executable, "-m", "tests.test_memory", str(manifest), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"peak (\S+) MiB, (\d+) rows, (\S+) rows/s", done.stdout)
    assert found is not None, done.stdout + done.stderr
    print(done.stdout)
    return float(found[1]), int(found[2])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Peak memory of a job over few rows, with which the others are compared."""
    folder = tmp_path_factory.mktemp("few")
    return peak_mib(tiny_images(folder / "few.parquet", FEW), folder / "out")[0]


def test_memory_stays_flat_as_rows_grow(few: float, tmp_path: Path) -> None:
    many, rows = peak_mib(tiny_images(tmp_path / "many.parquet", ROWS), tmp_path / "out")
    assert rows == ROWS
    assert many <= few * 1.05, f"{few} MiB for {FEW} rows, {many} MiB for {ROWS}"


def test_giants_are_decoded_one_at_a_time(few: float, tmp_path: Path) -> None:
    """Six images of 64 megapixels and four threads: 183 MiB of RGB each, not all of them at once."""
    # Of equal bytes, one alone would be decoded.
    images = [saved(Image.new("RGB", (8000, 8000), (40 * n, 0, 0)), "PNG", compress_level=1) for n in range(6)]
    pq.write_table(pa.table({"id": list(range(6)), "image": images}), tmp_path / "giants.parquet")
    peak, rows = peak_mib(tmp_path / "giants.parquet", tmp_path / "out")
    assert rows == 6
    assert peak <= few + 800, f"{few} MiB for tiny images, {peak} MiB for giants"


def test_the_odd_files_stay_within_a_gibibyte(tmp_path: Path) -> None:
    folder = data_folder("odd")
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [(folder / name).read_bytes() for name in names]
    pq.write_table(pa.table({"id": names, "image": images}), tmp_path / "odd.parquet", row_group_size=32)
    peak, rows = peak_mib(tmp_path / "odd.parquet", tmp_path / "out")
    assert rows == len(names) >= 150
    assert peak <= 1024


def _child(manifest: Path, output: Path) -> None:
    from pipeline.job.main import run_job
    from pipeline.models.hub import DEMO_FOLDER
    from pipeline.report import faster_decoder

    # Runs over 30 s end with a trial of another decoder, in processes of its own, which is not the memory of the loop.
    faster_decoder.LONG = float("inf")
    config = config_for(
        manifest,
        output,
        manifest={"shard_rows": 4096, "keep": []},
        loader={"batch_size": 256, "workers": 4, "isolation": "process"},
        report={"progress": "plain", "html": True},
        errors={"max_fraction": 1.0},
        model={"name": str(DEMO_FOLDER)},
    )
    done = threading.Event()
    with stub_backend(StubEncoder), ThreadPoolExecutor(1) as watcher:
        decoders = watcher.submit(_watch_decoders, done)
        try:
            report = run_job(config)
        finally:
            done.set()
    peak = report.memory["peak_rss_mib"] + decoders.result()
    print(f"peak {peak:.1f} MiB, {report.total_rows} rows, {report.images_per_second} rows/s")


def _watch_decoders(done: threading.Event) -> float:
    """The most that all decoder processes held at one time, in MiB."""
    peak = 0
    while not done.wait(0.01):
        held = 0
        for entry in children():
            with suppress(OSError, IndexError):
                held += int(Path(f"/proc/{entry}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        peak = max(peak, held)
    return peak / 2**20


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
