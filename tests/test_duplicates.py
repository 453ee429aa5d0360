"""Images with the same bytes are embedded once in each shard, and every row gets the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.job.main import run_job
from tests.jobs import config_for, scenes_manifest

# Row 20 is empty, row 3 is no picture: their copies fail for the same reason.
COPIES = {5: 1, 9: 3, 17: 1, 23: 22, 30: 29, 40: 20, 47: 24}


def manifest_with_copies(path: Path) -> Path:
    table = pq.read_table(scenes_manifest(path, 48))
    images = table["image"].to_pylist()
    for row, first in COPIES.items():
        images[row] = images[first]
    column = table.schema.get_field_index("image")
    pq.write_table(table.set_column(column, table.schema.field(column), pa.array(images, pa.binary())), path)
    return path


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def test_copies_share_the_result_of_the_first_one(tmp_path: Path) -> None:
    manifest = manifest_with_copies(tmp_path / "manifest.parquet")
    once = run_job(config_for(manifest, tmp_path / "once"))
    each = run_job(config_for(manifest, tmp_path / "each", images={"repeats": "each"}))
    # Rows 9 and 40 failed; 1 and 17, 24 and 47, ... lie in one shard each, 40 and 20 do not.
    assert once.repeats == 5
    assert each.repeats == 0
    assert once.images == each.images - 5
    assert once.counts == each.counts
    got, wanted = pq.read_table(parts(tmp_path / "once")), pq.read_table(parts(tmp_path / "each"))
    for name in ("id", "truth", "label", "top_labels", "status", "error"):
        assert got[name].equals(wanted[name])
    found = got["embedding"].to_pylist()
    for row, first in COPIES.items():
        assert found[row] == found[first]
    pairs = [pair for pair in zip(found, wanted["embedding"].to_pylist(), strict=True) if pair[0] is not None]
    np.testing.assert_allclose(*np.array(pairs).swapaxes(0, 1), atol=1e-5)
    assert got["score"].to_pylist()[47] == got["score"].to_pylist()[24]
    # Another run writes the same bytes.
    run_job(config_for(manifest, tmp_path / "again"))
    ours, theirs = ([(part.name, part.read_bytes()) for part in parts(tmp_path / name)] for name in ("once", "again"))
    assert ours == theirs
