"""The simulation of large plans runs; a plan has no more shards than names, and a large manifest few digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import ManifestConfig
from pipeline.core.errors import ConfigError
from pipeline.manifest import manifest as source
from tests import scale, scale_data
from tests.scale_page import to_markdown


def test_a_small_simulation_gives_every_figure(tmp_path: Path) -> None:
    manifest, dataset = str(tmp_path / "manifest"), tmp_path / "dataset"
    scale_data.write_manifest(tmp_path / "manifest", 20_000, 4)
    scale_data.write_dataset(dataset, 50)
    size = {"rows": 20_000, "files": 4, "shards": 50, "manifest_bytes": 1, "output_files": 102}
    size |= {"open": scale.measure_open(manifest), "plan": scale.measure_plan(manifest)}
    size |= {"string ids": scale.measure_ids(manifest, "id"), "integer ids": scale.measure_ids(manifest, "number")}
    size["resume"] = scale.measure_resume(str(dataset))
    assert size["open"]["rows"] == 20_000
    assert size["plan"]["shards"] == 5
    assert size["plan"]["plan_bytes"] < 1000
    assert size["resume"]["commit_bytes"] < 50 * 300
    step = {"cpu": 0.1, "wall": 0.2, "peak_mib": 90, "lists": 2, "others": 100}
    content = {
        "machine": "a machine",
        "versions": "none",
        "command": "python -m tests.scale",
        "digest": {"mb_per_core_second": 1000},
        "many files": {**step, "files": 10},
        "s3": {"shards": 50, "find_done": step, "read_commits": step},
        "sizes": [size],
        "memory": {"about": "x", "peaks": {"10": 100.0, "20": 101.0}},
    }
    page = to_markdown(content)
    assert "| shards | 50 |" in page
    assert "| resume: find what is done | 2.00 | 2.0 | 24,415 | 48,880 |" in page
    assert "| 2.00 | 2.0 | 49,825 | 99,750 |" in page
    assert "20 rows 101.0 MiB (+1.0%)" in page


def test_more_shards_than_names_have_digits_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_data.write_manifest(tmp_path / "m", 100, 2)
    monkeypatch.setattr(source, "MOST_SHARDS", 20)
    assert source.open_manifest(ManifestConfig(path=str(tmp_path / "m"), shard_rows=5)).rows == 100
    with pytest.raises(
        ConfigError, match=r"manifest\.shard_rows = 4: 100 rows .* 20 parts.*take manifest.shard_rows=5"
    ):
        source.open_manifest(ManifestConfig(path=str(tmp_path / "m"), shard_rows=4))


def test_a_manifest_of_very_many_bytes_is_known_by_its_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_data.write_manifest(tmp_path / "m", 100, 2)
    config = ManifestConfig(path=str(tmp_path / "m"))
    assert {file.digest[:7] for file in source.open_manifest(config).files} == {"sha256:"}
    monkeypatch.setattr(source, "WHOLE_DIGEST_ALL_BYTES", 1000)
    assert {file.digest[:7] for file in source.open_manifest(config).files} == {"footer:"}
