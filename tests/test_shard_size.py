"""``manifest.shard_rows=auto``: a size for each job, the same in all of its parts, that the plan keeps."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.compose import compose_config
from pipeline.config.schema import Config, ModelConfig
from pipeline.core.errors import ConfigError, PlanMismatch
from pipeline.dataset import plan
from pipeline.dataset.parts import GROUP_ROWS, part_format, write_part
from pipeline.dataset.plan import count_shards
from pipeline.engine import shard_size
from pipeline.engine.shard_size import (
    HELD,
    LEAST,
    MANY,
    MOST,
    MOST_SHARDS,
    SECONDS,
    SHARDS,
    STEP,
    WRITTEN,
    choose_rows,
    count_workers,
    with_shard_rows,
)
from pipeline.job.estimate.estimate import estimate_job
from pipeline.job.main import run_job
from pipeline.manifest.manifest import Manifest, ManifestFile
from pipeline.manifest.shards import cut
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.towers import ImageTower, Sizes
from pipeline.storage.local import LocalStorage
from tests.jobs import config_for, content, scenes_manifest
from tests.nights import Collection, night, read

ROWS = 30
B32 = Sizes(layers=12, heads=12, width=768, widest=3072, tokens=50)
L14 = Sizes(layers=24, heads=16, width=1024, widest=4096, tokens=257)
SO400M = Sizes(layers=27, heads=16, width=1152, widest=4304, tokens=729)
DIMS = {B32: 512, L14: 768, SO400M: 1152}
MILLION = 10**6


@cache
def demo() -> Checkpoint:
    return open_checkpoint(ModelConfig())


def model(sizes: Sizes) -> Checkpoint:
    """A checkpoint of that size; no tower of it is run."""
    return replace(demo(), image=ImageTower(torch.nn.Identity(), sizes), dim=DIMS[sizes])


def imagined(rows: int, *, size: int = 0, kept: Sequence[str] = (), kind: str = "path") -> Manifest:
    """A manifest of which only the counts exist."""
    groups = [MILLION] * (rows // MILLION) + [rows % MILLION] * (rows % MILLION > 0)
    schema = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in kept)])
    file = ManifestFile(url="m", row_groups=tuple(groups), size=size, digest="")
    return Manifest((file,), schema, id="id", image="path", image_kind=kind, root="")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_size, "choose_device", lambda name: torch.device("cuda"))


def settled(folder: Path, sizes: Sizes, manifest: Manifest, **values: Any) -> int:
    """The number for a new output, with values of keys such as ``cluster_part``."""
    config = Config().changed({key.replace("_", ".", 1): value for key, value in values.items()})
    return with_shard_rows(config, model(sizes), manifest, LocalStorage(str(folder / "out"))).manifest.shard_rows


GPU = [
    pytest.param(1, B32, {}, LEAST, id="one row"),
    pytest.param(MILLION, B32, {}, LEAST, id="a million"),
    pytest.param(10 * MILLION, B32, {}, 38_912, id="256 shards for the worker"),
    pytest.param(100 * MILLION, B32, {}, 131_072, id="256 MiB of 512 numbers"),
    pytest.param(100 * MILLION, L14, {}, 87_040, id="256 MiB of 768 numbers"),
    pytest.param(100 * MILLION, L14, {"output_dims": 256}, 153_600, id="two minutes of L/14"),
    pytest.param(100 * MILLION, SO400M, {}, 39_936, id="two minutes of so400m at 384 pixels"),
    pytest.param(100 * MILLION, B32, {"cluster_part": "3/8"}, 48_128, id="eight parts"),
    pytest.param(100 * MILLION, B32, {"cluster_part": "1/1000"}, LEAST, id="more parts than the rows are enough for"),
    pytest.param(100 * MILLION, B32, {"cluster_name": "cuda", "cluster_workers": 8}, 48_128, id="eight processes"),
    pytest.param(100 * MILLION, B32, {"cluster_name": "address"}, 5120, id="an unknown number of processes"),
    pytest.param(5000 * MILLION, B32, {}, 131_072, id="five billion"),
    pytest.param(5000 * MILLION, SO400M, {}, 100_352, id="five billion, slowly"),
    pytest.param(5000 * MILLION, B32, {"cluster_part": "7/512"}, 100_352, id="five billion in parts"),
    pytest.param(10**12, B32, {}, MOST, id="as many as there may be"),
]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("rows", "sizes", "values", "wanted"), GPU)
def test_the_size_follows_the_job_on_a_gpu(
    rows: int, sizes: Sizes, values: dict[str, Any], wanted: int, tmp_path: Path
) -> None:
    assert settled(tmp_path, sizes, imagined(rows), **values) == wanted


@pytest.mark.parametrize(
    ("rows", "sizes", "wanted"),
    [(50_000, B32, LEAST), (50_000, SO400M, LEAST), (100 * MILLION, B32, 13_312), (100 * MILLION, L14, LEAST)],
)
def test_the_size_follows_the_job_on_a_cpu(rows: int, sizes: Sizes, wanted: int, tmp_path: Path) -> None:
    assert settled(tmp_path, sizes, imagined(rows), backend_device="cpu") == wanted


def test_the_driver_of_a_cluster_of_gpus_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_size, "choose_device", lambda name: torch.device("cpu"))
    many = imagined(100 * MILLION)
    slurm = {"cluster_name": "slurm", "cluster_workers": 4}
    assert settled(tmp_path, B32, many, **slurm, cluster_slurm_gpus=1) == 97_280
    assert settled(tmp_path, B32, many, **slurm, backend_device="cuda") == 97_280
    assert settled(tmp_path, B32, many, **slurm) == 13_312


@pytest.mark.usefixtures("on_cuda")
def test_large_kept_columns_and_texts_make_smaller_shards(tmp_path: Path) -> None:
    rows = 100 * MILLION
    plain = settled(tmp_path, B32, imagined(rows, size=20_000 * rows))
    assert plain == 131_072, "columns that are not kept"
    pages = settled(tmp_path, B32, imagined(rows, size=20_000 * rows, kept=["page"]))
    assert pages == WRITTEN // (100 + 20_000 + 2048) // STEP * STEP
    # A manifest with the images themselves says nothing of the size of what is kept beside them.
    assert settled(tmp_path, B32, imagined(rows, size=20_000 * rows, kept=["a"], kind="bytes")) == plain
    assert settled(tmp_path, B32, imagined(rows), manifest_text="caption") == plain // 2


def test_the_size_is_within_its_bounds_whatever_the_job() -> None:
    dice, seen = random.Random(7), set()
    for _ in range(5000):
        rows = int(10 ** dice.uniform(0, 10.7))
        workers = int(10 ** dice.uniform(0, 4))
        pace, dim = 10 ** dice.uniform(-1, 4.5), dice.randint(16, 4096)
        written = int(10 ** dice.uniform(1.5, 7))
        size, reason = choose_rows(rows, workers=workers, pace=pace, held=4 * dim, written=written)
        seen.add(reason)
        assert LEAST <= size <= MOST
        assert size % STEP == 0
        assert count_shards(rows, size) <= MOST_SHARDS or size == MOST
        if size > max(LEAST, -(-rows // (MOST_SHARDS * STEP)) * STEP):
            assert size <= pace * SECONDS
            assert size * 4 * dim <= HELD
            assert size * written <= WRITTEN
            assert rows / size >= SHARDS * workers
        # Larger jobs have shards at least as large, and more workers have none that are larger.
        assert choose_rows(2 * rows, workers=workers, pace=pace, held=4 * dim, written=written)[0] >= size
        assert choose_rows(rows, workers=2 * workers, pace=pace, held=4 * dim, written=written)[0] <= size
    assert len(seen) == 6, "every rule decided some"


@pytest.mark.usefixtures("on_cuda")
def test_five_billion_rows_are_cut_into_less_than_fifty_thousand_shards(tmp_path: Path) -> None:
    manifest = imagined(5000 * MILLION)
    for sizes in DIMS:
        size = settled(tmp_path, sizes, manifest, cluster_part="1/64")
        shards = list(cut(manifest, size))
        assert len(shards) <= MOST_SHARDS
        assert sum(shard.rows for shard in shards) == 5000 * MILLION


@pytest.mark.usefixtures("on_cuda")
def test_all_parts_of_a_job_agree_before_there_is_a_plan(tmp_path: Path) -> None:
    manifest = imagined(30 * MILLION)
    assert len({settled(tmp_path, B32, manifest, cluster_part=f"{part}/16") for part in range(1, 17)}) == 1


@pytest.mark.parametrize(
    ("cluster", "workers"),
    [
        ({}, 1),
        ({"workers": 9}, 1),
        ({"part": "3/16"}, 16),
        ({"part": "auto"}, MANY),
        ({"name": "local"}, 2),
        ({"name": "local", "workers": 5}, 5),
        ({"name": "slurm"}, 1),
        ({"name": "slurm", "workers": 2, "max_workers": 40}, 40),
        ({"name": "cuda"}, MANY),
    ],
)
def test_workers_are_counted_where_the_config_tells_their_number(cluster: dict[str, Any], workers: int) -> None:
    assert count_workers(Config().changed({f"cluster.{key}": value for key, value in cluster.items()})) == workers


def test_the_number_of_the_plan_is_kept_by_other_workers_and_one_that_is_given_by_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    there = plan.Plan(rows=100 * MILLION, shards=20_000, shard_rows=5000, fingerprints={}, about={})
    plan.write_once(storage, there)
    for values in ({}, {"cluster_part": "1/4"}, {"cluster_name": "local", "cluster_workers": 64}):
        with caplog.at_level(logging.INFO):
            assert settled(tmp_path, L14, imagined(100 * MILLION), **values) == 5000
        assert caplog.messages[-1] == f"shards of 5,000 rows, as {storage.url}/_plan.json says"
    assert settled(tmp_path, L14, imagined(100 * MILLION), manifest_shard_rows=7) == 7


@pytest.mark.parametrize("typed", ["0", "-1", "default", "many", "1000001", "null"])
def test_another_word_or_number_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([f"manifest.shard_rows={typed}"])
    assert "must be a whole number from 1 to 1000000, or auto" in str(caught.value)


def test_auto_is_the_default_and_may_be_typed() -> None:
    assert compose_config(["manifest.shard_rows=auto"]) == compose_config([]) == Config()
    assert compose_config(["manifest.shard_rows=5000"]).manifest.shard_rows == 5000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("small") / "m.parquet", ROWS, damaged={3: b""})


def test_a_small_dataset_has_the_bytes_that_it_had(small: Path, tmp_path: Path) -> None:
    made = {}
    for shard_rows in (0, 4096):
        config = config_for(small, tmp_path / "out", manifest={"shard_rows": shard_rows})
        run_job(config)
        made[shard_rows] = content(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / str(shard_rows))
    assert made[0] == made[4096]


def test_a_job_goes_on_with_the_shards_that_it_was_begun_with(small: Path, tmp_path: Path) -> None:
    begun = config_for(small, tmp_path / "out", manifest={"shard_rows": 8}, cluster={"part": "1/2"})
    whole = config_for(small, tmp_path / "whole", manifest={"shard_rows": 8})
    run_job(begun)
    run_job(whole)
    with pytest.raises(PlanMismatch, match="shard_rows: there 8, now 9"):
        run_job(begun.changed({"manifest.shard_rows": 9}))
    # As another number of parts, and of an unknown size.
    run_job(begun.changed({"manifest.shard_rows": 0, "cluster.part": None}))
    parts = {name: data for name, data in content(tmp_path / "out").items() if name.endswith(".parquet")}
    assert len(parts) == 4
    assert parts == {name: data for name, data in content(tmp_path / "whole").items() if name.endswith(".parquet")}


def test_a_dry_run_tells_shards_their_rows_and_the_reason(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = estimate_job(config_for(small, tmp_path / "out", manifest={"shard_rows": 0}))
    assert (estimate.shards, estimate.shard_rows) == (1, LEAST)
    said = "".join(capsys.readouterr())
    assert "manifest.shard_rows=auto: 1 shard of up to 4,096 rows (the fewest)" in said
    assert "30 in 1 shard of up to 4,096; none are done" in said


def test_nights_keep_the_shards_of_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = Collection(tmp_path / "photos")
    photos.folder.mkdir()
    for number in range(20):
        photos.draw(number)
    photos.write()
    typed = photos.config()
    first = night(typed, tmp_path / "nights", "2026-11-21")
    photos.draw(20)
    photos.write()
    auto = typed.changed({"manifest.shard_rows": 0})
    second = night(auto, tmp_path / "nights", "2026-11-22")
    # 8 rows each, of which the first two are the files of the night before.
    assert (first.shared, second.shared) == (0, 2)
    stored = plan.read(LocalStorage(str(tmp_path / "nights" / "date=2026-11-22")))
    assert stored is not None
    assert (stored.shard_rows, stored.shards) == (8, 3)
    # More shards of 8 rows than a dataset may have: the rows of a shard are chosen as for a new job.
    monkeypatch.setattr("pipeline.nightly.prepare.MOST_SHARDS", 2)
    photos.draw(21)
    photos.write()
    third = night(auto, tmp_path / "nights", "2026-11-23")
    assert (third.kinds["carried"], third.shared) == (21, 0)
    stored = plan.read(LocalStorage(str(tmp_path / "nights" / "date=2026-11-23")))
    assert stored is not None
    assert (stored.shard_rows, stored.shards) == (LEAST, 1)
    assert read(tmp_path / "nights" / "date=2026-11-23")["id"].to_pylist() == sorted(photos.rows)


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        (4096, [4096]),
        (GROUP_ROWS, [GROUP_ROWS]),
        (GROUP_ROWS + 1, [GROUP_ROWS // 2 + 1, GROUP_ROWS // 2]),
        (100_352, [25_088] * 4),
    ],
)
def test_a_large_part_has_row_groups_of_equal_length(rows: int, groups: list[int], tmp_path: Path) -> None:
    fingerprints: dict[str, Any] = {"output": {"columns": ["score"]}}
    form = part_format(
        pa.schema([("id", pa.int64())]), dim=4, dtype="float32", compression="zstd", fingerprints=fingerprints
    )
    table = pa.table({"id": range(rows), "score": pa.nulls(rows, pa.float32())}, schema=form.schema)
    for name in ("one", "other"):
        write_part(table, tmp_path / name, form)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    file = pq.ParquetFile(tmp_path / "one").metadata
    assert [file.row_group(number).num_rows for number in range(file.num_row_groups)] == groups
    assert file.num_rows == rows
