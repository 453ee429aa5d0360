from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import Config
from pipeline.core.errors import StorageError
from pipeline.core.records import Failure, ImageRef, Stage
from pipeline.core.run_report import Pace, StagePace
from pipeline.images.factory import pixel_reader
from pipeline.images.sources.source import Source
from pipeline.manifest.manifest import Manifest, open_manifest
from pipeline.report import thumbnails as module
from pipeline.report.bottleneck import ProcessSetup
from pipeline.report.faster_decoder import Faster, faster_decoder
from pipeline.report.thumbnails import THUMBNAIL, find, spread, thumbnails
from pipeline.telemetry.run_stats import RunStats, WorkerStats
from tests.pictures import saved


def photo(shade: int, *, size: tuple[int, int] = (300, 200)) -> bytes:
    noise = np.random.default_rng(shade).integers(0, 60, (*size[::-1], 3), dtype=np.uint8)
    return saved(Image.fromarray(noise + np.uint8(shade)), "JPEG")


def manifest_of(folder: Path, images: list[bytes | None], isolation: str = "none") -> tuple[Manifest, Config]:
    path = folder / "m.parquet"
    pq.write_table(pa.table({"id": [f"n{i}" for i in range(len(images))], "image": images}), path, row_group_size=5)
    config = Config()
    config = replace(config, manifest=replace(config.manifest, path=str(path), image="image"))
    config = replace(config, loader=replace(config.loader, isolation=isolation))
    return open_manifest(config.manifest), config


def test_the_pictures_are_those_of_their_rows(tmp_path: Path) -> None:
    manifest, config = manifest_of(tmp_path, [photo(10 * i) for i in range(18)])
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        made = thumbnails(manifest, reader, {2: "n2", 3: "n3", 4: "another", 16: "n16"})
    assert sorted(made) == [2, 3, 16], "another picture has taken the place of n4"
    for number, data in made.items():
        image = Image.open(io.BytesIO(data))
        assert image.size == (160, 160)
        assert np.asarray(image).mean() == pytest.approx(10 * number + 29.5, abs=3)


def test_of_a_damaged_file_whatever_can_be_seen_is_shown(tmp_path: Path) -> None:
    whole = photo(150)
    manifest, config = manifest_of(tmp_path, [whole[: len(whole) // 2], b"no picture", None, b""], "process")
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        made = thumbnails(manifest, reader, {i: f"n{i}" for i in range(4)})
    assert sorted(made) == [0]
    rows = np.asarray(Image.open(io.BytesIO(made[0]))).mean(axis=(1, 2))
    assert rows[:40].mean() == pytest.approx(179, abs=5)
    assert abs(rows[-20:].mean() - rows[:40].mean()) > 20, "the rest is missing"
    # In this process a lenient decoder would be lenient for everybody.
    config = replace(config, loader=replace(config.loader, isolation="none"))
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        assert thumbnails(manifest, reader, {0: "n0"}) == {}


def test_rows_are_found_across_row_groups_until_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = manifest_of(tmp_path, [bytes([i]) for i in range(23)])
    found = list(find(manifest, [0, 4, 5, 22], seconds=60))
    assert [(number, ref.id, ref.data) for number, ref in found] == [(n, f"n{n}", bytes([n])) for n in (0, 4, 5, 22)]
    assert [number for number, _ in find(manifest, [0, 4, 5, 22], seconds=0)] == [0, 4]
    assert list(find(manifest, [], seconds=60)) == []


def test_examples_are_spread_over_the_rows_that_were_embedded() -> None:
    assert spread(["ok"] * 10, 5) == [0, 2, 4, 6, 8]
    assert spread(["ok", "empty", "ok"], 8) == [0, 2]
    assert spread(["empty"], 3) == spread(["ok"], 0) == []
    assert module.REACH > 100


def pace(decode: float) -> Pace:
    stages = {Stage.DECODE: StagePace(None, decode, 0.9), Stage.ENCODE: StagePace(None, 10.0, 0.1)}
    return Pace(stages=stages, cores_busy=2.0, bound=10.0, ratio=0.9, verdict="")


# A run of 1,000 images in 100 s on two cores.
LONG = RunStats(0.0, 100.0, rows=1000, images=1000, workers=(WorkerStats("0", "host", 1, "cpu", 2, 1.0),))
SETUP = ProcessSetup("cpu", "fp32", "exact", threads=2, streams=1, cores=2)


def test_what_the_faster_decoder_would_give_is_measured_on_the_pictures(tmp_path: Path) -> None:
    # The larger, the less does the rest count.
    manifest, config = manifest_of(tmp_path, [photo(100, size=(1400, 900))] * 12)
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        found = faster_decoder(manifest, reader, pace(90.0), LONG, SETUP)
        assert faster_decoder(manifest, reader, pace(90.0), replace(LONG, ended=5.0), SETUP) is None
        assert faster_decoder(manifest, reader, None, LONG, SETUP) is None
        assert faster_decoder(manifest, reader, pace(90.0), LONG, replace(SETUP, decoder="gpu")) is None
    assert found is not None
    assert found.decoder == "fast"
    # 2 cores, (90 / times + 10) core seconds for 1,000 images, and 90 % of that as in the run.
    assert found.images_per_second == pytest.approx(0.9 * 2000 / (90 / found.times + 10))
    assert found.times > 1.1


def test_the_advice_names_the_gain_or_says_that_there_is_none() -> None:
    assert Faster("fast", 3.14, 390.4).advice == (
        "images.decoder=fast would give about 390.4 images/s (it decodes these images 3.1 times as fast)"
    )
    assert "would hardly help" in Faster("scaled", 1.02, 100).advice


def test_pictures_that_do_not_come_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, config = manifest_of(tmp_path, [photo(100)] * 40)
    before = Source.read

    def slow(self: Source, ref: ImageRef) -> bytes | Failure:
        time.sleep(0.1)
        return before(self, ref)

    monkeypatch.setattr(Source, "read", slow)
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        began = time.monotonic()
        made = thumbnails(manifest, reader, {i: f"n{i}" for i in range(40)}, seconds=0.2)
        assert 0 < len(made) < 40
        assert time.monotonic() - began < 10
        monkeypatch.setattr("pipeline.report.faster_decoder.SECONDS", 0.2)
        began = time.monotonic()
        faster_decoder(manifest, reader, pace(90.0), LONG, SETUP)
        assert time.monotonic() - began < 20

    def down(self: Source, ref: ImageRef) -> bytes | Failure:
        raise StorageError("the store is away")

    monkeypatch.setattr(Source, "read", down)
    with pixel_reader(config, manifest.root, THUMBNAIL) as reader:
        assert thumbnails(manifest, reader, {0: "n0"}) == {}
        found = faster_decoder(manifest, reader, pace(90.0), LONG, SETUP)
        assert found is None
