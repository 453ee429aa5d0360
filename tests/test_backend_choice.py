"""``backend=auto``: the fastest backend within the limits of parity, measured once, remembered, kept by a dataset."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends import candidates as module
from pipeline.backends.artifacts.exports import GraphOptions, graph_recipe
from pipeline.backends.artifacts.store import ArtifactStore
from pipeline.backends.base import ImageEncoder
from pipeline.backends.candidates import (
    Candidate,
    Rate,
    candidates,
    computes_bf16,
    fallback,
    fastest,
    seconds_per_image,
)
from pipeline.backends.rates import KIND, Rates
from pipeline.backends.tensorrt import ENGINES
from pipeline.backends.torch import open_encoder
from pipeline.bench import pipeline as bench_pipeline
from pipeline.config.schema import BackendConfig, Config, ParityConfig
from pipeline.config.validate import check
from pipeline.core.errors import BackendUnavailable, ParityError
from pipeline.core.records import Sample
from pipeline.dataset.saved_config import with_backend_of
from pipeline.doctor.batch import _with_backend
from pipeline.doctor.extras import needed_by
from pipeline.engine import backend_choice
from pipeline.engine.backend_choice import Trial, settle_backend
from pipeline.engine.demo.folder import rendered_sample
from pipeline.engine.engine import Engine
from pipeline.job.main import run_job
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from tests.jobs import config_for, content, scenes_manifest
from tests.nights import Collection, night
from tests.test_folder_job import Album

CPU = torch.device("cpu")
FP32 = Candidate(BackendConfig(precision="fp32"), 1.0)
BF16 = Candidate(BackendConfig(precision="bf16"), 2.0)
INT8 = Candidate(BackendConfig(name="onnx_int8", precision="int8"), 2.0)
COMPILED = Candidate(BackendConfig(precision="fp32", compile="default"), 1.0, making=40.0)


@pytest.fixture(scope="module")
def pictures(demo: Checkpoint) -> Sample:
    return rendered_sample(demo.spec, 16)


@pytest.fixture(autouse=True)
def _store_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def auto(**backend: Any) -> Config:
    named = BackendConfig(name="auto", device="cpu", streams=1, **backend)
    return Config().changed({"backend": named, "manifest.shard_rows": 4096})


def known_are(monkeypatch: pytest.MonkeyPatch, *known: Candidate) -> None:
    """Let these be the candidates, none of which needs a package."""
    own = [replace(each, backend=replace(each.backend, device="cpu", streams=1)) for each in known]
    monkeypatch.setattr(backend_choice, "candidates", lambda config, checkpoint, device: own)
    monkeypatch.setattr(Candidate, "missing", "")


class Machine:
    """Opens the demo's fp32 tower as any backend, and says the images/s of each that it has in ``rates``."""

    def __init__(self, checkpoint: Checkpoint, pictures: Sample, **rates: float) -> None:
        self.checkpoint, self.pictures, self.rates = checkpoint, pictures, rates
        self.opened: list[str] = []
        self.spoiled: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.errors: dict[str, Exception] = {}

    def open(self, size: int, backend: BackendConfig) -> ImageEncoder:
        key = f"{backend.name}_{backend.precision}"
        self.opened.append(key)
        if key in self.errors:
            raise self.errors[key]
        plain = replace(backend, name="torch", precision="fp32")
        inner = open_encoder(
            self.checkpoint, plain, batch_size=size, sample=lambda: self.pictures, limits=ParityConfig()
        )
        if spoil := self.spoiled.get(key):
            encode = inner.encode
            inner.encode = lambda pixels: spoil(encode(pixels))  # type: ignore[method-assign]
        inner.name, inner.precision = backend.name, backend.precision
        return inner

    def rate(self, encoder: ImageEncoder, **_: object) -> float:
        return self.rates[f"{encoder.name}_{encoder.precision}"]

    def trial(self, rows: int = 1_000_000, *, whole: bool = False) -> Trial:
        return Trial(self.open, self.pictures.spread, lambda: None, rows, whole)


@pytest.fixture
def machine(demo: Checkpoint, pictures: Sample, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(demo, pictures, torch_fp32=200.0, torch_bf16=400.0, onnx_int8_int8=800.0)
    monkeypatch.setattr(backend_choice, "images_per_second", made.rate)
    return made


# The choice


def test_the_fastest_within_its_limits_is_taken_and_of_equal_ones_the_simpler() -> None:
    rates = {FP32: Rate(10, 0.1), BF16: Rate(20, 0.1), INT8: Rate(50, 1.0, "parity.lowest_cosine.int8 wants 0.98")}
    assert fastest(rates, None) == BF16
    assert fastest({**rates, INT8: Rate(50, 1.0)}, None) == INT8
    assert fastest({**rates, INT8: Rate(20.4, 1.0)}, None) == BF16
    assert fastest({FP32: Rate(0.0, 0.0, "missed")}, 100) is None


def test_what_takes_long_to_open_is_for_long_jobs() -> None:
    rates = {BF16: Rate(20, 0.1), COMPILED: Rate(40, 15.0)}
    assert fastest(rates, 372) == BF16
    assert fastest(rates, 3_720) == COMPILED


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_a_candidate_where_the_processor_has_it(
    able: bool, demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "computes_bf16", lambda: able)
    known = candidates(BackendConfig(device="cpu"), demo, CPU)
    assert known[0].reference
    assert [str(each) for each in known[:2]] == ["torch fp32", "torch bf16" if able else "onnx fp32"]
    assert str(known[-1]) == f"torch {'bf16' if able else 'fp32'} compiled"
    assert str(fallback(known)) == f"torch {'bf16' if able else 'fp32'}"


@pytest.mark.parametrize(
    ("able", "native"), [({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)]
)
def test_native_bf16_is_what_the_processor_says(
    able: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert computes_bf16() is native


@pytest.mark.parametrize(("capability", "fp8"), [((9, 0), ["torch_fp8"]), ((8, 0), [])])
def test_on_cuda_fp8_needs_hopper_and_tensorrt_an_engine_of_the_model(
    capability: tuple[int, int], fp8: list[str], demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config, cuda = BackendConfig(device="cuda"), torch.device("cuda", 0)
    wanted = ["torch fp32", "torch bf16", "torch bf16 compiled", *fp8]
    known = candidates(config, demo, cuda)
    assert [str(each) for each in known] == wanted
    assert str(fallback(known)) == "torch bf16"
    graph = graph_recipe(demo, GraphOptions(precision="fp16", fused=False))
    (ArtifactStore(None).root / ENGINES / graph.fingerprint).mkdir(parents=True)
    assert [str(each) for each in candidates(config, demo, cuda)] == [*wanted, "tensorrt"]


def test_time_is_guessed_from_the_size_of_the_model(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 2)
    one = seconds_per_image(demo, CPU)
    assert 1e-5 < one < 0.01
    monkeypatch.setattr(module, "cores", lambda: 4)
    assert seconds_per_image(demo, CPU) == pytest.approx(one / 2)


# Measuring in proportion


def test_candidates_are_measured_once_and_the_fastest_is_taken(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known_are(monkeypatch, FP32, BF16, INT8)
    with caplog.at_level(logging.INFO):
        chosen = settle_backend(auto(), demo, trial=machine.trial())
    assert (chosen.backend.name, chosen.backend.precision) == ("onnx_int8", "int8")
    assert machine.opened == ["torch_fp32", "torch_bf16", "onnx_int8_int8"]
    said = caplog.messages[-1]
    assert said == "backend=auto: onnx_int8 with 800.0 images/s; torch fp32 200.0; torch bf16 400.0"
    # Remembered, for whoever asks.
    for trial in (machine.trial(), machine.trial(32), None):
        assert settle_backend(auto(), demo, trial=trial) == chosen
    assert len(machine.opened) == 3
    assert [artifact.card["kind"] for artifact in ArtifactStore(None).artifacts()] == [KIND] * 3


def test_a_small_job_measures_nothing_and_says_how_to(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known_are(monkeypatch, FP32, BF16, INT8)
    # As ViT-B/32 on two cores: 16 images of the comparison and 64 of the timing take six seconds.
    monkeypatch.setattr(backend_choice, "seconds_per_image", lambda checkpoint, device: 0.075)
    with caplog.at_level(logging.INFO):
        chosen = settle_backend(auto(), demo, trial=machine.trial(372))
    assert machine.opened == []
    assert chosen.backend.precision == "bf16"
    assert "torch bf16, for nothing is measured of this model on this machine" in caplog.messages[-1]
    assert "torch fp32 is not measured, which takes about 6 s" in caplog.messages[-1]
    assert "run.dry=true measures all" in caplog.messages[-1]
    # An estimate measures all the same, and the job finds it.
    settle_backend(auto(), demo, trial=machine.trial(372, whole=True))
    assert settle_backend(auto(), demo, trial=machine.trial(372)).backend.name == "onnx_int8"


def test_what_takes_long_to_make_is_measured_by_a_job_that_is_long_enough(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_are(monkeypatch, FP32, replace(INT8, making=40.0))
    assert settle_backend(auto(), demo, trial=machine.trial(10_000)).backend.name == "torch"
    assert machine.opened == ["torch_fp32"]
    # 3 % of more than half an hour.
    assert settle_backend(auto(), demo, trial=machine.trial(900_000)).backend.name == "onnx_int8"
    assert machine.opened == ["torch_fp32", "onnx_int8_int8"]


def test_what_misses_its_limit_is_not_taken_and_the_log_says_how_fast_it_was(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known_are(monkeypatch, FP32, BF16, INT8)
    machine.spoiled["onnx_int8_int8"] = lambda vectors: vectors.roll(1, dims=1)
    with caplog.at_level(logging.INFO):
        chosen = settle_backend(auto(), demo, trial=machine.trial())
    assert chosen.backend.precision == "bf16"
    assert (
        "onnx_int8 is 2.0 times as fast, and is too far from fp32: parity.lowest_cosine.int8 wants 0.98, measured "
        in caplog.messages[-1]
    )
    # With another limit it is another question.
    none = dict.fromkeys(ParityConfig().lowest_cosine, -1.0)
    wide = auto().changed({"parity": ParityConfig(lowest_cosine=none, mean_cosine=none, top1=none)})
    assert settle_backend(wide, demo, trial=machine.trial()).backend.name == "onnx_int8"


def test_what_cannot_be_opened_is_left_out_with_the_reason(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known_are(monkeypatch, FP32, BF16, INT8)
    machine.errors = {
        "torch_bf16": torch.OutOfMemoryError("CUDA out of memory"),
        "onnx_int8_int8": BackendUnavailable("the provider's libraries are missing"),
    }
    with caplog.at_level(logging.INFO):
        assert settle_backend(auto(), demo, trial=machine.trial()).backend.precision == "fp32"
    assert "onnx_int8 cannot be measured: the provider's libraries are missing" in caplog.messages[-1]
    assert "torch bf16 cannot be measured: the device has no memory for batches of 16 images" in caplog.messages[-1]
    machine.errors = {"torch_bf16": ValueError("a bug")}
    with pytest.raises(ValueError, match="a bug"):
        settle_backend(auto(), demo, trial=machine.trial())


def test_a_device_without_memory_for_fp32_takes_the_fastest_of_the_others(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_are(monkeypatch, FP32, BF16, INT8)
    machine.errors = {"torch_fp32": torch.OutOfMemoryError("CUDA out of memory")}
    assert settle_backend(auto(), demo, trial=machine.trial()).backend.name == "onnx_int8"


def test_a_package_that_is_not_installed_is_named_with_its_command(
    demo: Checkpoint, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_choice, "candidates", lambda *_: [FP32, INT8])
    monkeypatch.setattr("pipeline.backends.artifacts.exports.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        settle_backend(auto(), demo, trial=machine.trial())
    assert "onnx_int8 cannot be tried: not installed: onnx" in caplog.messages[-1]
    assert "pip install" in caplog.messages[-1]


def test_other_versions_and_other_code_are_measured_anew(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(None, demo, CPU, ParityConfig())
    rates.keep(FP32.backend, Rate(10, 0.1))
    assert rates.find(FP32.backend) == Rate(10, 0.1)
    assert rates.find(replace(FP32.backend, precision="bf16")) is None
    with monkeypatch.context() as other:
        other.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
        assert rates.find(FP32.backend) == Rate(10, 0.1)
        other.setenv("OMP_NUM_THREADS", "1")
        assert rates.find(FP32.backend) is None
    for name in ("_code", "cores"):
        with monkeypatch.context() as other:
            other.setattr(f"pipeline.backends.proofs.{name}", lambda: 77)
            assert rates.find(FP32.backend) is None
    rates.forget(FP32.backend)
    assert rates.find(FP32.backend) is None


# Datasets


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return scenes_manifest(tmp_path / "m.parquet", 48)


def job(manifest: Path, output: Path, **backend: Any) -> Config:
    return config_for(manifest, output, backend={"name": "auto", **backend})


def remember(config: Config, **rates: float) -> None:
    """Let an earlier job have measured these precisions of backend=torch."""
    store = Rates(config.backend.artifacts, open_checkpoint(config.model), CPU, config.parity)
    for precision, rate in rates.items():
        store.keep(replace(config.backend, name="torch", precision=precision), Rate(rate, 0.1))


@pytest.fixture
def _bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "computes_bf16", lambda: True)


def test_the_dataset_is_that_of_the_named_backend_byte_for_byte(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_job(job(manifest, tmp_path / "auto"))
    chosen = report.config["backend"]
    assert chosen["name"] == "torch"
    assert "backend=auto: torch fp32 with " in capsys.readouterr().err
    run_job(job(manifest, tmp_path / "named", **chosen))
    assert content(tmp_path / "auto") == content(tmp_path / "named")


@pytest.mark.usefixtures("_bf16")
def test_a_resume_keeps_the_backend_of_the_plan_without_measuring(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(manifest, tmp_path / "out")
    remember(config, fp32=10.0, bf16=20.0)
    assert run_job(config).config["backend"]["precision"] == "bf16"
    before = content(tmp_path / "out")
    # By now the other one is faster.
    store = Rates(None, open_checkpoint(config.model), CPU, config.parity)
    store.forget(replace(config.backend, name="torch", precision="bf16"))
    remember(config, bf16=5.0)
    (tmp_path / "out" / "_commits" / "00001.json").unlink()
    monkeypatch.setattr(backend_choice._Choice, "settle", lambda self: pytest.fail("the plan has a backend"))
    again = run_job(config)
    assert again.config["backend"]["precision"] == "bf16"
    assert again.rows == 24
    assert f"backend=auto: torch, as {tmp_path}/out/_plan.json says" in capsys.readouterr().err
    assert content(tmp_path / "out") == before


@pytest.mark.gpu
def test_a_gpu_takes_what_it_measured_and_the_dataset_is_that_of_the_named_backend(
    manifest: Path, tmp_path: Path
) -> None:
    chosen = run_job(job(manifest, tmp_path / "auto", device="cuda")).config["backend"]
    assert (chosen["name"], chosen["compile"]) == ("torch", "none")
    run_job(job(manifest, tmp_path / "named", **chosen))
    assert content(tmp_path / "auto") == content(tmp_path / "named")


def test_plans_of_earlier_versions_name_the_backend_in_their_fingerprints() -> None:
    prints = {"name": "onnx_int8", "precision": "int8", "device": "cpu", "runtime": "1", "quantization": "static"}
    found = with_backend_of(auto(), {"backend": prints}).backend
    assert (found.name, found.precision, found.quantization) == ("onnx_int8", "int8", "static")
    assert with_backend_of(auto(), {}) == auto()
    named = Config()
    assert with_backend_of(named, {"backend": prints}) == named


@pytest.mark.usefixtures("_bf16")
def test_a_backend_that_misses_a_limit_on_the_job_is_forgotten(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"lowest_cosine": {**ParityConfig().lowest_cosine, "bf16": 1.0}}
    config = replace(job(manifest, tmp_path / "out"), parity=ParityConfig(**limits))
    remember(config, fp32=10.0, bf16=20.0)
    with pytest.raises(ParityError, match=r"on backend=torch is too far"):
        run_job(config)
    assert "whose rate is forgotten" in capsys.readouterr().err
    # The next one measures it in proportion, and holds it to the limits.
    assert run_job(config).config["backend"]["precision"] == "fp32"


@pytest.mark.usefixtures("_bf16")
def test_nights_stay_with_the_backend_of_the_first_one(tmp_path: Path) -> None:
    photos = Collection(tmp_path / "images")
    photos.folder.mkdir()
    for number in range(10):
        photos.draw(number)
    photos.write()
    config, store = photos.config(backend={"name": "auto"}), tmp_path / "nights"
    remember(config, fp32=10.0, bf16=20.0)
    first = night(config, store, "2026-11-01")
    assert first.signs["recipe"]["backend"]["precision"] == "bf16"
    rates = Rates(None, open_checkpoint(config.model), CPU, config.parity)
    rates.forget(replace(config.backend, name="torch", precision="bf16"))
    photos.draw(11)
    photos.write()
    second = night(config, store, "2026-11-02")
    assert (second.embedded, second.anew) == (1, "")
    # Nothing is new: nothing is probed either.
    third = night(config, store, "2026-11-03")
    assert (third.embedded, third.anew, third.fingerprints) == (0, "", first.fingerprints)
    assert third.signs == first.signs
    plan = json.loads((store / "date=2026-11-03" / "_plan.json").read_bytes())
    assert plan["config"]["backend"]["name"] == "torch"


@pytest.mark.usefixtures("_bf16")
def test_an_update_of_a_folder_keeps_the_backend_of_its_dataset(tmp_path: Path) -> None:
    album = Album(tmp_path, count=6)
    config = album.config(backend={"name": "auto"})
    remember(config, fp32=10.0, bf16=20.0)
    album.run(backend={"name": "auto"})
    rates = Rates(None, open_checkpoint(config.model), CPU, config.parity)
    rates.forget(replace(config.backend, name="torch", precision="bf16"))
    album.draw(7)
    album.run(backend={"name": "auto"})
    plan = json.loads((album.output / "_plan.json").read_bytes())
    assert (plan["rows"], plan["config"]["backend"]["precision"]) == (7, "bf16")


# The config


def test_the_precision_goes_with_a_named_backend() -> None:
    (problem,) = check(auto(precision="bf16"))
    assert str(problem).startswith("backend.precision")
    assert "is chosen by backend=auto" in str(problem)
    assert [problem.key for problem in check(auto(compile="default"))] == ["backend.compile"]
    assert [problem.key for problem in check(auto(quantization="static"))] == ["backend.quantization"]
    assert check(auto()) == []


def test_the_parts_of_a_job_name_their_backend() -> None:
    (problem,) = check(auto().changed({"cluster.part": "1/2"}))
    assert "name a backend with cluster.part" in str(problem)


def test_the_bench_of_stages_wants_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_pipeline.main(["backend=auto"]) == 2
    assert "name a backend" in capsys.readouterr().err


@pytest.mark.usefixtures("_bf16")
def test_the_doctor_tries_what_the_job_would_take(manifest: Path, tmp_path: Path) -> None:
    config = job(manifest, tmp_path / "out")
    assert needed_by(config) == {}
    assert _with_backend(config).backend.precision == "bf16"
    remember(config, fp32=10.0, bf16=5.0)
    assert _with_backend(config).backend.precision == "fp32"


def test_the_service_takes_what_is_remembered(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "computes_bf16", lambda: True)
    config = job(manifest, tmp_path / "out")
    for rates, precision in (({}, "bf16"), ({"fp32": 10.0, "bf16": 5.0}, "fp32")):
        remember(config, **rates)
        with Engine(config) as engine:
            engine.choose_backend()
            assert engine.config.backend.precision == precision
