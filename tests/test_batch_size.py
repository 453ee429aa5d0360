"""``loader.batch_size=auto``: measured once, remembered for the same model, backend and device, kept by a resume."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.artifacts import main as artifacts
from pipeline.backends import devices
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import ImageEncoder, factory
from pipeline.backends.timing import images_per_second, settle
from pipeline.config.compose import compose_config
from pipeline.config.ranges import DefaultNumber
from pipeline.config.schema import Config, LoaderConfig, ModelConfig
from pipeline.config.validate import check
from pipeline.core.errors import BackendUnavailable, ConfigError, PlanMismatch
from pipeline.dataset import plan
from pipeline.engine import batch_size
from pipeline.engine.batch_size import KIND, Benchmark, Measured, known_size, settle_batch_size
from pipeline.engine.demo.folder import rendered_sample
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.towers import Sizes
from pipeline.storage.local import LocalStorage
from tests.jobs import StubEncoder, config_for

SHARD_ROWS = 100_000
# Images/s by batch size: two sizes that gain, and one that gains less than 3 %.
RISING = {8: 40.0, 16: 48.0, 32: 50.0, 64: 50.6, 128: 90.0}


@cache
def demo() -> Checkpoint:
    return open_checkpoint(ModelConfig())


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting all that torch and transformers hold takes longer than the tests; those that need it take it back."""
    monkeypatch.setattr(devices, "gc", SimpleNamespace(collect=lambda: 0))


class Machine:
    """A device on which time passes only while it encodes; ``full`` is the first batch that it has no memory for."""

    def __init__(self, rates: dict[int, float], *, full: int | None = None, opening: float = 0.0) -> None:
        self.rates, self.full, self.opening = rates, full, opening
        self.now = 0.0
        self.opened: list[int] = []

    def clock(self) -> float:
        return self.now

    def open_at(self, size: int) -> ImageEncoder:
        self.opened.append(size)
        self.now += self.opening
        machine = self

        class Paced(StubEncoder):
            def encode(self, pixels: torch.Tensor) -> torch.Tensor:
                assert pixels.shape == (size, 3, *demo().spec.size)
                assert pixels.dtype == torch.uint8
                assert pixels.stride(1) == 1, "as the loader lays them out: [N, H, W, 3] memory"
                if machine.full is not None and size >= machine.full:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                machine.now += size / machine.rates[size]
                return super().encode(pixels)

        return Paced(size)


def auto(folder: Path, **groups: dict[str, Any]) -> Config:
    backend = {"device": "cpu", "streams": 1, "artifacts": str(folder / "store"), **groups.pop("backend", {})}
    wide = {"shard_rows": SHARD_ROWS, **groups.pop("manifest", {})}
    return config_for(
        folder / "m.parquet", folder / "out", manifest=wide, loader={"batch_size": 0}, backend=backend, **groups
    )


def settled(config: Config, machine: Machine, *, rows: int = SHARD_ROWS, **more: Any) -> int:
    storage = LocalStorage(config.output.dir)
    more = {"checkpoint": demo(), "open_at": machine.open_at, "clock": machine.clock, **more}
    return settle_batch_size(config, Benchmark(config.backend, **more), rows=rows, storage=storage)


def test_sizes_are_doubled_until_the_gain_is_small_and_the_smaller_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(RISING)
    with caplog.at_level(logging.INFO):
        assert settled(auto(tmp_path), machine) == 32
    assert machine.opened == [8, 16, 32, 64]
    said = caplog.messages[-1]
    assert said.startswith(
        f"batch size 32: 50.0 images/s (8: 40.0, 16: 48.0, 64: 50.6); remembered in {tmp_path}/store/"
    )


def test_a_size_that_is_slower_ends_the_search(tmp_path: Path) -> None:
    machine = Machine({8: 40.0, 16: 20.0})
    assert settled(auto(tmp_path), machine) == 8
    assert machine.opened == [8, 16]


def on_cuda(monkeypatch: pytest.MonkeyPatch, gibibytes: int) -> None:
    monkeypatch.setattr(batch_size, "choose_device", lambda name: torch.device("cuda"))
    facts = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


def model(size: int, patch: int, wide: int) -> Any:
    sizes = Sizes(layers=12, heads=12, width=wide // 4, widest=wide, tokens=(size // patch) ** 2 + 1)
    return SimpleNamespace(image=SimpleNamespace(sizes=sizes), spec=SimpleNamespace(size=(size, size)))


@pytest.mark.parametrize(
    ("checkpoint", "gibibytes", "size"),
    [
        pytest.param(model(224, 32, 3072), 80, 1024, id="B/32"),
        pytest.param(model(224, 14, 4096), 80, 1024, id="L/14"),
        pytest.param(model(224, 14, 4096), 24, 512, id="L/14, a small GPU"),
        pytest.param(model(384, 14, 4304), 80, 1024, id="so400m-384"),
        pytest.param(model(384, 14, 4304), 40, 512, id="so400m-384, a smaller GPU"),
        pytest.param(model(448, 14, 8192), 80, 512, id="bigG-448"),
    ],
)
def test_the_default_on_cuda_goes_by_model_and_memory(
    checkpoint: Any, gibibytes: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda(monkeypatch, gibibytes)
    machine = Machine({})
    config = auto(tmp_path).changed({"loader.batch_size": LoaderConfig.batch_size})
    assert settled(config, machine, checkpoint=checkpoint) == size
    assert settled(config, machine, checkpoint=checkpoint, rows=100) == 100
    assert settled(config.changed({"loader.batch_size": 64}), machine, checkpoint=checkpoint) == 64
    assert machine.opened == []


def test_the_default_on_a_cpu_is_64(tmp_path: Path) -> None:
    config = compose_config(["backend.device=cpu", "manifest.shard_rows=4096", f"output.dir={tmp_path / 'out'}"])
    assert settled(config, Machine({})) == 64
    for typed in ("64", "default"):
        again = compose_config([f"loader.batch_size={typed}"])
        assert again == Config()
        assert isinstance(again.loader.batch_size, DefaultNumber) == (typed == "default")
    assert isinstance(compose_config([]).loader.batch_size, DefaultNumber)


@pytest.mark.parametrize("rows", [1, 64, 511, 512, 513, 100_000])
@pytest.mark.parametrize("backend", ["torch", "torchscript"])
def test_a_default_that_was_chosen_is_an_ordinary_number(rows: int, backend: str, tmp_path: Path) -> None:
    overrides = [f"backend={backend}", "backend.device=cpu", "manifest.shard_rows=4096"]
    config = compose_config([*overrides, f"output.dir={tmp_path / 'out'}"])
    assert type(settled(config, Machine({}), rows=rows)) is int
    assert type(known_size(config, rows)) is int


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (7, 7), (32, 8), (127, 8), (128, 16), (372, 32), (511, 32), (512, 64), (10**6, 64)]
)
def test_a_small_job_on_a_cpu_has_a_batch_for_every_core(rows: int, size: int, tmp_path: Path) -> None:
    config = compose_config(["backend.device=cpu", "manifest.shard_rows=4096", f"output.dir={tmp_path / 'out'}"])
    assert settled(config, Machine({}), rows=rows) == size
    assert settled(config.changed({"loader.batch_size": 64}), Machine({}), rows=rows) == min(64, rows)
    # Compiled for each size, one size serves all jobs.
    assert settled(config.changed({"backend.compile": "default"}), Machine({}), rows=rows) == min(64, rows)


def test_a_resume_on_a_cpu_keeps_the_size_of_the_plan(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    plan.write_once(storage, plan.Plan(rows=100, shards=1, shard_rows=100, fingerprints={"batch_size": 64}, about={}))
    config = compose_config(["backend.device=cpu", "manifest.shard_rows=4096", f"output.dir={tmp_path / 'out'}"])
    assert settled(config, Machine({}), rows=100) == 64


def test_a_resume_on_cuda_keeps_the_size_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, 80)
    monkeypatch.setattr(batch_size, "_planned", lambda storage: 64)
    config = auto(tmp_path).changed({"loader.batch_size": LoaderConfig.batch_size})
    assert settled(config, Machine({})) == 64


@pytest.mark.parametrize(
    ("device", "size", "rows", "said"),
    [("cuda", 64, 5000, True), ("cuda", 256, 5000, False), ("cuda", 64, 64, False), ("cpu", 64, 5000, False)],
)
def test_a_small_batch_on_cuda_is_mentioned(
    device: str,
    size: int,
    rows: int,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batch_size, "choose_device", lambda name: torch.device(device))
    config = auto(tmp_path).changed({"loader.batch_size": size})
    assert settled(config, Machine({}), rows=rows) == size
    assert ("loader.batch_size=auto chooses between 512 and 1024" in caplog.text) == said


def test_auto_on_cuda_tries_the_sizes_that_fill_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "choose_device", lambda name: torch.device("cuda"))
    for more in ({}, {"compile": "default"}):
        config = auto(tmp_path, backend=more)
        benchmark = Benchmark(config.backend, demo(), Machine({}).open_at)
        assert benchmark.sizes(SHARD_ROWS) == [512, 1024]
        assert benchmark.sizes(700) == [512]


def test_doubling_ends_at_the_largest_size_for_the_device(tmp_path: Path) -> None:
    machine = Machine({size: float(size) for size in (8, 16, 32, 64, 128, 256)})
    assert settled(auto(tmp_path), machine) == 256


def test_where_the_memory_is_full_the_last_size_that_fitted_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(RISING, full=32)
    with caplog.at_level(logging.INFO):
        assert settled(auto(tmp_path), machine) == 16
    assert machine.opened == [8, 16, 32]
    assert "batch size 16: 48.0 images/s (8: 40.0, 32: no memory); " in caplog.messages[-1]


def test_where_not_even_the_first_size_fits_smaller_ones_are_tried(tmp_path: Path) -> None:
    machine = Machine({2: 9.0, 1: 5.0}, full=3)
    assert settled(auto(tmp_path), machine) == 2
    assert machine.opened == [8, 4, 2]


def test_a_device_without_memory_for_one_picture_is_an_error(tmp_path: Path) -> None:
    machine = Machine({}, full=1)
    with pytest.raises(BackendUnavailable, match=r"^loader\.batch_size=auto: .* a single picture"):
        settled(auto(tmp_path), machine)
    assert machine.opened == [8, 4, 2, 1]
    assert ArtifactStore(tmp_path / "store").artifacts() == []


def test_an_error_other_than_full_memory_ends_the_search(tmp_path: Path) -> None:
    def broken(size: int) -> ImageEncoder:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        settled(auto(tmp_path), Machine({}), open_at=broken)


def test_an_encoder_is_gone_before_the_next_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gc", gc)
    alive = 0

    class Counted(StubEncoder):
        def __init__(self, size: int) -> None:
            nonlocal alive
            super().__init__(size)
            # As compiled modules do, it holds itself.
            self.forward = self.encode
            alive += 1
            assert alive == 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def measure(encoder: ImageEncoder) -> float:
        if encoder.batch_size == 32:
            raise torch.OutOfMemoryError("full")
        return float(encoder.batch_size)

    assert settled(auto(tmp_path), Machine({}), open_at=Counted, rate=lambda encoder, seconds: measure(encoder)) == 16
    assert alive == 0


def test_no_size_is_begun_once_measuring_has_taken_too_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine({size: float(size) for size in (8, 16, 32, 64)}, opening=100.0)
    with caplog.at_level(logging.INFO):
        assert settled(auto(tmp_path), machine) == 16
    assert "batches of more than 16 images are not tried: measuring takes too long" in caplog.messages


def test_a_compiled_backend_is_tried_at_few_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine({size: float(size) for size in (16, 32, 64)})
    with caplog.at_level(logging.INFO):
        assert settled(auto(tmp_path, backend={"compile": "default"}), machine) == 64
    assert machine.opened == [16, 32, 64]
    assert any("compiled anew for each size" in text for text in caplog.messages)


@pytest.mark.parametrize(("rows", "shard_rows", "size", "opened"), [
    (SHARD_ROWS, 31, 16, [8, 16]), (40, SHARD_ROWS, 32, [8, 16, 32]), (15, 24, 15, []), (5, 24, 5, []),
])  # fmt: skip
def test_no_batch_is_larger_than_the_largest_shard(
    tmp_path: Path, rows: int, shard_rows: int, size: int, opened: list[int]
) -> None:
    machine = Machine({size: float(size) for size in (8, 16, 32)})
    assert settled(auto(tmp_path, manifest={"shard_rows": shard_rows}), machine, rows=rows) == size
    assert machine.opened == opened


def test_a_number_of_the_config_is_taken_as_it_is_but_for_the_largest_shard(tmp_path: Path) -> None:
    config, machine = auto(tmp_path), Machine({})
    given = dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=48))
    assert (settled(given, machine), settled(given, machine, rows=7)) == (48, 7)


def test_what_was_measured_is_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING)) == 32
    other = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(tmp_path / "other")))
    calls: list[None] = []
    machine = Machine({})
    with caplog.at_level(logging.INFO):
        assert settled(other, machine, wait=lambda: calls.append(None)) == 32
    assert (machine.opened, calls) == ([], [])
    assert caplog.messages[-1].startswith("batch size 32: 50.0 images/s (8: 40.0, 16: 48.0, 64: 50.6); remembered in ")


def test_nothing_is_measured_before_all_else_is_done(tmp_path: Path) -> None:
    machine = Machine(RISING)
    order: list[list[int]] = []
    settled(auto(tmp_path), machine, wait=lambda: order.append(list(machine.opened)))
    assert order == [[]]


def test_a_device_full_at_one_time_is_remembered_as_such(tmp_path: Path) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING, full=32)) == settled(config, Machine({})) == 16


def other_model(config: Config) -> tuple[Config, Checkpoint]:
    return config, dataclasses.replace(demo(), fingerprint={**demo().fingerprint, "weights": "others"})


def other_backend(**values: Any) -> Callable[[Config], tuple[Config, Checkpoint]]:
    return lambda config: (dataclasses.replace(config, backend=dataclasses.replace(config.backend, **values)), demo())


@pytest.mark.parametrize(
    "change",
    [
        other_model,
        other_backend(precision="bf16"),
        other_backend(name="onnx"),
        other_backend(streams=2),
        other_backend(compile="default"),
        other_backend(name="onnx_int8", quantization="static"),
    ],
    ids=["model", "precision", "backend", "streams", "compile", "quantization"],
)
def test_another_model_or_backend_is_measured_anew(
    tmp_path: Path, change: Callable[[Config], tuple[Config, Checkpoint]]
) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING)) == 32
    changed, checkpoint = change(config)
    machine = Machine({})
    assert settled(changed, machine, checkpoint=checkpoint, rate=lambda encoder, seconds: 1.0) in (8, 16)
    assert len(machine.opened) == 2


def test_another_processor_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING)) == 32
    monkeypatch.setattr(batch_size, "machine", lambda device, cores: {"processor": "another"})
    machine = Machine({8: 1.0, 16: 1.0})
    assert settled(config, machine) == 8
    assert machine.opened == [8, 16]


def test_a_resume_keeps_the_batch_size_of_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING)) == 32
    storage = LocalStorage(config.output.dir)
    plan.write_once(storage, plan.Plan(rows=5000, shards=1, shard_rows=5000, fingerprints={"batch_size": 48}, about={}))
    machine = Machine({})
    with caplog.at_level(logging.INFO):
        assert settled(config, machine) == 48
    assert machine.opened == []
    assert caplog.messages[-1] == f"batch size 48, as {config.output.dir}/_plan.json says"
    # Of another job's plan no more than fits is taken; the comparison of the plans refuses it as ever.
    assert settled(config, machine, rows=10) == 10


def test_an_output_whose_plan_cannot_be_read_is_refused(tmp_path: Path) -> None:
    config = auto(tmp_path)
    LocalStorage(config.output.dir).write("_plan.json", b'{"rows": 5')
    with pytest.raises(PlanMismatch, match=r"_plan\.json: not readable as a plan"):
        settled(config, Machine(RISING))


def torn(folder: Path) -> None:
    (folder / "card.json").write_bytes((folder / "card.json").read_bytes()[:200])


def changed_figures(folder: Path) -> None:
    (folder / "card.json").write_text((folder / "card.json").read_text().replace("50.6", "999"))


def foreign(folder: Path) -> None:
    (folder / "card.json").write_text(json.dumps({"batch_size": 4096}))


def emptied(folder: Path) -> None:
    (folder / batch_size.FILE).write_bytes(b"")


@pytest.mark.parametrize("damage", [torn, changed_figures, foreign, emptied])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    config = auto(tmp_path)
    assert settled(config, Machine(RISING)) == 32
    (artifact,) = ArtifactStore(tmp_path / "store").artifacts()
    damage(artifact.path)
    machine = Machine({8: 1.0, 16: 1.0})
    assert settled(config, machine) == 8
    assert machine.opened == [8, 16]
    assert settled(config, Machine({})) == 8


def test_a_store_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "store").write_bytes(b"a file where the folder should be")
    machine = Machine(RISING)
    with caplog.at_level(logging.INFO):
        assert settled(auto(tmp_path), machine) == 32
    assert machine.opened == [8, 16, 32, 64], "once"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(tmp_path / "store") in warning
    assert warning.endswith("; the batch size is not remembered")
    assert caplog.messages[-1].endswith("; measured again in the next job")


def test_a_disk_that_is_full_after_measuring_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *arguments: Any, **options: Any) -> int:
        raise OSError(28, "No space left on device")

    machine = Machine(RISING)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert settled(auto(tmp_path), machine) == 32
    assert machine.opened == [8, 16, 32, 64], "once"
    assert ArtifactStore(tmp_path / "store").artifacts() == []


def test_what_is_remembered_is_listed_shown_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settled(auto(tmp_path), Machine(RISING))
    store = ["--store", str(tmp_path / "store")]
    (artifact,) = ArtifactStore(tmp_path / "store").artifacts()
    assert artifacts([*store, "list"]) == 0
    assert KIND in capsys.readouterr().out
    assert artifacts([*store, "show", artifact.fingerprint[:6]]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["images_per_second"]["32"] == pytest.approx(50)
    assert artifacts([*store, "verify"]) == 0
    assert artifacts([*store, "prune", "--older-than", "0"]) == 0
    assert list((tmp_path / "store").iterdir()) == []


def test_the_smallest_size_within_three_percent_is_chosen_whatever_the_order() -> None:
    assert Measured({8: 100.0}).batch_size == 8
    assert Measured({8: 97.0, 16: 97.2, 32: 100.0}).batch_size == 16
    assert Measured({8: 97.5, 16: 97.2, 32: 100.0}).batch_size == 8


def test_times_have_settled_when_three_are_alike_or_the_limit_is_reached() -> None:
    times = iter([9.0, 5.0, 2.0, 1.0, 1.05, 1.02, 7.0])
    assert settle(lambda: next(times), limit=100) == 1.02
    assert next(times) == 7.0
    falling = iter([8.0, 4.0, 2.0, 1.0])
    assert settle(lambda: next(falling), limit=10) == 8.0
    assert next(falling) == 2.0


def test_the_pace_counts_the_batches_of_all_streams() -> None:
    machine = Machine({8: 40.0})
    encoder = machine.open_at(8)
    size = demo().spec.size
    assert images_per_second(encoder, size=size, seconds=2.0, clock=machine.clock) == pytest.approx(40)
    encoder.streams = 3
    assert images_per_second(encoder, size=size, seconds=2.0, clock=machine.clock) == pytest.approx(40)


def test_measuring_leaves_the_random_numbers_of_the_job_alone() -> None:
    before = torch.get_rng_state()
    images_per_second(
        Machine({8: 40.0}).open_at(8), size=demo().spec.size, seconds=0.0, clock=iter(range(100)).__next__
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_may_be_typed_and_stand_in_a_file(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from pipeline.config.compose import register, to_config

    assert compose_config(["loader.batch_size=auto"]).loader.batch_size == 0
    assert compose_config(["loader.batch_size='auto'"]).loader.batch_size == 0
    assert check(compose_config(["loader.batch_size=auto"])) == []
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n- schema\n- _self_\nmodel: {name: demo}\nloader: {batch_size: auto}"
    )
    register()
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
        composed = compose("mine")
    assert composed.loader.batch_size == "auto", "as --cfg job prints it"
    loader = to_config(composed).loader
    assert loader == dataclasses.replace(Config().loader, batch_size=0)
    (tmp_path / "mine.yaml").write_text("model: {name: demo}\nloader: {batch_size: many}")
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
        composed = compose("mine")
    with pytest.raises(
        ConfigError, match=r"loader\.batch_size = 'many': must be a whole number from 1 to 65536, or auto"
    ):
        to_config(composed)


@pytest.mark.parametrize("typed", ["Auto", "many", "0", "-1", "65537", "1.5", "true", "null", "'1.5'", "[auto]"])
def test_any_other_word_or_number_is_refused_with_what_is_allowed(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([f"loader.batch_size={typed}"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.allowed) == ("loader.batch_size", "must be a whole number from 1 to 65536, or auto")


@pytest.mark.parametrize("typed", ["48", "'48'", "${oc.env:BATCH}"])
def test_a_number_arrives_as_a_number(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "48")
    assert compose_config([f"loader.batch_size={typed}"]).loader.batch_size == 48


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_demo_model_is_measured_and_remembered(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_size, "SECONDS", {device: 0.05})
    monkeypatch.setattr(devices, "gc", gc)
    config = auto(tmp_path, backend={"device": device, "streams": 0, "precision": "fp32"})
    opened: list[int] = []

    def open_at(size: int) -> ImageEncoder:
        opened.append(size)
        sample = rendered_sample(demo().spec, 4)
        return factory("torch")(demo(), config.backend, batch_size=size, sample=lambda: sample, limits=config.parity)

    def find() -> int:
        storage = LocalStorage(config.output.dir)
        return settle_batch_size(config, Benchmark(config.backend, demo(), open_at), rows=SHARD_ROWS, storage=storage)

    with caplog.at_level(logging.INFO):
        size = find()
    assert size in opened
    assert opened == [8 * 2**i if device == "cpu" else 512 * 2**i for i in range(len(opened))]
    found = list(opened)
    assert find() == size
    assert opened == found
