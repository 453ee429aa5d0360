"""Images with the same bytes are embedded once in each shard, and every row gets the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.job.main import run_job
from tests.jobs import config_for, content, scenes_manifest

# Row 20 is empty, row 3 is no picture: their copies fail for the same reason.
COPIES = {5: 1, 9: 3, 17: 1, 23: 22, 30: 29, 40: 20, 47: 24}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = scenes_manifest(tmp_path / "manifest.parquet", 48)
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    for row, first in COPIES.items():
        images[row] = images[first]
    column = table.schema.get_field_index("image")
    pq.write_table(table.set_column(column, table.schema.field(column), pa.array(images, pa.binary())), path)
    return path


def rows(output: Path) -> pa.Table:
    return pq.read_table(sorted(output.glob("part-*.parquet")))


def test_repeats_share_what_the_first_one_got(manifest: Path, tmp_path: Path) -> None:
    config = config_for(manifest, tmp_path / "once")
    once = run_job(config)
    each = run_job(config_for(manifest, tmp_path / "each", images={"repeats": "each"}))
    # Rows 9 and 40 failed; 1 and 17, 24 and 47, ... lie in one shard each, 40 and 20 do not.
    assert once.repeats == 5
    assert each.repeats == 0
    assert once.images == each.images - 5
    assert once.counts == each.counts
    got, wanted = rows(tmp_path / "once"), rows(tmp_path / "each")
    for name in ("id", "truth", "label", "top_labels", "status", "error"):
        assert got[name].equals(wanted[name])
    found = got["embedding"].to_pylist()
    for row, first in COPIES.items():
        assert found[row] == found[first]
    pairs = [pair for pair in zip(found, wanted["embedding"].to_pylist(), strict=True) if pair[0] is not None]
    np.testing.assert_allclose(*np.array(pairs).swapaxes(0, 1), atol=1e-5)
    assert got["score"].to_pylist()[47] == got["score"].to_pylist()[24]


def test_repeats_give_the_same_bytes_again(manifest: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run_job(config_for(manifest, tmp_path / name))
    parts = [{k: v for k, v in content(tmp_path / n).items() if k.endswith(".parquet")} for n in ("first", "second")]
    assert parts[0] == parts[1]
