"""``run.dry=true``: a few batches are measured, the rest is extrapolated, and nothing is left behind."""

from __future__ import annotations

import json
import logging
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch

from pipeline.config.compose import compose_config
from pipeline.config.schema import Config
from pipeline.config.validate import check
from pipeline.core.errors import ClusterUnavailable, ConfigError, ManifestError, PlanMismatch
from pipeline.core.records import Piece
from pipeline.dataset import lease
from pipeline.dataset.saved_config import config_of, recipe_of
from pipeline.engine.demo import folder as demo
from pipeline.job.estimate import extrapolate
from pipeline.job.estimate.estimate import estimate_job
from pipeline.job.estimate.record import Estimate, lines, span
from pipeline.job.estimate.sample import DEPTH, in_shards, spread
from pipeline.job.estimate.scaling import Processes, processes_of
from pipeline.job.estimate.trial import Limits
from pipeline.job.main import run_job
from pipeline.manifest.manifest import Manifest, ManifestFile
from pipeline.manifest.shards import cut
from pipeline.storage.factory import open_storage
from tests.forks import forks
from tests.jobs import StubEncoder, config_for, overrides_of, scenes_manifest, stub_backend

ROWS, FAILED = 120, 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_manifest(tmp_path_factory.mktemp("estimate") / "m.parquet", ROWS)


def job(scenes: Path, output: Path, /, **groups: dict[str, Any]) -> Config:
    """Five shards of 24 rows, in this process."""
    return config_for(scenes, output, **groups)


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its time and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def undo(output: Path, shards: int) -> None:
    """Remove the last commits, as if the run had been killed before them."""
    (output / "_SUCCESS").unlink()
    for path in sorted(output.glob("_commits/*.json"))[-shards:]:
        (output / json.loads(path.read_text())["part"]).unlink()
        path.unlink()


def test_an_estimate_of_a_new_job_writes_nothing_to_its_output(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    estimate = estimate_job(job(scenes, tmp_path / "kept" / "out"))
    assert everything(tmp_path / "kept") == {}
    assert (estimate.rows, estimate.shards, estimate.done_rows, estimate.left_rows) == (ROWS, 5, 0, ROWS)
    assert estimate.images == ROWS - FAILED
    assert 0 < estimate.startup_seconds < estimate.low <= estimate.seconds <= estimate.high
    assert estimate.memory["peak_rss_mib"] > 50
    assert (estimate.problems, estimate.exit_code) == ((), 0)


def test_the_estimated_size_is_that_of_the_parts_of_the_run(scenes: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        output = {"dir": str(tmp_path / dtype), "dtype": dtype}
        config = job(scenes, tmp_path / dtype, output=output)
        expected = estimate_job(config).output_bytes
        run_job(config)
        written = sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.parquet"))
        assert expected == pytest.approx(written, rel=0.15)


def test_a_half_done_dataset_is_left_as_it_is_and_only_the_rest_is_estimated(scenes: Path, tmp_path: Path) -> None:
    config = job(scenes, tmp_path / "out")
    run_job(config)
    undo(tmp_path / "out", 2)
    before = everything(tmp_path)
    estimate = estimate_job(config)
    assert everything(tmp_path) == before
    assert (estimate.done_shards, estimate.done_rows, estimate.left_shards, estimate.left_rows) == (3, 72, 2, 48)
    assert estimate.sample["rows"] == 48
    assert estimate.done_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert "72 in 3 shards are done already, 48 are left" in next(lines(estimate))
    assert run_job(config).rows == estimate.left_rows


def test_a_damaged_part_counts_as_not_done_and_stays_where_it_is(scenes: Path, tmp_path: Path) -> None:
    config = job(scenes, tmp_path / "out")
    run_job(config)
    part = min((tmp_path / "out").glob("part-00001-*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    before = everything(tmp_path)
    estimate = estimate_job(config)
    assert everything(tmp_path) == before
    assert (estimate.damaged_shards, estimate.left_rows) == (1, 24)
    assert "1 shard must be done again" in next(lines(estimate))


def test_of_a_finished_dataset_nothing_is_left_to_do(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = job(scenes, tmp_path / "out")
    run_job(config)
    before = everything(tmp_path)
    capfd.readouterr()
    estimate = estimate_job(config)
    assert everything(tmp_path) == before
    assert (estimate.left_rows, estimate.output_bytes, estimate.exit_code) == (0, 0, 0)
    assert estimate.seconds == estimate.startup_seconds
    assert "nothing to do" in capfd.readouterr().err


def test_a_store_gets_nothing_and_its_free_space_is_unknown(scenes: Path) -> None:
    fs = fsspec.filesystem("memory")
    estimate = estimate_job(job(scenes, Path("unused"), output={"dir": "memory://estimate/out"}))
    assert fs.find("/estimate") == []
    assert estimate.free_bytes is None
    assert estimate.left_rows == ROWS
    assert any("free space of the store is not known" in line for line in lines(estimate))


def test_an_output_of_another_dataset_is_refused_as_a_run_is(scenes: Path, tmp_path: Path) -> None:
    config = job(scenes, tmp_path / "out")
    run_job(config)
    before = everything(tmp_path)
    other = replace(config, output=replace(config.output, dtype="float16"))
    with pytest.raises(PlanMismatch, match="dtype"):
        estimate_job(other)
    assert everything(tmp_path) == before


def test_one_part_of_a_job_is_estimated_alone(scenes: Path, tmp_path: Path) -> None:
    estimate = estimate_job(job(scenes, tmp_path / "out", cluster={"part": "2/3"}))
    # Shards 1 and 4 of five.
    assert (estimate.rows, estimate.left_shards, estimate.left_rows) == (ROWS, 2, 48)


def test_bad_images_are_counted_and_too_many_of_them_end_with_3(tmp_path: Path) -> None:
    damaged = {row: b"no picture" for row in range(0, 60, 3)}
    manifest = scenes_manifest(tmp_path / "m.parquet", 60, damaged=damaged)
    config = job(manifest, tmp_path / "out", errors={"max_fraction": 0.2})
    estimate = estimate_job(config)
    assert estimate.failed == pytest.approx(1 / 3)
    assert estimate.images == 40
    assert any("such as: " in line and "20 of 60 rows" in line for line in lines(estimate))
    assert estimate.exit_code == 3
    assert "about 33.3% of the rows are expected to fail" in estimate.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_bad_images_alone_is_estimated_too(tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 48, damaged=dict.fromkeys(range(48), b"no picture"))
    estimate = estimate_job(job(manifest, tmp_path / "out", errors={"max_fraction": 1.0}))
    assert (estimate.failed, estimate.images, estimate.bound) == (1.0, 0, "nothing")
    assert list(lines(estimate))


def test_a_disk_that_is_too_small_is_reported_with_both_sizes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extrapolate, "free_bytes", lambda place: 1000)
    estimate = estimate_job(job(scenes, tmp_path / "out"))
    assert estimate.exit_code == 2
    assert "MB are to be written and 0.0 MB are free; free some space" in estimate.problems[0]


def test_an_output_that_another_run_holds_is_reported_and_estimated(scenes: Path, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "out"))
    with lease.take(storage, seconds=60):
        estimate = estimate_job(job(scenes, tmp_path / "out"))
    assert estimate.exit_code == 75
    assert "is held by" in estimate.problems[0]
    assert estimate.left_rows == ROWS


def test_the_demo_renders_nothing_where_its_scenes_would_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.job.estimate.sample.TRIAL", 16)
    monkeypatch.setattr("pipeline.job.estimate.sample.GATES", 4)
    config = job(Path("unused"), tmp_path / "work" / "out")
    manifest = replace(Config().manifest, demo_scenes=40)
    estimate = estimate_job(replace(config, manifest=manifest))
    assert not (tmp_path / "work").exists()
    assert (estimate.rows, estimate.left_rows) == (40, 40)
    assert estimate.failed == 0
    assert estimate.scenes_seconds > 0
    assert any("the scenes must be rendered before that" in line for line in lines(estimate))


def test_scenes_that_are_gone_are_not_rendered_for_an_estimate(tmp_path: Path) -> None:
    config = replace(job(Path("unused"), tmp_path / "out"), manifest=replace(Config().manifest, demo_scenes=8))
    run_job(config)
    assert estimate_job(config).left_rows == 0
    demo.manifest_in(tmp_path / "scenes", 8).unlink()
    with pytest.raises(ManifestError, match=r"the scenes of .* are gone"):
        estimate_job(config)


@pytest.mark.slow
def test_a_trial_ends_at_its_limits(scenes: Path, tmp_path: Path) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 600, damaged={})
    config = job(manifest, tmp_path / "out", backend={"device": "cpu", "streams": 1}, loader={"batch_size": 4})
    estimate = estimate_job(config, limits=Limits(warm_seconds=0, seconds=0))
    assert 4 <= estimate.sample["batches"] < 40
    assert estimate.images == 600
    assert estimate.low < estimate.seconds < estimate.high


class SlowEncoder(StubEncoder):
    """Takes 50 ms for a batch, full or not."""

    dim = 128

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return torch.nn.functional.pad(super().encode(pixels), (0, 124))


@pytest.mark.parametrize("shard_rows", [20, 400])
def test_the_time_follows_from_the_batches_of_which_some_are_padded(tmp_path: Path, shard_rows: int) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 400, damaged={})
    groups = {"manifest": {"shard_rows": shard_rows}, "backend": {"streams": 1}}
    with stub_backend(SlowEncoder):
        config = job(manifest, tmp_path / "out", **groups)
        estimate = estimate_job(config, limits=Limits(warm_seconds=0.2, seconds=0.5))
    batches = 400 // shard_rows * -(-shard_rows // 8)
    assert estimate.sample["batches"] < batches
    # A busy machine only makes it longer.
    assert 0.9 * 0.05 * batches < estimate.seconds - estimate.startup_seconds < 2.5 * 0.05 * batches
    assert estimate.bound == "encoding" or estimate.startup_seconds > estimate.seconds / 2


@pytest.mark.slow
def test_the_command_prints_json_and_exits_with_the_code_of_the_run(scenes: Path, tmp_path: Path) -> None:
    config = job(scenes, tmp_path / "out")
    given = [*overrides_of(config), "run.dry=true", "loader.isolation=none"]
    child = forks().start("tests.forks:run_command", *given, "run.json=true")
    assert child.wait() == 0, child.said()
    text = child.said()
    printed = json.loads(text[text.index("{\n") :])
    assert printed["left_rows"] == ROWS
    assert {*printed} == {*asdict(Estimate("", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))}
    child = forks().start("tests.forks:run_command", *given, "errors.max_fraction=0")
    assert child.wait() == 3, child.said()
    assert "time      about" in child.said()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_signal_during_an_estimate_leaves_nothing(scenes: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    given = [*overrides_of(job(scenes, tmp_path / "out")), "run.dry=true"]
    child = forks().start(
        "tests.forks:run_command", *given, failpoints="encode=delay:1@2+", environment={"TMPDIR": str(temporary)}
    )
    end = time.monotonic() + 60
    while not list(temporary.glob("clip-pipeline-*/trial")) and time.monotonic() < end:
        assert child.alive(0.02), child.said()
    child.send(signal.SIGINT)
    assert child.wait(60) == 75, child.said()
    assert "Traceback" not in child.said()
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "out").exists()
    assert forks().strays() == []


def test_the_group_run_is_no_part_of_a_plan(tmp_path: Path) -> None:
    config = job(tmp_path / "m.parquet", tmp_path / "out", run={"dry": True})
    assert "run" not in recipe_of(config)
    assert config_of(recipe_of(config), str(tmp_path)).run.dry is False


def test_json_without_dry_is_refused() -> None:
    problems = check(replace(Config(), run=replace(Config().run, json=True)))
    assert [problem.key for problem in problems] == ["run.json"]


def test_other_commands_than_the_job_refuse_run_dry() -> None:
    with pytest.raises(ConfigError, match=r"run\.dry = True: is for python -m pipeline\.run only"):
        compose_config(["run.dry=true"])


def manifest_of(*groups: int, kind: str = "path") -> Manifest:
    files = (ManifestFile(url="m.parquet", row_groups=groups, size=1, digest=""),)
    return Manifest(files, pa.schema([("id", pa.string())]), id="id", image="path", image_kind=kind, root="/")


def rows_of(runs: list[Piece]) -> list[tuple[int, int, int]]:
    return [(run.file, run.row_group, row) for run in runs for row in range(run.start, run.stop)]


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_a_sample_of_a_small_job_is_all_of_it_each_row_once(kind: str) -> None:
    manifest = manifest_of(100, 7, 33, kind=kind)
    runs = spread(manifest, list(cut(manifest, 24)), rows=8)
    assert sorted(rows_of(runs)) == [(0, group, row) for group, n in enumerate((100, 7, 33)) for row in range(n)]
    shards = list(in_shards(runs, first=16, rows=24))
    assert [shard.rows for shard in shards] == [16, 24, 24, 24, 24, 24, 4]
    assert sorted(rows_of([piece for shard in shards for piece in shard.pieces])) == sorted(rows_of(runs))


def test_the_first_rows_of_a_sample_lie_all_over_the_manifest() -> None:
    manifest = manifest_of(*[1000] * 100)
    runs = spread(manifest, list(cut(manifest, 500)), rows=50)
    first = {run.row_group // 10 for run in runs[:20]}
    assert first == set(range(10))


def test_rows_far_within_a_row_group_come_last_above_all_where_it_holds_the_images() -> None:
    for kind, depth in (("bytes", 50), ("path", DEPTH)):
        manifest = manifest_of(*[2 * DEPTH] * 4, kind=kind)
        runs = spread(manifest, list(cut(manifest, 4096)), rows=50)
        assert {run.row_group for run in runs[:8]} == {0, 1, 2, 3}
        depths = [run.start // depth for run in runs]
        assert depths == sorted(depths)


def test_an_interval_holds_the_share_and_narrows_with_the_rows() -> None:
    assert extrapolate.failing(0, 1000)[0] == 0
    assert 0 < extrapolate.failing(0, 1000)[1] < 0.005
    low, high = extrapolate.failing(20, 1000)
    assert 0.01 < low < 0.02 < high < 0.035
    assert extrapolate.failing(0, 0) == (0.0, 1.0)


def test_processes_on_the_same_cores_gain_no_more_than_the_cores_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.job.estimate.scaling.cores", lambda: 16)
    gpus = Processes(4, gain=4)
    assert gpus.rate(1000, core_seconds=0.001) == 4000
    assert gpus.rate(1000, core_seconds=0.008) == 2000
    assert gpus.rate(1000, core_seconds=0.08) == 1000
    assert Processes(2).rate(1000, core_seconds=0.001) == 1000
    assert Processes(8, gain=8, shared=False).rate(1000, core_seconds=0.016) == 8000


def test_every_cluster_has_its_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str, **values: Any) -> Processes:
        return processes_of(replace(Config(), cluster=replace(Config().cluster, name=name, **values)))

    assert of("inline").words == ""
    assert of("local").count == 2
    assert of("address", address="tcp://10.0.0.1:1").count is None
    assert of("slurm", workers=8).gain == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert of("cuda").count == 3
    with pytest.raises(ClusterUnavailable, match="4 GPUs are asked for, and 3"):
        of("cuda", workers=4)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (64, "64 s"), (192, "3 min 12 s"), (1500, "25 min"), (9000, "2.5 h"), (400_000, "4.6 days")],
)
def test_times_are_written_with_their_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_the_log_of_an_estimate_ends_with_it(scenes: Path, tmp_path: Path) -> None:
    handlers = list(logging.getLogger("pipeline").handlers)
    estimate_job(job(scenes, tmp_path / "out"))
    assert logging.getLogger("pipeline").handlers == handlers
