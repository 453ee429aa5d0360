"""The sample that backends are compared and calibrated on: which pictures, and how they lie in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.schema import FORMATS
from pipeline.core.records import Sample
from pipeline.engine.sample import PLACES, TRIES, draw_sample
from pipeline.images.decode import Decoder
from pipeline.images.reader import PixelReader
from pipeline.images.sources.source import Source
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.shards import cut
from tests.test_loader import SIZE, SPEC, batches, colour, opened, run, write


def draw(manifest: Manifest, count: int) -> Sample | None:
    source = Source(root=manifest.root, max_bytes=1_000_000)
    return draw_sample(manifest, PixelReader(source, Decoder(formats=FORMATS, max_pixels=1_000_000), SPEC), count)


def rows_of(sample: Sample | None) -> list[int]:
    assert sample is not None
    return [int(id.removeprefix("row-")) for id in sample.ids]


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
def test_pictures_are_the_loader_s_and_always_the_same(tmp_path: Path, kind: str) -> None:
    write(tmp_path, range(70), kind=kind)
    sample = draw(opened(tmp_path), 10)
    assert sample is not None
    # Five row groups, the first rows of each.
    assert rows_of(sample) == [0, 1, 16, 17, 32, 33, 48, 49, 64, 65]
    assert (sample.pixels.dtype, sample.pixels.shape) == (torch.uint8, (10, 3, SIZE, SIZE))
    # The memory is NHWC, as the loader's.
    assert sample.pixels.permute(0, 2, 3, 1).is_contiguous()
    for pixels, row in zip(sample.pixels, rows_of(sample), strict=True):
        assert (pixels.numpy() == np.reshape(colour(row), (3, 1, 1))).all()
    manifest = opened(tmp_path)
    again = draw(manifest, 10)
    assert again is not None
    assert again.ids == sample.ids
    assert torch.equal(again.pixels, sample.pixels)
    loaded = {}
    for seen in batches(run(manifest, list(cut(manifest, 30)))):
        loaded |= {seen.shard * 30 + row: pixels for row, pixels in zip(seen.rows, seen.pixels, strict=False)}
    np.testing.assert_array_equal(sample.pixels.numpy(), np.stack([loaded[row] for row in rows_of(sample)]))


def test_pictures_are_spread_over_files_and_row_groups(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        write(tmp_path, range(start, start + 100), kind="bytes", group=10, name=name)
    manifest = opened(tmp_path)
    rows = rows_of(draw(manifest, 64))
    assert len(set(rows)) == 64
    groups = sorted({row // 10 for row in rows})
    assert len(groups) == PLACES
    assert max(np.diff(groups)) <= 2
    assert (groups[0], groups[-1]) == (0, 28)
    assert {row // 100 for row in rows} == {0, 1, 2}
    assert {row % 10 for row in rows} == {0, 1, 2, 3}
    few = rows_of(draw(manifest, 3))
    assert few == [0, 100, 200]


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_damaged_pictures_are_skipped(tmp_path: Path, kind: str) -> None:
    write(tmp_path, range(32), kind=kind, bad=(0, 2, 16, 17), group=16)
    manifest = opened(tmp_path)
    assert rows_of(draw(manifest, 4)) == [1, 3, 18, 19]
    if kind == "path":
        (tmp_path / "1.png").unlink()
        assert rows_of(draw(manifest, 4)) == [3, 4, 18, 19]


def test_a_group_of_damaged_pictures_is_left_after_some_tries(tmp_path: Path) -> None:
    write(tmp_path, range(60), kind="bytes", bad=tuple(range(20)), group=30)
    # Two of each group wanted: TRIES * 2 rows are looked at, and the second group gives the others too.
    assert 2 * TRIES < 20
    assert rows_of(draw(opened(tmp_path), 4)) == [30, 31, 32, 33]


def test_row_groups_of_one_row_give_as_many_pictures_as_large_ones(tmp_path: Path) -> None:
    write(tmp_path, range(40), kind="bytes", bad=(0, 1), group=1)
    found = rows_of(draw(opened(tmp_path), 24))
    assert len(found) == len(set(found)) == 24


def test_none_where_nothing_decodes(tmp_path: Path) -> None:
    write(tmp_path, range(20), bad=tuple(range(20)), group=5)
    assert draw(opened(tmp_path), 8) is None


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (64, list(range(9))), (9, list(range(9)))])
def test_one_picture_and_more_than_there_are(tmp_path: Path, count: int, expected: list[int]) -> None:
    write(tmp_path, range(9), group=3)
    assert rows_of(draw(opened(tmp_path), count)) == expected
