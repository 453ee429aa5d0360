"""Gates that look at the first batch of a job: it comes before them, and nothing is written before they are passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends import parity
from pipeline.backends.base import ImageEncoder
from pipeline.backends.parity import AGAIN, FILE
from pipeline.config.schema import Config
from pipeline.core.errors import ParityError
from pipeline.core.records import Sample
from pipeline.core.run_report import RunReport
from pipeline.engine.engine import Engine
from pipeline.engine.prepare import job_of, prepare
from pipeline.engine.sample import FirstBatch, first_images
from pipeline.job.cluster.dask_worker import WorkerState
from pipeline.job.cluster.job_spec import JobSpec
from pipeline.job.main import run_job
from pipeline.manifest.manifest import open_manifest
from pipeline.manifest.shards import cut
from pipeline.models.checkpoint import Checkpoint
from pipeline.storage.factory import open_storage
from tests.crashes import at
from tests.forks import forks
from tests.jobs import config_for, content, scenes_manifest, stub_backend
from tests.test_proofs import BATCH, BROKEN, Healthy, Wrapped, opened

# Three batches of 32; the first one of a shard without a gap at its end would be encoded twice.
ROWS = 90


class Flexible(Healthy):
    """A backend that is right; ``events`` are its batches, and the batches of fp32."""

    flexible = True
    events: list[tuple[str, int]]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.events.append(("backend", len(pixels)))
        return super().encode(pixels)


class Static(Flexible):
    flexible = False


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Batches in the order in which they were begun."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(Flexible, "events", found, raising=False)
    real = parity.reference

    def reference(*arguments: Any, **options: Any) -> ImageEncoder:
        found.append(("fp32", options["batch_size"]))
        return real(*arguments, **options)

    monkeypatch.setattr(parity, "reference", reference)
    return found


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one row group."""
    return scenes_manifest(tmp_path_factory.mktemp("first") / "m.parquet", ROWS, group=1000)


def job(manifest: Path, folder: Path, name: str = "out", /, **groups: dict[str, Any]) -> Config:
    backend = {"artifacts": str(folder / "store"), "streams": 1, **groups.pop("backend", {})}
    shards = {"shard_rows": 100, **groups.pop("manifest", {})}
    return config_for(manifest, folder / name, backend=backend, loader={"batch_size": BATCH}, manifest=shards, **groups)


def run(backend: type[Healthy], config: Config) -> RunReport:
    with stub_backend(backend):
        return run_job(config)


def test_the_first_batch_comes_before_fp32_and_its_embeddings_are_kept(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    report = run(Flexible, job(manifest, tmp_path, parity={"images": 16, "fewest": 16}))
    assert report.parity is not None
    assert report.parity.images == 16
    assert report.parity.lowest_cosine > 0.999999
    # Then every place of a batch is compared, as there is time for that.
    assert events[:2] == [("backend", BATCH), ("fp32", 16)]
    assert [size for name, size in events if name == "backend"] == [BATCH] * 4
    # Spread over the first batch.
    first = [f"scene/{row:04d}.jpg" for row in range(34) if row not in (3, 20)]
    assert {id for id, _ in report.parity.worst} <= set(first[::2])


@pytest.mark.parametrize("backend", [Flexible, Static])
def test_what_was_proved_before_takes_no_batch_of_its_own(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]], backend: type[Healthy]
) -> None:
    run(backend, job(manifest, tmp_path, "one"))
    events.clear()
    # Other labels would be another proof, and another layout is another dataset.
    report = run(backend, job(manifest, tmp_path, "two", output={"dtype": "float32"}))
    assert report.parity is not None
    assert report.parity.images == AGAIN
    assert report.parity.remembered is not None
    assert events == [("backend", BATCH), ("fp32", AGAIN), *[("backend", BATCH)] * 2]


def test_of_several_row_groups_the_images_are_drawn_all_over_the_manifest(
    tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", ROWS, group=24)
    report = run(Flexible, job(manifest, tmp_path, parity={"images": 4, "fewest": 4}))
    # Four were read elsewhere, and embedded for the comparison.
    assert events[:3] == [("backend", BATCH), ("fp32", 4), ("backend", 4)]
    assert report.parity is not None
    assert {id for id, _ in report.parity.worst} == {f"scene/{row:04d}.jpg" for row in (0, 24, 48, 72)}


def test_a_gate_that_asks_for_more_than_a_batch_has_draws_them(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    report = run(Flexible, job(manifest, tmp_path, parity={"images": 40, "fewest": 40}))
    assert report.parity is not None
    assert report.parity.images == 40
    assert events[:3] == [("backend", BATCH), ("fp32", 16), ("backend", BATCH)]


def test_a_job_of_one_batch_is_compared_as_a_whole(tmp_path: Path, events: list[tuple[str, int]]) -> None:
    manifest = scenes_manifest(tmp_path / "m.parquet", 24, group=1000)
    report = run(Flexible, job(manifest, tmp_path))
    assert report.parity is not None
    assert report.parity.images == 22
    # All that the manifest has, although 64 are asked for.
    assert events == [("backend", 24), ("fp32", 16), ("fp32", 16), ("backend", 24)]


def test_the_gate_of_the_decoder_takes_pixels_and_embeddings_of_the_first_batch(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, dtype in (("one", "float16"), ("two", "float32")):
        events.clear()
        config = job(
            manifest, tmp_path, name, images={"decoder": "fast"}, output={"dtype": dtype}, parity={"images": BATCH}
        )
        monkeypatch.setattr("pipeline.engine.engine.draw_sample", lambda *_: pytest.fail("drawn"))
        report = run(Flexible, config)
    assert report.decoder_parity is not None
    assert report.decoder_parity.screened == 32
    assert 0.999 < report.decoder_parity.lowest_cosine < 1
    # The eight that are furthest apart, by the decoder exact.
    assert events[:3] == [("backend", BATCH), ("fp32", AGAIN), ("backend", 8)]


def test_a_decoder_that_is_too_far_leaves_nothing(manifest: Path, tmp_path: Path) -> None:
    limits = {"decoder": {"fast": 1.0}}
    with pytest.raises(ParityError, match=r"fast is too far from exact over 8 images.*scene/") as caught:
        run(Flexible, job(manifest, tmp_path, images={"decoder": "fast"}, parity=limits))
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.log"]


def test_a_job_without_a_single_good_image_is_compared_on_scenes(tmp_path: Path) -> None:
    damaged = dict.fromkeys(range(8), b"no picture at all")
    manifest = scenes_manifest(tmp_path / "m.parquet", 8, damaged=damaged, group=1000)
    report = run(Flexible, job(manifest, tmp_path, errors={"max_fraction": 1.0}))
    assert report.parity is not None
    assert "compared on rendered scenes" in (tmp_path / "out" / "_run.log").read_text()
    assert report.counts["ok"] == 0


def test_of_an_encoder_of_one_shape_both_gates_take_fp32_alone(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]]
) -> None:
    for name, dtype in (("one", "float16"), ("two", "float32")):
        events.clear()
        groups: dict[str, dict[str, Any]] = {"images": {"decoder": "fast"}, "output": {"dtype": dtype}}
        report = run(Static, job(manifest, tmp_path, name, parity={"images": BATCH}, **groups))
    assert events[0] == ("backend", BATCH)
    assert sorted(events[1:3]) == [("fp32", AGAIN), ("fp32", 16)]
    assert events[3:] == [("backend", BATCH)] * 2
    assert report.decoder_parity is not None
    assert 0.999 < report.decoder_parity.lowest_cosine < 1


# Backends that are broken


def spoiled(broken: Callable[..., Wrapped], demo: Checkpoint, pictures: Sample) -> Any:
    return lambda batch_size: broken(demo, pictures)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("proved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_broken_backend_ends_the_job_before_anything_is_written(
    manifest: Path, tmp_path: Path, demo: Checkpoint, pictures: Sample, broken: Callable[..., Wrapped], proved: bool
) -> None:
    if proved:
        with stub_backend(lambda batch_size: Wrapped(opened(demo, pictures))):  # type: ignore[arg-type]
            run_job(job(manifest, tmp_path, "healthy"))
    with (
        stub_backend(spoiled(broken, demo, pictures)),
        pytest.raises(ParityError, match=r"too far from fp32 over \d+ images.*The worst by cosine: scene/") as caught,
    ):
        run_job(job(manifest, tmp_path, output={"dtype": "float32"}))
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.log"]


@pytest.mark.parametrize("streams", [1, 3])
def test_a_backend_that_breaks_with_many_streams_and_small_shards_leaves_nothing(
    manifest: Path, tmp_path: Path, streams: int
) -> None:
    class Reversed(Flexible):
        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors.flip(0)

    config = job(manifest, tmp_path, backend={"streams": streams}, manifest={"shard_rows": 8})
    with pytest.raises(ParityError):
        run(Reversed, config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.log"]


# Interruptions, resumed jobs, clusters


@pytest.mark.parametrize(
    "rule",
    [
        "encoded=kill@1",
        *(pytest.param(f"{point}=kill", marks=pytest.mark.slow) for point in ("plan.settled", "part.written")),
        pytest.param("commit.done=kill", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_killed_around_its_gates_goes_on(manifest: Path, tmp_path: Path, rule: str) -> None:
    config = job(manifest, tmp_path, backend={"precision": "bf16"})
    for failpoints, code in ((rule, -9), ("", 0)):
        child = forks().start("tests.forks:job", at(config, tmp_path / "out"), failpoints=failpoints)
        assert child.wait() == code, child.said()
        if rule == "encoded=kill@1" and code:
            assert not (tmp_path / "out" / "_plan.json").exists()
    run_job(config.changed({"output.dir": str(tmp_path / "unbroken")}))
    found, wanted = content(tmp_path / "out"), content(tmp_path / "unbroken")
    # Compared again by the second run, on eight images.
    assert set(found) == set(wanted)
    assert all(found[name] == wanted[name] for name in found if name != FILE)


def test_a_resumed_job_does_not_compare_again(manifest: Path, tmp_path: Path, events: list[tuple[str, int]]) -> None:
    config = job(manifest, tmp_path, manifest={"shard_rows": 40})
    first = run(Flexible, config)
    (tmp_path / "out" / "_commits" / "00001.json").unlink()
    events.clear()
    assert run(Flexible, config).parity == first.parity
    assert [name for name, _ in events] == ["backend"] * 2


def test_what_other_hardware_resumes_is_compared_before_its_first_commit(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(manifest, tmp_path, manifest={"shard_rows": 40})
    run(Flexible, config)
    for name in ("_commits/00002.json", "_SUCCESS"):
        (tmp_path / "out" / name).unlink()
    before = content(tmp_path / "out")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})

    class Reversed(Flexible):
        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors.flip(0)

    with pytest.raises(ParityError):
        run(Reversed, config)
    assert content(tmp_path / "out") == before
    events.clear()
    run(Flexible, config)
    assert events[:2] == [("backend", BATCH), ("fp32", 16)]


def test_the_images_of_a_batch_in_the_middle_are_found_again(manifest: Path) -> None:
    config = job(manifest, Path("nowhere"))
    opened_manifest = open_manifest(config.manifest)
    shard = list(cut(opened_manifest, 24))[2]
    rows, pixels = np.array([1, 5, 23]), torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    batch = FirstBatch(shard, rows, pixels, torch.eye(3), 1.0, full=True)
    assert first_images(opened_manifest, []) is None
    found = first_images(opened_manifest, [batch])
    assert found is not None
    assert found.sample.ids == ("scene/0049.jpg", "scene/0053.jpg", "scene/0071.jpg")
    assert [str(ref.id) for ref in found.refs] == list(found.sample.ids)
    assert found.has(3)
    assert not found.has(4)
    two = first_images(opened_manifest, [replace(batch, shard=list(cut(opened_manifest, 24))[1]), batch])
    assert two is not None
    assert two.sample.ids == ("scene/0025.jpg", "scene/0029.jpg", "scene/0047.jpg", *found.sample.ids)
    assert two.has(6)


def test_batches_that_are_encoded_side_by_side_are_compared_together(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.engine.draw_sample", lambda *_: pytest.fail("drawn"))
    report = run(Flexible, job(manifest, tmp_path, backend={"streams": 2}))
    assert report.parity is not None
    assert report.parity.images == 64
    assert [name for name, _ in events[:3]] == ["backend", "backend", "fp32"]


@pytest.mark.parametrize("good", [True, False])
def test_a_worker_that_joins_compares_before_its_first_commit(
    manifest: Path, tmp_path: Path, events: list[tuple[str, int]], good: bool
) -> None:
    class Joined(Flexible):
        def spoil(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors if good else vectors.flip(0)

    config = job(manifest, tmp_path)
    storage = open_storage(config.output.dir)
    with stub_backend(Joined):
        with Engine(config) as engine:
            engine.begin(storage)
            engine.open(storage)
            prepared = prepare(engine, storage)
            work = job_of(engine, prepared)
            spec = JobSpec("token", config, engine.manifest, engine.checkpoint.fingerprint)
        assert prepared.pending
        assert events == []
        worker = WorkerState(SimpleNamespace(name="w", address="", log_event=lambda *_: None), spec)
        worker.take(work)
        [shard] = cut(work.manifest, 1000)
        done = worker.put(shard)
        if good:
            done.result(60)
        else:
            with pytest.raises(ParityError):
                done.result(60)
        worker.close()
    assert events[:2] == [("backend", BATCH), ("fp32", 16)]
    assert (tmp_path / "out" / "_commits").exists() == good
