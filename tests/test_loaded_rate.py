"""The rate of an encoder beside its loader, which runs at the encoder's pace; the encoder waits for nothing."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.errors import StorageError
from pipeline.core.failpoints import armed
from pipeline.core.records import ImageBatch, PreprocessSpec
from pipeline.engine import loaded_rate
from pipeline.engine.loaded_rate import rate_beside_loader
from pipeline.engine.loader import Loader
from pipeline.engine.loop import Worker
from pipeline.images.factory import pixel_reader
from pipeline.manifest.manifest import open_manifest
from pipeline.telemetry.clocks import StageClocks
from tests.jobs import StubEncoder, config_for, scenes_manifest

SPEC = PreprocessSpec(resize=32, crop=(32, 32), resample=3, mean=(0, 0, 0), std=(1, 1, 1))
BATCH, SECONDS = 4, 0.1
# Seconds of a batch.
PACE = 0.02


class Paced(StubEncoder):
    """Takes its time for a batch, and counts them."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.batches, self.streams = 0, 1

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        time.sleep(PACE)
        return super().encode(pixels)


def rate(manifest: Path, encoder: Paced, *, loader: Mapping[str, Any] | None = None, **images: Any) -> float:
    config = config_for(manifest, manifest.parent / "out", loader={"workers": 1, **(loader or {})}, images=images)
    with pixel_reader(config, "", SPEC) as reader:
        worker = Worker(reader, encoder, StageClocks())
        found = rate_beside_loader(config, open_manifest(config.manifest), worker, SECONDS)
        # The decoders of the job are as they were.
        assert reader.decoders is None or (reader.decoders.lent, reader.decoders.peak_rss()) == (0, 0)
    return found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[ImageBatch]:
    batches: list[ImageBatch] = []
    release = Loader.release

    def noted(loader: Loader, batch: ImageBatch) -> None:
        batches.append(batch)
        release(loader, batch)

    monkeypatch.setattr(Loader, "release", noted)
    return batches


@pytest.mark.parametrize("rows", [3, 60])
def test_a_batch_is_taken_for_each_that_was_encoded_and_small_manifests_come_again(
    tmp_path: Path, taken: list[ImageBatch], rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Paced(BATCH)
    with caplog.at_level(logging.INFO):
        found = rate(scenes_manifest(tmp_path / "m.parquet", rows, damaged={}), encoder)
    assert 0 < found <= BATCH / PACE
    # Batches that were ready at the end are given back too.
    assert 0.3 * encoder.batches <= len(taken) <= encoder.batches + 10
    numbers = [batch.shard.index for batch in taken]
    assert numbers == sorted(numbers)
    assert rows > BATCH or len(set(numbers)) == len(numbers) > 1
    assert not any(thread.name.startswith(("taker", "loader", "decode")) for thread in threading.enumerate())
    assert caplog.messages == []


def test_a_slow_store_does_not_hold_the_encoder_up_and_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 60, damaged={})
    with armed("read=delay:0.05"), caplog.at_level(logging.INFO):
        found = rate(manifest, Paced(BATCH))
    # The store gives a batch in ten times the encoder's time.
    assert found > 0.3 * BATCH / PACE
    [said] = caplog.messages
    assert said.startswith("batches of 4 images: reading gives about ")
    assert said.endswith(f"images/s, the encoder beside it {found:.1f}")


def test_without_a_readable_image_nothing_is_waited_for(
    tmp_path: Path, taken: list[ImageBatch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loaded_rate, "FIRST_SECONDS", 60.0)
    manifest = scenes_manifest(tmp_path / "m.parquet", 30, damaged=dict.fromkeys(range(30), b"no picture"))
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        assert rate(manifest, Paced(BATCH)) > 0
    assert time.monotonic() - began < 30
    assert taken == []
    assert caplog.messages == []


def test_a_store_that_cannot_be_read_ends_the_measurement(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "image": ["gs://bucket/a.jpg"], "truth": [""], "meta": [""]})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(StorageError, match="gs:// addresses cannot be read"):
        rate(tmp_path / "m.parquet", Paced(BATCH), schemes=["gs"])


@pytest.mark.parametrize("loader", [{"feeders": 2}, {"isolation": "process"}], ids=str)
def test_other_processes_read_beside_the_encoder_and_end(tmp_path: Path, loader: dict[str, Any]) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 60, damaged={})
    assert 0 < rate(manifest, Paced(BATCH), loader=loader) <= BATCH / PACE
    assert not [each for each in Path("/proc").glob("[0-9]*") if _is_ours(each)]


def _is_ours(process: Path) -> bool:
    """Return True if a process is a child of this one that reads or decodes."""
    try:
        child = f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
        return child and b"\0pipeline." in (process / "cmdline").read_bytes()
    except OSError:
        return False
