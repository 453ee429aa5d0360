"""The doctor: every kind of problem is caused, and must be reported with advice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants

from pipeline.config.compose import compose_config
from pipeline.config.schema import BackendConfig, Config, LoaderConfig, ModelConfig, PromptsConfig
from pipeline.core.errors import BackendUnavailable
from pipeline.doctor import __main__ as doctor
from pipeline.doctor import backends, batch, decoders, disk, extras, hub, output, versions
from pipeline.doctor.check import Check, Status, Subject
from pipeline.doctor.format import lines, verdict
from pipeline.doctor.probes import PROBES, Probe, examine
from pipeline.engine.engine import Engine
from tests.conftest import ROOT
from tests.jobs import StubEncoder, config_for, scenes_manifest, stub_backend
from tests.processes import is_running, run_python, wait_until
from tests.s3 import BUCKET, moto_server, objects, pointed_at
from tests.servers import answer, serve

INLINE = {"isolation": "none"}
WEIGHTS = '{"id": "someone/clip", "sha": "0"}'


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return scenes_manifest(tmp_path / "m.parquet", 24)


@pytest.fixture
def look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run the command with --quick, and return its exit code and its JSON; nothing may be left behind."""
    before = set(tempfile.gettempdir() and os.listdir(tempfile.gettempdir()))

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        if not any(text.startswith("output.dir") for text in arguments):
            arguments = (*arguments, f"output.dir={tmp_path}/out")
        code = doctor.main(["--quick", "--json", *arguments])
        # One object, and nothing else.
        return code, json.loads(capsys.readouterr().out)

    yield run
    left = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("clip-pipeline-doctor-")}
    assert not left - before
    assert not list(tmp_path.rglob("*doctor*"))


def named(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in content["checks"] if check["name"] == name)


def failed(content: dict[str, Any]) -> list[str]:
    return [check["name"] for check in content["checks"] if check["status"] == "fail"]


def subject(config: Config, scratch: Path) -> Subject:
    scratch.mkdir()
    return Subject(config=config, quick=False, temporary=str(scratch), scratch=str(scratch))


def found(checks: Iterator[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


# The command.


def test_a_good_machine_is_ready_and_nothing_is_left_behind(look: Any, tmp_path: Path, manifest: Path) -> None:
    code, content = look(f"manifest.path={manifest}", "manifest.image=image")
    assert (code, failed(content)) == (0, [])
    assert content["status"] in ("ok", "warn")
    assert named(content, "Python")["status"] == "ok"
    assert named(content, "manifest")["figures"] == {"files": 1, "rows": 24}
    assert named(content, "write access")["figures"].keys() == {"write_seconds", "read_seconds", "delete_seconds"}
    assert named(content, "temporary files")["figures"]["free_bytes"] > 0
    assert named(content, "hub")["status"] == "skip"
    assert sum(content["counts"].values()) == len(content["checks"])
    assert os.listdir(tmp_path) == ["m.parquet"]


def test_the_problems_of_a_config_are_reported_beside_the_checks_that_need_no_config(look: Any) -> None:
    code, content = look("backend=onxx", "loader.bach_size=3")
    assert (code, failed(content)) == (2, ["backend", "loader.bach_size"])
    assert named(content, "backend")["way_out"] == "did you mean onnx?"
    assert named(content, "cores")["status"] in ("ok", "warn")
    assert "output" in named(content, "left out")["fact"]


def test_every_wrong_place_has_its_line(look: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pq.write_table(pa.table({"id": ["a"], "file": ["a.jpg"]}), tmp_path / "m.parquet")
    code, content = look(
        *(f"output.dir={tmp_path}/file/out", f"manifest.path={tmp_path}/m.parquet"),
        *("model=hub", f"model.name={tmp_path}/nowhere", "backend.device=cuda", "cluster=kubernetes"),
        "cluster.kubernetes_image=x",
    )
    assert code == 2
    assert {"model", "manifest", "write access"} <= {*failed(content)}
    assert "no such folder" in named(content, "model")["fact"]
    assert "manifest.image=path" in named(content, "manifest")["fact"]
    assert "file (string)" in named(content, "manifest")["fact"]
    assert "Not a directory" in named(content, "write access")["fact"]
    if not torch.cuda.is_available():
        assert "backend.device=cuda" in named(content, "GPU")["fact"]


def test_every_group_of_checks_has_a_probe_of_its_name() -> None:
    names = [path.stem for path in (ROOT / "pipeline" / "doctor").glob("*.py")]
    modules = {name: import_module(f"pipeline.doctor.{name}") for name in names if name != "__main__"}
    groups = {name: module.GROUP for name, module in modules.items() if hasattr(module, "look")}
    assert groups == {probe.module: probe.group for probe in PROBES}


@pytest.mark.slow
def test_a_probe_that_hangs_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.parquet")
    began = time.monotonic()
    places = (f"manifest.path={tmp_path}/m.parquet", f"output.dir={tmp_path}/out")
    done = command("--quick", "--json", "--timeout", "2", *places)
    content = json.loads(done.stdout)
    assert (done.returncode, failed(content)) == (2, ["manifest"])
    assert "no answer within 2 s" in named(content, "manifest")["fact"]
    assert named(content, "write access")["status"] == "ok"
    assert time.monotonic() - began < 60


def test_a_process_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "pid"
    lines = ("import subprocess, time, pathlib", "child = subprocess.Popen(['sleep', '600'])")
    (tmp_path / "torch.py").write_text(
        "\n".join((*lines, f"pathlib.Path({str(started)!r}).write_text(str(child.pid))", "time.sleep(600)"))
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    [check] = examine([probe("backends")], Subject(Config(), False, "", None), limit=3)
    assert (check.name, check.status) == ("backends", Status.FAIL)
    assert "no answer within 3 s" in check.fact
    wait_until(lambda: not is_running(int(started.read_text())), 10)


def probe(module: str) -> Probe:
    return next(one for one in PROBES if one.module == module)


@pytest.mark.slow
def test_a_large_config_is_handed_to_the_process_of_a_probe(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(20_000)]
    config = replace(Config(), prompts=PromptsConfig(labels=labels), backend=BackendConfig(device="cpu"))
    checks = list(examine([probe("decoders")], subject(config, tmp_path / "scratch")))
    assert "exact" in [check.name for check in checks]


def test_a_library_that_crashes_fails_its_probe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = (
        "import os, signal, sys\nprint('broken', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (tmp_path / "torch.py").write_text(crash)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    config = config_for(tmp_path / "m", tmp_path / "out")
    checks = list(examine([probe("backends"), probe("disk")], subject(config, tmp_path / "scratch")))
    [check] = [check for check in checks if check.status is Status.FAIL]
    assert check.group == "backends"
    assert "ended by SIGSEGV: broken" in check.fact
    assert found(iter(checks), "output.dir").status is Status.OK


def test_a_package_that_cannot_be_imported_fails_its_probe_alone(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('libarrow.so is broken')\n")
    places = (f"manifest.path={tmp_path}/m.parquet", f"output.dir={tmp_path}/out")
    done = command("--quick", "--json", *places, PYTHONPATH=f"{tmp_path}:{ROOT}")
    content = json.loads(done.stdout)
    assert (done.returncode, failed(content)) == (2, ["manifest"])
    assert "libarrow.so is broken" in named(content, "manifest")["fact"]
    assert "pip install" in named(content, "manifest")["way_out"]


def test_without_hydra_the_other_lines_are_there(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise ImportError('no hydra')\n")
    done = command("--quick", "--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    content = json.loads(done.stdout)
    assert done.returncode == 2
    assert "no hydra" in named(content, "config")["fact"]
    assert named(content, "packages")["status"] == "ok"


def test_a_limit_on_the_size_of_files_is_reported_by_the_output(tmp_path: Path) -> None:
    command = f"ulimit -f 64; exec {sys.executable} -m pipeline.doctor --quick --json output.dir={tmp_path}/out"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    content = json.loads(done.stdout)
    assert (done.returncode, failed(content)) == (2, ["write access"])
    assert "ulimit -f" in named(content, "write access")["fact"]
    assert not list(tmp_path.iterdir())


def test_an_output_that_may_not_be_written_and_caches_beside_it(tmp_path: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv to give that up")
    tmp_path.chmod(0o555)
    weak = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override")
    command = [*(weak if os.geteuid() == 0 else ()), sys.executable, "-m", "pipeline.doctor", "--quick", "--json"]
    places = [f"{key}={tmp_path}/{key}" for key in ("output.dir", "backend.artifacts", "prompts.cache")]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    content = json.loads(done.stdout)
    assert (done.returncode, failed(content)) == (2, ["write access"])
    assert f"{tmp_path}: Permission denied" in named(content, "write access")["fact"]
    assert "cannot be written" in named(content, "backend.artifacts")["fact"]
    assert "cannot be written" in named(content, "prompts.cache")["fact"]


def test_a_full_disk_is_reported_with_its_free_space(look: Any, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        code, content = look(f"output.dir={tmp_path}/small/out")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "small")], check=True)
    assert (code, failed(content)) == (2, ["write access", "output.dir"])
    assert "No space left on device" in named(content, "write access")["fact"]
    assert "_tmp-" not in named(content, "write access")["fact"]
    assert "0.3 MiB of 0.3 MiB free: too little" in named(content, "output.dir")["fact"]


def test_sigterm_ends_it_with_all_that_it_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.parquet")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "pipeline.doctor", "--quick", f"manifest.path={tmp_path}/m.parquet"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    # The last line before the one that hangs.
    assert any(line.split()[1:2] == ["model"] for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(30) == 75
    assert not list((tmp_path / "tmp").iterdir())


def test_a_person_reads_headings_arrows_and_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.main(["--quick", f"output.dir={tmp_path}/out", "model=hub", "model.name=./nowhere"]) == 2
    shown = capsys.readouterr()
    assert "\nhub and model\n" in shown.out
    assert "->" in shown.out
    assert shown.out.splitlines()[-1].startswith("not ready: 1 thing fails: model;") or "model;" in shown.out
    assert "\x1b" not in shown.out
    assert shown.err == ""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "pipeline.doctor", *arguments, **environment)


# The hub.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def ask_hub(name: str) -> tuple[Check, Check]:
    [there, model] = hub.look(Subject(replace(Config(), model=ModelConfig(name=name)), True, "", None))
    return there, model


def test_a_model_of_the_hub_is_there_to_be_downloaded_or_it_is_not(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"/api/models/someone/clip": answer(200, WEIGHTS.encode(), Content_Type="application/json")}
    with serve(pages) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        there, model = ask_hub("someone/clip")
        assert (there.status, model.status) == (Status.OK, Status.WARN)
        assert "hf download someone/clip" in model.way_out
        there, model = ask_hub("someone/other")
        assert (there.status, model.status) == (Status.WARN, Status.FAIL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there, model = ask_hub("someone/clip")
    assert (there.status, model.status) == (Status.SKIP, Status.FAIL)


def test_a_model_in_the_cache_needs_no_hub_and_neither_does_its_conversion(hub_cache: Path) -> None:
    assert [check.status for check in ask_hub("someone/clip")] == [Status.WARN, Status.FAIL]
    cache(hub_cache, "main", "config.json", "model.safetensors")
    assert [check.status for check in ask_hub("someone/clip")] == [Status.WARN, Status.OK]
    (hub_cache / "models--someone--clip/snapshots/main/model.safetensors").unlink()
    cache(hub_cache, "refs/pr/7", "config.json", "model.safetensors")
    _, model = ask_hub("someone/clip")
    assert model.status is Status.OK
    assert model.fact.endswith("its safetensors from the hub's conversion refs/pr/7")


def cache(root: Path, revision: str, *files: str) -> None:
    """Files in the hub's cache, as its client puts them there."""
    commit = revision.replace("/", "-")
    place = root / "models--someone--clip"
    for folder in (place / "refs" / revision, place / "snapshots" / commit / "x", place / "blobs" / "x"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    for name in files:
        (place / "snapshots" / commit / name).write_text("{}")


# Versions and extras.


def test_the_tested_versions_are_those_of_constraints() -> None:
    assert versions.TESTED.read_text() == (ROOT / "constraints.txt").read_text()
    assert versions.tested()["hydra-core"].startswith("1.3")


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: {"pillow": None, "hydra-core": "1.1"}.get(name, real(name)))
    versions.requirements.cache_clear()
    try:
        check = found(versions.look(Subject(None, True, "", None)), "packages")
    finally:
        versions.requirements.cache_clear()
    assert check.status is Status.FAIL
    assert "hydra-core 1.1 is installed, supported is <1.4,>=1.3.2" in check.fact
    assert "pillow is not installed" in check.fact
    assert check.way_out == "pip install -c constraints.txt -e ."


def test_both_builds_of_onnx_runtime_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "1.31.1" if "onnxruntime" in name else real(name))
    check = found(versions.look(Subject(None, True, "", None)), "conflicts")
    assert check.status is Status.FAIL
    assert check.way_out.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_an_untested_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.tested(), "numpy", "2.0.1")
    check = found(versions.look(Subject(None, True, "", None)), "tested versions")
    assert check.status is Status.WARN
    assert "(tested 2.0.1)" in check.fact


def test_an_extra_fails_where_the_job_needs_it_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "torchao" else real(name))
    versions.requirements.cache_clear()
    try:
        for name, status in (("torch", Status.SKIP), ("torch_int8", Status.FAIL)):
            config = replace(Config(), backend=BackendConfig(name=name))
            check = found(extras.look(Subject(config, True, "", None)), "int8")
            assert check.status is status
            assert check.way_out == "pip install -c constraints.txt -e '.[int8]'"
    finally:
        versions.requirements.cache_clear()


def test_every_described_extra_exists() -> None:
    assert {*extras.USES} <= {one.extra for one in versions.requirements()}


# Places.


def test_a_full_disk_fails_and_one_with_little_space_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "m", tmp_path / "out")
    checks = list(disk.look(Subject(config, False, str(tmp_path), None)))
    assert [check.name for check in checks][:2] == ["output.dir", "temporary files"]
    assert "the disk of output.dir" in checks[1].fact
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(disk, "LITTLE", 2**60)
    assert found(disk.look(Subject(config, False, str(tmp_path), None)), "output.dir").status is Status.WARN
    monkeypatch.setattr(disk, "TOO_LITTLE", 2**60)
    check = found(disk.look(Subject(config, False, str(tmp_path), None)), "output.dir")
    assert check.status is Status.FAIL
    assert "free some space" in check.way_out


@pytest.mark.compat("moto")
def test_a_store_is_written_read_and_cleared_again(tmp_path: Path) -> None:
    with moto_server(tmp_path / "log") as server, pointed_at(server):
        config = replace(Config(), output=replace(Config().output, dir=f"s3://{BUCKET}/photos"))
        checks = list(output.look(Subject(config, True, "", None)))
        assert [check.status for check in checks] == [Status.OK]
        assert not objects(server, "photos")
        config = replace(Config(), output=replace(Config().output, dir="s3://nobodys/photos"))
        [check] = output.look(Subject(config, True, "", None))
        assert check.status is Status.FAIL
        assert "bucket" in check.fact


# Backends and decoders.


def test_a_backend_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.can_run(BackendConfig(name="onnx", device="cpu"))
    backends.can_run(BackendConfig(name="torch", device="cpu", precision="bf16"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendUnavailable, match=r"not installed: onnxscript; pip install"):
        backends.can_run(BackendConfig(name="onnx", device="cpu"))
    for name in ("torch_fp8", "tensorrt"):
        with pytest.raises(BackendUnavailable, match="needs an NVIDIA GPU"):
            backends.can_run(BackendConfig(name=name, device="cpu"))


def test_the_backend_of_the_job_fails_where_another_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "compiler_problem", lambda: "torch.compile needs a C++ compiler")
    for name, status in (("torch", Status.SKIP), ("torch_int8", Status.FAIL)):
        config = replace(Config(), backend=BackendConfig(name=name, device="cpu"))
        checks = list(backends.look(Subject(config, False, "", None)))
        assert found(iter(checks), "torch.compile").status is status
        check = found(iter(checks), "torch_int8")
        assert (check.status, check.fact) == (status, "torch.compile needs a C++ compiler")


def test_decoders_decode_and_the_gpu_is_left_out() -> None:
    config = replace(Config(), backend=BackendConfig(device="cpu"))
    checks = list(decoders.look(Subject(config, False, "", None)))
    statuses = {check.name: check.status for check in checks}
    wanted = {name: Status.OK for name in ("exact", "fast", "scaled", "HEIF", "isolation")}
    # An extra decodes JPEG XL.
    jxl = Status.OK if find_spec("pillow_jxl") else Status.SKIP
    assert statuses == {**wanted, "JXL": jxl, "gpu": Status.SKIP}


def test_formats_without_their_package_are_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pi_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, name, None)
    config = replace(Config(), backend=BackendConfig(device="cpu"), loader=LoaderConfig(isolation="none"))
    checks = list(decoders.look(Subject(config, False, "", None)))
    heif, jxl = found(iter(checks), "HEIF"), found(iter(checks), "JXL")
    assert (heif.status, jxl.status) == (Status.WARN, Status.SKIP)
    assert "HEIC" in heif.fact
    assert "pi-heif" in heif.way_out
    assert "jxl" in jxl.way_out


# One batch.


@pytest.mark.slow
def test_a_batch_of_the_job_is_embedded_and_no_export_stays(tmp_path: Path, manifest: Path) -> None:
    job = config_for(
        manifest,
        tmp_path / "out",
        backend={"name": "torchscript", "precision": "bf16", "artifacts": str(tmp_path / "store")},
        images={"decoder": "fast"},
        prompts={"cache": str(tmp_path / "cache")},
    )
    checks = {check.name: check for check in batch.look(subject(job, tmp_path / "scratch"))}
    assert [*checks] == ["images", "embeddings", "speed", "parity", "decoder"]
    # Two of the 24 are no images.
    assert "22 of 24 rows can be read" in checks["images"].fact
    assert checks.pop("images").status is Status.WARN
    assert {check.status for check in checks.values()} == {Status.OK}
    assert checks["speed"].figures["images_per_second"] > 0
    assert checks["parity"].figures["lowest_cosine"] > 0.99
    assert sorted(os.listdir(tmp_path)) == ["m.parquet", "scratch"]


@pytest.mark.slow
def test_an_export_of_the_store_is_used_and_a_damaged_one_is_reported_and_left_alone(tmp_path: Path) -> None:
    backend = {"name": "torchscript", "artifacts": str(tmp_path / "store")}
    job = config_for(tmp_path / "m", tmp_path / "o", backend=backend, manifest={"path": None}, loader=INLINE)
    with Engine(job) as engine:
        engine.open_at(16)
    [file] = (tmp_path / "store").glob("*/model.pt")
    before = file.stat().st_mtime_ns, file.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        # Nothing can be made: what runs is from the store.
        patch.setattr(torch.jit, "trace", None)
        assert found(batch.look(subject(job, tmp_path / "1")), "speed").status is Status.OK
    assert (file.stat().st_mtime_ns, file.stat().st_size) == before
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    checks = {check.name: check for check in batch.look(subject(job, tmp_path / "2"))}
    assert checks["exports"].status is Status.WARN
    assert str(file.parent) in checks["exports"].fact
    assert checks["parity"].status is Status.OK
    assert file.read_bytes()[-1:] == b"!"


def test_images_that_are_not_where_the_manifest_says_fail(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "path": ["x.jpg", "y.jpg"]}), tmp_path / "m.parquet")
    job = config_for(tmp_path / "m.parquet", tmp_path / "out", manifest={"image": "path", "keep": []}, loader=INLINE)
    check = found(batch.look(subject(job, tmp_path / "scratch")), "images")
    assert check.status is Status.FAIL
    assert "0 of 2 rows can be read; not_found 2; such as: x.jpg: no such file" in check.fact
    assert f"paths start from {tmp_path}" in check.way_out


def test_embeddings_that_are_none_and_backends_that_are_far_from_fp32_fail(tmp_path: Path, manifest: Path) -> None:
    class Broken(StubEncoder):
        dim = 128

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), self.dim), float("nan"))

    with stub_backend(Broken):
        check = found(
            batch.look(subject(config_for(manifest, tmp_path / "o", loader=INLINE), tmp_path / "1")), "embeddings"
        )
    assert check.status is Status.FAIL
    limits = {"lowest_cosine": {**Config().parity.lowest_cosine, "bf16": 1.0}}
    job = config_for(manifest, tmp_path / "o", backend={"precision": "bf16"}, parity=limits, loader=INLINE)
    check = found(batch.look(subject(job, tmp_path / "2")), "parity")
    assert check.status is Status.FAIL
    assert "parity.lowest_cosine.bf16 wants 1.0" in check.fact


def test_a_model_and_labels_that_cannot_be_opened_are_reported(tmp_path: Path, manifest: Path) -> None:
    job = replace(config_for(manifest, tmp_path / "o", loader=INLINE), model=ModelConfig(name=str(tmp_path)))
    check = found(batch.look(subject(job, tmp_path / "1")), "model")
    assert "no config.json" in check.fact
    job = replace(config_for(manifest, tmp_path / "o", loader=INLINE), prompts=PromptsConfig(path="/nowhere.csv"))
    assert found(batch.look(subject(job, tmp_path / "2")), "prompts").status is Status.FAIL


def test_a_model_that_is_not_here_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(compose_config([]), model=ModelConfig(name="nobody/nothing-at-all"))
    assert found(batch.look(subject(job, tmp_path / "1")), "batch").status is Status.SKIP


@pytest.mark.slow
def test_all_checks_of_the_demo_job_pass(tmp_path: Path) -> None:
    done = command("--json", f"output.dir={tmp_path}/out", TMPDIR=str(tmp_path))
    content = json.loads(done.stdout)
    assert (done.returncode, failed(content)) == (0, [])
    assert named(content, "speed")["figures"]["images_per_second"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpu_is_found_with_its_memory(tmp_path: Path) -> None:
    checks = list(backends.look(Subject(replace(Config(), backend=BackendConfig(device="cuda")), False, "", None)))
    assert found(iter(checks), "cuda:0").figures["memory_bytes"] > 2**30
    assert "fp16" in found(iter(checks), "torch").fact


# The report.


def test_lines_fit_a_terminal_and_control_nothing() -> None:
    fact = "a long tale " * 20 + "\x1b[31m\nend"
    check = Check("output", "write access", Status.FAIL, fact, "set output.dir to a folder elsewhere " * 4)
    text = lines(check, colour=False, columns=80)
    assert max(map(len, text.splitlines())) < 80
    assert "\x1b" not in text
    assert "-> set output.dir" in text
    assert "\x1b[31mfail" in lines(check, colour=True, columns=80)


def test_the_verdict_names_what_fails() -> None:
    checks = [Check("a", name, Status.FAIL, "") for name in ("hub", "model")]
    assert verdict(checks, 1.0).startswith("not ready: 2 things fail: hub, model; 0 ok")
    assert verdict([Check("a", "x", Status.OK, "")], 1.0).startswith("ready: nothing fails; 1 ok")
