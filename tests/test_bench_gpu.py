"""The benchmark of a GPU: its time, its steps, its table, an interruption, and a rehearsal on the CPU."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.bench import gpu, gpu_collect, gpu_images, gpu_steps, gpu_table, report
from pipeline.bench.backends import _parser, read
from pipeline.bench.gpu_records import GROUPS, GpuBench, Outcome, Ran, Step
from pipeline.bench.gpu_run import TABLE_SECONDS, Budget, run_step, run_steps
from pipeline.bench.gpu_watch import Sample, Watch
from pipeline.config.compose import compose_config
from pipeline.core.processes import descendants, spent
from tests.conftest import ROOT
from tests.processes import is_running, wait_until


def step(name: str, group: str = "pipeline", least: float = 10.0, most: float = 60.0, **options: Any) -> Step:
    commands = options.pop("commands", ())
    collect = options.pop("collect", lambda ran: {})
    return Step(name, group, f"the step {name}", commands, collect, least=least, most=most, **options)


def done(one: Step) -> Outcome:
    return Outcome(one.name, one.group, one.title, "done", seconds=1.0)


class Clock:
    """A clock that the steps move on."""

    def __init__(self) -> None:
        self.time = 0.0
        self.limits: list[tuple[str, float]] = []

    def start(self, one: Step, limit: float) -> Outcome:
        self.limits.append((one.name, round(limit, 1)))
        self.time += min(limit, one.most)
        return done(one)


def run_at(clock: Clock, steps: list[Step], seconds: float) -> dict[str, Outcome]:
    kept: list[str] = []
    budget = Budget(seconds + TABLE_SECONDS, 0.0, lambda: clock.time)
    found, interrupted = run_steps(steps, budget, clock.start, keep=lambda outcome: kept.append(outcome.name))
    assert not interrupted
    assert [outcome.name for outcome in found] == [one.name for one in steps]
    assert sorted(kept) == sorted(one.name for one in steps)
    return {outcome.name: outcome for outcome in found}


# -- time


def test_a_group_takes_no_time_of_those_behind_it() -> None:
    clock = Clock()
    steps = [step("a", most=30), step("b", most=30), step("c", "tests"), step("d", "cluster", most=5)]
    found = run_at(clock, steps, 100)
    # 42 s are the pipeline's: 12 are left for b.
    assert clock.limits == [("a", 30.0), ("b", 12.0), ("c", 12.0), ("d", 5.0)]
    assert {outcome.status for outcome in found.values()} == {"done"}


def test_a_step_that_did_not_fit_takes_what_the_others_left() -> None:
    clock = Clock()
    steps = [step("a", most=30), step("b", least=20, most=25), step("c", "cluster", most=10)]
    run_at(clock, steps, 100)
    assert clock.limits == [("a", 30.0), ("c", 10.0), ("b", 25.0)]


def test_a_step_without_time_is_a_row_that_says_so() -> None:
    found = run_at(Clock(), [step("a", "cluster", most=95), step("b", "cluster")], 100)
    assert found["b"].status == "skipped"
    assert found["b"].reason == "it takes 10 s at least, and 5 s of --minutes were left"


def test_shares_of_the_groups_end_with_the_time() -> None:
    assert sorted(GROUPS.values()) == list(GROUPS.values())
    assert list(GROUPS.values())[-1] == 1.0


def test_what_this_machine_lacks_is_a_row_and_takes_no_time(tmp_path: Path) -> None:
    clock = Clock()
    steps = [step("a", absent="tensorrt is not installed"), step("b", needs=tmp_path / "files-1.parquet")]
    found = run_at(clock, steps, 100)
    assert clock.limits == []
    assert [outcome.status for outcome in found.values()] == ["absent", "absent"]
    assert found["b"].reason == "an earlier step did not leave files-1.parquet"


@pytest.mark.parametrize("raised", [True, False])
def test_an_interruption_keeps_what_is_done_and_begins_nothing_more(raised: bool) -> None:
    def start(one: Step, limit: float) -> Outcome:
        if one.name == "b" and raised:
            raise KeyboardInterrupt
        return dataclasses.replace(done(one), status="interrupted" if one.name == "b" else "done")

    budget = Budget(1000.0, 0.0, lambda: 0.0)
    found, interrupted = run_steps([step("a"), step("b"), step("c")], budget, start, keep=lambda outcome: None)
    assert interrupted
    assert [outcome.status for outcome in found] == ["done", "interrupted", "interrupted"]


# -- processes


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_reports_the_figures_that_its_process_left(tmp_path: Path) -> None:
    def collect(ran: Ran) -> dict[str, Any]:
        return {"said": ran.logs[0].read_text()}

    one = step("a", commands=(python("import os; print(os.environ['HF_HUB_OFFLINE'])"),), collect=collect)
    found = run_step(one, 30.0, tmp_path)
    assert (found.status, found.figures) == ("done", {"said": "1\n"})
    assert found.commands[0].startswith(sys.executable)


def test_a_step_that_fails_says_its_last_line_and_keeps_its_figures(tmp_path: Path) -> None:
    commands = (python("import sys; sys.exit('error: no kernel image is available')"),)
    found = run_step(step("a", commands=commands, collect=lambda ran: {"rows": [{}]}), 30.0, tmp_path)
    assert found.status == "failed"
    assert found.reason == "the process ended with exit code 1: error: no kernel image is available"
    assert found.figures == {"rows": [{}]}


def test_the_exception_of_a_step_is_named_also_where_another_line_is_its_last(tmp_path: Path) -> None:
    last = "sys.exit('Set HYDRA_FULL_ERROR=1')"
    code = f"import sys; print('torch.OutOfMemoryError: CUDA out of memory', flush=True); {last}"
    found = run_step(step("a", commands=(python(code),)), 30.0, tmp_path)
    assert found.reason == (
        "the process ended with exit code 1: Set HYDRA_FULL_ERROR=1 (torch.OutOfMemoryError: CUDA out of memory)"
    )


def test_a_step_without_figures_has_failed(tmp_path: Path) -> None:
    def collect(ran: Ran) -> dict[str, Any]:
        return dict(json.loads((tmp_path / "absent.json").read_text()))

    found = run_step(step("a", commands=(python(""),), collect=collect), 30.0, tmp_path)
    assert found.status == "failed"
    assert found.reason.startswith("left no figures: FileNotFoundError")


def test_a_step_ends_when_its_time_is_up_and_may_write_its_results_first(tmp_path: Path) -> None:
    code = (
        "import pathlib, time\n"
        f"begun, left = pathlib.Path({str(tmp_path / 'begun')!r}), pathlib.Path({str(tmp_path / 'left')!r})\n"
        "try:\n    begun.touch()\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    left.write_text('result')"
    )

    def collect(ran: Ran) -> dict[str, Any]:
        return {"left": (tmp_path / "left").read_text()}

    found = run_step(step("a", commands=(python(code),), collect=collect, grace_seconds=10.0), 1.0, tmp_path)
    assert (found.status, found.reason) == ("stopped", "not done within 1 s")
    assert found.figures == {"left": "result"} or not (tmp_path / "begun").exists()


def test_processes_side_by_side_share_the_cores(tmp_path: Path) -> None:
    every = sorted(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    run_step(step("a", commands=(python(code), python(code))), 30.0, tmp_path)
    said = [json.loads((tmp_path / name).read_text()) for name in ("a.log", "a-1.log")]
    assert said[0] + said[1] == every[: 2 * (len(every) // 2)] or len(every) == 1
    assert sorted(os.sched_getaffinity(0)) == every


def test_a_watch_samples_core_time_of_a_process_and_of_what_it_started() -> None:
    inner = "import time; print(1, flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    before = spent()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with Watch([process.pid]) as watch:
                wait_until(watch.samples)
            sample = watch.samples()[0]
            assert sample.own > 0
            assert sample.others > 0
            found = descendants([process.pid])
            assert len(found) == 1
            # A job counts what its feeders have started.
            assert (spent() - before).children >= sample.own + sample.others - 0.02
        finally:
            for pid in descendants([process.pid]):
                os.kill(pid, signal.SIGKILL)


# -- figures


def test_core_time_and_the_busy_gpu_are_of_the_steady_part() -> None:
    samples = tuple(Sample(at, 2.0 + at / 10, at, 50.0 if at > 10 else 0.0, 100.0 * at) for at in range(21))
    found = gpu_collect.steady(samples, (11.0, 19.0), 1000.0)
    assert found == pytest.approx(
        {"gpu_busy_by_driver": 0.5, "driver_core_us_per_image": 100, "other_core_us_per_image": 1000, "gpu_mib": 2000}
    )
    assert gpu_collect.steady(samples, (30.0, 40.0), 1000.0) == {}
    assert gpu_collect.curve(samples)[0] == pytest.approx((1.0, 0.0, 0.1, 1.0))


def test_a_driver_without_figures_of_its_gpu_leaves_them_out() -> None:
    samples = tuple(Sample(at, at, at, -1.0, -1.0) for at in range(3))
    found = gpu_collect.steady(samples, (0.0, 9.0), 10.0)
    assert (found["gpu_busy_by_driver"], found["gpu_mib"]) == (None, None)


def test_processes_that_share_a_dataset_have_the_sum_of_their_rates(tmp_path: Path) -> None:
    for folder in ("_parts", "_commits"):
        (tmp_path / folder).mkdir()
    for part in (1, 2):
        (tmp_path / "_parts" / f"{part}-of-2.json").write_text("{}")
    # The first part writes every 2 s, the second one every 4 s and 100 s later.
    for shard, at in ((0, 10), (2, 12), (4, 14), (1, 110), (3, 114)):
        path = tmp_path / "_commits" / f"{shard:05d}.json"
        path.write_text('{"rows": 100}')
        os.utime(path, (at, at))
    assert gpu_collect.rate_of_commits(tmp_path) == pytest.approx(50 + 25)
    (tmp_path / "_commits" / "00003.json").unlink()
    assert gpu_collect.rate_of_commits(tmp_path) == 0


def test_tests_are_counted_with_those_that_failed_and_why_others_were_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.test_a" name="one"/>'
        '<testcase classname="tests.test_a" name="two"><failure message="assert 1\n == 2"/></testcase>'
        '<testcase classname="tests.test_a" name="three"><skipped message="no torchao"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = gpu_collect.junit(Ran(1.0, (), ()), path)
    assert found["rows"] == [{"tests": 3, "failures": 1, "errors": 0, "skipped": 1}]
    assert found["failed"] == ["tests.test_a.two: assert 1 == 2"]
    assert found["left_out"] == ["tests.test_a.three: no torchao"]


def dataset(folder: Path, rows: list[tuple[str, list[float]]]) -> Path:
    folder.mkdir()
    vectors = pa.array([vector for _, vector in rows], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"id": [name for name, _ in rows], "embedding": vectors}), folder / "part-00000-ab.parquet")
    return folder


def test_datasets_are_compared_row_by_row(tmp_path: Path) -> None:
    one = dataset(tmp_path / "one", [("a", [1.0, 0.0]), ("b", [0.6, 0.8])])
    other = dataset(tmp_path / "other", [("a", [1.0, 0.0]), ("b", [0.8, 0.6])])
    third = dataset(tmp_path / "third", [("b", [1.0, 0.0]), ("a", [0.8, 0.6])])
    assert gpu_collect.lowest_cosine(one, other) == pytest.approx(0.96)
    with pytest.raises(ValueError, match="the rows differ from those of third"):
        gpu_collect.lowest_cosine(one, third)


# -- images


def test_a_picture_is_a_jpeg_of_a_fifth_of_a_megapixel_with_detail() -> None:
    data = gpu_images.picture(0)
    assert 20_000 < len(data) < 100_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert 0.19 < image.width * image.height / 1e6 < 0.21


def test_a_numbered_picture_has_other_bytes_and_the_same_pixels() -> None:
    data = gpu_images.picture(1)
    first, second = (gpu_images.numbered(data, number) for number in (1, 2))
    assert first != second
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(first)) as numbered:
        assert whole.tobytes() == numbered.tobytes()


# -- steps


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_step_has_a_name_of_its_own_in_the_order_of_the_groups(device: str, tmp_path: Path) -> None:
    every = gpu_steps.steps(gpu_steps.Plan(device, 64, tmp_path, tmp_path / "work", ("0", "GPU-1")))
    assert len({one.name for one in every}) == len(every)
    assert list(dict.fromkeys(one.group for one in every)) == list(GROUPS)
    limits = [one for one in every if not 0 < one.least < one.most]
    assert limits == []


@pytest.mark.slow
def test_every_job_has_a_valid_config(tmp_path: Path) -> None:
    every = gpu_steps.steps(gpu_steps.Plan("cuda", 64, tmp_path, tmp_path / "work", ("0", "GPU-1")))
    commands = [command for one in every for command in one.commands]
    for overrides in [command[3:] for command in commands if command[2:3] == ("pipeline.run",)]:
        compose_config(list(overrides))
    backends = [command[4:] for command in commands if command[2:4] == ("pipeline.bench", "backends")]
    assert len(backends) == len(gpu_steps.TABLE)
    for words in backends:
        config, plan = read(_parser().parse_intermixed_args(list(words)))
        assert config.model.weights == "random"
        assert plan.batches == [1, 256]


def test_two_workers_see_one_card_by_two_names(tmp_path: Path) -> None:
    every = gpu_steps.steps(gpu_steps.Plan("cuda", 64, tmp_path, tmp_path / "work", ("0", "GPU-1")))
    seen = {one.name: one.environment.get("CUDA_VISIBLE_DEVICES") for one in every if one.group == "cluster"}
    assert seen["cluster-two"] == "0,GPU-1"
    assert {text for name, text in seen.items() if name != "cluster-two"} == {"0"}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ("0", "GPU-aa")),
        ("1,0", ("1", "GPU-bb")),
        ("GPU-bb", ("GPU-bb", "1")),
        ("7", ("7", "7")),
    ],
)
def test_the_card_has_two_names(given: str | None, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert gpu.names_of_card([{"uuid": "GPU-aa"}, {"uuid": "GPU-bb"}]) == names


def test_a_package_that_is_absent_is_named() -> None:
    assert gpu_steps.missing("no-such-package-1", "no-such-package-2") == (
        "no-such-package-1 or no-such-package-2 is not installed"
    )
    assert gpu_steps.missing("no-such-package-1", "torch") == ""
    assert gpu_steps.missing() == ""


def test_the_worker_of_a_cluster_is_killed_once_and_not_before_the_first_commit(tmp_path: Path) -> None:
    killer = gpu_collect.Killer(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        killer(os.getpid())
        assert process.poll() is None
        (tmp_path / "_commits").mkdir()
        (tmp_path / "_commits" / "00000.json").touch()
        others = [pid for pid in descendants([os.getpid()]) if pid != process.pid]
        if others:
            process.kill()
            pytest.skip("this process has started other ones, which may not be killed")
        killer(os.getpid())
        assert process.wait(10) == -signal.SIGKILL


# -- table


def bench(*outcomes: Outcome) -> GpuBench:
    machine = {"processor": "A fast one", "cores": 16, "system": "Linux", "device": "cuda", "gpu": "NVIDIA H100"}
    return GpuBench("2026-11-03T10:20:30+00:00", "python -m pipeline.bench gpu", 9.0, 65_536, machine, {}, outcomes)


def job(name: str, row: Mapping[str, object]) -> Outcome:
    stages = {"decode": {"images_per_second": 12_700.0, "core_seconds": 80.0, "share": 0.9}}
    report = {"pace": {"bound": 12_700.0, "stages": stages}}
    figures = {"rows": [row], "report": report, "command_images_per_second": 3000.0}
    return Outcome(name, "pipeline", name, "done", seconds=20.0, figures=figures)


def test_the_table_has_every_row_with_its_figures_or_its_reason() -> None:
    forward = {
        "rows": [
            {"case": "as a job opens it", "images_per_second": 27_000.0, "of_matmul": 0.3},
            {"case": "graph 64", "remark": "RuntimeError: no | kernel"},
        ],
        "matmul_images_per_second": 90_000.0,
        "kernels": {"sm90_gemm": 0.625},
    }
    text = report.to_markdown(
        gpu_table.to_report(
            bench(
                job("clip_vit_b32-files-fast", {"images_per_second": 12_100.0, "gpu_busy": None}),
                Outcome("clip_vit_b32-files-gpu", "pipeline", "b32, gpu", "absent", "nvidia-nvimgcodec-cu13 is absent"),
                Outcome("forward-clip_vit_b32", "forward", "b32", "stopped", "not done within 90 s", figures=forward),
                Outcome("tests", "tests", "pytest -m gpu", "skipped", "it takes 20 s at least"),
            )
        )
    )
    assert "**1 of 4 steps are done; the fastest job had 12,100 images/s (clip_vit_b32-files-fast).**" in text
    assert "| b32, gpu | - | - | nvidia-nvimgcodec-cu13 is absent |" in text
    assert "| b32: graph 64 | - | - | RuntimeError: no / kernel |" in text
    assert "| clip_vit_b32-files-fast | images_per_second | 12,000 | 12,100 | yes |" in text
    assert "| forward-clip_vit_b32 as a job opens it | of_matmul | 0.3 | 0.3 | yes |" in text
    assert "| the encoder as a job opens it | 27,000 | 1 | - | - |" in text
    assert "| stage decode | 12,700 | - | 0.9 | - |" in text
    assert "| kernel sm90_gemm | - | - | - | 0.625 |" in text
    assert "- pytest -m gpu: skipped: it takes 20 s at least" in text


def test_a_table_of_nothing_is_still_a_table() -> None:
    text = report.to_markdown(gpu_table.to_report(bench(Outcome("a", "tests", "a", "interrupted", "not begun"))))
    assert "**0 of 1 steps are done.**" in text
    assert "- a: interrupted: not begun" in text


def test_the_picture_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    one = job("fast", {"images_per_second": 12_100.0})
    assert gpu.picture((one,), tmp_path).status == "absent"
    drawn = dataclasses.replace(one, figures={**one.figures, "curve": [(0.3, 0.5, 1.0, 8.0), (0.6, 0.9, 1.0, 9.0)]})
    assert gpu.picture((drawn,), tmp_path).status == "done"
    with Image.open(tmp_path / "gpu.png") as image:
        assert image.format == "PNG"


# -- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_names_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "sees no GPU" in said
    assert "--device cpu" in said
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_named_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--minutes", "0.1", "--rows", "3", "--only", "pipelin", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    for words in ("--minutes", "--rows", "--only"):
        assert words in said


@pytest.mark.slow
def test_an_interruption_leaves_the_table_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--device", "cpu", "--rows", "16", "--only", "forward", "--minutes", "5", "--out", str(out)]
    command = [sys.executable, "-m", "pipeline.bench", "gpu", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until((out / "logs" / "forward-demo.log").exists)
        started = descendants([process.pid])
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == f"error: interrupted; {out}/gpu.md has the steps that were done"
    assert "| demo forward | forward | interrupted |" in said
    assert said == (out / "gpu.md").read_text()
    assert json.loads((out / "forward-demo.json").read_text())["status"] == "interrupted"
    wait_until(lambda: not any(map(is_running, started)))
    assert not list(out.glob(".work-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "only",
    [
        "pipeline",
        pytest.param(
            "pipeline,tests,forward,backends,cluster",
            marks=pytest.mark.skipif(
                os.environ.get("PIPELINE_TEST_SLOW") != "1", reason="PIPELINE_TEST_SLOW=1 runs it"
            ),
        ),
    ],
)
def test_a_rehearsal_runs_every_step_that_a_machine_without_a_gpu_can_do(tmp_path: Path, only: str) -> None:
    began = time.monotonic()
    out = tmp_path / "out"
    options = ["--device", "cpu", "--rows", "32", "--minutes", "8.5", "--only", only, "--out", str(out)]
    command = [sys.executable, "-m", "pipeline.bench", "gpu", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began < 530
    bench = json.loads((out / "gpu.json").read_text())
    statuses = {outcome["name"]: (outcome["status"], outcome["reason"]) for outcome in bench["outcomes"]}
    # A busy machine may have no time for the last ones.
    assert statuses["demo-files-fast"] == ("done", "")
    assert statuses["demo-files-gpu"][0] == "absent"
    assert {status for status, _ in statuses.values()} <= {"done", "absent", "skipped", "stopped"}
    assert [name for name, (status, _) in statuses.items() if status == "failed"] == []
    for name in {"cluster-one", "cluster-two", "cluster-killed"} & {*statuses}:
        figures = json.loads((out / f"{name}.json").read_text())["figures"]
        assert not figures or figures["rows"][0]["same_bytes"] is True
    assert "## The gap of the fastest job" in ended.stdout
    assert not list(out.glob(".work-*"))
